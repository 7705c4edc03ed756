//! Private memory that is copied before the instant of a snapshot, while the process runs: that of mappings of files, which
//! userfaultfd(2) cannot hold ([`super::shield`]). In its asynchronous mode it tells afterwards what was written to since, which
//! of such memory (relocated tables, `.data`) is little: only that is copied while the process stands still.

use super::copies::{Copies, Round};
use super::shield::steps;
use super::vma::{Vma, has_private_pages, status};
use super::{PAGE, tracking};
use rewake_sys::SyscallError;
use rewake_sys::pagemap::{self, Filter, Region, WPALLOWED, WRITTEN};
use rewake_sys::userfaultfd::Userfaultfd;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much is read at a time, in bytes.
const PIECE: u64 = 1 << 20;

/// What has been copied of a process.
#[derive(Debug)]
pub struct Early {
    /// Asynchronous ([`tracking::FEATURES`]).
    uffd: Userfaultfd,
    /// What is registered.
    ranges: Mutex<Vec<(u64, u64)>>,
    /// Each made when its pages had just been protected.
    copies: Mutex<Arc<Copies>>,
    /// How much may still be copied, of the whole tree.
    budget: Arc<AtomicU64>,
}

impl Early {
    /// For a process that has made `uffd`.
    #[must_use]
    pub fn new(uffd: Userfaultfd, budget: Arc<AtomicU64>) -> Early {
        Early { uffd, ranges: Mutex::default(), copies: Mutex::default(), budget }
    }

    /// Registers what it is for of these mappings.
    pub fn register(&self, vmas: &[Vma]) {
        let eligible: Vec<&Vma> = vmas.iter().filter(|vma| is_copied_early(vma)).collect();
        let mut ranges = Vec::new();
        for group in eligible.chunk_by(|a, b| a.entry.end == b.entry.start) {
            let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
            let (start, end) = (first.entry.start, last.entry.end);
            match self.uffd.register(start, end) {
                Ok(()) => ranges.push((start, end)),
                Err(e) => log::debug!("{start:#x}-{end:#x} is copied at the instant: {e}"),
            }
        }
        *self.ranges() = ranges;
    }

    /// Is a mapping registered here? It may have been divided since.
    #[must_use]
    pub fn covers(&self, start: u64, end: u64) -> bool {
        self.ranges().iter().any(|range| range.0 < end && start < range.1)
    }

    fn ranges(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been copied.
    #[must_use]
    pub fn copies(&self) -> Arc<Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_copies(&self, copies: Copies) {
        *self.copies.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(copies);
    }

    /// Protects and copies what is not, of a process that runs. `pagemap` and `memory` are its own in `/proc`. If it is more
    /// than may be copied, everything is left to the instant.
    ///
    /// # Errors
    /// The process is gone.
    pub fn prepare(&self, pagemap: &File, memory: &File) -> Result<(), SyscallError> {
        let plain = pagemap::FILE | pagemap::PFNZERO;
        let filter = Filter {
            inverted: plain,
            all: plain | WPALLOWED | WRITTEN,
            any: pagemap::PRESENT | pagemap::SWAPPED,
            report: 0,
        };
        let (mut round, mut regions) = (Round::default(), Vec::new());
        for (start, end) in self.ranges().clone() {
            // A page is protected before it is read: whatever is written to it from here on is noticed.
            pagemap::scan_protecting(pagemap.as_fd(), start, end, filter, &mut regions)?;
            for (start, end) in steps(regions.iter().map(|r| (r.start, r.end)), PIECE) {
                let spend = |left: u64| left.checked_sub(end - start);
                if self.budget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_err() {
                    log::debug!("too much is to be copied early");
                    self.leave();
                    return Ok(());
                }
                read(memory, start, end, &mut round);
            }
        }
        let mut copies = Copies::clone(&self.copies());
        copies.push(round);
        self.set_copies(copies);
        Ok(())
    }

    /// Those of `regions`, scanned at the instant with [`WPALLOWED`] and [`WRITTEN`] reported, that nobody has written to
    /// since they were protected.
    #[must_use]
    pub fn unwritten(&self, regions: &[Region]) -> Vec<(u64, u64)> {
        tracking::overlap(&tracking::unwritten(regions), &self.ranges())
    }

    /// Takes the mappings out of the userfaultfd, and forgets what was copied of them.
    pub fn leave(&self) {
        for (start, end) in std::mem::take(&mut *self.ranges()) {
            let _ = self.uffd.unregister(start, end);
        }
        self.set_copies(Copies::default());
    }
}

/// Reads what can be read of a range. What cannot is gone, or others have it by now.
fn read(memory: &File, start: u64, end: u64, round: &mut Round) {
    let len = (end - start) as usize;
    let mut bytes = vec![0; len];
    if memory.read_exact_at(&mut bytes, start).is_ok() {
        round.add(&[(start, len)], bytes);
        return;
    }
    for page in (start..end).step_by(PAGE as usize) {
        let mut bytes = vec![0; PAGE as usize];
        if memory.read_exact_at(&mut bytes, page).is_ok() {
            round.add(&[(page, PAGE as usize)], bytes);
        }
    }
}

/// Private mappings of files. Huge pages of hugetlbfs have no place here.
fn is_copied_early(vma: &Vma) -> bool {
    vma.entry.status & status::FILE_PRIVATE != 0
        && vma.entry.flags & libc::MAP_HUGETLB as u32 == 0
        && has_private_pages(&vma.entry)
}
