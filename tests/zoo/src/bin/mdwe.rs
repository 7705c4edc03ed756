//! Kernel state: a process that gave up making memory executable (PR_SET_MDWE), and one that may not read the time stamp
//! counter (PR_SET_TSC).
#![allow(unsafe_code, reason = "prctl and mmap through the C library")]

use zoo::{check, ensure, ensure_eq, errno};

const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const REFUSE_EXEC_GAIN: i32 = 1;
const TSC_SIGSEGV: i32 = 2;

fn tsc_mode() -> Result<i32, String> {
    let mut mode = 0i32;
    // SAFETY: `mode` is a local int, which is what is written.
    check(unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut mode, 0, 0, 0) }, "PR_GET_TSC")?;
    Ok(mode)
}

fn main() {
    zoo::run(|z| {
        // SAFETY: integers.
        if unsafe { libc::prctl(PR_GET_MDWE, 0, 0, 0, 0) } < 0 {
            z.skip("the kernel has no PR_SET_MDWE (Linux 6.3)");
        }
        let page = zoo::mmap_anon(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        let blind = z.fork(|z| {
            // SAFETY: integers. Nothing below looks at a clock, which would read the counter.
            check(unsafe { libc::prctl(libc::PR_SET_TSC, TSC_SIGSEGV, 0, 0, 0) }, "PR_SET_TSC")?;
            z.publish("blind", "");
            z.wait_for_check();
            ensure_eq!(tsc_mode()?, TSC_SIGSEGV, "mode of the time stamp counter");
            // SAFETY: integers.
            check(unsafe { libc::prctl(libc::PR_SET_TSC, 1, 0, 0, 0) }, "PR_SET_TSC")?;
            Ok(())
        })?;
        z.wait_for("blind")?;
        // SAFETY: integers.
        unsafe { check(libc::prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0), "PR_SET_MDWE")? };
        z.ready()?;
        z.wait_for_check();
        // SAFETY: integers, and a page of our own.
        unsafe {
            ensure_eq!(libc::prctl(PR_GET_MDWE, 0, 0, 0, 0), REFUSE_EXEC_GAIN, "PR_GET_MDWE");
            let gained = libc::mprotect(page.cast(), 4096, libc::PROT_READ | libc::PROT_EXEC);
            ensure!(gained < 0 && errno() == libc::EACCES, "memory can be made executable");
        }
        ensure_eq!(tsc_mode()?, 1, "mode of the parent's time stamp counter");
        z.join(blind)
    })
}
