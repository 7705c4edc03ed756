//! Comparing files without messages (page stores) with the checksums that the manifest has of them.
//!
//! Reading them is worth threads of its own: what they are split into is checked in any order, and the checksums of the
//! pieces of a file are put together in the end.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Mutex, PoisonError},
};

use crc32fast::Hasher;

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
    pub crc: u32,
}

impl RawCheck {
    pub(crate) fn new(files: Vec<Raw>) -> Self {
        RawCheck { files }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }

    /// Reads all files, with as many threads as `workers`.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names a file that is not as it was.
    pub fn run(&self, workers: usize) -> Result<()> {
        let pieces: Vec<(usize, u64)> = self
            .files
            .iter()
            .enumerate()
            .flat_map(|(i, file)| (0..file.size.div_ceil(PIECE)).map(move |n| (i, n * PIECE)))
            .collect();
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Hasher>>> = Mutex::new(pieces.iter().map(|_| None).collect());
        let work = || -> Result<()> {
            let mut buffer = vec![0; READ.min(self.bytes() as usize)];
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(file, offset)) = pieces.get(at) else { return Ok(()) };
                let hasher = self.files[file].piece(offset, &mut buffer)?;
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
            if sum.finalize() != file.crc {
                let what = "its checksum differs".to_owned();
                return Err(ImageError::Damaged { path: file.path.clone(), what });
            }
        }
        Ok(())
    }
}

impl Raw {
    fn piece(&self, offset: u64, buffer: &mut [u8]) -> Result<Hasher> {
        let end = self.size.min(offset + PIECE);
        let mut hasher = Hasher::new();
        let mut at = offset;
        while at < end {
            let part = ((end - at) as usize).min(buffer.len());
            let part = &mut buffer[..part];
            self.file.read_exact_at(part, at).map_err(|e| ImageError::io("read", &self.path, e))?;
            hasher.update(part);
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
        RawCheck::new(vec![Raw { path, file, size, crc }]).run(3)
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
