//! What a network lock says of itself, for those who find it later.

use rewake_netlink::iptables::COMMENT;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::{Stat, TaskState};
use std::fmt;

/// A process, by what distinguishes it from a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    /// Field 22 of /proc/PID/stat.
    start: u64,
}

impl Process {
    fn new(pid: i32) -> Process {
        Process { pid, start: stat(pid).map_or(0, |s| s.starttime) }
    }

    fn parse(text: &str) -> Option<Process> {
        let (pid, start) = text.split_once(':')?;
        Some(Process { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }

    fn state(self) -> Option<TaskState> {
        stat(self.pid).filter(|s| s.starttime == self.start)?;
        // Its first thread may have ended while others go on.
        let living = ProcDir::open_living(self.pid).ok()?.stat(&mut Vec::new()).ok()?;
        (!living.state.is_dead() && !is_dying(&living)).then_some(living.state)
    }
}

/// Has it been killed? Until it is dead it looks like one that runs, also if it was stopped before.
fn is_dying(stat: &Stat) -> bool {
    /// linux/sched.h
    const PF_EXITING: u32 = 4;
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let status = || ProcDir::open(stat.pid).and_then(|dir| dir.status(&mut Vec::new()));
    stat.flags & PF_EXITING != 0
        || status().map_or(true, |status| (status.sig_pnd | status.shd_pnd) & SIGKILL != 0)
}

fn stat(pid: i32) -> Option<Stat> {
    ProcDir::open(pid).and_then(|dir| dir.stat(&mut Vec::new())).ok()
}

/// Who has made a lock, and for the connections of which tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    by: Process,
    root: Process,
    /// The dump, by the inventory's `dump_criu_run_id`: addresses in its images may have been replaced since.
    run: Option<String>,
}

/// Whether a lock is still needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The dump is under way.
    Busy,
    /// The tree is dead: the lock waits for a restore.
    Dead,
    /// The tree was left stopped.
    Stopped,
    /// The tree runs, and nobody will unlock it.
    Stale,
}

impl Note {
    /// That of the calling process, for the tree of `root`.
    #[must_use]
    pub fn new(root: i32, run_id: &str) -> Note {
        let (by, root) = (Process::new(std::process::id() as i32), Process::new(root));
        Note { by, root, run: Some(run_id.to_owned()) }
    }

    /// Reads the text of a note; nothing if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Note> {
        let (by, root) = text.strip_prefix(COMMENT)?.trim_start().split_once(" for ")?;
        let (root, run) = match root.split_once(" run ") {
            None => (root, None),
            Some((root, run)) => (root, Some(run.to_owned())),
        };
        Some(Note { by: Process::parse(by)?, root: Process::parse(root)?, run })
    }

    /// Whether it is the lock of the dump with this id.
    #[must_use]
    pub fn is_of_run(&self, run_id: &str) -> bool {
        self.run.as_deref() == Some(run_id)
    }

    /// Whether the lock is for the tree of the process `root`, which started at `start` (field 22 of /proc/PID/stat).
    #[must_use]
    pub fn is_of(&self, root: i32, start: u64) -> bool {
        self.root == Process { pid: root, start }
    }

    /// Whether it is still needed.
    #[must_use]
    pub fn standing(&self) -> Standing {
        if self.by.state().is_some() {
            return Standing::Busy;
        }
        match self.root.state() {
            None => Standing::Dead,
            Some(TaskState::Stopped | TaskState::Tracing) => Standing::Stopped,
            Some(_) => Standing::Stale,
        }
    }

    /// Why it is there, in words.
    #[must_use]
    pub fn reason(&self) -> String {
        let root = self.root.pid;
        match self.standing() {
            Standing::Busy => format!("process {} works on it", self.by.pid),
            Standing::Dead => {
                format!("it keeps the peers of process {root}, which was saved, until the restore")
            }
            Standing::Stopped => {
                format!("process {root} was saved and left stopped: rewake resume {root}")
            }
            Standing::Stale => format!("process {root} runs, and nobody needs it"),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note { by, root, run } = self;
        write!(f, "{COMMENT} {}:{} for {}:{}", by.pid, by.start, root.pid, root.start)?;
        run.as_ref().map_or(Ok(()), |run| write!(f, " run {run}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_again() {
        let own = std::process::id() as i32;
        let note = Note::new(own, "12-34");
        assert_eq!(Note::parse(&note.to_string()), Some(note.clone()));
        assert!(note.is_of_run("12-34") && !note.is_of_run("12-3"));
        let older = Note { run: None, ..note.clone() };
        assert_eq!(Note::parse(&older.to_string()), Some(older));
        assert_eq!(note.standing(), Standing::Busy);
        for other in ["", "rewake", "rewake 1:2", "rewake 1:2 for x:4", "mine 1:2 for 3:4"] {
            assert_eq!(Note::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_lock_is_stale_once_its_maker_is_gone_and_its_tree_runs() {
        let note =
            |root: Process| Note { by: Process { pid: 1, start: u64::MAX }, root, run: None };
        let own = Process::new(std::process::id() as i32);
        assert_eq!(note(own).standing(), Standing::Stale);
        assert_eq!(note(Process { start: own.start + 1, ..own }).standing(), Standing::Dead);
    }
}
