//! Kernel state: a full descriptor table: every number below RLIMIT_NOFILE is taken, soft and hard. A checkpoint must do
//! without opening anything inside.
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
        // Telling needs a descriptor: one is let go for a moment (the harness looks until nothing changes any more).
        // SAFETY: integers.
        unsafe { libc::close(LIMIT as i32 - 1) };
        z.ready()?;
        // SAFETY: integers.
        ensure_eq!(unsafe { libc::dup(0) }, LIMIT as i32 - 1, "last descriptor");
        z.wait_for_check();
        for fd in 0..LIMIT as i32 {
            // SAFETY: integers.
            ensure!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0, "descriptor {fd} is gone");
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
