//! Scheduling of a thread: policy, priority, nice (`sched_setattr(2)`), affinity, I/O priority, timer slack.
//! All of it can be read from outside.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{RewakeThreadEntry, ThreadCoreEntry};
use rewake_sys::sched::SchedAttr;

/// `SCHED_FLAG_RESET_ON_FORK` and the bit that stands for it in a policy.
const RESET_FLAG: u64 = 1;
const RESET_POLICY: u32 = 0x4000_0000;
const SCHED_OTHER: u32 = 0;
const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_BATCH: u32 = 3;
const SCHED_DEADLINE: u32 = 6;

/// Puts what the kernel says of a thread into its image entry.
pub fn survey(
    core: &mut ThreadCoreEntry,
    extra: &mut RewakeThreadEntry,
    attr: &SchedAttr,
    nice: i32,
) {
    let reset = if attr.flags & RESET_FLAG != 0 { RESET_POLICY } else { 0 };
    core.sched_policy = Some(attr.policy | reset);
    core.sched_nice = Some(nice);
    if matches!(attr.policy, SCHED_FIFO | SCHED_RR) {
        core.sched_prio = Some(attr.priority);
    }
    if attr.policy == SCHED_DEADLINE {
        extra.deadline = vec![attr.runtime, attr.deadline, attr.period, attr.flags];
    }
}

/// Sets the thread's scheduling; `had` is what it inherits.
pub fn restore(
    steps: &mut Steps,
    core: &ThreadCoreEntry,
    extra: Option<&RewakeThreadEntry>,
    had: &Inherited,
) {
    let policy = core.sched_policy.unwrap_or(0);
    let nice = core.sched_nice.unwrap_or(0);
    let mut attr = SchedAttr {
        size: 48,
        policy: policy & !RESET_POLICY,
        flags: if policy & RESET_POLICY != 0 { RESET_FLAG } else { 0 },
        nice,
        priority: core.sched_prio.unwrap_or(0),
        ..SchedAttr::default()
    };
    if let Some([runtime, deadline, period, flags]) = extra.map(|e| e.deadline.as_slice()) {
        (attr.runtime, attr.deadline, attr.period) = (*runtime, *deadline, *period);
        attr.flags |= *flags;
    }
    // Other policies than these two keep a nice value in the background, which sched_setattr does not set.
    if nice != had.nice && !matches!(attr.policy, SCHED_OTHER | SCHED_BATCH) {
        steps.must(
            Label::Text("setting the nice value"),
            Op::new(libc::SYS_setpriority, &[0, 0, nice as u64]),
        );
    }
    if (attr.policy, attr.nice, attr.priority, attr.flags) != (had.policy, had.nice, 0, 0) {
        let words = [
            u64::from(attr.size) | u64::from(attr.policy) << 32,
            attr.flags,
            u64::from(attr.nice as u32) | u64::from(attr.priority) << 32,
            attr.runtime,
            attr.deadline,
            attr.period,
        ];
        let data = steps.words(&words);
        steps.must(
            Label::Text("setting scheduling policy and priority"),
            Op::new(libc::SYS_sched_setattr, &[0, data.address, 0]),
        );
    }
    let Some(extra) = extra else { return };
    if !extra.affinity.is_empty() && extra.affinity != had.affinity {
        let data = steps.words(&extra.affinity);
        // CPUs that this machine lacks cannot be asked for: a wish.
        steps.wish(
            Label::Text("setting CPU affinity"),
            Op::new(libc::SYS_sched_setaffinity, &[0, data.len as u64, data.address]),
        );
    }
    if let Some(io) = extra.io_priority.filter(|io| *io != had.io_priority) {
        steps.wish(
            Label::Text("setting I/O priority"),
            Op::new(libc::SYS_ioprio_set, &[1, 0, u64::from(io)]),
        );
    }
    // Whatever it inherited: it has lent others their defaults since.
    if let Some(slack) = extra.timer_slack {
        set_timer_slack(steps, slack);
    }
}

/// Before a task or thread is cloned: its default slack is what its creator's slack is at that moment.
pub fn lend_timer_slack(steps: &mut Steps, slack: Option<u64>) {
    if let Some(slack) = slack {
        set_timer_slack(steps, slack);
    }
}

fn set_timer_slack(steps: &mut Steps, slack: u64) {
    steps.must(
        Label::Text("setting timer slack"),
        Op::new(libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK as u64, slack, 0, 0, 0]),
    );
}

/// What a new task inherits from the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inherited {
    /// Policy.
    pub policy: u32,
    /// Nice value.
    pub nice: i32,
    /// CPU set.
    pub affinity: Vec<u64>,
    /// I/O priority.
    pub io_priority: u32,
}
