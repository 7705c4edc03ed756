//! Private memory as it was at one instant, of a process that runs on: userfaultfd(2) write protection, with somebody who is
//! waited for. A write to a page that has not been copied yet waits until it is.
//!
//! Protecting takes longer than a process may be stopped for, so most of it is done while it still runs ([`Shield::prepare`]):
//! what it writes to meanwhile only loses the protection, and gets it again when it stands still ([`Shield::survey`]). From
//! then on every page is kept as it was: by the writers of the images ([`Shield::read`]), and by a thread that serves those
//! who want to write ([`Shield::serve`]). What userfaultfd cannot hold is copied before ([`super::early`]), or at once.
//!
//! Nobody is asked when pages vanish (munmap(2), mremap(2), `MADV_DONTNEED`, exec). But who copies a page sees afterwards
//! whether it was still protected: only then it is the one of that instant. If not, it is lost, and the snapshot with it.

mod snapshot;

use super::PAGE;
use super::copies::{Reserve, Round};
use super::early::Early;
use super::pages::{self, CopyError, Run};
use super::vma::{Backing, MAP_DROPPABLE, Vma, has_private_pages, status};
use rewake_sys::memory::{RemoteRange, read_remote};
use rewake_sys::pagemap::{self, Filter, Region, WPALLOWED, WRITTEN};
use rewake_sys::userfaultfd::{PAGEFAULT_WP, Userfaultfd};
use rewake_sys::{Errno, SyscallError};
use snapshot::{COPIED, DONE, KEPT, OPEN, Snapshot};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Flags with which a process makes its userfaultfd. The kernel's own writes wait, too, so it is not for user mode only.
pub const FLAGS: u64 = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64;
/// What it is then asked for.
pub const FEATURES: u64 = PAGEFAULT_WP;

/// A write keeps this much around it, in bytes: for those who write one page after the other.
const WINDOW: u64 = 4 * PAGE;
/// The protection is changed in steps, between which the process gets at its address space.
const STEP: u64 = 4 << 20;
/// The same for taking a mapping out of the userfaultfd, which takes longer.
const LEAVE: u64 = 8 << 20;

/// The memory of one process.
#[derive(Debug)]
pub struct Shield {
    pid: i32,
    memory: Arc<File>,
    pagemap: File,
    /// `None`: everything is copied at once.
    uffd: Option<Userfaultfd>,
    /// What is copied before, if anything is.
    early: Option<Early>,
    /// What is registered.
    ranges: Mutex<Vec<(u64, u64)>>,
    /// `None` as long as the instant has not come.
    snapshot: Mutex<Option<Arc<Snapshot>>>,
    /// For what is copied at once, of the whole tree.
    reserve: Arc<Reserve>,
}

/// Ranges that are read at once.
#[derive(Debug, Default)]
struct Queue {
    ranges: Vec<RemoteRange>,
    len: usize,
    /// As [`Run::readable`], of all of them.
    readable: bool,
}

impl Queue {
    /// Adds a range, unless it has no place there.
    fn push(&mut self, readable: bool, start: u64, end: u64) -> bool {
        /// process_vm_readv(2) takes no more.
        const MOST: usize = 1023;
        let len = (end - start) as usize;
        let fits = self.readable == readable
            && self.ranges.len() < MOST
            && self.len + len <= Reserve::BUFFER;
        if !fits && self.len > 0 {
            return false;
        }
        self.readable = readable;
        self.ranges.push((start, len));
        self.len += len;
        true
    }
}

/// Why there is no snapshot of a process.
#[derive(Debug, thiserror::Error)]
pub enum ShieldError {
    /// The kernel refused something.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// Memory cannot be read.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Too much cannot be protected.
    #[error("it has too much memory that userfaultfd cannot protect from writing")]
    TooMuch,
}

impl Shield {
    /// For a process: its memory and pagemap, its userfaultfds (if it is to have any), and what its tree may have copied at
    /// once.
    #[must_use]
    pub fn new(
        pid: i32,
        memory: Arc<File>,
        pagemap: File,
        uffd: Option<Userfaultfd>,
        early: Option<Early>,
        reserve: Arc<Reserve>,
    ) -> Shield {
        let (ranges, snapshot) = (Mutex::default(), Mutex::default());
        Shield { pid, memory, pagemap, uffd, early, ranges, snapshot, reserve }
    }

    /// The process's userfaultfd.
    #[must_use]
    pub fn uffd(&self) -> Option<&Userfaultfd> {
        self.uffd.as_ref()
    }

    /// Is it this one that a mapping is registered with? It may have grown since.
    #[must_use]
    pub fn covers(&self, start: u64, end: u64) -> bool {
        self.ranges().iter().any(|range| range.0 < end && start < range.1)
            || self.early.as_ref().is_some_and(|early| early.covers(start, end))
    }

    fn ranges(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_snapshot(&self, snapshot: Option<Arc<Snapshot>>) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }

    /// Registers what can be protected of these mappings.
    pub fn register(&self, vmas: &[Vma]) {
        self.hold(vmas);
        if let Some(early) = &self.early {
            early.register(vmas);
        }
    }

    /// Registers what writes can be held up of.
    fn hold(&self, vmas: &[Vma]) {
        let Some(uffd) = &self.uffd else { return };
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let eligible: Vec<&Vma> = vmas.iter().filter(|vma| can_be_protected(vma)).collect();
        let mut push = |start, end| match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        };
        for group in eligible.chunk_by(|a, b| a.entry.end == b.entry.start) {
            let [first, ..] = group else { continue };
            let end = group.last().map_or(first.entry.end, |last| last.entry.end);
            match uffd.register(first.entry.start, end) {
                Ok(()) => push(first.entry.start, end),
                Err(_) => {
                    for vma in group {
                        match uffd.register(vma.entry.start, vma.entry.end) {
                            Ok(()) => push(vma.entry.start, vma.entry.end),
                            Err(e) => log::debug!("{:#x} is not protected: {e}", vma.entry.start),
                        }
                    }
                }
            }
        }
        *self.ranges() = ranges;
    }

    /// Copies what can be copied before the instant, of a process that runs.
    ///
    /// # Errors
    /// The process is gone.
    pub fn copy_early(&self) -> Result<(), SyscallError> {
        let Some(early) = &self.early else { return Ok(()) };
        early.prepare(&self.pagemap, &self.memory)
    }

    /// Protects all pages of a process that runs, and goes on running. Its writes must be served meanwhile.
    ///
    /// What it writes to loses the protection again: the first time goes through all pages, so that much is written to until it is
    /// done. The next times are quicker, and leave less to be done while the process stands still.
    ///
    /// # Errors
    /// The process is gone.
    pub fn prepare(&self) -> Result<(), SyscallError> {
        /// Takes less than a millisecond when the process stands still.
        const FEW: u64 = 256 * PAGE;
        const TIMES: usize = 4;
        let mut before = u64::MAX;
        for _ in 0..TIMES {
            let written = self.protect()?;
            if written <= FEW || written > before / 2 {
                break;
            }
            before = written;
        }
        Ok(())
    }

    /// Protects what is not, and says how many bytes that were.
    fn protect(&self) -> Result<u64, SyscallError> {
        let Some(uffd) = &self.uffd else { return Ok(0) };
        self.set_snapshot(None);
        let ranges = self.ranges().clone();
        let regions = self.scan_all(&ranges)?;
        let written = || {
            let written = regions.iter().filter(|r| r.categories & WRITTEN != 0);
            written.map(|r| (r.start, r.end))
        };
        for (start, end) in steps(written(), STEP) {
            // What is gone needs none.
            uffd.protect(start, end, true).or_else(unless_gone)?;
        }
        Ok(written().map(|(start, end)| end - start).sum())
    }

    /// Regions of a range with data, and which of them are not protected.
    fn scan(&self, start: u64, end: u64, report: u64) -> Result<Vec<Region>, SyscallError> {
        let mut regions = Vec::new();
        let not = |categories| Filter {
            inverted: categories,
            all: categories,
            any: pagemap::PRESENT | pagemap::SWAPPED,
            report,
        };
        let plain = pagemap::PFNZERO;
        let mut scan =
            |filter| pagemap::scan(self.pagemap.as_fd(), start, end, filter, &mut regions);
        // Kernels before 6.15 know no guard ranges.
        scan(not(plain | pagemap::GUARD)).or_else(|_| scan(not(plain)))?;
        Ok(regions)
    }

    /// As [`Shield::scan`] of all that is registered, by two threads if it is much.
    fn scan_all(&self, ranges: &[(u64, u64)]) -> Result<Vec<Region>, SyscallError> {
        /// A thread costs as much as looking at this much.
        const MUCH: u64 = 64 << 20;
        let total: u64 = ranges.iter().map(|r| r.1 - r.0).sum();
        let some = |ranges: &[(u64, u64)]| {
            let mut all = Vec::new();
            for (start, end) in ranges {
                all.extend(self.scan(*start, *end, WRITTEN)?);
            }
            Ok::<_, SyscallError>(all)
        };
        if total < MUCH {
            return some(ranges);
        }
        let mut halves = [Vec::new(), Vec::new()];
        let mut at = 0;
        for &(start, end) in ranges {
            // Whole page tables to each.
            let cut = (start + (total / 2).saturating_sub(at)).next_multiple_of(2 << 20);
            let cut = cut.clamp(start, end);
            at += end - start;
            for (half, (start, end)) in halves.iter_mut().zip([(start, cut), (cut, end)]) {
                if start < end {
                    half.push((start, end));
                }
            }
        }
        let [low, high] = &halves;
        std::thread::scope(|scope| {
            let other = std::thread::Builder::new().spawn_scoped(scope, || some(high));
            let low = some(low);
            let high = match other {
                Ok(other) => other.join().unwrap_or_else(|_| {
                    Err(SyscallError::new("a thread that looks at pages", Errno::CANCELED))
                }),
                // There are no more threads to be had.
                Err(_) => some(high),
            };
            let mut all = low?;
            all.extend(high?);
            Ok(all)
        })
    }

    /// The instant: the process stands still, and nothing touches its memory any more. Returns the runs of pages that hold
    /// data. From here on they are kept as they are. `tell_shared`: the mappings tell which pages are shared copy-on-write.
    ///
    /// # Errors
    /// The process is gone; too much of its memory would have to be copied at once.
    pub fn survey(&self, vmas: &[Vma], tell_shared: bool) -> Result<Vec<Run>, ShieldError> {
        self.set_snapshot(None);
        self.hold(vmas);
        let ranges = self.ranges().clone();
        let shielded = |vma: &Vma| {
            let after = ranges.partition_point(|range| range.0 <= vma.entry.start);
            after > 0 && ranges[after - 1].1 > vma.entry.start
        };
        let ours = self.scan_all(&ranges)?;
        let mut regions = Vec::new();
        // What lies between others is looked at with them.
        let others = |vma: &Vma| has_private_pages(&vma.entry) && !shielded(vma);
        for group in vmas.chunk_by(|a, b| others(a) && others(b)).filter(|g| others(&g[0])) {
            let report = WPALLOWED | WRITTEN;
            regions.extend(pages::scan_private(&self.pagemap, group, report, pagemap::scan)?);
        }
        let unwritten = self.early.as_ref().map(|early| early.unwritten(&regions));
        regions.extend_from_slice(&ours);
        regions.sort_unstable_by_key(|region| region.start);
        let mut runs = pages::intersect(&regions, vmas);
        if !tell_shared {
            pages::mark_shared(&self.pagemap, &mut runs)?;
        }
        let copies = self.early.as_ref().map(Early::copies).unwrap_or_default();
        let snapshot = Arc::new(Snapshot::new(&runs, copies));
        snapshot.take_early(&unwritten.unwrap_or_default());
        // Whoever waits to write is served from the snapshot from now on.
        self.set_snapshot(Some(snapshot.clone()));
        if let Some(uffd) = &self.uffd {
            for region in ours.iter().filter(|region| region.categories & WRITTEN != 0) {
                uffd.protect(region.start, region.end, true)?;
            }
        }
        self.keep_now(&snapshot, vmas, &now(&runs, vmas, &ranges))?;
        Ok(runs)
    }

    /// Copies `parts` of runs at once, each with the number of its run.
    fn keep_now(
        &self,
        snapshot: &Snapshot,
        vmas: &[Vma],
        parts: &[(usize, u64, u64)],
    ) -> Result<(), ShieldError> {
        // The vdso's pages are known.
        let vdso = vmas.iter().find(|v| v.entry.status & status::VDSO != 0);
        let is_vdso = |at: u64| vdso.is_some_and(|v| v.entry.start <= at && at < v.entry.end);
        let parts = parts.iter().filter(|(_, start, _)| !is_vdso(*start));
        let mut round = Round::default();
        let mut queue = Queue::default();
        for (run, start, end) in parts.flat_map(|part| snapshot.open_parts(*part)) {
            let readable = snapshot.runs.get(run).is_some_and(|run| run.readable);
            for (start, end) in steps(std::iter::once((start, end)), Reserve::BUFFER as u64) {
                if !queue.push(readable, start, end) {
                    self.copy_queue(&mut queue, &mut round)?;
                    queue.push(readable, start, end);
                }
            }
        }
        self.copy_queue(&mut queue, &mut round)?;
        snapshot.take_now(round);
        Ok(())
    }

    /// Copies what waits in a queue, and empties it.
    fn copy_queue(&self, queue: &mut Queue, round: &mut Round) -> Result<(), ShieldError> {
        let ranges = std::mem::take(&mut queue.ranges);
        let len = std::mem::take(&mut queue.len);
        if len == 0 {
            return Ok(());
        }
        let mut bytes = self.reserve.take(len).ok_or(ShieldError::TooMuch)?;
        if let Some(address) = self.fetch(&ranges, queue.readable, &mut bytes) {
            return Err(CopyError::Read { address, errno: Errno::FAULT }.into());
        }
        round.add(&ranges, bytes);
        Ok(())
    }

    /// Reads ranges, of less than 1024 each time; returns the first page that is not there, if there is one. `readable` as in
    /// [`Run::readable`].
    fn fetch(&self, ranges: &[RemoteRange], readable: bool, to: &mut [u8]) -> Option<u64> {
        if readable && read_remote(self.pid, ranges, to).unwrap_or(0) == to.len() {
            return None;
        }
        // By force, and what is there.
        let mut missing = None;
        let mut rest = to;
        for &(address, len) in ranges {
            let (now, later) = rest.split_at_mut(len);
            rest = later;
            if self.memory.read_exact_at(now, address).is_ok() {
                continue;
            }
            for (page, to) in (address..).step_by(PAGE as usize).zip(now.chunks_mut(PAGE as usize))
            {
                if self.memory.read_exact_at(to, page).is_err() {
                    missing = missing.or(Some(page));
                    to.fill(0);
                }
            }
        }
        missing
    }

    /// Which pages of a range are protected.
    fn protected(&self, start: u64, end: u64) -> Vec<Region> {
        let filter = Filter {
            inverted: WRITTEN,
            all: WRITTEN,
            any: pagemap::PRESENT | pagemap::SWAPPED,
            report: 0,
        };
        let mut regions = Vec::new();
        match pagemap::scan(self.pagemap.as_fd(), start, end, filter, &mut regions) {
            Ok(()) => regions,
            Err(_) => Vec::new(),
        }
    }

    /// Reads ranges for the images, in order: the pages as they were. Each page is read once.
    ///
    /// # Errors
    /// [`CopyError::Lost`].
    pub fn read(&self, ranges: &[RemoteRange], to: &mut [u8]) -> Result<(), CopyError> {
        let Some(snapshot) = self.snapshot() else {
            return Err(CopyError::Lost { address: ranges.first().map_or(0, |range| range.0) });
        };
        // What is copied already needs no reading.
        let is_copied = |page| snapshot.is(page, KEPT) || snapshot.is(page, COPIED);
        let is_open = |range: &RemoteRange| pages_of(range).any(|page| !is_copied(page));
        let readable = |range: &RemoteRange| {
            snapshot.run(range.0).is_some_and(|run| snapshot.runs[run].readable)
        };
        if ranges.iter().all(|range| is_open(range) && readable(range)) {
            self.fetch(ranges, true, to);
        } else {
            let mut rest = &mut *to;
            for range in ranges {
                let (now, later) = rest.split_at_mut(range.1);
                rest = later;
                if is_open(range) {
                    self.fetch(std::slice::from_ref(range), readable(range), now);
                }
            }
        }
        let mut protected = Vec::new();
        for group in ranges.chunk_by(|a, b| b.0.saturating_sub(a.0 + a.1 as u64) <= 1 << 20) {
            let [first, ..] = group else { continue };
            let last = group.last().map_or(first, |last| last);
            protected.extend(self.protected(first.0, last.0 + last.1 as u64));
        }
        let mut at = 0;
        let mut rest = to;
        for range in ranges {
            let (now, later) = rest.split_at_mut(range.1);
            rest = later;
            for (page, to) in pages_of(range).zip(now.chunks_mut(PAGE as usize)) {
                while protected.get(at).is_some_and(|region| region.end <= page) {
                    at += 1;
                }
                let whole = protected.get(at).is_some_and(|region| region.start <= page);
                let lost = CopyError::Lost { address: page };
                let Some(state) = snapshot.page(page) else { return Err(lost) };
                match state.compare_exchange(OPEN, DONE, Ordering::SeqCst, Ordering::SeqCst) {
                    // It was protected when it was looked at after it was read: nobody has written to it.
                    Ok(_) if whole => {}
                    Err(KEPT) => match snapshot.kept().remove(&page) {
                        Some(bytes) => to.copy_from_slice(&bytes),
                        None => return Err(lost),
                    },
                    Err(COPIED) => match snapshot.copied(page) {
                        Some(bytes) => to.copy_from_slice(bytes),
                        None => return Err(lost),
                    },
                    _ => return Err(lost),
                }
            }
        }
        // Nobody need wait for these any more.
        if let Some(uffd) = &self.uffd {
            for range in ranges {
                let _ = uffd.protect(range.0, range.0 + range.1 as u64, false);
            }
        }
        Ok(())
    }

    /// Serves those who wait to write, as many as there are at the moment.
    pub fn serve(&self) {
        let Some(uffd) = &self.uffd else { return };
        let mut addresses = Vec::with_capacity(16);
        while uffd.faults(&mut addresses).is_ok() {
            let snapshot = self.snapshot();
            for address in addresses.drain(..) {
                self.let_write(uffd, snapshot.as_deref(), address & !(PAGE - 1));
            }
        }
    }

    /// Lets somebody write to a page, once it is kept.
    fn let_write(&self, uffd: &Userfaultfd, snapshot: Option<&Snapshot>, page: u64) {
        let mut open = (page, page + PAGE);
        if let Some((snapshot, at)) = snapshot.and_then(|s| Some((s, s.run(page)?))) {
            let run = snapshot.runs[at];
            let start = (page & !(WINDOW - 1)).max(run.start);
            let end = ((page & !(WINDOW - 1)) + WINDOW).min(run.end);
            let mut bytes = [0; WINDOW as usize];
            let bytes = &mut bytes[..(end - start) as usize];
            let pages = || (start..end).step_by(PAGE as usize);
            if pages().any(|page| snapshot.is(page, OPEN)) {
                self.fetch(&[(start, bytes.len())], run.readable, bytes);
                let protected = self.protected(start, end);
                for (page, bytes) in pages().zip(bytes.chunks(PAGE as usize)) {
                    // Another one is lost; who comes to copy it will see.
                    if protected.iter().any(|r| r.start <= page && page < r.end) {
                        snapshot.keep(page, bytes);
                    }
                }
            }
            if pages().all(|page| !snapshot.is(page, OPEN)) {
                open = (start, end);
            }
        }
        // If the mapping is gone, the write is tried again and finds out.
        if uffd.protect(open.0, open.1, false).is_err()
            && uffd.protect(page, page + PAGE, false).is_err()
        {
            let _ = uffd.wake(page, PAGE);
        }
    }

    /// Takes the mappings out of the userfaultfd, little by little: while the kernel does that, the process cannot get at its
    /// address space. Whatever is left goes when this is dropped.
    pub fn leave(&self) {
        if let Some(early) = &self.early {
            early.leave();
        }
        let Some(uffd) = &self.uffd else { return };
        let ranges = std::mem::take(&mut *self.ranges());
        for (start, end) in ranges {
            // Reserved memory of which little is used costs little.
            let step = LEAVE.max(((end - start) / 4096).next_multiple_of(PAGE));
            for (start, end) in steps(std::iter::once((start, end)), step) {
                let _ = uffd.unregister(start, end);
            }
        }
    }
}

/// The parts of `runs` that are copied at the instant itself, each with the number of its run: those that are in none of the
/// protected `ranges`, and those of mappings with few pages, as stacks of threads are, which a program is likely to unmap
/// before they are saved.
fn now(runs: &[Run], vmas: &[Vma], ranges: &[(u64, u64)]) -> Vec<(usize, u64, u64)> {
    /// What a mapping has at most that counts as few, in bytes.
    const FEW: u64 = 64 << 10;
    /// That much of such mappings takes a millisecond.
    const MOST: u64 = 2 << 20;
    let mut parts = Vec::new();
    let mut ranges = ranges.iter().peekable();
    let (mut at, mut few) = (0, 0);
    for vma in vmas {
        while runs.get(at).is_some_and(|run| run.end <= vma.entry.start) {
            at += 1;
        }
        // A run may go on in the next mapping.
        let here = runs.iter().enumerate().skip(at).map_while(|(n, run)| {
            let (start, end) = (run.start.max(vma.entry.start), run.end.min(vma.entry.end));
            (start < end).then_some((n, start, end))
        });
        let bytes: u64 = here.clone().map(|(_, start, end)| end - start).sum();
        if bytes <= FEW && few + bytes <= MOST {
            few += bytes;
            parts.extend(here);
            continue;
        }
        for (n, mut start, end) in here {
            while start < end {
                while ranges.next_if(|range| range.1 <= start).is_some() {}
                let (first, last) = ranges.peek().map_or((u64::MAX, u64::MAX), |r| **r);
                if start < first {
                    parts.push((n, start, end.min(first)));
                }
                start = last.max(start);
            }
        }
    }
    parts
}

fn pages_of(range: &RemoteRange) -> impl Iterator<Item = u64> + use<> {
    (range.0..range.0 + range.1 as u64).step_by(PAGE as usize)
}

fn unless_gone(e: SyscallError) -> Result<(), SyscallError> {
    if e.errno == Errno::NOENT || e.errno == Errno::INVAL { Ok(()) } else { Err(e) }
}

/// Cuts ranges into pieces of at most `step` bytes.
pub(super) fn steps(
    ranges: impl Iterator<Item = (u64, u64)>,
    step: u64,
) -> impl Iterator<Item = (u64, u64)> {
    ranges.flat_map(move |(start, end)| {
        (start..end).step_by(step as usize).map(move |at| (at, end.min(at + step)))
    })
}

/// Plain anonymous memory, whose pages the program alone writes to. What lies behind a file cannot be protected.
fn can_be_protected(vma: &Vma) -> bool {
    let kernels = status::VDSO | status::VVAR | status::VSYSCALL | status::AIORING;
    vma.backing == Backing::None
        && vma.entry.status & status::ANON_PRIVATE != 0
        && vma.entry.status & kernels == 0
        && vma.entry.flags & (MAP_DROPPABLE | libc::MAP_HUGETLB as u32) == 0
        && has_private_pages(&vma.entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::vma::Backing;
    use rewake_image::messages::VmaEntry;

    #[test]
    fn what_is_open_or_little_is_kept_at_once() {
        const MIB: u64 = 1 << 20;
        let run = |start, end| Run { start, end, lazy: true, readable: true, parent: false };
        let vma = |start, end| Vma {
            entry: VmaEntry { start, end, ..VmaEntry::default() },
            backing: Backing::None,
            device: (0, 0),
            inode: 0,
            readable: true,
            lock_on_fault: false,
            sealed: false,
            may_have_guards: false,
            watched: false,
            patched: false,
            may_have_pages: true,
        };
        // A large one, a stack with a page, one that is protected in part, one that is not at all. The stack's page and the
        // next mapping's are one run.
        let vmas = [vma(0, MIB), vma(MIB, 2 * MIB), vma(2 * MIB, 3 * MIB), vma(4 * MIB, 5 * MIB)];
        let runs = [
            run(0, MIB / 2),
            run(MIB / 2 + PAGE, MIB),
            run(2 * MIB - PAGE, 3 * MIB),
            run(4 * MIB, 5 * MIB),
        ];
        let ranges = [(0, 2 * MIB), (2 * MIB + PAGE, 2 * MIB + MIB / 2)];
        let wanted = [
            (2, 2 * MIB - PAGE, 2 * MIB),
            (2, 2 * MIB, 2 * MIB + PAGE),
            (2, 2 * MIB + MIB / 2, 3 * MIB),
            (3, 4 * MIB, 5 * MIB),
        ];
        assert_eq!(now(&runs, &vmas, &ranges), wanted);
        assert_eq!(now(&runs[..2], &vmas[..1], &[]), [(0, 0, MIB / 2), (1, MIB / 2 + PAGE, MIB)]);
    }
}
