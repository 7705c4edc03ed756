//! Kernel state: many mappings (ZOO_N, default 10000) of alternating protection, each page with its own content.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{bytes, check, ensure_eq, mmap_anon};

const PAGE: usize = 4096;

fn main() {
    zoo::run(|z| {
        let n = z.param("ZOO_N", 10_000);
        let p = mmap_anon(n * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        for i in 0..n {
            // SAFETY: within the mapping; the protection is changed after the page is written.
            unsafe {
                bytes(p.add(i * PAGE), 8).copy_from_slice(&(i as u64 * 31 + 7).to_le_bytes());
                if i % 2 == 1 {
                    check(
                        libc::mprotect(p.add(i * PAGE).cast(), PAGE, libc::PROT_READ),
                        "mprotect",
                    )?;
                }
            }
        }
        z.ready()?;
        z.wait_for_check();
        for i in 0..n {
            // SAFETY: within the mapping.
            let found = unsafe { p.add(i * PAGE).cast::<u64>().read_volatile() };
            ensure_eq!(found, i as u64 * 31 + 7, "content of page {i}");
            if i % 2 == 0 {
                // SAFETY: a writable page.
                unsafe { p.add(i * PAGE).cast::<u64>().write_volatile(0) };
            }
        }
        Ok(())
    })
}
