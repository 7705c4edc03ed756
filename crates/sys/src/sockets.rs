//! Socket options and messages that rustix lacks.

use crate::call::{self, Result, SyscallError};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Reads a socket option as raw bytes (`getsockopt(2)`), at most `N`.
///
/// # Errors
/// `ENOPROTOOPT` if the socket has no such option.
pub fn option<const N: usize>(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
) -> Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: value is live for `len` bytes.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if result < 0 {
        return Err(SyscallError::new("getsockopt", last_errno()));
    }
    Ok((value, len as usize))
}

/// Reads an `int` socket option.
///
/// # Errors
/// As [`option`].
pub fn option_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32> {
    option::<4>(fd, level, name).map(|(value, _)| i32::from_ne_bytes(value))
}

/// Sets a socket option from raw bytes (`setsockopt(2)`).
///
/// # Errors
/// `EPERM`, `EINVAL`, `ENOPROTOOPT`.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: value is live for its length; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(SyscallError::new("setsockopt", last_errno()));
    }
    Ok(())
}

/// Sets an `int` socket option.
///
/// # Errors
/// As [`set_option`].
pub fn set_option_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

fn last_errno() -> crate::Errno {
    // SAFETY: errno is a thread-local of libc, always readable.
    crate::Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// How much is in a queue, in bytes: `SIOCINQ`, `SIOCOUTQ` or `SIOCOUTQNSD` (tcp(7), unix(7)).
///
/// # Errors
/// `EINVAL` for a listening socket.
pub fn queue_length(fd: BorrowedFd<'_>, which: u32) -> Result<usize> {
    let mut length: libc::c_int = 0;
    // SAFETY: the requests named write an int.
    unsafe {
        call::syscall(
            "ioctl",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, which as usize, &raw mut length as usize, 0, 0, 0],
        )
    }?;
    Ok(usize::try_from(length).unwrap_or(0))
}

/// Opens, as by `O_PATH`, the file a unix socket is bound to (`SIOCUNIXFILE`).
///
/// # Errors
/// `ENOENT` if it is bound to none.
pub fn bound_file(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    const SIOCUNIXFILE: usize = 0x89e0;
    // SAFETY: the request takes no pointer.
    let opened = unsafe {
        call::syscall(
            "SIOCUNIXFILE",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, SIOCUNIXFILE, 0, 0, 0, 0],
        )
    }?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

/// The classic BPF filter of a socket (`SO_GET_FILTER`), an instruction an element: `code << 48 | jt << 40 | jf << 32 | k`.
///
/// # Errors
/// `EACCES` if it is an eBPF program.
pub fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u64>> {
    // Asked with no room, the kernel tells how many instructions there are.
    let (_, count) = option::<0>(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER)?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut program = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; count];
    let mut len = count as libc::socklen_t;
    // SAFETY: for this option the length counts instructions, and there is room for as many.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            program.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(SyscallError::new("SO_GET_FILTER", last_errno()));
    }
    program.truncate(len as usize);
    Ok(program
        .iter()
        .map(|i| {
            u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k)
        })
        .collect())
}

/// Attaches a classic BPF filter (`SO_ATTACH_FILTER`), instructions as [`filter`] gives them.
///
/// # Errors
/// `EINVAL` if it is not a valid program.
pub fn attach_filter(fd: BorrowedFd<'_>, program: &[u64]) -> Result<()> {
    let mut instructions: Vec<libc::sock_filter> = program
        .iter()
        .map(|i| libc::sock_filter {
            code: (i >> 48) as u16,
            jt: (i >> 40) as u8,
            jf: (i >> 32) as u8,
            k: *i as u32,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len())
            .map_err(|_| SyscallError::new("SO_ATTACH_FILTER", crate::Errno::INVAL))?,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the program and its instructions are live; the kernel only reads them.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(SyscallError::new("SO_ATTACH_FILTER", last_errno()));
    }
    Ok(())
}

/// Gives the calling thread a working directory of its own (unshare(2) with `CLONE_FS`), for binding unix sockets to
/// relative paths.
///
/// # Errors
/// `ENOMEM`.
pub fn unshare_directory() -> Result<()> {
    // SAFETY: no pointer; only the thread's own idea of its working directory, root and umask changes.
    unsafe { call::syscall("unshare", libc::SYS_unshare, [libc::CLONE_FS as usize, 0, 0, 0, 0, 0]) }
        .map(drop)
}

/// Gives the calling thread a network namespace of its own (unshare(2) with `CLONE_NEWNET`).
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn unshare_network() -> Result<()> {
    // SAFETY: no pointer; descriptors keep working.
    unsafe {
        call::syscall("unshare", libc::SYS_unshare, [libc::CLONE_NEWNET as usize, 0, 0, 0, 0, 0])
    }
    .map(drop)
}
