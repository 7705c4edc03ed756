//! File locks of the tree (proc_locks(5)), which cannot be saved yet: who loses one is told.

use crate::freeze::Task;
use rewake_objects::problem::text;
use rewake_proc::locks::{Lock, LockKind};
use rewake_proc::read::ProcRoot;
use std::sync::Arc;

/// Warns of the locks that tasks hold. Those of open file descriptions (`F_OFD_SETLK`) name no process in `/proc/locks`.
pub fn warn(tasks: &[Arc<Task>]) {
    let mut buffer = Vec::new();
    let read = ProcRoot::open().map_err(|e| e.to_string()).and_then(|proc| {
        let listing = proc.read("locks", &mut buffer).map_err(|e| e.to_string())?;
        rewake_proc::locks::parse(listing).map_err(|e| e.to_string())
    });
    let locks = match read {
        Ok(locks) => locks,
        Err(e) => {
            log::debug!("file locks: {e}");
            return;
        }
    };
    for task in tasks {
        for lock in locks.iter().filter(|lock| lock.pid == task.pid() && !lock.waiting) {
            log::warn!(
                "process {} ({}) holds {}, which is not saved: once restored, it goes on without it",
                task.pid(),
                text(task.comm()),
                describe(lock)
            );
        }
    }
}

fn describe(lock: &Lock) -> String {
    let kind = match &lock.kind {
        LockKind::Posix => "a POSIX record lock (fcntl)",
        LockKind::Ofd => "a lock of an open file description",
        LockKind::Flock => "a lock (flock)",
        LockKind::Lease => "a lease",
        LockKind::Deleg => "a delegation",
        LockKind::Other(_) => "a file lock",
    };
    match lock.file {
        Some((major, minor, inode)) => {
            format!("{kind} on inode {inode} of device {major:x}:{minor:x}")
        }
        None => format!("{kind} on a file that is gone"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_described() {
        let listing = b"1: POSIX  ADVISORY  WRITE 12 fe:01:77 0 EOF\n2: FLOCK  ADVISORY  READ 12 00:2a:5 0 EOF\n";
        let locks = rewake_proc::locks::parse(listing).unwrap_or_default();
        let told: Vec<String> = locks.iter().map(describe).collect();
        let posix = "a POSIX record lock (fcntl) on inode 77 of device fe:1";
        assert_eq!(told, [posix, "a lock (flock) on inode 5 of device 0:2a"]);
    }
}
