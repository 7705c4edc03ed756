//! Kernel state: descriptors of memory devices: null, zero, full, random, urandom, with flags and a position.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{cstring, ensure_eq, errno, ok};

fn main() {
    zoo::run(|z| {
        let open = |name: &str, flags: i32| -> Result<i32, String> {
            let path = cstring(name);
            // SAFETY: NUL-terminated.
            Ok(ok(unsafe { libc::open(path.as_ptr(), flags) } as i64, name)? as i32)
        };
        let null = open("/dev/null", libc::O_RDWR | libc::O_APPEND | libc::O_CLOEXEC)?;
        let zero = open("/dev/zero", libc::O_RDONLY)?;
        let full = open("/dev/full", libc::O_RDWR | libc::O_NONBLOCK)?;
        let random = open("/dev/random", libc::O_RDONLY)?;
        let urandom = open("/dev/urandom", libc::O_RDWR)?;
        z.ready()?;
        z.wait_for_check();
        let mut buf = [7u8; 64];
        // SAFETY: the buffer is valid for the lengths given.
        unsafe {
            ensure_eq!(libc::read(null, buf.as_mut_ptr().cast(), 64), 0, "read of /dev/null");
            ensure_eq!(libc::write(null, buf.as_ptr().cast(), 64), 64, "write to /dev/null");
            ensure_eq!(libc::read(zero, buf.as_mut_ptr().cast(), 64), 64, "read of /dev/zero");
            ensure_eq!(buf, [0; 64], "what /dev/zero gives");
            ensure_eq!(
                (libc::write(full, buf.as_ptr().cast(), 64), errno()),
                (-1, libc::ENOSPC),
                "write to /dev/full"
            );
            ensure_eq!(libc::read(random, buf.as_mut_ptr().cast(), 64), 64, "read of /dev/random");
            let first = buf;
            ensure_eq!(
                libc::read(urandom, buf.as_mut_ptr().cast(), 64),
                64,
                "read of /dev/urandom"
            );
            ensure_eq!(first != buf, true, "two random reads differ");
            ensure_eq!(
                libc::fcntl(full, libc::F_GETFL) & libc::O_NONBLOCK,
                libc::O_NONBLOCK,
                "O_NONBLOCK"
            );
            ensure_eq!(libc::fcntl(null, libc::F_GETFD), libc::FD_CLOEXEC, "close-on-exec");
            ensure_eq!(
                libc::write(zero, buf.as_ptr().cast(), 1),
                -1,
                "write to a read-only descriptor"
            );
        }
        Ok(())
    })
}
