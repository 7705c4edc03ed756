//! Kernel state: advice and locks on all kinds of mappings: merged pages (MADV_MERGEABLE), advice for children and core dumps
//! on shared memory, guard ranges in file mappings, what mlock(2) has of files, of shared memory and of memory without
//! access; memory the kernel may drop (MAP_DROPPABLE). The flags are compared from outside, here it is what they do.
#![allow(unsafe_code, reason = "raw mappings")]

use std::os::fd::AsRawFd;
use zoo::{Check, Rng, bytes, check, ensure, ensure_eq, mmap, mmap_anon};

const PAGE: usize = 4096;
const PAGES: usize = 16;
const LEN: usize = PAGES * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const MAP_DROPPABLE: i32 = 8;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

fn advise(p: *mut u8, pages: std::ops::Range<usize>, advice: i32, what: &str) -> Check {
    // SAFETY: pages of our own.
    let ret =
        unsafe { libc::madvise(p.add(pages.start * PAGE).cast(), pages.len() * PAGE, advice) };
    check(ret, &format!("madvise {what}"))
}

/// Whether each page can be read, asked through write(2), which answers EFAULT instead of a signal.
fn readable(p: *const u8) -> Result<String, String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors; the kernel checks the addresses.
    unsafe {
        check(libc::pipe(fds.as_mut_ptr()), "pipe")?;
        let can = |i| if libc::write(fds[1], p.add(i * PAGE).cast(), 1) == 1 { 'r' } else { '-' };
        let found = (0..PAGES).map(can).collect();
        libc::close(fds[0]);
        libc::close(fds[1]);
        Ok(found)
    }
}

fn main() {
    zoo::run(|z| {
        let private = libc::MAP_PRIVATE;
        let shared = libc::MAP_SHARED;
        let mut content = vec![0u8; LEN];
        Rng(7).fill(&mut content);
        std::fs::write(z.path("file"), &content).map_err(|e| e.to_string())?;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(z.path("file"))
            .map_err(|e| e.to_string())?;
        let map_file = |flags| mmap(0, LEN, RW, flags, file.as_raw_fd(), 0);
        let fill = |p, seed| -> Check {
            // SAFETY: just mapped.
            Rng(seed).fill(unsafe { bytes(p, LEN) });
            Ok(())
        };
        let verify = |p, seed, what: &str| {
            // SAFETY: mapped and readable.
            Rng(seed).verify(unsafe { bytes(p, LEN) }, what)
        };

        // Equal pages that may become one: whole, in part, taken back again.
        let merged = mmap_anon(LEN, RW, private)?;
        let partly = mmap_anon(LEN, RW, private)?;
        for p in [merged, partly] {
            // SAFETY: just mapped.
            unsafe { bytes(p, LEN) }.fill(0x5a);
        }
        // Kernels without CONFIG_KSM know no such advice.
        if z.param("ZOO_KSM", 1) != 0 {
            advise(merged, 0..PAGES, libc::MADV_MERGEABLE, "mergeable")
                .unwrap_or_else(|e| z.skip(&e));
            advise(partly, 2..9, libc::MADV_MERGEABLE, "mergeable")?;
            advise(partly, 4..5, libc::MADV_UNMERGEABLE, "unmergeable")?;
        }

        // Advice on shared memory and on files.
        let anon = mmap(0, LEN, RW, shared | libc::MAP_ANONYMOUS, -1, 0)?;
        fill(anon, 11)?;
        advise(anon, 0..4, libc::MADV_DONTFORK, "dontfork")?;
        advise(anon, 4..8, libc::MADV_DONTDUMP, "dontdump")?;
        advise(anon, 8..12, libc::MADV_RANDOM, "random")?;
        let of_file = map_file(shared)?;
        advise(of_file, 1..3, libc::MADV_SEQUENTIAL, "sequential")?;
        advise(of_file, 3..5, libc::MADV_DONTFORK, "dontfork")?;
        advise(of_file, 5..7, libc::MADV_NOHUGEPAGE, "nohugepage")
            .unwrap_or_else(|e| println!("{e}"));

        // All at once, and taken back in the middle.
        let much = mmap_anon(LEN, RW, private)?;
        fill(much, 12)?;
        for (advice, what) in [
            (libc::MADV_DONTDUMP, "dontdump"),
            (libc::MADV_DONTFORK, "dontfork"),
            (libc::MADV_WIPEONFORK, "wipeonfork"),
            (libc::MADV_NOHUGEPAGE, "nohugepage"),
            (libc::MADV_RANDOM, "random"),
        ] {
            advise(much, 0..PAGES, advice, what)?;
        }
        advise(much, 5..7, libc::MADV_KEEPONFORK, "keeponfork")?;
        advise(much, 6..8, libc::MADV_DOFORK, "dofork")?;
        advise(much, 9..11, libc::MADV_DODUMP, "dodump")?;
        advise(much, 10..12, libc::MADV_NORMAL, "normal")?;

        // Locked: a file, shared memory, memory without access, read-only memory, the middle of a mapping.
        let locked_file = map_file(private)?;
        let locked_anon = mmap(0, LEN, RW, shared | libc::MAP_ANONYMOUS, -1, 0)?;
        fill(locked_anon, 13)?;
        let closed = mmap_anon(LEN, RW, private)?;
        fill(closed, 14)?;
        let middle = mmap_anon(LEN, RW, private)?;
        fill(middle, 15)?;
        // SAFETY: ranges of our own.
        unsafe {
            bytes(locked_file, LEN)[3 * PAGE] ^= 1;
            check(libc::mlock(locked_file.cast(), LEN), "mlock")?;
            check(libc::mlock(locked_anon.cast(), LEN), "mlock")?;
            check(libc::mlock(closed.cast(), LEN), "mlock")?;
            check(libc::mprotect(closed.cast(), LEN, libc::PROT_NONE), "mprotect")?;
            check(libc::mlock(middle.add(3 * PAGE).cast(), 5 * PAGE), "mlock")?;
            check(libc::munlock(middle.add(5 * PAGE).cast(), PAGE), "munlock")?;
        }

        // Guard ranges: in a private file mapping, in shared memory (Linux 6.15), some taken away again.
        let mut guarded = Vec::new();
        for (p, what) in [
            (map_file(private)?, "private file"),
            (map_file(shared)?, "file"),
            (mmap(0, LEN, RW, shared | libc::MAP_ANONYMOUS, -1, 0)?, "shared"),
            (mmap_anon(LEN, RW, private)?, "private"),
        ] {
            // SAFETY: just mapped.
            unsafe {
                if what == "shared" || what == "private" {
                    bytes(p, LEN).copy_from_slice(&content);
                } else if what == "private file" {
                    bytes(p, LEN)[6 * PAGE] = content[6 * PAGE];
                }
            }
            let install = |pages| advise(p, pages, MADV_GUARD_INSTALL, "guard");
            match install(0..2).and_then(|()| install(7..12)) {
                Ok(()) => {
                    advise(p, 9..10, MADV_GUARD_REMOVE, "no guard")?;
                    // The page was dropped as the guard came: a file's is there again.
                    guarded.push((p, what));
                }
                Err(e) => println!("guard ranges in {what} memory: {e}"),
            }
        }

        // May be dropped at any time: what is in it is nobody's business, that it can be used is.
        let droppable = mmap_anon(LEN, RW, MAP_DROPPABLE);
        if let Ok(p) = droppable {
            fill(p, 16)?;
        }
        drop(file);
        z.ready()?;
        z.wait_for_check();

        for p in [merged, partly] {
            // SAFETY: mapped above.
            ensure!(
                unsafe { bytes(p, LEN) }.iter().all(|b| *b == 0x5a),
                "mergeable memory differs"
            );
        }
        verify(anon, 11, "advised shared memory")?;
        verify(much, 12, "much advised memory")?;
        verify(locked_anon, 13, "locked shared memory")?;
        // SAFETY: mapped above.
        check(unsafe { libc::mprotect(closed.cast(), LEN, RW) }, "mprotect")?;
        verify(closed, 14, "locked memory without access")?;
        verify(middle, 15, "partly locked memory")?;
        // SAFETY: mapped above.
        unsafe {
            ensure!(bytes(of_file, LEN) == content, "advised file mapping differs");
            content[3 * PAGE] ^= 1;
            ensure!(bytes(locked_file, LEN) == content, "locked file mapping differs");
            content[3 * PAGE] ^= 1;
        }
        for (p, what) in guarded {
            ensure_eq!(readable(p)?, "--rrrrr--r--rrrr", "guard ranges in {what} memory");
            // SAFETY: these pages can be read.
            unsafe {
                ensure!(
                    bytes(p.add(2 * PAGE), 5 * PAGE) == &content[2 * PAGE..7 * PAGE],
                    "{what} memory between guards differs"
                );
                let page = bytes(p.add(9 * PAGE), PAGE);
                let want = if what == "private" {
                    vec![0; PAGE]
                } else {
                    content[9 * PAGE..10 * PAGE].to_vec()
                };
                ensure!(page == want, "the page whose guard was taken away, in {what} memory");
            }
            advise(p, 0..PAGES, MADV_GUARD_REMOVE, "no guard")?;
            ensure_eq!(readable(p)?, "r".repeat(PAGES), "without guards, in {what} memory");
        }
        if let Ok(p) = droppable {
            fill(p, 17)?;
            verify(p, 17, "droppable memory")?;
        }
        Ok(())
    })
}
