//! io_uring(7) by system calls alone.
#![allow(missing_docs, reason = "names are those of io_uring(7)")]

use crate::{check, ensure, ensure_eq, errno};
use std::sync::atomic::{Ordering, fence};

pub const SUBMIT_ALL: u32 = 1 << 7;
pub const COOP_TASKRUN: u32 = 1 << 8;
pub const TASKRUN_FLAG: u32 = 1 << 9;
pub const SQE128: u32 = 1 << 10;
pub const CQE32: u32 = 1 << 11;
pub const SINGLE_ISSUER: u32 = 1 << 12;
pub const DEFER_TASKRUN: u32 = 1 << 13;
pub const NO_SQARRAY: u32 = 1 << 16;
pub const OP_NOP: u8 = 0;
pub const OP_READ_FIXED: u8 = 4;
pub const OP_WRITE_FIXED: u8 = 5;
pub const OP_POLL: u8 = 6;
pub const OP_TIMEOUT: u8 = 11;
pub const OP_READ: u8 = 22;
pub const OP_WRITE: u8 = 23;
pub const OP_SOCKET: u8 = 45;
/// The descriptor is a slot of the table of registered files.
pub const FIXED_FILE: u8 = 1;
/// It is done by a worker.
pub const ASYNC: u8 = 1 << 4;
/// No completion if it succeeds.
pub const SKIP_SUCCESS: u8 = 1 << 6;
const GETEVENTS: u32 = 1;

/// An instance, mapped.
pub struct Ring {
    /// Its descriptor.
    pub fd: i32,
    rings: *mut u8,
    sqes: *mut u8,
    pub sq_entries: u32,
    pub cq_entries: u32,
    flags: u32,
}

/// A request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    pub op: u8,
    pub flags: u8,
    pub fd: i32,
    pub offset: u64,
    pub buffer: u64,
    pub len: u32,
    /// Its word after the length.
    pub word: u32,
    pub user_data: u64,
    /// A registered buffer.
    pub index: u16,
    /// Slot for a new file.
    pub file_index: u32,
}

impl Ring {
    /// Makes one.
    pub fn new(entries: u32, flags: u32) -> Result<Ring, String> {
        let mut params = [0u32; 30];
        params[2] = flags;
        // SAFETY: parameters of the right size.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, params.as_mut_ptr()) };
        if fd < 0 {
            return Err(format!("io_uring_setup: errno {}", errno()));
        }
        let fd = fd as i32;
        let (sq, cq) = (params[0], params[1]);
        let array = (flags & NO_SQARRAY == 0).then_some(params[16] as usize);
        let cqe = if flags & CQE32 != 0 { 32 } else { 16 };
        let sqe = if flags & SQE128 != 0 { 128 } else { 64 };
        let len = params[25] as usize + cqe * cq as usize + array.map_or(0, |_| 4 * sq as usize);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new mappings at addresses the kernel chooses.
        let map = |len: usize, at: i64| unsafe {
            libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED, fd, at).cast::<u8>()
        };
        let (rings, sqes) = (map(len, 0), map(sqe * sq as usize, 0x1000_0000));
        ensure!(rings as isize != -1 && sqes as isize != -1, "mapping a ring");
        let ring = Ring { fd, rings, sqes, sq_entries: sq, cq_entries: cq, flags };
        for i in (0..sq).filter(|_| array.is_some()) {
            ring.set(array.unwrap_or(0) + 4 * i as usize, i);
        }
        Ok(ring)
    }

    pub fn word(&self, at: usize) -> u32 {
        fence(Ordering::Acquire);
        // SAFETY: inside the rings.
        unsafe { self.rings.add(at).cast::<u32>().read_volatile() }
    }

    pub fn set(&self, at: usize, value: u32) {
        fence(Ordering::Release);
        // SAFETY: inside the rings.
        unsafe { self.rings.add(at).cast::<u32>().write_volatile(value) }
    }

    /// Puts a request into the queue.
    pub fn push(&self, op: u8, fd: i32, buffer: *mut u8, len: u32, user_data: u64) {
        // Its length, or the events to poll for in the word after it.
        let (len, word) = if op == OP_POLL { (0, len) } else { (len, 0) };
        self.put(Request {
            op,
            fd,
            buffer: buffer as u64,
            len,
            word,
            user_data,
            ..Request::default()
        });
    }

    /// Puts any request into the queue.
    pub fn put(&self, r: Request) {
        let tail = self.word(4);
        let mut sqe = [0u64; 8];
        sqe[0] = u64::from(r.op) | u64::from(r.flags) << 8 | u64::from(r.fd as u32) << 32;
        sqe[1] = r.offset;
        sqe[2] = r.buffer;
        sqe[3] = u64::from(r.len) | u64::from(r.word) << 32;
        sqe[4] = r.user_data;
        sqe[5] = u64::from(r.index) | u64::from(r.file_index) << 32;
        let size = if self.flags & SQE128 != 0 { 128 } else { 64 };
        let at = (tail % self.sq_entries) as usize;
        // SAFETY: inside the entries.
        unsafe { self.sqes.add(at * size).cast::<[u64; 8]>().write_volatile(sqe) };
        self.set(4, tail.wrapping_add(1));
    }

    /// Makes a call of io_uring_register(2).
    pub fn register<T>(&self, what: u32, argument: &T, count: u32) -> i64 {
        let argument = std::ptr::from_ref(argument);
        // SAFETY: a live argument of what the operation wants.
        unsafe { libc::syscall(libc::SYS_io_uring_register, self.fd, what, argument, count) }
    }

    pub fn enter(&self, submit: u32, wait: u32) -> Result<i64, String> {
        // SAFETY: integers.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd,
                submit,
                wait,
                GETEVENTS,
                0usize,
                0usize,
            )
        };
        if done < 0 { Err(format!("io_uring_enter: errno {}", errno())) } else { Ok(done) }
    }

    /// Takes a completion: user data and result.
    pub fn take(&self) -> Option<(u64, i32)> {
        let head = self.word(8);
        if head == self.word(12) {
            return None;
        }
        let cqe = if self.flags & CQE32 != 0 { 32 } else { 16 };
        let at = 64 + cqe * (head % self.cq_entries) as usize;
        let data = u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
        let result = self.word(at + 8) as i32;
        self.set(8, head.wrapping_add(1));
        Some((data, result))
    }

    /// Writes to a pipe and reads from it again, by the ring alone.
    pub fn works(&self) -> crate::Check {
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors.
        check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
        let (mut from, mut to) = (*b"through a pipe", [0u8; 14]);
        self.push(OP_WRITE, pipe[1], from.as_mut_ptr(), 14, 1);
        ensure_eq!(self.enter(1, 1)?, 1, "requests made");
        ensure_eq!(self.take(), Some((1, 14)), "completion of the write");
        self.push(OP_READ, pipe[0], to.as_mut_ptr(), 14, 2);
        ensure_eq!(self.enter(1, 1)?, 1, "requests made");
        ensure_eq!(self.take(), Some((2, 14)), "completion of the read");
        ensure_eq!(to, from, "what came through");
        for end in pipe {
            // SAFETY: ours.
            check(unsafe { libc::close(end) }, "close")?;
        }
        Ok(())
    }
}
