//! Files mapped for others to read from: we never look at the bytes ourselves.

use crate::call::Result;
use crate::{Errno, SyscallError};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;

/// A whole file, mapped for reading.
#[derive(Debug)]
pub struct Mapped {
    base: *mut core::ffi::c_void,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and its bytes are never accessed through it.
unsafe impl Send for Mapped {}
// SAFETY: as above; all methods take numbers and give numbers.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Errors
    /// `EINVAL` if there are none, `ENOMEM`, `ENODEV`.
    pub fn new(file: BorrowedFd<'_>, len: u64) -> Result<Mapped> {
        let failed = |errno| SyscallError::new("mmap", errno);
        let len = usize::try_from(len).map_err(|_| failed(Errno::NOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                0,
            )
        };
        Ok(Mapped { base: base.map_err(failed)?, len })
    }

    /// How many bytes are mapped.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: nothing cannot be mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where a part of the file is in our address space.
    ///
    /// # Panics
    /// If it is not within what is mapped.
    pub(crate) fn address(&self, offset: u64, len: u64) -> u64 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len as u64), "a part of what is mapped");
        self.base as u64 + offset
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, which nobody else knows.
        let _ = unsafe { rustix::mm::munmap(self.base, self.len) };
    }
}
