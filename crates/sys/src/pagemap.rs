//! `PAGEMAP_SCAN` (linux/fs.h, since 6.7) on `/proc/PID/pagemap`.

use crate::call::{Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `PAGE_IS_WPALLOWED`.
pub const WPALLOWED: u64 = 1 << 0;
/// `PAGE_IS_WRITTEN`.
pub const WRITTEN: u64 = 1 << 1;
/// `PAGE_IS_FILE`: file-backed or shared.
pub const FILE: u64 = 1 << 2;
/// `PAGE_IS_PRESENT`.
pub const PRESENT: u64 = 1 << 3;
/// `PAGE_IS_SWAPPED`.
pub const SWAPPED: u64 = 1 << 4;
/// `PAGE_IS_PFNZERO`: the shared zero page.
pub const PFNZERO: u64 = 1 << 5;
/// `PAGE_IS_HUGE`.
pub const HUGE: u64 = 1 << 6;
/// `PAGE_IS_SOFT_DIRTY`.
pub const SOFT_DIRTY: u64 = 1 << 7;
/// `PAGE_IS_GUARD` (since 6.15).
pub const GUARD: u64 = 1 << 8;

const PAGEMAP_SCAN: usize = 0xc060_6610;
/// `PM_SCAN_WP_MATCHING`.
const WP_MATCHING: u64 = 1;

/// A run of pages of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Past the last byte.
    pub end: u64,
    /// Categories, as far as the return mask asked for them.
    pub categories: u64,
}

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages to report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter {
    /// Categories whose meaning is inverted before matching.
    pub inverted: u64,
    /// All of these must match.
    pub all: u64,
    /// At least one of these must match (if not empty).
    pub any: u64,
    /// Categories to report.
    pub report: u64,
}

/// Reports the runs of matching pages in `start..end` into `regions` (its old contents are dropped).
///
/// # Errors
/// `ENOTTY` on kernels without the call.
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    filter: Filter,
    regions: &mut Vec<Region>,
) -> Result<()> {
    walk(pagemap, start, end, filter, 0, regions)
}

/// As [`scan`], and protects the matching pages from writing: those that are [`WPALLOWED`] are no longer [`WRITTEN`] until
/// somebody writes to them. Other mappings are passed over.
///
/// # Errors
/// As there.
pub fn scan_protecting(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    filter: Filter,
    regions: &mut Vec<Region>,
) -> Result<()> {
    walk(pagemap, start, end, filter, WP_MATCHING, regions)
}

fn walk(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    filter: Filter,
    flags: u64,
    regions: &mut Vec<Region>,
) -> Result<()> {
    regions.clear();
    let mut at = start;
    let mut chunk = vec![Region::default(); 1024];
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start: at,
            end,
            walk_end: 0,
            vec: chunk.as_mut_ptr() as u64,
            vec_len: chunk.len() as u64,
            max_pages: 0,
            category_inverted: filter.inverted,
            category_mask: filter.all,
            category_anyof_mask: filter.any,
            return_mask: filter.report,
        };
        // SAFETY: arg is a live pm_scan_arg of the declared size; its vector is live for vec_len elements.
        let got = unsafe {
            syscall(
                "PAGEMAP_SCAN",
                libc::SYS_ioctl,
                [pagemap.as_raw_fd() as usize, PAGEMAP_SCAN, (&raw mut arg) as usize, 0, 0, 0],
            )
        }?;
        for region in &chunk[..got.min(chunk.len())] {
            // A full vector may cut a run in two, and what was reported already may come again.
            match regions.last_mut() {
                Some(last) if region.end <= last.end => {}
                Some(last) if region.start <= last.end && last.categories == region.categories => {
                    last.end = region.end;
                }
                Some(last) if region.start < last.end => {
                    let start = last.end;
                    regions.push(Region { start, ..*region });
                }
                _ => regions.push(*region),
            }
        }
        // walk_end is only worth something if the vector was full.
        if got < chunk.len() || arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(())
}
