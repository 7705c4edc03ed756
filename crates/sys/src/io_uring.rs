//! io_uring(7): rings as memory, and what a checkpoint asks of an instance. Submission queue entries are of 64 bytes and
//! completion queue entries of 16 here.

use crate::call::{Errno, Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `IORING_SETUP_CQSIZE`
pub const SETUP_CQSIZE: u32 = 1 << 3;
/// `IORING_SETUP_NO_SQARRAY`
pub const SETUP_NO_SQARRAY: u32 = 1 << 16;
/// `IORING_OFF_SQES`: where the entries are mapped; the rings are at 0.
pub const OFFSET_SQES: u64 = 0x1000_0000;
/// Offset of the head of the submission queue, in the rings.
pub const SQ_HEAD: usize = 0;
/// … of its tail.
pub const SQ_TAIL: usize = 4;
/// … of the completion queue's head.
pub const CQ_HEAD: usize = 8;
/// … of its tail.
pub const CQ_TAIL: usize = 12;
/// … of the first completion queue entry.
pub const CQES: usize = 64;
/// Bytes of a submission queue entry.
pub const SQE: usize = 64;
/// Bytes of a completion queue entry.
pub const CQE: usize = 16;
/// The kernel's limit of entries.
pub const MAX_ENTRIES: u32 = 32768;

const ENTER_GETEVENTS: usize = 1;
const REGISTER_EVENTFD: usize = 4;
const REGISTER_PBUF_STATUS: usize = 26;
const REGISTER_NAPI: usize = 27;
const PAGE: usize = 4096;

/// Makes an instance; returns it with the numbers of entries it got, and whether its rings have the layout known here.
///
/// # Errors
/// `EINVAL` for impossible flags, `EPERM` where io_uring is disabled, `ENOMEM`.
pub fn setup(sq_entries: u32, cq_entries: u32, flags: u32) -> Result<(OwnedFd, bool)> {
    // struct io_uring_params, in words of 32 bits.
    let mut params = [0u32; 30];
    params[1] = cq_entries;
    params[2] = flags | SETUP_CQSIZE;
    let args = [sq_entries as usize, params.as_mut_ptr() as usize, 0, 0, 0, 0];
    // SAFETY: the parameters are live and as long as the structure.
    let fd = unsafe { syscall("io_uring_setup", libc::SYS_io_uring_setup, args) }?;
    // SAFETY: a new descriptor that nobody else has.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let (sq, cq) = (&params[10..20], &params[20..30]);
    let array = if flags & SETUP_NO_SQARRAY != 0 { 0 } else { array_at(cq_entries) as u32 };
    let known = params[..2] == [sq_entries, cq_entries]
        && [sq[0], sq[1], cq[0], cq[1]] == [0, 4, 8, 12]
        && cq[5] == CQES as u32
        && sq[6] == array;
    Ok((fd, known))
}

/// Offset of the submission queue's array.
#[must_use]
pub fn array_at(cq_entries: u32) -> usize {
    CQES + CQE * cq_entries as usize
}

/// The memory of an instance's rings or entries.
#[derive(Debug)]
pub struct Memory {
    base: *mut u8,
    /// As mapped.
    whole: usize,
    /// What is there of it.
    len: usize,
}

impl Memory {
    /// Maps `len` bytes (rounded up to pages) from `offset` on, or as many as there are.
    ///
    /// # Errors
    /// `EINVAL` or `ENXIO` if they are the program's own memory.
    pub fn map(ring: BorrowedFd<'_>, len: usize, offset: u64) -> Result<Memory> {
        let len = len.next_multiple_of(PAGE);
        let access = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_SHARED | libc::MAP_POPULATE) as usize;
        let args = [0, len, access, flags, ring.as_raw_fd() as usize, offset as usize];
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let base = unsafe { syscall("mmap", libc::SYS_mmap, args) }?;
        let mut memory = Memory { base: base as *mut u8, whole: len, len: 0 };
        // What is beyond the end is mapped, but touching it would be the end of us.
        while memory.len < len && is_there(base + memory.len)? {
            memory.len += PAGE;
        }
        Ok(memory)
    }

    /// Bytes that are there: whole pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is nothing there?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The word at `at`.
    ///
    /// # Panics
    /// If it is not inside.
    #[must_use]
    pub fn word(&self, at: usize) -> u32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len, "a word of the mapping");
        // SAFETY: inside the mapping and aligned; others may write to it, so it is read as volatile.
        unsafe { self.base.add(at).cast::<u32>().read_volatile() }
    }

    /// Sets the word at `at`, after everything that was written before.
    ///
    /// # Panics
    /// If it is not inside.
    pub fn set_word(&self, at: usize, value: u32) {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len, "a word of the mapping");
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        // SAFETY: inside the mapping and aligned.
        unsafe { self.base.add(at).cast::<u32>().write_volatile(value) };
    }

    /// A copy of bytes; fewer at the end.
    #[must_use]
    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let from = at.min(self.len);
        let mut copy = vec![0; len.min(self.len - from)];
        for (i, byte) in copy.iter_mut().enumerate() {
            // SAFETY: inside the mapping; others may write to it, so it is read as volatile.
            *byte = unsafe { self.base.add(from + i).read_volatile() };
        }
        copy
    }

    /// Writes bytes, as far as they are inside.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate().take(self.len.saturating_sub(at)) {
            // SAFETY: inside the mapping.
            unsafe { self.base.add(at + i).write_volatile(*byte) };
        }
    }
}

/// Can the byte at `address` be read?
fn is_there(address: usize) -> Result<bool> {
    let mut byte = 0u8;
    let own = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let theirs = libc::iovec { iov_base: address as *mut _, iov_len: 1 };
    let pid = std::process::id() as usize;
    let args = [pid, (&raw const own) as usize, 1, (&raw const theirs) as usize, 1, 0];
    // SAFETY: one byte of a local; the other end is looked at by the kernel.
    match unsafe { syscall("process_vm_readv", libc::SYS_process_vm_readv, args) } {
        Ok(_) => Ok(true),
        Err(e) if e.errno == Errno::FAULT => Ok(false),
        Err(e) => Err(e),
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let args = [self.base as usize, self.whole, 0, 0, 0, 0];
        // SAFETY: our own mapping, of which no reference is left.
        let _ = unsafe { syscall("munmap", libc::SYS_munmap, args) };
    }
}

/// Submits entries; returns how many.
///
/// # Errors
/// `EBADFD` if the instance is disabled, `EEXIST` if it is another task's.
pub fn submit(ring: BorrowedFd<'_>, entries: u32) -> Result<usize> {
    let args = [ring.as_raw_fd() as usize, entries as usize, 0, 0, 0, 0];
    // SAFETY: numbers only.
    unsafe { syscall("io_uring_enter", libc::SYS_io_uring_enter, args) }
}

fn register(ring: BorrowedFd<'_>, what: usize, argument: usize) -> Result<usize> {
    let args = [ring.as_raw_fd() as usize, what, argument, 1, 0, 0];
    // SAFETY: called with live memory that the operation wants, or with an address that nobody can have.
    unsafe { syscall("io_uring_register", libc::SYS_io_uring_register, args) }
}

/// What an instance does not tell but by what it answers to calls that can do nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// `IORING_SETUP_R_DISABLED`, not enabled yet.
    Disabled,
    /// `IORING_SETUP_DEFER_TASKRUN`
    Deferred,
    /// `IORING_SETUP_SINGLE_ISSUER`
    SingleIssuer,
    /// `IORING_SETUP_IOPOLL`
    Polled,
    /// `IORING_REGISTER_EVENTFD`
    Eventfd,
    /// `IORING_REGISTER_PBUF_RING`
    BufferRings,
    /// None of these.
    Plain,
}

/// Asks an instance. With `napi` the kernel has `IORING_REGISTER_NAPI`, by which polled ones are told.
#[must_use]
pub fn manner(ring: BorrowedFd<'_>, napi: bool) -> Manner {
    // No address of user space; never read before the answer that is wanted.
    const NOWHERE: usize = 8;
    const GROUPS: u32 = 64;
    let args = [ring.as_raw_fd() as usize, 0, 0, ENTER_GETEVENTS, 0, 0];
    // SAFETY: numbers only.
    let entered = unsafe { syscall("io_uring_enter", libc::SYS_io_uring_enter, args) };
    match entered.map_err(|e| e.errno) {
        Err(Errno::BADFD) => return Manner::Disabled,
        Err(Errno::EXIST) => return Manner::Deferred,
        _ => {}
    }
    match register(ring, REGISTER_EVENTFD, NOWHERE).map_err(|e| e.errno) {
        Err(Errno::EXIST) => return Manner::SingleIssuer,
        Err(Errno::BUSY) => return Manner::Eventfd,
        _ => {}
    }
    if napi && register(ring, REGISTER_NAPI, NOWHERE).is_err_and(|e| e.errno == Errno::INVAL) {
        return Manner::Polled;
    }
    for group in 0..GROUPS {
        // struct io_uring_buf_status
        let mut status = [0u32; 10];
        status[0] = group;
        match register(ring, REGISTER_PBUF_STATUS, status.as_mut_ptr() as usize) {
            Ok(_) => return Manner::BufferRings,
            Err(e) if e.errno == Errno::NOENT => {}
            Err(_) => break,
        }
    }
    Manner::Plain
}
