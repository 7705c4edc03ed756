//! Raw calls with which `check` tries kernel features: each function makes one attempt, on objects of its own or in a
//! child of its own, and leaves nothing behind.

mod child;

pub use child::{
    Child, bare_descriptors, clone_with_pid, in_namespaces, queue_signal, remap_vdso, unshare,
    vdso_again,
};

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::call::{Result, SyscallError, pid_arg, syscall};
use crate::{Errno, pagemap};

/// The calling thread's last error under the name `call`.
fn last(call: &'static str) -> SyscallError {
    // SAFETY: errno is a thread-local of libc, always readable.
    SyscallError::new(call, Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
}

/// Private memory of the probe's own, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    at: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    /// `len` bytes of anonymous memory, or of `file`.
    fn new(len: usize, protection: i32, file: Option<BorrowedFd<'_>>) -> Result<Mapping> {
        let (flags, fd) = match file {
            Some(fd) => (libc::MAP_PRIVATE, fd.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if at == libc::MAP_FAILED { Err(last("mmap")) } else { Ok(Mapping { at, len }) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and nobody else knows it.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

/// Maps the first page of `file` with the given `PROT_*` bits, and calls `look` with its address while it is mapped.
///
/// # Errors
/// As mmap(2): `EPERM` if the file may not be executed from, `ENODEV` if it cannot be mapped.
pub fn with_page<T>(
    file: BorrowedFd<'_>,
    protection: i32,
    look: impl FnOnce(usize) -> T,
) -> Result<T> {
    let mapping = Mapping::new(4096, protection, Some(file))?;
    Ok(look(mapping.at as usize))
}

/// Features of userfaultfd(2), `UFFD_FEATURE_*` of `linux/userfaultfd.h`.
///
/// # Errors
/// `ENOSYS` without it, `EPERM` where it is reserved.
pub fn userfaultfd_features() -> Result<u64> {
    const UFFDIO_API: usize = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    // SAFETY: no pointers.
    let fd = unsafe {
        syscall("userfaultfd", libc::SYS_userfaultfd, [libc::O_CLOEXEC as usize, 0, 0, 0, 0, 0])
    }?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [UFFD_API, 0, 0];
    // SAFETY: `api` is a live `struct uffdio_api` of three words.
    unsafe {
        syscall(
            "UFFDIO_API",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, UFFDIO_API, api.as_mut_ptr() as usize, 0, 0, 0],
        )
    }?;
    Ok(api[1])
}

/// Asks `PAGEMAP_SCAN` for pages of all `categories` in one page of our own.
///
/// # Errors
/// `ENOTTY` without the call, `EINVAL` for a category it does not know.
pub fn pagemap_scan(own_pagemap: BorrowedFd<'_>, categories: u64) -> Result<()> {
    let page = Mapping::new(4096, libc::PROT_READ | libc::PROT_WRITE, None)?;
    let filter =
        pagemap::Filter { all: categories, report: categories, ..pagemap::Filter::default() };
    let start = page.at as u64;
    pagemap::scan(own_pagemap, start, start + 4096, filter, &mut Vec::new())
}

/// Soft-dirty tracking (`Documentation/admin-guide/mm/soft-dirty.rst`): a page is written, `clear` is called (it should write
/// 4 to `clear_refs`), and the page is written again. `dirty` reads the bit of the page at an address. True if the bit was
/// gone in between and came back.
///
/// # Errors
/// No memory, or what the two functions say.
pub fn soft_dirty<E: From<SyscallError>>(
    clear: impl FnOnce() -> std::result::Result<(), E>,
    dirty: impl Fn(usize) -> std::result::Result<bool, E>,
) -> std::result::Result<bool, E> {
    let page = Mapping::new(4096, libc::PROT_READ | libc::PROT_WRITE, None)?;
    let write = || {
        // SAFETY: the page is ours, writable and aligned.
        unsafe { page.at.cast::<u8>().write_volatile(1) }
    };
    let at = page.at as usize;
    write();
    clear()?;
    let between = dirty(at)?;
    write();
    Ok(!between && dirty(at)?)
}

/// `MADV_GUARD_INSTALL` on a page of our own.
///
/// # Errors
/// `EINVAL` before Linux 6.13.
pub fn guard_pages() -> Result<()> {
    const MADV_GUARD_INSTALL: usize = 102;
    let page = Mapping::new(4096, libc::PROT_READ | libc::PROT_WRITE, None)?;
    // SAFETY: the range is ours and nobody uses it.
    unsafe {
        syscall("madvise", libc::SYS_madvise, [page.at as usize, 4096, MADV_GUARD_INSTALL, 0, 0, 0])
    }
    .map(drop)
}

/// `PR_SET_MM_MAP_SIZE` (prctl(2)): the size of `struct prctl_mm_map`.
///
/// # Errors
/// `EINVAL` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn mm_map_size() -> Result<u32> {
    const PR_SET_MM: usize = 35;
    const PR_SET_MM_MAP_SIZE: usize = 15;
    let mut size = 0u32;
    // SAFETY: `size` is live; the kernel writes an unsigned int.
    unsafe {
        syscall(
            "prctl",
            libc::SYS_prctl,
            [PR_SET_MM, PR_SET_MM_MAP_SIZE, (&raw mut size) as usize, 0, 0, 0],
        )
    }?;
    Ok(size)
}

/// `PR_TIMER_CREATE_RESTORE_IDS_GET` (linux/prctl.h, since 6.15).
///
/// # Errors
/// `EINVAL` before it.
pub fn timer_restore_ids() -> Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: usize = 77;
    const GET: usize = 2;
    // SAFETY: no pointers.
    unsafe { syscall("prctl", libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0, 0]) }
        .map(drop)
}

/// `F_GETOWNER_UIDS` (fcntl(2), linux/fcntl.h).
///
/// # Errors
/// `EINVAL` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn owner_uids(fd: BorrowedFd<'_>) -> Result<[u32; 2]> {
    const F_GETOWNER_UIDS: usize = 17;
    let mut uids = [0u32; 2];
    // SAFETY: `uids` is live; the kernel writes two uid_t.
    unsafe {
        syscall(
            "fcntl",
            libc::SYS_fcntl,
            [fd.as_raw_fd() as usize, F_GETOWNER_UIDS, uids.as_mut_ptr() as usize, 0, 0, 0],
        )
    }?;
    Ok(uids)
}

/// Makes an AIO ring, moves it to another address, and takes it down there: io_setup(2), mremap(2), io_destroy(2).
///
/// # Errors
/// `ENOSYS` without AIO, `EINVAL` if the ring cannot be found at its new address.
pub fn aio_ring_moves() -> Result<()> {
    let mut context = 0usize;
    // SAFETY: `context` is live and zero, as io_setup(2) wants it.
    unsafe {
        syscall("io_setup", libc::SYS_io_setup, [1, (&raw mut context) as usize, 0, 0, 0, 0])
    }?;
    let len = mapping_len(context).unwrap_or(4096);
    let moved = Mapping::new(len, libc::PROT_NONE, None).and_then(|target| {
        // SAFETY: both ranges are ours: the ring the kernel just mapped, and the room made for it.
        let at = unsafe {
            syscall(
                "mremap",
                libc::SYS_mremap,
                [
                    context,
                    len,
                    len,
                    (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize,
                    target.at as usize,
                    0,
                ],
            )
        };
        // The ring lies in the room now; io_destroy unmaps it.
        if at.is_ok() {
            std::mem::forget(target);
        }
        at
    });
    let at = *moved.as_ref().unwrap_or(&context);
    // SAFETY: no pointers; `at` is the ring's address, which is its handle.
    let destroyed = unsafe { syscall("io_destroy", libc::SYS_io_destroy, [at, 0, 0, 0, 0, 0]) };
    moved.and(destroyed).map(drop)
}

/// Length of our mapping that begins at `start`.
fn mapping_len(start: usize) -> Option<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.starts_with(&format!("{start:x}-")))?;
    let end = line.split(['-', ' ']).nth(1)?;
    usize::from_str_radix(end, 16).ok()?.checked_sub(start)
}

/// An ioctl(2) whose answer is a descriptor and that takes no argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum FdQuery {
    /// `SIOCGSKNS`: the network namespace of a socket.
    SocketNamespace = 0x894c,
    /// `SIOCUNIXFILE`: the file a unix socket is bound to.
    UnixFile = 0x89e0,
    /// `TUNGETDEVNETNS`: the network namespace of a tun device.
    TunNamespace = 0x54e3,
}

/// Makes the query on `fd`.
///
/// # Errors
/// `ENOTTY` or `EINVAL` where the kernel does not know it; see ioctl(2) for the rest.
pub fn query_fd(fd: BorrowedFd<'_>, query: FdQuery) -> Result<OwnedFd> {
    // SAFETY: these requests take no argument.
    let got = unsafe {
        syscall("ioctl", libc::SYS_ioctl, [fd.as_raw_fd() as usize, query as usize, 0, 0, 0, 0])
    }?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
}

/// `TUNGETFEATURES` on `/dev/net/tun` (linux/if_tun.h).
///
/// # Errors
/// As ioctl(2).
pub fn tun_features(fd: BorrowedFd<'_>) -> Result<u32> {
    const TUNGETFEATURES: usize = 0x8004_54cf;
    let mut features = 0u32;
    // SAFETY: `features` is live; the kernel writes an unsigned int.
    unsafe {
        syscall(
            "TUNGETFEATURES",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, TUNGETFEATURES, (&raw mut features) as usize, 0, 0, 0],
        )
    }?;
    Ok(features)
}

/// Attaches `fd` of `/dev/net/tun` to a new tun device; it goes away with the descriptor.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; see linux/if_tun.h.
pub fn tun_attach(fd: BorrowedFd<'_>) -> Result<()> {
    const TUNSETIFF: usize = 0x4004_54ca;
    const IFF_TUN_NO_PI: u16 = 0x1001;
    let mut request = [0u8; 40];
    request[..9].copy_from_slice(b"rewake-%d");
    request[16..18].copy_from_slice(&IFF_TUN_NO_PI.to_ne_bytes());
    // SAFETY: `request` is a live `struct ifreq` of 40 bytes.
    unsafe {
        syscall(
            "TUNSETIFF",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, TUNSETIFF, request.as_mut_ptr() as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

/// `TFD_IOC_SET_TICKS` (linux/timerfd.h) on a timerfd.
///
/// # Errors
/// `ENOTTY` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: usize = 0x4008_5400;
    // SAFETY: the kernel reads one u64.
    unsafe {
        syscall(
            "TFD_IOC_SET_TICKS",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, TFD_IOC_SET_TICKS, (&raw const ticks) as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

/// `TIOCGLCKTRMIOS` and `TIOCSLCKTRMIOS` (ioctl_tty(2)): reads the locks of a terminal's settings and writes them back.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
pub fn tty_locks(fd: BorrowedFd<'_>) -> Result<()> {
    const TIOCGLCKTRMIOS: usize = 0x5456;
    const TIOCSLCKTRMIOS: usize = 0x5457;
    // `struct termios` of the kernel is 36 bytes; a multiple of its alignment, and more than enough.
    let mut termios = [0u32; 16];
    for (name, request) in [("TIOCGLCKTRMIOS", TIOCGLCKTRMIOS), ("TIOCSLCKTRMIOS", TIOCSLCKTRMIOS)]
    {
        // SAFETY: `termios` is live and at least as large as the kernel's structure.
        unsafe {
            syscall(
                name,
                libc::SYS_ioctl,
                [fd.as_raw_fd() as usize, request, termios.as_mut_ptr() as usize, 0, 0, 0],
            )
        }?;
    }
    Ok(())
}

/// Number of instructions of a socket's filter: `SO_GET_FILTER` with no room for them (socket(7)).
///
/// # Errors
/// `ENOPROTOOPT` without it.
pub fn socket_filter_len(fd: BorrowedFd<'_>) -> Result<usize> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: a length of 0 asks for the number alone; the kernel writes only `len`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    if result < 0 { Err(last("getsockopt")) } else { Ok(len as usize) }
}

/// `IPT_SO_GET_INFO` on a raw IPv4 socket: whether the legacy table `filter` exists (linux/netfilter_ipv4/ip_tables.h).
///
/// # Errors
/// `ENOPROTOOPT` without legacy tables, `ENOENT` without that one.
pub fn legacy_filter_table(fd: BorrowedFd<'_>) -> Result<()> {
    const IPT_SO_GET_INFO: i32 = 64;
    let mut info = [0u8; 84];
    info[..6].copy_from_slice(b"filter");
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: `info` is a live `struct ipt_getinfo` of `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_IP,
            IPT_SO_GET_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(last("getsockopt")) } else { Ok(()) }
}

/// vmsplice(2) of memory that does not begin at a page into `pipe`.
///
/// # Errors
/// As vmsplice(2).
pub fn vmsplice_unaligned(pipe: BorrowedFd<'_>) -> Result<usize> {
    let page = Mapping::new(8192, libc::PROT_READ | libc::PROT_WRITE, None)?;
    let iov = libc::iovec { iov_base: page.at.wrapping_byte_add(100), iov_len: 4096 };
    // SAFETY: the iovec lies in the mapping, which outlives the call; the pages stay referenced by the pipe.
    unsafe {
        syscall(
            "vmsplice",
            libc::SYS_vmsplice,
            [
                pipe.as_raw_fd() as usize,
                (&raw const iov) as usize,
                1,
                libc::SPLICE_F_NONBLOCK as usize,
                0,
                0,
            ],
        )
    }
}

/// `MSG_COPY` of msgrcv(2): reads a message of a queue of our own without taking it out.
///
/// # Errors
/// `ENOSYS` without `CONFIG_CHECKPOINT_RESTORE` or System V IPC.
pub fn message_copy() -> Result<()> {
    // SAFETY: plain calls on a new private queue; `message` is live, with the size given.
    unsafe {
        let queue = libc::msgget(libc::IPC_PRIVATE, 0o600);
        if queue < 0 {
            return Err(last("msgget"));
        }
        let mut message = [1u64, 42];
        let sent = libc::msgsnd(queue, message.as_ptr().cast(), 8, libc::IPC_NOWAIT);
        let outcome = if sent < 0 {
            Err(last("msgsnd"))
        } else if libc::msgrcv(
            queue,
            message.as_mut_ptr().cast(),
            8,
            0,
            libc::IPC_NOWAIT | libc::MSG_COPY,
        ) < 0
        {
            Err(last("msgrcv"))
        } else {
            Ok(())
        };
        libc::msgctl(queue, libc::IPC_RMID, std::ptr::null_mut());
        outcome
    }
}

/// `PTRACE_GET_SYSCALL_INFO` (ptrace(2)) of a stopped tracee.
///
/// # Errors
/// `EIO` before Linux 5.3.
pub fn syscall_info(tid: i32) -> Result<usize> {
    const PTRACE_GET_SYSCALL_INFO: usize = 0x420e;
    let mut info = [0u64; 16];
    // SAFETY: `info` is live; its size is passed.
    unsafe {
        syscall(
            "PTRACE_GET_SYSCALL_INFO",
            libc::SYS_ptrace,
            [
                PTRACE_GET_SYSCALL_INFO,
                pid_arg(tid),
                size_of_val(&info),
                info.as_mut_ptr() as usize,
                0,
                0,
            ],
        )
    }
}

/// Sets and clears a hardware breakpoint in the debug registers of a stopped tracee.
///
/// # Errors
/// As `PTRACE_POKEUSER` of ptrace(2).
#[cfg(target_arch = "x86_64")]
pub fn breakpoint(tid: i32, address: usize) -> Result<()> {
    const POKEUSER: usize = 6;
    let register = |n: usize| std::mem::offset_of!(libc::user, u_debugreg) + n * 8;
    for (n, value) in [(0, address), (7, 1), (7, 0), (0, 0)] {
        // SAFETY: offset and value are numbers.
        unsafe {
            syscall(
                "PTRACE_POKEUSER",
                libc::SYS_ptrace,
                [POKEUSER, pid_arg(tid), register(n), value, 0, 0],
            )
        }?;
    }
    Ok(())
}

/// process_vm_readv(2) of a word of our own.
///
/// # Errors
/// `ENOSYS` without `CONFIG_CROSS_MEMORY_ATTACH`.
pub fn read_own_memory() -> Result<()> {
    let word = 42u64;
    let range = ((&raw const word) as u64, 8);
    let mut buffer = [0u8; 8];
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    crate::memory::read_remote(pid, &[range], &mut buffer).map(drop)
}
