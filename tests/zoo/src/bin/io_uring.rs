//! Kernel state: idle io_uring instances: a small one that has gone round a few times, with completions that were not taken
//! and a submission that was not made yet; a large one, never used; with ZOO_NO_ARRAY both without the array of numbers.
//! With ZOO_BUSY one has a request in flight, with ZOO_FILES registered files and with ZOO_SINGLE a single issuer (a dump
//! must be refused).
#![allow(unsafe_code, reason = "io_uring has no library functions here")]

use std::sync::atomic::{Ordering, fence};
use zoo::{check, ensure, ensure_eq, errno};

const NO_SQARRAY: u32 = 1 << 16;
const SINGLE_ISSUER: u32 = 1 << 12;
const OP_NOP: u8 = 0;
const OP_POLL: u8 = 6;
const OP_READ: u8 = 22;
const OP_WRITE: u8 = 23;
const GETEVENTS: u32 = 1;

struct Ring {
    fd: i32,
    rings: *mut u8,
    sqes: *mut u8,
    sq_entries: u32,
    cq_entries: u32,
}

impl Ring {
    fn new(entries: u32, flags: u32) -> Result<Ring, String> {
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
        let len = params[25] as usize + 16 * cq as usize + array.map_or(0, |_| 4 * sq as usize);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new mappings at addresses the kernel chooses.
        let map = |len: usize, at: i64| unsafe {
            libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED, fd, at).cast::<u8>()
        };
        let (rings, sqes) = (map(len, 0), map(64 * sq as usize, 0x1000_0000));
        ensure!(rings as isize != -1 && sqes as isize != -1, "mapping a ring");
        let ring = Ring { fd, rings, sqes, sq_entries: sq, cq_entries: cq };
        for i in (0..sq).filter(|_| array.is_some()) {
            ring.set(array.unwrap_or(0) + 4 * i as usize, i);
        }
        Ok(ring)
    }

    fn word(&self, at: usize) -> u32 {
        fence(Ordering::Acquire);
        // SAFETY: inside the rings.
        unsafe { self.rings.add(at).cast::<u32>().read_volatile() }
    }

    fn set(&self, at: usize, value: u32) {
        fence(Ordering::Release);
        // SAFETY: inside the rings.
        unsafe { self.rings.add(at).cast::<u32>().write_volatile(value) }
    }

    /// Puts a request into the queue.
    fn push(&self, op: u8, fd: i32, buffer: *mut u8, len: u32, user_data: u64) {
        let tail = self.word(4);
        let mut sqe = [0u64; 8];
        sqe[0] = u64::from(op) | u64::from(fd as u32) << 32;
        sqe[2] = buffer as u64;
        // Its length, or the events to poll for in the word after it.
        sqe[3] = if op == OP_POLL { u64::from(len) << 32 } else { u64::from(len) };
        sqe[4] = user_data;
        let at = (tail % self.sq_entries) as usize;
        // SAFETY: inside the entries.
        unsafe { self.sqes.add(at * 64).cast::<[u64; 8]>().write_volatile(sqe) };
        self.set(4, tail.wrapping_add(1));
    }

    fn enter(&self, submit: u32, wait: u32) -> Result<i64, String> {
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
    fn take(&self) -> Option<(u64, i32)> {
        let head = self.word(8);
        if head == self.word(12) {
            return None;
        }
        let at = 64 + 16 * (head % self.cq_entries) as usize;
        let data = u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
        let result = self.word(at + 8) as i32;
        self.set(8, head.wrapping_add(1));
        Some((data, result))
    }

    /// Writes to a pipe and reads from it again, by the ring alone.
    fn works(&self) -> zoo::Check {
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
        Ok(())
    }
}

fn main() {
    zoo::run(|z| {
        let has = |name: &str| z.param(name, 0) != 0;
        let mut flags = if has("ZOO_NO_ARRAY") { NO_SQARRAY } else { 0 };
        flags |= if has("ZOO_SINGLE") { SINGLE_ISSUER } else { 0 };
        let small = Ring::new(8, flags).unwrap_or_else(|why| z.skip(&why));
        let large = Ring::new(2048, flags)?;
        for n in 0..1003u64 {
            small.push(OP_NOP, 0, std::ptr::null_mut(), 0, n);
            ensure_eq!(small.enter(1, 1)?, 1, "requests made");
            ensure_eq!(small.take(), Some((n, 0)), "completion {n}");
        }
        for n in [71, 72] {
            small.push(OP_NOP, 0, std::ptr::null_mut(), 0, n);
        }
        ensure_eq!(small.enter(2, 2)?, 2, "requests made");
        small.push(OP_NOP, 0, std::ptr::null_mut(), 0, 73);
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors.
        check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
        if has("ZOO_BUSY") {
            large.push(OP_POLL, pipe[0], std::ptr::null_mut(), libc::POLLIN as u32, 5);
            ensure_eq!(large.enter(1, 0)?, 1, "requests made");
        }
        if has("ZOO_FILES") {
            // SAFETY: two descriptors.
            let done = unsafe {
                libc::syscall(libc::SYS_io_uring_register, large.fd, 2, pipe.as_ptr(), 2)
            };
            check(done as i32, "IORING_REGISTER_FILES")?;
        }
        // It shares the large one; nobody else submits while it does.
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for("child.go")?;
            large.works()
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!((small.word(0), small.word(4)), (1005, 1006), "submission queue");
        ensure_eq!((small.word(8), small.word(12)), (1003, 1005), "completion queue");
        ensure_eq!(small.take(), Some((71, 0)), "a completion that was not taken");
        ensure_eq!(small.enter(1, 0)?, 1, "the request that was not made");
        ensure_eq!(small.take(), Some((72, 0)), "the next completion that was not taken");
        ensure_eq!(small.take(), Some((73, 0)), "completion of what was made just now");
        ensure_eq!(small.take(), None, "nothing is left");
        small.works()?;
        if !has("ZOO_BUSY") {
            large.works()?;
        }
        if !has("ZOO_BUSY") && !has("ZOO_SINGLE") {
            z.publish("child.go", "");
            z.join(child)?;
            for n in 0..5000u64 {
                large.push(OP_NOP, 0, std::ptr::null_mut(), 0, n);
                large.enter(1, 1)?;
                ensure_eq!(large.take(), Some((n, 0)), "completion {n} of the large one");
            }
        } else {
            // SAFETY: our child.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        Ok(())
    })
}
