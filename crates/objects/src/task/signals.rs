//! Signal actions, queues and alternate stacks: `rt_sigaction(2)`, `rt_sigqueueinfo(2)`, `sigaltstack(2)`.
//!
//! Actions are asked by the agent; queues are read from outside (`PTRACE_PEEKSIGINFO`); alternate stacks are known only
//! to each thread. Queued signals are put back by the task itself, which alone may send any `si_code` to itself.
//!
//! A `SIGCONT` makes a traced process stop for its tracer (`PTRACE_EVENT_STOP`, ptrace(2)), in the middle of its script, and
//! setting the action of a queued one to the default takes it away. So it is queued, and its action set, before the task is
//! traced ([`restore_continue`]); what is done later leaves both alone.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use rewake_inject::ring::{Data, Results, Script};
use rewake_sys::ptrace::SigInfo;

const SIGKILL: u32 = 9;
const SIGCONT: u32 = 18;
const SIGSTOP: u32 = 19;
const LAST: u32 = 64;
/// `struct sigaction` as the kernel has it: handler, flags, restorer, mask.
const ACTION: usize = 32;

/// The signals that have actions, in the image's order.
pub fn with_actions() -> impl Iterator<Item = u32> {
    (1..=LAST).filter(|s| *s != SIGKILL && *s != SIGSTOP)
}

/// Where the answers to [`ask_actions`] will be.
#[derive(Debug, Clone, Copy)]
pub struct AskedActions(Data);

/// Adds the questions for all actions.
pub fn ask_actions(script: &mut Script) -> AskedActions {
    let data = script.space(ACTION * LAST as usize);
    for signal in with_actions() {
        let to = data.address + u64::from(signal - 1) * ACTION as u64;
        script.push(Op::new(libc::SYS_rt_sigaction, &[u64::from(signal), 0, to, 8]));
    }
    AskedActions(data)
}

/// Reads the answers.
#[must_use]
pub fn read_actions(results: &Results, asked: AskedActions) -> Vec<SaEntry> {
    with_actions()
        .map(|signal| {
            let at = (signal - 1) as usize * ACTION;
            SaEntry {
                sigaction: results.u64(asked.0, at),
                flags: results.u64(asked.0, at + 8),
                restorer: results.u64(asked.0, at + 16),
                mask: results.u64(asked.0, at + 24),
                compat_sigaction: Some(false),
                mask_extended: None,
            }
        })
        .collect()
}

/// Sets all actions; those that are not in the image become default. With `continues` that of `SIGCONT` is left alone.
pub fn restore_actions(steps: &mut Steps, actions: &[SaEntry], continues: bool) {
    restore_some(steps, actions, |signal| !continues || signal != SIGCONT);
}

fn restore_some(steps: &mut Steps, actions: &[SaEntry], wanted: impl Fn(u32) -> bool) {
    for (i, signal) in with_actions().enumerate().filter(|(_, signal)| wanted(*signal)) {
        let words = actions.get(i).map_or([0; 4], |a| [a.sigaction, a.flags, a.restorer, a.mask]);
        let data = steps.words(&words);
        steps.must(
            Label::Signal(signal),
            Op::new(libc::SYS_rt_sigaction, &[u64::from(signal), data.address, 0, 8]),
        );
    }
}

/// The mask bit of a queued signal.
#[must_use]
pub fn bit(info: &SigInfo) -> u64 {
    match i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) {
        signal @ 1..=64 => 1 << (signal - 1),
        _ => 0,
    }
}

/// The image's form of a queue.
#[must_use]
pub fn queue(signals: Vec<SigInfo>) -> SignalQueueEntry {
    SignalQueueEntry {
        signals: signals.into_iter().map(|s| SiginfoEntry { siginfo: s.to_vec() }).collect(),
    }
}

fn signals(queue: &SignalQueueEntry) -> impl Iterator<Item = (u32, SigInfo)> {
    queue.signals.iter().map(|entry| {
        let mut info = [0u8; 128];
        let len = entry.siginfo.len().min(128);
        info[..len].copy_from_slice(&entry.siginfo[..len]);
        (u32::from_ne_bytes([info[0], info[1], info[2], info[3]]), info)
    })
}

/// Is a `SIGCONT` queued?
#[must_use]
pub fn continues(queue: &SignalQueueEntry) -> bool {
    signals(queue).any(|(signal, _)| signal == SIGCONT)
}

/// Is a `SIGSTOP` queued? It stops the process as soon as that goes on, and nothing else tells of it.
#[must_use]
pub fn stops(queue: &SignalQueueEntry) -> bool {
    signals(queue).any(|(signal, _)| signal == SIGSTOP)
}

/// Sets the action of `SIGCONT`, in a task of which a thread has one queued.
pub fn restore_continue_action(steps: &mut Steps, actions: &[SaEntry]) {
    restore_some(steps, actions, |signal| signal == SIGCONT);
}

/// Queues what [`restore_queue`] leaves out.
pub fn restore_continue(steps: &mut Steps, queue: &SignalQueueEntry, pid: i32, tid: Option<i32>) {
    send(steps, queue, pid, tid, |signal| signal == SIGCONT);
}

/// Queues the process's signals (from any of its threads, all blocked) or, with `tid`, a thread's.
pub fn restore_queue(steps: &mut Steps, queue: &SignalQueueEntry, pid: i32, tid: Option<i32>) {
    // Nothing blocks SIGSTOP, which is sent when the task goes on ([`stops`]); a SIGKILL is not queued in anything that lives.
    send(steps, queue, pid, tid, |signal| !matches!(signal, SIGKILL | SIGSTOP | SIGCONT));
}

fn send(
    steps: &mut Steps,
    queue: &SignalQueueEntry,
    pid: i32,
    tid: Option<i32>,
    wanted: impl Fn(u32) -> bool,
) {
    for (signal, info) in signals(queue).filter(|(signal, _)| wanted(*signal)) {
        let data = steps.data(&info);
        let (pid, signal_arg) = (pid as u64, u64::from(signal));
        let op = match tid {
            None => Op::new(libc::SYS_rt_sigqueueinfo, &[pid, signal_arg, data.address]),
            Some(tid) => {
                Op::new(libc::SYS_rt_tgsigqueueinfo, &[pid, tid as u64, signal_arg, data.address])
            }
        };
        steps.must(Label::Signal(signal), op);
    }
}

/// `SS_ONSTACK`: reported while the thread runs on the stack; not a setting.
const SS_ONSTACK: u32 = 1;
/// The image's form of an alternate stack.
#[must_use]
pub fn alternate_stack(sp: u64, size: u64, flags: u32) -> ThreadSasEntry {
    ThreadSasEntry { ss_sp: sp, ss_size: size, ss_flags: flags }
}

/// Sets the thread's alternate stack, or that it has none: a stub inherits that of the controller. The agent's stack pointer is 0, so the kernel never thinks it is in use.
pub fn restore_alternate_stack(steps: &mut Steps, stack: &ThreadSasEntry) {
    let flags = stack.ss_flags & !SS_ONSTACK;
    let data = steps.words(&[stack.ss_sp, u64::from(flags), stack.ss_size]);
    steps.must(
        Label::Text("setting the alternate signal stack"),
        Op::new(libc::SYS_sigaltstack, &[data.address, 0]),
    );
}
