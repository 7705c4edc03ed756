//! pidfd_open(2): a reference to a process of the tree, or to a thread of it (`PIDFD_THREAD`), or to one that is dead and
//! reaped.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, PidfdEntry};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags};
use std::collections::hash_map::Entry;

/// Surveys a pidfd.
///
/// # Errors
/// It is of a thread, or of a process outside the tree.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let Some(pidfd) = info.pidfd else {
        return Err(view.problem("fdinfo does not tell its process"));
    };
    let thread = is_of_thread(view.flags);
    let in_tree = if thread { &collector.threads } else { &collector.pids };
    // A zombie has no threads to be asked, but its number.
    if pidfd.pid != -1 && !in_tree.contains(&pidfd.pid) && !collector.pids.contains(&pidfd.pid) {
        let what = if thread { "thread" } else { "process" };
        return Err(view
            .problem(format!("it refers to {what} {}, which is not in the tree", pidfd.pid))
            .remedy("close it, or save a tree that contains that process"));
    }
    let id = collector.new_id();
    let entry = PidfdEntry {
        id,
        ino: view.stat.st_ino as u32,
        flags: view.flags & !(libc::O_RDWR as u32),
        nspid: pidfd.ns_pids.last().copied().unwrap_or(pidfd.pid),
        fown: view.owner()?,
    };
    collector.push(FileEntry {
        r#type: FdTypes::Pidfd as i32,
        id,
        pidfd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Pidfd))
}

/// `PIDFD_THREAD` is `O_EXCL`.
fn is_of_thread(flags: u32) -> bool {
    flags & libc::O_EXCL as u32 != 0
}

/// Makes a pidfd of the image; its process must exist already. Of a thread it is made when the tasks are whole.
///
/// # Errors
/// The process does not exist.
pub fn open(opener: &mut Opener<'_>, entry: &PidfdEntry) -> Result<OwnedFd, Problem> {
    let object = format!("pidfd {}", entry.id);
    let thread = is_of_thread(entry.flags);
    if thread && entry.nspid <= 0 {
        return rewake_sys::descriptors::dead_thread()
            .map_err(|e| Problem::new(object, format!("no dead thread can be made: {e}")));
    }
    if thread && let Some(placeholder) = opener.put_off_always(entry.id, object.as_bytes())? {
        return Ok(placeholder);
    }
    if entry.nspid <= 0 {
        // All pidfds of one dead process are of one dead process again.
        let dead = match opener.dead.entry(entry.ino) {
            Entry::Occupied(dead) => dead.into_mut(),
            Entry::Vacant(none) => {
                none.insert(rewake_sys::descriptors::dead_process().map_err(|e| {
                    Problem::new(object.clone(), format!("no dead process can be made: {e}"))
                })?)
            }
        };
        return dead.try_clone().map_err(|e| Problem::new(object, e.to_string()));
    }
    let failed = |e: rustix::io::Errno| {
        Problem::new(object.clone(), format!("process {} cannot be referred to: {e}", entry.nspid))
    };
    let outer = opener.pids.outer(entry.nspid).ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
    let pid = Pid::from_raw(outer).ok_or_else(|| failed(rustix::io::Errno::INVAL))?;
    // Linux 6.9.
    let flags = if thread { libc::O_EXCL as u32 } else { 0 };
    rustix::process::pidfd_open(pid, PidfdFlags::from_bits_retain(flags)).map_err(failed)
}
