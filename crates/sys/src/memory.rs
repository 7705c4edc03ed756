//! Other processes' memory: process_vm_readv(2).

use crate::call::{Result, pid_arg, syscall};

/// A range of a remote process: address and length in bytes.
pub type RemoteRange = (u64, usize);

/// Fills `buffer` from the given ranges of `pid`, in order; returns how many bytes were read (a hole or unreadable
/// page ends the read early).
///
/// # Errors
/// `EFAULT` if the first byte already cannot be read, `ESRCH`, `EPERM`.
///
/// # Panics
/// If more than `IOV_MAX` (1024) ranges are given.
pub fn read_remote(pid: i32, ranges: &[RemoteRange], buffer: &mut [u8]) -> Result<usize> {
    assert!(ranges.len() <= 1024, "at most IOV_MAX ranges a call");
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|&(address, len)| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: len })
        .collect();
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the local iovec is the caller's buffer; remote addresses are checked by the kernel against the other
    // process, not ours.
    unsafe {
        syscall(
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [pid_arg(pid), (&raw const local) as usize, 1, remote.as_ptr() as usize, remote.len(), 0],
        )
    }
}
