//! Kernel state: memory shared between processes: anonymous, of /dev/zero, of a memfd whose descriptor is closed, of a
//! file; mapped in part, at other addresses and with other protections in the child. What one writes after a restore
//! the other sees.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, mmap, ok};

const PAGE: usize = 4096;
const PAGES: usize = 64;
const LEN: usize = PAGE * PAGES;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

struct Shared {
    name: &'static str,
    p: *mut u8,
}

impl Shared {
    fn word(&self, page: usize) -> &AtomicU64 {
        // SAFETY: within the mapping, aligned, never borrowed otherwise.
        unsafe { &*self.p.add(page * PAGE).cast::<AtomicU64>() }
    }
    /// Waits for the other process's number.
    fn wait(&self, page: usize, value: u64) -> Check {
        let until = zoo::now() + 5_000_000_000;
        while self.word(page).load(Ordering::SeqCst) != value {
            ensure!(zoo::now() < until, "{}: what the other process wrote is not seen", self.name);
            zoo::nap(1);
        }
        Ok(())
    }
}

fn child(z: &Zoo, all: &mut [Shared]) -> Check {
    for s in all.iter_mut() {
        // Elsewhere in this process, and one of them without its second half.
        // SAFETY: the mapping is ours; the old address is not used any more.
        let moved = unsafe { libc::mremap(s.p.cast(), LEN, LEN, libc::MREMAP_MAYMOVE) };
        ensure!(moved != libc::MAP_FAILED, "mremap");
        s.p = moved.cast();
        if s.name == "anonymous" {
            // SAFETY: the second half of our own mapping.
            check(unsafe { libc::munmap(s.p.add(LEN / 2).cast(), LEN / 2) }, "munmap")?;
        }
    }
    z.publish("up", "");
    z.wait_for_check();
    for s in all.iter() {
        s.wait(1, 1111)?;
        s.word(2).store(2222, Ordering::SeqCst);
        s.wait(3, 3333)?;
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let zero = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .map_err(|e| e.to_string())?;
        std::fs::write(z.path("file"), vec![0u8; LEN]).map_err(|e| e.to_string())?;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(z.path("file"))
            .map_err(|e| e.to_string())?;
        // SAFETY: a NUL-terminated name; the descriptor is closed below.
        let memfd =
            ok(unsafe { libc::memfd_create(c"zoo memory".as_ptr(), 0) } as i64, "memfd_create")?
                as i32;
        check(unsafe { libc::ftruncate(memfd, LEN as i64) }, "ftruncate")?;
        let anon = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let mut all = vec![
            Shared { name: "anonymous", p: mmap(0, LEN, RW, anon, -1, 0)? },
            Shared {
                name: "anonymous, no reserve",
                p: mmap(0, LEN, RW, anon | libc::MAP_NORESERVE, -1, 0)?,
            },
            Shared {
                name: "/dev/zero",
                p: mmap(0, LEN, RW, libc::MAP_SHARED, zero.as_raw_fd(), 0)?,
            },
            Shared { name: "memfd", p: mmap(0, LEN, RW, libc::MAP_SHARED, memfd, 0)? },
            Shared { name: "file", p: mmap(0, LEN, RW, libc::MAP_SHARED, file.as_raw_fd(), 0)? },
        ];
        // The same memfd again, read-only and from its middle; private memory of the memfd with a change of its own.
        let window = mmap(0, 4 * PAGE, libc::PROT_READ, libc::MAP_SHARED, memfd, 8 * PAGE as i64)?;
        let private = mmap(0, 4 * PAGE, RW, libc::MAP_PRIVATE, memfd, 8 * PAGE as i64)?;
        // SAFETY: ours.
        check(unsafe { libc::close(memfd) }, "close")?;
        drop((zero, file));
        for (i, s) in all.iter().enumerate() {
            // Content in the middle; holes and zeroes elsewhere.
            // SAFETY: mapped above.
            Rng(i as u64).fill(unsafe { bytes(s.p.add(8 * PAGE), 10 * PAGE) });
        }
        // SAFETY: mapped above.
        unsafe { bytes(private, 4 * PAGE)[PAGE] ^= 0x55 };
        let pid = z.fork(|z| child(z, &mut all))?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        for (i, s) in all.iter().enumerate() {
            // SAFETY: mapped above.
            Rng(i as u64).verify(unsafe { bytes(s.p.add(8 * PAGE), 10 * PAGE) }, s.name)?;
            ensure_eq!(s.word(30).load(Ordering::SeqCst), 0, "an untouched word of {}", s.name);
        }
        let mut want = vec![0u8; 10 * PAGE];
        Rng(3).fill(&mut want);
        // SAFETY: mapped above.
        unsafe {
            ensure!(bytes(window, 4 * PAGE) == &want[..4 * PAGE], "the read-only window differs");
            want[PAGE] ^= 0x55;
            ensure!(bytes(private, 4 * PAGE) == &want[..4 * PAGE], "the private mapping differs");
            // Shared with itself: a change shows in the window, and not in a private page with a change of its own.
            bytes(all[3].p, LEN)[8 * PAGE + 77] ^= 1;
            ensure_eq!(
                bytes(window, PAGE)[77],
                bytes(all[3].p, LEN)[8 * PAGE + 77],
                "change seen in the window"
            );
            bytes(all[3].p, LEN)[9 * PAGE + 77] ^= 1;
            ensure_eq!(
                bytes(private, 2 * PAGE)[PAGE + 77],
                want[PAGE + 77],
                "change seen in the private page"
            );
        }
        for s in &all {
            s.word(1).store(1111, Ordering::SeqCst);
            s.wait(2, 2222).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
            s.word(3).store(3333, Ordering::SeqCst);
        }
        z.join(pid)?;
        let file = std::fs::read(z.path("file")).map_err(|e| e.to_string())?;
        ensure_eq!(
            file[2 * PAGE..][..8],
            2222u64.to_le_bytes(),
            "what the child wrote, in the file"
        );
        Ok(())
    })
}
