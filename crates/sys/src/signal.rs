//! Signals to threads.

use crate::call::{Result, pid_arg, syscall};

/// `kill(2)`.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: numbers only.
    unsafe { syscall("kill", libc::SYS_kill, [pid_arg(pid), signal as usize, 0, 0, 0, 0]) }
        .map(drop)
}
