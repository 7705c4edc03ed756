//! Kernel state: eventfds: counters (zero, small, largest), flags, one shared with a child that is blocked in read.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{check, ensure_eq, errno, ok};

fn make(value: u64, flags: i32) -> Result<i32, String> {
    // SAFETY: integers; then eight bytes of a local.
    unsafe {
        let fd = ok(libc::eventfd(0, flags) as i64, "eventfd")? as i32;
        if value > 0 {
            ensure_eq!(libc::write(fd, (&raw const value).cast(), 8), 8, "write");
        }
        Ok(fd)
    }
}

fn read(fd: i32) -> Result<u64, i32> {
    let mut value = 0u64;
    // SAFETY: eight bytes of a local.
    if unsafe { libc::read(fd, (&raw mut value).cast(), 8) } == 8 {
        Ok(value)
    } else {
        Err(errno())
    }
}

fn main() {
    zoo::run(|z| {
        // With ZOO_SEMAPHORE=1: reading takes one at a time.
        let semaphore = if z.param("ZOO_SEMAPHORE", 0) == 1 {
            Some(make(3, libc::EFD_SEMAPHORE)?)
        } else {
            None
        };
        let empty = make(0, libc::EFD_NONBLOCK)?;
        let small = make(5, libc::EFD_CLOEXEC)?;
        // With ZOO_LARGE=1: the largest value there is.
        let most = if z.param("ZOO_LARGE", 0) == 1 { u64::MAX - 1 } else { u32::MAX as u64 };
        let large = make(most, libc::EFD_NONBLOCK)?;
        let shared = make(0, 0)?;
        let child = z.fork(|z| {
            z.publish("up", "");
            ensure_eq!(read(shared), Ok(99), "what the blocked child reads");
            Ok(())
        })?;
        z.wait_for("up")?;
        zoo::wait_state(child, 'S')?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(read(empty), Err(libc::EAGAIN), "read of the empty one");
        // SAFETY: integers; eight bytes of a local.
        unsafe {
            let one = u64::MAX - most;
            ensure_eq!(
                libc::write(large, (&raw const one).cast(), 8),
                -1,
                "write beyond the largest value"
            );
            ensure_eq!(libc::fcntl(small, libc::F_GETFD), libc::FD_CLOEXEC, "close-on-exec");
            ensure_eq!(
                libc::fcntl(small, libc::F_GETFL) & libc::O_NONBLOCK,
                0,
                "O_NONBLOCK of the small one"
            );
            if let Some(fd) = semaphore {
                let flags = libc::fcntl(fd, libc::F_GETFL);
                check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK), "F_SETFL")?;
                let got: Vec<_> = (0..4).map(|_| read(fd)).collect();
                ensure_eq!(got, [Ok(1), Ok(1), Ok(1), Err(libc::EAGAIN)], "reads of the semaphore");
            }
            let n = 99u64;
            ensure_eq!(libc::write(shared, (&raw const n).cast(), 8), 8, "write to the shared one");
        }
        ensure_eq!(read(small), Ok(5), "the small one");
        ensure_eq!(read(large), Ok(most), "the large one");
        z.join(child)
    })
}
