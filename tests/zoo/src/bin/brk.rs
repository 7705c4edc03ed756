//! Kernel state: the program break: where it is, what lies below it, and that it goes on from there.
#![allow(unsafe_code, reason = "sbrk and raw brk")]

use zoo::{Rng, bytes, ensure, ensure_eq};

const LEN: usize = 1 << 20;

fn current() -> usize {
    // SAFETY: brk(0) only asks.
    unsafe { libc::syscall(libc::SYS_brk, 0) as usize }
}

fn set(to: usize) -> usize {
    // SAFETY: moves the break above what the allocator uses.
    unsafe { libc::syscall(libc::SYS_brk, to) as usize }
}

fn main() {
    zoo::run(|z| {
        // Above whatever the allocator has; it notices that the break moved and goes on elsewhere or above.
        let base = current();
        // An odd end: the break need not be on a page boundary.
        let end = base + LEN + 123;
        ensure_eq!(set(end), end, "brk");
        // SAFETY: just allocated.
        Rng(9).fill(unsafe { bytes(base as *mut u8, LEN) });
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(current(), end, "the break");
        // SAFETY: allocated above.
        Rng(9).verify(unsafe { bytes(base as *mut u8, LEN) }, "below the break")?;
        let grown = end + 3 * LEN;
        ensure_eq!(set(grown), grown, "the break after growing");
        // SAFETY: just allocated.
        let fresh = unsafe { bytes((end + 4096) as *mut u8, 2 * LEN) };
        ensure!(fresh.iter().all(|&b| b == 0), "fresh memory is not zero");
        fresh.fill(1);
        ensure_eq!(set(end), end, "the break after shrinking");
        // SAFETY: allocated above.
        Rng(9).verify(
            unsafe { bytes(base as *mut u8, LEN) },
            "below the break, after growing and shrinking",
        )?;
        let allocated: Vec<Vec<u8>> = (0..100).map(|i| vec![i as u8; 1000 * i]).collect();
        ensure!(
            allocated.iter().enumerate().all(|(i, v)| v.iter().all(|&b| b == i as u8)),
            "malloc is broken"
        );
        Ok(())
    })
}
