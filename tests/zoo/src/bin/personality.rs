//! Kernel state: the personality: ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC and more, other ones in a child.
#![allow(unsafe_code, reason = "personality through the C library")]

use zoo::{check, ensure_eq};

fn get() -> i32 {
    // SAFETY: 0xffffffff only asks.
    unsafe { libc::personality(0xffff_ffff) }
}

fn set(flags: i32) -> zoo::Check {
    // SAFETY: an integer.
    check(unsafe { libc::personality(flags as _) }, "personality")
}

fn main() {
    zoo::run(|z| {
        let child = z.fork(|z| {
            set(libc::UNAME26 | libc::ADDR_COMPAT_LAYOUT)?;
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(get(), libc::UNAME26 | libc::ADDR_COMPAT_LAYOUT, "personality of the child");
            Ok(())
        })?;
        z.wait_for("up")?;
        set(libc::ADDR_NO_RANDOMIZE | libc::READ_IMPLIES_EXEC)?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(get(), libc::ADDR_NO_RANDOMIZE | libc::READ_IMPLIES_EXEC, "personality");
        z.join(child)
    })
}
