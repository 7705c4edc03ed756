//! System V shared memory: shmget(2), shmctl(2), shmat(2).

use crate::call::{Errno, Result, SyscallError, syscall};
use std::fs::File;
use std::os::fd::AsRawFd;

/// A segment that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct New {
    /// Its key; 0 (`IPC_PRIVATE`) is none.
    pub key: i32,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits, and `SHM_HUGETLB`, `SHM_NORESERVE` and their like.
    pub flags: i32,
    /// User and group id of its creator.
    pub creator: (u32, u32),
}

/// Makes a segment and returns its id. Another than the caller as creator needs `CAP_SETUID` and `CAP_SETGID`.
///
/// # Errors
/// `EEXIST` if there is one of this key, `ENOSPC` if there are too many, `EINVAL` for an impossible size, `ENOMEM`,
/// `EPERM`.
pub fn create(new: &New) -> Result<i32> {
    let ids = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if ids == new.creator {
        return get(new);
    }
    // The kernel takes the caller's effective ids, which belong to a thread: one that ends afterwards.
    let new = *new;
    let thread = std::thread::Builder::new().spawn(move || {
        become_creator(new.creator)?;
        get(&new)
    });
    let failed = || SyscallError::new("shmget", Errno::AGAIN);
    thread.map_err(|_| failed())?.join().unwrap_or_else(|_| Err(failed()))
}

fn get(new: &New) -> Result<i32> {
    let flags = new.flags | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: it takes no pointers.
    let id = unsafe {
        syscall(
            "shmget",
            libc::SYS_shmget,
            [new.key as usize, new.size as usize, flags as usize, 0, 0, 0],
        )
    }?;
    Ok(id as i32)
}

/// Gives the calling thread other effective ids, if it can without losing its capabilities.
fn become_creator((uid, gid): (u32, u32)) -> Result<()> {
    const SECBIT_NO_SETUID_FIXUP: usize = 1 << 2;
    const SAME: usize = u32::MAX as usize;
    // Not having this only matters for segments of huge pages.
    // SAFETY: these calls take integers. Ids and securebits are those of the calling thread alone, which ends soon.
    unsafe {
        let bits = [libc::PR_SET_SECUREBITS as usize, SECBIT_NO_SETUID_FIXUP, 0, 0, 0, 0];
        let _ = syscall("prctl", libc::SYS_prctl, bits);
        syscall("setresgid", libc::SYS_setresgid, [SAME, gid as usize, SAME, 0, 0, 0])?;
        syscall("setresuid", libc::SYS_setresuid, [SAME, uid as usize, SAME, 0, 0, 0])?;
    }
    Ok(())
}

fn control(id: i32, command: i32, pointer: usize) -> Result<()> {
    // SAFETY: `pointer` is null or that of a live shmid_ds, as the callers below see to.
    unsafe {
        syscall("shmctl", libc::SYS_shmctl, [id as usize, command as usize, pointer, 0, 0, 0])
    }
    .map(drop)
}

/// Marks a segment for removal: it ends with its last mapping, now if there is none.
///
/// # Errors
/// `EINVAL` or `EIDRM` if there is no such segment, `EPERM`.
pub fn remove(id: i32) -> Result<()> {
    control(id, libc::IPC_RMID, 0)
}

/// Keeps its pages from being swapped out.
///
/// # Errors
/// `EPERM`, `ENOMEM` (`RLIMIT_MEMLOCK`).
pub fn lock(id: i32) -> Result<()> {
    control(id, libc::SHM_LOCK, 0)
}

/// Gives a segment its owner and permission bits.
///
/// # Errors
/// `EPERM` unless the caller owns or made it.
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<()> {
    // SAFETY: a plain old struct of integers.
    let mut data: libc::shmid_ds = unsafe { std::mem::zeroed() };
    data.shm_perm.uid = uid;
    data.shm_perm.gid = gid;
    data.shm_perm.mode = (mode & 0o777) as _;
    control(id, libc::IPC_SET, (&raw mut data) as usize)
}

/// A segment attached to the calling process for writing; dropping it detaches it.
#[derive(Debug)]
pub struct Attached {
    address: usize,
    len: usize,
}

impl Attached {
    /// Attaches segment `id`, which has `size` bytes.
    ///
    /// # Errors
    /// `EINVAL` or `EIDRM` if there is no such segment, `EACCES`, `ENOMEM`.
    pub fn new(id: i32, size: u64) -> Result<Attached> {
        // SAFETY: the kernel chooses the address, so no other memory is concerned.
        let address = unsafe { syscall("shmat", libc::SYS_shmat, [id as usize, 0, 0, 0, 0, 0]) }?;
        Ok(Attached { address, len: (size as usize).next_multiple_of(4096) })
    }

    /// Reads `len` bytes of `file` from `offset` on into the segment at `at`; returns how many there were.
    ///
    /// # Errors
    /// Those of pread(2), and `EFAULT` if the range is not in the segment.
    pub fn fill(&self, file: &File, offset: u64, at: u64, len: usize) -> Result<usize> {
        let inside = (at as usize).checked_add(len).is_some_and(|end| end <= self.len);
        if !inside {
            return Err(SyscallError::new("pread64", Errno::FAULT));
        }
        // SAFETY: the range is in our mapping, as checked, of which nobody holds a reference.
        unsafe {
            syscall(
                "pread64",
                libc::SYS_pread64,
                [file.as_raw_fd() as usize, self.address + at as usize, len, offset as usize, 0, 0],
            )
        }
    }

    /// Makes all of it zero again, giving its memory back.
    ///
    /// # Errors
    /// Those of madvise(2).
    pub fn clear(&self) -> Result<()> {
        let args = [self.address, self.len, libc::MADV_REMOVE as usize, 0, 0, 0];
        // SAFETY: our mapping, of which nobody holds a reference.
        unsafe { syscall("madvise", libc::SYS_madvise, args) }.map(drop)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the address shmat gave; nobody holds a reference into it.
        let _ = unsafe { syscall("shmdt", libc::SYS_shmdt, [self.address, 0, 0, 0, 0, 0]) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_segment_is_made_filled_cleared_and_gone() {
        let new = New { key: 0, size: 5000, flags: 0o600, creator: (12345, 54321) };
        let Ok(id) = create(&new) else { return };
        let attached = Attached::new(id, new.size).unwrap();
        remove(id).unwrap();
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&[7; 8192]).unwrap();
        assert_eq!(attached.fill(&file, 0, 0, 8192), Ok(8192));
        assert_eq!(attached.fill(&file, 0, 4096, 8192).unwrap_err().errno, Errno::FAULT);
        let peek = || {
            let mut byte = [0; 1];
            let own = std::process::id() as i32;
            crate::memory::read_remote(own, &[(attached.address as u64 + 5000, 1)], &mut byte)
                .map(|_| byte[0])
        };
        assert_eq!(peek(), Ok(7));
        attached.clear().unwrap();
        assert_eq!(peek(), Ok(0));
        drop(attached);
        assert!(Attached::new(id, new.size).is_err());
    }
}
