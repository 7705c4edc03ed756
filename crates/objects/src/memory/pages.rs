//! Private pages: which hold data (`PAGEMAP_SCAN`, or `/proc/PID/pagemap`), and copying them to a page store.

use super::PAGE;
use super::shield::Shield;
use super::vma::{Vma, has_private_pages, status};
use rewake_image::messages::VmaEntry;
use rewake_proc::pagemap::{Entry, MMAP_EXCLUSIVE, PRESENT as IN_MEMORY, entries};
use rewake_sys::memory::{RemoteRange, read_remote};
use rewake_sys::pagemap::{self, Filter, Region};
use rewake_sys::{Errno, SyscallError};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

/// A run of pages to be saved: `start..end` in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub start: u64,
    /// Past the last byte.
    pub end: u64,
    /// May a lazy restore bring it later? (`PE_LAZY` for CRIU.)
    pub lazy: bool,
    /// Can it be read with process_vm_readv(2), and may it? See [`Vma::readable`].
    pub readable: bool,
    /// Are the pages as the parent images have them?
    pub parent: bool,
}

impl Run {
    /// Pages in the run.
    #[must_use]
    pub fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE
    }
}

/// The runs of pages of `vmas` that hold data of the task itself: not those of a file that were never written, not
/// untouched ones, not the shared zero page. `pagemap` is `/proc/PID/pagemap`.
///
/// # Errors
/// The pagemap cannot be read.
pub fn survey(pagemap: &File, vmas: &[Vma]) -> Result<Vec<Run>, SyscallError> {
    let regions = match scan_private(pagemap, vmas, 0, pagemap::scan) {
        Err(e) if e.errno == Errno::NOTTY || e.errno == Errno::INVAL => {
            scan_by_words(pagemap, vmas)?
        }
        regions => regions?,
    };
    Ok(intersect(&regions, vmas))
}

/// How to look through a pagemap: [`pagemap::scan`] or one of its kin.
type Scan = fn(BorrowedFd<'_>, u64, u64, Filter, &mut Vec<Region>) -> rewake_sys::call::Result<()>;

/// Looks for pages that hold private data, with `scan`, which reports the categories `report` of them.
pub(super) fn scan_private(
    pagemap: &File,
    vmas: &[Vma],
    report: u64,
    scan: Scan,
) -> Result<Vec<Region>, SyscallError> {
    let not = |categories| Filter {
        inverted: categories,
        all: categories,
        any: pagemap::PRESENT | pagemap::SWAPPED,
        report,
    };
    let plain = pagemap::FILE | pagemap::PFNZERO;
    let look = |vmas: &[Vma]| -> Result<Vec<Region>, SyscallError> {
        let (mut all, mut regions) = (Vec::new(), Vec::new());
        for part in vmas.chunk_by(|a, b| !is_passed_over(a) && !is_passed_over(b)) {
            // Beyond the last one there may be the kernel's own, where no process has pages.
            let last = part.iter().rev().find(|vma| has_private_pages(&vma.entry));
            let (Some(first), Some(last)) = (part.first(), last) else { continue };
            if is_passed_over(first) {
                continue;
            }
            let (start, end) = (first.entry.start, last.entry.end);
            let mut scan = |filter| scan(pagemap.as_fd(), start, end, filter, &mut regions);
            // Kernels before 6.15 know no guard ranges.
            scan(not(plain | pagemap::GUARD)).or_else(|_| scan(not(plain)))?;
            all.append(&mut regions);
        }
        Ok(all)
    };
    /// So many mappings take longer than it takes to begin a thread.
    const MANY: usize = 1000;
    if vmas.len() < MANY {
        return look(vmas);
    }
    let (low, high) = vmas.split_at(vmas.len() / 2);
    std::thread::scope(|scope| {
        let above = std::thread::Builder::new().spawn_scoped(scope, || look(high));
        let mut regions = look(low)?;
        // Without a further thread it takes longer, that is all.
        let above = above.ok().and_then(|thread| thread.join().ok());
        regions.append(&mut above.unwrap_or_else(|| look(high))?);
        Ok(regions)
    })
}

/// Is it worth a call to leave this mapping out, in which there are no private pages? What lies between others is looked at with
/// them.
fn is_passed_over(vma: &Vma) -> bool {
    const LARGE: u64 = 256 << 10;
    let empty = !has_private_pages(&vma.entry) || !vma.may_have_pages;
    empty && vma.entry.end - vma.entry.start >= LARGE
}

/// Guard ranges (`MADV_GUARD_INSTALL`) inside `vmas`, as the image's pseudo mappings. Empty on kernels that do not tell.
///
/// # Errors
/// The pagemap cannot be read.
pub fn guards(pagemap: &File, vmas: &[Vma]) -> Result<Vec<VmaEntry>, SyscallError> {
    let mut guards = Vec::new();
    let filter = Filter { all: pagemap::GUARD, ..Filter::default() };
    let mut regions = Vec::new();
    for vma in vmas.iter().filter(|v| v.may_have_guards) {
        match pagemap::scan(pagemap.as_fd(), vma.entry.start, vma.entry.end, filter, &mut regions) {
            Ok(()) => {}
            Err(e) if e.errno == Errno::NOTTY || e.errno == Errno::INVAL => return Ok(Vec::new()),
            Err(e) => return Err(e),
        }
        guards.extend(regions.iter().map(|region| VmaEntry {
            start: region.start,
            end: region.end,
            status: status::GUARD,
            fd: -1,
            ..VmaEntry::default()
        }));
    }
    Ok(guards)
}

/// Cuts `regions` (ascending) at the borders of `vmas` (ascending). The vdso and rings of asynchronous I/O are taken whole:
/// their pages are the kernel's, but a restored task needs them as they were.
pub(super) fn intersect(regions: &[Region], vmas: &[Vma]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(regions.len());
    let mut next = 0;
    for vma in vmas.iter().filter(|v| has_private_pages(&v.entry)) {
        let (start, end) = (vma.entry.start, vma.entry.end);
        let plain = status::ANON_PRIVATE | status::REGULAR;
        let huge = vma.entry.flags & libc::MAP_HUGETLB as u32 != 0;
        let lazy = vma.entry.status & !status::HEAP == plain && !huge;
        let mut push = |start, end| match runs.last_mut() {
            Some(last)
                if last.end == start && last.lazy == lazy && last.readable == vma.readable =>
            {
                last.end = end;
            }
            _ => runs.push(Run { start, end, lazy, readable: vma.readable, parent: false }),
        };
        if vma.entry.status & (status::VDSO | status::AIORING) != 0 {
            push(start, end);
            continue;
        }
        while next < regions.len() && regions[next].end <= start {
            next += 1;
        }
        let mut at = next;
        while at < regions.len() && regions[at].start < end {
            push(regions[at].start.max(start), regions[at].end.min(end));
            at += 1;
        }
    }
    runs
}

/// For kernels before 6.7: one word a page. Zero pages cannot be told apart there and are saved.
fn scan_by_words(file: &File, vmas: &[Vma]) -> Result<Vec<Region>, SyscallError> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    let mut regions: Vec<Region> = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    for vma in vmas.iter().filter(|v| has_private_pages(&v.entry)) {
        let mut at = vma.entry.start;
        while at < vma.entry.end {
            let pages = ((vma.entry.end - at) / PAGE).min(buffer.len() as u64 / 8);
            let words = &mut buffer[..(pages * 8) as usize];
            file.read_exact_at(words, at / PAGE * 8).map_err(|e| {
                SyscallError::new("read pagemap", Errno::from_io_error(&e).unwrap_or(Errno::IO))
            })?;
            for word in words.chunks_exact(8) {
                let bits = u64::from_ne_bytes([
                    word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
                ]);
                if bits & (PRESENT | SWAPPED) != 0 && bits & FILE_OR_SHARED == 0 {
                    match regions.last_mut() {
                        Some(last) if last.end == at => last.end = at + PAGE,
                        _ => regions.push(Region { start: at, end: at + PAGE, categories: 0 }),
                    }
                }
                at += PAGE;
            }
        }
    }
    Ok(regions)
}

/// Marks the runs with pages that others have mapped too as not readable ([`Vma::readable`]). The task stands still.
///
/// # Errors
/// The pagemap cannot be read.
pub fn mark_shared(pagemap: &File, runs: &mut [Run]) -> Result<(), SyscallError> {
    // So many pages at a time: as many as lie in a table of pages.
    const WINDOW: u64 = 512;
    let mut words = [0u8; WINDOW as usize * 8];
    let mut known = 0..0;
    for run in runs.iter_mut().filter(|run| run.readable) {
        let (mut page, end) = (run.start / PAGE, run.end / PAGE);
        while page < end && run.readable {
            if !known.contains(&page) {
                let got = pagemap.read_at(&mut words, page * 8).map_err(|e| {
                    SyscallError::new("read pagemap", Errno::from_io_error(&e).unwrap_or(Errno::IO))
                })?;
                known = page..page + got as u64 / 8;
            }
            let till = end.min(known.end);
            if till <= page {
                return Err(SyscallError::new("read pagemap", Errno::IO));
            }
            let part = (page - known.start) as usize * 8..(till - known.start) as usize * 8;
            let is_shared = |entry: Entry| entry.has(IN_MEMORY) && !entry.has(MMAP_EXCLUSIVE);
            run.readable = !entries(&words[part]).any(is_shared);
            page = till;
        }
    }
    Ok(())
}

/// How copying memory failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Reading the task's memory.
    #[error("memory at {address:#x} cannot be read: {errno}")]
    Read {
        /// Address.
        address: u64,
        /// Why.
        errno: Errno,
    },
    /// The page changed before it was saved, and the task runs on.
    #[error("memory at {address:#x} was unmapped, moved or dropped before it was saved")]
    Lost {
        /// Address.
        address: u64,
    },
    /// Writing the page store.
    #[error("the pages cannot be written: {0}")]
    Write(#[source] io::Error),
}

/// Whose pages are copied.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The process.
    pub pid: i32,
    /// `/proc/PID/mem`, for what the task itself could not read, and what reading it otherwise would change.
    pub memory: &'a File,
    /// The process runs: pages that are gone are taken for zeros, instead of being an error.
    pub gone_is_zero: bool,
    /// The process runs, and has its memory kept as it was.
    pub shield: Option<&'a Shield>,
}

/// Copies the pages of `runs`, in order, to `to`. `buffer` is scratch space.
///
/// # Errors
/// [`CopyError`].
pub fn copy(
    source: &Source<'_>,
    runs: &[Run],
    to: &mut impl io::Write,
    buffer: &mut [u8],
) -> Result<(), CopyError> {
    let mut queue: Vec<RemoteRange> = Vec::with_capacity(1024);
    let mut queued = 0;
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            if !run.readable && source.shield.is_none() {
                flush(source, &mut queue, &mut queued, to, buffer)?;
                let len = ((run.end - at) as usize).min(buffer.len());
                read_by_force(source, at, &mut buffer[..len])?;
                to.write_all(&buffer[..len]).map_err(CopyError::Write)?;
                at += len as u64;
                continue;
            }
            let len = ((run.end - at) as usize).min(buffer.len() - queued);
            queue.push((at, len));
            queued += len;
            at += len as u64;
            if queued == buffer.len() || queue.len() == 1024 {
                flush(source, &mut queue, &mut queued, to, buffer)?;
            }
        }
    }
    flush(source, &mut queue, &mut queued, to, buffer)
}

/// Reads through `/proc/PID/mem`, whatever the protection.
fn read_by_force(source: &Source<'_>, address: u64, to: &mut [u8]) -> Result<(), CopyError> {
    let Err(e) = source.memory.read_exact_at(to, address) else { return Ok(()) };
    if source.gone_is_zero {
        let pages = (address..).step_by(PAGE as usize).zip(to.chunks_mut(PAGE as usize));
        for (address, page) in pages {
            if source.memory.read_exact_at(page, address).is_err() {
                page.fill(0);
            }
        }
        return Ok(());
    }
    Err(CopyError::Read { address, errno: Errno::from_io_error(&e).unwrap_or(Errno::IO) })
}

fn flush(
    source: &Source<'_>,
    queue: &mut Vec<RemoteRange>,
    queued: &mut usize,
    to: &mut impl io::Write,
    buffer: &mut [u8],
) -> Result<(), CopyError> {
    if *queued == 0 {
        return Ok(());
    }
    let wanted = &mut buffer[..*queued];
    if let Some(shield) = source.shield {
        shield.read(queue, wanted)?;
        to.write_all(wanted).map_err(CopyError::Write)?;
        queue.clear();
        *queued = 0;
        return Ok(());
    }
    let got = read_remote(source.pid, queue, wanted).unwrap_or(0);
    if got < *queued {
        // Something in there cannot be read this way (a protection key, a page that appeared meanwhile): by force.
        let mut filled = 0;
        for &(address, len) in queue.iter() {
            read_by_force(source, address, &mut wanted[filled..filled + len])?;
            filled += len;
        }
    }
    to.write_all(wanted).map_err(CopyError::Write)?;
    queue.clear();
    *queued = 0;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::vma::Backing;
    use super::*;

    fn vma(start: u64, end: u64, status: u32) -> Vma {
        Vma {
            entry: VmaEntry { start, end, status, ..VmaEntry::default() },
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
        }
    }

    #[test]
    fn runs_stay_inside_private_mappings() {
        let anon = status::REGULAR | status::ANON_PRIVATE;
        let vmas = [
            vma(0x1000, 0x5000, anon),
            vma(0x5000, 0x6000, status::REGULAR | status::FILE_SHARED),
            vma(0x6000, 0x8000, anon),
            vma(0x8000, 0xa000, anon | status::VDSO),
        ];
        let region = |start, end| Region { start, end, categories: 0 };
        let runs = intersect(&[region(0x2000, 0x7000), region(0x9000, 0xb000)], &vmas);
        let plain: Vec<_> = runs.iter().map(|r| (r.start, r.end, r.lazy)).collect();
        assert_eq!(
            plain,
            [(0x2000, 0x5000, true), (0x6000, 0x7000, true), (0x8000, 0xa000, false)]
        );
    }
}
