//! Kernel state: zombies: children that have ended, by exit or by signal, and are not yet waited for. With ZOO_CORE there is one more,
//! which has left a core file.
#![allow(unsafe_code, reason = "fork, kill and wait through the C library")]

use zoo::{check, ensure_eq, wait_state};

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
        let core = (z.param("ZOO_CORE", 0) > 0).then(|| core(z)).transpose()?;
        // Zombies that lead a session and a group of their own.
        dead.push((z.fork(|_| leader(true))?, 3 << 8));
        dead.push((z.fork(|_| leader(false))?, 3 << 8));
        // Pipelines: of one the first command has ended, and with it the leader of the group; of another the leader is waited
        // for already, so that the group has its number from nobody.
        let ended = z.fork(|_| join(0))?;
        wait_state(ended, 'Z')?;
        dead.push((ended, 3 << 8));
        let reaped = z.fork(|_| join(0))?;
        wait_state(reaped, 'Z')?;
        let second = z.fork(|_| join(reaped))?;
        wait_state(second, 'Z')?;
        ensure_eq!(zoo::wait4(reaped, 0)?, 3 << 8, "status of a group's leader");
        dead.push((second, 3 << 8));
        let follower = z.fork(|z| {
            // SAFETY: integers only.
            zoo::check(unsafe { libc::setpgid(0, ended) }, "setpgid")?;
            z.publish("follower", "");
            z.wait_for_check();
            // SAFETY: no arguments.
            ensure_eq!(unsafe { libc::getpgrp() }, ended, "group of a dead leader's follower");
            Ok(())
        })?;
        z.wait_for("follower")?;
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
        if let Some(core) = core {
            wait_state(core, 'Z')?;
            z.publish("core", &core.to_string());
        }
        z.ready()?;
        z.wait_for_check();
        // SAFETY: integers only.
        let group = |pid| unsafe { libc::getpgid(pid) };
        ensure_eq!(group(ended), ended, "group of a dead leader");
        ensure_eq!(group(second), reaped, "group of a zombie whose leader is waited for");
        z.join(follower)?;
        for &(pid, status) in &dead {
            ensure_eq!(zoo::state_of(pid), Some('Z'), "state of {pid}");
            ensure_eq!(zoo::wait4(pid, 0)?, status, "wait status of {pid}");
        }
        if let Some(core) = core {
            // Whoever looks from outside knows about the flag.
            let signal = zoo::wait4(core, 0)? & !WITH_CORE;
            ensure_eq!(signal, libc::SIGABRT, "signal of the one that left a core file");
        }
        z.join(middle)
    })
}

/// In a wait status.
const WITH_CORE: i32 = 0x80;

/// A child that leaves a core file in our directory.
fn core(z: &zoo::Zoo) -> Result<i32, String> {
    let dir = zoo::cstring(z.dir());
    let all = libc::rlimit { rlim_cur: 64 << 20, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a string and a struct that outlive the calls.
    let child = z.fork(|_| unsafe {
        check(libc::chdir(dir.as_ptr()), "chdir")?;
        check(libc::setrlimit(libc::RLIMIT_CORE, &all), "RLIMIT_CORE")?;
        libc::abort()
    })?;
    // SAFETY: all zeros are a valid one, and it outlives the call.
    let status = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let how = libc::WEXITED | libc::WNOWAIT;
        check(libc::waitid(libc::P_PID, child as u32, &mut info, how), "waitid")?;
        info.si_code
    };
    if status != libc::CLD_DUMPED {
        z.skip("this machine leaves no core files");
    }
    Ok(child)
}

/// Joins a group, or leads one of its own (0), and ends with 3.
fn join(group: i32) -> ! {
    // SAFETY: integers only.
    unsafe { libc::setpgid(0, group) };
    zoo::exit_now(3)
}

/// Becomes a leader and ends with 3.
fn leader(session: bool) -> ! {
    // SAFETY: integers only.
    unsafe { if session { libc::setsid() } else { libc::setpgid(0, 0) } };
    zoo::exit_now(3)
}
