//! Other processes' memory: process_vm_readv(2), process_vm_writev(2).

use crate::call::{Errno, Result, SyscallError, pid_arg, syscall};
use std::fs::File;
use std::os::fd::AsRawFd;

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

/// Writes `bytes` to the memory of `pid` at `address`; returns how many were written.
///
/// # Errors
/// `EFAULT` if nothing can be written there (or there is no memory for it), `ESRCH`, `EPERM`.
pub fn write_remote(pid: i32, address: u64, bytes: &[u8]) -> Result<usize> {
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the local iovec is the caller's slice, which the kernel only reads; the remote address is checked by the kernel
    // against the other process, not ours.
    unsafe {
        syscall(
            "process_vm_writev",
            libc::SYS_process_vm_writev,
            [pid_arg(pid), (&raw const local) as usize, 1, (&raw const remote) as usize, 1, 0],
        )
    }
}

/// Makes a segment of shared anonymous memory of `len` bytes, as `mmap(MAP_SHARED | MAP_ANONYMOUS)` does, and returns
/// its file (`/proc/self/map_files`), so that several processes can map the same one. `flags` are further ones of mmap(2):
/// `MAP_HUGETLB`.
///
/// # Errors
/// `EPERM` without `CAP_CHECKPOINT_RESTORE`; `ENOMEM`.
pub fn shared_anonymous(len: usize, flags: u32) -> Result<std::os::fd::OwnedFd> {
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
            MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::from_bits_retain(flags),
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

/// Mappings of our own with flags that few have, for others to see what the kernel calls these; dropping it unmaps them.
#[derive(Debug)]
pub struct Specimens(Vec<usize>);

impl Specimens {
    /// Makes them: one for each kind of advice, and what is not backed, grows, is locked or shared. Those that the kernel
    /// refuses are left out.
    #[must_use]
    pub fn make() -> Specimens {
        use rustix::mm::Advice;
        use rustix::mm::{MapFlags, ProtFlags, madvise, mlock, mmap_anonymous};
        const PAGE: usize = 4096;
        let kinds = [MapFlags::NORESERVE, MapFlags::GROWSDOWN, MapFlags::empty()];
        let advices = [
            Advice::Random,
            Advice::Sequential,
            Advice::LinuxDontFork,
            Advice::LinuxDontDump,
            Advice::LinuxHugepage,
            Advice::LinuxNoHugepage,
            Advice::LinuxWipeOnFork,
        ];
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let map = |flags| {
            // SAFETY: a new mapping at an address of the kernel's choice, which is never referred to.
            unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE, access, flags) }
        };
        let mut all = Vec::new();
        for kind in kinds {
            all.extend(map(MapFlags::PRIVATE | kind).map(|at| at as usize));
        }
        if let Some(last) = all.last() {
            // SAFETY: the mapping just made, which nobody else knows.
            let _ = unsafe { mlock(*last as *mut _, PAGE) };
        }
        all.extend(map(MapFlags::SHARED).map(|at| at as usize));
        for advice in advices {
            let Ok(at) = map(MapFlags::PRIVATE) else { continue };
            all.push(at as usize);
            // SAFETY: likewise; no advice of these takes anything away.
            let _ = unsafe { madvise(at, PAGE, advice) };
        }
        Specimens(all)
    }
}

impl Drop for Specimens {
    fn drop(&mut self) {
        for at in &self.0 {
            // SAFETY: the mappings made in `make`, which nobody refers to.
            let _ = unsafe { rustix::mm::munmap(*at as *mut _, 4096) };
        }
    }
}

/// A file that is memory (a memfd), mapped into the calling process for writing; dropping it unmaps it.
#[derive(Debug)]
pub struct SharedMapping {
    address: usize,
    len: usize,
}

impl SharedMapping {
    /// Maps the first `len` bytes of `file`, without reserving anything.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new(file: impl std::os::fd::AsFd, len: usize) -> Result<SharedMapping> {
        use rustix::mm::{MapFlags, ProtFlags};
        // SAFETY: a new mapping at an address of the kernel's choice, of which nobody ever holds a reference.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                0,
            )
        }
        .map_err(|errno| SyscallError::new("mmap", errno))?;
        Ok(SharedMapping { address: address as usize, len })
    }

    /// Reads `len` bytes of `file` from `offset` on into the mapping at `at`.
    ///
    /// # Errors
    /// Those of pread(2); `EFAULT` if the range is not in the mapping or there is no memory for it; `EIO` if the file is
    /// too short.
    pub fn fill_all(&self, file: &File, offset: u64, at: u64, len: u64) -> Result<()> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len as u64);
        if !inside {
            return Err(SyscallError::new("pread64", Errno::FAULT));
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(1 << 30) as usize;
            let to = self.address + (at + done) as usize;
            // SAFETY: the range is in our mapping, as checked, of which nobody holds a reference.
            let got = unsafe {
                syscall(
                    "pread64",
                    libc::SYS_pread64,
                    [file.as_raw_fd() as usize, to, part, (offset + done) as usize, 0, 0],
                )
            }?;
            if got == 0 {
                return Err(SyscallError::new("pread64", Errno::IO));
            }
            done += got as u64;
        }
        Ok(())
    }
}

impl SharedMapping {
    /// Are these the bytes in the mapping from `at` on? Not if it ends before them.
    #[must_use]
    pub fn has(&self, at: u64, bytes: &[u8]) -> bool {
        let end = at.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.len as u64) {
            return false;
        }
        let ours = (self.address + at as usize) as *const std::ffi::c_void;
        // SAFETY: both ranges are as long as said, ours is in the mapping, as checked; no reference to it is made, for the
        // memory may change meanwhile.
        unsafe { libc::memcmp(ours, bytes.as_ptr().cast(), bytes.len()) == 0 }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of which nobody holds a reference.
        let _ = unsafe { rustix::mm::munmap(self.address as *mut std::ffi::c_void, self.len) };
    }
}
