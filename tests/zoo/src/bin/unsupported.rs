//! Kernel state that nobody can checkpoint: a perf event descriptor. A dump must be refused, and leave everything as it
//! was.
#![allow(unsafe_code, reason = "perf_event_open has no library function")]

use zoo::{ensure, ensure_eq, ok};

fn main() {
    zoo::run(|z| {
        // PERF_TYPE_SOFTWARE, PERF_ATTR_SIZE_VER0, PERF_COUNT_SW_TASK_CLOCK.
        let mut attr = [0u64; 16];
        attr[0] = 1 | 64 << 32;
        attr[1] = 1;
        // SAFETY: `attr` is larger than the size it states.
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 0) };
        if fd < 0 {
            z.skip(&format!("perf_event_open: {}", std::io::Error::last_os_error()));
        }
        let read = || -> Result<u64, String> {
            let mut value = 0u64;
            // SAFETY: eight bytes of a local.
            let n = unsafe { libc::read(fd as i32, (&raw mut value).cast(), 8) };
            ensure_eq!(ok(n as i64, "read")?, 8, "bytes of the counter");
            Ok(value)
        };
        let before = read()?;
        z.ready()?;
        z.wait_for_check();
        ensure!(read()? > before, "the counter stands still");
        Ok(())
    })
}
