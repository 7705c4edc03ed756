//! Pages of equal content, stored once (`dump --dedup`): what is written to the page stores goes through a sieve.
//!
//! A page is written if none like it has been, in whichever store; otherwise the pagemap tells where that one is. A hash finds it,
//! and its bytes are compared, so that nobody need trust the hash. Two threads that come upon the same page at the same time may
//! both write it: they do not wait for each other.

use super::layout::Moved;
use rewake_image::{PageStream, StorePage};
use rewake_objects::memory::PAGE;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What all page stores of a dump have so far.
#[derive(Debug, Default)]
pub struct Sieve {
    /// Where the page of a hash is.
    known: Mutex<HashMap<u64, StorePage>>,
    files: Mutex<HashMap<u32, Arc<File>>>,
    moved: Mutex<HashMap<u32, Vec<Moved>>>,
}

impl Sieve {
    /// Where the pages are that were planned for each store.
    pub fn into_moved(self) -> HashMap<u32, Vec<Moved>> {
        self.moved.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to write a store through it.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn begin<'s, 'w>(&'s self, store: u32, to: PageStream<'w>) -> io::Result<Sifted<'s, 'w>> {
        let file = Arc::new(to.file()?);
        lock(&self.files).insert(store, file);
        Ok(Sifted { sieve: self, store, to, planned: 0, stored: 0, moved: Vec::new() })
    }

    /// Is the page at `place` this one?
    fn has(&self, place: StorePage, page: &[u8]) -> io::Result<bool> {
        let Some(file) = lock(&self.files).get(&place.store).cloned() else { return Ok(false) };
        let mut there = [0; PAGE as usize];
        file.read_exact_at(&mut there, place.page * PAGE)?;
        Ok(there == *page)
    }
}

/// Whatever a thread that panicked was doing, these are only lists of what is written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A page store that is written through a sieve: whole pages.
#[derive(Debug)]
pub struct Sifted<'s, 'w> {
    sieve: &'s Sieve,
    store: u32,
    to: PageStream<'w>,
    /// Pages that have come.
    planned: u64,
    /// Pages that were written.
    stored: u64,
    moved: Vec<Moved>,
}

impl Sifted<'_, '_> {
    /// Completes the store; says how many pages it has.
    ///
    /// # Errors
    /// What is left of it cannot be written.
    pub fn finish(self) -> io::Result<u64> {
        self.to.finish()?;
        lock(&self.sieve.moved).insert(self.store, self.moved);
        Ok(self.stored)
    }

    /// Notes where the next page is.
    fn note(&mut self, place: StorePage) {
        match self.moved.last_mut() {
            Some(last) if last.follows(place) => last.pages += 1,
            _ => self.moved.push(Moved { page: self.planned, pages: 1, place }),
        }
        self.planned += 1;
    }
}

impl Write for Sifted<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let pages = bytes.chunks_exact(PAGE as usize);
        if !pages.remainder().is_empty() {
            return Err(io::Error::other("pages are written whole"));
        }
        let hashes: Vec<u64> = pages.clone().map(hash).collect();
        let known: Vec<Option<StorePage>> = {
            let known = lock(&self.sieve.known);
            hashes.iter().map(|hash| known.get(hash).copied()).collect()
        };
        // Of those that come now: the hash, the page, and where it is to be.
        let mut new: Vec<(u64, &[u8], StorePage)> = Vec::new();
        for ((page, hash), known) in pages.zip(hashes).zip(known) {
            let stored = match known {
                Some(place) if self.sieve.has(place, page)? => Some(place),
                _ => new.iter().find(|n| n.0 == hash && n.1 == page).map(|n| n.2),
            };
            let place = stored.unwrap_or_else(|| {
                let page_number = self.stored + new.len() as u64;
                let place = StorePage { store: self.store, page: page_number };
                new.push((hash, page, place));
                place
            });
            self.note(place);
        }
        if new.len() * PAGE as usize == bytes.len() {
            self.to.write_all(bytes)?;
        } else {
            let mut gathered = Vec::with_capacity(new.len() * PAGE as usize);
            new.iter().for_each(|(_, page, _)| gathered.extend_from_slice(page));
            self.to.write_all(&gathered)?;
        }
        self.stored += new.len() as u64;
        let mut known = lock(&self.sieve.known);
        for (hash, _, place) in new {
            known.entry(hash).or_insert(place);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Equal pages have equal hashes; four lanes, so that the processor need not wait for one multiplication after the other.
fn hash(page: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [1u64, 2, 3, 4];
    for block in page.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = word.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    lanes.iter().fold(0, |sum: u64, lane| (sum.rotate_left(17) ^ lane).wrapping_mul(FACTOR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_image::ImageWriter;

    #[test]
    fn equal_pages_are_written_once() {
        let dir = std::env::temp_dir().join(format!("rewake-sieve-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let images = ImageWriter::create(&dir).unwrap();
        let page = |byte: u8| vec![byte; PAGE as usize];
        let pages = |list: &[u8]| list.iter().flat_map(|b| page(*b)).collect::<Vec<u8>>();
        let sieve = Sieve::default();
        let mut first = sieve.begin(7, images.page_stream(7).unwrap()).unwrap();
        first.write_all(&pages(&[1, 2, 2, 1, 3])).unwrap();
        first.write_all(&pages(&[4, 5])).unwrap();
        assert_eq!(first.finish().unwrap(), 5);
        let mut second = sieve.begin(8, images.page_stream(8).unwrap()).unwrap();
        second.write_all(&pages(&[9, 2, 3, 4, 8])).unwrap();
        assert!(second.write_all(&[0; 5]).is_err());
        assert_eq!(second.finish().unwrap(), 2);
        assert_eq!(std::fs::read(dir.join("pages-7.img")).unwrap(), pages(&[1, 2, 3, 4, 5]));
        assert_eq!(std::fs::read(dir.join("pages-8.img")).unwrap(), pages(&[9, 8]));
        let moved = sieve.into_moved();
        let of = |store: u32| {
            let moved = moved[&store].iter();
            moved.map(|m| (m.page, m.pages, m.place.store, m.place.page)).collect::<Vec<_>>()
        };
        assert_eq!(of(7), [(0, 2, 7, 0), (2, 1, 7, 1), (3, 1, 7, 0), (4, 3, 7, 2)]);
        assert_eq!(of(8), [(0, 1, 8, 0), (1, 3, 7, 1), (4, 1, 8, 1)]);
        drop(images);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_hash_sees_every_bit() {
        let mut page = vec![0u8; PAGE as usize];
        let mut seen = std::collections::HashSet::from([hash(&page)]);
        for bit in (0..PAGE as usize * 8).step_by(7) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(seen.insert(hash(&page)), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
