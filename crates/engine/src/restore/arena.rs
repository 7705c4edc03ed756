//! Where the arena goes: a hole in every address space involved, and rings handed out in it one after the other.

use crate::error::{Error, Result};
use rewake_inject::ring::Ring;
use rewake_inject::stub::Arena;
use rewake_objects::memory::{PAGE, TASK_SIZE};
use std::ops::Range;

/// Address space between the hop range and the arena, and around both.
pub const GAP: u64 = 1 << 20;

/// Finds a hole of at least `len` bytes that none of the `taken` ranges touches: the largest there is.
///
/// # Errors
/// There is none that large.
pub fn find_hole(mut taken: Vec<Range<u64>>, len: u64) -> Result<Range<u64>> {
    // The vsyscall page lies above.
    taken.retain(|r| r.start < TASK_SIZE);
    taken.sort_unstable_by_key(|r| r.start);
    // Not in the lowest megabytes, which mmap_min_addr and 32-bit code want for themselves.
    let mut at = 1 << 28;
    let mut best = 0..0;
    for range in taken.into_iter().chain(std::iter::once(TASK_SIZE..TASK_SIZE)) {
        if range.start > at && range.start - at > best.end - best.start {
            best = at..range.start;
        }
        at = at.max(range.end);
    }
    if best.end - best.start < len + 4 * GAP {
        return Err(Error::new(format!(
            "no {len} bytes of address space are free in all tasks at once"
        )));
    }
    Ok(best)
}

/// Rings, handed out one after the other from a base address on.
#[derive(Debug)]
pub struct Space {
    base: u64,
    next: usize,
}

impl Space {
    /// The arena will start at `base`.
    #[must_use]
    pub fn new(base: u64) -> Space {
        Space { base, next: Arena::FIRST_RING }
    }

    /// Address of the arena's offset `at`.
    #[must_use]
    pub fn address(&self, at: usize) -> u64 {
        self.base + at as u64
    }

    /// Where the data of the next ring will lie.
    #[must_use]
    pub fn next_data_address(&self) -> u64 {
        Ring::data_address(self.address(self.next))
    }

    /// Hands out a ring: offset, length, bytes for data.
    pub fn take(&mut self, data: usize, ops: usize) -> (usize, usize, usize) {
        let at = self.next;
        let len = Ring::size_for(ops, data);
        self.next = (at + len).next_multiple_of(64);
        (at, len, data)
    }

    /// Hands out a word for [`Arena::gate`]: its offset.
    pub fn gate(&mut self) -> usize {
        let at = self.next;
        self.next += 64;
        at
    }

    /// Bytes of the whole arena.
    #[must_use]
    pub fn len(&self) -> usize {
        self.next.next_multiple_of(PAGE as usize)
    }
}

/// Where the code of an init goes: between the hop range and the arena.
#[must_use]
pub fn init_place(hop: u64) -> u64 {
    hop + GAP / 2
}

/// The hop range and the arena's base inside a hole: (hop, base).
#[must_use]
pub fn place(hole: &Range<u64>) -> (u64, u64) {
    // In the middle: what the programs map next, they map at the edges.
    let middle = (hole.start + (hole.end - hole.start) / 2) / GAP * GAP;
    (middle, middle + GAP)
}
