//! What is known of the pages of a process at the instant, and copies of them.

use super::pages_of;
use crate::memory::PAGE;
use crate::memory::copies::{Copies, Round};
use crate::memory::pages::Run;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Not copied yet.
pub(super) const OPEN: u8 = 0;
/// In [`Snapshot::kept`].
pub(super) const KEPT: u8 = 1;
/// Copied to the images.
pub(super) const DONE: u8 = 2;
/// In [`Snapshot::early`] or [`Snapshot::now`], as it was at the instant.
pub(super) const COPIED: u8 = 3;

/// The instant.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Ascending.
    pub(super) runs: Vec<Run>,
    /// The number of each run's first page.
    pub(super) first: Vec<usize>,
    /// [`OPEN`], [`KEPT`], [`DONE`] or [`COPIED`], by page.
    pub(super) pages: Vec<AtomicU8>,
    /// Pages kept since, by address.
    pub(super) kept: Mutex<HashMap<u64, Box<[u8]>>>,
    /// Pages copied before.
    pub(super) early: Arc<Copies>,
    /// Pages copied at the instant.
    pub(super) now: OnceLock<Round>,
}

impl Snapshot {
    pub(super) fn new(runs: &[Run], early: Arc<Copies>) -> Snapshot {
        let mut pages = Vec::new();
        let mut first = Vec::with_capacity(runs.len());
        for run in runs {
            first.push(pages.len());
            pages.resize_with(pages.len() + run.pages() as usize, || AtomicU8::new(OPEN));
        }
        Snapshot {
            runs: runs.to_vec(),
            first,
            pages,
            kept: Mutex::default(),
            early,
            now: OnceLock::new(),
        }
    }

    /// The run that an address is in.
    pub(super) fn run(&self, address: u64) -> Option<usize> {
        let after = self.runs.partition_point(|run| run.start <= address);
        after.checked_sub(1).filter(|at| self.runs[*at].end > address)
    }

    /// The state of the page at an address.
    pub(super) fn page(&self, address: u64) -> Option<&AtomicU8> {
        let run = self.run(address)?;
        self.pages.get(self.first[run] + ((address - self.runs[run].start) / PAGE) as usize)
    }

    pub(super) fn is(&self, address: u64, state: u8) -> bool {
        self.page(address).is_some_and(|page| page.load(Ordering::SeqCst) == state)
    }

    /// Those pages of a part of a run that nobody has copied yet.
    pub(super) fn open_parts(
        &self,
        (run, start, end): (usize, u64, u64),
    ) -> Vec<(usize, u64, u64)> {
        let mut parts: Vec<(usize, u64, u64)> = Vec::new();
        for page in (start..end).step_by(PAGE as usize).filter(|page| self.is(*page, OPEN)) {
            match parts.last_mut() {
                Some(last) if last.2 == page => last.2 = page + PAGE,
                _ => parts.push((run, page, page + PAGE)),
            }
        }
        parts
    }

    /// Takes the copies that were made of pages of `unwritten` ranges before.
    pub(super) fn take_early(&self, unwritten: &[(u64, u64)]) {
        for page in unwritten.iter().flat_map(|(start, end)| (*start..*end).step_by(PAGE as usize))
        {
            if let Some(state) = self.page(page).filter(|_| self.early.page(page).is_some()) {
                state.store(COPIED, Ordering::SeqCst);
            }
        }
    }

    /// Takes copies that were made at the instant, of pages that nobody has copied.
    pub(super) fn take_now(&self, round: Round) {
        let round = self.now.get_or_init(|| round);
        for page in round.ranges().flat_map(|range| pages_of(&range)) {
            if let Some(state) = self.page(page) {
                // What is kept already came first.
                let _ = state.compare_exchange(OPEN, COPIED, Ordering::SeqCst, Ordering::SeqCst);
            }
        }
    }

    /// The copy of a page that was made at the instant or before.
    pub(super) fn copied(&self, page: u64) -> Option<&[u8]> {
        self.now.get().and_then(|now| now.page(page)).or_else(|| self.early.page(page))
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, HashMap<u64, Box<[u8]>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a page that nobody has copied yet.
    pub(super) fn keep(&self, address: u64, bytes: &[u8]) {
        let Some(page) = self.page(address) else { return };
        let mut kept = self.kept();
        if page.compare_exchange(OPEN, KEPT, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            kept.insert(address, bytes.into());
        }
    }
}
