//! Notes of who in a tree was stopped before a checkpoint stopped all of it.
//!
//! These must stay stopped when the tree is resumed, and the kernel does not say who sent a SIGSTOP. So they are noted, by their
//! pids, in `/run/rewake/stopped-PID-START-NAMESPACES`: the pid and the start time of the tree's root, and the PID and time
//! namespaces in which these mean something, for containers may have `/run` in common. No note means that the checkpoint has
//! stopped all that are stopped. Whoever touches a note removes those whose tree is gone.

use crate::error::{Error, Result};
use crate::options::Pid;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::Stat;
use std::collections::HashSet;
use std::path::PathBuf;

/// The notes of this machine that the calling process can understand.
#[derive(Debug)]
pub struct Notes {
    dir: PathBuf,
    /// Our namespaces, as the names of files have them.
    namespaces: String,
}

impl Notes {
    /// Those in `/run`.
    #[must_use]
    pub fn here() -> Notes {
        let number =
            |kind: &str| rustix::fs::stat(format!("/proc/self/ns/{kind}")).map(|s| s.st_ino);
        let namespaces = ["pid", "time"].map(|kind| number(kind).unwrap_or(0).to_string());
        Notes { dir: "/run/rewake".into(), namespaces: namespaces.join("-") }
    }

    fn path(&self, root: &Stat) -> PathBuf {
        let Stat { pid, starttime, .. } = root;
        self.dir.join(format!("stopped-{pid}-{starttime}-{}", self.namespaces))
    }

    /// The root and its start time of one of our notes.
    fn root(&self, name: &str) -> Option<(Pid, u64)> {
        let name = name.strip_prefix("stopped-")?.strip_suffix(&self.namespaces)?;
        let (pid, start) = name.strip_suffix('-')?.split_once('-')?;
        Some((pid.parse().ok()?, start.parse().ok()?))
    }

    /// Notes who of the tree of `root` was stopped, if anybody was.
    ///
    /// # Errors
    /// It cannot be written, or the root is gone.
    pub fn write(&self, root: Pid, stopped: &[Pid]) -> Result<()> {
        if stopped.is_empty() {
            return Ok(());
        }
        let stat = ProcDir::open(root).and_then(|dir| dir.stat(&mut Vec::new()));
        let path = self.path(&stat.map_err(|e| Error::new(e.to_string()))?);
        let list: String = stopped.iter().map(|pid| format!("{pid}\n")).collect();
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| std::fs::write(&path, list))
            .map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
        self.sweep();
        Ok(())
    }

    /// Who of the tree of `root` was stopped.
    #[must_use]
    pub fn read(&self, root: &Stat) -> HashSet<Pid> {
        let list = std::fs::read_to_string(self.path(root)).unwrap_or_default();
        list.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Removes the note of a tree that runs on.
    pub fn remove(&self, root: &Stat) {
        if std::fs::remove_file(self.path(root)).is_ok() {
            self.sweep();
        }
    }

    /// Removes the notes of trees whose root is gone.
    fn sweep(&self) {
        let mut buffer = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let Some((pid, start)) = entry.file_name().to_str().and_then(|name| self.root(name))
            else {
                continue;
            };
            let gone = match ProcDir::open(pid).and_then(|dir| dir.stat(&mut buffer)) {
                Ok(stat) => stat.starttime != start,
                Err(e) => e.is_gone(),
            };
            if gone && let Err(e) = std::fs::remove_file(entry.path()) {
                log::debug!("{}: {e}", entry.path().display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_trees_that_are_gone_are_removed_and_no_others() {
        let dir = std::env::temp_dir().join(format!("rewake-stopped-{}", std::process::id()));
        let notes = Notes { dir: dir.clone(), namespaces: "11-22".into() };
        let elsewhere = Notes { dir: dir.clone(), namespaces: "111-22".into() };
        let own = ProcDir::open(std::process::id() as Pid).unwrap().stat(&mut Vec::new()).unwrap();
        let before = Stat { starttime: own.starttime + 1, ..own.clone() };
        let gone = Stat { pid: Pid::MAX, ..own.clone() };
        notes.write(own.pid, &[]).unwrap();
        assert!(!dir.exists(), "nobody was stopped");

        std::fs::create_dir(&dir).unwrap();
        std::fs::write(elsewhere.path(&gone), "3\n").unwrap();
        std::fs::write(notes.path(&gone), "1\n").unwrap();
        std::fs::write(notes.path(&before), "2\n").unwrap();
        std::fs::write(dir.join("stopped-x-y-11-22"), "").unwrap();
        notes.write(own.pid, &[5, 7]).unwrap();
        assert_eq!(notes.read(&own), HashSet::from([5, 7]));
        let is_there = |notes: &Notes, root: &Stat| notes.path(root).exists();
        assert!(!is_there(&notes, &gone) && !is_there(&notes, &before));
        assert!(is_there(&elsewhere, &gone) && dir.join("stopped-x-y-11-22").exists());

        std::fs::write(notes.path(&gone), "1\n").unwrap();
        notes.remove(&own);
        assert!(!is_there(&notes, &own) && !is_there(&notes, &gone));
        assert_eq!(notes.read(&own), HashSet::new());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
