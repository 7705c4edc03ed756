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
            [
                pid_arg(pid),
                (&raw const local) as usize,
                1,
                remote.as_ptr() as usize,
                remote.len(),
                0,
            ],
        )
    }
}

/// Makes a segment of shared anonymous memory of `len` bytes, as `mmap(MAP_SHARED | MAP_ANONYMOUS)` does, and returns
/// its file (`/proc/self/map_files`), so that several processes can map the same one.
///
/// # Errors
/// `EPERM` without `CAP_CHECKPOINT_RESTORE`; `ENOMEM`.
pub fn shared_anonymous(len: usize) -> Result<std::os::fd::OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    use rustix::mm::{MapFlags, ProtFlags};
    let failed = |call| move |errno| crate::SyscallError::new(call, errno);
    let len = len.next_multiple_of(4096);
    // SAFETY: a new mapping at an address of the kernel's choice; it is unmapped below and never dereferenced.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::NORESERVE,
        )
    }
    .map_err(failed("mmap"))?;
    let start = base as usize;
    let link = format!("/proc/self/map_files/{:x}-{:x}", start, start + len);
    let file = rustix::fs::open(link, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    // SAFETY: the mapping made above, which nobody else knows.
    let _ = unsafe { rustix::mm::munmap(base, len) };
    file.map_err(failed("open map_files"))
}
