//! fcntl(2) operations that rustix lacks.

use crate::call::{Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd};

const F_SETSIG: usize = 10;
const F_GETSIG: usize = 11;
const F_SETOWN_EX: usize = 15;
const F_GETOWN_EX: usize = 16;
const F_GETOWNER_UIDS: usize = 17;
const F_GET_RW_HINT: usize = 1024 + 11;
const F_SET_RW_HINT: usize = 1024 + 12;

fn fcntl(name: &'static str, fd: BorrowedFd<'_>, command: usize, arg: usize) -> Result<usize> {
    // SAFETY: used below only with numbers or pointers to live structs of the right type.
    unsafe { syscall(name, libc::SYS_fcntl, [fd.as_raw_fd() as usize, command, arg, 0, 0, 0]) }
}

/// Who gets the signals of a file description (`F_SETOWN_EX`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID` 0, `F_OWNER_PID` 1, `F_OWNER_PGRP` 2.
    pub kind: i32,
    /// Pid in the caller's namespace, 0 if there is no owner.
    pub pid: i32,
    /// `F_GETSIG`: 0 stands for SIGIO.
    pub signal: i32,
    /// Real and effective user id recorded for the owner.
    pub uids: (u32, u32),
}

/// Reads owner and signal.
///
/// # Errors
/// `EBADF` for an `O_PATH` descriptor.
pub fn owner(fd: BorrowedFd<'_>) -> Result<Owner> {
    let mut ex = [0i32; 2];
    fcntl("F_GETOWN_EX", fd, F_GETOWN_EX, ex.as_mut_ptr() as usize)?;
    let signal = fcntl("F_GETSIG", fd, F_GETSIG, 0)? as i32;
    let mut uids = [0u32; 2];
    if ex[1] != 0 {
        fcntl("F_GETOWNER_UIDS", fd, F_GETOWNER_UIDS, uids.as_mut_ptr() as usize)?;
    }
    Ok(Owner { kind: ex[0], pid: ex[1], signal, uids: (uids[0], uids[1]) })
}

/// `F_OWNER_PID`, as an owner's kind.
pub const OWNER_PROCESS: i32 = 1;

/// `F_OWNER_PGRP`, as an owner's kind.
pub const OWNER_GROUP: i32 = 2;

/// Sets the owner (under the caller's uids); 0 is none.
///
/// # Errors
/// `ESRCH` if there is no such process.
pub fn set_owner(fd: BorrowedFd<'_>, kind: i32, pid: i32) -> Result<()> {
    let ex = [kind, pid];
    fcntl("F_SETOWN_EX", fd, F_SETOWN_EX, ex.as_ptr() as usize).map(drop)
}

/// Sets the owner under other user ids (real, effective): the kernel looks at them when it decides whether it may be
/// signalled.
///
/// # Errors
/// `ESRCH` if there is no such process, `EPERM` without `CAP_SETUID`.
pub fn set_owner_as(fd: BorrowedFd<'_>, kind: i32, pid: i32, uids: (u32, u32)) -> Result<()> {
    let own = (rustix::process::getuid().as_raw(), rustix::process::geteuid().as_raw());
    if own == uids {
        return set_owner(fd, kind, pid);
    }
    let set = |(uid, euid): (u32, u32)| {
        let args = [uid as usize, euid as usize, u32::MAX as usize, 0, 0, 0];
        // SAFETY: numbers only. The raw call concerns the calling thread alone, which keeps its saved user id and with it
        // the right to go back.
        unsafe { syscall("setresuid", libc::SYS_setresuid, args) }
    };
    set(uids)?;
    let done = set_owner(fd, kind, pid);
    set(own)?;
    done
}

/// Sets the signal.
///
/// # Errors
/// `EINVAL` for an impossible number.
pub fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    fcntl("F_SETSIG", fd, F_SETSIG, signal as usize).map(drop)
}

/// How an epoll instance polls network devices (`EPIOCGPARAMS`), as it is to be told: nothing but zeros if it does not.
///
/// # Errors
/// `ENOTTY` or `EINVAL` before Linux 6.9, or where the kernel polls none.
pub fn epoll_polling(fd: BorrowedFd<'_>) -> Result<u64> {
    let mut params = 0u64;
    epoll_ioctl("EPIOCGPARAMS", fd, 0x8008_8a02, &mut params)?;
    Ok(params)
}

/// Says how an epoll instance polls network devices.
///
/// # Errors
/// `EPERM` for more than the kernel's own weight without `CAP_NET_ADMIN`; see [`epoll_polling`].
pub fn set_epoll_polling(fd: BorrowedFd<'_>, params: u64) -> Result<()> {
    let mut params = params;
    epoll_ioctl("EPIOCSPARAMS", fd, 0x4008_8a01, &mut params)
}

fn epoll_ioctl(
    name: &'static str,
    fd: BorrowedFd<'_>,
    request: usize,
    params: &mut u64,
) -> Result<()> {
    let args = [fd.as_raw_fd() as usize, request, std::ptr::from_mut(params) as usize, 0, 0, 0];
    // SAFETY: both requests have a structure of eight bytes, which is live.
    unsafe { syscall(name, libc::SYS_ioctl, args) }.map(drop)
}

/// What is known of how long the data of a file live (`F_GET_RW_HINT`): `RWH_WRITE_LIFE_*`, 0 if nothing.
///
/// # Errors
/// `EBADF` for a descriptor that is only a name (`O_PATH`), `EINVAL` before Linux 4.13.
pub fn write_hint(fd: BorrowedFd<'_>) -> Result<u64> {
    let mut hint = 0u64;
    fcntl("F_GET_RW_HINT", fd, F_GET_RW_HINT, (&raw mut hint) as usize)?;
    Ok(hint)
}

/// Says how long the data of a file live (`F_SET_RW_HINT`).
///
/// # Errors
/// `EINVAL` for an impossible hint, `EPERM` for a file of somebody else's.
pub fn set_write_hint(fd: BorrowedFd<'_>, hint: u64) -> Result<()> {
    fcntl("F_SET_RW_HINT", fd, F_SET_RW_HINT, (&raw const hint) as usize).map(drop)
}

/// Sets the status flags that F_SETFL can set (`O_APPEND`, `O_ASYNC`, `O_DIRECT`, `O_NOATIME`, `O_NONBLOCK`).
///
/// # Errors
/// `EINVAL` where the file system has no direct I/O.
pub fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<()> {
    fcntl("F_SETFL", fd, libc::F_SETFL as usize, flags as usize).map(drop)
}

/// Status flags and access mode (`F_GETFL`).
///
/// # Errors
/// None in practice.
pub fn flags(fd: BorrowedFd<'_>) -> Result<u32> {
    fcntl("F_GETFL", fd, libc::F_GETFL as usize, 0).map(|f| f as u32)
}
