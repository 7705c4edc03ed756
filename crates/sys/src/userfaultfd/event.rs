//! What a userfaultfd tells: faults, and what the process does to its address space (`struct uffd_msg`).

use super::Userfaultfd;
use crate::call::Result;
use crate::{Errno, SyscallError};
use std::os::fd::{FromRawFd, OwnedFd};

/// `UFFD_FEATURE_EVENT_FORK`: a child's userfaultfd is told.
pub const FORK: u64 = 1 << 1;
/// `UFFD_FEATURE_EVENT_REMAP`: mremap(2) is told.
pub const REMAP: u64 = 1 << 2;
/// `UFFD_FEATURE_EVENT_REMOVE`: madvise(2) that drops pages is told.
pub const REMOVE: u64 = 1 << 3;
/// `UFFD_FEATURE_EVENT_UNMAP`: munmap(2) is told.
pub const UNMAP: u64 = 1 << 6;

/// Bytes of a message.
const SIZE: usize = 32;
/// Messages a read.
const EACH: usize = 64;

/// A message. Whoever caused one other than a fault waits until it is read.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The process has forked: the child has what the parent has, and this is its userfaultfd.
    Fork(Userfaultfd),
    /// Memory has moved.
    Remap {
        /// From here
        from: u64,
        /// to here,
        to: u64,
        /// so many bytes.
        len: u64,
    },
    /// The pages from the first to before the second address are dropped, and are zeros from now on.
    Remove(u64, u64),
    /// The range from the first to before the second address is not mapped any more.
    Unmap(u64, u64),
}

impl Userfaultfd {
    /// Reads what there is; the descriptor must not block.
    ///
    /// # Errors
    /// `EAGAIN` if there is nothing; `EMFILE` if a child's descriptor finds no place in our table.
    pub fn events(&self) -> Result<Vec<Event>> {
        let mut bytes = [0; SIZE * EACH];
        let read = rustix::io::read(&self.0, &mut bytes)
            .map_err(|errno| SyscallError::new("read of a userfaultfd", errno))?;
        bytes[..read].chunks_exact(SIZE).map(parse).collect()
    }
}

fn parse(message: &[u8]) -> Result<Event> {
    let word = |at: usize| {
        let bytes = message[at..].first_chunk().copied().unwrap_or_default();
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        0x12 => Ok(Event::Fault(word(16))),
        0x13 => {
            // SAFETY: the kernel has just put this descriptor into our table and tells nobody else.
            let fd = unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) };
            Ok(Event::Fork(Userfaultfd::from_fd(fd)))
        }
        0x14 => Ok(Event::Remap { from: word(8), to: word(16), len: word(24) }),
        0x15 => Ok(Event::Remove(word(8), word(16))),
        0x16 => Ok(Event::Unmap(word(8), word(16))),
        _ => Err(SyscallError::new("read of a userfaultfd", Errno::PROTO)),
    }
}
