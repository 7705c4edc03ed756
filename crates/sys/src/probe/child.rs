//! Attempts that need a process or thread of their own.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::call::{Result, SyscallError, syscall};
use crate::wait::{self, Status, Stop};
use crate::{Errno, ptrace};

use super::last;

/// A child that does nothing; killed and reaped when dropped.
#[derive(Debug)]
pub struct Child {
    pid: i32,
}

impl Child {
    /// A child that sleeps.
    ///
    /// # Errors
    /// As fork(2).
    pub fn sleeping() -> Result<Child> {
        Child::start(|| {})
    }

    /// A child that sleeps under a seccomp filter that allows everything.
    ///
    /// # Errors
    /// As fork(2). A child that could not install the filter exits at once.
    pub fn with_seccomp_filter() -> Result<Child> {
        Child::start(|| {
            const ALLOW: libc::sock_filter =
                libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
            let filter = ALLOW;
            let program = libc::sock_fprog { len: 1, filter: (&raw const filter).cast_mut() };
            // SAFETY: `program` and its one instruction are live; both calls change only this child.
            unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                let set = libc::SECCOMP_SET_MODE_FILTER;
                if libc::syscall(libc::SYS_seccomp, set, 0, &raw const program) != 0 {
                    libc::_exit(1);
                }
            }
        })
    }

    /// Forks; the child calls `prepare`, which may only make system calls, and sleeps.
    fn start(prepare: impl FnOnce()) -> Result<Child> {
        // SAFETY: until its end the child makes system calls only, so it does not matter what other threads held locked.
        match unsafe { libc::fork() } {
            -1 => Err(last("fork")),
            0 => {
                // SAFETY: as above; the death signal makes sure that it does not outlive us.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
                prepare();
                loop {
                    // SAFETY: no arguments.
                    unsafe { libc::pause() };
                }
            }
            pid => Ok(Child { pid }),
        }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Seizes the child and stops it, by the calling thread, which must make the further requests as well.
    ///
    /// # Errors
    /// As `PTRACE_SEIZE`; `ECHILD` if it ended instead.
    pub fn stop(&self, options: u32) -> Result<()> {
        ptrace::seize(self.pid, options)?;
        ptrace::interrupt(self.pid)?;
        match wait::wait(self.pid)? {
            Status::Stop(Stop::Event | Stop::Group(_) | Stop::Signal(_)) => Ok(()),
            _ => Err(SyscallError::new("PTRACE_INTERRUPT", Errno::CHILD)),
        }
    }

    /// Waits until the child sleeps in its last system call (at most a second).
    pub fn settle(&self) {
        for _ in 0..1000 {
            let state =
                std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
            if state.rsplit(')').next().is_some_and(|rest| !rest.starts_with(" R")) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: numbers only; the child is ours and not reaped yet, so the pid is still its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        while let Ok(status) = wait::wait(self.pid) {
            if matches!(status, Status::Exited(_) | Status::Killed(_)) {
                break;
            }
        }
    }
}

/// Forks a child that calls `attempt` and exits with the errno it returns; 0 is success.
///
/// # Safety
/// `attempt` may make system calls only (it runs after fork(2), perhaps of a process with several threads).
unsafe fn attempt_in_child(call: &'static str, attempt: impl FnOnce() -> i32) -> Result<()> {
    // SAFETY: the caller vouches for what the child does; `_exit` runs no handlers.
    match unsafe { libc::fork() } {
        -1 => Err(last("fork")),
        0 => {
            let code = attempt();
            // SAFETY: ends the child.
            unsafe { libc::_exit(code) }
        }
        pid => match wait::wait(pid)? {
            Status::Exited(0) => Ok(()),
            Status::Exited(errno) => Err(SyscallError::new(call, Errno::from_raw_os_error(errno))),
            // A crash is what a kernel without the feature may answer.
            _ => Err(SyscallError::new(call, Errno::FAULT)),
        },
    }
}

/// The errno of a raw call's result, 0 if it succeeded.
fn code(result: libc::c_long) -> i32 {
    if result < 0 { last("").errno.raw_os_error() } else { 0 }
}

/// unshare(2) with the `CLONE_NEW*` bits, in a child.
///
/// # Errors
/// `EINVAL` for a namespace the kernel does not have, `EPERM`, `ENOSPC`.
pub fn unshare(namespaces: i32) -> Result<()> {
    // SAFETY: one system call without pointers.
    unsafe { attempt_in_child("unshare", || code(libc::syscall(libc::SYS_unshare, namespaces))) }
}

/// Moves the vdso of a child, `start..start + len` in our own maps, elsewhere with mremap(2).
///
/// # Errors
/// `EINVAL` or `EFAULT` (the child crashed) where it cannot be moved.
pub fn remap_vdso(start: usize, len: usize) -> Result<()> {
    let room = super::Mapping::new(len, libc::PROT_NONE, None)?;
    let target = room.at as usize;
    // SAFETY: the child has the same mappings, makes one system call, and does not use its vdso afterwards.
    unsafe {
        attempt_in_child("mremap", || {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            code(libc::syscall(libc::SYS_mremap, start, len, len, flags, target))
        })
    }
}

/// `ARCH_MAP_VDSO_64` (arch_prctl(2)) in a child, which has a vdso already and is told so.
///
/// # Errors
/// `EINVAL` without `CONFIG_CHECKPOINT_RESTORE`.
#[cfg(target_arch = "x86_64")]
pub fn vdso_again() -> Result<()> {
    const ARCH_MAP_VDSO_64: libc::c_long = 0x2003;
    // SAFETY: one system call; it maps at most a second vdso in the child.
    let outcome = unsafe {
        attempt_in_child("ARCH_MAP_VDSO_64", || {
            code(libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0))
        })
    };
    match outcome {
        Err(e) if e.errno == Errno::EXIST => Ok(()),
        outcome => outcome,
    }
}

/// Gives a child a chosen pid: clone3(2) with `set_tid`.
///
/// # Errors
/// `EPERM` without `CAP_CHECKPOINT_RESTORE`, `ENOSYS`, `EINVAL` without `set_tid`.
pub fn clone_with_pid() -> Result<()> {
    let mut outcome = Ok(());
    // Another process may take the pid between the two steps.
    for _ in 0..8 {
        let free = {
            let child = Child::sleeping()?;
            child.pid()
        };
        let set_tid = [free];
        let args: [u64; 11] =
            [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, set_tid.as_ptr() as u64, 1, 0];
        // SAFETY: `args` is a live `struct clone_args` and set_tid a live array of one pid; without CLONE_VM the child
        // has a copy of this stack, and it ends at once by a system call.
        let pid = unsafe {
            let pid = libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args));
            if pid == 0 {
                libc::syscall(libc::SYS_exit_group, 0);
            }
            pid
        };
        if pid < 0 {
            outcome = Err(last("clone3"));
            if matches!(outcome, Err(SyscallError { errno: Errno::EXIST, .. })) {
                continue;
            }
            return outcome;
        }
        wait::wait(pid as i32)?;
        return if pid == libc::c_long::from(free) {
            Ok(())
        } else {
            Err(SyscallError::new("clone3", Errno::INVAL))
        };
    }
    outcome
}

/// rt_sigqueueinfo(2) with a siginfo of our own making, to and in a child.
///
/// # Errors
/// `EPERM`, or `EINVAL` if another siginfo came back.
pub fn queue_signal() -> Result<()> {
    // SAFETY: system calls on the child's own stack only; every pointer is to a live local of the right size.
    unsafe {
        attempt_in_child("rt_sigqueueinfo", || {
            let signal = 50i32;
            let set: u64 = 1 << (signal - 1);
            let mut info = [0u32; 32];
            // si_code of a signal that the kernel sent: only a checkpoint tool has a use for queueing that to itself.
            (info[0], info[2], info[7]) = (signal as u32, libc::SI_TIMER as u32, 0x5a5a);
            let block = libc::SIG_BLOCK;
            libc::syscall(libc::SYS_rt_sigprocmask, block, &raw const set, 0usize, 8usize);
            let pid = libc::syscall(libc::SYS_getpid);
            let sent = libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr());
            if sent < 0 {
                return code(sent);
            }
            let mut back = [0u32; 32];
            let timeout = [0u64; 2];
            let got = libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const set,
                back.as_mut_ptr(),
                timeout.as_ptr(),
                8usize,
            );
            if got < 0 {
                return code(got);
            }
            if (back[2], back[7]) == (info[2], info[7]) { 0 } else { libc::EINVAL }
        })
    }
}

/// Runs `attempt` in a new thread with new namespaces (`CLONE_NEWNET`, `CLONE_NEWNS`, `CLONE_NEWUTS`, `CLONE_NEWIPC`,
/// `CLONE_NEWCGROUP`); they go away with the thread. With `CLONE_NEWNS` every mount is private first.
///
/// # Errors
/// As unshare(2); `EAGAIN` if there is no thread to be had.
pub fn in_namespaces<T: Send>(namespaces: i32, attempt: impl FnOnce() -> T + Send) -> Result<T> {
    let body = move || -> Result<T> {
        // SAFETY: changes the namespaces of this thread only.
        unsafe { syscall("unshare", libc::SYS_unshare, [namespaces as usize, 0, 0, 0, 0, 0]) }?;
        if namespaces & libc::CLONE_NEWNS != 0 {
            // SAFETY: constant strings; the other pointers may be null for a change of propagation (mount(2)).
            let result = unsafe {
                libc::mount(
                    std::ptr::null(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                )
            };
            if result < 0 {
                return Err(last("mount"));
            }
        }
        Ok(attempt())
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .spawn_scoped(scope, body)
            .map_err(|_| SyscallError::new("clone", Errno::AGAIN))?;
        thread.join().unwrap_or(Err(SyscallError::new("unshare", Errno::CHILD)))
    })
}

/// Makes `command` start its program with standard input closed and nothing open but standard output and error.
pub fn bare_descriptors(command: &mut Command) {
    // SAFETY: the closure runs between fork(2) and execve(2) and makes two system calls, which is all that is allowed there.
    // Marking instead of closing leaves the pipe alone over which the failure of execve(2) is reported.
    unsafe {
        command.pre_exec(|| {
            libc::close(0);
            let all = u32::MAX;
            if libc::syscall(libc::SYS_close_range, 3, all, libc::CLOSE_RANGE_CLOEXEC) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
