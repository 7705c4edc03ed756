//! Kernel state: huge pages of the kernel's pools (2 MiB): private and shared anonymous memory, memfds with and without
//! mappings, System V segments (ZOO_SYSV), files of hugetlbfs (ZOO_FILE: a mount of it; with and without a name); touched in
//! part, changed after fork(2), read-only, not reserved. What parent and child share they share afterwards.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, errno, mmap, ok};

const PAGE: usize = 2 << 20;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE;
const SHARED: i32 = libc::MAP_SHARED;
const HUGE: i32 = libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | 21 << 26;

struct Shared {
    name: &'static str,
    p: *mut u8,
}

impl Shared {
    fn word(&self, n: usize) -> &AtomicU64 {
        // SAFETY: within the first page of the mapping, aligned, never borrowed otherwise.
        unsafe { &*self.p.cast::<AtomicU64>().add(n) }
    }

    fn wait(&self, n: usize, value: u64) -> Check {
        let until = zoo::now() + 5_000_000_000;
        while self.word(n).load(Ordering::SeqCst) != value {
            ensure!(zoo::now() < until, "{}: what the other process wrote is not seen", self.name);
            zoo::nap(1);
        }
        Ok(())
    }
}

fn content(seed: u64) -> Vec<u8> {
    let mut all = vec![0; PAGE / 2];
    Rng(seed).fill(&mut all);
    all
}

fn fill(p: *mut u8, seed: u64) {
    // SAFETY: mapped and writable, two pages at least.
    let memory = unsafe { bytes(p.add(PAGE / 2), PAGE / 2) };
    memory.copy_from_slice(&content(seed));
}

fn verify(p: *mut u8, seed: u64, what: &str) -> Check {
    // SAFETY: mapped and readable, two pages at least.
    let found = unsafe { bytes(p.add(PAGE / 2), PAGE / 2) };
    ensure!(found == content(seed), "{what} differs");
    Ok(())
}

/// Whether the mapping has huge pages still.
fn is_huge(p: *mut u8) -> Result<bool, String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(|e| e.to_string())?;
    let mut lines = smaps.lines().skip_while(|l| !l.starts_with(&format!("{:x}-", p as usize)));
    let size = lines.find(|l| l.starts_with("KernelPageSize:"));
    Ok(size.is_some_and(|l| l.contains(" 2048 kB")))
}

fn child(z: &Zoo, private: *mut u8, shared: &[Shared]) -> Check {
    // Copied on write: the parent does not see it.
    fill(private, 50);
    z.publish("up", "");
    z.wait_for_check();
    verify(private, 50, "the child's private memory")?;
    for s in shared {
        s.wait(1, 1111)?;
        s.word(2).store(2222, Ordering::SeqCst);
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let skip = |what: &str| -> ! {
            z.skip(&format!("{what}: {} (too few huge pages?)", std::io::Error::last_os_error()))
        };
        let private = mmap(0, 2 * PAGE, RW, PRIVATE | HUGE, -1, 0).unwrap_or_else(|_| skip("mmap"));
        fill(private, 1);
        let mut shared = Vec::new();
        let mut memfd = -1;
        let mut frozen = std::ptr::null_mut();
        let (mut unreserved, mut readonly) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut deleted = std::ptr::null_mut();
        if z.param("ZOO_SYSV", 0) != 0 {
            let size = PAGE + PAGE / 2 + 5;
            let flags = libc::IPC_CREAT | 0o600 | libc::SHM_HUGETLB | 21 << 26;
            // SAFETY: integers, and an address of the kernel's choice.
            unsafe {
                let id = libc::shmget(libc::IPC_PRIVATE, size, flags);
                if id < 0 {
                    skip("shmget");
                }
                let p = libc::shmat(id, std::ptr::null(), 0).cast::<u8>();
                ensure!(p as isize != -1, "shmat: errno {}", errno());
                check(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()), "IPC_RMID")?;
                shared.push(Shared { name: "segment", p });
            }
        } else if let Ok(mount) = std::env::var("ZOO_FILE") {
            let path = |name: &str| format!("{mount}/{}-{name}", zoo::pid());
            let open = |name: &str| {
                let how = std::fs::File::options().read(true).write(true).create(true).clone();
                how.open(path(name)).and_then(|f| f.set_len(2 * PAGE as u64).map(|()| f))
            };
            let file = open("file").map_err(|e| e.to_string())?;
            let p =
                mmap(0, 2 * PAGE, RW, SHARED, file.as_raw_fd(), 0).unwrap_or_else(|_| skip("mmap"));
            shared.push(Shared { name: "file", p });
            // Private, with one page of its own.
            readonly = mmap(0, 2 * PAGE, RW, PRIVATE, file.as_raw_fd(), 0)?;
            let gone = open("deleted").map_err(|e| e.to_string())?;
            deleted = mmap(0, 2 * PAGE, RW, SHARED, gone.as_raw_fd(), 0)?;
            fill(deleted, 8);
            std::fs::remove_file(path("deleted")).map_err(|e| e.to_string())?;
        } else {
            unreserved = mmap(0, 4 * PAGE, RW, PRIVATE | HUGE | libc::MAP_NORESERVE, -1, 0)?;
            fill(unreserved, 2);
            readonly = mmap(0, 2 * PAGE, RW, PRIVATE | HUGE, -1, 0)?;
            let p = mmap(0, 3 * PAGE, RW, SHARED | HUGE, -1, 0).unwrap_or_else(|_| skip("mmap"));
            shared.push(Shared { name: "anonymous", p });
            let flags = libc::MFD_HUGETLB | 21 << 26 | libc::MFD_ALLOW_SEALING;
            // SAFETY: NUL-terminated names; descriptors of our own.
            unsafe {
                memfd = ok(libc::memfd_create(c"zoo huge".as_ptr(), flags) as i64, "memfd")? as i32;
                check(libc::ftruncate(memfd, 3 * PAGE as i64), "ftruncate")?;
                let p = mmap(0, 3 * PAGE, RW, SHARED, memfd, 0).unwrap_or_else(|_| skip("mmap"));
                shared.push(Shared { name: "memfd", p });
                // Sealed, its mapping read-only, its descriptor closed.
                let fd =
                    ok(libc::memfd_create(c"zoo frozen".as_ptr(), flags) as i64, "memfd")? as i32;
                check(libc::ftruncate(fd, 2 * PAGE as i64), "ftruncate")?;
                let p = mmap(0, 2 * PAGE, RW, SHARED, fd, 0).unwrap_or_else(|_| skip("mmap"));
                fill(p, 6);
                check(libc::munmap(p.cast(), 2 * PAGE), "munmap")?;
                check(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE), "F_ADD_SEALS")?;
                frozen = mmap(0, 2 * PAGE, libc::PROT_READ, SHARED, fd, 0)?;
                libc::close(fd);
            }
        }
        for (i, s) in shared.iter().enumerate() {
            fill(s.p, 10 + i as u64);
        }
        if !readonly.is_null() {
            fill(readonly, 3);
            // SAFETY: a range of our own.
            check(
                unsafe { libc::mprotect(readonly.cast(), 2 * PAGE, libc::PROT_READ) },
                "mprotect",
            )?;
        }
        let pid = z.fork(|z| child(z, private, &shared))?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        verify(private, 1, "private memory")?;
        ensure!(is_huge(private)?, "private memory has no huge pages any more");
        for (i, s) in shared.iter().enumerate() {
            verify(s.p, 10 + i as u64, s.name)?;
            ensure!(is_huge(s.p)?, "{} has no huge pages any more", s.name);
            s.word(1).store(1111, Ordering::SeqCst);
            s.wait(2, 2222).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        }
        for (p, seed, what) in [
            (unreserved, 2, "memory that is not reserved"),
            (readonly, 3, "read-only memory"),
            (frozen, 6, "the sealed memfd"),
            (deleted, 8, "the deleted file"),
        ] {
            if !p.is_null() {
                verify(p, seed, what)?;
                ensure!(is_huge(p)?, "{what} has no huge pages any more");
            }
        }
        if memfd >= 0 {
            let again = mmap(0, 3 * PAGE, RW, SHARED, memfd, 0)?;
            // SAFETY: mapped; what the child wrote into the other mapping.
            ensure_eq!(unsafe { again.cast::<u64>().add(2).read() }, 2222, "the memfd mapped anew");
        }
        z.join(pid)?;
        if let Ok(mount) = std::env::var("ZOO_FILE") {
            let _ = std::fs::remove_file(format!("{mount}/{}-file", zoo::pid()));
        }
        Ok(())
    })
}
