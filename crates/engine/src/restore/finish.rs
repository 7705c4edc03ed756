//! The last steps, from outside: take the arena away, set registers, let go.
//!
//! Until now every thread sits in its agent. From here on the controller's death kills the whole tree
//! (`PTRACE_O_EXITKILL`), and only a tree in which every thread is ready is released.

use super::read::{Checkpoint, STOPPED, Task, Thread};
use crate::error::{Context, Error, Result};
use rewake_inject::guard::Guard;
use rewake_inject::stub::{RemoteCall, find_syscall_instruction, interrupted_calls, remote_calls};
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::pids::Pids;
use rewake_objects::task::registers::{self, XSAVE_MAX, XsaveFormat};
use rewake_objects::task::signals;
use rewake_sys::call::if_known;
use rewake_sys::ptrace::{self, Registers, SudConfig};
use rewake_sys::signal;

const EINTR: u64 = -4i64 as u64;
const ERESTART_RESTARTBLOCK: u64 = -516i64 as u64;

/// An interrupted sleep that can be taken up where it was: the call that gives the kernel a restart block for it. `None`
/// for anything else.
///
/// The kernel wrote the remaining time to the caller's own buffer when the sleep was interrupted for the dump; if the
/// caller gave none, the sleep starts again from its beginning.
fn sleep_again(thread: &Thread) -> Option<(i64, [u64; 6])> {
    let extra = thread.extra.as_ref()?;
    let (&[number, _], info) = (extra.again.as_slice(), thread.core.thread_info.as_ref()?) else {
        return None;
    };
    let g = &info.gpregs;
    let or = |remaining: u64, request: u64| if remaining != 0 { remaining } else { request };
    match number as i64 {
        libc::SYS_nanosleep => Some((libc::SYS_nanosleep, [or(g.si, g.di), g.si, 0, 0, 0, 0])),
        libc::SYS_clock_nanosleep => {
            Some((libc::SYS_clock_nanosleep, [g.di, g.si, or(g.r10, g.dx), g.r10, 0, 0]))
        }
        _ => None,
    }
}

/// The registers a thread goes on with, without regard to an interrupted call that must be made again.
fn image_registers(thread: &Thread) -> std::result::Result<Registers, rewake_objects::Problem> {
    match thread.core.thread_info.as_ref() {
        Some(info) => registers::restore_general(info),
        None => Err(rewake_objects::Problem::new("registers", "the image has none")),
    }
}

/// What a thread goes on with.
struct Start {
    regs: Registers,
    /// A sleep to be begun once more (through the `syscall` instruction in the vdso) and interrupted at once, so that the
    /// kernel itself will go on with it.
    sleep: Option<(i64, [u64; 6])>,
}

/// The registers a thread goes on with.
fn start(thread: &Thread, task: &Task) -> Result<Start> {
    let mut regs = image_registers(thread).map_err(|p| Error::of(task.pid, &task.comm, p))?;
    let again = thread.extra.as_ref().map_or(&[][..], |e| e.again.as_slice());
    let &[number, address] = again else { return Ok(Start { regs, sleep: None }) };
    if regs.rax != EINTR || regs.rip != address.wrapping_add(2) {
        return Ok(Start { regs, sleep: None });
    }
    let sleep = sleep_again(thread);
    match sleep {
        Some(_) => regs.orig_rax = number,
        // Made again from its beginning: absolute timeouts are exact, relative ones start anew.
        None => (regs.rax, regs.rip) = (number, address),
    }
    Ok(Start { regs, sleep })
}

/// A task whose threads are all seized.
#[derive(Debug)]
pub struct Seized<'a> {
    task: &'a Task,
    /// Its pid as we see it.
    pid: i32,
    threads: Vec<(&'a Thread, Running)>,
}

/// How a stub is traced: our death is its own.
const TRACE: u32 = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;

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

/// Seizes all threads of all tasks; they run on in their agents.
///
/// # Errors
/// One of them is gone.
pub fn seize<'a>(checkpoint: &'a Checkpoint, pids: &Pids) -> Result<Vec<Seized<'a>>> {
    let mut seized = Vec::new();
    for task in &checkpoint.tasks {
        let Some(alive) = &task.alive else { continue };
        let mut threads = Vec::with_capacity(alive.threads.len());
        let outer = |tid: i32| {
            pids.outer(tid).ok_or_else(|| format!("thread {tid} is gone")).of(task.pid, &task.comm)
        };
        let filtered = alive.is_filtered();
        // What is left to be done after the filters are installed is not theirs to judge.
        let how = TRACE | if filtered { ptrace::O_SUSPEND_SECCOMP } else { 0 };
        for thread in &alive.threads {
            let running = Running::seize(outer(thread.tid)?, how).of(task.pid, &task.comm);
            threads
                .push((thread, if filtered { running.map_err(cannot_suspend)? } else { running? }));
        }
        seized.push(Seized { task, pid: outer(task.pid)?, threads });
    }
    Ok(seized)
}

/// Tasks that are ready to go on.
#[derive(Debug)]
pub struct Ready<'a> {
    /// The init of their PID namespace.
    init: Option<Stopped>,
    /// Tasks, their pids as we see them, their threads.
    tasks: Vec<(&'a Task, i32, Vec<Stopped>)>,
}

/// What [`make_ready`] needs besides.
#[derive(Debug)]
pub struct Final<'a> {
    /// The arena, to be unmapped.
    pub arena: (u64, usize),
    /// Address of a `syscall` instruction in each task, by its pid.
    pub gadgets: &'a std::collections::HashMap<i32, u64>,
    /// The pids of those that have the memory of another.
    pub guests: &'a std::collections::HashSet<i32>,
    /// Refuse registers of CPU features that are not there?
    pub check_cpu: bool,
}

/// Stops all threads, takes the arena away and sets their registers.
///
/// # Errors
/// One of them is gone, or its registers cannot be set.
pub fn make_ready<'a>(seized: Vec<Seized<'a>>, last: &Final<'_>) -> Result<Ready<'a>> {
    for task in &seized {
        for (_, running) in &task.threads {
            running.interrupt().of(task.task.pid, &task.task.comm)?;
        }
    }
    let mut tasks = Vec::with_capacity(seized.len());
    for Seized { task, pid, threads } in seized {
        let stop = |(thread, running): (_, Running)| Ok((thread, running.wait_stop()?));
        let threads = threads.into_iter().map(stop).collect::<rewake_inject::Result<Vec<_>>>();
        tasks.push((task, pid, threads.of(task.pid, &task.comm)?));
    }
    take_arena_away(&mut tasks, last)?;
    let starts = begin_sleeps(&mut tasks, last)?;
    let mut starts = starts.into_iter();
    let mut format = None;
    let mut ready = Vec::with_capacity(tasks.len());
    for (task, pid, threads) in tasks {
        let mut done = Vec::with_capacity(threads.len());
        for ((thread, at), regs) in threads.into_iter().zip(&mut starts) {
            let format = match format {
                Some(format) => format,
                None => *format.insert(xsave_format(at.tid()).of(task.pid, &task.comm)?),
            };
            set_state(task, thread, &at, &regs, format, last.check_cpu)?;
            done.push(at);
        }
        ready.push((task, pid, done));
    }
    Ok(Ready { init: None, tasks: ready })
}

/// A task, its pid as we see it, its threads.
type StoppedTask<'a> = (&'a Task, i32, Vec<(&'a Thread, Stopped)>);

/// Has the leader of every task unmap the arena; all threads stand still, so of those that share memory one is enough.
fn take_arena_away(tasks: &mut [StoppedTask<'_>], last: &Final<'_>) -> Result<()> {
    let (base, len) = last.arena;
    let has_it = |task: &Task| !last.guests.contains(&task.pid);
    let calls = tasks
        .iter_mut()
        .filter(|(task, ..)| has_it(task))
        .map(|(task, _, threads)| RemoteCall {
            stub: threads.remove(0).1,
            gadget: last.gadgets.get(&task.pid).copied().unwrap_or(0),
            number: libc::SYS_munmap,
            args: [base, len as u64, 0, 0, 0, 0],
        })
        .collect();
    let results = remote_calls(calls).map_err(|e| Error::new(e.to_string()))?;
    let asked = tasks.iter_mut().filter(|(task, ..)| has_it(task));
    for ((task, _, threads), (stub, result)) in asked.zip(results) {
        if result != 0 {
            return Err(Error::new(format!(
                "process {}: the agent cannot be unmapped: {}",
                task.pid,
                rewake_sys::Errno::from_raw_os_error(-result as i32)
            )));
        }
        let leader = task.alive.as_ref().and_then(|a| a.threads.first());
        let leader = leader.ok_or_else(|| Error::new("a task without threads"))?;
        threads.insert(0, (leader, stub));
    }
    Ok(())
}

/// The registers that all threads go on with, in order, after the sleeps have been begun.
fn begin_sleeps(tasks: &mut [StoppedTask<'_>], last: &Final<'_>) -> Result<Vec<Registers>> {
    let mut all = Vec::new();
    let mut sleepers = Vec::new();
    let mut calls = Vec::new();
    for (task, _, threads) in tasks.iter() {
        let gadget = last.gadgets.get(&task.pid).copied().unwrap_or(0);
        for (thread, stub) in threads {
            let Start { regs, sleep } = start(thread, task)?;
            if let Some((number, args)) = sleep {
                sleepers.push(all.len());
                calls.push(RemoteCall { stub: Stopped::assume(stub.tid()), gadget, number, args });
            }
            all.push(regs);
        }
    }
    let results = interrupted_calls(calls).map_err(|e| Error::new(e.to_string()))?;
    for (at, (_, result)) in sleepers.into_iter().zip(results) {
        if result == ERESTART_RESTARTBLOCK as i64 {
            all[at].rax = ERESTART_RESTARTBLOCK;
        } else {
            // The time was up.
            (all[at].rax, all[at].orig_rax) = (0, u64::MAX);
        }
    }
    Ok(all)
}

fn xsave_format(tid: i32) -> std::result::Result<XsaveFormat, rewake_sys::SyscallError> {
    let mut area = vec![0u8; XSAVE_MAX];
    let len = if_known(ptrace::regset(tid, ptrace::NT_X86_XSTATE, &mut area))?.unwrap_or(512);
    Ok(XsaveFormat::of(&area[..len]))
}

fn set_state(
    task: &Task,
    thread: &Thread,
    at: &Stopped,
    regs: &Registers,
    format: XsaveFormat,
    check_cpu: bool,
) -> Result<()> {
    let (pid, comm, tid) = (task.pid, &task.comm, at.tid());
    if let Some(info) = &thread.core.thread_info {
        let area = registers::restore_xsave(info, format, check_cpu)
            .map_err(|p| Error::of(pid, comm, p))?;
        let set = if format.size > 512 { ptrace::NT_X86_XSTATE } else { ptrace::NT_PRFPREG };
        ptrace::set_regset(tid, set, &area)
            .map_err(|e| format!("thread {tid}: the FPU registers of the images are refused: {e}"))
            .of(pid, comm)?;
    }
    at.set_registers(regs).of(pid, comm)?;
    let leader = thread.tid == pid;
    let mask = if leader { Some(task.tc.blk_sigset) } else { thread.thread.blk_sigset };
    ptrace::set_signal_mask(tid, mask.unwrap_or(0)).of(pid, comm)?;
    if let Some(&[mode, selector, offset, len]) =
        thread.extra.as_ref().map(|e| e.syscall_dispatch.as_slice())
    {
        ptrace::set_sud_config(tid, &SudConfig { mode, selector, offset, len })
            .map_err(|e| format!("thread {tid}: syscall user dispatch: {e}"))
            .of(pid, comm)?;
    }
    Ok(())
}

impl Ready<'_> {
    /// Adds the init of their PID namespace.
    pub fn with_init(self, init: Option<Stopped>) -> Self {
        Ready { init, ..self }
    }

    /// Sends those their signal that shall be stopped when they go on.
    fn stop(&self, all_stopped: bool) -> Result<()> {
        let before: Vec<i32> = self
            .tasks
            .iter()
            .filter(|(task, ..)| task.tc.task_state == STOPPED)
            .map(|(_, pid, _)| *pid)
            .collect();
        if all_stopped && let Some((_, root, _)) = self.tasks.first() {
            crate::resume::note_stopped(*root, &before)?;
        }
        let groups: Vec<Group> = self.tasks.iter().map(|(task, ..)| Group::of(task)).collect();
        for (task, pid, _) in &self.tasks {
            let stop = if task.tc.task_state == STOPPED {
                Some(stop_signal(task, &groups))
            } else {
                all_stopped.then_some(libc::SIGSTOP)
            };
            if let Some(stop) = stop {
                signal::kill(*pid, stop).of(task.pid, &task.comm)?;
            }
        }
        Ok(())
    }

    /// Its processes, the init first.
    fn pids(&self) -> impl Iterator<Item = i32> {
        self.init.iter().map(Stopped::tid).chain(self.tasks.iter().map(|(_, pid, _)| *pid))
    }

    fn detach(self) -> Result<()> {
        let mut result = Ok(());
        if let Some(init) = self.init {
            let pid = init.tid();
            result = init.detach(0).of(pid, super::namespaces::INIT);
        }
        for (task, _, threads) in self.tasks {
            for thread in threads {
                result = result.and(thread.detach(0).of(task.pid, &task.comm));
            }
        }
        result
    }
}

/// Lets every task of all trees go: stopped ones stopped, the others running (or all stopped).
///
/// # Errors
/// A task is gone already; the others go on all the same.
pub fn release(trees: Vec<Ready<'_>>, all_stopped: bool) -> Result<()> {
    trees.iter().try_for_each(|tree| tree.stop(all_stopped))?;
    // From the first that is released the others must follow, or all end: should we die in between, the guard sees to it.
    let pids: Vec<i32> = trees.iter().flat_map(Ready::pids).collect();
    let own = |tree: &Ready<'_>| tree.tasks.iter().map(|(_, pid, _)| *pid).collect::<Vec<_>>();
    let tasks: Vec<i32> = trees.iter().flat_map(own).collect();
    let guard = if pids.len() > 1 {
        Some(Guard::post(&pids).map_err(|e| Error::new(e.to_string()))?)
    } else {
        None
    };
    let result = trees.into_iter().map(Ready::detach).fold(Ok(()), Result::and);
    if let (Ok(()), Some(guard)) = (&result, guard) {
        guard.dismiss().map_err(|e| Error::new(e.to_string()))?;
    }
    if result.is_ok() && all_stopped {
        crate::resume::until_stopped(tasks.into_iter());
    }
    result
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
