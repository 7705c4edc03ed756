//! Finding a process tree and stopping it, every thread, without missing one that is being born.

use crate::error::{Context, Error, Result};
use rewake_inject::interrupted::mend_interrupted;
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::{Stat, TaskState};
use rewake_sys::ptrace;
use std::collections::HashSet;
use std::time::Instant;

/// `PF_KTHREAD` of `/proc/PID/stat` flags.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// How a task of the tree was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Running or sleeping.
    Alive,
    /// Stopped by this signal before we came.
    Stopped(i32),
    /// Dead, not yet reaped: its wait status.
    Zombie(i32),
}

/// A task that stands still.
#[derive(Debug)]
pub struct Task {
    /// Its `/proc` directory.
    pub dir: ProcDir,
    /// `/proc/PID/stat` as it was when it was found.
    pub stat: Stat,
    /// Dead or alive.
    pub life: Life,
    /// Its threads in ptrace stops, the leader first. Empty for a zombie.
    pub threads: Vec<Stopped>,
}

impl Task {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.stat.pid
    }

    /// Command name.
    #[must_use]
    pub fn comm(&self) -> &[u8] {
        &self.stat.comm
    }
}

/// A tree that stands still. Dropping it lets every task run on as it was.
#[derive(Debug, Default)]
pub struct Tree {
    /// Parents before children.
    pub tasks: Vec<Task>,
}

impl Tree {
    /// Stops the tree of `root`.
    ///
    /// # Errors
    /// A task cannot be traced, or does not stop before `deadline`.
    pub fn freeze(root: i32, deadline: Option<Instant>) -> Result<Tree> {
        let mut tree = Tree::default();
        let mut known = HashSet::new();
        let mut buffer = Vec::new();
        tree.stop(root, &mut known, deadline, &mut buffer)?;
        // A stopped task has no more children, but may be given some: by one that is killed, if it is a subreaper.
        // So look again until nobody new is found.
        loop {
            let mut found = Vec::new();
            for task in &tree.tasks {
                children(task, &known, &mut found, &mut buffer)?;
            }
            if found.is_empty() {
                break;
            }
            for pid in found {
                if !known.contains(&pid) {
                    tree.stop(pid, &mut known, deadline, &mut buffer)?;
                }
            }
        }
        tree.order();
        Ok(tree)
    }

    /// Stops one process and, recursively, what it has for children right then.
    fn stop(
        &mut self,
        pid: i32,
        known: &mut HashSet<i32>,
        deadline: Option<Instant>,
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        let root = self.tasks.is_empty();
        let gone = |e: &dyn std::fmt::Display| Error::new(format!("process {pid}: {e}"));
        let dir = match ProcDir::open(pid) {
            Ok(dir) => dir,
            Err(e) if e.is_gone() && !root => return Ok(()),
            Err(e) if e.is_gone() => {
                return Err(Error::new(format!("there is no process {pid}"))
                    .hint("give the pid of a running process with -t"));
            }
            Err(e) => return Err(gone(&e)),
        };
        let stat = match dir.stat(buffer) {
            Ok(stat) => stat,
            Err(e) if e.is_gone() && !root => return Ok(()),
            Err(e) => return Err(gone(&e)),
        };
        known.insert(pid);
        if stat.flags & KERNEL_THREAD != 0 {
            return Err(Error::new(format!(
                "process {pid} ({}) is a kernel thread, which has no state of its own to save",
                text(&stat.comm)
            )));
        }
        if matches!(stat.state, TaskState::Zombie | TaskState::Dead) {
            return self.zombie(dir, stat, root);
        }
        let threads = match seize_all(&dir, &stat, deadline) {
            Ok(threads) => threads,
            // It ended meanwhile: look at it as what it is now.
            Err(Seize::Gone) if !root => return Ok(()),
            Err(Seize::Gone) => return Err(gone(&"it ended while it was being stopped")),
            Err(Seize::Failed(e)) => return Err(e),
        };
        // It may have executed another program since its stat was read.
        let stat = dir.stat(buffer).map_err(|e| gone(&e))?;
        let life = match threads.first().and_then(Stopped::group_stop) {
            Some(signal) => Life::Stopped(signal),
            None => Life::Alive,
        };
        self.tasks.push(Task { dir, stat, life, threads });
        let mut found = Vec::new();
        if let Some(task) = self.tasks.last() {
            children(task, known, &mut found, buffer)?;
        }
        for child in found {
            self.stop(child, known, deadline, buffer)?;
        }
        Ok(())
    }

    fn zombie(&mut self, dir: ProcDir, stat: Stat, root: bool) -> Result<()> {
        let name = format!("process {} ({})", stat.pid, text(&stat.comm));
        if root {
            return Err(Error::new(format!(
                "{name} is dead: a zombie has nothing to save but its exit code"
            )));
        }
        if stat.num_threads > 1 {
            return Err(Error::new(format!(
                "{name}: its first thread has ended while others run on"
            ))
            .hint("such a process cannot be saved yet"));
        }
        let status = stat.exit_code;
        self.tasks.push(Task { dir, stat, life: Life::Zombie(status), threads: Vec::new() });
        Ok(())
    }

    /// Parents before children, children by pid.
    fn order(&mut self) {
        let mut rest: Vec<Option<Task>> =
            std::mem::take(&mut self.tasks).into_iter().map(Some).collect();
        let index: Vec<(i32, i32)> =
            rest.iter().flatten().map(|t| (t.stat.pid, t.stat.ppid)).collect();
        let mut stack: Vec<usize> = if index.is_empty() { vec![] } else { vec![0] };
        while let Some(at) = stack.pop() {
            let pid = index[at].0;
            let mut below: Vec<usize> =
                (1..index.len()).filter(|i| index[*i].1 == pid && rest[*i].is_some()).collect();
            below.sort_by_key(|i| std::cmp::Reverse(index[*i].0));
            stack.extend(below);
            self.tasks.extend(rest[at].take());
        }
        // Whose parent changed while we looked: still ours.
        self.tasks.extend(rest.into_iter().flatten());
    }

    /// Lets every task run on as it was.
    pub fn release(&mut self) {
        for task in &mut self.tasks {
            for thread in task.threads.drain(..) {
                let tid = thread.tid();
                if let Err(e) = thread.detach(0) {
                    log::debug!("thread {tid} is gone before it could be released: {e}");
                }
            }
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.release();
    }
}

/// A system call that our stop cut short with `EINTR` is made again. Done at once, so that it holds even if we are
/// killed.
fn mend(thread: &Stopped) {
    if thread.group_stop().is_none()
        && let Ok(regs) = thread.registers()
        && let Some(mended) = mend_interrupted(&regs)
        && let Err(e) = thread.set_registers(&mended)
    {
        log::debug!("thread {} is gone: {e}", thread.tid());
    }
}

enum Seize {
    Gone,
    Failed(Error),
}

fn seize_all(
    dir: &ProcDir,
    stat: &Stat,
    deadline: Option<Instant>,
) -> std::result::Result<Vec<Stopped>, Seize> {
    let pid = stat.pid;
    let mut stopped: Vec<Stopped> = Vec::new();
    let mut known: HashSet<i32> = HashSet::new();
    let fail = |e: &dyn std::fmt::Display| {
        Seize::Failed(Error::new(format!("process {pid} ({}): {e}", text(&stat.comm))))
    };
    // On any failure: the ones stopped so far run on.
    let result = (|| {
        loop {
            let tids = if known.is_empty() && stat.num_threads == 1 {
                vec![pid]
            } else {
                dir.tids().map_err(|e| if e.is_gone() { Seize::Gone } else { fail(&e) })?
            };
            let mut pending = Vec::new();
            for tid in tids.into_iter().filter(|t| !known.contains(t)).collect::<Vec<_>>() {
                match Running::seize(tid, ptrace::O_TRACESYSGOOD) {
                    Ok(running) => {
                        known.insert(tid);
                        pending.push(running);
                    }
                    Err(e) if e.errno == rewake_sys::Errno::SRCH && tid != pid => {}
                    Err(e) if e.errno == rewake_sys::Errno::SRCH => return Err(Seize::Gone),
                    Err(e) => return Err(Seize::Failed(cannot_trace(dir, stat, tid, e))),
                }
            }
            if pending.is_empty() {
                return Ok(());
            }
            for running in &pending {
                // Gone already: waiting will tell.
                let _ = running.interrupt();
            }
            let mut leader_gone = false;
            rewake_inject::tracee::wait_all(pending, deadline, |outcome| {
                match outcome {
                    Ok(thread) => {
                        mend(&thread);
                        stopped.push(thread);
                    }
                    Err(rewake_inject::Error::Gone { tid, .. }) => leader_gone |= tid == pid,
                    Err(e) => return Err(e),
                }
                Ok(())
            })
            .map_err(|e| fail(&e))?;
            if leader_gone {
                return Err(Seize::Gone);
            }
            if stat.num_threads == 1 && known.len() == 1 {
                // It may have made a thread since its stat was read: now it stands still and one look suffices.
                let tids = dir.tids().map_err(|e| fail(&e))?;
                if tids.len() == 1 {
                    return Ok(());
                }
            }
        }
    })();
    match result {
        Ok(()) => {
            stopped.sort_by_key(|t| (t.tid() != pid, t.tid()));
            Ok(stopped)
        }
        Err(e) => {
            for thread in stopped {
                let _ = thread.detach(0);
            }
            Err(e)
        }
    }
}

fn cannot_trace(dir: &ProcDir, stat: &Stat, tid: i32, e: rewake_sys::SyscallError) -> Error {
    let mut buffer = Vec::new();
    let tracer = dir.status(&mut buffer).map_or(0, |s| s.tracer_pid);
    let name = format!("process {} ({})", stat.pid, text(&stat.comm));
    if tracer != 0 {
        let comm = std::fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
        return Error::new(format!(
            "{name}: it is traced already, by process {tracer} ({})",
            comm.trim_end()
        ))
        .hint("end the debugger or tracer first");
    }
    let error = Error::new(format!("{name}: thread {tid} cannot be traced: {e}"));
    if e.errno == rewake_sys::Errno::PERM {
        return error.hint("run as root, or with CAP_SYS_PTRACE; Yama's ptrace_scope or a security module may forbid it too");
    }
    error
}

/// Adds the children of `task` that are not known yet.
fn children(
    task: &Task,
    known: &HashSet<i32>,
    found: &mut Vec<i32>,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    for thread in &task.threads {
        let name = format!("task/{}/children", thread.tid());
        let text = match task.dir.read(&name, buffer) {
            Ok(text) => text,
            Err(e) if e.is_gone() => continue,
            Err(e) => return Err(Error::new(e.to_string())),
        };
        let list = rewake_proc::children::parse(text).of(task.pid(), task.comm())?;
        found.extend(list.into_iter().filter(|pid| !known.contains(pid)));
    }
    Ok(())
}
