//! Kernel state: address spaces as chance (ZOO_SEED) makes them: a tree of processes that map private and shared memory, memfds
//! and files, write, protect, advise, lock, guard, move and unmap pages of it, seal some (not with ZOO_PLAIN), and fork at
//! moments of their own, so that they share what was there then. Each knows of every page what must be in it. At the check
//! everything is compared; then all write what they may, and see of each other what they share and nothing else.
#![allow(unsafe_code, reason = "raw mappings")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, Rng, Zoo, ensure, mmap, mmap_anon, ok};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
const R: i32 = libc::PROT_READ;
const W: i32 = libc::PROT_WRITE;
const RW: i32 = R | W;
/// Objects a process can make, and pages an object can have.
const OBJECTS: usize = 64;
const LENGTH: usize = 48;
const MADV_GUARD_INSTALL: i32 = 102;

/// What is in a page: by the number from which its bytes are made; 0 is all zeros.
type Stamp = u64;

#[derive(Clone, Copy, Debug)]
enum Of {
    /// Private memory.
    Anon(Stamp),
    /// A page of an object.
    Shared(usize, usize),
    /// The same through a private mapping, which may have a page of its own.
    Private(usize, usize, Option<Stamp>),
}

#[derive(Clone, Copy, Debug)]
struct Page {
    of: Of,
    prot: i32,
    dont_fork: bool,
    wipe: bool,
    guard: bool,
}

/// Where each page of each object has what it must have, in memory that all share.
struct Ledger(*mut u8);

impl Ledger {
    fn at(&self, object: usize, page: usize) -> &AtomicU64 {
        // SAFETY: within the mapping, aligned, never borrowed otherwise.
        unsafe { &*self.0.cast::<AtomicU64>().add(object * LENGTH + page) }
    }
}

struct World<'a> {
    z: &'a Zoo,
    /// Number of this process.
    me: usize,
    rng: Rng,
    plain: bool,
    pages: BTreeMap<usize, Page>,
    ledger: &'a Ledger,
    made: usize,
    huge: usize,
}

fn content(stamp: Stamp) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if stamp != 0 {
        Rng(stamp).fill(&mut bytes);
    }
    bytes
}

impl World<'_> {
    fn below(&mut self, n: usize) -> usize {
        (self.rng.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn stamp(&mut self) -> Stamp {
        self.rng.next() | 1
    }

    fn put(&mut self, p: *mut u8, n: usize, prot: i32, of: impl Fn(usize) -> Of) {
        for i in 0..n {
            let page = Page { of: of(i), prot, dont_fork: false, wipe: false, guard: false };
            self.pages.insert(p as usize + i * PAGE, page);
        }
    }

    /// Writes a page, if this process may.
    fn write(&mut self, at: usize, stamp: Stamp) {
        let Some(page) = self.pages.get_mut(&at) else { return };
        if page.prot & W == 0 || page.guard {
            return;
        }
        match &mut page.of {
            Of::Anon(now) | Of::Private(_, _, Some(now)) => *now = stamp,
            Of::Private(_, _, none) => *none = Some(stamp),
            Of::Shared(object, n) => self.ledger.at(*object, *n).store(stamp, Ordering::SeqCst),
        }
        // SAFETY: a writable page of our own, of which nobody holds a reference.
        unsafe { std::ptr::copy_nonoverlapping(content(stamp).as_ptr(), at as *mut u8, PAGE) };
    }

    /// Fills some of `n` pages.
    fn fill(&mut self, p: *mut u8, n: usize, percent: usize) {
        for i in 0..n {
            if self.chance(percent) {
                let stamp = self.stamp();
                self.write(p as usize + i * PAGE, stamp);
            }
        }
    }

    fn private(&mut self) -> Check {
        let n = 1 + self.below(24);
        let flags = if self.chance(10) { libc::MAP_NORESERVE } else { 0 };
        let p = mmap_anon(n * PAGE, RW, libc::MAP_PRIVATE | flags)?;
        self.put(p, n, RW, |_| Of::Anon(0));
        let percent = [0, 20, 60, 100][self.below(4)];
        self.fill(p, n, percent);
        Ok(())
    }

    /// Memory for huge pages, whole or in part.
    fn thp(&mut self) -> Check {
        if self.huge == 2 {
            return Ok(());
        }
        self.huge += 1;
        let n = HUGE / PAGE;
        let room = mmap_anon(3 * HUGE, RW, libc::MAP_PRIVATE)?;
        let p = (room as usize).next_multiple_of(HUGE) as *mut u8;
        // SAFETY: parts of the mapping just made.
        unsafe {
            libc::munmap(room.cast(), p as usize - room as usize);
            libc::munmap(p.add(2 * HUGE).cast(), room as usize + HUGE - p as usize);
            libc::madvise(p.cast(), 2 * HUGE, libc::MADV_HUGEPAGE);
        }
        self.put(p, 2 * n, RW, |_| Of::Anon(0));
        self.fill(p, n, 100);
        // SAFETY: the second half.
        self.fill(unsafe { p.add(HUGE) }, n, 2);
        Ok(())
    }

    /// A reservation: much address space, nothing in it.
    fn reserve(&mut self) -> Check {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        mmap_anon((1 + self.below(1 << 18)) * PAGE, libc::PROT_NONE, flags).map(drop)
    }

    /// An object: shared memory, a memfd, a file; mapped in one or more places.
    fn object(&mut self) -> Check {
        if self.made == OBJECTS {
            return Ok(());
        }
        let object = self.me * OBJECTS + self.made;
        self.made += 1;
        let n = 1 + self.below(LENGTH);
        let file = match self.below(3) {
            0 => None,
            1 => {
                // SAFETY: a NUL-terminated name; the descriptor is given to the file.
                let fd = ok(unsafe { libc::memfd_create(c"zoo".as_ptr(), 0) } as i64, "memfd")?;
                // SAFETY: just made.
                Some(unsafe { File::from_raw_fd(fd as i32) })
            }
            _ => {
                let path = self.z.path(&format!("object.{object}"));
                let how = File::options().read(true).write(true).create(true).clone();
                let file = how.open(&path).map_err(|e| e.to_string())?;
                if self.chance(30) {
                    std::fs::remove_file(path).map_err(|e| e.to_string())?;
                }
                Some(file)
            }
        };
        let Some(file) = file else {
            let p = mmap_anon(n * PAGE, RW, libc::MAP_SHARED)?;
            self.put(p, n, RW, |i| Of::Shared(object, i));
            self.fill(p, n, 50);
            return Ok(());
        };
        file.set_len((n * PAGE) as u64).map_err(|e| e.to_string())?;
        for window in 0..1 + self.below(3) {
            let first = if window == 0 { 0 } else { self.below(n) };
            let (fd, offset) = (file.as_raw_fd(), (first * PAGE) as i64);
            let len = n - first;
            let shared = window == 0 || self.chance(50);
            let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            let p = mmap(0, len * PAGE, RW, flags, fd, offset)?;
            if shared {
                self.put(p, len, RW, |i| Of::Shared(object, first + i));
            } else {
                self.put(p, len, RW, |i| Of::Private(object, first + i, None));
            }
            self.fill(p, len, if shared { 40 } else { 25 });
        }
        Ok(())
    }

    /// Some neighbouring pages.
    fn some(&mut self) -> Vec<usize> {
        let Some((&first, _)) = self.pages.first_key_value() else { return Vec::new() };
        let Some((&last, _)) = self.pages.last_key_value() else { return Vec::new() };
        // Mostly where many mappings are: not by address, but by number.
        let n = self.below(self.pages.len());
        let start = self.pages.keys().nth(n).copied().unwrap_or(first).min(last);
        let len = 1 + self.below(12);
        let run = self.pages.range(start..).map(|(at, _)| *at).take(len);
        run.enumerate().take_while(|(i, at)| *at == start + i * PAGE).map(|(_, at)| at).collect()
    }

    fn advise(at: usize, advice: i32) -> bool {
        // SAFETY: a page of our own that nobody holds a reference to.
        unsafe { libc::madvise(at as *mut _, PAGE, advice) == 0 }
    }

    /// Does something to some pages; what the kernel refuses has not been done.
    fn change(&mut self) {
        let some = self.some();
        let what = self.below(14);
        let prot = [0, R, R, W, RW, RW, R | libc::PROT_EXEC][self.below(7)];
        let advice = [
            libc::MADV_DONTDUMP,
            libc::MADV_DODUMP,
            libc::MADV_RANDOM,
            libc::MADV_SEQUENTIAL,
            libc::MADV_NORMAL,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_MERGEABLE,
        ][self.below(7)];
        let stamp = self.stamp();
        let chance = self.below(100);
        for at in some {
            let Some(mut page) = self.pages.get(&at).copied() else { continue };
            let anon = matches!(page.of, Of::Anon(_));
            // SAFETY (all below): one page of our own that nobody holds a reference to.
            match what {
                0..=2 if unsafe { libc::mprotect(at as *mut _, PAGE, prot) } == 0 => {
                    page.prot = prot
                }
                3 | 4 => drop(Self::advise(at, advice)),
                5 if unsafe { libc::munmap(at as *mut _, PAGE) } == 0 => {
                    self.pages.remove(&at);
                    continue;
                }
                6 if !matches!(page.of, Of::Shared(..))
                    && Self::advise(at, libc::MADV_DONTNEED) =>
                {
                    match &mut page.of {
                        Of::Anon(stamp) => *stamp = 0,
                        Of::Private(_, _, own) => *own = None,
                        Of::Shared(..) => {}
                    }
                }
                7 if chance < 30 && Self::advise(at, libc::MADV_DONTFORK) => page.dont_fork = true,
                7 if chance > 80 && Self::advise(at, libc::MADV_DOFORK) => page.dont_fork = false,
                8 if chance < 50 && anon && Self::advise(at, libc::MADV_WIPEONFORK) => {
                    page.wipe = true
                }
                8 if chance > 80 && anon && Self::advise(at, libc::MADV_KEEPONFORK) => {
                    page.wipe = false
                }
                // Of private mappings of files it would make pages their own.
                9 if !matches!(page.of, Of::Private(..)) => unsafe {
                    match chance {
                        0..50 => libc::mlock(at as *const _, PAGE),
                        50..70 => libc::mlock2(at as *const _, PAGE, libc::MLOCK_ONFAULT as _),
                        _ => libc::munlock(at as *const _, PAGE),
                    };
                },
                10 if anon && chance < 40 && Self::advise(at, MADV_GUARD_INSTALL) => {
                    page.of = Of::Anon(0);
                    page.guard = true;
                }
                11 => unsafe {
                    let to = libc::mremap(at as *mut _, PAGE, PAGE, libc::MREMAP_MAYMOVE);
                    if chance < 50 && to != libc::MAP_FAILED {
                        // It stays where it is unless it must move: to a place of our choice.
                        let room = libc::mmap(std::ptr::null_mut(), PAGE, 0, 0x22, -1, 0);
                        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        if room != libc::MAP_FAILED
                            && libc::mremap(at as *mut _, PAGE, PAGE, fixed, room) == room
                        {
                            self.pages.remove(&at);
                            self.pages.insert(room as usize, page);
                        }
                        continue;
                    }
                },
                12 if !self.plain && chance < 5 => unsafe {
                    libc::syscall(462, at, PAGE, 0);
                },
                _ if !matches!(page.of, Of::Shared(object, _) if object / OBJECTS != self.me) => {
                    self.write(at, stamp ^ at as u64 | 1);
                    continue;
                }
                _ => {}
            }
            self.pages.insert(at, page);
        }
    }

    /// What a child has of it.
    fn forked(&mut self) {
        self.pages.retain(|_, page| !page.dont_fork);
        for page in self.pages.values_mut().filter(|page| page.wipe) {
            page.of = Of::Anon(0);
            page.guard = false;
        }
        self.made = 0;
        self.huge = 0;
    }

    /// Compares every byte, read by force whatever the protection.
    fn verify(&self, when: &str, now: &dyn Fn(usize, usize) -> Stamp) -> Check {
        let memory = File::open("/proc/self/mem").map_err(|e| e.to_string())?;
        let mut found = [0u8; PAGE];
        for (at, page) in &self.pages {
            let read = memory.read_exact_at(&mut found, *at as u64);
            if page.guard {
                ensure!(read.is_err(), "{when}: page {at:#x} has no guard any more");
                continue;
            }
            ensure!(read.is_ok(), "{when}: page {at:#x} ({page:?}) cannot be read: {read:?}");
            let stamp = match page.of {
                Of::Anon(stamp) | Of::Private(_, _, Some(stamp)) => stamp,
                Of::Shared(object, n) | Of::Private(object, n, None) => now(object, n),
            };
            let differs = found.iter().zip(content(stamp)).position(|(a, b)| *a != b);
            if let Some(offset) = differs {
                return Err(format!("{when}: page {at:#x} ({page:?}) differs at byte {offset}"));
            }
        }
        Ok(())
    }
}

/// Waits until all `n` processes have come so far.
fn together(z: &Zoo, me: usize, n: usize, phase: &str) -> Check {
    z.publish(&format!("{phase}.{me}"), "");
    let until = zoo::now() + 30_000_000_000;
    for other in 0..n {
        while !z.path(&format!("{phase}.{other}")).exists() {
            ensure!(
                zoo::now() < until,
                "process {other} does not come to {phase}: {:?}",
                z.complaints()
            );
            zoo::nap(1);
        }
    }
    Ok(())
}

/// A process: its parent, and after how many of that one's steps it is born.
type Plan = Vec<(usize, usize)>;

fn live(w: &mut World<'_>, plan: &Plan, steps: usize) -> Check {
    let mut children = Vec::new();
    let mut born = w.me + 1;
    for step in 0..steps {
        while born < plan.len() && (plan[born].0 != w.me || plan[born].1 < step) {
            born += 1;
        }
        while born < plan.len() && plan[born] == (w.me, step) {
            let (z, me, ledger, plain) = (w.z, born, w.ledger, w.plain);
            let (pages, rng) = (w.pages.clone(), Rng(w.rng.next() + me as u64));
            children.push(z.fork(move |z| {
                let mut w = World { z, me, rng, plain, pages, ledger, made: 0, huge: 0 };
                w.forked();
                live(&mut w, plan, steps)
            })?);
            born += 1;
        }
        match w.below(100) {
            0..25 => w.private()?,
            25..33 => w.object()?,
            33..34 => w.thp()?,
            34..35 => w.reserve()?,
            _ => w.change(),
        }
    }
    let n = plan.len();
    together(w.z, w.me, n, "built")?;
    let now = |object, page| w.ledger.at(object, page).load(Ordering::SeqCst);
    w.verify("before the checkpoint", &now)?;
    together(w.z, w.me, n, "seen")?;
    if w.me == 0 {
        let all: Vec<u8> = (0..n * OBJECTS * LENGTH)
            .flat_map(|i| now(i / LENGTH, i % LENGTH).to_le_bytes())
            .collect();
        std::fs::write(w.z.path("ledger"), all).map_err(|e| e.to_string())?;
        w.z.ready()?;
    }
    w.z.wait_for_check();
    let saved = std::fs::read(w.z.path("ledger")).map_err(|e| e.to_string())?;
    let mut stamps: Vec<Stamp> = saved
        .chunks_exact(8)
        .map(|c| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect();
    w.verify("after it", &|object, page| stamps[object * LENGTH + page])?;
    together(w.z, w.me, n, "same")?;
    // Everybody writes all private pages it may, and of the objects the pages that are its own for that.
    let mut told = String::new();
    for at in w.pages.keys().copied().collect::<Vec<_>>() {
        let Some(page) = w.pages.get(&at).copied() else { continue };
        if page.prot & W == 0 || page.guard {
            continue;
        }
        match page.of {
            Of::Shared(_, i) if i % n != w.me => {}
            Of::Shared(object, i) => {
                let stamp = (object * LENGTH + i) as u64 * 2 + 100_001;
                w.write(at, stamp);
                told += &format!("{object} {i} {stamp}\n");
            }
            _ if w.chance(50) => {
                let stamp = w.stamp();
                w.write(at, stamp);
            }
            _ => {}
        }
    }
    w.z.publish(&format!("told.{}", w.me), &told);
    together(w.z, w.me, n, "written")?;
    for other in 0..n {
        let told = std::fs::read_to_string(w.z.path(&format!("told.{other}")));
        for line in told.map_err(|e| e.to_string())?.lines() {
            let numbers: Vec<u64> = line.split(' ').filter_map(|n| n.parse().ok()).collect();
            stamps[numbers[0] as usize * LENGTH + numbers[1] as usize] = numbers[2];
        }
    }
    w.verify("after all have written", &|object, page| stamps[object * LENGTH + page])?;
    together(w.z, w.me, n, "done")?;
    children.into_iter().try_for_each(|child| w.z.join(child))
}

fn main() {
    zoo::run(|z| {
        let mut rng = Rng(z.param("ZOO_SEED", 1) as u64);
        let n = 1 + (rng.next() % 6) as usize;
        let steps = z.param("ZOO_N", 600);
        let mut plan: Plan = vec![(usize::MAX, 0)];
        for i in 1..n {
            plan.push(((rng.next() % i as u64) as usize, (rng.next() % steps as u64) as usize));
        }
        // A process is born while its parent still has steps before it.
        let mut order: Vec<_> = plan[1..].to_vec();
        order.sort_unstable();
        plan[1..].copy_from_slice(&order);
        let ledger = Ledger(mmap_anon(n * OBJECTS * LENGTH * 8, RW, libc::MAP_SHARED)?);
        let plain = z.param("ZOO_PLAIN", 0) != 0;
        let mut world = World {
            z,
            me: 0,
            rng,
            plain,
            pages: BTreeMap::new(),
            ledger: &ledger,
            made: 0,
            huge: 0,
        };
        live(&mut world, &plan, steps)
    })
}
