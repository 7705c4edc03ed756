//! Kernel state: the clocks a program sees: CLOCK_MONOTONIC and CLOCK_BOOTTIME never go backwards, through the vdso and
//! through the system call, and agree with each other; absolute sleeps fire, and not early.
#![allow(unsafe_code, reason = "raw clock_gettime beside the vdso's")]

use std::sync::atomic::{AtomicBool, Ordering};
use zoo::{Check, ensure, ensure_eq, timespec};

static STOP: AtomicBool = AtomicBool::new(false);

fn by_call(id: i32) -> i64 {
    let mut t = timespec(0);
    // SAFETY: `t` is a local.
    unsafe { libc::syscall(libc::SYS_clock_gettime, id, &raw mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

const CLOCKS: [(i32, &str); 3] = [
    (libc::CLOCK_MONOTONIC, "CLOCK_MONOTONIC"),
    (libc::CLOCK_BOOTTIME, "CLOCK_BOOTTIME"),
    (libc::CLOCK_MONOTONIC_RAW, "CLOCK_MONOTONIC_RAW"),
];

/// Reads all clocks in turn, vdso and system call, as fast as it can or with naps.
fn watch(nap: bool) -> Check {
    let mut last = [0i64; 3];
    zoo::here();
    while !STOP.load(Ordering::Relaxed) {
        for (i, (id, name)) in CLOCKS.into_iter().enumerate() {
            for (now, how) in [(zoo::clock(id), "vdso"), (by_call(id), "system call")] {
                let back = last[i] - now;
                ensure!(back <= 0, "{name} went back by {back} ns (seen by {how})");
                last[i] = now;
            }
        }
        if nap {
            zoo::nap(3);
        }
    }
    Ok(())
}

/// Seconds by which the clocks are ahead.
const AHEAD: i64 = 30 * 365 * 86_400;

/// Enters a time namespace that is ahead, by executing this program again; returns once it is inside.
fn go_ahead() -> Result<(), String> {
    if zoo::now() / 1_000_000_000 > AHEAD {
        return Ok(());
    }
    let error = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
    // SAFETY: concerns the namespace of later programs only.
    if unsafe { libc::unshare(libc::CLONE_NEWTIME) } != 0 {
        return Err(error("unshare(CLONE_NEWTIME)"));
    }
    let offsets = format!("monotonic {AHEAD} 0\nboottime {AHEAD} 0\n");
    std::fs::write("/proc/self/timens_offsets", offsets)
        .map_err(|e| format!("timens_offsets: {e}"))?;
    if std::env::var_os("ZOO_AHEAD").is_some_and(|value| value == "inside") {
        return Err("exec does not enter time namespaces on this kernel".into());
    }
    let mut again = std::process::Command::new("/proc/self/exe");
    again.args(std::env::args_os().skip(1)).env("ZOO_AHEAD", "inside");
    Err(format!("exec: {}", std::os::unix::process::CommandExt::exec(&mut again)))
}

fn main() {
    let ahead = std::env::var_os("ZOO_AHEAD").map(|_| go_ahead());
    zoo::run(|z| {
        if let Some(Err(why)) = ahead {
            z.skip(&why);
        }
        // Of a tree that is ahead, the restored clocks are those of another time namespace. Whoever is saved in the few instructions in
        // which the vdso adds the parts of an offset gets one part of each, once: so nobody is there all the time.
        let always = ahead.is_some();
        let watchers = [true, always].map(|nap| std::thread::spawn(move || watch(nap)));
        // An absolute time that passes during the test, and one that passes after the check has begun.
        let sleeper = std::thread::spawn(|| {
            let mut until = zoo::now();
            let mut naps = 0;
            zoo::here();
            while !STOP.load(Ordering::Relaxed) {
                until += 40_000_000;
                let t = timespec(until);
                let flag = libc::TIMER_ABSTIME;
                // SAFETY: `t` is a local.
                while unsafe {
                    libc::clock_nanosleep(libc::CLOCK_MONOTONIC, flag, &t, std::ptr::null_mut())
                } != 0
                {}
                ensure!(
                    zoo::now() >= until,
                    "an absolute sleep ended {} ns early",
                    until - zoo::now()
                );
                // Not by minutes late either, though a restore may be: the clock may go on while the program is away.
                naps += 1;
            }
            ensure!(naps > 0, "never slept");
            Ok::<(), String>(())
        });
        zoo::all_here(3)?;
        let (before, real) = (zoo::now(), zoo::clock(libc::CLOCK_REALTIME));
        let offset = zoo::clock(libc::CLOCK_BOOTTIME) - before;
        z.ready()?;
        z.wait_for_check();
        let passed = zoo::now() - before;
        let really = zoo::clock(libc::CLOCK_REALTIME) - real;
        ensure!(
            passed >= 0 && passed <= really + 1_000_000_000,
            "monotonic {passed} ns passed, really {really} ns"
        );
        let drift = zoo::clock(libc::CLOCK_BOOTTIME) - zoo::now() - offset;
        ensure!(
            drift.abs() < 1_000_000_000,
            "CLOCK_BOOTTIME moved by {drift} ns against CLOCK_MONOTONIC"
        );
        let begun = zoo::now();
        zoo::nap(50);
        let took = zoo::now() - begun;
        ensure!((50_000_000..5_000_000_000).contains(&took), "a sleep of 50 ms took {took} ns");
        STOP.store(true, Ordering::Relaxed);
        for watcher in watchers {
            watcher.join().map_err(|_| "a watcher panicked")??;
        }
        ensure_eq!(sleeper.join().map_err(|_| "the sleeper panicked")?, Ok(()), "absolute sleeper");
        Ok(())
    })
}
