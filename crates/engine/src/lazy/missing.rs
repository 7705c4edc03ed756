//! What an address space still lacks, and where the images have it. Pure: no system call is made here.

use rewake_objects::memory::PAGE;
use rewake_sys::mapped::Mapped;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Memory whose content lies in one piece in a page store `S`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<S = Arc<Mapped>> {
    /// Where it belongs.
    pub address: u64,
    /// Bytes, a multiple of the page size; never 0.
    pub len: u64,
    /// The page store.
    pub store: S,
    /// Where in it, in bytes.
    pub offset: u64,
}

impl<S: Clone> Piece<S> {
    fn end(&self) -> u64 {
        self.address + self.len
    }

    /// The part of it that lies in a range.
    fn within(&self, range: &Range<u64>) -> Option<Piece<S>> {
        let start = self.address.max(range.start);
        let end = self.end().min(range.end);
        let offset = self.offset + start.checked_sub(self.address)?;
        (start < end).then(|| Piece {
            address: start,
            len: end - start,
            offset,
            store: self.store.clone(),
        })
    }
}

/// Pieces that are not there yet, by address, without overlap.
#[derive(Debug, Clone)]
pub struct Missing<S = Arc<Mapped>> {
    pieces: BTreeMap<u64, Piece<S>>,
}

impl<S> Default for Missing<S> {
    fn default() -> Self {
        Missing { pieces: BTreeMap::new() }
    }
}

impl<S: Clone> Missing<S> {
    /// All of an address space.
    pub fn new(pieces: impl IntoIterator<Item = Piece<S>>) -> Missing<S> {
        let mut missing = Missing::default();
        for piece in pieces.into_iter().filter(|p| p.len > 0) {
            missing.remove(&(piece.address..piece.end()));
            missing.pieces.insert(piece.address, piece);
        }
        missing
    }

    /// Is everything there?
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How many bytes are missing.
    pub fn bytes(&self) -> u64 {
        self.pieces.values().map(|p| p.len).sum()
    }

    /// The pieces that touch a range.
    fn touching(&self, range: &Range<u64>) -> Vec<Piece<S>> {
        let before = self.pieces.range(..range.start).next_back();
        let before = before.filter(|(_, p)| p.end() > range.start);
        let inside = self.pieces.range(range.start..range.end.max(range.start));
        before.into_iter().chain(inside).map(|(_, p)| p.clone()).collect()
    }

    /// Forgets what lies in a range, and tells what that was.
    pub fn remove(&mut self, range: &Range<u64>) -> Vec<Piece<S>> {
        let mut removed = Vec::new();
        for piece in self.touching(range) {
            self.pieces.remove(&piece.address);
            for rest in [piece.address..range.start, range.end..piece.end()] {
                if let Some(rest) = piece.within(&rest) {
                    self.pieces.insert(rest.address, rest);
                }
            }
            removed.extend(piece.within(range));
        }
        removed
    }

    /// Takes the piece that holds a page, as far as it lies in the same block of `block` bytes (a power of two).
    pub fn take_around(&mut self, page: u64, block: u64) -> Option<Piece<S>> {
        let piece = self.touching(&(page..page + PAGE)).into_iter().next()?;
        let start = page & !(block - 1);
        let part = piece.within(&(start..start.saturating_add(block)))?;
        self.remove(&(part.address..part.end()));
        Some(part)
    }

    /// Takes the first piece from an address on, or else from the start; at most `most` bytes of it.
    pub fn take_next(&mut self, from: u64, most: u64) -> Option<Piece<S>> {
        let before = self.pieces.range(..from).next_back().filter(|(_, p)| p.end() > from);
        let next = before.or_else(|| self.pieces.range(from..).next());
        let piece = next.or_else(|| self.pieces.iter().next()).map(|(_, p)| p.clone())?;
        let start = if piece.end() > from { piece.address.max(from) } else { piece.address };
        let part = piece.within(&(start..start.saturating_add(most)))?;
        self.remove(&(part.address..part.end()));
        Some(part)
    }

    /// What was taken is missing again.
    pub fn put_back(&mut self, piece: Piece<S>) {
        self.remove(&(piece.address..piece.end()));
        self.pieces.insert(piece.address, piece);
    }

    /// Memory has moved, over what was there before.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.remove(&(from..from.saturating_add(len)));
        self.remove(&(to..to.saturating_add(len)));
        for piece in moved {
            let address = piece.address - from + to;
            self.pieces.insert(address, Piece { address, ..piece });
        }
    }

    /// The hole around a page that nothing is missing in: between the pieces before and after it.
    pub fn hole(&self, page: u64) -> Range<u64> {
        let before = self.pieces.range(..=page).next_back().map_or(0, |(_, p)| p.end());
        let after = self.pieces.range(page..).next().map_or(u64::MAX, |(start, _)| *start);
        before..after
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn piece(page: u64, pages: u64, offset: u64) -> Piece<()> {
        Piece { address: page * PAGE, len: pages * PAGE, store: (), offset: offset * PAGE }
    }

    /// Page by page: which page of the store belongs there.
    fn pages(missing: &Missing<()>) -> BTreeMap<u64, u64> {
        let all = missing.pieces.values();
        all.flat_map(|p| (0..p.len / PAGE).map(|i| (p.address / PAGE + i, p.offset / PAGE + i)))
            .collect()
    }

    #[test]
    fn blocks_are_taken_from_one_piece() {
        let mut missing = Missing::new([piece(10, 20, 100), piece(40, 1, 500)]);
        let got = missing.take_around(17 * PAGE, 16 * PAGE).unwrap();
        assert_eq!(got, piece(16, 14, 106));
        assert!(missing.take_around(17 * PAGE, 16 * PAGE).is_none());
        assert_eq!(missing.take_around(10 * PAGE, 16 * PAGE).unwrap(), piece(10, 6, 100));
        assert_eq!(missing.bytes(), PAGE);
        assert_eq!(missing.hole(20 * PAGE), 0..40 * PAGE);
    }

    #[test]
    fn next_goes_round() {
        let mut missing = Missing::new([piece(1, 4, 0), piece(9, 2, 50)]);
        assert_eq!(missing.take_next(3 * PAGE, PAGE).unwrap(), piece(3, 1, 2));
        assert_eq!(missing.take_next(4 * PAGE, 8 * PAGE).unwrap(), piece(4, 1, 3));
        assert_eq!(missing.take_next(5 * PAGE, 8 * PAGE).unwrap(), piece(9, 2, 50));
        assert_eq!(missing.take_next(11 * PAGE, 8 * PAGE).unwrap(), piece(1, 2, 0));
        assert!(missing.take_next(0, PAGE).is_none());
    }

    #[derive(Debug, Clone)]
    enum Change {
        Remove(u64, u64),
        Remap(u64, u64, u64),
        Around(u64),
        Next(u64, u64),
        Back(u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            (0..64u64, 1..16u64).prop_map(|(at, n)| Change::Remove(at, n)),
            (0..64u64, 0..64u64, 1..8u64).prop_map(|(from, to, n)| Change::Remap(from, to, n)),
            (0..64u64).prop_map(Change::Around),
            (0..64u64, 1..16u64).prop_map(|(at, n)| Change::Next(at, n)),
            (0..64u64).prop_map(Change::Back),
        ]
    }

    proptest! {
        /// Whatever happens, each page is the one it would be if every page were kept by itself.
        #[test]
        fn like_single_pages(changes in prop::collection::vec(change(), 1..60)) {
            let mut missing = Missing::new([piece(2, 20, 0), piece(30, 10, 200), piece(50, 5, 300)]);
            let mut plain = pages(&missing);
            for change in changes {
                match change {
                    Change::Remove(at, n) => {
                        missing.remove(&(at * PAGE..(at + n) * PAGE));
                        plain.retain(|page, _| !(at..at + n).contains(page));
                    }
                    Change::Remap(from, to, n) => {
                        // mremap(2) refuses ranges that overlap.
                        if from < to + n && to < from + n { continue }
                        missing.remap(from * PAGE, to * PAGE, n * PAGE);
                        let moved: Vec<_> = (from..from + n).filter_map(|p| Some((p - from + to, plain.remove(&p)?))).collect();
                        plain.retain(|page, _| !(to..to + n).contains(page));
                        plain.extend(moved);
                    }
                    Change::Around(at) => {
                        let had = plain.contains_key(&at);
                        let got = missing.take_around(at * PAGE, 8 * PAGE);
                        prop_assert_eq!(got.is_some(), had);
                        if let Some(p) = got { for i in 0..p.len / PAGE {
                            prop_assert_eq!(plain.remove(&(p.address / PAGE + i)), Some(p.offset / PAGE + i));
                            prop_assert_eq!((p.address / PAGE + i) / 8, at / 8);
                        } }
                    }
                    Change::Next(at, n) => {
                        let got = missing.take_next(at * PAGE, n * PAGE);
                        prop_assert_eq!(got.is_some(), !plain.is_empty());
                        if let Some(p) = got {
                            let first = plain.range(at..).next().or(plain.iter().next()).map(|(p, _)| *p);
                            prop_assert_eq!(first, Some(p.address / PAGE));
                            prop_assert!(p.len <= n * PAGE);
                            for i in 0..p.len / PAGE {
                                prop_assert_eq!(plain.remove(&(p.address / PAGE + i)), Some(p.offset / PAGE + i));
                            }
                        }
                    }
                    Change::Back(at) => {
                        missing.put_back(piece(at, 1, at + 1000));
                        plain.insert(at, at + 1000);
                    }
                }
                prop_assert_eq!(&pages(&missing), &plain);
            }
        }
    }
}
