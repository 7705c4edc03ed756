//! Kernel state: a process that has unmapped its vdso and the data beside it, and one that sleeps without.
#![allow(unsafe_code, reason = "unmapping, and raw system calls")]

use zoo::{Check, Zoo, check, ensure_eq, nap};

/// Mappings that the kernel has made for the vdso.
fn specials() -> Result<Vec<(usize, usize)>, String> {
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| format!("maps: {e}"))?;
    let special = |line: &&str| line.ends_with("[vdso]") || line.contains("[vvar");
    let bounds = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    };
    maps.lines().filter(special).map(|l| bounds(l).ok_or_else(|| l.to_owned())).collect()
}

fn unmap() -> Check {
    for (start, end) in specials()? {
        // SAFETY: nobody calls into the vdso from here on: no clock is read.
        check(unsafe { libc::munmap(start as *mut _, end - start) }, "munmap")?;
    }
    ensure_eq!(specials()?, [], "mappings of the vdso");
    Ok(())
}

/// What a process without a vdso can still do.
fn body(z: &Zoo, name: &str) -> Check {
    unmap()?;
    z.publish(name, "");
    z.wait_for_check();
    ensure_eq!(specials()?, [], "mappings of the vdso afterwards");
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` outlives the call, which goes to the kernel.
    let done = unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &mut now) };
    check(done as i32, "clock_gettime")
}

fn main() {
    zoo::run(|z| {
        let one = z.fork(|z| {
            // Started before the vdso goes.
            let thread = std::thread::Builder::new().spawn(|| {
                loop {
                    nap(1000);
                }
            });
            thread.map_err(|e| e.to_string())?;
            body(z, "one")
        })?;
        let other = z.fork(|z| body(z, "other"))?;
        z.wait_for("one")?;
        z.wait_for("other")?;
        z.ready()?;
        z.wait_for_check();
        z.join(one)?;
        z.join(other)
    })
}
