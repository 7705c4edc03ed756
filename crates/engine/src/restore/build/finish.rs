//! The last script: what ends helpers, and what must wait until everybody is there: credentials, queued signals, timers.

use super::super::read::{Alive, Task};
use super::super::thread::{seccomp_steps, thread_credentials};
use super::{Environment, WALL, op};
use rewake_objects::memory::future;
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::{attributes, seccomp, signals, timers};

/// The audit system's login uid: only a task itself may set it, and only once unless it has `CAP_AUDIT_CONTROL`.
fn login_uid_steps(steps: &mut Steps, uid: u32) {
    let label = Label::Text("setting the login uid");
    let path = steps.script.cstr(b"/proc/self/loginuid");
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
    let open =
        steps.wish(label, op(libc::SYS_openat, &[libc::AT_FDCWD as u64, path.address, flags]));
    let number = uid.to_string();
    let text = steps.data(number.as_bytes());
    let write = op(libc::SYS_write, &[0, text.address, number.len() as u64]);
    steps.wish(label, write.arg_result(0, open as u32, 0));
    steps.may(label, op(libc::SYS_close, &[0]).arg_result(0, open as u32, 0));
}

/// The last script of a task.
pub(super) fn finish_steps(
    steps: &mut Steps,
    task: &Task,
    alive: &Alive,
    env: &Environment,
    makes_memory: bool,
    group_helpers: &[i32],
) {
    let leader = &alive.threads[0];
    if let Some(extra) = alive.extra.as_ref().filter(|_| makes_memory) {
        future::restore(steps, &alive.mm, extra);
    }
    for helper in group_helpers {
        steps.must(
            Label::Text("reaping a helper"),
            op(libc::SYS_wait4, &[*helper as u64, 0, WALL, 0]),
        );
    }
    // SIGCHLDs of helpers and zombies are pending: ignoring the signal for a moment takes them away.
    let ignore = steps.words(&[1, 0, 0, 0]);
    steps.must(
        Label::Signal(libc::SIGCHLD as u32),
        op(libc::SYS_rt_sigaction, &[libc::SIGCHLD as u64, ignore.address, 0, 8]),
    );
    signals::restore_actions(steps, &task.tc.sigactions, task.has_queued(signals::continues));
    if let Some(uid) = task.tc.loginuid.filter(|uid| Some(*uid) != env.login_uid) {
        login_uid_steps(steps, uid);
    }
    // A filter needs no_new_privs or the capability that the credentials may be about to take away.
    let common = alive.common_filters();
    let filters = leader.seccomp.filters.get(..common).unwrap_or(&[]);
    seccomp::restore_filters(steps, filters, alive.threads.len() > 1);
    seccomp_steps(steps, leader, common);
    thread_credentials(steps, leader, env);
    attributes::restore_after_credentials(
        steps,
        alive.mm.dumpable,
        leader.thread.pdeath_sig.unwrap_or(0),
    );
    if let Some(queue) = &task.tc.signals_s {
        signals::restore_queue(steps, queue, task.pid, None);
    }
    if let Some(queue) = &leader.thread.signals_p {
        signals::restore_queue(steps, queue, task.pid, Some(task.pid));
    }
    if let Some(entries) = &task.tc.timers {
        timers::restore_armed(steps, entries);
    }
}
