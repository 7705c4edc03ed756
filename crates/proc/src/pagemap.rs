//! The entries of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): one 64-bit word a page.

/// The page was written since `4` was written to `clear_refs`.
pub const SOFT_DIRTY: u64 = 1 << 55;
/// The page is mapped exactly once.
pub const MMAP_EXCLUSIVE: u64 = 1 << 56;
/// The page is write-protected by userfaultfd.
pub const UFFD_WP: u64 = 1 << 57;
/// The page is in a guard region, `MADV_GUARD_INSTALL` (since Linux 6.15).
pub const GUARD_REGION: u64 = 1 << 58;
/// The page belongs to a file or to shared anonymous memory.
pub const FILE_OR_SHARED: u64 = 1 << 61;
/// The page is swapped out.
pub const SWAPPED: u64 = 1 << 62;
/// The page is in memory.
pub const PRESENT: u64 = 1 << 63;
/// Page frame number if present; 0 for a reader without CAP_SYS_ADMIN.
pub const PFN: u64 = (1 << 55) - 1;
/// Number of the swap area if swapped.
pub const SWAP_TYPE: u64 = 0x1f;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry(pub u64);

impl Entry {
    /// Are all these bits set?
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// In memory or swapped out: there is content.
    pub const fn populated(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// Page frame number, if present (0 without CAP_SYS_ADMIN).
    pub const fn pfn(self) -> Option<u64> {
        if self.has(PRESENT) { Some(self.0 & PFN) } else { None }
    }

    /// Swap area and offset in it, if swapped.
    pub const fn swap(self) -> Option<(u64, u64)> {
        if self.has(SWAPPED) { Some((self.0 & SWAP_TYPE, (self.0 & PFN) >> 5)) } else { None }
    }
}

/// The entries in bytes read from `pagemap`; a last incomplete one is left out.
pub fn entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = Entry> {
    bytes.as_chunks::<8>().0.iter().map(|word| Entry(u64::from_ne_bytes(*word)))
}
