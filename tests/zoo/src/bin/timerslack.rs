//! Kernel state: the timer slack of each process and thread, and the default that each goes back to.
#![allow(unsafe_code, reason = "prctl through the C library")]

use zoo::{check, ensure_eq};

fn slack() -> i64 {
    // SAFETY: only asks.
    unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) as i64 }
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 123_456) }, "PR_SET_TIMERSLACK")?;
        // A child whose default is neither its parent's slack nor its parent's default, nor what the restorer has.
        let child = z.fork(|z| {
            // SAFETY: integers only.
            check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 777) }, "PR_SET_TIMERSLACK")?;
            z.publish("up.child", "");
            z.wait_for_check();
            ensure_eq!(slack(), 777, "timer slack of the child");
            // SAFETY: integers only.
            check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 0) }, "PR_SET_TIMERSLACK")?;
            ensure_eq!(slack(), 123_456, "default timer slack of the child");
            Ok(())
        })?;
        z.wait_for("up.child")?;
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 0) }, "PR_SET_TIMERSLACK")?;
        let own = slack();
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 234_567) }, "PR_SET_TIMERSLACK")?;
        let mut threads = Vec::new();
        for i in 0..4 {
            let thread = std::thread::spawn(move || -> zoo::Check {
                // SAFETY: integers only.
                check(
                    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1000 + i) },
                    "PR_SET_TIMERSLACK",
                )?;
                z.publish(&format!("up.{i}"), "");
                z.wait_for_check();
                ensure_eq!(slack(), 1000 + i, "timer slack of thread {i}");
                // SAFETY: 0 sets the slack back to the thread's default, which it has from its creator.
                check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 0) }, "PR_SET_TIMERSLACK")?;
                ensure_eq!(slack(), 234_567, "default timer slack of thread {i}");
                Ok(())
            });
            threads.push(thread);
            z.wait_for(&format!("up.{i}"))?;
        }
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(slack(), 234_567, "timer slack of the main thread");
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 0) }, "PR_SET_TIMERSLACK")?;
        ensure_eq!(slack(), own, "default timer slack of the main thread");
        for (i, t) in threads.into_iter().enumerate() {
            t.join().map_err(|_| format!("thread {i} panicked"))??;
        }
        z.join(child)
    })
}
