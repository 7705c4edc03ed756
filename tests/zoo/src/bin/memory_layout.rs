//! Kernel state: an address space that is not as exec(2) left it: the heap with a hole, a part without access and one of
//! another kind; the lowest part of the stack's room taken, a gap below a second stack that grows; the first mapping of the
//! executable's data moved; memory under addresses a program asked for that touch each other.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Check, Rng, bytes, check, ensure, ensure_eq, mmap, mmap_anon};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FIXED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;

fn brk(to: usize) -> usize {
    // SAFETY: 0 only asks; otherwise above what the allocator uses.
    unsafe { libc::syscall(libc::SYS_brk, to) as usize }
}

/// The lines of maps that lie in a range.
fn layout(of: std::ops::Range<usize>) -> Result<Vec<String>, String> {
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    let inside = |line: &&str| {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let start = range.and_then(|(s, _)| usize::from_str_radix(s, 16).ok());
        start.is_some_and(|s| of.contains(&s))
    };
    // Inode numbers of anonymous memory are nobody's business.
    Ok(maps.lines().filter(inside).map(|l| l[..l.len().min(45)].to_owned()).collect())
}

fn main() {
    zoo::run(|z| {
        // The heap: [used][hole][no access][used][shared][used], the break in the middle of a page.
        let start = brk(0).next_multiple_of(PAGE);
        let end = start + 60 * PAGE + 5;
        ensure_eq!(brk(end), end, "brk");
        let heap = start as *mut u8;
        // SAFETY: all within what the break has just been moved over.
        unsafe {
            Rng(1).fill(bytes(heap, 60 * PAGE));
            check(libc::munmap(heap.add(10 * PAGE).cast(), 10 * PAGE), "munmap")?;
            check(libc::mprotect(heap.add(20 * PAGE).cast(), 10 * PAGE, 0), "mprotect")?;
        }
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        mmap(start + 40 * PAGE, 10 * PAGE, RW, shared, -1, 0)?;
        // SAFETY: just mapped.
        Rng(2).fill(unsafe { bytes(heap.add(40 * PAGE), 10 * PAGE) });

        // A stack that grows, with nothing below but the gap the kernel keeps (256 pages), then something.
        let base = 0x2345_0000_0000;
        let stack = mmap(base, 8 * PAGE, RW, FIXED | libc::MAP_GROWSDOWN, -1, 0)?;
        let floor = mmap(base - 300 * PAGE, PAGE, RW, FIXED, -1, 0)?;
        // SAFETY: just mapped.
        unsafe {
            Rng(3).fill(bytes(stack, 8 * PAGE));
            Rng(4).fill(bytes(floor, PAGE));
        }

        // Neighbours: different in one thing each, so that they stay apart, and two that were one.
        let row = mmap_anon(12 * PAGE, RW, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped.
        unsafe {
            Rng(5).fill(bytes(row, 12 * PAGE));
            check(libc::mprotect(row.add(2 * PAGE).cast(), PAGE, libc::PROT_READ), "mprotect")?;
            check(libc::mprotect(row.add(4 * PAGE).cast(), PAGE, libc::PROT_EXEC), "mprotect")?;
            check(libc::munmap(row.add(6 * PAGE).cast(), PAGE), "munmap")?;
        }
        // Memory that was moved keeps the page offset it had; no two halves of it become one again.
        // SAFETY: ranges of our own; where it is moved to nothing lies.
        unsafe {
            let to = 0x3456_0000_0000usize as *mut libc::c_void;
            let from = row.add(8 * PAGE).cast();
            let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let moved = libc::mremap(from, 2 * PAGE, 2 * PAGE, fixed, to);
            ensure!(moved == to, "mremap");
        }
        let moved = 0x3456_0000_0000usize as *mut u8;

        let ranges = [
            start..end,
            base - 400 * PAGE..base + 8 * PAGE,
            row as usize..row as usize + 12 * PAGE,
        ];
        let before: Vec<_> = ranges.iter().cloned().map(layout).collect::<Result<_, _>>()?;
        z.ready()?;
        z.wait_for_check();
        for (range, before) in ranges.into_iter().zip(before) {
            ensure_eq!(layout(range)?, before, "layout");
        }
        ensure_eq!(brk(0), end, "the break");
        // SAFETY: as it was mapped above.
        unsafe {
            check(libc::mprotect(heap.add(20 * PAGE).cast(), 10 * PAGE, RW), "mprotect")?;
            let mut want = vec![0u8; 60 * PAGE];
            Rng(1).fill(&mut want);
            Rng(2).fill(&mut want[40 * PAGE..50 * PAGE]);
            for (from, to) in [(0, 10), (20, 60)] {
                let (from, to) = (from * PAGE, to * PAGE);
                ensure!(bytes(heap.add(from), to - from) == &want[from..to], "the heap differs");
            }
            let mut want = vec![0u8; 12 * PAGE];
            Rng(5).fill(&mut want);
            for (from, to) in [(0, 4), (5, 6), (7, 8), (10, 12)] {
                let (from, to) = (from * PAGE, to * PAGE);
                ensure!(bytes(row.add(from), to - from) == &want[from..to], "a neighbour differs");
            }
            ensure!(bytes(moved, 2 * PAGE) == &want[8 * PAGE..10 * PAGE], "moved memory differs");
            Rng(3).verify(bytes(stack, 8 * PAGE), "the stack that grows")?;
            Rng(4).verify(bytes(floor, PAGE), "below the gap")?;
            // It grows, but not up to what lies below.
            for n in 1..40 {
                stack.sub(n * PAGE).write_volatile(n as u8);
            }
        }
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors; the kernel checks the address.
        unsafe {
            check(libc::pipe(fds.as_mut_ptr()), "pipe")?;
            let in_gap = stack.sub(60 * PAGE);
            ensure!(libc::write(fds[1], in_gap.cast(), 1) < 0, "it grew into the gap");
        }
        let grown = end + 10 * PAGE;
        ensure_eq!(brk(grown), grown, "the break after growing");
        let done: Check = {
            // SAFETY: just allocated; before is the end of what was there.
            let fresh = unsafe { bytes((end.next_multiple_of(PAGE)) as *mut u8, 9 * PAGE) };
            ensure!(fresh.iter().all(|b| *b == 0), "fresh heap is not zero");
            Ok(())
        };
        done
    })
}
