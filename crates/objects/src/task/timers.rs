//! Interval and POSIX timers: `setitimer(2)`, `timer_create(2)`; the latter are listed in `/proc/PID/timers`.
//!
//! Ids come back through `PR_TIMER_CREATE_RESTORE_IDS` (since 6.15); before that the kernel counts ids up, so timers
//! are created and deleted until the wanted id comes.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use rewake_inject::ring::{Data, Results, Script};
use rewake_proc::timers::{Notify, PosixTimer};

/// Where the answers to [`ask`] will be.
#[derive(Debug, Clone)]
pub struct Asked {
    interval: Data,
    posix: Data,
    overruns: Vec<usize>,
}

/// Adds the questions for the three interval timers and the given POSIX timers.
pub fn ask(script: &mut Script, timers: &[PosixTimer]) -> Asked {
    let interval = script.space(3 * 32);
    for which in 0..3u64 {
        script.push(Op::new(libc::SYS_getitimer, &[which, interval.address + which * 32]));
    }
    let posix = script.space(timers.len() * 32);
    let overruns = timers
        .iter()
        .zip(0u64..)
        .map(|(timer, i)| {
            let id = timer.id as u64;
            script.push(Op::new(libc::SYS_timer_gettime, &[id, posix.address + i * 32]));
            script.push(Op::new(libc::SYS_timer_getoverrun, &[id]))
        })
        .collect();
    Asked { interval, posix, overruns }
}

/// Reads the answers.
#[must_use]
pub fn read(results: &Results, asked: &Asked, timers: &[PosixTimer]) -> TaskTimersEntry {
    let interval = |which: usize| {
        let word = |i: usize| results.u64(asked.interval, which * 32 + i * 8);
        ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) }
    };
    let posix = timers
        .iter()
        .enumerate()
        .map(|(i, timer)| {
            let word = |w: usize| results.u64(asked.posix, i * 32 + w * 8);
            let mut notify = match timer.notify {
                Notify::Signal => libc::SIGEV_SIGNAL,
                Notify::None => libc::SIGEV_NONE,
                Notify::Thread => libc::SIGEV_THREAD,
            };
            if timer.thread_id {
                notify |= libc::SIGEV_THREAD_ID;
            }
            PosixTimerEntry {
                it_id: timer.id as u32,
                clock_id: timer.clock_id as u32,
                si_signo: timer.signal as u32,
                it_sigev_notify: notify as u32,
                sival_ptr: timer.value,
                overrun: results.or_zero(asked.overruns[i]) as u32,
                isec: word(0),
                insec: word(1),
                vsec: word(2),
                vnsec: word(3),
                notify_thread_id: timer.thread_id.then_some(timer.target),
            }
        })
        .collect();
    TaskTimersEntry { real: interval(0), virt: interval(1), prof: interval(2), posix }
}

/// `PR_TIMER_CREATE_RESTORE_IDS`.
const RESTORE_IDS: u64 = 77;

/// Creates the POSIX timers, unarmed, with their ids. `kernel_restores_ids` says whether the kernel can be told them.
pub fn restore_created(steps: &mut Steps, timers: &TaskTimersEntry, kernel_restores_ids: bool) {
    if timers.posix.is_empty() {
        return;
    }
    let label = Label::Text("asking for timer ids to be restored");
    if kernel_restores_ids {
        steps.must(label, Op::new(libc::SYS_prctl, &[RESTORE_IDS, 1, 0, 0, 0]));
    }
    let mut sorted: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    sorted.sort_by_key(|t| t.it_id);
    let mut next = 0;
    for timer in sorted {
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&timer.sival_ptr.to_ne_bytes());
        event[8..12].copy_from_slice(&timer.si_signo.to_ne_bytes());
        event[12..16].copy_from_slice(&timer.it_sigev_notify.to_ne_bytes());
        event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_ne_bytes());
        let event = steps.data(&event);
        let clock = i64::from(timer.clock_id as i32) as u64;
        let create = |steps: &mut Steps, id: u32| {
            let out = steps.data(&id.to_ne_bytes());
            steps.must(
                Label::Timer(id),
                Op::new(libc::SYS_timer_create, &[clock, event.address, out.address]),
            );
        };
        if !kernel_restores_ids {
            for id in next..timer.it_id {
                create(steps, id);
                steps.must(Label::Timer(id), Op::new(libc::SYS_timer_delete, &[u64::from(id)]));
            }
        }
        create(steps, timer.it_id);
        next = timer.it_id + 1;
    }
    if kernel_restores_ids {
        steps.must(label, Op::new(libc::SYS_prctl, &[RESTORE_IDS, 0, 0, 0, 0]));
    }
}

/// Arms all timers: the last thing before a task goes on.
pub fn restore_armed(steps: &mut Steps, timers: &TaskTimersEntry) {
    for (which, timer) in [(0u64, &timers.real), (1, &timers.virt), (2, &timers.prof)] {
        let mut words = [timer.isec, timer.iusec, timer.vsec, timer.vusec];
        if words == [0; 4] {
            continue;
        }
        // ITIMER_REAL with an interval and nothing left has expired, and starts anew when its SIGALRM is taken; the
        // kernel would disarm it if told so. Expiring at once it is in the same state again.
        if which == libc::ITIMER_REAL as u64 && words[2..] == [0, 0] {
            words[3] = 1;
        }
        let value = steps.words(&words);
        steps.must(
            Label::Text("arming an interval timer"),
            Op::new(libc::SYS_setitimer, &[which, value.address, 0]),
        );
    }
    for timer in &timers.posix {
        if timer.vsec != 0 || timer.vnsec != 0 {
            let value = steps.words(&[timer.isec, timer.insec, timer.vsec, timer.vnsec]);
            let label = Label::Timer(timer.it_id);
            let op =
                Op::new(libc::SYS_timer_settime, &[u64::from(timer.it_id), 0, value.address, 0]);
            steps.must(label, op);
        }
    }
}
