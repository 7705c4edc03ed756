//! Which pages were written since an earlier look: userfaultfd(2) in its asynchronous mode, in which the kernel takes the
//! protection off a page that is written to, without anybody being asked, and `PAGEMAP_SCAN` tells.
//!
//! What the kernel does by itself is what makes this safe. A mapping that is new, moved (mremap(2)) or a child's is not
//! registered; a page that is new has no protection: both count as written.

use super::PAGE;
use super::pages::{self, Run};
use super::vma::{self, Backing, Vma, has_private_pages, status};
use crate::Problem;
use rewake_sys::pagemap::{self, Filter, Region, WPALLOWED, WRITTEN};
use rewake_sys::userfaultfd::{USER_MODE_ONLY, Userfaultfd, WP_ASYNC, WP_SHARED, WP_UNPOPULATED};
use rewake_sys::{Errno, SyscallError};
use std::fs::File;
use std::os::fd::AsFd;

/// Flags with which a process makes its userfaultfd. Nobody ever waits for it, so it need not be allowed to hold up the
/// kernel.
pub const FLAGS: u64 = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | USER_MODE_ONLY;

/// What it is then asked for.
pub const FEATURES: u64 = WP_ASYNC | WP_UNPOPULATED | WP_SHARED;

/// How memory is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tracking<'a> {
    /// The process's own userfaultfd.
    pub with: Option<&'a Userfaultfd>,
    /// What the parent images have of this address space, if it was tracked with `with` since they were made: ascending
    /// ranges in bytes.
    pub since: Option<&'a [(u64, u64)]>,
    /// Track from now on.
    pub protect: bool,
}

/// As [`pages::survey`], with [`Run::parent`] where the parent images have the pages as they are. The task stands still.
///
/// # Errors
/// The pagemap cannot be read.
pub fn survey(
    pagemap: &File,
    vmas: &[Vma],
    tracking: Tracking<'_>,
) -> Result<Vec<Run>, SyscallError> {
    let Some(with) = tracking.with else { return pages::survey(pagemap, vmas) };
    let ours = register(with, vmas, tracking.protect);
    let regions = pages::scan_private(pagemap, vmas, WPALLOWED | WRITTEN, pagemap::scan)?;
    if tracking.protect {
        protect(pagemap, &ours)?;
    }
    let mut runs = pages::intersect(&regions, vmas);
    if let Some(since) = tracking.since {
        let clean = overlap(&overlap(&unwritten(&regions), &watched(vmas)), &overlap(&ours, since));
        runs = mark(&runs, &clean);
    }
    Ok(runs)
}

/// Protects all pages with data in `ranges`.
fn protect(pagemap: &File, ranges: &[(u64, u64)]) -> Result<(), SyscallError> {
    let plain = pagemap::FILE | pagemap::PFNZERO;
    let any = pagemap::PRESENT | pagemap::SWAPPED;
    let filter = Filter { inverted: plain, all: plain, any, report: 0 };
    let mut regions = Vec::new();
    ranges.iter().try_for_each(|&(start, end)| {
        pagemap::scan_protecting(pagemap.as_fd(), start, end, filter, &mut regions)
    })
}

/// Pages may change without a write through their mapping where the kernel writes for the program to memory that it has
/// pinned: such a process is not tracked.
#[must_use]
pub fn has_pinned_memory(vmas: &[Vma]) -> bool {
    vmas.iter().any(|v| v.backing == Backing::Ring || v.entry.status & status::AIORING != 0)
}

/// Mappings registered with a userfaultfd: by a program, which would not find them so after a restore, or by someone who
/// tracks memory as we do, which changes nothing for the program.
pub fn judge(pagemap: &File, vmas: &[Vma], problems: &mut Vec<Problem>) {
    let mut regions = Vec::new();
    let filter = Filter { all: WPALLOWED, ..Filter::default() };
    for vma in vmas.iter().filter(|v| v.watched) {
        let start = vma.entry.start;
        let scanned = pagemap::scan(pagemap.as_fd(), start, start + PAGE, filter, &mut regions);
        if scanned.is_err() || regions.is_empty() {
            let object = format!("mapping {:#x}-{:#x}", start, vma.entry.end);
            problems.push(vma::registered(object));
        }
    }
}

/// Registers mappings with private pages, or only sees which are (if not `new`). Returns those that are ours, neighbours as
/// one; those that cannot be, or are another's, stay as they are and count as written.
fn register(with: &Userfaultfd, vmas: &[Vma], new: bool) -> Vec<(u64, u64)> {
    let mut ours = Vec::new();
    let private: Vec<(u64, u64)> = vmas
        .iter()
        .filter(|v| is_tracked(v) && (new || v.watched))
        .map(|v| (v.entry.start, v.entry.end))
        .collect();
    let neighbours = |a: &(u64, u64), b: &(u64, u64)| a.1 == b.0;
    for group in private.chunk_by(neighbours) {
        let [(start, _), ..] = *group else { continue };
        let end = group.last().map_or(start, |(_, end)| *end);
        match with.register(start, end) {
            Ok(()) => ours.push((start, end)),
            // The address space is gone.
            Err(e) if e.errno == Errno::NOMEM => return Vec::new(),
            Err(e) if group.len() == 1 => log::debug!("{start:#x}-{end:#x} is not tracked: {e}"),
            Err(_) => {
                for &(start, end) in group {
                    match with.register(start, end) {
                        Ok(()) => ours.push((start, end)),
                        Err(e) => log::debug!("{start:#x}-{end:#x} is not tracked: {e}"),
                    }
                }
            }
        }
    }
    ours
}

/// The vdso is always taken whole.
fn is_tracked(vma: &Vma) -> bool {
    let kernels = status::VDSO | status::VSYSCALL | status::AIORING;
    // Huge pages of hugetlbfs are always saved whole.
    let huge = vma.entry.flags & libc::MAP_HUGETLB as u32 != 0;
    has_private_pages(&vma.entry) && vma.entry.status & kernels == 0 && !huge
}

fn watched(vmas: &[Vma]) -> Vec<(u64, u64)> {
    vmas.iter()
        .filter(|v| v.watched && is_tracked(v))
        .map(|v| (v.entry.start, v.entry.end))
        .collect()
}

pub(super) fn unwritten(regions: &[Region]) -> Vec<(u64, u64)> {
    regions
        .iter()
        .filter(|r| r.categories & (WPALLOWED | WRITTEN) == WPALLOWED)
        .map(|r| (r.start, r.end))
        .collect()
}

/// What lies in both of two ascending lists of ranges.
pub(super) fn overlap(a: &[(u64, u64)], b: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut both: Vec<(u64, u64)> = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (start, end) = (x.0.max(y.0), x.1.min(y.1));
        if start < end {
            match both.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => both.push((start, end)),
            }
        }
        if x.1 < y.1 { i += 1 } else { j += 1 }
    }
    both
}

/// Cuts runs at the borders of `clean` (ascending), and marks what is in there.
fn mark(runs: &[Run], clean: &[(u64, u64)]) -> Vec<Run> {
    let mut marked = Vec::with_capacity(runs.len() + clean.len());
    let mut next = 0;
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            while clean.get(next).is_some_and(|c| c.1 <= at) {
                next += 1;
            }
            let (end, parent) = match clean.get(next) {
                Some(c) if c.0 <= at => (c.1.min(run.end), true),
                Some(c) => (c.0.min(run.end), false),
                None => (run.end, false),
            };
            marked.push(Run { start: at, end, parent, ..*run });
            at = end;
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap() {
        assert_eq!(
            overlap(&[(0, 4), (6, 9), (10, 12)], &[(1, 2), (3, 7), (8, 20)]),
            [(1, 2), (3, 4), (6, 7), (8, 9), (10, 12)]
        );
        assert_eq!(overlap(&[(0, 4), (4, 8)], &[(2, 6)]), [(2, 6)]);
        assert_eq!(overlap(&[(0, 4)], &[(4, 6)]), []);
        assert_eq!(overlap(&[], &[(4, 6)]), []);
    }

    #[test]
    fn runs_are_cut_where_pages_were_written() {
        let run = |start, end, parent| Run { start, end, lazy: true, readable: true, parent };
        let runs = [run(0, 10, false), run(10, 12, false), run(20, 30, false)];
        assert_eq!(
            mark(&runs, &[(2, 4), (8, 11), (15, 22), (29, 40)]),
            [
                run(0, 2, false),
                run(2, 4, true),
                run(4, 8, false),
                run(8, 10, true),
                run(10, 11, true),
                run(11, 12, false),
                run(20, 22, true),
                run(22, 29, false),
                run(29, 30, true),
            ]
        );
        assert_eq!(mark(&runs, &[]), runs);
    }
}
