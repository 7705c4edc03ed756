//! Kernel state: a full descriptor table: every number below RLIMIT_NOFILE is taken, soft and hard (but for as many as
//! `ZOO_FREE` says). A checkpoint must do without opening anything inside.
#![allow(unsafe_code, reason = "raw descriptors and rlimits")]

use zoo::{check, ensure, ensure_eq, errno};

const LIMIT: u64 = 64;

fn main() {
    zoo::run(|z| {
        let limit = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
        // SAFETY: `limit` is a local; integers.
        unsafe {
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), "setrlimit")?;
            while libc::dup(0) >= 0 {}
            ensure_eq!(errno(), libc::EMFILE, "why no more descriptors can be had");
        }
        let free = z.param("ZOO_FREE", 0) as i32;
        let used = LIMIT as i32 - free;
        // Telling needs a descriptor: one is let go for a moment (the harness looks until nothing changes any more).
        for fd in used.min(LIMIT as i32 - 1)..LIMIT as i32 {
            // SAFETY: integers.
            unsafe { libc::close(fd) };
        }
        z.ready()?;
        if free == 0 {
            // SAFETY: integers.
            ensure_eq!(unsafe { libc::dup(0) }, LIMIT as i32 - 1, "last descriptor");
        }
        z.wait_for_check();
        for fd in 0..used {
            // SAFETY: integers.
            ensure!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0, "descriptor {fd} is gone");
        }
        for fd in used..LIMIT as i32 {
            // SAFETY: integers.
            ensure_eq!(unsafe { libc::dup(0) }, fd, "descriptor that was free");
        }
        // SAFETY: integers.
        unsafe {
            ensure!(
                libc::dup(0) < 0 && errno() == libc::EMFILE,
                "there is room for another descriptor"
            );
            // Room for the result.
            for fd in 3..LIMIT as i32 {
                libc::close(fd);
            }
        }
        Ok(())
    })
}
