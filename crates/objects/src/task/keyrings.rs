//! Keyrings of a process or thread of its own: keyctl(2), keyrings(7). What keys are in them only their owner may read, and
//! nobody can put a keyring into a task but that task itself with all the keys at hand; so tasks that have one are refused.
//! A session's keyring is that of the restoring command. Keyrings of threads other than the first are not noticed.

use crate::Problem;
use rewake_agent::layout::Op;
use rewake_inject::ring::{Results, Script};

/// linux/keyctl.h
const KEYCTL_GET_KEYRING_ID: u64 = 0;
const KEY_SPEC_THREAD_KEYRING: i64 = -1;
const KEY_SPEC_PROCESS_KEYRING: i64 = -2;

/// Adds the questions for the keyrings of the thread and of the process, which make none; returns the index of the first.
pub fn ask(script: &mut Script) -> usize {
    let keyring = |id: i64| Op::new(libc::SYS_keyctl, &[KEYCTL_GET_KEYRING_ID, id as u64, 0]);
    let first = script.push(keyring(KEY_SPEC_THREAD_KEYRING));
    script.push(keyring(KEY_SPEC_PROCESS_KEYRING));
    first
}

/// Why a task that has one cannot be saved.
#[must_use]
pub fn read(results: &Results, asked: usize) -> Option<Problem> {
    let which = ["thread keyring", "process keyring"];
    // Where there is none the kernel says ENOKEY (or ENOSYS, EPERM: then there is nothing that it could use either).
    let (object, id) =
        which.iter().enumerate().find_map(|(i, w)| Some((w, results.value(asked + i).ok()?)))?;
    let why = "its keys can be read and put back by nobody but the program itself";
    Some(
        Problem::new(format!("{object} {id:#x}"), why)
            .remedy("have the program use a keyring of its session or user instead"),
    )
}
