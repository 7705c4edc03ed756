//! Kernel state: a restart block. Sleeps in nanosleep nearly all the time and notes every EINTR in `DIR/eintr`: a
//! program that is dumped with `--leave-running`, however often, must not see a single one.
#![allow(unsafe_code, reason = "raw nanosleep")]

use zoo::{ensure, timespec};

fn main() {
    zoo::run(|z| {
        z.ready()?;
        let mut naps = 0;
        while !z.checking() {
            naps += 1;
            let begun = zoo::now();
            let mut left = timespec(100_000_000);
            // SAFETY: both pointers are to a local.
            while unsafe { libc::nanosleep(&left, &mut left) } != 0 {
                ensure!(zoo::errno() == libc::EINTR, "nanosleep: errno {}", zoo::errno());
                z.note("eintr", "nanosleep");
            }
            let took = zoo::now() - begun;
            ensure!(took >= 100_000_000, "a sleep of 100 ms took {} us", took / 1000);
        }
        ensure!(naps > 0, "never slept");
        Ok(())
    })
}
