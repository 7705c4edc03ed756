//! Kernel state: the three interval timers, running with intervals, far in the future, and disarmed.
#![allow(unsafe_code, reason = "setitimer through the C library")]

use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, check, ensure, ensure_eq};

static TICKS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

extern "C" fn tick(signo: i32) {
    let i = match signo {
        libc::SIGALRM => 0,
        libc::SIGVTALRM => 1,
        _ => 2,
    };
    TICKS[i].fetch_add(1, Ordering::SeqCst);
}

const US: i64 = 1_000_000;

fn set(which: i32, value_us: i64, interval_us: i64) -> Check {
    let time = |us: i64| libc::timeval { tv_sec: us / US, tv_usec: us % US };
    let t = libc::itimerval { it_value: time(value_us), it_interval: time(interval_us) };
    // SAFETY: `t` is valid; the old value is not asked.
    check(unsafe { libc::setitimer(which as _, &t, std::ptr::null_mut()) }, "setitimer")
}

/// (remaining, interval) in microseconds.
fn get(which: i32) -> Result<(i64, i64), String> {
    // SAFETY: zeroed is valid, then written by the kernel.
    unsafe {
        let mut t: libc::itimerval = std::mem::zeroed();
        check(libc::getitimer(which as _, &mut t), "getitimer")?;
        let us = |t: libc::timeval| t.tv_sec * US + t.tv_usec;
        Ok((us(t.it_value), us(t.it_interval)))
    }
}

/// Works until it is done, for five seconds at most.
fn burn_until(done: impl Fn() -> bool) {
    let until = zoo::now() + 5_000_000_000;
    while zoo::now() < until && !done() {
        std::hint::spin_loop();
    }
}

/// Is `signo` pending for the process?
fn pending(signo: i32) -> bool {
    // SAFETY: zeroed is valid, then written by the kernel.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut set) == 0 && libc::sigismember(&set, signo) == 1
    }
}

/// The real timer expired while its signal is blocked: it starts anew only when the signal is taken.
fn expired(z: &zoo::Zoo) -> Check {
    zoo::block(libc::SIGALRM)?;
    set(0, 1_000, 40_000)?;
    while !pending(libc::SIGALRM) {
        zoo::nap(1);
    }
    ensure_eq!(get(0)?, (0, 40_000), "the expired timer before the checkpoint");
    z.publish("expired", "");
    z.wait_for_check();
    // A restored one needs an instant to be there again.
    zoo::nap(5);
    ensure_eq!(get(0)?, (0, 40_000), "the expired timer");
    ensure!(pending(libc::SIGALRM), "the SIGALRM of the expired timer is not pending");
    // SAFETY: zeroed is valid, then filled by sigemptyset; the old mask is not asked.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        check(libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()), "sigprocmask")?;
    }
    burn_until(|| TICKS[0].load(Ordering::SeqCst) >= 3);
    let ticks = TICKS[0].load(Ordering::SeqCst);
    ensure!(ticks >= 3, "the expired timer ticked {ticks} times in 5 s");
    Ok(())
}

const ALL: [(i32, &str); 3] = [(0, "ITIMER_REAL"), (1, "ITIMER_VIRTUAL"), (2, "ITIMER_PROF")];

fn main() {
    zoo::run(|z| {
        for signo in [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF] {
            zoo::on_signal(signo, tick as *const () as usize, libc::SA_RESTART)?;
        }
        // Far in the future, with odd intervals; real one minus what passes.
        let far = z.fork(|z| {
            for (which, _) in ALL {
                set(which, 3600 * US + 123_456, 7 * US + which as i64)?;
            }
            z.publish("far", "");
            z.wait_for_check();
            for (which, name) in ALL {
                let (left, interval) = get(which)?;
                ensure_eq!(interval, 7 * US + which as i64, "interval of {name}");
                ensure!(
                    left <= 3600 * US + 123_456 + 20_000,
                    "{name}: {left} us left, more than was set"
                );
                ensure!(left > 3500 * US, "{name}: {left} us left, too few");
            }
            Ok(())
        })?;
        // One shot, no interval; and none at all.
        let once = z.fork(|z| {
            set(0, 500 * US, 0)?;
            z.publish("once", "");
            z.wait_for_check();
            ensure_eq!(get(0)?.1, 0, "interval of a single shot");
            ensure!(
                get(0)?.0 > 400 * US && get(0)?.0 <= 500 * US,
                "single shot: {} us left",
                get(0)?.0
            );
            ensure_eq!(get(1)?, (0, 0), "a disarmed timer");
            set(0, 20_000, 0)?;
            let before = TICKS[0].load(Ordering::SeqCst);
            zoo::nap(60);
            ensure_eq!(
                TICKS[0].load(Ordering::SeqCst),
                before + 1,
                "ticks of a re-armed single shot"
            );
            Ok(())
        })?;
        let late = match std::env::var_os("ZOO_EXPIRED") {
            Some(_) => {
                let late = z.fork(expired)?;
                z.wait_for("expired")?;
                Some(late)
            }
            None => None,
        };
        z.wait_for("far")?;
        z.wait_for("once")?;
        set(0, 50_000, 50_000)?;
        set(1, 10_000, 10_000)?;
        set(2, 10_000, 10_000)?;
        burn_until(|| TICKS.iter().all(|t| t.load(Ordering::SeqCst) > 0));
        ensure!(
            TICKS.iter().all(|t| t.load(Ordering::SeqCst) > 0),
            "a timer does not tick: {TICKS:?}"
        );
        z.ready()?;
        z.wait_for_check();
        for ((which, name), interval) in ALL.into_iter().zip([50_000, 10_000, 10_000]) {
            let (left, got) = get(which)?;
            ensure_eq!(got, interval, "interval of {name}");
            // One tick of the scheduler clock may be added to CPU timers.
            ensure!(left > 0 && left <= interval + 20_000, "{name}: {left} us left of {interval}");
        }
        let before: Vec<u64> = TICKS.iter().map(|t| t.load(Ordering::SeqCst)).collect();
        let ticks = |i: usize| TICKS[i].load(Ordering::SeqCst) - before[i];
        burn_until(|| (0..3).all(|i| ticks(i) >= 3));
        for (i, (_, name)) in ALL.into_iter().enumerate() {
            ensure!(ticks(i) >= 3, "{name} ticked {} times in 5 s of work", ticks(i));
        }
        for (which, _) in ALL {
            set(which, 0, 0)?;
        }
        if let Some(late) = late {
            z.join(late)?;
        }
        z.join(far)?;
        z.join(once)
    })
}
