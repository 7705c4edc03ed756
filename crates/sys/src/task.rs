//! Tasks: robust lists, clone3 into an agent, rseq of the caller, raw pids, groups and sessions.

use crate::call::{Result, pid_arg, syscall};

/// `getsid(2)` of the caller; 0 if its session is led from outside its PID namespace, which rustix takes for impossible.
///
/// # Errors
/// None is known.
pub fn own_session() -> Result<i32> {
    // SAFETY: the call touches no memory.
    unsafe { syscall("getsid", libc::SYS_getsid, [0; 6]) }.map(|sid| sid as i32)
}

/// `getpgid(2)` of the caller; 0 if its process group was made outside its PID namespace.
///
/// # Errors
/// None is known.
pub fn own_group() -> Result<i32> {
    // SAFETY: the call touches no memory.
    unsafe { syscall("getpgid", libc::SYS_getpgid, [0; 6]) }.map(|group| group as i32)
}

/// `get_robust_list(2)`: head address and length.
///
/// # Errors
/// `EPERM`, `ESRCH`.
pub fn robust_list(tid: i32) -> Result<(u64, u64)> {
    let mut head = 0u64;
    let mut len = 0u64;
    // SAFETY: both out-parameters are live words.
    unsafe {
        syscall(
            "get_robust_list",
            libc::SYS_get_robust_list,
            [pid_arg(tid), (&raw mut head) as usize, (&raw mut len) as usize, 0, 0, 0],
        )
    }?;
    Ok((head, len))
}

/// Where the calling thread's rseq area is, if its C library registered one: address, size, signature.
///
/// A child that is about to lose its address space must unregister it first, or the kernel kills it.
#[must_use]
pub fn own_rseq() -> Option<(u64, u32, u32)> {
    // glibc ≥ 2.35 exports these; looked up at run time so that other C libraries link too.
    let symbol = |name: &std::ffi::CStr| {
        // SAFETY: dlsym with a valid C string; the result is only a pointer.
        let p = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        (!p.is_null()).then_some(p)
    };
    let (offset, size) = (symbol(c"__rseq_offset")?, symbol(c"__rseq_size")?);
    // SAFETY: glibc documents the types `const ptrdiff_t` and `const unsigned int` for these symbols.
    let (offset, size) = unsafe { (*offset.cast::<isize>(), *size.cast::<u32>()) };
    if size == 0 {
        return None;
    }
    let thread_pointer: u64;
    // SAFETY: %fs:0 holds the thread pointer itself in the x86-64 TLS ABI.
    unsafe {
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread_pointer, options(nostack, readonly))
    };
    // The kernel wants the length that was registered: glibc registers 32 bytes unless the kernel's area is larger.
    Some((thread_pointer.wrapping_add_signed(offset as i64), size.max(32), 0x5305_3053))
}

/// `struct clone_args` (linux/sched.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's field names")]
pub struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

/// Clones a child that jumps straight to `code` with `header` in the agent's ring register and all signals blocked.
///
/// # Errors
/// `EEXIST` if a pid of `set_tid` is taken, `EPERM`, `EINVAL`, `EAGAIN`.
///
/// # Safety
/// `code` must be the agent's executor, mapped executable, and `header` the address of a filled ring header, both in
/// memory that the child shares (`MAP_SHARED`). With `CLONE_VM` that memory must stay mapped until the child has ended;
/// the child runs on no stack and touches nothing of the caller's memory but the ring.
pub unsafe fn clone_agent(args: &CloneArgs, code: usize, header: usize) -> Result<i32> {
    let mut all = !0u64;
    let mut old = 0u64;
    // SAFETY: both masks are live and 8 bytes long. Signals stay blocked across the clone so that the child, whose
    // handlers are still ours, can never run one.
    unsafe {
        syscall(
            "rt_sigprocmask",
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as usize, (&raw mut all) as usize, (&raw mut old) as usize, 8, 0, 0],
        )
    }?;
    let result: isize;
    // SAFETY: the child (rax = 0) leaves this function for good with a jump to the executor, touching no stack; the
    // parent goes on as after any system call. The caller vouches for `code` and `header`.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rbx, {header}",
            "xor esp, esp",
            "jmp {code}",
            "2:",
            header = in(reg) header,
            code = in(reg) code,
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    // SAFETY: as above.
    unsafe {
        syscall(
            "rt_sigprocmask",
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as usize, (&raw mut old) as usize, 0, 8, 0, 0],
        )
    }?;
    if result < 0 {
        let errno = crate::Errno::from_raw_os_error(-result as i32);
        return Err(crate::SyscallError::new("clone3", errno));
    }
    Ok(result as i32)
}

/// CPU the caller runs on.
#[must_use]
pub fn current_cpu() -> usize {
    rustix::thread::sched_getcpu()
}

/// Makes a time namespace for the caller's children in which the clocks are ahead of the machine's by the given offsets
/// (seconds, nanoseconds); returns the namespace children had before, for [`enter_time_namespace`].
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`; `EINVAL` on kernels without time namespaces.
pub fn new_time_namespace(
    monotonic: (i64, i64),
    boottime: (i64, i64),
) -> Result<std::os::fd::OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let failed = |call| move |errno| crate::SyscallError::new(call, errno);
    let before = rustix::fs::open(
        "/proc/self/ns/time_for_children",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed("open ns/time_for_children"))?;
    // SAFETY: a number; CLONE_NEWTIME only changes where future children go.
    unsafe {
        syscall("unshare", libc::SYS_unshare, [libc::CLONE_NEWTIME as usize, 0, 0, 0, 0, 0])
    }?;
    let text = format!(
        "monotonic {} {}\nboottime {} {}\n",
        monotonic.0, monotonic.1, boottime.0, boottime.1
    );
    let offsets = rustix::fs::open(
        "/proc/self/timens_offsets",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed("open timens_offsets"))?;
    rustix::io::write(&offsets, text.as_bytes()).map_err(failed("write timens_offsets"))?;
    Ok(before)
}

/// Lets the caller's future children live in the time namespace `ns` again.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn enter_time_namespace(ns: std::os::fd::BorrowedFd<'_>) -> Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: numbers only.
    unsafe {
        syscall(
            "setns",
            libc::SYS_setns,
            [ns.as_raw_fd() as usize, libc::CLONE_NEWTIME as usize, 0, 0, 0, 0],
        )
    }
    .map(drop)
}

/// The pid, here, of the task that has `pid` in the PID namespace `ns` (`ioctl_nsfs(2)`, `NS_GET_PID_FROM_PIDNS`).
///
/// # Errors
/// `ESRCH` if there is none; `ENOTTY` on kernels before 6.11.
pub fn pid_from_namespace(ns: std::os::fd::BorrowedFd<'_>, pid: i32) -> Result<i32> {
    use std::os::fd::AsRawFd;
    const NS_GET_PID_FROM_PIDNS: usize = 0x8004_b706;
    // SAFETY: numbers only; the argument of this ioctl is the pid itself, no pointer.
    unsafe {
        syscall(
            "ioctl NS_GET_PID_FROM_PIDNS",
            libc::SYS_ioctl,
            [ns.as_raw_fd() as usize, NS_GET_PID_FROM_PIDNS, pid_arg(pid), 0, 0, 0],
        )
    }
    .map(|pid| pid as i32)
}
