//! userfaultfd(2): write protection of another process's memory, and pages that it has not got yet ([`fill`], [`event`]).

pub mod event;
pub mod fill;

use crate::call::{Result, syscall};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`: who writes to a protected page waits until somebody takes the protection off.
pub const PAGEFAULT_WP: u64 = 1;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`.
pub const WP_SHARED: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`.
pub const WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC` (since 6.7).
pub const WP_ASYNC: u64 = 1 << 15;
/// `UFFD_USER_MODE_ONLY`: a flag of userfaultfd(2), with which everyone may call it.
pub const USER_MODE_ONLY: u64 = 1;

/// `UFFD_FEATURE_MOVE` (since 6.8).
pub const MOVE: u64 = 1 << 16;

/// `UFFD_API`, for those who make the requests elsewhere.
pub const API: u64 = 0xaa;
/// `UFFDIO_MOVE`, likewise.
pub const REQUEST_MOVE: usize = 0xc028_aa05;
/// `UFFDIO_UNREGISTER`, likewise.
pub const REQUEST_UNREGISTER: usize = 0x8010_aa01;
/// `UFFDIO_API`, likewise.
pub const REQUEST_API: usize = 0xc018_aa3f;
/// `UFFDIO_REGISTER`, likewise.
pub const REQUEST_REGISTER: usize = 0xc020_aa00;
const MODE_MISSING: u64 = 1;
const UFFDIO_WRITEPROTECT: usize = 0xc018_aa06;
/// `USERFAULTFD_IOC_NEW`, of `/dev/userfaultfd`: whoever may open that may have others make one.
pub const NEW: u64 = 0xaa00;
const MODE_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;

/// A userfaultfd. Its ranges are those of the process that made it, whoever holds it; when the last holder closes it, they
/// are as they were before.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Takes over a descriptor made by userfaultfd(2).
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Userfaultfd {
        Userfaultfd(fd)
    }

    /// Asks for `features`, once, before anything else.
    ///
    /// # Errors
    /// `EINVAL` if the kernel lacks one of them.
    pub fn enable(&self, features: u64) -> Result<()> {
        let mut api = [API, features, 0];
        // SAFETY: `api` is a live `struct uffdio_api` of three words.
        unsafe { self.ioctl("UFFDIO_API", REQUEST_API, api.as_mut_ptr() as usize) }
    }

    /// Has write protection apply to the mappings in a range.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd has one of them; `EPERM`, `EINVAL` for mappings that cannot be; `ENOMEM` if the
    /// address space is gone.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        self.register_as(start, end, MODE_WP)
    }

    /// Has touched pages of a range that are not there wait for [`Userfaultfd::copy`] or [`Userfaultfd::zero`].
    ///
    /// # Errors
    /// As of [`Userfaultfd::register`].
    pub fn register_missing(&self, start: u64, end: u64) -> Result<()> {
        self.register_as(start, end, MODE_MISSING)
    }

    fn register_as(&self, start: u64, end: u64, mode: u64) -> Result<()> {
        let mut register = [start, end - start, mode, 0];
        // SAFETY: a live `struct uffdio_register` of four words; the addresses in it are the other process's.
        unsafe { self.ioctl("UFFDIO_REGISTER", REQUEST_REGISTER, register.as_mut_ptr() as usize) }
    }

    /// Undoes [`Userfaultfd::register`], and takes the protection off the pages.
    ///
    /// # Errors
    /// As there.
    pub fn unregister(&self, start: u64, end: u64) -> Result<()> {
        let mut range = [start, end - start];
        // SAFETY: a live `struct uffdio_range` of two words.
        unsafe { self.ioctl("UFFDIO_UNREGISTER", REQUEST_UNREGISTER, range.as_mut_ptr() as usize) }
    }

    /// Protects the pages of a range from writing, or takes the protection off and wakes those who wait for that. Pages that
    /// do not exist stay unprotected.
    ///
    /// # Errors
    /// `ENOENT` if part of the range is not registered, at which it stops; `ESRCH` if the address space is gone.
    pub fn protect(&self, start: u64, end: u64, on: bool) -> Result<()> {
        let mut argument = [start, end - start, u64::from(on)];
        // SAFETY: a live `struct uffdio_writeprotect` of three words; the addresses in it are the other process's.
        unsafe {
            self.ioctl("UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, argument.as_mut_ptr() as usize)
        }
    }

    /// Takes up to 16 messages; appends the addresses somebody waits to write to. Does not wait, if the descriptor is not
    /// to (`O_NONBLOCK`).
    ///
    /// # Errors
    /// `EAGAIN` if there is none.
    pub fn faults(&self, addresses: &mut Vec<u64>) -> Result<()> {
        let mut messages = [0u8; 16 * MESSAGE];
        let len = rustix::io::read(&self.0, &mut messages[..])
            .map_err(|errno| crate::SyscallError::new("read(userfaultfd)", errno))?;
        for message in messages[..len].chunks_exact(MESSAGE) {
            if let ([EVENT_PAGEFAULT, ..], Some(address)) = (message, message[16..].first_chunk()) {
                addresses.push(u64::from_ne_bytes(*address));
            }
        }
        Ok(())
    }

    /// # Safety
    /// `argument` must be the address of what `request` reads and writes.
    unsafe fn ioctl(&self, call: &'static str, request: usize, argument: usize) -> Result<()> {
        let fd = self.0.as_raw_fd() as usize;
        // SAFETY: the caller vouches for the argument.
        unsafe { syscall(call, libc::SYS_ioctl, [fd, request, argument, 0, 0, 0]) }.map(drop)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
