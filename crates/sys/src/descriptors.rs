//! Descriptors of special kinds: signalfd(2), the ticks of a timerfd, file handles, processes that are dead already.

use crate::call::{Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn owned(fd: usize) -> OwnedFd {
    // SAFETY: called with what a system call just returned as a new descriptor; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Makes a signalfd of the signals in `mask` (bit n-1 is signal n), close-on-exec.
///
/// # Errors
/// `EMFILE`, `ENOMEM`.
pub fn signalfd(mask: u64) -> Result<OwnedFd> {
    let flags = libc::SFD_CLOEXEC as usize;
    let args = [usize::MAX, (&raw const mask) as usize, size_of::<u64>(), flags, 0, 0];
    // SAFETY: the mask is a live word of the size given.
    unsafe { syscall("signalfd4", libc::SYS_signalfd4, args) }.map(owned)
}

/// Sets how often a timerfd has expired unread (`TFD_IOC_SET_TICKS`, CONFIG_CHECKPOINT_RESTORE); not 0.
///
/// # Errors
/// `EINVAL` for 0, `ENOTTY` if the kernel has no such operation.
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<()> {
    // _IOW('T', 0, __u64)
    const TFD_IOC_SET_TICKS: usize = 0x4008_5400;
    let args = [fd.as_raw_fd() as usize, TFD_IOC_SET_TICKS, (&raw const ticks) as usize, 0, 0, 0];
    // SAFETY: the argument is a live word, as the operation wants.
    unsafe { syscall("ioctl(TFD_IOC_SET_TICKS)", libc::SYS_ioctl, args) }.map(drop)
}

/// The longest file handle (`MAX_HANDLE_SZ`).
pub const MAX_HANDLE: usize = 128;

/// Opens the file of a handle (open_by_handle_at(2)) on the file system of `mount`, with `O_PATH`.
///
/// # Errors
/// `ESTALE` if the file is gone, `EPERM` without `CAP_DAC_READ_SEARCH`, `EINVAL` for an impossible handle.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    #[repr(C)]
    struct FileHandle {
        bytes: u32,
        kind: i32,
        data: [u8; MAX_HANDLE],
    }
    let len = handle.len().min(MAX_HANDLE);
    let mut full = FileHandle { bytes: handle.len() as u32, kind, data: [0; MAX_HANDLE] };
    full.data[..len].copy_from_slice(&handle[..len]);
    let flags = (libc::O_PATH | libc::O_CLOEXEC) as usize;
    let args = [mount.as_raw_fd() as usize, (&raw const full) as usize, flags, 0, 0, 0];
    // SAFETY: the handle is a live struct with room for the longest handle; longer ones are refused by the kernel
    // before it reads them.
    unsafe { syscall("open_by_handle_at", libc::SYS_open_by_handle_at, args) }.map(owned)
}

/// Closes the descriptors that come with what was read from a fanotify(7) group.
pub fn close_event_files(events: &[u8]) {
    // struct fanotify_event_metadata
    const LENGTH: usize = 24;
    let mut rest = events;
    while let Some(event) = rest.get(..LENGTH) {
        let length = u32::from_ne_bytes([event[0], event[1], event[2], event[3]]) as usize;
        let number = i32::from_ne_bytes([event[16], event[17], event[18], event[19]]);
        if number >= 0 {
            // SAFETY: the kernel has just made it for us, and nobody else knows of it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
        rest = rest.get(length.max(LENGTH)..).unwrap_or(&[]);
    }
}

/// Takes over a descriptor that this process was started with, by its number as the user has told it.
///
/// # Errors
/// `EBADF` if there is no such descriptor, or it is a standard stream, which stays everybody's.
pub fn inherited(number: i32) -> Result<OwnedFd> {
    if number <= 2 {
        return Err(crate::SyscallError::new("fcntl", crate::Errno::BADF));
    }
    let args = [number as usize, libc::F_SETFD as usize, libc::FD_CLOEXEC as usize, 0, 0, 0];
    // SAFETY: numbers only.
    unsafe { syscall("fcntl", libc::SYS_fcntl, args) }?;
    // SAFETY: it is there, and what the user names is nobody else's: the program opens none that it does not own.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Another descriptor for what is descriptor `number` of this process: fcntl(2) with `F_DUPFD_CLOEXEC`.
///
/// # Errors
/// `EBADF` if there is no such descriptor.
pub fn duplicate(number: i32) -> Result<OwnedFd> {
    let args = [number as usize, libc::F_DUPFD_CLOEXEC as usize, 0, 0, 0, 0];
    // SAFETY: numbers only; nothing is closed.
    unsafe { syscall("fcntl", libc::SYS_fcntl, args) }.map(owned)
}

/// Gives the descriptor table of this process room for `count` descriptors more, as far as the limit of open files allows,
/// whose soft part is raised to the hard one if need be. To be called before there are threads that open many: while threads
/// share a table, the kernel waits for all CPUs (an RCU grace period, some milliseconds) each time it grows.
///
/// # Errors
/// `EMFILE`, `ENOMEM`; the table then grows as descriptors are opened.
pub fn make_room(count: usize) -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    /// Beside `count`, what is open already.
    const OPEN: usize = 256;
    /// What the table of a new process has room for.
    const FEW: usize = 64;
    if count < FEW {
        return Ok(());
    }
    let wanted = count.saturating_add(OPEN);
    let limit = getrlimit(Resource::Nofile);
    let mut most = limit.current.unwrap_or(u64::MAX);
    if most < wanted as u64 {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            most = limit.maximum.unwrap_or(u64::MAX);
        }
    }
    let last = usize::try_from(most).unwrap_or(usize::MAX).min(wanted) - 1;
    let args = [1, libc::F_DUPFD_CLOEXEC as usize, last, 0, 0, 0];
    // SAFETY: numbers only. It is closed at once; the table stays as large as it is.
    unsafe { syscall("fcntl", libc::SYS_fcntl, args) }.map(|fd| drop(owned(fd)))
}

/// Lets epoll instance `epoll` watch `target` under the number `number`, whatever that number is in this process: a thread
/// with a descriptor table of its own adds it. `events` and `data` are those of epoll_ctl(2).
///
/// # Errors
/// `EPERM` if the file cannot be watched; `ELOOP` if the instances watch each other.
pub fn watch_as(
    epoll: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    number: i32,
    events: u32,
    data: u64,
) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            // SAFETY: a number; only this thread's table changes, which ends with it.
            unsafe {
                syscall("unshare", libc::SYS_unshare, [libc::CLONE_FILES as usize, 0, 0, 0, 0, 0])
            }?;
            // Where the target's number does not overwrite it.
            let above = (number.max(0) as usize).saturating_add(1);
            let args = [epoll.as_raw_fd() as usize, libc::F_DUPFD as usize, above, 0, 0, 0];
            // SAFETY: numbers only.
            let epoll = unsafe { syscall("fcntl", libc::SYS_fcntl, args) }?;
            if target.as_raw_fd() != number {
                let args = [target.as_raw_fd() as usize, number as usize, 0, 0, 0, 0];
                // SAFETY: numbers only, in the thread's own table.
                unsafe { syscall("dup3", libc::SYS_dup3, args) }?;
            }
            let mut event = libc::epoll_event { events, u64: data };
            let event = (&raw mut event) as usize;
            let args = [epoll, libc::EPOLL_CTL_ADD as usize, number as usize, event, 0, 0];
            // SAFETY: the event is live.
            unsafe { syscall("epoll_ctl", libc::SYS_epoll_ctl, args) }.map(drop)
        });
        let failed = |errno| crate::SyscallError::new("epoll_ctl", errno);
        let thread = thread.map_err(|_| failed(crate::Errno::AGAIN))?;
        thread.join().unwrap_or(Err(failed(crate::Errno::IO)))
    })
}

/// A pidfd of a process that is dead and reaped.
///
/// # Errors
/// No process can be made.
pub fn dead_process() -> Result<OwnedFd> {
    let mut pidfd = -1i32;
    let args = crate::task::CloneArgs {
        flags: (libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK) as u64,
        pidfd: (&raw mut pidfd) as u64,
        ..Default::default()
    };
    let size = size_of_val(&args);
    let pid: i64;
    // SAFETY: the child shares our memory but runs only the three instructions behind the first system call, in
    // registers: exit(0). It uses no stack, so that keeping ours (stack 0) is sound, and we sleep until it is gone
    // (CLONE_VFORK). Its end is not signalled (exit_signal 0).
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "2:",
            exit = const libc::SYS_exit,
            inlateout("rax") libc::SYS_clone3 => pid,
            inlateout("rdi") &raw const args => _,
            in("rsi") size,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if pid < 0 {
        return Err(crate::SyscallError::new(
            "clone3",
            crate::Errno::from_raw_os_error(-pid as i32),
        ));
    }
    let fd = owned(pidfd as usize);
    // __WALL: the child has no exit signal, which waitid passes over otherwise.
    let args =
        [libc::P_PIDFD as usize, pidfd as usize, 0, (libc::WEXITED | libc::__WALL) as usize, 0, 0];
    // SAFETY: no pointers but null ones, which waitid takes for "not wanted".
    unsafe { syscall("waitid", libc::SYS_waitid, args) }?;
    Ok(fd)
}

/// A reference to a thread that is dead and gone, one that is of a thread (`PIDFD_THREAD`).
///
/// # Errors
/// `EINVAL` before Linux 6.9, or no thread can be made.
pub fn dead_thread() -> Result<OwnedFd> {
    let failed = |e: std::io::Error| {
        let errno = crate::Errno::from_io_error(&e).unwrap_or(crate::Errno::AGAIN);
        crate::SyscallError::new("clone3", errno)
    };
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::Builder::new().spawn(move || {
        // Whoever waits for either sees it fail if the other is gone.
        let _ = tell.send(rustix::thread::gettid());
        let _ = ended.recv();
    });
    let thread = thread.map_err(failed)?;
    let opened = told.recv().ok().map(|tid| {
        let flags = rustix::process::PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
        rustix::process::pidfd_open(tid, flags)
            .map_err(|errno| crate::SyscallError::new("pidfd_open", errno))
    });
    drop(end);
    let _ = thread.join();
    let fd = opened
        .unwrap_or_else(|| Err(crate::SyscallError::new("pidfd_open", crate::Errno::SRCH)))?;
    // Joined is before it is gone.
    let mut entry = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut entry, None)
        .map_err(|errno| crate::SyscallError::new("poll", errno))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_dead_thread_is_dead() {
        let Ok(fd) = dead_thread() else { return println!("no pidfds of threads here") };
        assert_eq!(
            crate::file::flags(fd.as_fd()).unwrap() & libc::O_EXCL as u32,
            libc::O_EXCL as u32
        );
        let signal = rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::CONT);
        assert_eq!(signal, Err(crate::Errno::SRCH));
    }

    #[test]
    fn a_dead_process_is_dead() {
        let fd = dead_process().unwrap();
        let info =
            std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        assert!(info.contains("Pid:\t-1"), "{info}");
    }

    #[test]
    fn a_signalfd_has_its_mask() {
        let fd = signalfd(0xa00).unwrap();
        let info =
            std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        assert!(info.contains("sigmask:\t0000000000000a00"), "{info}");
    }

    #[test]
    fn impossible_handles_are_refused() {
        let root = std::fs::File::open("/").unwrap();
        assert!(open_by_handle(root.as_fd(), 1, &[0; 200]).is_err());
    }
}
