//! Copies of pages, kept for a snapshot ([`super::shield`]).

use super::PAGE;
use rewake_sys::memory::RemoteRange;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Copies of pages by address.
#[derive(Debug, Default, Clone)]
pub struct Copies {
    /// Later ones replace earlier ones.
    rounds: Vec<Arc<Round>>,
}

impl Copies {
    /// Adds copies made later.
    pub fn push(&mut self, round: Round) {
        if !round.pieces.is_empty() {
            self.rounds.push(Arc::new(round));
        }
    }

    /// The latest copy of the page at an address.
    #[must_use]
    pub fn page(&self, address: u64) -> Option<&[u8]> {
        self.rounds.iter().rev().find_map(|round| round.page(address))
    }
}

/// Copies made at one time.
#[derive(Debug, Default)]
pub struct Round {
    buffers: Vec<Vec<u8>>,
    /// Whole pages, ascending.
    pieces: Vec<Piece>,
}

/// Where a range of pages is.
#[derive(Debug)]
struct Piece {
    start: u64,
    len: usize,
    buffer: usize,
    offset: usize,
}

impl Round {
    /// Adds ranges of pages, which come after those that are there; their copies are in `buffer` one after the other.
    pub fn add(&mut self, ranges: &[RemoteRange], buffer: Vec<u8>) {
        let mut offset = 0;
        for &(start, len) in ranges {
            self.pieces.push(Piece { start, len, buffer: self.buffers.len(), offset });
            offset += len;
        }
        self.buffers.push(buffer);
    }

    /// The copy of the page at an address.
    #[must_use]
    pub fn page(&self, address: u64) -> Option<&[u8]> {
        let after = self.pieces.partition_point(|piece| piece.start <= address);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        let at = (address - piece.start) as usize;
        if at >= piece.len {
            return None;
        }
        let at = piece.offset + at;
        self.buffers.get(piece.buffer)?.get(at..at + PAGE as usize)
    }

    /// The ranges that were copied, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = RemoteRange> {
        self.pieces.iter().map(|piece| (piece.start, piece.len))
    }
}

/// Memory for copies that are made while nobody should wait for it.
#[derive(Debug)]
pub struct Reserve {
    /// How much may still be copied, in bytes.
    left: AtomicU64,
    /// Each has [`Reserve::BUFFER`] bytes that the kernel has given us already.
    ready: Mutex<Vec<Vec<u8>>>,
}

impl Reserve {
    /// What is copied at a time at most, in bytes.
    pub const BUFFER: usize = 256 << 10;

    /// For `most` bytes.
    #[must_use]
    pub fn new(most: u64) -> Reserve {
        Reserve { left: AtomicU64::new(most), ready: Mutex::default() }
    }

    /// Begins anew, with buffers for `ready` bytes at hand: to touch memory for the first time takes as long as to fill it.
    pub fn renew(&self, most: u64, ready: u64) {
        self.left.store(most, Ordering::SeqCst);
        let wanted = ready.min(most).div_ceil(Reserve::BUFFER as u64) as usize;
        let mut buffers = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        while buffers.len() < wanted {
            // Zeros would be pages that nobody has touched.
            buffers.push(vec![1; Reserve::BUFFER]);
        }
    }

    /// Takes so many bytes, [`Reserve::BUFFER`] at most. `None` if that would be more than may be copied.
    pub fn take(&self, len: usize) -> Option<Vec<u8>> {
        let spend = |left: u64| left.checked_sub(len as u64);
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).ok()?;
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = ready.unwrap_or_default();
        buffer.resize(len, 0);
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_copy_of_a_page_counts() {
        let round = |ranges: &[RemoteRange], with| {
            let mut round = Round::default();
            round.add(ranges, vec![with; ranges.iter().map(|range| range.1).sum()]);
            round
        };
        let mut copies = Copies::default();
        copies.push(round(&[(0x1000, 0x2000), (0x8000, 0x1000)], 1));
        copies.push(round(&[(0x2000, 0x1000)], 2));
        copies.push(Round::default());
        let byte = |address| copies.page(address).map(|page| page[0]);
        assert_eq!(byte(0x1000), Some(1));
        assert_eq!(byte(0x2000), Some(2));
        assert_eq!(byte(0x3000), None);
        assert_eq!(byte(0x8000), Some(1));
        assert_eq!(byte(0x9000), None);
        assert_eq!(byte(0), None);
    }

    #[test]
    fn no_more_is_taken_than_may_be() {
        let reserve = Reserve::new(10);
        assert_eq!(reserve.take(6).map(|b| b.len()), Some(6));
        assert_eq!(reserve.take(6), None);
        reserve.renew(8, 1 << 20);
        assert_eq!(reserve.take(8).map(|b| b.len()), Some(8));
        assert_eq!(reserve.take(1), None);
    }
}
