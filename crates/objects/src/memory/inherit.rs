//! Memory that comes to a task by inheritance: mappings and pages that the process which clones it has already, and that stay
//! shared between the two, copy-on-write, until one of them writes.

use super::fill::{Piece, fill};
use super::mm::{advices, is_for_clones};
use super::vma::{self, status};
use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::VmaEntry;
use rewake_image::{PageStore, StoredPages, StoredRun};
use std::collections::BTreeMap;
use std::ops::Range;

/// What a task has when its build script begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inheritance {
    /// Start addresses of the mappings it has, and the protection that they have.
    pub vmas: BTreeMap<u64, u32>,
    /// Mappings, or parts of them, that are not its own.
    pub foreign: Vec<Range<u64>>,
    /// Pages in its mappings that it does not have.
    pub surplus: Vec<Range<u64>>,
    /// What it has to fill, wherever that is.
    pub missing: StoredPages,
}

impl Inheritance {
    /// Does the task have this mapping?
    #[must_use]
    pub fn has(&self, vma: &VmaEntry) -> bool {
        self.vmas.contains_key(&vma.start)
    }

    /// Gives back what is not the task's own.
    pub(super) fn trim(&self, steps: &mut Steps) {
        for range in &self.foreign {
            unmap(steps, range);
        }
        for range in &self.surplus {
            // What is there then is zero, or as in the file: as of a page that was never written.
            let args = [range.start, range.end - range.start, libc::MADV_DONTNEED as u64];
            let label = Label::Vma(range.start, range.end);
            steps.must(label, Op::new(libc::SYS_madvise, &args));
        }
    }

    /// Gives a mapping its own protection.
    pub(super) fn protect(&self, steps: &mut Steps, vma: &VmaEntry) {
        if self.vmas.get(&vma.start).is_some_and(|prot| *prot != vma.prot) {
            let args = [vma.start, vma.end - vma.start, u64::from(vma.prot)];
            steps.must(Label::Vma(vma.start, vma.end), Op::new(libc::SYS_mprotect, &args));
        }
    }
}

/// Can this mapping be inherited? It must be the same in both but for its bounds and its protection.
#[must_use]
pub fn is_heritable(vma: &VmaEntry) -> bool {
    vma::has_private_pages(vma)
        && vma.status & (status::VDSO | status::AIORING) == 0
        // To lock a page is to have it for oneself.
        && vma.flags & libc::MAP_LOCKED as u32 == 0
        // A child would have no huge pages reserved for it.
        && vma.flags & libc::MAP_HUGETLB as u32 == 0
        && !advices(vma).any(is_for_clones)
}

/// The protection of a mapping while it is handed down: it has to be filled.
#[must_use]
pub fn protection(vma: &VmaEntry) -> u32 {
    vma.prot | libc::PROT_WRITE as u32
}

/// Maps what is to be handed down; `fd` is the number of the file behind it.
pub fn map(steps: &mut Steps, vma: &VmaEntry, fd: i32) {
    let label = Label::Vma(vma.start, vma.end);
    let len = vma.end - vma.start;
    let keep = (libc::MAP_PRIVATE | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE) as u32;
    let mut flags = vma.flags & keep | libc::MAP_FIXED_NOREPLACE as u32;
    let mut offset = vma.pgoff;
    if vma.status & status::FILE_PRIVATE == 0 {
        flags |= libc::MAP_ANONYMOUS as u32;
        offset = 0;
    }
    let (prot, flags) = (u64::from(protection(vma)), u64::from(flags));
    let args = [vma.start, len, prot, flags, fd as u64, offset];
    steps.must_be(label, vma.start as i64, Op::new(libc::SYS_mmap, &args));
    for advice in advices(vma) {
        steps.must(label, Op::new(libc::SYS_madvise, &[vma.start, len, advice]));
    }
}

/// Unmaps what is not handed down any further.
pub fn unmap(steps: &mut Steps, range: &Range<u64>) {
    let args = [range.start, range.end - range.start];
    steps.must(Label::Vma(range.start, range.end), Op::new(libc::SYS_munmap, &args));
}

/// Writes pages that are to be handed down.
///
/// # Errors
/// A page store was not handed over.
pub fn write(
    steps: &mut Steps,
    runs: &[StoredRun],
    pages: &dyn Fn(PageStore) -> Option<i32>,
) -> Result<(), Problem> {
    let piece = |run: &StoredRun| Piece {
        address: run.vaddr,
        len: run.bytes(),
        store: run.store,
        offset: run.offset,
    };
    let pieces: Vec<Piece> = runs.iter().map(piece).collect();
    fill(steps, &pieces, pages)
}
