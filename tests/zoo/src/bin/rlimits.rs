//! Kernel state: resource limits, soft and hard lowered, in the root and others in a child; a descriptor above the limit.
//! With ZOO_FSIZE=4096 files may not grow beyond a page: what a checkpoint does inside the task must not stumble on that.
#![allow(unsafe_code, reason = "setrlimit through the C library")]

use zoo::{Check, check, ensure, ensure_eq};

const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

fn set(which: usize, soft: u64, hard: u64) -> Check {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is a local.
    check(unsafe { libc::setrlimit(which as _, &limit) }, &format!("RLIMIT_{}", NAMES[which]))
}

fn all() -> Result<Vec<(u64, u64)>, String> {
    let mut found = Vec::new();
    for which in 0..16 {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is a local.
        check(unsafe { libc::getrlimit(which, &mut limit) }, "getrlimit")?;
        found.push((limit.rlim_cur, limit.rlim_max));
    }
    Ok(found)
}

fn same(before: &[(u64, u64)], who: &str) -> Check {
    for ((got, want), name) in all()?.iter().zip(before).zip(NAMES) {
        ensure_eq!(got, want, "RLIMIT_{name} of the {who} (soft, hard)");
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let child = z.fork(|z| {
            for (which, (soft, hard)) in
                [(4, (0, 0)), (7, (64, 128)), (0, (5000, 6000)), (3, (1 << 20, 2 << 20))]
            {
                set(which, soft, hard)?;
            }
            let before = all()?;
            z.publish("up", "");
            z.wait_for_check();
            same(&before, "child")
        })?;
        z.wait_for("up")?;
        // SAFETY: duplicates standard input to a number that will be above the limit.
        ensure_eq!(unsafe { libc::dup2(0, 300) }, 300, "dup2");
        let (_, stack_hard) = all()?[3];
        set(0, 10_000, 20_000)?;
        let file_size = z.param("ZOO_FSIZE", 1 << 30) as u64;
        set(1, file_size, 1 << 31)?;
        set(2, 1 << 32, 1 << 33)?;
        set(3, 4 << 20, stack_hard)?;
        set(4, 0, 1 << 20)?;
        set(7, 32, 256)?;
        set(8, 64 << 10, 64 << 10)?;
        set(9, 1 << 40, 1 << 41)?;
        set(11, 100, 200)?;
        set(12, 4096, 8192)?;
        set(13, 0, 0)?;
        set(15, 1_000_000, 2_000_000)?;
        let before = all()?;
        z.ready()?;
        z.wait_for_check();
        same(&before, "root")?;
        // SAFETY: integers only.
        let (kept, fresh) =
            unsafe { (libc::fcntl(300, libc::F_GETFD), libc::fcntl(0, libc::F_DUPFD, 40)) };
        ensure_eq!(kept, 0, "the descriptor above the limit");
        ensure!(fresh < 0, "a descriptor above RLIMIT_NOFILE could be made");
        z.join(child)
    })
}
