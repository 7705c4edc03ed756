//! wait4(2) on tracees and children, with its status as a value.

use crate::call::{Result, pid_arg, syscall};
use std::time::{Duration, Instant};

/// What waiting reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Exited with this code.
    Exited(i32),
    /// Killed by this signal.
    Killed(i32),
    /// Stopped by the kernel on behalf of ptrace.
    Stop(Stop),
    /// Continued (only if asked for).
    Continued,
}

/// A ptrace stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// `PTRACE_EVENT_STOP` by PTRACE_INTERRUPT (or of a new tracee).
    Event,
    /// `PTRACE_EVENT_STOP` that is a group stop, by this signal.
    Group(i32),
    /// Entry to or exit from a system call (with `PTRACE_O_TRACESYSGOOD`).
    Syscall,
    /// This signal is about to be delivered.
    Signal(i32),
    /// Another `PTRACE_EVENT_*`.
    Other(i32),
}

fn decode(status: i32) -> Status {
    const EVENT_STOP: i32 = 128;
    if status & 0x7f == 0 {
        return Status::Exited((status >> 8) & 0xff);
    }
    if status == 0xffff {
        return Status::Continued;
    }
    if status & 0xff != 0x7f {
        return Status::Killed(status & 0x7f);
    }
    let signal = (status >> 8) & 0xff;
    Status::Stop(match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        EVENT_STOP if signal == libc::SIGTRAP => Stop::Event,
        EVENT_STOP => Stop::Group(signal),
        event => Stop::Other(event),
    })
}

fn wait4(pid: i32, options: i32) -> Result<Option<(i32, Status)>> {
    loop {
        let mut status = 0i32;
        // SAFETY: status is a live i32; no rusage is asked for.
        let got = unsafe {
            syscall(
                "wait4",
                libc::SYS_wait4,
                [pid_arg(pid), (&raw mut status) as usize, options as usize, 0, 0, 0],
            )
        };
        match got {
            Ok(0) => return Ok(None),
            Ok(pid) => return Ok(Some((pid as i32, decode(status)))),
            Err(e) if e.errno == crate::Errno::INTR => {}
            Err(e) => return Err(e),
        }
    }
}

/// Waits for `tid` (a tracee or child of any kind) to change state.
///
/// # Errors
/// `ECHILD` if it is neither.
pub fn wait(tid: i32) -> Result<Status> {
    loop {
        if let Some((_, status)) = wait4(tid, libc::__WALL)? {
            return Ok(status);
        }
    }
}

/// Waits until `tid` is dead and reaped, or nobody that can be waited for. A failure of another kind is not taken for an
/// answer at once: the first thread of a process whose other threads are not reaped never dies.
pub fn until_dead(tid: i32) {
    const TRIES: u32 = 10;
    let mut failures = 0;
    while failures < TRIES {
        match wait(tid) {
            Ok(Status::Exited(_) | Status::Killed(_)) => return,
            Ok(_) => {}
            Err(e) if e.errno == crate::Errno::CHILD => return,
            Err(_) => failures += 1,
        }
    }
}

/// As [`until_dead`], but no longer than until `deadline`: whether it is dead, or nobody that can be waited for.
#[must_use]
pub fn until_dead_before(tid: i32, deadline: Instant) -> bool {
    const NAP: Duration = Duration::from_millis(1);
    for looks in 0.. {
        match try_wait(tid) {
            Ok(Some(Status::Exited(_) | Status::Killed(_))) => return true,
            Err(e) if e.errno == crate::Errno::CHILD => return true,
            Ok(Some(_)) => continue,
            Ok(None) | Err(_) => {}
        }
        if Instant::now() > deadline {
            return false;
        }
        // Most die at once.
        if looks < 100 { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
    false
}

/// As [`wait`], for a thread that is about to stop: looks again and again for a while, letting others run in between,
/// before it sleeps. A CPU that falls idle meanwhile would take longer to wake than the stop takes.
///
/// # Errors
/// As [`wait`].
pub fn wait_soon(tid: i32) -> Result<Status> {
    const LOOKS: u32 = 200;
    for _ in 0..LOOKS {
        if let Some(status) = try_wait(tid)? {
            return Ok(status);
        }
        std::thread::yield_now();
    }
    wait(tid)
}

/// Looks whether `tid` changed state, without waiting.
///
/// # Errors
/// `ECHILD` if it is neither tracee nor child.
pub fn try_wait(tid: i32) -> Result<Option<Status>> {
    Ok(wait4(tid, libc::__WALL | libc::WNOHANG)?.map(|(_, status)| status))
}

/// Looks whether `tid` (thread of another tracer excluded: `__WNOTHREAD`) changed state, without waiting.
///
/// # Errors
/// `ECHILD` if there is nothing to wait for.
pub fn try_wait_any() -> Result<Option<(i32, Status)>> {
    wait4(-1, libc::__WALL | libc::WNOHANG | libc::__WNOTHREAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_apart() {
        assert_eq!(decode(0x0300), Status::Exited(3));
        assert_eq!(decode(0x0009), Status::Killed(9));
        assert_eq!(decode(0x008b), Status::Killed(11));
        assert_eq!(decode(0x857f), Status::Stop(Stop::Syscall));
        assert_eq!(decode(0x80_057f), Status::Stop(Stop::Event));
        assert_eq!(decode(0x80_137f), Status::Stop(Stop::Group(19)));
        assert_eq!(decode(0x0a7f), Status::Stop(Stop::Signal(10)));
    }
}
