//! One address space that lacks pages.
//!
//! The order of things rests on its *gate*. Whoever copies holds it shared, from the moment at which it takes a piece out of
//! what is missing; whoever reads messages holds it alone. A process that drops or moves memory waits until its message is
//! read: so nothing is ever copied to where it does not belong any more.

use super::missing::{Missing, Piece};
use crate::error::{Error, Result};
use rewake_objects::memory::PAGE;
use rewake_sys::Errno;
use rewake_sys::userfaultfd::Userfaultfd;
use rewake_sys::userfaultfd::event::Event;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// A fault brings what belongs around it, up to so many bytes.
const AROUND: u64 = 64 << 10;

/// What a copy came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Brought {
    /// All of it is there, or not wanted any more.
    Done,
    /// Messages must be read first, or memory is short: the rest is missing again.
    NotNow(Errno),
}

/// A child that an address space was copied for: its userfaultfd and what it lacks.
pub type Child = (Userfaultfd, Missing);

/// An address space.
#[derive(Debug)]
pub struct Space {
    /// Its number.
    pub key: u64,
    /// Its process in the images.
    pub pid: i32,
    /// For messages.
    pub name: String,
    /// Its userfaultfd.
    pub uffd: Userfaultfd,
    /// The mappings that were registered at first.
    pub mappings: Vec<Range<u64>>,
    gate: RwLock<()>,
    missing: Mutex<Missing>,
    /// Where the background goes on.
    next: AtomicU64,
    /// Pages that threads wait for although they could not be brought yet.
    waiting: Mutex<Vec<u64>>,
}

/// A value that a panicking thread has held is as good as ever: nothing here is changed in two steps.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    /// One that lacks `missing`.
    pub fn new(
        key: u64,
        pid: i32,
        name: String,
        uffd: Userfaultfd,
        missing: Missing,
        mappings: Vec<Range<u64>>,
    ) -> Space {
        let (gate, next, waiting) = Default::default();
        let missing = Mutex::new(missing);
        Space { key, pid, name, uffd, mappings, gate, missing, next, waiting }
    }

    /// Bytes that are missing.
    pub fn bytes(&self) -> u64 {
        lock(&self.missing).bytes()
    }

    /// Does any thread wait for a page that could not be brought yet?
    pub fn has_waiting(&self) -> bool {
        !lock(&self.waiting).is_empty()
    }

    fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the next piece of at most `most` bytes; `None` if nothing is missing.
    ///
    /// # Errors
    /// The images cannot be read.
    pub fn bring_next(&self, most: u64) -> Result<Option<(u64, Brought)>> {
        let _shared = self.shared();
        let from = self.next.load(Ordering::Relaxed);
        let Some(piece) = lock(&self.missing).take_next(from, most) else { return Ok(None) };
        self.next.store(piece.address + piece.len, Ordering::Relaxed);
        let bytes = piece.len;
        Ok(Some((bytes, self.bring(piece)?)))
    }

    /// Brings what is missing of a range.
    ///
    /// # Errors
    /// The images cannot be read.
    pub fn bring_range(&self, range: &Range<u64>) -> Result<u64> {
        let _shared = self.shared();
        let pieces = lock(&self.missing).remove(range);
        let mut bytes = 0;
        for piece in pieces {
            bytes += piece.len;
            self.bring(piece)?;
        }
        Ok(bytes)
    }

    /// Reads what the process has done and serves its faults; true if it lacks nothing any more. Each block that was touched
    /// is told.
    ///
    /// # Errors
    /// The images cannot be read.
    pub fn look(
        &self,
        children: &mut Vec<Child>,
        mut touched: impl FnMut(u64, u64),
    ) -> Result<bool> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut faults = std::mem::take(&mut *lock(&self.waiting));
        loop {
            let events = match self.uffd.events() {
                Ok(events) => events,
                Err(e) if e.errno == Errno::AGAIN => Vec::new(),
                Err(e) => return Err(Error::new(format!("{}: {e}", self.name))),
            };
            let last = events.is_empty();
            for event in events {
                let mut missing = lock(&self.missing);
                match event {
                    Event::Fault(address) => faults.push(address & !(PAGE - 1)),
                    Event::Fork(uffd) => children.push((uffd, missing.clone())),
                    Event::Remap { from, to, len } => missing.remap(from, to, len),
                    Event::Remove(start, end) | Event::Unmap(start, end) => {
                        missing.remove(&(start..end));
                    }
                }
            }
            for page in std::mem::take(&mut faults) {
                if !self.serve(page, &mut touched)? {
                    lock(&self.waiting).push(page);
                }
            }
            if last {
                return Ok(!self.has_waiting() && lock(&self.missing).is_empty());
            }
        }
    }

    /// Brings a page that a thread waits for; false if it has to wait longer.
    fn serve(&self, page: u64, touched: &mut impl FnMut(u64, u64)) -> Result<bool> {
        let taken = lock(&self.missing).take_around(page, AROUND);
        let Some(piece) = taken else { return self.serve_hole(page) };
        touched(piece.address, piece.len);
        let brought = self.bring(piece)?;
        Ok(brought == Brought::Done)
    }

    /// A page that the images do not have is a page of zeros, and so is what follows it in the same hole. (Mappings stay as
    /// they are registered: parts of them cannot be let go, for the program may be about to move the whole.)
    fn serve_hole(&self, page: u64) -> Result<bool> {
        let hole = lock(&self.missing).hole(page);
        let mapping = self.mappings.iter().find(|m| m.contains(&page));
        let block = (page & !(AROUND - 1)).saturating_add(AROUND);
        let end = mapping.map_or(page + PAGE, |m| block.min(hole.end).min(m.end));
        let mut zeros = self.uffd.zero(page, end - page);
        if zeros.bytes == 0 && end - page > PAGE {
            zeros = self.uffd.zero(page, PAGE);
        }
        match zeros.error.filter(|_| zeros.bytes == 0) {
            None => Ok(true),
            Some(Errno::EXIST) => Ok(self.uffd.wake(page, PAGE).is_ok()),
            Some(Errno::AGAIN | Errno::NOMEM) => Ok(false),
            // It is not mapped any more, or not registered, or the process is gone: nobody waits for us.
            Some(Errno::NOENT | Errno::SRCH | Errno::NOSPC | Errno::INVAL) => Ok(true),
            Some(e) => Err(Error::new(format!("{}: page {page:#x}: {e}", self.name))),
        }
    }

    /// Copies a piece that was taken; the gate is held.
    fn bring(&self, piece: Piece) -> Result<Brought> {
        // Mappings that the program has divided are filled part by part.
        let mut step = piece.len;
        let whole = piece.len;
        let mut rest = piece;
        let skip = |rest: &mut Piece, bytes: u64| {
            rest.address += bytes;
            rest.offset += bytes;
            rest.len -= bytes;
        };
        while rest.len > 0 {
            let len = rest.len.min(step);
            let filled = self.uffd.copy(rest.address, &rest.store, rest.offset, len);
            skip(&mut rest, filled.bytes);
            match filled.error {
                None => step = whole,
                Some(_) if filled.bytes > 0 => {}
                // Somebody may wait for a page that has come another way.
                Some(Errno::EXIST) => {
                    let _ = self.uffd.wake(rest.address, PAGE);
                    skip(&mut rest, PAGE);
                }
                Some(e @ (Errno::AGAIN | Errno::NOMEM)) => {
                    lock(&self.missing).put_back(rest);
                    return Ok(Brought::NotNow(e));
                }
                Some(Errno::NOENT) if len > PAGE => step = (len / 2).next_multiple_of(PAGE),
                // Not mapped any more, or not registered: something new is there.
                Some(Errno::NOENT | Errno::INVAL) => skip(&mut rest, PAGE),
                Some(Errno::SRCH | Errno::NOSPC) => {
                    *lock(&self.missing) = Missing::default();
                    return Ok(Brought::Done);
                }
                Some(Errno::FAULT) => {
                    return Err(Error::new(format!(
                        "{}: page {:#x} cannot be read from its pages file",
                        self.name, rest.address
                    ))
                    .hint("see whether the images are still whole and their disk works"));
                }
                Some(e) => {
                    let page = rest.address;
                    return Err(Error::new(format!("{}: page {page:#x}: {e}", self.name)));
                }
            }
        }
        Ok(Brought::Done)
    }
}
