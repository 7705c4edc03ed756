//! Memory shared with agents: a memfd mapping, accessed by offset.

use crate::{Error, Result};
use rustix::fd::{AsFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, mprotect, munmap};
use std::sync::atomic::AtomicU32;

/// Page size of x86-64.
pub const PAGE: usize = 4096;

/// A mapping of a memfd that other processes map too. All access is by bounds-checked offset, and by copy: the other
/// side may write at any time.
#[derive(Debug)]
pub struct SharedMap {
    base: *mut u8,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the mapping is plain shared memory; all access copies bytes or goes through atomics, and the protocol
// (ring.rs) says who writes what when.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `len` bytes of `file` anywhere.
    ///
    /// # Errors
    /// The failed call.
    pub fn of_file(file: OwnedFd, len: usize) -> Result<SharedMap> {
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }
        .map_err(Error::errno("mapping the ring", "mmap"))?;
        Ok(SharedMap { base: base.cast(), len, file })
    }

    /// Creates a memfd of `len` bytes and maps it at exactly `address`; `Ok(None)` if that range is taken here.
    ///
    /// # Errors
    /// The failed call.
    pub fn create_at(address: u64, len: usize) -> Result<Option<SharedMap>> {
        let file = rustix::fs::memfd_create("rewake", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::errno("creating the arena", "memfd_create"))?;
        rustix::fs::ftruncate(&file, len as u64)
            .map_err(Error::errno("sizing the arena", "ftruncate"))?;
        // SAFETY: MAP_FIXED_NOREPLACE never replaces an existing mapping.
        let mapped = unsafe {
            mmap(
                address as *mut _,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED_NOREPLACE,
                file.as_fd(),
                0,
            )
        };
        match mapped {
            Ok(base) if base as u64 == address => {
                Ok(Some(SharedMap { base: base.cast(), len, file }))
            }
            Ok(base) => {
                // SAFETY: just mapped, nobody knows of it yet.
                let _ = unsafe { munmap(base, len) };
                Ok(None)
            }
            Err(rewake_sys::Errno::EXIST) => Ok(None),
            Err(errno) => Err(Error::errno("mapping the arena", "mmap")(errno)),
        }
    }

    /// Makes the first `len` bytes executable and read-only.
    ///
    /// # Errors
    /// The failed call.
    pub fn make_code(&self, len: usize) -> Result<()> {
        assert!(len <= self.len, "code lies inside the mapping");
        // SAFETY: the range is inside our own mapping; nobody writes code after this.
        unsafe {
            mprotect(
                self.base.cast(),
                len,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::EXEC,
            )
        }
        .map_err(Error::errno("making the agent executable", "mprotect"))
    }

    /// The file behind the mapping.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Address of the mapping here.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is the mapping empty? (Never: the kernel refuses empty mappings.)
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len).expect("offset in the mapping");
        assert!(
            end <= self.len,
            "access at {offset}+{len} beyond the mapping's {} bytes",
            self.len
        );
        // SAFETY: checked just above.
        unsafe { self.base.add(offset) }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; source and mapping cannot overlap in a way that matters for bytes.
        unsafe { std::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len());
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies a plain value in.
    pub fn put<T: Copy>(&self, offset: usize, value: &T) {
        let to = self.at(offset, size_of::<T>());
        // SAFETY: range checked; unaligned write of a Copy value.
        unsafe { to.cast::<T>().write_unaligned(*value) };
    }

    /// Copies a plain value out.
    ///
    /// # Safety
    /// Every bit pattern must be a valid `T` (integers, arrays and `repr(C)` structs of them).
    #[must_use]
    pub unsafe fn get<T: Copy>(&self, offset: usize) -> T {
        let from = self.at(offset, size_of::<T>());
        // SAFETY: range checked; the caller vouches for the type.
        unsafe { from.cast::<T>().read_unaligned() }
    }

    /// A word that both sides access atomically.
    #[must_use]
    pub fn atomic(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "aligned word");
        let word = self.at(offset, 4);
        // SAFETY: aligned (the base is page aligned), in range, lives as long as self; other accesses to the same
        // bytes by this process go through this reference too.
        unsafe { AtomicU32::from_ptr(word.cast()) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives self.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
