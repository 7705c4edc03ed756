//! Kernel state: CPU affinity of threads and of a child.
#![allow(unsafe_code, reason = "sched_setaffinity")]

use zoo::{Check, Zoo, check, ensure_eq};

fn mask() -> Result<Vec<usize>, String> {
    // SAFETY: the set is a local of the size given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        check(
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set),
            "sched_getaffinity",
        )?;
        Ok((0..libc::CPU_SETSIZE as usize).filter(|&c| libc::CPU_ISSET(c, &set)).collect())
    }
}

fn stay(z: &Zoo, name: &str, cpu: usize) -> Check {
    // SAFETY: the set is a local of the size given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set), "sched_setaffinity")?;
    }
    z.publish(&format!("up.{name}"), "");
    z.wait_for_check();
    ensure_eq!(mask()?, [cpu], "affinity of {name}");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        let cpus = mask()?;
        if cpus.len() < 2 {
            z.skip("needs two CPUs");
        }
        let child = z.fork(|z| stay(z, "child", cpus[1]))?;
        let first = cpus[0];
        let thread = std::thread::spawn(move || stay(z, "thread", first));
        z.wait_for("up.child")?;
        z.wait_for("up.thread")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(mask()?, cpus, "affinity of the main thread");
        thread.join().map_err(|_| "thread panicked")??;
        z.join(child)
    })
}
