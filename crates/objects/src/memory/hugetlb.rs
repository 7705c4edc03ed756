//! Huge pages that a program asks for by size (hugetlb): `MAP_HUGETLB`, `MFD_HUGETLB`, `SHM_HUGETLB`, files of hugetlbfs.
//!
//! They come from pools of their own, one a size. A mapping reserves its pages when it is made, so a restore on a host that has
//! too few is refused before anything is made ([`Needs`]).

use super::vma::status;
use super::{PAGE, TASK_SIZE};
use crate::Problem;
use rewake_image::messages::{MemfdInodeEntry, MmEntry, VmaEntry};
use rewake_image::{StoredPages, StoredRun};
use rustix::fd::AsFd;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where a size is in the flags of mmap(2), memfd_create(2) and shmget(2): its binary logarithm, in six bits.
const SHIFT: u32 = 26;
const MAP_HUGETLB: u32 = libc::MAP_HUGETLB as u32;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The bits that ask for pages of this size.
#[must_use]
pub fn bits(size: u64) -> u32 {
    size.ilog2() << SHIFT
}

/// The page size that such flags ask for: the default one, of 2 MiB, if they do not say. None if it is impossible.
#[must_use]
pub fn size(flags: u32) -> Option<u64> {
    match flags >> SHIFT & 0x3f {
        0 => Some(2 << 20),
        log @ 21..=38 => Some(1 << log),
        _ => None,
    }
}

/// The page size of a mapping of the image; none if it is an ordinary one.
#[must_use]
pub fn of_mapping(vma: &VmaEntry) -> Option<u64> {
    if vma.flags & MAP_HUGETLB != 0 { size(vma.flags) } else { None }
}

/// The flags of mmap(2) that a mapping of the image needs for it, if it is not a file's.
#[must_use]
pub fn mmap_flags(vma: &VmaEntry) -> u32 {
    of_mapping(vma).map_or(0, |size| MAP_HUGETLB | bits(size))
}

/// The page size of a file, if it is one of hugetlbfs (a memfd, a segment).
#[must_use]
pub fn of_file(file: impl AsFd) -> Option<u64> {
    let fs = rustix::fs::fstatfs(file).ok()?;
    (fs.f_type as i64 == HUGETLBFS_MAGIC).then_some(fs.f_bsize as u64).filter(|s| *s > PAGE)
}

/// Checks the bounds of a mapping of the image that has huge pages.
///
/// # Errors
/// What is wrong with it.
pub fn validate(vma: &VmaEntry) -> Result<(), &'static str> {
    if vma.flags & MAP_HUGETLB == 0 {
        return Ok(());
    }
    let Some(size) = size(vma.flags) else {
        return Err("it has pages of an impossible size");
    };
    if !vma.start.is_multiple_of(size) || !vma.end.is_multiple_of(size) {
        return Err("its bounds are not those of a mapping with huge pages");
    }
    Ok(())
}

/// Huge pages that a restore takes from each pool, by size in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pages: BTreeMap<u64, u64>,
    /// Ranges of files that are mapped, by page size and file id.
    shared: BTreeMap<(u64, u64), Vec<Range<u64>>>,
}

impl Needs {
    /// Adds those of an address space: private memory as a whole, unless it is not to be reserved.
    pub fn add(&mut self, mm: &MmEntry, pages: Option<&StoredPages>) {
        for vma in &mm.vmas {
            let Some(size) = of_mapping(vma) else { continue };
            let reserved = vma.flags & libc::MAP_NORESERVE as u32 == 0;
            let whole = vma.start..vma.end;
            if vma.status & (status::FILE_SHARED | status::ANON_SHARED) == 0 {
                let runs = pages.map_or(&[][..], |p| p.runs.as_slice());
                let bytes = if reserved { whole.end - whole.start } else { inside(runs, whole) };
                *self.pages.entry(size).or_default() += bytes / size;
            } else if reserved && vma.status & status::MEMFD != 0 {
                let start = vma.pgoff.min(TASK_SIZE);
                let range = start..start + (whole.end - whole.start);
                self.shared.entry((size, vma.shmid)).or_default().push(range);
            }
        }
    }

    /// Adds those of a segment's content. What is mapped of it may be counted twice: it is told by file, not by segment.
    pub fn add_segment(&mut self, entry: &MemfdInodeEntry, files: &[u32], stored: u64) {
        let Some(size) = entry.hugetlb_flag.filter(|f| *f != 0).and_then(size) else { return };
        let mapped: Vec<Range<u64>> = files
            .iter()
            .filter_map(|id| self.shared.remove(&(size, u64::from(*id))))
            .flatten()
            .map(|range| range.start..range.end.min(entry.size))
            .collect();
        *self.pages.entry(size).or_default() += union(mapped).max(stored) / size;
    }

    /// Adds a segment that reserves all its pages when it is made.
    pub fn add_reserved(&mut self, size: u64, bytes: u64) {
        *self.pages.entry(size).or_default() += bytes / size;
    }

    /// Compares them with what the host has, if the tree is restored so often.
    ///
    /// # Errors
    /// It has too few.
    pub fn check(&self, times: u64) -> Result<(), Problem> {
        for (size, wanted) in self.pages.iter().filter(|(_, wanted)| **wanted > 0) {
            let pool = Pool::read(*size)?;
            let wanted = wanted.saturating_mul(times);
            if pool.available() < wanted {
                return Err(Problem::new(
                    format!("huge pages of {} kB", size >> 10),
                    format!(
                        "{wanted} are needed, and the host has {} that are free and not reserved (of {})",
                        pool.available(), pool.all
                    ),
                )
                .remedy(format!(
                    "let it have more: echo {} > {}/nr_hugepages",
                    pool.all + wanted - pool.available(), Pool::directory(*size)
                )));
            }
        }
        Ok(())
    }
}

/// How many bytes of `runs` (ascending) lie in a range.
fn inside(runs: &[StoredRun], range: Range<u64>) -> u64 {
    let first = runs.partition_point(|run| run.end() <= range.start);
    let within = runs[first..].iter().take_while(|run| run.vaddr < range.end);
    within.map(|run| run.end().min(range.end) - run.vaddr.max(range.start)).sum()
}

/// How many bytes are in at least one of the ranges.
fn union(mut ranges: Vec<Range<u64>>) -> u64 {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut bytes = 0;
    let mut end = 0;
    for range in ranges {
        bytes += range.end.saturating_sub(range.start.max(end));
        end = end.max(range.end);
    }
    bytes
}

/// The pool of one size.
#[derive(Debug, Clone, Copy, Default)]
struct Pool {
    all: u64,
    free: u64,
    reserved: u64,
    /// May be made beyond the pool when they are wanted (`nr_overcommit_hugepages`).
    beyond: u64,
}

impl Pool {
    fn directory(size: u64) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10)
    }

    fn read(size: u64) -> Result<Pool, Problem> {
        let directory = Pool::directory(size);
        let number = |name: &str| {
            let text = std::fs::read_to_string(format!("{directory}/{name}"))?;
            text.trim().parse::<u64>().map_err(std::io::Error::other)
        };
        let pool = || {
            let over = number("nr_overcommit_hugepages")?;
            Ok(Pool {
                all: number("nr_hugepages")?,
                free: number("free_hugepages")?,
                reserved: number("resv_hugepages")?,
                beyond: over.saturating_sub(number("surplus_hugepages")?),
            })
        };
        pool().map_err(|e: std::io::Error| {
            Problem::new(
                format!("huge pages of {} kB", size >> 10),
                format!("the kernel has none of this size: {directory}: {e}"),
            )
        })
    }

    fn available(&self) -> u64 {
        (self.free.saturating_sub(self.reserved)).saturating_add(self.beyond)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 2 << 20;

    fn vma(start: u64, end: u64, flags: i32, status: u32, shmid: u64) -> VmaEntry {
        let flags = flags as u32 | MAP_HUGETLB | bits(M);
        VmaEntry { start, end, flags, status, shmid, ..VmaEntry::default() }
    }

    #[test]
    fn sizes_and_bounds() {
        assert_eq!(size(bits(M)), Some(M));
        assert_eq!(size(bits(1 << 30)), Some(1 << 30));
        assert_eq!(size(0), Some(M));
        assert_eq!(size(12 << SHIFT), None);
        assert_eq!(size(63 << SHIFT), None);
        assert!(validate(&vma(M, 3 * M, 0, 0, 0)).is_ok());
        assert!(validate(&vma(M, 3 * M + PAGE, 0, 0, 0)).is_err());
        assert!(
            validate(&VmaEntry { flags: MAP_HUGETLB | 1 << SHIFT, ..vma(M, M, 0, 0, 0) }).is_err()
        );
    }

    #[test]
    fn needs_are_what_is_reserved_or_stored() {
        let private = libc::MAP_PRIVATE;
        let unreserved = private | libc::MAP_NORESERVE;
        let (anon, file) = (status::ANON_PRIVATE, status::FILE_SHARED | status::MEMFD);
        let mm = MmEntry {
            vmas: vec![
                vma(0, 4 * M, private, anon, 0),
                vma(10 * M, 20 * M, unreserved, anon, 0),
                vma(20 * M, 24 * M, libc::MAP_SHARED, file, 7),
                vma(30 * M, 34 * M, libc::MAP_SHARED, file, 7),
            ],
            ..MmEntry::default()
        };
        let mut needs = Needs::default();
        needs.add(&mm, None);
        let segment =
            MemfdInodeEntry { size: 8 * M, hugetlb_flag: Some(4), ..MemfdInodeEntry::default() };
        needs.add_segment(&segment, &[7], M);
        needs.add_segment(&segment, &[8], 3 * M);
        assert_eq!(needs.pages, [(M, 4 + 4 + 3)].into());
        assert_eq!(union(vec![4..6, 0..2, 1..3, 4..5]), 5);
    }
}
