//! Kernel state: zombies: children that have ended, by exit or by signal, and are not yet waited for.
#![allow(unsafe_code, reason = "fork, kill and wait through the C library")]

use zoo::{ensure_eq, wait_state};

fn main() {
    zoo::run(|z| {
        let mut dead = Vec::new();
        for code in [0, 1, 42, z.param("ZOO_CODE", 127) as i32] {
            dead.push((z.fork(|_| zoo::exit_now(code))?, code << 8));
        }
        for signal in
            [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1, libc::SIGALRM, libc::SIGRTMIN() + 5]
        {
            let child = z.fork(|_| {
                loop {
                    zoo::nap(1000);
                }
            })?;
            // SAFETY: our own child.
            unsafe { libc::kill(child, signal) };
            dead.push((child, signal));
        }
        // Zombies that lead a session and a group of their own.
        dead.push((z.fork(|_| leader(true))?, 3 << 8));
        dead.push((z.fork(|_| leader(false))?, 3 << 8));
        // A live child with a zombie of its own.
        let middle = z.fork(|z| {
            let child = z.fork(|_| zoo::exit_now(77))?;
            wait_state(child, 'Z')?;
            z.publish("middle", "");
            z.wait_for_check();
            ensure_eq!(zoo::wait4(child, 0)?, 77 << 8, "status of the grandchild");
            Ok(())
        })?;
        for &(pid, _) in &dead {
            wait_state(pid, 'Z')?;
        }
        z.wait_for("middle")?;
        z.ready()?;
        z.wait_for_check();
        for &(pid, status) in &dead {
            ensure_eq!(zoo::state_of(pid), Some('Z'), "state of {pid}");
            ensure_eq!(zoo::wait4(pid, 0)?, status, "wait status of {pid}");
        }
        z.join(middle)
    })
}

/// Becomes a leader and ends with 3.
fn leader(session: bool) -> ! {
    // SAFETY: integers only.
    unsafe { if session { libc::setsid() } else { libc::setpgid(0, 0) } };
    zoo::exit_now(3)
}
