//! Kernel state: timerfds: clocks, intervals, far ones, disarmed ones, and ticks that have not been read yet.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zoo::{check, ensure, ensure_eq, errno, ok, timespec};

const MS: i64 = 1_000_000;
const SEC: i64 = 1000 * MS;

static STOP: AtomicBool = AtomicBool::new(false);
static TICKS: AtomicU64 = AtomicU64::new(0);

fn set(fd: i32, flags: i32, value: i64, interval: i64) -> zoo::Check {
    let t = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    // SAFETY: `t` is a local.
    check(unsafe { libc::timerfd_settime(fd, flags, &t, std::ptr::null_mut()) }, "timerfd_settime")
}

fn make(clock: i32, flags: i32, value: i64, interval: i64) -> Result<i32, String> {
    // SAFETY: integers.
    let fd = ok(unsafe { libc::timerfd_create(clock, flags) } as i64, "timerfd_create")? as i32;
    if value > 0 {
        set(fd, 0, value, interval)?;
    }
    Ok(fd)
}

fn get(fd: i32) -> Result<(i64, i64), String> {
    // SAFETY: zeroed is valid, then written by the kernel.
    unsafe {
        let mut t: libc::itimerspec = std::mem::zeroed();
        check(libc::timerfd_gettime(fd, &mut t), "timerfd_gettime")?;
        let ns = |t: libc::timespec| t.tv_sec * SEC + t.tv_nsec;
        Ok((ns(t.it_value), ns(t.it_interval)))
    }
}

fn read(fd: i32) -> Result<u64, i32> {
    let mut value = 0u64;
    // SAFETY: eight bytes of a local.
    if unsafe { libc::read(fd, (&raw mut value).cast(), 8) } == 8 {
        Ok(value)
    } else {
        Err(errno())
    }
}

fn main() {
    zoo::run(|z| {
        use libc::{CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, TFD_NONBLOCK};
        // With ZOO_TICKS=1 this one expires at once and again and again, and nobody reads it.
        let unread = z.param("ZOO_TICKS", 0) == 1;
        let ticking =
            make(CLOCK_MONOTONIC, TFD_NONBLOCK, if unread { 5 * MS } else { 3600 * SEC }, 5 * MS)?;
        let far = make(CLOCK_REALTIME, TFD_NONBLOCK, 3600 * SEC, 3 * SEC + 1)?;
        let boot = make(CLOCK_BOOTTIME, TFD_NONBLOCK | libc::TFD_CLOEXEC, 3600 * SEC, 0)?;
        let disarmed = make(CLOCK_MONOTONIC, TFD_NONBLOCK, 0, 0)?;
        let absolute = make(CLOCK_REALTIME, TFD_NONBLOCK, 0, 0)?;
        set(absolute, libc::TFD_TIMER_ABSTIME, zoo::clock(CLOCK_REALTIME) + 3600 * SEC, 0)?;
        // Expired once and for all, unread.
        let expired = make(CLOCK_MONOTONIC, TFD_NONBLOCK, MS, 0)?;
        // One that a thread reads all the time. Unless ZOO_TICKS=1 it begins when all checkpoints should be over.
        let blocking = make(CLOCK_MONOTONIC, 0, if unread { 30 * MS } else { 2 * SEC }, 10 * MS)?;
        let reader = std::thread::spawn(move || {
            zoo::here();
            while !STOP.load(Ordering::SeqCst) {
                match read(blocking) {
                    Ok(n) => TICKS.fetch_add(n, Ordering::SeqCst),
                    Err(e) => return Err(format!("blocking read: errno {e}")),
                };
            }
            Ok(())
        });
        zoo::all_here(1)?;
        zoo::nap(40);
        z.ready()?;
        z.wait_for_check();
        let ticks = read(ticking);
        ensure!(!unread || ticks.is_ok_and(|n| n >= 7), "ticks that were not read: {ticks:?}");
        ensure_eq!(get(ticking)?.1, 5 * MS, "interval of the ticking one");
        for (fd, interval, name) in
            [(far, 3 * SEC + 1, "far"), (boot, 0, "boot-time"), (absolute, 0, "absolute")]
        {
            let (left, got) = get(fd)?;
            ensure_eq!(got, interval, "interval of the {name} one");
            ensure!(left > 3500 * SEC && left <= 3600 * SEC, "{name}: {left} ns left of an hour");
            ensure_eq!(read(fd), Err(libc::EAGAIN), "read of the {name} one");
        }
        ensure_eq!(get(disarmed)?, (0, 0), "the disarmed one");
        ensure_eq!(read(expired), Ok(1), "read of the expired one");
        ensure_eq!(read(expired), Err(libc::EAGAIN), "second read of the expired one");
        if unread {
            zoo::nap(20);
            let more = read(ticking);
            ensure!(more.is_ok_and(|n| n >= 2), "ticks after the first reading: {more:?}");
        }
        let (before, until) = (TICKS.load(Ordering::SeqCst), zoo::now() + 10 * SEC);
        while TICKS.load(Ordering::SeqCst) < before + 3 {
            ensure!(
                zoo::now() < until,
                "the one that is read ticked {before} times and then no more"
            );
            zoo::nap(5);
        }
        STOP.store(true, Ordering::SeqCst);
        reader.join().map_err(|_| "reader panicked")??;
        set(disarmed, 0, MS, 0)?;
        zoo::nap(10);
        ensure_eq!(read(disarmed), Ok(1), "read of one armed after the check began");
        Ok(())
    })
}
