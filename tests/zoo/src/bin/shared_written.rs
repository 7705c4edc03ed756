//! Kernel state: shared memory that changes all the time, in every way: written through mappings by two processes, by
//! children that live for a moment, by write(2) without any mapping; zeroed, punched (madvise(2), fallocate(2)), grown, cut
//! off, made anew; anonymous, of memfds, of System V. A file, which no checkpoint saves, has a record of what it must be:
//! so after any chain of checkpoints memory must be as it was at the last one.
//!
//! With `ZOO_PLAIN` without System V. With `ZOO_LARGE` also so many MiB that stay as they are, anonymous or (`ZOO_LARGE_SYSV`) of
//! System V.
#![allow(unsafe_code, reason = "raw mappings, memfds, System V segments")]

use std::ops::Range;
use std::os::fd::AsRawFd;
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, mmap, mmap_anon, ok};

const PAGE: usize = 4096;
/// Pages of a segment, and the most that one which grows has.
const PAGES: usize = 160;
const LEN: usize = PAGES * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// The second process has these.
const ITS: Range<usize> = 100..130;
/// Nobody writes to these any more once the program is ready.
const STILL: Range<usize> = 130..PAGES;

const ANONYMOUS: usize = 0;
/// A memfd that is mapped and written to.
const MAPPED: usize = 1;
const SYSV: usize = 2;
/// A memfd that is only written to.
const WRITTEN: usize = 3;
/// A memfd of changing size, mapped as a whole.
const GROWING: usize = 4;
/// A memfd that another one takes the place of.
const RENEWED: usize = 5;
const ALL: usize = 6;

#[derive(Clone, Copy)]
struct Segment {
    p: Option<*mut u8>,
    fd: Option<i32>,
}

struct World {
    segments: [Option<Segment>; ALL],
    /// The version of each page, 0 is zeros; behind them the pages of those that change their size.
    record: *mut u32,
    rng: Rng,
}

fn memfd(pages: usize) -> Result<i32, String> {
    // SAFETY: a NUL-terminated name.
    let fd = ok(i64::from(unsafe { libc::memfd_create(c"zoo written".as_ptr(), 0) }), "memfd")?;
    // SAFETY: integers.
    check(unsafe { libc::ftruncate(fd as i32, (pages * PAGE) as i64) }, "ftruncate")?;
    Ok(fd as i32)
}

/// A segment that goes with the program.
fn sysv(len: usize) -> Result<*mut u8, String> {
    // SAFETY: integers; the kernel chooses the address.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, len, 0o600);
        ok(i64::from(id), "shmget")?;
        let p = libc::shmat(id, std::ptr::null(), 0);
        check(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()), "IPC_RMID")?;
        ensure!(p as isize != -1, "shmat");
        Ok(p.cast())
    }
}

fn map(fd: i32) -> Result<*mut u8, String> {
    mmap(0, LEN, RW, libc::MAP_SHARED, fd, 0)
}

impl World {
    fn new(z: &Zoo) -> Result<World, String> {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(z.path("record"))
            .map_err(|e| e.to_string())?;
        let len = ((ALL * PAGES + ALL) * 4).next_multiple_of(PAGE);
        file.set_len(len as u64).map_err(|e| e.to_string())?;
        let record = mmap(0, len, RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?.cast();
        let (mapped, growing) = (memfd(PAGES)?, memfd(PAGES / 2)?);
        let with_sysv = z.param("ZOO_PLAIN", 0) == 0;
        let segments = [
            Some(Segment { p: Some(mmap_anon(LEN, RW, libc::MAP_SHARED)?), fd: None }),
            Some(Segment { p: Some(map(mapped)?), fd: Some(mapped) }),
            if with_sysv { Some(Segment { p: Some(sysv(LEN)?), fd: None }) } else { None },
            Some(Segment { p: None, fd: Some(memfd(PAGES)?) }),
            Some(Segment { p: Some(map(growing)?), fd: Some(growing) }),
            Some(Segment { p: None, fd: Some(memfd(PAGES / 4)?) }),
        ];
        let world = World { segments, record, rng: Rng(17) };
        for (segment, pages) in [(GROWING, PAGES / 2), (RENEWED, PAGES / 4)] {
            // SAFETY: a word of the record.
            unsafe { world.size(segment).write_volatile(pages as u32) };
        }
        Ok(world)
    }

    fn version(&self, segment: usize, page: usize) -> *mut u32 {
        // SAFETY: within the record.
        unsafe { self.record.add(segment * PAGES + page) }
    }

    fn size(&self, segment: usize) -> *mut u32 {
        // SAFETY: within the record.
        unsafe { self.record.add(ALL * PAGES + segment) }
    }

    fn pages(&self, segment: usize) -> usize {
        match segment {
            // SAFETY: a word of the record.
            GROWING | RENEWED => unsafe { self.size(segment).read_volatile() as usize },
            _ => PAGES,
        }
    }

    fn content(segment: usize, page: usize, version: u32) -> Vec<u8> {
        let mut content = vec![0; PAGE];
        if version != 0 {
            Rng(u64::from(version) << 16 | (segment * PAGES + page) as u64).fill(&mut content);
        }
        content
    }

    /// Writes a page, by the file if `by_file`.
    fn set(&self, segment: usize, page: usize, version: u32, by_file: bool) -> Check {
        // SAFETY: a word of the record.
        unsafe { self.version(segment, page).write_volatile(version) };
        let content = Self::content(segment, page, version);
        match self.segments[segment] {
            Some(Segment { fd: Some(fd), p }) if by_file || p.is_none() => {
                // SAFETY: the buffer is a page.
                let written = unsafe {
                    libc::pwrite(fd, content.as_ptr().cast(), PAGE, (page * PAGE) as i64)
                };
                ensure_eq!(written, PAGE as isize, "pwrite");
            }
            Some(Segment { p: Some(p), .. }) => {
                // SAFETY: within the mapping, and the file is that long.
                unsafe { bytes(p.add(page * PAGE), PAGE) }.copy_from_slice(&content);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes a page away: it is zeros, and a hole.
    fn punch(&self, segment: usize, page: usize, by_file: bool) -> Check {
        // SAFETY: a word of the record.
        unsafe { self.version(segment, page).write_volatile(0) };
        let at = page * PAGE;
        match self.segments[segment] {
            Some(Segment { fd: Some(fd), p }) if by_file || p.is_none() => {
                let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: integers.
                check(unsafe { libc::fallocate(fd, flags, at as i64, PAGE as i64) }, "fallocate")
            }
            Some(Segment { p: Some(p), .. }) => {
                // SAFETY: within our own mapping.
                let done = unsafe { libc::madvise(p.add(at).cast(), PAGE, libc::MADV_REMOVE) };
                check(done, "madvise")
            }
            _ => Ok(()),
        }
    }

    fn resize(&self, segment: usize, pages: usize) -> Check {
        let Some(Segment { fd: Some(fd), .. }) = self.segments[segment] else { return Ok(()) };
        // SAFETY: words of the record.
        (pages..PAGES).for_each(|p| unsafe { self.version(segment, p).write_volatile(0) });
        // SAFETY: a word of the record.
        unsafe { self.size(segment).write_volatile(pages as u32) };
        // SAFETY: integers.
        check(unsafe { libc::ftruncate(fd, (pages * PAGE) as i64) }, "ftruncate")
    }

    /// Another segment takes the place of one.
    fn renew(&mut self, segment: usize, pages: usize) -> Check {
        let new = memfd(pages)?;
        if let Some(Segment { fd: Some(old), .. }) = self.segments[segment] {
            // SAFETY: ours.
            check(unsafe { libc::close(old) }, "close")?;
        }
        // SAFETY: words of the record.
        (0..PAGES).for_each(|p| unsafe { self.version(segment, p).write_volatile(0) });
        // SAFETY: a word of the record.
        unsafe { self.size(segment).write_volatile(pages as u32) };
        self.segments[segment] = Some(Segment { p: None, fd: Some(new) });
        (0..pages / 2).try_for_each(|page| self.set(segment, page, 7 + page as u32, true))
    }

    /// Does one thing to a page of `own`.
    fn step(&mut self, z: &Zoo, segment: usize, own: impl Fn(usize) -> bool, alone: bool) -> Check {
        let r = self.rng.next();
        let pages = self.pages(segment);
        let page = (r >> 24) as usize % pages;
        if !own(page) {
            return Ok(());
        }
        let (version, by_file) = ((r >> 32) as u32 | 1, r & 0x100 != 0);
        match r % 100 {
            0..8 => self.punch(segment, page, by_file),
            8..16 => self.set(segment, page, 0, by_file),
            16..24 => {
                // What it has already.
                // SAFETY: a word of the record.
                let version = unsafe { self.version(segment, page).read_volatile() };
                self.set(segment, page, version, by_file)
            }
            24 if alone => {
                // A child that ends at once, with a mapping of its own if it can have one.
                let child = z.fork(|_| {
                    if let Some(Segment { fd: Some(fd), .. }) = self.segments[segment] {
                        self.segments[segment] = Some(Segment { p: Some(map(fd)?), fd: None });
                    }
                    (0..4).map(|n| (page + n) % pages).filter(|page| own(*page)).try_for_each(
                        |page| self.set(segment, page, version ^ (page as u32) << 1, false),
                    )
                })?;
                z.join(child)
            }
            25 if alone && segment == GROWING => {
                self.resize(segment, 1 + (r >> 40) as usize % PAGES)
            }
            26 if alone && segment == RENEWED => {
                self.renew(segment, 1 + (r >> 40) as usize % PAGES)
            }
            _ => self.set(segment, page, version, by_file),
        }
    }

    fn verify(&self, who: &str) -> Check {
        for (segment, is) in self.segments.iter().enumerate() {
            let Some(is) = is else { continue };
            let pages = self.pages(segment);
            if let Some(fd) = is.fd {
                let size = std::fs::metadata(format!("/proc/self/fd/{fd}"));
                let size = size.map_err(|e| e.to_string())?.len() as usize;
                ensure_eq!(size, pages * PAGE, "{who}: size of segment {segment}");
            }
            for page in 0..pages {
                // SAFETY: a word of the record.
                let version = unsafe { self.version(segment, page).read_volatile() };
                let want = Self::content(segment, page, version);
                let is = match *is {
                    // SAFETY: within the mapping, and the file is that long.
                    Segment { p: Some(p), .. } => {
                        unsafe { bytes(p.add(page * PAGE), PAGE) }.to_vec()
                    }
                    Segment { fd: Some(fd), .. } => {
                        let mut is = vec![1; PAGE];
                        // SAFETY: the buffer is a page.
                        let read = unsafe {
                            libc::pread(fd, is.as_mut_ptr().cast(), PAGE, (page * PAGE) as i64)
                        };
                        ensure_eq!(read, PAGE as isize, "pread");
                        is
                    }
                    _ => continue,
                };
                ensure!(
                    is == want,
                    "{who}: segment {segment} page {page} is not of version {version:#x}"
                );
            }
        }
        Ok(())
    }
}

/// The segments that both processes write to, each its own pages.
const COMMON: [usize; 3] = [ANONYMOUS, MAPPED, SYSV];

/// Memory that stays as it is, but for a hole in it.
struct Large {
    p: *mut u8,
    len: usize,
}

impl Large {
    const HOLE: Range<usize> = 9 * PAGE..17 * PAGE;

    fn new(z: &Zoo) -> Result<Large, String> {
        let len = z.param("ZOO_LARGE", 0) << 20;
        let p = match z.param("ZOO_LARGE_SYSV", 0) {
            _ if len == 0 => std::ptr::null_mut(),
            0 => mmap_anon(len, RW, libc::MAP_SHARED)?,
            _ => sysv(len)?,
        };
        if len > 0 {
            // SAFETY: just mapped.
            let all = unsafe { bytes(p, len) };
            let (before, after) = (0..Self::HOLE.start, Self::HOLE.end..len);
            Rng(71).fill(&mut all[before]);
            Rng(72).fill(&mut all[after]);
        }
        Ok(Large { p, len })
    }

    fn verify(&self) -> Check {
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: mapped as long as the program lives.
        let all = unsafe { bytes(self.p, self.len) };
        Rng(71).verify(&all[..Self::HOLE.start], "large, beginning")?;
        Rng(72).verify(&all[Self::HOLE.end..], "large")?;
        ensure!(all[Self::HOLE].iter().all(|byte| *byte == 0), "large: its hole has data");
        Ok(())
    }
}

fn main() {
    zoo::run(|z| {
        let mut world = World::new(z)?;
        let large = Large::new(z)?;
        let not_its = |page: usize| !ITS.contains(&page);
        for _ in 0..3000 {
            let segment = world.rng.next() as usize % ALL;
            world.step(z, segment, not_its, true)?;
        }
        let worker = z.fork(|z| {
            // Those that change their size or place are the other one's.
            world.segments[GROWING] = None;
            world.segments[RENEWED] = None;
            world.segments[WRITTEN] = None;
            world.rng = Rng(4);
            while !z.checking() {
                for _ in 0..20 {
                    let segment = COMMON[world.rng.next() as usize % COMMON.len()];
                    world.step(z, segment, |page| ITS.contains(&page), false)?;
                }
                // SAFETY: it takes nothing.
                unsafe { libc::usleep(300) };
            }
            z.publish("worker", "");
            Ok(())
        })?;
        z.ready()?;
        let own = |page: usize| not_its(page) && !STILL.contains(&page);
        while !z.checking() {
            for _ in 0..20 {
                let segment = world.rng.next() as usize % ALL;
                world.step(z, segment, own, true)?;
            }
            // SAFETY: it takes nothing.
            unsafe { libc::usleep(300) };
        }
        z.wait_for("worker")?;
        z.join(worker)?;
        large.verify()?;
        world.verify("main")
    })
}
