//! Kernel state: SCHED_RESET_ON_FORK: a flag of the policy that children do not inherit.
#![allow(unsafe_code, reason = "scheduling system calls")]

use zoo::{check, ensure_eq};

const SCHED_RESET_ON_FORK: i32 = 0x4000_0000;

fn policy() -> i32 {
    // SAFETY: only asks.
    unsafe { libc::sched_getscheduler(0) }
}

fn main() {
    zoo::run(|z| {
        let param = libc::sched_param { sched_priority: 0 };
        // SAFETY: `param` is a local.
        check(
            unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH | SCHED_RESET_ON_FORK, &param) },
            "policy",
        )?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(policy(), libc::SCHED_BATCH | SCHED_RESET_ON_FORK, "policy with its flag");
        Ok(())
    })
}
