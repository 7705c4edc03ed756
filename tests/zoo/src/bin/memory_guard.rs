//! Kernel state: guard pages put into a mapping by MADV_GUARD_INSTALL (Linux 6.13): they fault, the pages between hold.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Rng, bytes, ensure, ensure_eq, mmap_anon};

const PAGE: usize = 4096;
const MADV_GUARD_INSTALL: i32 = 102;
const GUARDS: [usize; 4] = [0, 3, 4, 9];

/// Whether the page can be read, asked through write(2), which answers EFAULT instead of a signal.
fn readable(p: *const u8, fd: i32) -> bool {
    // SAFETY: the kernel checks the address.
    unsafe { libc::write(fd, p.cast(), 1) == 1 }
}

fn main() {
    zoo::run(|z| {
        let p = mmap_anon(10 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped.
        Rng(1).fill(unsafe { bytes(p, 10 * PAGE) });
        for g in GUARDS {
            // SAFETY: a page of our own.
            if unsafe { libc::madvise(p.add(g * PAGE).cast(), PAGE, MADV_GUARD_INSTALL) } != 0 {
                z.skip(&format!("MADV_GUARD_INSTALL: {}", std::io::Error::last_os_error()));
            }
        }
        z.ready()?;
        z.wait_for_check();
        // Whether a page can be read is asked by writing it to a pipe: /dev/null would not look.
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors.
        unsafe {
            ensure_eq!(libc::pipe(fds.as_mut_ptr()), 0, "pipe");
        }
        let mut whole = vec![0u8; 10 * PAGE];
        Rng(1).fill(&mut whole);
        for i in 0..10 {
            // SAFETY: within the mapping.
            let page = unsafe { p.add(i * PAGE) };
            ensure_eq!(readable(page, fds[1]), !GUARDS.contains(&i), "page {i} readable");
            if !GUARDS.contains(&i) {
                // SAFETY: a readable page.
                ensure!(
                    unsafe { bytes(page, PAGE) } == &whole[i * PAGE..][..PAGE],
                    "page {i} differs"
                );
            }
        }
        Ok(())
    })
}
