//! The two-letter codes of the `VmFlags` line of `smaps` as a set of bits.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub};

/// A set of VMA flags. The bits are this crate's own numbering, not the kernel's `VM_*` values (which differ between
/// kernels and architectures); image formats need a table of their own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct VmFlags(u64);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        /// Bit numbers in the order of the list.
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Bit { $($name),* }

        impl VmFlags {
            $($(#[$doc])* pub const $name: VmFlags = VmFlags(1 << Bit::$name as u64);)*
        }

        /// The code of each bit.
        const CODES: &[&[u8; 2]] = &[$($code),*];
    };
}

codes! {
    /// `rd`: readable.
    READ = b"rd";
    /// `wr`: writable.
    WRITE = b"wr";
    /// `ex`: executable.
    EXEC = b"ex";
    /// `sh`: shared.
    SHARED = b"sh";
    /// `mr`: may be made readable.
    MAYREAD = b"mr";
    /// `mw`: may be made writable.
    MAYWRITE = b"mw";
    /// `me`: may be made executable.
    MAYEXEC = b"me";
    /// `ms`: may be shared.
    MAYSHARE = b"ms";
    /// `gd`: grows down.
    GROWSDOWN = b"gd";
    /// `pf`: page frame numbers without `struct page`.
    PFNMAP = b"pf";
    /// `dw`: writes to the mapped file denied (kernels before 5.15).
    DENYWRITE = b"dw";
    /// `lo`: locked, mlock(2).
    LOCKED = b"lo";
    /// `io`: memory-mapped I/O.
    IO = b"io";
    /// `sr`: `MADV_SEQUENTIAL`.
    SEQ_READ = b"sr";
    /// `rr`: `MADV_RANDOM`.
    RAND_READ = b"rr";
    /// `dc`: `MADV_DONTFORK`.
    DONTCOPY = b"dc";
    /// `de`: cannot grow with mremap(2).
    DONTEXPAND = b"de";
    /// `lf`: lock pages when they are faulted in, `MLOCK_ONFAULT`.
    LOCKONFAULT = b"lf";
    /// `ac`: counted against overcommit.
    ACCOUNT = b"ac";
    /// `nr`: `MAP_NORESERVE`.
    NORESERVE = b"nr";
    /// `ht`: huge pages of hugetlbfs.
    HUGETLB = b"ht";
    /// `sf`: `MAP_SYNC`.
    SYNC = b"sf";
    /// `nl`: non-linear (kernels before 4.0).
    NONLINEAR = b"nl";
    /// `ar`: architecture's flag (on x86 PAT).
    ARCH_1 = b"ar";
    /// `wf`: `MADV_WIPEONFORK`.
    WIPEONFORK = b"wf";
    /// `dd`: `MADV_DONTDUMP`.
    DONTDUMP = b"dd";
    /// `bt`: arm64 branch target identification.
    ARM64_BTI = b"bt";
    /// `mt`: arm64 memory tags.
    MTE = b"mt";
    /// `mp`: x86 MPX bounds (kernels before 5.6).
    MPX = b"mp";
    /// `sd`: soft-dirty tracking.
    SOFTDIRTY = b"sd";
    /// `mm`: pages with and without `struct page`.
    MIXEDMAP = b"mm";
    /// `hg`: `MADV_HUGEPAGE`.
    HUGEPAGE = b"hg";
    /// `nh`: `MADV_NOHUGEPAGE`.
    NOHUGEPAGE = b"nh";
    /// `mg`: `MADV_MERGEABLE`.
    MERGEABLE = b"mg";
    /// `um`: userfaultfd, missing pages.
    UFFD_MISSING = b"um";
    /// `uw`: userfaultfd, write protection.
    UFFD_WP = b"uw";
    /// `ui`: userfaultfd, minor faults.
    UFFD_MINOR = b"ui";
    /// `ur`: userfaultfd, read-write protection (after Linux 6.18).
    UFFD_RWP = b"ur";
    /// `ss`: shadow stack.
    SHADOW_STACK = b"ss";
    /// `sl`: mseal(2).
    SEALED = b"sl";
    /// `dp`: `MAP_DROPPABLE` (since Linux 6.11).
    DROPPABLE = b"dp";
    /// `gu`: may hold guard regions (after Linux 6.18).
    MAYBE_GUARD = b"gu";
}

/// The bit that stands for codes this crate does not know.
const UNKNOWN_BIT: u8 = 63;
const _: () = assert!(CODES.len() < UNKNOWN_BIT as usize);

/// Bit number by both letters (five bits each), `UNKNOWN_BIT` where there is no such code.
static TABLE: [u8; 1024] = {
    let mut table = [UNKNOWN_BIT; 1024];
    let mut i = 0;
    while i < CODES.len() {
        let [a, b] = *CODES[i];
        table[slot(a, b)] = i as u8;
        i += 1;
    }
    table
};

const fn slot(a: u8, b: u8) -> usize {
    ((a & 31) as usize) << 5 | (b & 31) as usize
}

impl VmFlags {
    /// No flag.
    pub const NONE: VmFlags = VmFlags(0);
    /// At least one code was not known; [`crate::smaps::Smap::unknown_flags`] tells which.
    pub const UNKNOWN: VmFlags = VmFlags(1 << UNKNOWN_BIT);

    /// The flag of a code, [`VmFlags::UNKNOWN`] if there is none such.
    #[inline]
    pub fn from_code(code: [u8; 2]) -> VmFlags {
        let [a, b] = code;
        // Only lower-case letters are told apart by their low five bits.
        if a.is_ascii_lowercase() && b.is_ascii_lowercase() {
            VmFlags(1 << TABLE[slot(a, b)])
        } else {
            VmFlags::UNKNOWN
        }
    }

    /// Are all flags of `other` set here?
    pub const fn contains(self, other: VmFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is any flag of `other` set here?
    pub const fn intersects(self, other: VmFlags) -> bool {
        self.0 & other.0 != 0
    }

    /// Is no flag set?
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The flags of both.
    pub const fn union(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 | other.0)
    }

    /// The codes of the flags that are set, [`VmFlags::UNKNOWN`] as `??`.
    pub fn codes(self) -> impl Iterator<Item = &'static str> {
        let known = CODES.iter().enumerate().filter(move |(i, _)| self.0 & 1 << i != 0);
        let known = known.map(|(_, code)| std::str::from_utf8(&code[..]).unwrap_or("??"));
        known.chain(self.contains(VmFlags::UNKNOWN).then_some("??"))
    }
}

impl BitOr for VmFlags {
    type Output = VmFlags;
    fn bitor(self, other: VmFlags) -> VmFlags {
        self.union(other)
    }
}

impl BitOrAssign for VmFlags {
    fn bitor_assign(&mut self, other: VmFlags) {
        self.0 |= other.0;
    }
}

impl BitAnd for VmFlags {
    type Output = VmFlags;
    fn bitand(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 & other.0)
    }
}

impl Sub for VmFlags {
    type Output = VmFlags;
    fn sub(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 & !other.0)
    }
}

impl fmt::Display for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, code) in self.codes().enumerate() {
            write!(f, "{}{code}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmFlags({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_own_bit() {
        let mut all = VmFlags::NONE;
        for code in CODES {
            let flag = VmFlags::from_code(**code);
            assert!(!flag.intersects(all | VmFlags::UNKNOWN), "{flag}");
            assert_eq!(flag.codes().collect::<Vec<_>>(), [std::str::from_utf8(&code[..]).unwrap()]);
            all |= flag;
        }
        assert_eq!(VmFlags::from_code(*b"rd"), VmFlags::READ);
        assert_eq!(VmFlags::from_code(*b"gu"), VmFlags::MAYBE_GUARD);
        for odd in [b"zz", b"??", b"RD", b"r\x04"] {
            assert_eq!(VmFlags::from_code(*odd), VmFlags::UNKNOWN);
        }
    }
}
