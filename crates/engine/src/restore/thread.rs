//! Steps of a thread: what it sets for itself, its filters and its credentials.

use super::build::{Environment, name_steps, op};
use super::read::Thread;
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::{attributes, credentials, schedule, seccomp, signals};

/// What each thread, the leader included, sets for itself before credentials.
pub(super) fn thread_basics(steps: &mut Steps, thread: &Thread) {
    let core = &thread.thread;
    if core.futex_rla != 0 {
        steps.must(
            Label::Text("setting the robust list"),
            op(libc::SYS_set_robust_list, &[core.futex_rla, u64::from(core.futex_rla_len)]),
        );
    }
    if let Some(info) = &thread.core.thread_info {
        steps.may(
            Label::Text("setting the thread id's address"),
            op(libc::SYS_set_tid_address, &[info.clear_tid_addr]),
        );
    }
    if let Some(stack) = &core.sas {
        signals::restore_alternate_stack(steps, stack);
    }
    if let Some(rseq) = core.rseq_entry.as_ref().filter(|r| r.rseq_abi_pointer != 0) {
        let (address, size) = (rseq.rseq_abi_pointer, u64::from(rseq.rseq_abi_size));
        steps.must(
            Label::Text("registering rseq"),
            op(libc::SYS_rseq, &[address, size, 0, u64::from(rseq.signature)]),
        );
    }
}

pub(super) fn thread_credentials(steps: &mut Steps, thread: &Thread, env: &Environment) {
    schedule::restore(steps, &thread.thread, thread.extra.as_ref(), &env.schedule);
    if let Some(creds) = &thread.thread.creds {
        credentials::restore(steps, creds, &env.creds);
    }
}

/// Must a thread's credentials wait until it has installed filters of its own, beside those that all have in `common`?
pub(super) fn waits(common: usize, thread: &Thread) -> bool {
    thread.seccomp.strict || thread.seccomp.filters.len() > common
}

/// A thread's own seccomp filters, after those that all threads have in common, or its strict mode.
pub(super) fn seccomp_steps(steps: &mut Steps, thread: &Thread, common: usize) {
    let own = thread.seccomp.filters.get(common..).unwrap_or(&[]);
    seccomp::restore_filters(steps, own, false);
    if thread.seccomp.strict {
        seccomp::restore_strict(steps);
    }
}

pub(super) fn thread_steps(steps: &mut Steps, pid: i32, thread: &Thread) {
    if let Some(comm) = &thread.thread.comm {
        name_steps(steps, comm);
    }
    thread_basics(steps, thread);
    if let Some(queue) = &thread.thread.signals_p {
        signals::restore_continue(steps, queue, pid, Some(thread.tid));
    }
}

/// Credentials and what comes after them.
pub(super) fn thread_last_steps(steps: &mut Steps, pid: i32, thread: &Thread, env: &Environment) {
    let core = &thread.thread;
    thread_credentials(steps, thread, env);
    attributes::restore_pdeath_sig(steps, core.pdeath_sig.unwrap_or(0));
    if let Some(queue) = &core.signals_p {
        signals::restore_queue(steps, queue, pid, Some(thread.tid));
    }
}
