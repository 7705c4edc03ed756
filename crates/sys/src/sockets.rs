//! Socket options and messages that rustix lacks.

use crate::call::{Result, SyscallError};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Reads a socket option as raw bytes (`getsockopt(2)`), at most `N`.
///
/// # Errors
/// `ENOPROTOOPT` if the socket has no such option.
pub fn option<const N: usize>(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: value is live for `len` bytes.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
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
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
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
