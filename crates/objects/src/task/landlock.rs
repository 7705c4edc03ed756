//! Landlock domains: landlock(7). Nothing tells of them, and nobody can put a task into one but a program that still has its
//! rules; a task that came back would be free of them. So they are refused, where they are noticed: a task in a domain may
//! not look at tasks outside of it, in the way ptrace(2) does. Whether it may is asked by get_robust_list(2), which does no
//! more than that. Domains of single threads other than the leader are not noticed.

use crate::Problem;
use rewake_agent::layout::Op;
use rewake_inject::ring::{Results, Script};
use rewake_sys::Errno;

/// Adds the question whether the task may look at process `pid`; returns its index.
pub fn ask(script: &mut Script, pid: i32) -> usize {
    let room = script.space(16);
    let args = [pid as u64, room.address, room.address + 8];
    script.push(Op::new(libc::SYS_get_robust_list, &args))
}

/// May it not?
#[must_use]
pub fn forbidden(results: &Results, asked: usize) -> bool {
    results.value(asked) == Err(Errno::PERM)
}

/// Why a task in a domain cannot be saved.
#[must_use]
pub fn problem() -> Problem {
    Problem::new(
        "Landlock domain",
        "the kernel does not tell its rules, and the restored process would be free of them",
    )
    .remedy("start the program without its Landlock sandbox")
}
