//! Features around processes, threads and signals.

use std::fs::OpenOptions;

use rewake_sys::kcmp::{Kind, compare};
use rewake_sys::probe::{self, Child};
use rewake_sys::{Errno, SyscallError, ptrace};
use rustix::fs::MemfdFlags;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid};

use super::{Attempt, Reason, ensure, read};

fn me() -> i32 {
    getpid().as_raw_pid()
}

pub fn proc_stat() -> Attempt {
    let stat = read("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().count();
    ensure(fields >= 50, "/proc/self/stat has too few fields")
}

pub fn kcmp() -> Attempt {
    for kind in [Kind::Vm, Kind::Files, Kind::Fs, Kind::Sighand] {
        ensure(compare(me(), me(), kind)?.is_eq(), "kcmp says that I differ from myself")?;
    }
    Ok(())
}

/// A child that this thread has stopped.
fn stopped() -> Result<Child, Reason> {
    let child = Child::sleeping()?;
    child.stop(0)?;
    Ok(child)
}

pub fn seize() -> Attempt {
    stopped().map(drop)
}

pub fn peek_siginfo() -> Attempt {
    let child = stopped()?;
    rewake_sys::signal::kill(child.pid(), libc::SIGUSR1)?;
    let queued = ptrace::queued_signals(child.pid(), true)?;
    let signal =
        queued.first().and_then(|info| info.first_chunk()).map(|bytes| i32::from_ne_bytes(*bytes));
    ensure(signal == Some(libc::SIGUSR1), "a queued signal was not reported")
}

pub fn xstate() -> Attempt {
    let child = stopped()?;
    // The legacy area and the header of an XSAVE area are 576 bytes.
    let len = ptrace::regset(child.pid(), ptrace::NT_X86_XSTATE, &mut [0; 16 << 10])?;
    ensure(len >= 576, "the XSAVE area is too short")
}

pub fn rseq() -> Attempt {
    ptrace::rseq_config(stopped()?.pid())?;
    Ok(())
}

pub fn user_dispatch() -> Attempt {
    ptrace::sud_config(stopped()?.pid())?;
    Ok(())
}

pub fn syscall_info() -> Attempt {
    probe::syscall_info(stopped()?.pid())?;
    Ok(())
}

pub fn breakpoint() -> Attempt {
    #[cfg(target_arch = "x86_64")]
    {
        Ok(probe::breakpoint(stopped()?.pid(), 0x1000)?)
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err("not tried on this architecture".into())
}

pub fn queue_signal() -> Attempt {
    Ok(probe::queue_signal()?)
}

pub fn set_tid() -> Attempt {
    Ok(probe::clone_with_pid()?)
}

pub fn pidfd_open() -> Attempt {
    rustix::process::pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(())
}

pub fn pidfd_getfd() -> Attempt {
    let pidfd = rustix::process::pidfd_open(getpid(), PidfdFlags::empty())?;
    let memfd = rustix::fs::memfd_create("rewake-check", MemfdFlags::CLOEXEC)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&memfd);
    let same = rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?;
    let (a, b) = (rustix::fs::fstat(&memfd)?, rustix::fs::fstat(&same)?);
    ensure((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino), "pidfd_getfd returned another file")
}

pub fn timer_ids() -> Attempt {
    Ok(probe::timer_restore_ids()?)
}

pub fn seccomp_filters() -> Attempt {
    let child = Child::with_seccomp_filter()?;
    child.settle();
    child.stop(0)?;
    let filter = ptrace::seccomp_filter(child.pid(), 0)?;
    ensure(filter.is_some_and(|code| code.len() == 8), "the filter of a task was not reported")
}

pub fn seccomp_suspend() -> Attempt {
    const PTRACE_O_SUSPEND_SECCOMP: u32 = 1 << 21;
    Ok(Child::sleeping()?.stop(PTRACE_O_SUSPEND_SECCOMP)?)
}

pub fn ns_pid() -> Attempt {
    ensure(read("/proc/self/status")?.contains("\nNSpid:"), "/proc/self/status has no NSpid")
}

pub fn last_pid() -> Attempt {
    OpenOptions::new().write(true).open("/proc/sys/kernel/ns_last_pid")?;
    Ok(())
}

pub fn loginuid() -> Attempt {
    let text = read("/proc/self/loginuid")?;
    text.trim().parse::<u32>().map_err(|_| Reason::from("/proc/self/loginuid is not a number"))?;
    OpenOptions::new().write(true).open("/proc/self/loginuid")?;
    Ok(())
}

pub fn compat() -> Attempt {
    Err("rewake does not handle 32-bit tasks yet".into())
}

/// The feature is there if the kernel refuses for this reason rather than for not knowing it.
pub(super) fn refused_with(outcome: Result<(), SyscallError>, expected: Errno) -> Attempt {
    match outcome {
        Err(e) if e.errno == expected => Ok(()),
        other => Ok(other?),
    }
}
