//! Comparing files without messages (page stores) with the checksums that the manifest has of them, and passing on what is
//! read on the way.
//!
//! Reading them is worth threads of its own: what they are split into is checked in any order, and the checksums of the
//! pieces of a file are put together in the end. Who needs the bytes gets them while they are in the processor's cache: reading
//! them from memory a second time would cost as much as the checksum.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Mutex, PoisonError},
};

use crc32fast::Hasher;

use crate::chain::PageStore;
use crate::error::{ImageError, Result};
use crate::workers::together;

/// Bytes that one worker takes at a time.
const PIECE: u64 = 16 << 20;
/// Bytes that are read at once: no more than stays in a cache.
const READ: usize = 256 << 10;

/// Files whose contents are still to be compared with the manifest.
#[derive(Debug, Default)]
pub struct RawCheck {
    files: Vec<Raw>,
}

#[derive(Debug)]
pub(crate) struct Raw {
    pub path: PathBuf,
    pub file: File,
    pub size: u64,
    /// What the manifest has; without it nothing is compared.
    pub crc: Option<u32>,
    /// Whose bytes these are, if they are pages as they are.
    pub store: Option<PageStore>,
    /// What is read of it: all, or only these bytes (ascending).
    pub wanted: Option<Vec<(u64, u64)>>,
}

/// Who gets the bytes of page stores: the store, the offset in it, and the bytes.
pub type Taker<'a, E> = &'a (dyn Fn(PageStore, u64, &[u8]) -> Result<(), E> + Sync);

impl RawCheck {
    pub(crate) fn new(files: Vec<Raw>) -> Self {
        RawCheck { files }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }

    /// Has a page store read even if it is not to be checked: at least the ranges `wanted` (ascending offsets, start and end).
    ///
    /// # Errors
    /// Those of `open`, and the file cannot be examined.
    pub fn want(
        &mut self,
        store: PageStore,
        wanted: Vec<(u64, u64)>,
        open: impl FnOnce() -> Result<File>,
    ) -> Result<()> {
        if self.files.iter().any(|file| file.store == Some(store)) {
            return Ok(());
        }
        let path = PathBuf::from(crate::kind::PAGES.file_name(store.pages_id));
        let file = open()?;
        let size = file.metadata().map_err(|e| ImageError::io("examine", &path, e))?.len();
        let (store, wanted) = (Some(store), Some(wanted));
        self.files.push(Raw { path, file, size, crc: None, store, wanted });
        Ok(())
    }

    /// Reads all files, with as many threads as `workers`.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names a file that is not as it was.
    pub fn run(&self, workers: usize) -> Result<()> {
        self.run_with::<ImageError>(workers, &|_, _, _| Ok(()))
    }

    /// As [`RawCheck::run`]; `take` gets all bytes of page stores, in any order, before it is known whether they are as they were.
    ///
    /// # Errors
    /// As [`RawCheck::run`], or that of `take`.
    pub fn run_with<E: From<ImageError> + Send>(
        &self,
        workers: usize,
        take: Taker<'_, E>,
    ) -> Result<(), E> {
        let pieces: Vec<(usize, u64)> = self
            .files
            .iter()
            .enumerate()
            .flat_map(|(i, file)| file.pieces().map(move |offset| (i, offset)))
            .collect();
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Hasher>>> = Mutex::new(pieces.iter().map(|_| None).collect());
        let work = || -> Result<(), E> {
            let mut buffer = vec![0; READ.min(self.bytes() as usize)];
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(file, offset)) = pieces.get(at) else { return Ok(()) };
                let hasher = self.files[file].piece(offset, &mut buffer, take)?;
                done.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(hasher);
            }
        };
        together(workers.min(pieces.len()), work)?;
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut sums = vec![Hasher::new(); self.files.len()];
        for ((file, _), piece) in pieces.iter().zip(done) {
            if let Some(piece) = piece {
                sums[*file].combine(&piece);
            }
        }
        for (file, sum) in self.files.iter().zip(sums) {
            if file.crc.is_some_and(|crc| sum.finalize() != crc) {
                let what = "its checksum differs".to_owned();
                return Err(ImageError::Damaged { path: file.path.clone(), what }.into());
            }
        }
        Ok(())
    }
}

impl Raw {
    /// Where the pieces begin that are to be read.
    fn pieces(&self) -> impl Iterator<Item = u64> {
        let wants = |start: u64, end: u64| {
            let Some(wanted) = &self.wanted else { return true };
            let at = wanted.partition_point(|(_, past)| *past <= start);
            wanted.get(at).is_some_and(|(first, _)| *first < end)
        };
        let all = (0..self.size.div_ceil(PIECE)).map(|n| n * PIECE);
        all.filter(move |offset| wants(*offset, offset + PIECE))
    }

    fn piece<E: From<ImageError>>(
        &self,
        offset: u64,
        buffer: &mut [u8],
        take: Taker<'_, E>,
    ) -> Result<Hasher, E> {
        let end = self.size.min(offset + PIECE);
        let mut hasher = Hasher::new();
        let mut at = offset;
        while at < end {
            let part = ((end - at) as usize).min(buffer.len());
            let part = &mut buffer[..part];
            self.file.read_exact_at(part, at).map_err(|e| ImageError::io("read", &self.path, e))?;
            if self.crc.is_some() {
                hasher.update(part);
            }
            if let Some(store) = self.store {
                take(store, at, part)?;
            }
            at += part.len() as u64;
        }
        Ok(hasher)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(content: &[u8], crc: u32) -> Result<()> {
        let path = std::env::temp_dir().join(format!("rewake-raw-{}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let size = content.len() as u64;
        let store = Some(PageStore { depth: 0, pages_id: 1 });
        let check =
            RawCheck::new(vec![Raw { path, file, size, crc: Some(crc), store, wanted: None }]);
        let taken = Mutex::new(vec![0; content.len()]);
        let result = check.run_with::<ImageError>(3, &|_, at, bytes| {
            taken.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        });
        assert_eq!(*taken.lock().unwrap(), content, "everything is passed on");
        result
    }

    #[test]
    fn only_what_is_wanted_is_read_of_what_is_not_checked() {
        let path = std::env::temp_dir().join(format!("rewake-want-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; 3 * PIECE as usize]).unwrap();
        let mut check = RawCheck::default();
        let store = PageStore { depth: 0, pages_id: 1 };
        let wanted = vec![(PIECE + 5, PIECE + 6)];
        check.want(store, wanted, || Ok(File::open(&path).unwrap())).unwrap();
        check.want(store, Vec::new(), || panic!("it is there already")).unwrap();
        std::fs::remove_file(&path).unwrap();
        let seen = Mutex::new(0);
        let take = |_, at: u64, bytes: &[u8]| {
            assert!((PIECE..2 * PIECE).contains(&at));
            *seen.lock().unwrap() += bytes.len() as u64;
            Ok(())
        };
        check.run_with::<ImageError>(2, &take).unwrap();
        assert_eq!(*seen.lock().unwrap(), PIECE);
    }

    #[test]
    fn the_pieces_add_up() {
        let mut content: Vec<u8> = (0..2 * PIECE + 4097).map(|i| ((i * 7) >> 5) as u8).collect();
        let crc = crc32fast::hash(&content);
        check(&content, crc).unwrap();
        for at in [0, PIECE as usize, content.len() - 1] {
            content[at] ^= 1;
            assert!(matches!(check(&content, crc), Err(ImageError::Damaged { .. })), "{at}");
            content[at] ^= 1;
        }
    }
}
