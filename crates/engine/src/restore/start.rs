//! What a thread goes on with: registers, FPU, signal mask, system call user dispatch, and a sleep that was interrupted.

use super::read::{Task, Thread};
use crate::error::{Context, Error, Result};
use rewake_agent::layout::Op;
use rewake_inject::stub::{RemoteCall, remote_calls};
use rewake_inject::tracee::Stopped;
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::registers::{self, XSAVE_MAX, XsaveFormat};
use rewake_sys::call::if_known;
use rewake_sys::ptrace::{self, Registers, SudConfig};

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

/// A thread that stands still, and what it was.
#[derive(Debug)]
pub(super) struct Standing<'a> {
    pub(super) task: &'a Task,
    pub(super) thread: &'a Thread,
    pub(super) at: &'a Stopped,
    /// Address of a `syscall` instruction.
    pub(super) gadget: u64,
}

/// Gives threads everything they go on with, after their sleeps have been begun, which told their registers.
///
/// # Errors
/// One of them is gone, or its registers cannot be set.
pub(super) fn set(threads: &[Standing<'_>], starts: &[Registers], check_cpu: bool) -> Result<()> {
    let mut format = None;
    for (standing, regs) in threads.iter().zip(starts) {
        let Standing { task, thread, at, .. } = standing;
        let format = match format {
            Some(format) => format,
            None => *format.insert(xsave_format(at.tid()).of(task.pid, &task.comm)?),
        };
        set_state(task, thread, at, regs, format, check_cpu)?;
    }
    Ok(())
}

/// Has a thread take up its sleep, as the last thing its agent does: when that is stopped, it is
/// where it was.
pub(super) fn sleep_steps(steps: &mut Steps, thread: &Thread) {
    if let Some((number, args)) = sleep_again(thread) {
        let label = Label::Text("sleeping on");
        steps.may(label, Op::new(number, &args).last());
    }
}

/// How far a thread has come with a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sleep {
    /// It is not there yet, or has none.
    Before,
    /// It was interrupted in it.
    Asleep,
    /// It is over.
    Over,
}

/// How far threads have come with their sleeps, if their agents took them up. They stand where they were stopped.
///
/// # Errors
/// One of them is gone.
pub(super) fn asleep(threads: &[Standing<'_>], by_agents: bool) -> Result<Vec<Sleep>> {
    if !by_agents {
        return Ok(vec![Sleep::Before; threads.len()]);
    }
    let look = |Standing { task, thread, at, .. }: &Standing<'_>| {
        let Some((number, _)) = sleep_again(thread) else { return Ok(Sleep::Before) };
        let regs = at.registers().of(task.pid, &task.comm)?;
        Ok(match regs.orig_rax as i64 {
            call if call == number && regs.rax == ERESTART_RESTARTBLOCK => Sleep::Asleep,
            libc::SYS_pause => Sleep::Over,
            _ => Sleep::Before,
        })
    };
    threads.iter().map(look).collect()
}

/// Begins the sleeps of threads that have not: the registers that they go on with, in order.
///
/// # Errors
/// One of them is gone.
pub(super) fn begin_sleeps(threads: &[Standing<'_>], asleep: &[Sleep]) -> Result<Vec<Registers>> {
    let mut all = Vec::with_capacity(threads.len());
    let mut sleepers = Vec::new();
    let mut calls = Vec::new();
    for (&Standing { task, thread, at, gadget }, asleep) in threads.iter().zip(asleep) {
        let Start { mut regs, sleep } = start(thread, task)?;
        match (sleep, asleep) {
            (Some((number, args)), Sleep::Before) => {
                sleepers.push(all.len());
                calls.push(RemoteCall { stub: Stopped::assume(at.tid()), gadget, number, args });
            }
            (Some(_), Sleep::Asleep) => regs.rax = ERESTART_RESTARTBLOCK,
            (Some(_), Sleep::Over) => (regs.rax, regs.orig_rax) = (0, u64::MAX),
            (None, _) => {}
        }
        all.push(regs);
    }
    let results = remote_calls(calls).map_err(|e| Error::new(e.to_string()))?;
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
