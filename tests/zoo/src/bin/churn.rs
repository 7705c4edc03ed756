//! Kernel state: processes and threads that come and go all the time. Two nurses make children, one after the other; a child
//! makes threads, of which any one ends the whole of it by exit_group(2) while the others are busy or asleep, after a time that
//! is sometimes none. The first process makes threads that end by themselves. Every child ends with the status that it should.
#![allow(unsafe_code, reason = "forks, and a flag that processes share")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use zoo::{Rng, check, ensure, ensure_eq, ok};

const THREADS: u64 = 5;

/// What all processes share.
#[repr(C)]
struct Common {
    stop: AtomicU32,
    children: AtomicU32,
}

fn common() -> Result<&'static Common, String> {
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, all zeros, which stays.
    unsafe {
        let base = libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0);
        check(-i32::from(base == libc::MAP_FAILED), "mmap")?;
        Ok(&*base.cast())
    }
}

/// A child: never returns.
fn child(mut rng: Rng) -> ! {
    let status = (rng.next() % 200 + 1) as i32;
    let who = rng.next() % (THREADS + 1);
    let patience = Duration::from_micros(rng.next() % 4 * 150);
    let end = move || -> ! {
        std::thread::sleep(patience);
        // SAFETY: nothing of this process is needed any more.
        unsafe { libc::_exit(status) }
    };
    for n in 0..THREADS {
        let busy = n % 2 == 0;
        std::thread::spawn(move || {
            if n == who {
                end();
            }
            loop {
                if busy {
                    std::hint::black_box(n);
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_secs(100));
                }
            }
        });
    }
    if who == THREADS {
        end();
    }
    loop {
        std::thread::sleep(Duration::from_secs(100));
    }
}

fn nurse(common: &Common, seed: u64) -> zoo::Check {
    let mut rng = Rng(seed);
    while common.stop.load(Ordering::Relaxed) == 0 {
        let seed = rng.next();
        let wanted = (Rng(seed).next() % 200 + 1) as i32;
        // SAFETY: a nurse has one thread.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            child(Rng(seed));
        }
        ok(pid.into(), "fork")?;
        let mut status = 0;
        // SAFETY: the status is live.
        ok(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into(), "waitpid")?;
        ensure!(libc::WIFEXITED(status), "a child ended with {status:#x}");
        ensure_eq!(libc::WEXITSTATUS(status), wanted, "how a child ended");
        common.children.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let common = common()?;
        let mut nurses = Vec::new();
        for seed in 1..=2 {
            // SAFETY: there is one thread yet.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let end = nurse(common, seed);
                if let Err(e) = &end {
                    println!("nurse {seed}: {e}");
                }
                // SAFETY: nothing is needed any more.
                unsafe { libc::_exit(i32::from(end.is_err())) }
            }
            nurses.push(ok(pid.into(), "fork")? as i32);
        }
        let threads = std::thread::spawn(move || {
            let mut done = 0u32;
            while common.stop.load(Ordering::Relaxed) == 0 {
                let some: Vec<_> = (0..4).map(|n| std::thread::spawn(move || n * 2)).collect();
                let sum: u32 = some.into_iter().map(|t| t.join().unwrap_or(100)).sum();
                if sum != 12 {
                    return Err(format!("the sum is {sum}"));
                }
                done += 1;
            }
            Ok(done)
        });
        let more = |what: &str| {
            let before = common.children.load(Ordering::Relaxed);
            for _ in 0..1000 {
                std::thread::sleep(Duration::from_millis(10));
                if common.children.load(Ordering::Relaxed) > before + 4 {
                    return Ok(());
                }
            }
            Err(format!("no children come and go {what}"))
        };
        more("at first")?;
        z.ready()?;
        z.wait_for_check();
        more("afterwards")?;
        common.stop.store(1, Ordering::Relaxed);
        for pid in nurses {
            let mut status = 0;
            // SAFETY: the status is live.
            ok(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into(), "waitpid")?;
            ensure_eq!(status, 0, "how a nurse ended");
        }
        let done = threads.join().map_err(|_| "a thread panicked")??;
        ensure!(done > 0, "no threads came and went");
        Ok(())
    })
}
