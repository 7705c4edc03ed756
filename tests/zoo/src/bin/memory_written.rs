//! Kernel state: memory that changes all the time, in every way: written, dropped, mapped anew, moved, exchanged, protected,
//! grown, shared; by processes that come and go, fork and execute programs. Each keeps a record of what its memory must be
//! in a file, which no checkpoint saves: so after any chain of checkpoints memory must be as it was at the last one.
#![allow(unsafe_code, reason = "raw mappings, fork, exec")]

use std::os::fd::AsRawFd;
use zoo::{Check, Rng, Zoo, bytes, check, cstring, ensure, mmap, mmap_anon, nap, ok};

const PAGE: usize = 4096;
/// Pages of a region.
const PAGES: usize = 48;
const LEN: usize = PAGES * PAGE;
/// Private regions; one more is shared.
const REGIONS: usize = 12;
const ALL: usize = REGIONS + 1;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Workers that live as long as the program.
const WORKERS: usize = 2;

struct World {
    name: String,
    regions: Vec<*mut u8>,
    /// The version of each page; 0 is zeros.
    record: *mut u32,
    rng: Rng,
    /// Which pages of the shared region are its own to write.
    own: std::ops::Range<usize>,
    /// Pages taken with brk(2), written once.
    heap: Vec<*mut u8>,
}

fn new_record(z: &Zoo, name: &str) -> Result<*mut u32, String> {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(z.path(&format!("record-{name}")))
        .map_err(|e| e.to_string())?;
    file.set_len((ALL * PAGES * 4) as u64).map_err(|e| e.to_string())?;
    let len = (ALL * PAGES * 4).next_multiple_of(PAGE);
    Ok(mmap(0, len, RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?.cast())
}

impl World {
    fn new(z: &Zoo, name: &str, shared: *mut u8) -> Result<World, String> {
        let mut regions = Vec::new();
        for n in 0..REGIONS {
            let flags = libc::MAP_PRIVATE | if n % 5 == 4 { libc::MAP_NORESERVE } else { 0 };
            regions.push(mmap_anon(LEN, RW, flags)?);
        }
        regions.push(shared);
        let mut seed = 99;
        name.bytes().for_each(|b| seed = seed * 31 + u64::from(b));
        let record = new_record(z, name)?;
        let rng = Rng(seed);
        let heap = Vec::new();
        Ok(World { name: name.to_owned(), regions, record, rng, own: 0..0, heap })
    }

    /// After a fork: a record of its own, of the same memory.
    fn inherit(&mut self, z: &Zoo, name: &str) -> Check {
        let record = new_record(z, name)?;
        // SAFETY: both are mapped and this long.
        unsafe {
            std::ptr::copy(self.record, record, ALL * PAGES);
            let len = (ALL * PAGES * 4).next_multiple_of(PAGE);
            check(libc::munmap(self.record.cast(), len), "munmap")?;
        }
        self.record = record;
        self.name = name.to_owned();
        self.rng.0 ^= u64::from(std::process::id()) << 20;
        // Until now the parent has waited, since it writes to the old record.
        z.publish(&format!("up.{name}"), "");
        Ok(())
    }

    fn version(&self, region: usize, page: usize) -> *mut u32 {
        // SAFETY: within the record.
        unsafe { self.record.add(region * PAGES + page) }
    }

    #[allow(clippy::mut_from_ref, reason = "memory that only pointers lead to")]
    fn page(&self, region: usize, page: usize) -> &mut [u8] {
        // SAFETY: within the region; no two slices of a page live at the same time.
        unsafe { bytes(self.regions[region].add(page * PAGE), PAGE) }
    }

    fn set(&self, region: usize, page: usize, version: u32) {
        // SAFETY: a word of the record.
        unsafe { self.version(region, page).write_volatile(version) };
        Rng(u64::from(version) << 16 | (region * PAGES + page) as u64)
            .fill(self.page(region, page));
    }

    fn forget(&self, region: usize) {
        // SAFETY: words of the record.
        (0..PAGES).for_each(|page| unsafe { self.version(region, page).write_volatile(0) });
    }

    /// Does one thing.
    fn step(&mut self, z: &Zoo) -> Check {
        let r = self.rng.next();
        let region = (r >> 8) as usize % REGIONS;
        let page = (r >> 24) as usize % PAGES;
        let p = self.regions[region];
        match r % 100 {
            0..3 => {
                // SAFETY: pages of our own region.
                check(
                    unsafe { libc::madvise(p.add(page * PAGE).cast(), PAGE, libc::MADV_DONTNEED) },
                    "madvise",
                )?;
                // SAFETY: a word of the record.
                unsafe { self.version(region, page).write_volatile(0) };
            }
            3..5 => {
                // SAFETY: the region is ours, and used by its new address from here on.
                let moved = unsafe {
                    let to = mmap_anon(LEN, libc::PROT_NONE, libc::MAP_PRIVATE)?;
                    libc::mremap(p.cast(), LEN, LEN, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)
                };
                ensure!(moved != libc::MAP_FAILED, "mremap");
                self.regions[region] = moved.cast();
            }
            5..7 => {
                // Two regions change places.
                let other = (region + 1) % REGIONS;
                let q = self.regions[other];
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let to = mmap_anon(LEN, libc::PROT_NONE, libc::MAP_PRIVATE)?;
                // SAFETY: all three ranges are ours.
                unsafe {
                    ensure!(libc::mremap(p.cast(), LEN, LEN, flags, to) == to.cast(), "mremap 1");
                    ensure!(libc::mremap(q.cast(), LEN, LEN, flags, p) == p.cast(), "mremap 2");
                    ensure!(libc::mremap(to.cast(), LEN, LEN, flags, q) == q.cast(), "mremap 3");
                }
                (self.regions[region], self.regions[other]) = (q, p);
            }
            7..9 => {
                // New memory in the same place.
                let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                self.forget(region);
                mmap(p as usize, LEN, RW, fixed, -1, 0)?;
            }
            9..11 => {
                // SAFETY: our own region.
                unsafe {
                    check(libc::mprotect(p.cast(), LEN, libc::PROT_NONE), "mprotect")?;
                    nap(0);
                    check(libc::mprotect(p.cast(), LEN, RW), "mprotect")?;
                }
            }
            11 => {
                let child = z.fork(|_| self.verify())?;
                z.join(child)?;
            }
            12 if self.heap.len() < 300 => {
                // SAFETY: nobody else uses brk here for long: malloc copes with others' use of it.
                let at = unsafe { libc::sbrk(PAGE as isize) };
                ensure!(at as isize != -1, "sbrk");
                self.heap.push(at.cast());
                // SAFETY: just taken.
                Rng(at as u64).fill(unsafe { bytes(at.cast(), PAGE) });
            }
            13..20 if !self.own.is_empty() => {
                let page = self.own.start + page % self.own.len();
                self.set(REGIONS, page, (r >> 32) as u32 | 1);
            }
            _ => self.set(region, page, (r >> 32) as u32 | 1),
        }
        Ok(())
    }

    fn verify(&self) -> Check {
        let shared = self.own.clone().map(|page| (REGIONS, page));
        for (region, page) in
            (0..REGIONS).flat_map(|r| (0..PAGES).map(move |p| (r, p))).chain(shared)
        {
            // SAFETY: a word of the record.
            let version = unsafe { self.version(region, page).read_volatile() };
            let is = self.page(region, page);
            let mut want = vec![0; PAGE];
            if version != 0 {
                Rng(u64::from(version) << 16 | (region * PAGES + page) as u64).fill(&mut want);
            }
            ensure!(
                *is == want[..],
                "{}: region {region} page {page} is not of version {version:#x}",
                self.name
            );
        }
        for &p in &self.heap {
            // SAFETY: taken with sbrk, never given back.
            Rng(p as u64).verify(unsafe { bytes(p, PAGE) }, &format!("{}: heap", self.name))?;
        }
        Ok(())
    }

    fn work(&mut self, z: &Zoo) -> Check {
        while !z.checking() {
            for _ in 0..40 {
                self.step(z)?;
            }
            nap(0);
            // SAFETY: it takes nothing.
            unsafe { libc::usleep(300) };
        }
        self.verify()
    }
}

/// A worker that lives for a while: forked, or another program.
fn passing(z: &Zoo, world: &mut World, n: usize) -> Result<i32, String> {
    let name = format!("passing{n}");
    if n.is_multiple_of(2) {
        let child = z.fork(|z| {
            world.own = 0..0;
            world.inherit(z, &name)?;
            world.work(z)
        })?;
        z.wait_for(&format!("up.{name}"))?;
        return Ok(child);
    }
    // Strings are made before the fork.
    let (program, dir) = (cstring("/proc/self/exe"), cstring(z.dir()));
    let (run, worker) =
        (std::env::var("ZOO_RUN").unwrap_or_default(), cstring(format!("ZOO_WORKER={name}")));
    let run = cstring(format!("ZOO_RUN={run}"));
    let argv = [program.as_ptr(), dir.as_ptr(), std::ptr::null()];
    let env = [run.as_ptr(), worker.as_ptr(), std::ptr::null()];
    // SAFETY: the child executes another program at once, or ends.
    match ok(i64::from(unsafe { libc::fork() }), "fork")? {
        0 => {
            nap(3);
            // SAFETY: NULL-terminated arrays of NUL-terminated strings.
            unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
            zoo::exit_now(9);
        }
        child => Ok(child as i32),
    }
}

fn main() {
    zoo::run(|z| {
        if let Ok(name) = std::env::var("ZOO_WORKER") {
            let shared = mmap_anon(LEN, RW, libc::MAP_SHARED)?;
            let done = World::new(z, &name, shared).and_then(|mut world| {
                world.own = 0..PAGES;
                world.work(z)
            });
            match done {
                Ok(()) => zoo::exit_now(0),
                Err(e) => z.complain(&e),
            }
            zoo::exit_now(1);
        }
        let shared = mmap_anon(LEN, RW, libc::MAP_SHARED)?;
        let mut world = World::new(z, "main", shared)?;
        let each = PAGES / (WORKERS + 1);
        let mut workers = Vec::new();
        for n in 1..=WORKERS {
            workers.push(z.fork(|z| {
                world.own = n * each..(n + 1) * each;
                world.inherit(z, &format!("worker{n}"))?;
                world.work(z)
            })?);
            z.wait_for(&format!("up.worker{n}"))?;
        }
        world.own = 0..each;
        for _ in 0..2000 {
            world.step(z)?;
        }
        let mut n = 0;
        let mut child = passing(z, &mut world, n)?;
        z.ready()?;
        let mut rounds = 0u64;
        while !z.checking() {
            for _ in 0..40 {
                world.step(z)?;
            }
            // SAFETY: it takes nothing.
            unsafe { libc::usleep(300) };
            rounds += 1;
            if rounds.is_multiple_of(100) {
                // SAFETY: our own child.
                check(unsafe { libc::kill(child, libc::SIGKILL) }, "kill")?;
                zoo::wait4(child, 0)?;
                n += 1;
                child = passing(z, &mut world, n)?;
            }
        }
        workers.push(child);
        for worker in workers {
            z.join(worker)?;
        }
        world.verify()
    })
}
