//! fanotify_init(2) and fanotify_mark(2).

use crate::call::{Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `FAN_CLOEXEC`
pub const FAN_CLOEXEC: u32 = 1;
/// `FAN_MARK_INODE`
pub const MARK_INODE: u32 = 0;
/// `FAN_MARK_MOUNT`
pub const MARK_MOUNT: u32 = 0x10;
/// `FAN_MARK_FILESYSTEM`
pub const MARK_FILESYSTEM: u32 = 0x100;
const MARK_ADD: u32 = 1;

/// Makes a fanotify group.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` for some flags, `EINVAL` for impossible ones, `EMFILE` if there are too many.
pub fn fanotify_init(flags: u32, event_flags: u32) -> Result<OwnedFd> {
    let args = [flags as usize, event_flags as usize, 0, 0, 0, 0];
    // SAFETY: numbers only.
    let fd = unsafe { syscall("fanotify_init", libc::SYS_fanotify_init, args) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Adds to the mark on what `target` (which may be `O_PATH`) leads to; `flags` are `FAN_MARK_*` without `FAN_MARK_ADD`.
///
/// # Errors
/// `EINVAL` for impossible masks, `EXDEV` and `EOPNOTSUPP` for file systems that do not tell what is asked for.
pub fn fanotify_mark(
    group: BorrowedFd<'_>,
    flags: u32,
    mask: u64,
    target: BorrowedFd<'_>,
) -> Result<()> {
    let path = format!("/proc/self/fd/{}\0", target.as_raw_fd());
    let args = [
        group.as_raw_fd() as usize,
        (flags | MARK_ADD) as usize,
        mask as usize,
        libc::AT_FDCWD as usize,
        path.as_ptr() as usize,
        0,
    ];
    // SAFETY: the path is a live string with a NUL at its end.
    unsafe { syscall("fanotify_mark", libc::SYS_fanotify_mark, args) }.map(drop)
}
