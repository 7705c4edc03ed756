//! Stopping processes, all their threads, several processes at a time: while one comes to its stop, the others are
//! asked for theirs.

use crate::dump::coming;
use crate::error::{Error, Result};
use rewake_inject::interrupted::mend_interrupted;
use rewake_inject::tracee::{Running, Stopped, wait_all};
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::{Stat, TaskState};
use rewake_sys::{kcmp, ptrace, wait};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// How long those that are ending may take for it, if no time is set.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process that is being stopped. Dropping it lets those of its threads run on that stand still.
#[derive(Debug)]
pub struct Stopping {
    dir: ProcDir,
    stat: Stat,
    known: HashSet<i32>,
    stopped: Threads,
    /// Has any of its threads ended meanwhile?
    thinned: bool,
    /// Has its leader ended?
    leader_ended: bool,
    gone: bool,
    /// Was its stat read when it stood still?
    settled: bool,
}

/// Threads that run on when this is dropped.
#[derive(Debug, Default)]
struct Threads(Vec<Stopped>);

impl Drop for Threads {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            // If it is dead, that is no news.
            let _ = thread.detach(0);
        }
    }
}

impl Stopping {
    /// A process of which nothing is stopped yet.
    #[must_use]
    pub fn new(dir: ProcDir, stat: Stat) -> Stopping {
        let (known, stopped) = (HashSet::new(), Threads::default());
        let (thinned, leader_ended, gone, settled) = (false, false, false, false);
        Stopping { dir, stat, known, stopped, thinned, leader_ended, gone, settled }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.stat.pid
    }

    /// Has it ended meanwhile? A leader may do so while others go on.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone || self.stopped.0.is_empty()
    }

    /// Its `/proc` directory, its stat as it stands still, and its living threads, the leader first.
    ///
    /// # Errors
    /// It is gone.
    pub fn done(mut self) -> Result<(ProcDir, Stat, Vec<Stopped>)> {
        if !self.settled || self.leader_ended {
            self.settle()?;
        }
        let mut threads = std::mem::take(&mut self.stopped.0);
        threads.sort_by_key(|t| (t.tid() != self.stat.pid, t.tid()));
        if self.leader_ended
            && let Some(first) = threads.first()
        {
            // Of memory and the like the first living thread tells; who it is, its parent, and how it has ended, the leader.
            let dir = ProcDir::open(first.tid()).map_err(|e| self.failed(&e))?;
            let of_first = dir.stat(&mut Vec::new()).map_err(|e| self.failed(&e))?;
            let Stat { pid, comm, starttime, exit_code, .. } = self.stat;
            self.stat = Stat { pid, comm, starttime, exit_code, ..of_first };
            self.dir = dir;
        }
        Ok((self.dir, self.stat, threads))
    }

    /// Reads its stat anew: it may have executed another program since.
    fn settle(&mut self) -> Result<()> {
        self.stat = self.dir.stat(&mut Vec::new()).map_err(|e| self.failed(&e))?;
        self.settled = true;
        Ok(())
    }

    fn failed(&self, e: &dyn std::fmt::Display) -> Error {
        Error::new(format!("process {} ({}): {e}", self.stat.pid, text(&self.stat.comm)))
    }

    /// Seizes the threads that are not known yet; `pending` gets them.
    fn seize(&mut self, pending: &mut Vec<Running>) -> Result<()> {
        let pid = self.stat.pid;
        let tids = if self.known.is_empty() && self.stat.num_threads == 1 {
            vec![pid]
        } else {
            match self.dir.tids() {
                Ok(tids) => tids,
                Err(e) if e.is_gone() => {
                    self.gone = true;
                    return Ok(());
                }
                Err(e) => return Err(self.failed(&e)),
            }
        };
        for tid in tids {
            if self.known.contains(&tid) {
                continue;
            }
            match Running::seize(tid, ptrace::O_TRACESYSGOOD) {
                Ok(running) => {
                    self.known.insert(tid);
                    pending.push(running);
                }
                Err(e) if is_gone(tid, e.errno) => self.lose(tid),
                Err(e) => return Err(cannot_trace(&self.dir, &self.stat, tid, e)),
            }
        }
        Ok(())
    }

    /// A thread has ended.
    fn lose(&mut self, tid: i32) {
        self.thinned = true;
        self.leader_ended |= tid == self.stat.pid;
    }

    /// If a thread has ended by exit_group(2), those that stood still already are dying, too. Whoever traces them has to see them off
    /// before anybody hears of it.
    ///
    /// # Errors
    /// One does not die before `deadline`.
    fn see_off(&mut self, deadline: Option<Instant>) -> Result<()> {
        // The kernel answers nothing about a thread that it has begun to kill.
        let is_dying = |thread: &Stopped| thread.registers().is_err();
        // Of one that was made and ended the process between two looks nobody knows.
        if !self.thinned && !self.stopped.0.first().is_some_and(is_dying) {
            return Ok(());
        }
        let pid = self.stat.pid;
        let dying = self.stopped.0.extract_if(.., |thread| is_dying(thread));
        let mut dying: Vec<i32> = dying.map(|thread| thread.tid()).collect();
        // It may have ended while we traced it. The leader's death is told last, when all other threads are reaped.
        if self.stopped.0.is_empty() && !dying.contains(&pid) && is_dead(pid) {
            dying.push(pid);
        }
        dying.sort_unstable_by_key(|tid| *tid == pid);
        let deadline = deadline.unwrap_or_else(|| Instant::now() + PATIENCE);
        match dying.into_iter().find(|tid| !wait::until_dead_before(*tid, deadline)) {
            None => Ok(()),
            Some(tid) => {
                let name = format!("process {pid} ({})", text(&self.stat.comm));
                let what = format!("{name}: it is ending, but its thread {tid} does not");
                Err(Error::new(what).hint(
                    "the thread waits for something in the kernel: try again when it is gone",
                ))
            }
        }
    }

    /// Do we have the only thread it has? It may have made another since its stat was read; now that this one stands
    /// still, one look suffices.
    fn is_single(&mut self) -> Result<bool> {
        if self.stat.num_threads != 1 || self.known.len() != 1 {
            return Ok(false);
        }
        self.settle()?;
        Ok(self.stat.num_threads == 1)
    }
}

thread_local! {
    /// Threads that did not stop in time: we trace them until they do, or we end.
    static LATE: RefCell<Vec<i32>> = const { RefCell::new(Vec::new()) };
}

/// Lets threads go that did not stop in time for the calling thread, those that have stopped by now.
pub fn let_late_ones_go() {
    let is_late = |tid: &i32| match Running::known(*tid).wait_stop_until(Some(Instant::now())) {
        Ok(thread) => {
            mend(&thread);
            let _ = thread.detach(0);
            false
        }
        Err(rewake_inject::Error::Stuck { .. }) => true,
        Err(_) => false,
    };
    LATE.with_borrow_mut(|all| all.retain(is_late));
}

/// Stops all threads of all of them, again and again until no new one is found.
///
/// # Errors
/// A thread cannot be traced, or does not stop before `deadline`. Those that were stopped run on when `all` is dropped.
pub fn stop_all(all: &mut [Stopping], deadline: Option<Instant>) -> Result<()> {
    let mut active: Vec<usize> = (0..all.len()).collect();
    while !active.is_empty() {
        let mut pending = Vec::new();
        let mut owners: HashMap<i32, usize> = HashMap::new();
        let mut pids: HashMap<i32, i32> = HashMap::new();
        let mut busy = Vec::with_capacity(active.len());
        let mut result = Ok(());
        for at in active {
            let first = pending.len();
            result = all[at].seize(&mut pending);
            let new = || pending[first..].iter().map(Running::tid);
            owners.extend(new().map(|tid| (tid, at)));
            pids.extend(new().map(|tid| (tid, all[at].pid())));
            if result.is_err() {
                break;
            }
            if pending.len() > first && !all[at].gone {
                busy.push(at);
            }
        }
        for running in &pending {
            // Gone already: waiting will tell.
            let _ = running.interrupt();
        }
        // Whoever was seized is waited for, whatever failed: only then can it be let go.
        let mut waiter = None;
        let has_ended = |tid| pids.get(&tid) == Some(&tid) && is_dead(tid);
        let hopeless = |tid| {
            let held_up =
                |pid: &i32| vfork_waiter(*pid, tid).or_else(|| coming::holds_up(*pid, tid));
            waiter = pids.get(&tid).and_then(held_up);
            waiter.is_some()
        };
        let mut told = Vec::with_capacity(pending.len());
        let on_stop = |outcome: std::result::Result<Stopped, rewake_inject::Error>| {
            match &outcome {
                Ok(thread) => told.push(thread.tid()),
                Err(rewake_inject::Error::Gone { tid, .. }) => told.push(*tid),
                Err(_) => {}
            }
            match outcome {
                // It runs on; if it is dead, that is no news.
                Ok(thread) if is_idle_hand(&thread) => drop(thread.detach(0)),
                Ok(thread) => {
                    mend(&thread);
                    if let Some(at) = owners.get(&thread.tid()) {
                        all[*at].stopped.0.push(thread);
                    }
                }
                Err(rewake_inject::Error::Gone { tid, .. }) => {
                    if let Some(at) = owners.get(&tid) {
                        all[*at].lose(tid);
                    }
                }
                Err(e) => return Err(e),
            }
            Ok(())
        };
        let waited = wait_all(pending, deadline, on_stop, has_ended, hopeless);
        if waited.is_err() {
            let late = owners.keys().filter(|tid| !told.contains(tid));
            LATE.with_borrow_mut(|all| all.extend(late));
        }
        result?;
        if let (Err(_), Some(waiter)) = (&waited, waiter) {
            return Err(waiter);
        }
        waited.map_err(|e| match &e {
            rewake_inject::Error::Stuck { tid } if owners.contains_key(tid) => {
                all[owners[tid]].failed(&e)
            }
            e => match &all[..] {
                [only] => only.failed(e),
                _ => Error::new(format!("the tree cannot be stopped: {e}")),
            },
        })?;
        active = Vec::with_capacity(busy.len());
        for at in busy {
            if !all[at].gone && !all[at].is_single()? {
                active.push(at);
            }
        }
    }
    all.iter_mut().try_for_each(|stopping| stopping.see_off(deadline))
}

/// Lets threads of ours go, each of which comes with what it is; returns those that could not be let go.
///
/// Those that go first may end their process, or others, at once: whoever is killed before it was let go has to be seen off by its
/// tracer, or nobody else hears of its end.
pub fn let_go<T>(threads: impl Iterator<Item = (T, Stopped)>) -> Vec<(T, rewake_inject::Error)> {
    let (mut failed, mut killed) = (Vec::new(), Vec::new());
    for (what, thread) in threads {
        let tid = thread.tid();
        match thread.detach(0) {
            Ok(()) => {}
            Err(e) if e.is_gone() => {
                log::debug!("thread {tid} has been killed before it was let go: {e}");
                killed.push((tid, what, e));
            }
            Err(e) => failed.push((what, e)),
        }
    }
    let until = Instant::now() + PATIENCE / 10;
    // The leader's death is told last, when all other threads are reaped.
    while !killed.is_empty() && Instant::now() < until {
        killed.retain(|(tid, ..)| !wait::until_dead_before(*tid, Instant::now()));
        std::thread::yield_now();
    }
    failed.extend(killed.into_iter().map(|(_, what, e)| (what, e)));
    failed
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

/// A thread that waits in vfork(2) until its child executes a program or ends stops for nobody, and its registers are nowhere to
/// be read. The refusal of it, if this is one.
fn vfork_waiter(pid: i32, tid: i32) -> Option<Error> {
    let dir = ProcDir::open(pid).ok()?;
    let mut buffer = Vec::new();
    let comm = dir.stat(&mut buffer).ok()?.comm;
    let state = rewake_proc::stat::parse(dir.read(&format!("task/{tid}/stat"), &mut buffer).ok()?);
    if state.ok()?.state != TaskState::DiskSleep {
        return None;
    }
    let call = dir.read(&format!("task/{tid}/syscall"), &mut buffer).ok()?;
    let call = std::str::from_utf8(call).ok()?.split(' ').next()?.parse::<i64>().ok()?;
    if ![libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&call) {
        return None;
    }
    let children = dir.read(&format!("task/{tid}/children"), &mut buffer).ok()?;
    let children = rewake_proc::children::parse(children).ok()?;
    let same = |child: &i32| kcmp::compare(tid, *child, kcmp::Kind::Vm).is_ok_and(|o| o.is_eq());
    let child = children.into_iter().rev().find(same)?;
    let of_child = ProcDir::open(child).and_then(|dir| dir.stat(&mut buffer)).map(|s| s.comm);
    let error = Error::new(format!(
        "process {pid} ({}): it waits in vfork(2) for its child {child} ({}), and cannot be stopped there",
        text(&comm),
        text(&of_child.unwrap_or_default())
    ));
    Some(error.hint("try again when the child has executed its program or ended"))
}

/// Does a failure to seize a thread mean that it has ended? Of one that is about to be reaped the kernel says `EPERM`.
fn is_gone(tid: i32, errno: rewake_sys::Errno) -> bool {
    errno == rewake_sys::Errno::SRCH || errno == rewake_sys::Errno::PERM && is_dead(tid)
}

/// Is a thread dead or gone?
fn is_dead(tid: i32) -> bool {
    match ProcDir::open(tid).and_then(|dir| dir.stat(&mut Vec::new())) {
        Ok(stat) => stat.state.is_dead(),
        Err(_) => true,
    }
}

/// The kernel's flags of a thread.
fn flags_of(dir: &ProcDir, tid: i32) -> u32 {
    let mut buffer = Vec::new();
    let text = dir.read(&format!("task/{tid}/stat"), &mut buffer);
    text.ok().and_then(|text| rewake_proc::stat::parse(text).ok()).map_or(0, |stat| stat.flags)
}

/// Is a thread one of io_uring's, which the kernel makes for requests that would block, and keeps? It never comes to user
/// space, and does nothing but for requests in flight, of which the instance that they are made to tells.
fn is_idle_hand(thread: &Stopped) -> bool {
    /// `PF_IO_WORKER`.
    const IO_WORKER: u32 = 0x10;
    let nowhere = |regs: &ptrace::Registers| (regs.rip, regs.rsp) == (0, 0);
    thread.registers().is_ok_and(|regs| nowhere(&regs))
        && ProcDir::open(thread.tid())
            .is_ok_and(|dir| flags_of(&dir, thread.tid()) & IO_WORKER != 0)
}

fn cannot_trace(dir: &ProcDir, stat: &Stat, tid: i32, e: rewake_sys::SyscallError) -> Error {
    let mut buffer = Vec::new();
    let status = dir.task(tid).and_then(|thread| thread.status(&mut buffer));
    let tracer = status.map_or(0, |s| s.tracer_pid);
    let name = format!("process {} ({})", stat.pid, text(&stat.comm));
    if tracer != 0 {
        // A thread of its process.
        let process = ProcDir::open(tracer).and_then(|dir| dir.status(&mut buffer));
        let process = process.map_or(tracer, |status| status.tgid);
        let comm = ProcDir::open(process).and_then(|dir| dir.stat(&mut buffer)).map(|s| s.comm);
        let what = if tid == stat.pid { "it".to_owned() } else { format!("its thread {tid}") };
        return Error::new(format!(
            "{name}: {what} is traced already, by process {process} ({})",
            text(&comm.unwrap_or_default())
        ))
        .hint("end the debugger or tracer first, also if it is in the tree itself");
    }
    /// `PF_USER_WORKER`.
    const WORKER: u32 = 0x4000;
    if flags_of(dir, tid) & WORKER != 0 {
        return Error::new(format!(
            "{name}: thread {tid} is a worker of the kernel, which nobody can trace"
        ))
        .hint("such a process cannot be saved yet");
    }
    let error = Error::new(format!("{name}: thread {tid} cannot be traced: {e}"));
    if e.errno == rewake_sys::Errno::PERM { error.hint(may_not_trace()) } else { error }
}

/// Why we may not trace, as far as that can be seen.
fn may_not_trace() -> String {
    /// capabilities(7)
    const CAP_SYS_PTRACE: u32 = 19;
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let scope = scope.ok().and_then(|text| text.trim().parse::<u32>().ok()).unwrap_or(0);
    let own = ProcDir::open(std::process::id() as i32).and_then(|d| d.status(&mut Vec::new())).ok();
    let may = own.as_ref().is_some_and(|s| s.cap_eff & 1 << CAP_SYS_PTRACE != 0);
    let module = std::fs::read_to_string("/proc/self/attr/current")
        .ok()
        .map(|label| label.trim_matches(['\0', '\n']).to_owned())
        .filter(|label| !label.is_empty() && label != "unconfined");
    if scope >= 3 {
        "Yama's ptrace_scope is 3: nobody may trace until the next boot (sysctl kernel.yama.ptrace_scope)".into()
    } else if !may && scope > 0 {
        format!(
            "run as root, or with CAP_SYS_PTRACE, which Yama's ptrace_scope {scope} demands (sysctl kernel.yama.ptrace_scope)"
        )
    } else if !may {
        "run as root, or with CAP_SYS_PTRACE".into()
    } else if let Some(label) = module {
        format!(
            "the security module that runs this command as {} forbids it",
            text(label.as_bytes())
        )
    } else if own.is_some_and(|s| s.seccomp.unwrap_or(0) != 0) {
        "this command is under a seccomp filter, which may forbid ptrace: run it outside".into()
    } else {
        "it may be in a user namespace that is not below ours, or a security module (Landlock among them) forbids it".into()
    }
}
