//! pidfd_open(2): a reference to a process of the tree, or to one that is dead and reaped.

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
    // PIDFD_THREAD is O_EXCL.
    if view.flags & libc::O_EXCL as u32 != 0 {
        return Err(view.problem("references to single threads (PIDFD_THREAD) cannot be saved yet"));
    }
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let Some(pidfd) = info.pidfd else {
        return Err(view.problem("fdinfo does not tell its process"));
    };
    if pidfd.pid != -1 && !collector.pids.contains(&pidfd.pid) {
        return Err(view
            .problem(format!("it refers to process {}, which is not in the tree", pidfd.pid))
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

/// Makes a pidfd of the image; its process must exist already.
///
/// # Errors
/// The process does not exist.
pub fn open(opener: &mut Opener<'_>, entry: &PidfdEntry) -> Result<OwnedFd, Problem> {
    let object = format!("pidfd {}", entry.id);
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
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(failed)
}
