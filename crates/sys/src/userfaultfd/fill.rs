//! Bringing pages that are not there.

use super::Userfaultfd;
use crate::call::Result;
use crate::mapped::Mapped;
use rustix::io::Errno;

const UFFDIO_WAKE: usize = 0x8010_aa02;
const UFFDIO_COPY: usize = 0xc028_aa03;
const UFFDIO_ZEROPAGE: usize = 0xc020_aa04;

/// How far a call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// So many bytes are there now, and those who waited for them go on.
    pub bytes: u64,
    /// Why it ended before the whole range: `EEXIST` if the next page is there already, `EAGAIN` if messages
    /// ([`Userfaultfd::events`]) must be read first, `ENOENT` if the range is not one registered mapping, `ESRCH` if the
    /// address space is gone, `EFAULT` if the source cannot be read.
    pub error: Option<Errno>,
}

impl Userfaultfd {
    /// Copies `len` bytes from `offset` of a file to `address` of the process. All are multiples of the page size.
    ///
    /// # Panics
    /// If the file is not mapped so far.
    pub fn copy(&self, address: u64, source: &Mapped, offset: u64, len: u64) -> Filled {
        let from = source.address(offset, len);
        let mut copy = [address, from, len, 0, 0];
        // SAFETY: a live `struct uffdio_copy` of five words. The kernel reads the source, which `source` keeps mapped, with
        // its fault handling: a file that has become shorter is an error of the call. It writes to the other process.
        let done = unsafe { self.ioctl("UFFDIO_COPY", UFFDIO_COPY, copy.as_mut_ptr() as usize) };
        outcome(done, copy[4], len)
    }

    /// Makes pages of zeros.
    pub fn zero(&self, address: u64, len: u64) -> Filled {
        let mut zero = [address, len, 0, 0];
        // SAFETY: a live `struct uffdio_zeropage` of four words.
        let done =
            unsafe { self.ioctl("UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE, zero.as_mut_ptr() as usize) };
        outcome(done, zero[3], len)
    }

    /// Lets threads that wait for pages of a range look again.
    ///
    /// # Errors
    /// `EINVAL` for a range that is none.
    pub fn wake(&self, address: u64, len: u64) -> Result<()> {
        let mut range = [address, len];
        // SAFETY: a live `struct uffdio_range` of two words.
        unsafe { self.ioctl("UFFDIO_WAKE", UFFDIO_WAKE, range.as_mut_ptr() as usize) }
    }
}

/// The kernel writes how many bytes it has done, or the error again, or nothing.
fn outcome(done: Result<()>, count: u64, len: u64) -> Filled {
    match done {
        Ok(()) => Filled { bytes: len, error: None },
        Err(e) => {
            let bytes = if (count as i64) > 0 { count.min(len) } else { 0 };
            Filled { bytes, error: Some(e.errno) }
        }
    }
}
