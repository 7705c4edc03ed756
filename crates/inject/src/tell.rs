//! Having a thread stop by itself at a place of our choosing, without following every system call to it.
//!
//! A traced thread that sends itself a signal stops for its delivery, even if the process ignores the signal; without a
//! tracer the kernel drops an ignored signal at once. So foreign code can *tell* its controller that it is done with one
//! stop instead of two for each system call, and nothing happens if the controller is gone. While foreign code runs, the
//! thread's mask blocks every other signal (PTRACE_SETSIGMASK), so that no handler runs in between.

use crate::tracee::Stopped;
use crate::{Error, Result};
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::wait::{self, Status, Stop};

/// Signals that arrived for the program while foreign code ran in its thread, to be sent again afterwards.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    signals: u64,
}

impl Owed {
    /// Notes a signal.
    pub(crate) fn add(&mut self, signal: i32) {
        self.signals |= bit(signal);
    }

    /// Adds what another owes.
    pub(crate) fn merge(&mut self, other: Owed) {
        self.signals |= other.signals;
    }

    /// Sends what is owed to the process.
    pub(crate) fn pay(&mut self, pid: i32) {
        for signal in (1..=64).filter(|s| self.signals & bit(*s) != 0) {
            // It may be dead, and then there is nobody to miss it.
            let _ = rewake_sys::signal::kill(pid, signal);
        }
        self.signals = 0;
    }
}

fn bit(signal: i32) -> u64 {
    if (1..=64).contains(&signal) { 1 << (signal - 1) } else { 0 }
}

/// The mask under which foreign code runs: everything but `signal` (0: everything) is blocked.
pub(crate) fn quiet_mask(signal: i32) -> u64 {
    !bit(signal)
}

/// A signal that a process ignores, for its threads to tell by; 0 if there is none.
///
/// `ignored`, `caught` and `pending` are the masks `SigIgn`, `SigCgt` and `ShdPnd` of `/proc/PID/status`. One that is
/// pending is not used: it would be taken.
#[must_use]
pub fn telling_signal(ignored: u64, caught: u64, pending: u64) -> i32 {
    // Job control signals have effects even where they are ignored.
    const NEVER: &[i32] =
        &[libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    let by_default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    let free = |s: &i32| pending & bit(*s) == 0;
    by_default
        .into_iter()
        .filter(|s| caught & bit(*s) == 0)
        .chain((1..=64).filter(|s| ignored & bit(*s) != 0 && !NEVER.contains(s)))
        .find(free)
        .unwrap_or(0)
}

/// Waits until the thread `tid`, which runs foreign code, has told by `signal`; returns it with its registers. `mask` is
/// the program's own.
///
/// # Errors
/// [`Error::Gone`], or an unforeseen stop.
pub(crate) fn wait_told(
    tid: i32,
    signal: i32,
    mask: u64,
    owed: &mut Owed,
) -> Result<(Stopped, Registers)> {
    loop {
        match wait::wait_soon(tid).map_err(Error::syscall("waiting for foreign code"))? {
            Status::Stop(Stop::Signal(s)) if s == signal => {
                let stopped = Stopped::assume(tid);
                let regs = stopped.registers()?;
                let ours = || ptrace::siginfo(tid).is_ok_and(|info| code(&info) == SI_TKILL);
                // Somebody else's: if the program blocks it, it waits for it. The kernel keeps only one, so there may
                // be no second stop for our own.
                if mask & bit(s) != 0 && !ours() {
                    owed.add(s);
                }
                if regs.orig_rax == libc::SYS_tkill as u64 {
                    return Ok((stopped, regs));
                }
            }
            Status::Stop(Stop::Signal(s)) => owed.add(s),
            // A member of a stopped group stops for its group once more.
            Status::Stop(Stop::Group(_) | Stop::Event) | Status::Continued => {}
            Status::Stop(stop) => {
                return Err(Error::Unexpected { tid, stop: format!("{stop:?}") });
            }
            Status::Exited(code) => {
                return Err(Error::Gone { tid, how: format!("exit code {code}") });
            }
            Status::Killed(signal) => {
                return Err(Error::Gone { tid, how: format!("signal {signal}") });
            }
        }
        ptrace::cont(tid, 0).map_err(Error::syscall("continuing foreign code"))?;
    }
}

/// Has a thread that has told forget the signal by which it did, if it blocks that under its own `mask`: if we died while it
/// stands in the stop for the delivery, the kernel would keep it for later, for good.
pub(crate) fn forget(told: Stopped, signal: i32, mask: u64, owed: &mut Owed) -> Result<Stopped> {
    if mask & bit(signal) == 0 {
        return Ok(told);
    }
    let group_stop = told.group_stop();
    let mut stopped = told.resume_to_event()?.wait_stop_noting(|signal| owed.add(signal))?;
    stopped.set_group_stop(group_stop);
    Ok(stopped)
}

const SI_TKILL: i32 = -6;

/// `si_code` of a siginfo.
fn code(info: &ptrace::SigInfo) -> i32 {
    i32::from_ne_bytes([info[8], info[9], info[10], info[11]])
}

/// Follows `count` system-call stops of a thread that runs foreign code with all signals blocked.
///
/// # Errors
/// As [`Stopped::to_syscall_stop`].
pub(crate) fn follow(mut thread: Stopped, count: usize, owed: &mut Owed) -> Result<Stopped> {
    let tid = thread.tid();
    let mut left = count;
    while left > 0 {
        thread = match thread.to_syscall_stop() {
            Ok(stopped) => {
                left -= 1;
                stopped
            }
            // Only SIGSTOP cannot be blocked.
            Err(Error::Signal { signal, .. }) => {
                owed.add(signal);
                Stopped::assume(tid)
            }
            Err(e) => return Err(e),
        };
    }
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_found_that_nobody_waits_for() {
        let all = u64::MAX;
        assert_eq!(telling_signal(0, 0, 0), libc::SIGURG);
        assert_eq!(telling_signal(0, bit(libc::SIGURG), 0), libc::SIGWINCH);
        assert_eq!(telling_signal(0, 0, bit(libc::SIGURG)), libc::SIGWINCH);
        assert_eq!(telling_signal(bit(libc::SIGPIPE), all & !bit(libc::SIGPIPE), 0), libc::SIGPIPE);
        assert_eq!(telling_signal(0, all, 0), 0);
        assert_eq!(telling_signal(bit(libc::SIGCONT) | bit(libc::SIGTSTP), all, 0), 0);
        assert_eq!(telling_signal(all, all, all), 0);
    }

    #[test]
    fn only_the_telling_signal_gets_through() {
        assert_eq!(quiet_mask(libc::SIGURG), !bit(libc::SIGURG));
        assert_eq!(quiet_mask(0), u64::MAX);
    }
}
