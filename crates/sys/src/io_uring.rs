//! io_uring(7): rings as memory, what a checkpoint asks of an instance, and what a restore registers with it.

use crate::call::{Errno, Result, syscall};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `IORING_SETUP_CQSIZE`
pub const SETUP_CQSIZE: u32 = 1 << 3;
/// `IORING_SETUP_NO_SQARRAY`
pub const SETUP_NO_SQARRAY: u32 = 1 << 16;
/// `IORING_SETUP_*`: a thread of the kernel's submits.
pub const SETUP_SQPOLL: u32 = 1 << 1;
/// … it is not to be used yet.
pub const SETUP_R_DISABLED: u32 = 1 << 6;
/// … submission goes on after an error.
pub const SETUP_SUBMIT_ALL: u32 = 1 << 7;
/// … its task is not interrupted for completions.
pub const SETUP_COOP_TASKRUN: u32 = 1 << 8;
/// … it is told in the rings if it should look for some.
pub const SETUP_TASKRUN_FLAG: u32 = 1 << 9;
/// … submission queue entries are twice as large.
pub const SETUP_SQE128: u32 = 1 << 10;
/// … completion queue entries are twice as large.
pub const SETUP_CQE32: u32 = 1 << 11;
/// … only one task submits.
pub const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
/// … completions wait until that asks for them.
pub const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
/// … the rings are the program's own memory.
pub const SETUP_NO_MMAP: u32 = 1 << 14;
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
/// … of the number of submissions that were dropped.
pub const SQ_DROPPED: usize = 32;
/// … of what the program says of the completion queue.
pub const CQ_FLAGS: usize = 40;
/// … of the number of completions that were dropped.
pub const CQ_OVERFLOW: usize = 44;
/// … of the first completion queue entry.
pub const CQES: usize = 64;
/// Bytes of a submission queue entry.
pub const SQE: usize = 64;
/// Bytes of a completion queue entry.
pub const CQE: usize = 16;
/// The kernel's limit of entries.
pub const MAX_ENTRIES: u32 = 32768;

/// In [`CQ_FLAGS`]: a registered eventfd is told nothing.
pub const CQ_EVENTFD_DISABLED: u32 = 1;
/// In a submission queue entry's flags, which are its second byte: no completion is given if it succeeds.
pub const SQE_SKIP_SUCCESS: u8 = 1 << 6;
/// `IORING_REGISTER_ENABLE_RINGS`
pub const REGISTER_ENABLE_RINGS: u64 = 12;
/// `IORING_REGISTER_BUFFERS2`
pub const REGISTER_BUFFERS2: u64 = 15;
/// `IORING_REGISTER_BUFFERS_UPDATE`
pub const REGISTER_BUFFERS_UPDATE: u64 = 16;

const ENTER_GETEVENTS: usize = 1;
const REGISTER_BUFFERS: usize = 0;
const REGISTER_EVENTFD: usize = 4;
const REGISTER_EVENTFD_ASYNC: usize = 7;
const REGISTER_FILES2: usize = 13;
const REGISTER_FILES_UPDATE2: usize = 14;
const REGISTER_IOWQ_MAX_WORKERS: usize = 19;
const REGISTER_FILE_ALLOC_RANGE: usize = 25;
const REGISTER_CLOCK: usize = 29;
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
    let array = if flags & SETUP_NO_SQARRAY != 0 { 0 } else { array_at(cq_entries, flags) as u32 };
    let known = params[..2] == [sq_entries, cq_entries]
        && [sq[0], sq[1], cq[0], cq[1]] == [0, 4, 8, 12]
        && cq[5] == CQES as u32
        && sq[6] == array;
    Ok((fd, known))
}

/// Offset of the submission queue's array, where the instance was made with these flags.
#[must_use]
pub fn array_at(cq_entries: u32, flags: u32) -> usize {
    // With large entries the kernel doubles what is before them, too.
    let end = CQES + CQE * cq_entries as usize;
    (end * (cqe(flags) / CQE)).next_multiple_of(64)
}

/// Bytes of a submission queue entry, likewise.
#[must_use]
pub fn sqe(flags: u32) -> usize {
    if flags & SETUP_SQE128 != 0 { 2 * SQE } else { SQE }
}

/// Bytes of a completion queue entry, likewise.
#[must_use]
pub fn cqe(flags: u32) -> usize {
    if flags & SETUP_CQE32 != 0 { 2 * CQE } else { CQE }
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
    register_of(ring, what, argument, 1)
}

fn register_of(ring: BorrowedFd<'_>, what: usize, argument: usize, count: usize) -> Result<usize> {
    let args = [ring.as_raw_fd() as usize, what, argument, count, 0, 0];
    // SAFETY: called with live memory that the operation wants, or with an address that nobody can have.
    unsafe { syscall("io_uring_register", libc::SYS_io_uring_register, args) }
}

/// Has an instance give a completion for which nobody has asked.
///
/// # Errors
/// `EINVAL` before Linux 6.13.
pub fn send_completion(ring: BorrowedFd<'_>) -> Result<()> {
    const SEND_MSG_RING: usize = 31;
    const OP_MSG_RING: u64 = 40;
    let mut entry = [0u64; 8];
    entry[0] = OP_MSG_RING | (ring.as_raw_fd() as u64) << 32;
    let args = [usize::MAX, SEND_MSG_RING, entry.as_ptr() as usize, 1, 0, 0];
    // SAFETY: an entry that lives as long as the call.
    unsafe { syscall("io_uring_register", libc::SYS_io_uring_register, args) }.map(drop)
}

/// `struct io_uring_rsrc_register` of a table of `slots` that are empty.
#[must_use]
pub fn empty_table(slots: u32) -> [u64; 4] {
    const SPARSE: u64 = 1;
    [u64::from(slots) | SPARSE << 32, 0, 0, 0]
}

/// `struct io_uring_rsrc_update2`: `count` values at address `values`, and what their ends are told by at `tags`, from slot
/// `first` on.
#[must_use]
pub fn table_update(first: u32, count: u32, values: u64, tags: u64) -> [u64; 4] {
    [first.into(), values, tags, count.into()]
}

/// Registers a table of files, each with its slot and what its end is told by.
///
/// # Errors
/// `EBADF` for a file that cannot be registered, `EMFILE` beyond the limit of open files.
pub fn register_files(
    ring: BorrowedFd<'_>,
    slots: u32,
    files: &[(u32, BorrowedFd<'_>, u64)],
) -> Result<()> {
    let table = empty_table(slots);
    register_of(ring, REGISTER_FILES2, table.as_ptr() as usize, size_of_val(&table))?;
    for run in files.chunk_by(|a, b| a.0 + 1 == b.0) {
        let numbers: Vec<i32> = run.iter().map(|(_, file, _)| file.as_raw_fd()).collect();
        let tags: Vec<u64> = run.iter().map(|(.., tag)| *tag).collect();
        let (numbers, tags) = (numbers.as_ptr() as u64, tags.as_ptr() as u64);
        let update = table_update(run[0].0, run.len() as u32, numbers, tags);
        register_of(ring, REGISTER_FILES_UPDATE2, update.as_ptr() as usize, size_of_val(&update))?;
    }
    Ok(())
}

/// Says between which slots a place is looked for, for files that get one from the kernel: from, to.
///
/// # Errors
/// `EINVAL` or `EOVERFLOW` if they are not in the table.
pub fn file_range(ring: BorrowedFd<'_>, range: (u32, u32)) -> Result<()> {
    let range = [u64::from(range.0) | u64::from(range.1.saturating_sub(range.0)) << 32, 0];
    register_of(ring, REGISTER_FILE_ALLOC_RANGE, range.as_ptr() as usize, 0).map(drop)
}

/// Registers an eventfd; with `only_async` it is told only of what was not done at once.
///
/// # Errors
/// `EBADF` if it is none, `EBUSY` if there is one already.
pub fn register_eventfd(
    ring: BorrowedFd<'_>,
    eventfd: BorrowedFd<'_>,
    only_async: bool,
) -> Result<()> {
    let number = eventfd.as_raw_fd();
    let what = if only_async { REGISTER_EVENTFD_ASYNC } else { REGISTER_EVENTFD };
    register(ring, what, (&raw const number) as usize).map(drop)
}

/// Limits workers: bounded, unbounded.
///
/// # Errors
/// `EINVAL` before Linux 5.15.
pub fn limit_workers(ring: BorrowedFd<'_>, most: [u32; 2]) -> Result<()> {
    let mut most = most;
    register_of(ring, REGISTER_IOWQ_MAX_WORKERS, most.as_mut_ptr() as usize, 2).map(drop)
}

/// Says by which clock is waited.
///
/// # Errors
/// `EINVAL` if that is not possible.
pub fn wait_by(ring: BorrowedFd<'_>, clock: u32) -> Result<()> {
    let clock = [u64::from(clock), 0];
    register_of(ring, REGISTER_CLOCK, clock.as_ptr() as usize, 0).map(drop)
}

/// A page of memory that is registered with an instance.
#[derive(Debug)]
pub struct Page {
    ring: OwnedFd,
    /// Mapped for as long as this is there.
    page: Memory,
}

impl Page {
    /// Makes one.
    ///
    /// # Errors
    /// `EPERM` where io_uring is disabled, `ENOMEM`.
    pub fn new() -> Result<Page> {
        let (ring, _) = setup(1, 2, 0)?;
        let access = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE) as usize;
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let base =
            unsafe { syscall("mmap", libc::SYS_mmap, [0, PAGE, access, flags, usize::MAX, 0]) }?;
        let page = Memory { base: base as *mut u8, whole: PAGE, len: PAGE };
        let vector = libc::iovec { iov_base: page.base.cast(), iov_len: PAGE };
        register_of(ring.as_fd(), REGISTER_BUFFERS, (&raw const vector) as usize, 1)?;
        Ok(Page { ring, page })
    }

    /// The instance.
    #[must_use]
    pub fn instance(&self) -> &OwnedFd {
        &self.ring
    }

    /// Where the page is.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.page.base as u64
    }
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
