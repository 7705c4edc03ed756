//! Kernel state: idle io_uring instances: a small one that has gone round a few times, with completions that were not taken
//! and a submission that was not made yet; a large one, never used; with ZOO_NO_ARRAY both without the array of numbers, with
//! ZOO_FLAGS made with these flags. With ZOO_SILENT there were fewer completions than requests, with ZOO_MORE more. With
//! ZOO_WORKER there is a worker of the kernel's. With
//! ZOO_BUSY one has a request in flight (a dump must be refused), with ZOO_SOON one that ends after so many milliseconds.
#![allow(unsafe_code, reason = "io_uring has no library functions here")]

use zoo::uring::{
    ASYNC, NO_SQARRAY, OP_NOP, OP_POLL, OP_TIMEOUT, Request, Ring, SINGLE_ISSUER, SKIP_SUCCESS,
    SUBMIT_ALL,
};
use zoo::{check, ensure_eq};

/// Of a timeout: it is told several times.
const MULTISHOT: u32 = 1 << 6;

/// A ring, for another thread.
struct Addressed<'a>(&'a Ring);
// SAFETY: the thread that has it waits for the other one.
unsafe impl Send for Addressed<'_> {}
impl Addressed<'_> {
    fn enter(self) -> Result<i64, String> {
        self.0.push(OP_NOP, 0, std::ptr::null_mut(), 0, 0);
        let done = self.0.enter(1, 0);
        self.0.set(4, self.0.word(0));
        done
    }
}

fn main() {
    zoo::run(|z| {
        let has = |name: &str| z.param(name, 0) != 0;
        let mut flags = if has("ZOO_NO_ARRAY") { NO_SQARRAY } else { 0 };
        flags |= if has("ZOO_SINGLE") { SINGLE_ISSUER } else { 0 };
        flags |= z.param("ZOO_FLAGS", 0) as u32;
        let single = flags & SINGLE_ISSUER != 0;
        let small = Ring::new(8, flags).unwrap_or_else(|why| z.skip(&why));
        let large = Ring::new(z.param("ZOO_LARGE", 2048) as u32, flags)?;
        for n in 0..1003u64 {
            small.push(OP_NOP, 0, std::ptr::null_mut(), 0, n);
            ensure_eq!(small.enter(1, 1)?, 1, "requests made");
            ensure_eq!(small.take(), Some((n, 0)), "completion {n}");
        }
        // Such requests are as they are taken, whatever becomes of completions.
        let silent = z.param("ZOO_SILENT", 0) as u32;
        for _ in 0..silent {
            small.put(Request { op: OP_NOP, flags: SKIP_SUCCESS, ..Request::default() });
            ensure_eq!(small.enter(1, 0)?, 1, "requests made");
        }
        // A timer that tells of itself several times.
        let more = z.param("ZOO_MORE", 0) as u32;
        let mut requests = 1003 + silent;
        if more > 0 {
            let time = [0i64, 1_000_000];
            small.put(Request {
                op: OP_TIMEOUT,
                offset: u64::from(more),
                buffer: time.as_ptr() as u64,
                len: 1,
                word: MULTISHOT,
                user_data: 5,
                ..Request::default()
            });
            for n in 0..more {
                small.enter(u32::from(n == 0), 1)?;
                ensure_eq!(small.take(), Some((5, -libc::ETIME)), "a tick");
            }
            requests += 1;
        }
        if has("ZOO_WORKER") {
            let silent = ASYNC | SKIP_SUCCESS;
            small.put(Request { op: OP_NOP, flags: silent, ..Request::default() });
            ensure_eq!(small.enter(1, 0)?, 1, "requests made");
            requests += 1;
            let tasks = std::fs::read_dir("/proc/self/task").map_err(|e| e.to_string())?;
            ensure_eq!(tasks.count(), 2, "threads, one of them a worker of the kernel's");
        }
        let completions = 1003 + more;
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
        let soon = z.param("ZOO_SOON", 0) as i64;
        let time = [0i64, soon * 1_000_000];
        if soon > 0 {
            large.put(Request {
                op: OP_TIMEOUT,
                buffer: time.as_ptr() as u64,
                len: 1,
                user_data: 9,
                ..Request::default()
            });
            ensure_eq!(large.enter(1, 0)?, 1, "requests made");
        }
        // Counters that the program may as well write itself.
        small.set(32, 3);
        small.set(44, 9);
        // It shares the large one; nobody else submits while it does.
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for("child.go")?;
            large.works()
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(
            (small.word(0), small.word(4)),
            (requests + 2, requests + 3),
            "submission queue"
        );
        ensure_eq!(
            (small.word(8), small.word(12)),
            (completions, completions + 2),
            "completion queue"
        );
        ensure_eq!(
            (small.word(32), small.word(40), small.word(44)),
            (3, 0, 9),
            "words of the rings"
        );
        if soon > 0 {
            large.enter(0, 1)?;
            ensure_eq!(large.take(), Some((9, -libc::ETIME)), "completion of what was waited for");
        }
        ensure_eq!(small.take(), Some((71, 0)), "a completion that was not taken");
        ensure_eq!(small.enter(1, 0)?, 1, "the request that was not made");
        ensure_eq!(small.take(), Some((72, 0)), "the next completion that was not taken");
        ensure_eq!(small.take(), Some((73, 0)), "completion of what was made just now");
        ensure_eq!(small.take(), None, "nothing is left");
        small.works()?;
        // With SUBMIT_ALL an impossible request does not end a submission.
        small.push(255, 0, std::ptr::null_mut(), 0, 80);
        small.push(OP_NOP, 0, std::ptr::null_mut(), 0, 81);
        let all = flags & SUBMIT_ALL != 0;
        ensure_eq!(small.enter(2, 0)?, if all { 2 } else { 1 }, "requests made, one impossible");
        small.enter(if all { 0 } else { 1 }, 1)?;
        ensure_eq!(small.take(), Some((80, -libc::EINVAL)), "completion of the impossible one");
        ensure_eq!(small.take(), Some((81, 0)), "completion of the one behind it");
        if single {
            let other = std::thread::scope(|s| {
                let other = Addressed(&small);
                s.spawn(move || other.enter()).join().unwrap_or_else(|_| Err("panic".into()))
            });
            ensure_eq!(
                other,
                Err(format!("io_uring_enter: errno {}", libc::EEXIST)),
                "another thread"
            );
        }
        if !has("ZOO_BUSY") {
            large.works()?;
        }
        if !has("ZOO_BUSY") && !single {
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
