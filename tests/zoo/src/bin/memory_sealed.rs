//! Kernel state: sealed mappings (mseal(2), Linux 6.10): they cannot be unmapped, moved, protected otherwise, or emptied; their
//! content and what is beside them is as it was. In a parent and its child, one of a file, two neighbours sealed as one.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::fd::AsRawFd;
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, errno, mmap, mmap_anon};

const PAGE: usize = 4096;
const LEN: usize = 8 * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const SYS_MSEAL: i64 = 462;

fn seal(p: *mut u8, len: usize) -> i32 {
    // SAFETY: integers; a range of our own.
    unsafe { libc::syscall(SYS_MSEAL, p, len, 0) as i32 }
}

/// Nothing may be done to the mapping any more.
fn is_sealed(p: *mut u8, len: usize, what: &str) -> Check {
    let refused = |ret: i32, call: &str| -> Check {
        ensure!(ret != 0 && errno() == libc::EPERM, "{what}: {call} is not refused");
        Ok(())
    };
    // SAFETY: all of it is refused; if it is not, the check fails and nobody uses the range any more.
    unsafe {
        refused(libc::munmap(p.cast(), len), "munmap")?;
        refused(libc::mprotect(p.cast(), len, libc::PROT_EXEC), "mprotect")?;
        let moved = libc::mremap(p.cast(), len, 2 * len, libc::MREMAP_MAYMOVE);
        refused(i32::from(moved == libc::MAP_FAILED), "mremap")
    }
}

fn verify(all: &[(*mut u8, &str)]) -> Check {
    for (i, (p, what)) in all.iter().enumerate() {
        // SAFETY: mapped and readable.
        Rng(i as u64).verify(unsafe { bytes(*p, LEN) }, what)?;
        is_sealed(*p, LEN, what)?;
    }
    Ok(())
}

fn child(z: &Zoo, all: &[(*mut u8, &str)]) -> Check {
    z.publish("up", "");
    z.wait_for_check();
    // Seals are inherited by fork(2).
    verify(all)
}

fn main() {
    zoo::run(|z| {
        let mut content = vec![0u8; LEN];
        Rng(2).fill(&mut content);
        std::fs::write(z.path("file"), &content).map_err(|e| e.to_string())?;
        let file = std::fs::File::open(z.path("file")).map_err(|e| e.to_string())?;
        let row = mmap_anon(6 * LEN, RW, libc::MAP_PRIVATE)?;
        // SAFETY: within the mapping.
        let at = |n: usize| unsafe { row.add(n * LEN) };
        let all = [
            (at(1), "read-only memory"),
            (at(2), "memory beside it"),
            (mmap(0, LEN, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)?, "a file"),
            (mmap(0, LEN, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)?, "shared memory"),
        ];
        for (i, (p, _)) in all.iter().enumerate().filter(|(i, _)| *i != 2) {
            // SAFETY: mapped and writable.
            Rng(i as u64).fill(unsafe { bytes(*p, LEN) });
        }
        // SAFETY: within the mapping.
        check(unsafe { libc::mprotect(all[0].0.cast(), LEN, libc::PROT_READ) }, "mprotect")?;
        if seal(at(1), 2 * LEN) != 0 {
            z.skip(&format!("mseal: {}", std::io::Error::last_os_error()));
        }
        for (p, _) in &all[2..] {
            check(seal(*p, LEN), "mseal")?;
        }
        let pid = z.fork(|z| child(z, &all))?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        verify(&all)?;
        // What is beside them is free, and so is what is read and written.
        // SAFETY: within the mapping.
        unsafe {
            check(libc::munmap(at(3).cast(), LEN), "munmap beside")?;
            check(libc::mprotect(at(0).cast(), LEN, libc::PROT_READ), "mprotect beside")?;
            bytes(at(2), LEN)[5] = 1;
            ensure_eq!(bytes(at(2), LEN)[5], 1, "a byte of sealed memory");
        }
        z.join(pid)
    })
}
