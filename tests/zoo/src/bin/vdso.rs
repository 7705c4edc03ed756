//! Kernel state: the vdso and its data pages: functions called by addresses found before the checkpoint, one thread
//! inside them all the time.
#![allow(unsafe_code, reason = "calls functions of the vdso by address")]

use std::sync::atomic::{AtomicBool, Ordering};
use zoo::{ensure, ensure_eq};

static STOP: AtomicBool = AtomicBool::new(false);

fn read<T: Copy>(address: usize) -> T {
    // SAFETY: within the vdso's ELF image, which is mapped readable.
    unsafe { (address as *const T).read_unaligned() }
}

/// The address of a function of the vdso, looked up in its dynamic symbols.
fn lookup(base: usize, name: &str) -> Option<usize> {
    let (phoff, phnum) = (read::<u64>(base + 32) as usize, read::<u16>(base + 56) as usize);
    let header = |i: usize| base + phoff + i * 56;
    let find = |kind: u32| (0..phnum).map(header).find(|&h| read::<u32>(h) == kind);
    // What the image calls its own address, against where it is.
    let load = find(1)?;
    let slide = base
        .wrapping_add(read::<u64>(load + 8) as usize)
        .wrapping_sub(read::<u64>(load + 16) as usize);
    let mut dynamic = slide.wrapping_add(read::<u64>(find(2)? + 16) as usize);
    let (mut symbols, mut strings, mut end) = (0, 0, 0);
    loop {
        let (tag, value) = (read::<u64>(dynamic), read::<u64>(dynamic + 8) as usize);
        match tag {
            0 => break,
            5 => strings = slide.wrapping_add(value),
            6 => symbols = slide.wrapping_add(value),
            _ => {}
        }
        if [4, 0x6fff_fef5, 5].contains(&tag) {
            end = end.max(slide.wrapping_add(value));
        }
        dynamic += 16;
    }
    // The symbol table lies before the strings.
    let end = if end > symbols { strings.max(symbols) } else { end };
    (symbols..end).step_by(24).find_map(|s| {
        let at = strings + read::<u32>(s) as usize;
        // SAFETY: a NUL-terminated string of the image.
        let found = unsafe { std::ffi::CStr::from_ptr(at as *const _) };
        (found.to_bytes() == name.as_bytes())
            .then(|| slide.wrapping_add(read::<u64>(s + 8) as usize))
    })
}

type ClockGettime = extern "C" fn(i32, *mut libc::timespec) -> i32;
type Getcpu = extern "C" fn(*mut u32, *mut u32, usize) -> i32;
type Time = extern "C" fn(*mut i64) -> i64;
type Gettimeofday = extern "C" fn(*mut libc::timeval, usize) -> i32;

/// Functions of the vdso, at the addresses they had when the program began.
#[derive(Clone, Copy)]
struct Functions {
    clock: ClockGettime,
    getcpu: Getcpu,
    time: Time,
    day: Gettimeofday,
}

impl Functions {
    /// Do they say what system calls say?
    fn agree(&self) -> zoo::Check {
        for _ in 0..1000 {
            for id in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME] {
                let call = || {
                    let mut t = zoo::timespec(0);
                    // SAFETY: `t` is a local.
                    unsafe { libc::syscall(libc::SYS_clock_gettime, id, &raw mut t) };
                    t.tv_sec * 1_000_000_000 + t.tv_nsec
                };
                let mut t = zoo::timespec(0);
                let before = call();
                ensure_eq!((self.clock)(id, &mut t), 0, "clock_gettime of the vdso");
                let (now, after) = (t.tv_sec * 1_000_000_000 + t.tv_nsec, call());
                ensure!(
                    before <= now && now <= after,
                    "clock {id}: the vdso says {now}, between {before} and {after}"
                );
            }
        }
        let (mut cpu, mut node) = (9999, 0);
        ensure_eq!((self.getcpu)(&mut cpu, &mut node, 0), 0, "getcpu of the vdso");
        ensure!(cpu < 4096, "getcpu of the vdso says {cpu}");
        let mut tv = libc::timeval { tv_sec: 0, tv_usec: 0 };
        ensure_eq!((self.day)(&mut tv, 0), 0, "gettimeofday of the vdso");
        let (now, real) =
            ((self.time)(std::ptr::null_mut()), zoo::clock(libc::CLOCK_REALTIME) / 1_000_000_000);
        ensure!(
            (now - real).abs() <= 1 && (tv.tv_sec - real).abs() <= 1,
            "time {now}, {}, really {real}",
            tv.tv_sec
        );
        Ok(())
    }
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        // SAFETY: asks the auxiliary vector.
        let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
        if base == 0 {
            z.skip("this kernel gives no vdso");
        }
        let get = |name: &str| lookup(base, name).ok_or(format!("the vdso has no {name}"));
        // SAFETY (all four): the vdso's documented functions and their types (vdso(7)).
        let clock: ClockGettime = unsafe { std::mem::transmute(get("__vdso_clock_gettime")?) };
        let getcpu: Getcpu = unsafe { std::mem::transmute(get("__vdso_getcpu")?) };
        let time: Time = unsafe { std::mem::transmute(get("__vdso_time")?) };
        let day: Gettimeofday = unsafe { std::mem::transmute(get("__vdso_gettimeofday")?) };
        let functions = Functions { clock, getcpu, time, day };
        let rounds = z.param("ZOO_ROUNDS", 0);
        if rounds > 0 {
            // Nobody is inside while it is saved: each thread calls when it is told to.
            let turns: Vec<_> = (0..3)
                .map(|thread| {
                    std::thread::spawn(move || {
                        zoo::here();
                        for round in 0..rounds {
                            while !z.path(&format!("round.{round}")).exists() {
                                if z.checking() {
                                    return functions.agree();
                                }
                                zoo::nap(2);
                            }
                            functions.agree()?;
                            z.publish(&format!("agreed.{round}.{thread}"), "");
                        }
                        Ok::<(), String>(())
                    })
                })
                .collect();
            zoo::all_here(3)?;
            z.ready()?;
            z.wait_for_check();
            for turn in turns {
                turn.join().map_err(|_| "a thread panicked")??;
            }
            return functions.agree();
        }
        let busy = std::thread::spawn(move || {
            let mut last = 0;
            zoo::here();
            while !STOP.load(Ordering::Relaxed) {
                let mut t = zoo::timespec(0);
                ensure_eq!(clock(libc::CLOCK_MONOTONIC, &mut t), 0, "clock_gettime of the vdso");
                let now = t.tv_sec * 1_000_000_000 + t.tv_nsec;
                ensure!(now >= last, "the vdso's clock went back by {} ns", last - now);
                last = now;
            }
            Ok::<(), String>(())
        });
        zoo::all_here(1)?;
        z.ready()?;
        z.wait_for_check();
        functions.agree()?;
        STOP.store(true, Ordering::Relaxed);
        busy.join().map_err(|_| "the busy thread panicked")??;
        Ok(())
    })
}
