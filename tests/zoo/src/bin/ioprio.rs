//! Kernel state: I/O priorities of threads and of a child.
#![allow(unsafe_code, reason = "ioprio_set has no library function")]

use zoo::{Check, Zoo, check, ensure_eq};

fn get() -> i64 {
    // SAFETY: integers only.
    unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) }
}

fn stay(z: &Zoo, name: &str, class: i64, level: i64) -> Check {
    // SAFETY: integers only.
    check(
        unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, class << 13 | level) } as i32,
        "ioprio_set",
    )?;
    z.publish(&format!("up.{name}"), "");
    z.wait_for_check();
    ensure_eq!(get(), class << 13 | level, "I/O priority of {name}");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        let child = z.fork(|z| stay(z, "child", 3, 0))?;
        let thread = std::thread::spawn(|| stay(z, "thread", 2, 7));
        z.wait_for("up.child")?;
        z.wait_for("up.thread")?;
        let before = get();
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(get(), before, "I/O priority of the main thread");
        thread.join().map_err(|_| "thread panicked")??;
        z.join(child)
    })
}
