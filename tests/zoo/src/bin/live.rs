//! Kernel state: memory of which every page is written all the time, by two processes of two threads each: private, shared
//! anonymous and memfd memory, and private memory of a file, part of which is written seldom, in step. Before a page is written again, it must be what the round before made of it, so a page
//! that a checkpoint took at another instant than the rest is seen, and so is one that it lost. `ZOO_CHURN=1`: memory also
//! comes and goes, is moved and dropped, and children are forked.
#![allow(unsafe_code, reason = "raw mappings, fork")]

use std::sync::atomic::{AtomicBool, Ordering};
use zoo::{Check, Zoo, check, ensure, mmap, mmap_anon};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Private pages of a worker: enough for its process to be worth protecting.
const PRIVATE: u64 = 2048;
/// Shared pages of a worker, each of two kinds.
const SHARED: u64 = 64;
/// Private pages of a file of a worker, each of two kinds.
const FILE: u64 = 512;
/// In so many steps one of the pages is written that are written seldom.
const SELDOM: u64 = 64;
/// Workers of a process.
const THREADS: usize = 2;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Pages that are written one after the other, each once in a round.
struct Ring {
    name: &'static str,
    start: *mut u64,
    pages: u64,
}

// SAFETY: each ring is used by one thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Writes the page of a step, which must be as the round before left it.
    fn step(&self, n: u64) -> Check {
        // An odd number: each page once in a round, and none beside the one before.
        let page = n.wrapping_mul(0x9e37_79b1) % self.pages;
        let before = n.saturating_sub(self.pages);
        for at in 0..WORDS {
            // SAFETY: within the ring, which only this thread uses.
            unsafe {
                let word = self.start.add(page as usize * WORDS + at);
                let is = word.read_volatile();
                ensure!(
                    is == before,
                    "step {n}: word {at} of {} page {page} is of step {is}, not {before}",
                    self.name
                );
                word.write_volatile(n);
            }
        }
        Ok(())
    }
}

/// What one worker writes.
struct Worker {
    rings: [Ring; 4],
    seldom: Ring,
    next: u64,
}

impl Worker {
    fn new(shared: *mut u8, memfd: *mut u8, nth: usize) -> Result<Worker, String> {
        let private = mmap_anon(PRIVATE as usize * PAGE, RW, libc::MAP_PRIVATE)?;
        let part = nth * SHARED as usize * PAGE;
        let ring = |name, start: *mut u8, pages| Ring { name, start: start.cast(), pages };
        // SAFETY: the parts of all workers are inside.
        let (shared, memfd) = unsafe { (shared.add(part), memfd.add(part)) };
        let file = mapped_file()?;
        // SAFETY: half of the mapping.
        let other = unsafe { file.add(FILE as usize * PAGE) };
        let rings = [
            ring("private", private, PRIVATE),
            ring("shared", shared, SHARED),
            ring("memfd", memfd, SHARED),
            ring("file", file, FILE),
        ];
        Ok(Worker { rings, seldom: ring("seldom written", other, FILE), next: 1 })
    }

    /// Does some steps, each in all kinds of memory.
    fn steps(&mut self, count: u64) -> Check {
        for _ in 0..count {
            for ring in &self.rings {
                ring.step(self.next)?;
            }
            if self.next.is_multiple_of(SELDOM) {
                self.seldom.step(self.next / SELDOM)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    fn work(&mut self, z: &Zoo, stop: &AtomicBool) -> Check {
        while !stop.load(Ordering::Relaxed) && !z.checking() {
            self.steps(256)?;
        }
        // Each page once more.
        self.steps(PRIVATE)
    }
}

/// A private mapping of a file, of which all pages have become the program's own and are empty.
fn mapped_file() -> Result<*mut u8, String> {
    let len = 2 * FILE as usize * PAGE;
    let file = std::fs::File::open("/proc/self/exe").map_err(|e| e.to_string())?;
    ensure!(file.metadata().is_ok_and(|m| m.len() >= len as u64), "the executable is too small");
    let at = mmap(0, len, RW, libc::MAP_PRIVATE, std::os::fd::AsRawFd::as_raw_fd(&file), 0)?;
    // SAFETY: a mapping of our own.
    unsafe { at.write_bytes(0, len) };
    Ok(at)
}

/// Memory that comes and goes.
fn churn(z: &Zoo) -> Check {
    const LEN: usize = 256 * PAGE;
    /// Not all of this is saved by the time when it goes.
    const MUCH: usize = 8192 * PAGE;
    let fill = |p: *mut u8, len: usize, with: u8| {
        // SAFETY: a mapping of our own.
        (0..len).step_by(PAGE).for_each(|at| unsafe { p.add(at).write_volatile(with) });
    };
    let mut p = mmap_anon(LEN, RW, libc::MAP_PRIVATE)?;
    let mut much = mmap_anon(MUCH, RW, libc::MAP_PRIVATE)?;
    let mut round = 0u8;
    while !z.checking() {
        round = round.wrapping_add(1);
        fill(p, LEN, round);
        if round.is_multiple_of(64) {
            // SAFETY: a mapping of our own.
            check(unsafe { libc::munmap(much.cast(), MUCH) }, "munmap")?;
            much = mmap_anon(MUCH, RW, libc::MAP_PRIVATE)?;
            fill(much, MUCH, round);
        }
        // SAFETY: mappings of our own, used by their new addresses only.
        unsafe {
            let room = mmap_anon(LEN, libc::PROT_NONE, libc::MAP_PRIVATE)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            ensure!(libc::mremap(p.cast(), LEN, LEN, flags, room) == room.cast(), "mremap");
            for at in (0..LEN).step_by(PAGE) {
                let is = room.add(at).read_volatile();
                ensure!(is == round, "a moved page is of round {is}, not {round}");
            }
            check(libc::madvise(room.cast(), LEN / 2, libc::MADV_DONTNEED), "madvise")?;
            ensure!(room.read_volatile() == 0, "a dropped page is not empty");
            if round.is_multiple_of(16) {
                let last = room.add(LEN - PAGE);
                let child = z.fork(|_| {
                    let is = last.read_volatile();
                    ensure!(is == round, "a child's page is of round {is}, not {round}");
                    last.write_volatile(0);
                    Ok(())
                })?;
                z.join(child)?;
                ensure!(last.read_volatile() == round, "a child wrote to our page");
            }
            check(libc::munmap(room.cast(), LEN), "munmap")?;
            libc::usleep(200);
        }
        p = mmap_anon(LEN, RW, libc::MAP_PRIVATE)?;
    }
    Ok(())
}

fn process(
    z: &Zoo,
    shared: *mut u8,
    memfd: *mut u8,
    first: usize,
    ready: impl FnOnce() -> Check,
) -> Check {
    let workers = (0..THREADS)
        .map(|n| Worker::new(shared, memfd, first + n))
        .collect::<Result<Vec<_>, _>>()?;
    let stop = AtomicBool::new(false);
    let mut workers = workers.into_iter();
    let Some(mut own) = workers.next() else { return Ok(()) };
    // All pages exist before anybody looks.
    own.steps(PRIVATE)?;
    std::thread::scope(|scope| {
        let stop = &stop;
        let others: Vec<_> = workers
            .map(|mut worker| {
                scope.spawn(move || {
                    worker.steps(PRIVATE)?;
                    // What the C library sets up for a thread when it first needs it is there before anybody looks.
                    z.checking();
                    zoo::here();
                    worker.work(z, stop)
                })
            })
            .collect();
        let mut done = zoo::all_here(THREADS - 1).and_then(|()| ready());
        if done.is_ok() {
            done = own.work(z, stop);
        }
        stop.store(true, Ordering::Relaxed);
        for other in others {
            done = done.and(other.join().unwrap_or_else(|_| Err("a thread panicked".into())));
        }
        done
    })
}

fn main() {
    zoo::run(|z| {
        let len = 2 * THREADS * SHARED as usize * PAGE;
        let shared = mmap_anon(len, RW, libc::MAP_SHARED)?;
        // SAFETY: a literal; nobody else has the descriptor.
        let fd = unsafe { libc::memfd_create(c"live".as_ptr(), libc::MFD_CLOEXEC) };
        check(fd.min(0), "memfd_create")?;
        // SAFETY: an integer.
        check(unsafe { libc::ftruncate(fd, len as i64) }, "ftruncate")?;
        let memfd = mmap(0, len, RW, libc::MAP_SHARED, fd, 0)?;
        let mut children = vec![z.fork(|z| {
            process(z, shared, memfd, THREADS, || {
                z.publish("up", "");
                Ok(())
            })
        })?];
        z.wait_for("up")?;
        if z.param("ZOO_CHURN", 0) == 1 {
            children.push(z.fork(churn)?);
        }
        process(z, shared, memfd, 0, || z.ready())?;
        for child in children {
            z.join(child)?;
        }
        Ok(())
    })
}
