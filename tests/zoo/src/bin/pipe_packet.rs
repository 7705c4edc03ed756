//! Kernel state: pipes in packet mode (O_DIRECT): the boundaries of what is queued.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{check, ensure_eq};

fn main() {
    zoo::run(|z| {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors; buffers of the lengths given (here and below).
        unsafe {
            check(libc::pipe2(fds.as_mut_ptr(), libc::O_DIRECT | libc::O_NONBLOCK), "pipe2")?;
            for text in [c"one", c"number two", c"3"] {
                libc::write(fds[1], text.as_ptr().cast(), text.count_bytes());
            }
        }
        z.ready()?;
        z.wait_for_check();
        let mut buf = [0u8; 100];
        for text in ["one", "number two", "3"] {
            let n = unsafe { libc::read(fds[0], buf.as_mut_ptr().cast(), 100) };
            ensure_eq!(&buf[..n.max(0) as usize], text.as_bytes(), "packet");
        }
        let flags = unsafe { libc::fcntl(fds[1], libc::F_GETFL) };
        ensure_eq!(flags & libc::O_DIRECT, libc::O_DIRECT, "packet mode of the write end");
        Ok(())
    })
}
