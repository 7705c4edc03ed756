//! Kernel state: private memory: anonymous with every protection, executable, growing downwards, locked, advised, sparse
//! with zero pages that were only read, at unusual addresses; private file mappings with and without changed pages.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::fd::AsRawFd;
use zoo::{Check, Rng, bytes, check, ensure, ensure_eq, mmap, mmap_anon};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE;

/// A mapping filled with the numbers of a seed, then given a protection.
struct Area {
    name: &'static str,
    p: *mut u8,
    len: usize,
    seed: u64,
    prot: i32,
}

fn protect(p: *mut u8, len: usize, prot: i32) -> Check {
    // SAFETY: a range of our own.
    check(unsafe { libc::mprotect(p.cast(), len, prot) }, "mprotect")
}

fn advise(p: *mut u8, len: usize, advice: i32, name: &str) -> Check {
    // SAFETY: a range of our own.
    check(unsafe { libc::madvise(p.cast(), len, advice) }, &format!("madvise {name}"))
}

fn area(
    name: &'static str,
    pages: usize,
    seed: u64,
    prot: i32,
    flags: i32,
) -> Result<Area, String> {
    let len = pages * PAGE;
    let p = mmap_anon(len, RW, PRIVATE | flags).map_err(|e| format!("{name}: {e}"))?;
    // SAFETY: just mapped.
    Rng(seed).fill(unsafe { bytes(p, len) });
    protect(p, len, prot)?;
    Ok(Area { name, p, len, seed, prot })
}

impl Area {
    fn verify(&self) -> Check {
        if self.prot & libc::PROT_READ == 0 {
            protect(self.p, self.len, RW)?;
        }
        // SAFETY: mapped and readable.
        Rng(self.seed).verify(unsafe { bytes(self.p, self.len) }, self.name)?;
        protect(self.p, self.len, RW)?;
        // SAFETY: now writable.
        unsafe { self.p.write_volatile(self.p.read_volatile().wrapping_add(1)) };
        Ok(())
    }
}

/// Uses as much of the main stack as asked, so that it must grow.
fn deep(bytes: usize) -> u64 {
    let mut room = [1u8; 16 << 10];
    std::hint::black_box(&mut room);
    let below = if bytes > room.len() { deep(bytes - room.len()) } else { 0 };
    below + room[bytes % room.len()] as u64
}

fn main() {
    zoo::run(|z| {
        let (r, w, x) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let mut areas = vec![
            area("read-write", 300, 1, r | w, 0)?,
            area("read-only", 50, 2, r, 0)?,
            area("no access", 50, 3, libc::PROT_NONE, 0)?,
            area("write-only", 10, 4, w, 0)?,
            area("read-write-exec", 10, 5, r | w | x, 0)?,
            area("no reserve", 10, 6, r | w, libc::MAP_NORESERVE)?,
            area("stack flag", 10, 7, r | w, libc::MAP_STACK)?,
            area("populated", 10, 8, r | w, libc::MAP_POPULATE)?,
        ];
        for (i, (name, advice)) in [
            ("huge pages wanted", libc::MADV_HUGEPAGE),
            ("huge pages not wanted", libc::MADV_NOHUGEPAGE),
            ("not for children", libc::MADV_DONTFORK),
            ("not in core dumps", libc::MADV_DONTDUMP),
            ("wiped in children", libc::MADV_WIPEONFORK),
            ("sequential", libc::MADV_SEQUENTIAL),
            ("random", libc::MADV_RANDOM),
        ]
        .into_iter()
        .enumerate()
        {
            let a = area(name, 20, 100 + i as u64, r | w, 0)?;
            advise(a.p, a.len, advice, name)?;
            areas.push(a);
        }
        let locked = area("locked", 20, 200, r | w, 0)?;
        let on_fault = area("locked on fault", 20, 201, r | w, 0)?;
        // SAFETY: ranges of our own.
        unsafe {
            check(libc::mlock(locked.p.cast(), locked.len), "mlock")?;
            if z.param("ZOO_ONFAULT", 0) == 1 {
                check(
                    libc::mlock2(on_fault.p.cast(), on_fault.len, libc::MLOCK_ONFAULT),
                    "mlock2",
                )?;
            }
        }
        areas.extend([locked, on_fault]);
        // Unusual addresses: the lowest allowed, in the middle of nowhere, the last page below the stack's end.
        let fixed = libc::MAP_FIXED_NOREPLACE | libc::MAP_ANONYMOUS | PRIVATE;
        for (name, address) in
            [("lowest", 0x1_0000), ("middle", 0x1234_5678_9000), ("high", 0x7fff_ffff_e000)]
        {
            match mmap(address, PAGE, RW, fixed, -1, 0) {
                Ok(p) => {
                    // SAFETY: just mapped.
                    Rng(address as u64).fill(unsafe { bytes(p, PAGE) });
                    areas.push(Area { name, p, len: PAGE, seed: address as u64, prot: RW });
                }
                // Something lies there by chance of randomisation.
                Err(e) => println!("{name}: {e}, left out"),
            }
        }
        // Code made at run time: mov eax, 4711; ret.
        let code = mmap_anon(PAGE, RW, PRIVATE)?;
        // SAFETY: just mapped.
        unsafe { bytes(code, 6) }.copy_from_slice(&[0xb8, 0x67, 0x12, 0, 0, 0xc3]);
        protect(code, PAGE, r | x)?;

        // Sparse: every seventh page written, every eleventh only read (the shared zero page), one written and dropped.
        const SPARSE: usize = 16 << 10;
        let sparse = mmap_anon(SPARSE * PAGE, RW, PRIVATE)?;
        // SAFETY: just mapped.
        let sparse = unsafe { bytes(sparse, SPARSE * PAGE) };
        for i in 0..SPARSE {
            if i % 7 == 0 {
                sparse[i * PAGE + i % PAGE] = i as u8 | 1;
            } else if i % 11 == 0 {
                std::hint::black_box(sparse[i * PAGE]);
            }
        }
        advise(&raw mut sparse[14 * PAGE], PAGE, libc::MADV_DONTNEED, "dropped")?;

        // A mapping that grows downwards when touched below its start.
        // It lies where nothing else comes near: the kernel wants 1 MiB free below.
        let grows = mmap(0x2000_0000_0000, 4 * PAGE, RW, fixed | libc::MAP_GROWSDOWN, -1, 0)?;
        // SAFETY: just mapped.
        Rng(300).fill(unsafe { bytes(grows, 4 * PAGE) });

        // Private mappings of a file: untouched, changed in places, beyond its end, read-only after a change.
        let mut content = vec![0u8; 10 * PAGE + 100];
        Rng(400).fill(&mut content);
        std::fs::write(z.path("file"), &content).map_err(|e| e.to_string())?;
        let file = std::fs::File::open(z.path("file")).map_err(|e| e.to_string())?;
        let fd = file.as_raw_fd();
        let untouched = mmap(0, 11 * PAGE, r, PRIVATE, fd, 0)?;
        let changed = mmap(0, 11 * PAGE, RW, PRIVATE, fd, 0)?;
        let offset = mmap(0, 3 * PAGE, RW, PRIVATE, fd, 4 * PAGE as i64)?;
        drop(file);
        // SAFETY: mapped above.
        unsafe {
            bytes(changed, 11 * PAGE)[2 * PAGE..][..5].copy_from_slice(b"mine!");
            bytes(changed, 11 * PAGE)[10 * PAGE + 200] = 99;
            bytes(offset, PAGE)[0] = 88;
        }
        protect(offset, 3 * PAGE, r)?;

        z.ready()?;
        z.wait_for_check();

        for a in &areas {
            a.verify()?;
        }
        // SAFETY: the page holds a function without arguments.
        let run: extern "C" fn() -> i32 = unsafe { std::mem::transmute(code) };
        ensure_eq!(run(), 0x1267, "what the generated code returns");
        for i in 0..SPARSE {
            let page = &sparse[i * PAGE..][..PAGE];
            let want = if i % 7 == 0 && i != 14 { i as u8 | 1 } else { 0 };
            ensure!(
                page[i % PAGE] == want,
                "sparse page {i} holds {}, expected {want}",
                page[i % PAGE]
            );
            let others = page.iter().enumerate().any(|(at, &b)| b != 0 && at != i % PAGE);
            ensure!(!others, "sparse page {i} holds something else");
        }
        // SAFETY: mapped; below its start the kernel extends it on demand.
        unsafe {
            Rng(300).verify(bytes(grows, 4 * PAGE), "growing mapping")?;
            for n in 1..30 {
                grows.sub(n * PAGE).write_volatile(n as u8);
            }
            ensure_eq!(grows.sub(29 * PAGE).read_volatile(), 29, "byte in the grown part");
        }
        // SAFETY: mapped above.
        unsafe {
            let u = bytes(untouched, content.len());
            ensure!(u == content, "the untouched file mapping differs");
            let c = bytes(changed, 11 * PAGE);
            ensure_eq!(&c[2 * PAGE..][..5], b"mine!", "changed page");
            ensure_eq!(c[10 * PAGE + 200], 99, "changed byte beyond the file's end");
            ensure!(
                c[3 * PAGE..10 * PAGE] == content[3 * PAGE..10 * PAGE],
                "unchanged pages of the changed mapping"
            );
            let o = bytes(offset, 3 * PAGE);
            ensure!(
                o[0] == 88 && o[1..] == content[4 * PAGE + 1..7 * PAGE],
                "the mapping with an offset differs"
            );
        }
        let now = std::fs::read(z.path("file")).map_err(|e| e.to_string())?;
        ensure!(now == content, "the file itself was changed");
        ensure_eq!(deep(6 << 20), deep(6 << 20), "main stack grown by 6 MiB");
        Ok(())
    })
}
