//! Ids of processes, threads and groups: as the images have them, and as the controller sees them.
//!
//! A tree that is restored into a PID namespace of its own has its ids of old inside, and others outside. Whoever talks to
//! a task by its id (`/proc`, ptrace, pidfds, `kill`, `F_SETOWN`) asks here; what a task does itself takes ids as they are
//! in the images.

use rewake_proc::read::ProcRoot;
use rewake_proc::status::Status;
use rewake_sys::{Errno, task};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::sync::Arc;

/// How ids of the images become ids that the controller can use.
#[derive(Debug, Clone, Default)]
pub enum Pids {
    /// They are the same.
    #[default]
    Same,
    /// They belong to a PID namespace below ours.
    Inside(Arc<Namespace>),
}

/// A PID namespace below ours.
#[derive(Debug)]
pub struct Namespace {
    /// `/proc/PID/ns/pid` of a task in it.
    file: OwnedFd,
    /// What the link says: `pid:[4026532219]`.
    link: Vec<u8>,
}

impl Namespace {
    /// The namespace that the task `pid` lives in.
    ///
    /// # Errors
    /// There is no such task.
    pub fn of(pid: i32) -> Result<Namespace, Errno> {
        let path = format!("/proc/{pid}/ns/pid");
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let link = rustix::fs::readlink(&path, Vec::new())?.into_bytes();
        Ok(Namespace { file, link })
    }

    /// The id, here, of the task that has `pid` inside.
    fn outer(&self, pid: i32) -> Option<i32> {
        match task::pid_from_namespace(self.file.as_fd(), pid) {
            Ok(outer) => Some(outer),
            Err(e) if matches!(e.errno, Errno::NOTTY | Errno::INVAL) => {
                self.search(|tid, status| {
                    (status.ns_pid.as_deref()?.last() == Some(&pid)).then_some(tid)
                })
            }
            Err(_) => None,
        }
    }

    /// The id, here, of the process group that has `group` inside; its leader may be gone.
    fn outer_group(&self, group: i32) -> Option<i32> {
        self.search(|_, status| {
            let groups = status.ns_pgid.as_deref()?;
            (groups.last() == Some(&group)).then(|| groups.first().copied())?
        })
    }

    /// Shows `look` every task of the namespace that `/proc` has, until it finds what it wants.
    fn search(&self, look: impl Fn(i32, &Status) -> Option<i32>) -> Option<i32> {
        let root = ProcRoot::open().ok()?;
        let mut buffer = Vec::new();
        for pid in root.pids().ok()? {
            // Who is gone meanwhile is not who we look for.
            let Ok(dir) = root.pid(pid) else { continue };
            if dir.link("ns/pid", &mut buffer).ok() != Some(self.link.as_slice()) {
                continue;
            }
            for tid in dir.tids().unwrap_or_default() {
                let status = dir.task(tid).and_then(|task| task.status(&mut buffer));
                if let Some(found) = status.ok().and_then(|status| look(tid, &status)) {
                    return Some(found);
                }
            }
        }
        None
    }
}

impl Pids {
    /// Ids that belong to the PID namespace of the task `pid`, which is below ours.
    ///
    /// # Errors
    /// There is no such task.
    pub fn inside(pid: i32) -> Result<Pids, Errno> {
        Namespace::of(pid).map(|ns| Pids::Inside(Arc::new(ns)))
    }

    /// The PID namespace of the ids, if it is not ours.
    #[must_use]
    pub fn namespace(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Pids::Same => None,
            Pids::Inside(ns) => Some(ns.file.as_fd()),
        }
    }

    /// The id, here, of the process or thread that the images call `pid`; `None` if it does not exist (yet).
    #[must_use]
    pub fn outer(&self, pid: i32) -> Option<i32> {
        match self {
            Pids::Same => Some(pid),
            Pids::Inside(ns) => ns.outer(pid),
        }
    }

    /// The id, here, of the process group that the images call `group`.
    #[must_use]
    pub fn outer_group(&self, group: i32) -> Option<i32> {
        match self {
            Pids::Same => Some(group),
            Pids::Inside(ns) => ns.outer(group).or_else(|| ns.outer_group(group)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> i32 {
        std::process::id() as i32
    }

    #[test]
    fn the_same_ids_need_no_namespace() {
        assert_eq!(Pids::Same.outer(7), Some(7));
        assert_eq!(Pids::Same.outer_group(7), Some(7));
    }

    #[test]
    fn both_ways_find_a_thread_of_our_own() {
        // Our own namespace is one in which ids are the same inside and outside.
        let ns = Namespace::of(own()).unwrap();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(ns.outer(tid), Some(tid));
        let found =
            ns.search(|t, status| (status.ns_pid.as_deref()?.last() == Some(&tid)).then_some(t));
        assert_eq!(found, Some(tid));
    }

    #[test]
    fn groups_are_found_by_their_members() {
        use std::os::unix::process::CommandExt;
        let ns = Namespace::of(own()).unwrap();
        // Our own group may have been made outside our namespace and have no number in it.
        let mut member =
            std::process::Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let group = member.id() as i32;
        let found = ns.outer_group(group);
        member.kill().unwrap();
        member.wait().unwrap();
        assert_eq!(found, Some(group));
        assert_eq!(ns.outer_group(1 << 22), None);
    }

    #[test]
    fn who_does_not_exist_is_not_found() {
        let pids = Pids::inside(own()).unwrap();
        assert_eq!(pids.outer(1 << 22), None, "beyond any pid");
        assert!(Pids::inside(1 << 22).is_err());
    }
}
