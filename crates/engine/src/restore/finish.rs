//! The last steps, from outside: take the arena away, set registers, let go.
//!
//! Until now every thread sits in its agent. From here on the controller's death kills the whole tree
//! (`PTRACE_O_EXITKILL`), and only a tree in which every thread is ready is released. The threads of a large tree are
//! divided among tracer threads ([`Crew`]): ptrace(2) ties each to the one that has seized it.

use super::read::{Checkpoint, STOPPED, Task, Thread};
use super::start;
use crate::crew::{Crew, cpus};
use crate::error::{Context, Error, Result};
use crate::stopped::Notes;
use rewake_inject::guard::Guard;
use rewake_inject::stub::{RemoteCall, find_syscall_instruction, remote_calls};
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::memory::vma::status;
use rewake_objects::pids::Pids;
use rewake_objects::task::signals;
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::signal;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// How a stub is traced: our death is its own.
const TRACE: u32 = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;

/// From so many threads on, they are divided among tracer threads.
const MANY: usize = 16;

fn cannot_suspend(e: Error) -> Error {
    e.hint("seccomp is restored only with CAP_SYS_ADMIN, and outside of any seccomp filter")
}

/// Seizes the init of the tree's PID namespace.
///
/// # Errors
/// It is gone.
pub fn seize_init(pid: i32) -> Result<Running> {
    Running::seize(pid, TRACE).of(pid, super::namespaces::INIT)
}

/// Which thread of the checkpoint.
#[derive(Debug, Clone, Copy)]
struct Place {
    task: usize,
    thread: usize,
}

impl Place {
    fn of(self, checkpoint: &Checkpoint) -> Result<(&Task, &Thread)> {
        let task = checkpoint.tasks.get(self.task);
        let thread = task.and_then(|task| task.alive.as_ref()?.threads.get(self.thread));
        task.zip(thread).ok_or_else(|| Error::new("a thread that the images do not have"))
    }
}

/// A thread to be seized: its id as we see it, and with which options.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    place: Place,
    tid: i32,
    how: u32,
}

/// What one tracer thread holds.
#[derive(Debug, Default)]
struct Shard {
    /// Threads that run on in their agents.
    seized: Vec<(Place, Running)>,
    /// Those that stand still.
    stopped: Vec<(Place, Stopped)>,
    /// The registers that these go on with, in the same order.
    starts: Vec<Registers>,
    /// Those that are ready to go on, of all trees.
    ready: Vec<(Place, Stopped)>,
}

impl Shard {
    fn seize(&mut self, wanted: &[Wanted], checkpoint: &Checkpoint) -> Result<()> {
        for Wanted { place, tid, how } in wanted {
            let (task, _) = place.of(checkpoint)?;
            let running = Running::seize(*tid, *how).of(task.pid, &task.comm);
            let filtered = how & ptrace::O_SUSPEND_SECCOMP != 0;
            let running = if filtered { running.map_err(cannot_suspend)? } else { running? };
            self.seized.push((*place, running));
        }
        Ok(())
    }

    fn stop(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        for (place, running) in &self.seized {
            let (task, _) = place.of(checkpoint)?;
            running.interrupt().of(task.pid, &task.comm)?;
        }
        for (place, running) in self.seized.drain(..) {
            let (task, _) = place.of(checkpoint)?;
            let stopped = running.wait_stop().of(task.pid, &task.comm)?;
            self.stopped.push((place, stopped));
        }
        Ok(())
    }

    /// Takes the arena away and begins the sleeps that agents have not.
    fn begin(&mut self, checkpoint: &Checkpoint, last: &Final) -> Result<()> {
        let asleep = start::asleep(&self.standing(checkpoint, last)?, last.asleep)?;
        let (base, len) = last.arena;
        self.unmap(checkpoint, last, "the agent", base..base + len as u64, |_| true)?;
        self.starts = start::begin_sleeps(&self.standing(checkpoint, last)?, &asleep)?;
        Ok(())
    }

    /// Has those that had unmapped their vdso unmap ours, and with it the very instruction that does it: they stand still
    /// before the next one, and go on elsewhere. No thread makes a call any more.
    fn take_vdso_away(&mut self, checkpoint: &Checkpoint, last: &Final) -> Result<()> {
        self.unmap(checkpoint, last, "the vdso", last.specials.clone(), is_without_vdso)
    }

    /// Sets the registers and all else that threads go on with.
    fn set(&mut self, checkpoint: &Checkpoint, last: &Final) -> Result<()> {
        start::set(&self.standing(checkpoint, last)?, &self.starts, last.check_cpu)?;
        self.starts.clear();
        self.ready.append(&mut self.stopped);
        Ok(())
    }

    fn standing<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        last: &Final,
    ) -> Result<Vec<start::Standing<'a>>> {
        let standing = |(place, at): &'a (Place, Stopped)| {
            let (task, thread) = place.of(checkpoint)?;
            let gadget = last.gadgets.get(&task.pid).copied().unwrap_or(0);
            Ok(start::Standing { task, thread, at, gadget })
        };
        self.stopped.iter().map(standing).collect()
    }

    /// Has the first thread of every task that is meant unmap a range of memory; all threads stand still, so of those that
    /// share memory one is enough.
    fn unmap(
        &self,
        checkpoint: &Checkpoint,
        last: &Final,
        what: &str,
        range: Range<u64>,
        meant: impl Fn(&Task) -> bool,
    ) -> Result<()> {
        let mut tasks = Vec::new();
        let mut calls = Vec::new();
        for (place, at) in self.stopped.iter().filter(|(place, _)| place.thread == 0) {
            let (task, _) = place.of(checkpoint)?;
            if last.guests.contains(&task.pid) || !meant(task) {
                continue;
            }
            tasks.push(task);
            calls.push(RemoteCall {
                stub: Stopped::assume(at.tid()),
                gadget: last.gadgets.get(&task.pid).copied().unwrap_or(0),
                number: libc::SYS_munmap,
                args: [range.start, range.end - range.start, 0, 0, 0, 0],
            });
        }
        let results = remote_calls(calls).map_err(|e| Error::new(e.to_string()))?;
        for (task, (_, result)) in tasks.into_iter().zip(results) {
            if result != 0 {
                return Err(Error::new(format!(
                    "process {}: {what} cannot be unmapped: {}",
                    task.pid,
                    rewake_sys::Errno::from_raw_os_error(-result as i32)
                )));
            }
        }
        Ok(())
    }

    fn detach(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let failed = crate::seize::let_go(self.ready.drain(..));
        failed.into_iter().try_for_each(|(place, e)| {
            let (task, _) = place.of(checkpoint)?;
            Err(e).of(task.pid, &task.comm)
        })
    }
}

/// Has this task unmapped its vdso?
fn is_without_vdso(task: &Task) -> bool {
    let alive = task.alive.as_ref();
    alive.is_some_and(|a| !a.mm.vmas.iter().any(|vma| vma.status & status::VDSO != 0))
}

/// What is needed to make threads ready.
#[derive(Debug)]
pub struct Final {
    /// The arena, to be unmapped.
    pub arena: (u64, usize),
    /// Where vvar and vdso are in tasks that have none in the images: to be unmapped too.
    pub specials: Range<u64>,
    /// Address of a `syscall` instruction in each task, by its pid.
    pub gadgets: HashMap<i32, u64>,
    /// The pids of those that have the memory of another.
    pub guests: HashSet<i32>,
    /// Have agents taken up the sleeps of their threads?
    pub asleep: bool,
    /// Refuse registers of CPU features that are not there?
    pub check_cpu: bool,
}

/// What each tracer thread does before the next thing is done by any.
type Step = fn(&mut Shard, &Checkpoint, &Final) -> Result<()>;

/// Those who trace the threads of all trees that are restored. Dropping them kills what they have not let go.
#[derive(Debug)]
pub struct Tracers {
    crew: Crew<Shard>,
    checkpoint: Arc<Checkpoint>,
}

/// A tree that is ready to go on.
#[derive(Debug)]
pub struct Ready {
    /// The init of its PID namespace.
    init: Option<Stopped>,
    /// Its living tasks, with their pids as we see them.
    tasks: Vec<(usize, i32)>,
}

impl Tracers {
    /// Nothing is traced yet.
    #[must_use]
    pub fn new(checkpoint: Arc<Checkpoint>) -> Tracers {
        Tracers { crew: Crew::alone(), checkpoint }
    }

    /// Has every tracer do something.
    fn each(
        &mut self,
        mut job: impl FnMut(usize) -> Box<dyn FnOnce(&mut Shard, &Checkpoint) -> Result<()> + Send>,
    ) -> Result<()> {
        let checkpoint = &self.checkpoint;
        let results = self.crew.each(|member| {
            let (job, checkpoint) = (job(member), checkpoint.clone());
            move |shard: &mut Shard| job(shard, &checkpoint)
        })?;
        results.into_iter().collect()
    }

    /// Seizes all threads of a tree; they run on in their agents.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn seize(&mut self, pids: &Pids) -> Result<Ready> {
        let mut wanted = Vec::new();
        let mut tasks = Vec::new();
        for (index, task) in self.checkpoint.tasks.iter().enumerate() {
            let Some(alive) = &task.alive else { continue };
            let outer = |tid: i32| {
                let outer = pids.outer(tid).ok_or_else(|| format!("thread {tid} is gone"));
                outer.of(task.pid, &task.comm)
            };
            // What is left to be done after the filters are installed is not theirs to judge.
            let how = TRACE | if alive.is_filtered() { ptrace::O_SUSPEND_SECCOMP } else { 0 };
            for (thread, of) in alive.threads.iter().enumerate() {
                let place = Place { task: index, thread };
                wanted.push(Wanted { place, tid: outer(of.tid)?, how });
            }
            tasks.push((index, outer(task.pid)?));
        }
        if wanted.len() >= MANY {
            self.crew.grow(cpus());
        }
        let share = wanted.len().div_ceil(self.crew.len()).max(1);
        let mut shares = wanted.chunks(share);
        self.each(|_| {
            let share = shares.next().unwrap_or(&[]).to_vec();
            Box::new(move |shard, checkpoint| shard.seize(&share, checkpoint))
        })?;
        Ok(Ready { init: None, tasks })
    }

    /// Stops all threads that are seized, takes the arena away and sets their registers.
    ///
    /// # Errors
    /// One of them is gone, or its registers cannot be set.
    pub fn make_ready(&mut self, last: Final) -> Result<()> {
        self.each(|_| Box::new(Shard::stop))?;
        // Only now: nobody is in the arena any more.
        let last = Arc::new(last);
        let without =
            self.checkpoint.tasks.iter().any(is_without_vdso) && !last.specials.is_empty();
        if !without {
            return self.each(|_| {
                let last = last.clone();
                Box::new(move |shard, checkpoint| {
                    shard.begin(checkpoint, &last)?;
                    shard.set(checkpoint, &last)
                })
            });
        }
        let steps: [Step; 3] = [Shard::begin, Shard::take_vdso_away, Shard::set];
        for step in steps {
            self.each(|_| {
                let last = last.clone();
                Box::new(move |shard, checkpoint| step(shard, checkpoint, &last))
            })?;
        }
        Ok(())
    }

    /// Lets every task of all trees go: stopped ones stopped, the others running (or all stopped).
    ///
    /// # Errors
    /// A task is gone already; the others go on all the same.
    pub fn release(&mut self, trees: Vec<Ready>, all_stopped: bool) -> Result<()> {
        trees.iter().try_for_each(|tree| tree.stop(&self.checkpoint, all_stopped))?;
        // From the first that is released the others must follow, or all end: should we die in between, the guard sees to it.
        let inits = trees.iter().flat_map(|tree| &tree.init).map(Stopped::tid);
        let tasks: Vec<i32> = trees.iter().flat_map(|tree| &tree.tasks).map(|(_, p)| *p).collect();
        let pids: Vec<i32> = inits.chain(tasks.iter().copied()).collect();
        let guard = if pids.len() > 1 {
            Some(Guard::post(&pids).map_err(|e| Error::new(e.to_string()))?)
        } else {
            None
        };
        let mut result = Ok(());
        for init in trees.into_iter().filter_map(|tree| tree.init) {
            let pid = init.tid();
            result = result.and(init.detach(0).of(pid, super::namespaces::INIT));
        }
        result = result.and(self.each(|_| Box::new(Shard::detach)));
        if let (Ok(()), Some(guard)) = (&result, guard) {
            guard.dismiss().map_err(|e| Error::new(e.to_string()))?;
        }
        if result.is_ok() && all_stopped {
            crate::resume::until_stopped(tasks.into_iter());
        }
        result
    }
}

impl Ready {
    /// Adds the init of its PID namespace.
    pub fn with_init(self, init: Option<Stopped>) -> Self {
        Ready { init, ..self }
    }

    /// Sends those their signal that shall be stopped when they go on.
    fn stop(&self, checkpoint: &Checkpoint, all_stopped: bool) -> Result<()> {
        let tasks = || {
            let task = |(index, pid): &(usize, i32)| Some((checkpoint.tasks.get(*index)?, *pid));
            self.tasks.iter().filter_map(task)
        };
        let is_stopped = |task: &Task| task.tc.task_state == STOPPED;
        if all_stopped && let Some((_, root)) = tasks().next() {
            let before: Vec<i32> =
                tasks().filter(|(task, _)| is_stopped(task)).map(|(_, pid)| pid).collect();
            Notes::here().write(root, &before)?;
        }
        let groups: Vec<Group> = tasks().map(|(task, _)| Group::of(task)).collect();
        for (task, pid) in tasks() {
            let stop = if is_stopped(task) {
                Some(stop_signal(task, &groups))
            } else {
                let stops = all_stopped || task.has_queued(signals::stops);
                stops.then_some(libc::SIGSTOP)
            };
            if let Some(stop) = stop {
                signal::kill(pid, stop).of(task.pid, &task.comm)?;
            }
        }
        Ok(())
    }
}

/// Who can keep a process group from being an orphan.
#[derive(Debug, Clone, Copy)]
struct Group {
    pid: i32,
    ppid: i32,
    group: i32,
    session: i32,
}

impl Group {
    fn of(task: &Task) -> Group {
        Group { pid: task.pid, ppid: task.ppid, group: task.pgid, session: task.sid }
    }
}

/// The signal that stops a task as it was stopped. Only SIGSTOP does so for certain: the kernel ignores the others in
/// orphaned process groups, and they may be blocked or have a handler by now.
fn stop_signal(task: &Task, tasks: &[Group]) -> i32 {
    let signal = task.tc.stop_signo.unwrap_or(0) as i32;
    let ours = |s: &Group| s.group == task.pgid && s.session == task.sid;
    let orphaned = !tasks.iter().filter(|member| ours(member)).any(|member| {
        tasks.iter().any(|parent| {
            parent.pid == member.ppid && parent.session == task.sid && parent.group != task.pgid
        })
    });
    let default = signals::with_actions()
        .zip(&task.tc.sigactions)
        .any(|(number, action)| number as i32 == signal && action.sigaction == 0);
    let blocked = task.tc.blk_sigset & (1u64 << (signal - 1).clamp(0, 63)) != 0;
    match signal {
        libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU if default && !blocked && !orphaned => signal,
        _ => libc::SIGSTOP,
    }
}

/// Where a `syscall` instruction is in every task: in the vdso, at the distance it has in ours.
///
/// # Errors
/// The vdso has none, or there is no vdso.
pub fn gadget(vdso: &[u8]) -> Result<u64> {
    find_syscall_instruction(vdso)
        .map(|offset| offset as u64)
        .map_err(|e| Error::new(format!("the vdso of this kernel: {e}")))
}
