//! Kernel state: nice values and scheduling policies of threads and processes, with SCHED_RESET_ON_FORK. Real-time
//! policies if this machine permits them.
#![allow(unsafe_code, reason = "scheduling system calls, which act on one thread")]

use zoo::{Check, Zoo, ensure_eq};

#[derive(Debug, PartialEq)]
struct State {
    policy: i64,
    priority: i32,
    nice: i64,
}

fn state() -> State {
    // SAFETY: asks about the calling thread; `param` is a local.
    unsafe {
        let mut param: libc::sched_param = std::mem::zeroed();
        libc::syscall(libc::SYS_sched_getparam, 0, &raw mut param);
        State {
            policy: libc::syscall(libc::SYS_sched_getscheduler, 0),
            priority: param.sched_priority,
            // The system call answers 20 - nice.
            nice: 20 - libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0),
        }
    }
}

fn set(policy: i32, priority: i32, nice: i32) -> bool {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: acts on the calling thread; `param` is a local.
    unsafe {
        libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const param) == 0
            && libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) == 0
    }
}

fn stay(z: &Zoo, name: &str, policy: i32, priority: i32, nice: i32) -> Check {
    if !set(policy, priority, nice) {
        println!("{name}: not permitted ({}), left out", std::io::Error::last_os_error());
    }
    let before = state();
    z.publish(&format!("up.{name}"), "");
    z.wait_for_check();
    ensure_eq!(state(), before, "{name}");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        let kinds = [
            ("nice 7", libc::SCHED_OTHER, 0, 7),
            ("batch", libc::SCHED_BATCH, 0, 3),
            ("idle", libc::SCHED_IDLE, 0, 19),
            ("fifo", libc::SCHED_FIFO, 5, 0),
            ("rr", libc::SCHED_RR, 11, 2),
            ("negative nice", libc::SCHED_OTHER, 0, -5),
        ];
        let mut children = Vec::new();
        for (name, policy, priority, nice) in kinds {
            children.push(z.fork(|z| stay(z, &format!("child {name}"), policy, priority, nice))?);
        }
        let mut threads = Vec::new();
        for (name, policy, priority, nice) in kinds {
            threads.push(std::thread::spawn(move || {
                stay(z, &format!("thread {name}"), policy, priority, nice)
            }));
        }
        for (name, ..) in kinds {
            z.wait_for(&format!("up.child {name}"))?;
            z.wait_for(&format!("up.thread {name}"))?;
        }
        set(libc::SCHED_BATCH, 0, 1);
        let before = state();
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state(), before, "main thread");
        for thread in threads {
            thread.join().map_err(|_| "thread panicked")??;
        }
        for child in children {
            z.join(child)?;
        }
        Ok(())
    })
}
