//! Kernel state: pages that are swapped out, of private and of shared anonymous memory, among pages that are not. Afterwards every
//! byte is as it was. Skipped where nothing can be swapped.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::unix::fs::FileExt;
use zoo::{Rng, bytes, ensure, mmap_anon};

const PAGE: usize = 4096;
const LEN: usize = 1024 * PAGE;
/// A bit of `/proc/self/pagemap`.
const SWAPPED: u64 = 1 << 62;

/// How many pages of a range are swapped out.
fn swapped(start: usize, len: usize) -> Result<usize, String> {
    let pagemap = std::fs::File::open("/proc/self/pagemap").map_err(|e| e.to_string())?;
    let mut words = vec![0u8; len / PAGE * 8];
    pagemap.read_exact_at(&mut words, (start / PAGE * 8) as u64).map_err(|e| e.to_string())?;
    let word = |w: &[u8]| w.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    Ok(words.chunks_exact(8).filter(|w| word(w) & SWAPPED != 0).count())
}

fn main() {
    zoo::run(|z| {
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().count() < 2 {
            z.skip("there is no swap");
        }
        let mut areas = Vec::new();
        for (seed, kind) in [(1, libc::MAP_PRIVATE), (2, libc::MAP_SHARED)] {
            let p = mmap_anon(LEN, libc::PROT_READ | libc::PROT_WRITE, kind)?;
            // SAFETY: just mapped, and nobody else's.
            let memory = unsafe { bytes(p, LEN) };
            Rng(seed).fill(memory);
            // SAFETY: the upper half of it; what is there stays the same.
            let upper = unsafe { p.add(LEN / 2) }.cast();
            // SAFETY: as above.
            let done = unsafe { libc::madvise(upper, LEN / 2, libc::MADV_PAGEOUT) };
            ensure!(done == 0, "MADV_PAGEOUT: {}", std::io::Error::last_os_error());
            if kind == libc::MAP_PRIVATE && swapped(upper as usize, LEN / 2)? == 0 {
                z.skip("the kernel swaps nothing out");
            }
            areas.push((memory, seed));
        }
        z.ready()?;
        z.wait_for_check();
        for (memory, seed) in areas {
            let mut wanted = vec![0; LEN];
            Rng(seed).fill(&mut wanted);
            ensure!(*memory == *wanted, "area {seed}: content");
        }
        Ok(())
    })
}
