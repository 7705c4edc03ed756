//! Copies of shared memory that are made while its users run, and brought up to date when they stand still.
//!
//! Nothing tells what was written to shared memory: who writes may be a child that has come and gone since, or use write(2).
//! So at the instant it is compared with its copy, byte by byte, which takes a fraction of the time of saving it, and only what
//! differs is copied again. Then the copy goes to the images while the users run on.

use super::{PAGE, hugetlb};
use rewake_sys::memory::SharedMapping;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How much is compared at a time, in bytes: it stays in the cache next to the processor.
const PIECE: u64 = 128 << 10;
/// Less than this, in bytes, is not worth a second thread.
const ENOUGH: u64 = 4 << 20;

/// Shared memory and its copy.
#[derive(Debug)]
pub struct Twin {
    source: File,
    copy: File,
    /// The copy, as far as it reached when it was made.
    mapping: SharedMapping,
}

impl Twin {
    /// A copy of the memory behind a file of tmpfs, of which nobody else changes the position; it may change meanwhile. `None` if
    /// that cannot be: huge pages of hugetlbfs are not taken from their file.
    ///
    /// # Errors
    /// There is no memory for it; it cannot be read.
    pub fn make(source: OwnedFd) -> io::Result<Option<Twin>> {
        if hugetlb::of_file(&source).is_some() {
            return Ok(None);
        }
        let source = File::from(source);
        let size = source.metadata()?.len();
        let copy = File::from(rustix::fs::memfd_create("rewake-twin", MemfdFlags::CLOEXEC)?);
        copy.set_len(size)?;
        let whole = size.next_multiple_of(PAGE);
        let mapping = SharedMapping::new(&copy, whole as usize).map_err(io_error)?;
        for (start, end) in extents(&source, size)? {
            // What is cut off meanwhile is seen later.
            let _ = mapping.fill_all(&source, start, start, end.min(size) - start);
        }
        Ok(Some(Twin { source, copy, mapping }))
    }

    /// Makes the copy what the memory is now; whoever may change that stands still. Returns how many bytes differed.
    ///
    /// # Errors
    /// As of [`Twin::make`]. Then the copy is worth nothing.
    pub fn update(&self, threads: usize) -> io::Result<u64> {
        let size = self.source.metadata()?.len();
        if self.copy.metadata()?.len() != size {
            self.copy.set_len(size)?;
        }
        let (new, old) = (extents(&self.source, size)?, extents(&self.copy, size)?);
        for (start, end) in without(&old, &new) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.copy, flags, start, end - start)?;
        }
        let pieces: Vec<(u64, u64)> = new
            .iter()
            .flat_map(|(start, end)| {
                let end = (*end).min(size);
                (*start..end).step_by(PIECE as usize).map(move |at| (at, end.min(at + PIECE)))
            })
            .collect();
        let all: u64 = pieces.iter().map(|piece| piece.1 - piece.0).sum();
        let threads = if all < ENOUGH { 1 } else { threads.max(1) };
        let next = AtomicUsize::new(0);
        let done: Mutex<io::Result<u64>> = Mutex::new(Ok(0));
        let work = || {
            let mut buffer = vec![0; PIECE as usize];
            let mut differing = Ok(0);
            while let Some((start, end)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let bytes = &mut buffer[..(end - start) as usize];
                match self.renew(*start, bytes) {
                    Ok(bytes) => differing = differing.map(|so_far: u64| so_far + bytes),
                    Err(e) => {
                        differing = Err(e);
                        break;
                    }
                }
            }
            let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *done = match (std::mem::replace(&mut *done, Ok(0)), differing) {
                (Ok(a), Ok(b)) => Ok(a + b),
                (Err(e), _) | (_, Err(e)) => Err(e),
            };
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Without a further thread it takes longer, that is all.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Compares a piece, and copies the pages that differ.
    fn renew(&self, start: u64, bytes: &mut [u8]) -> io::Result<u64> {
        self.source.read_exact_at(bytes, start)?;
        if self.mapping.has(start, bytes) {
            return Ok(0);
        }
        let mut differing = 0;
        for (at, page) in (start..).step_by(PAGE as usize).zip(bytes.chunks(PAGE as usize)) {
            if !self.mapping.has(at, page) {
                self.copy.write_all_at(page, at)?;
                differing += page.len() as u64;
            }
        }
        Ok(differing)
    }

    /// The copy, in the place of the memory itself.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn file(&self) -> io::Result<OwnedFd> {
        self.copy.as_fd().try_clone_to_owned()
    }
}

fn io_error(e: rewake_sys::SyscallError) -> io::Error {
    io::Error::from_raw_os_error(e.errno.raw_os_error())
}

/// Where a file has pages, ascending, in bytes.
fn extents(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        found.push((start / PAGE * PAGE, end.next_multiple_of(PAGE)));
        at = end.max(start + 1);
    }
    Ok(found)
}

/// What of `these` is in none of `those`; both are ascending.
fn without(these: &[(u64, u64)], those: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    let mut others = those.iter().peekable();
    for &(mut start, end) in these {
        while start < end {
            while others.next_if(|other| other.1 <= start).is_some() {}
            let (first, last) = others.peek().map_or((u64::MAX, u64::MAX), |other| **other);
            if start < first {
                left.push((start, end.min(first)));
            }
            start = last.max(start);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(size: u64) -> (File, OwnedFd) {
        let file = rustix::fs::memfd_create("source", MemfdFlags::CLOEXEC).map(File::from).unwrap();
        file.set_len(size).unwrap();
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let seen = File::open(own).unwrap();
        (file, seen.into())
    }

    fn whole(file: impl Into<File>) -> Vec<u8> {
        let file = file.into();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_copy_becomes_what_the_memory_is() {
        let (file, seen) = memory(1 << 20);
        file.write_all_at(&[1; 300_000], 5000).unwrap();
        file.write_all_at(&[2; 4096], 900_000).unwrap();
        let twin = Twin::make(seen).unwrap().unwrap();
        assert_eq!(whole(twin.file().unwrap()), whole(file.try_clone().unwrap()));
        assert_eq!(twin.update(2).unwrap(), 0);
        file.write_all_at(&[3], 200_000).unwrap();
        assert_eq!(twin.update(2).unwrap(), PAGE);
        // A page that was a hole, a hole where there were pages.
        file.write_all_at(&[4; 10], 700_000).unwrap();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 8192, 65536).unwrap();
        twin.update(2).unwrap();
        assert_eq!(whole(twin.file().unwrap()), whole(file.try_clone().unwrap()));
        let size = file.metadata().unwrap().len();
        assert_eq!(extents(&twin.copy, size).unwrap(), extents(&twin.source, size).unwrap());
        // Longer, then shorter than it was, with an end inside a page.
        for size in [5 << 20, 10_000] {
            file.set_len(size).unwrap();
            file.write_all_at(&[5; 9], size - 9).unwrap();
            twin.update(2).unwrap();
            assert_eq!(whole(twin.file().unwrap()), whole(file.try_clone().unwrap()));
        }
    }

    #[test]
    fn what_is_in_others_is_left_out() {
        assert_eq!(without(&[(0, 4), (6, 9)], &[(1, 2), (3, 7)]), [(0, 1), (2, 3), (7, 9)]);
        assert_eq!(without(&[(0, 4)], &[]), [(0, 4)]);
        assert_eq!(without(&[(2, 3), (4, 5)], &[(0, 9)]), []);
    }
}
