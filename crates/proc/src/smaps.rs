//! `/proc/PID/smaps` (proc_pid_smaps(5)): each VMA with its flags and, if asked, its sizes.
//!
//! The text has about 25 lines a VMA of which mostly one is wanted. Its lines are padded, so the distance from the
//! header to `VmFlags:` is almost always that of the VMA before; the parser looks there first and walks the lines
//! only where that misses. `smaps_rollup` is not this format.

use std::iter::FusedIterator;

use crate::ParseError;
use crate::maps::{Map, header};
use crate::scan::{Scan, key_value};
use crate::vmflags::VmFlags;

const FILE: &str = "smaps";
const VM_FLAGS: &[u8] = b"VmFlags:";

/// Which values beside the flags are wanted; none costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Want {
    /// `Rss`.
    pub rss: bool,
    /// `Pss`.
    pub pss: bool,
    /// `AnonHugePages`.
    pub anon_huge_pages: bool,
    /// `Swap`.
    pub swap: bool,
    /// `Locked`.
    pub locked: bool,
    /// `KernelPageSize`.
    pub kernel_page_size: bool,
    /// `ProtectionKey`.
    pub protection_key: bool,
    /// `Shared_Clean` and `Shared_Dirty`; found at once, without a walk over the lines.
    pub shared: bool,
}

impl Want {
    /// Only the flags.
    pub const FLAGS: Want = Want {
        rss: false,
        pss: false,
        anon_huge_pages: false,
        swap: false,
        locked: false,
        kernel_page_size: false,
        protection_key: false,
        shared: false,
    };
    /// All values.
    pub const ALL: Want = Want {
        rss: true,
        pss: true,
        anon_huge_pages: true,
        swap: true,
        locked: true,
        kernel_page_size: true,
        protection_key: true,
        shared: true,
    };
}

/// Values of one VMA; `None` where not asked for or not printed. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Values {
    /// Resident.
    pub rss: Option<u64>,
    /// Resident, each page divided by the number of its users.
    pub pss: Option<u64>,
    /// Anonymous memory in transparent huge pages.
    pub anon_huge_pages: Option<u64>,
    /// Swapped out.
    pub swap: Option<u64>,
    /// Locked in memory.
    pub locked: Option<u64>,
    /// Size of the pages the kernel uses: the hugetlb size, else the base page.
    pub kernel_page_size: Option<u64>,
    /// Memory protection key; only printed if the CPU has them.
    pub protection_key: Option<u32>,
    /// Resident in pages that have several users and are as in their file or in swap.
    pub shared_clean: Option<u64>,
    /// Resident in other pages that have several users.
    pub shared_dirty: Option<u64>,
}

/// One VMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Smap<'a> {
    /// The header line, as in `maps`.
    pub map: Map<'a>,
    /// The flags.
    pub flags: VmFlags,
    /// The text of the `VmFlags` line after the colon.
    pub raw_flags: &'a [u8],
    /// What [`Want`] asked for.
    pub values: Values,
}

impl<'a> Smap<'a> {
    /// The flag codes this crate does not know, as printed; empty unless `flags` has [`VmFlags::UNKNOWN`].
    pub fn unknown_flags(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let words = self.raw_flags.split(|b| *b == b' ').filter(|w| !w.is_empty());
        words.filter(|w| match **w {
            [a, b] => VmFlags::from_code([a, b]) == VmFlags::UNKNOWN,
            _ => true,
        })
    }
}

/// Iterator over the VMAs of an `smaps` text, made by [`parse`].
#[derive(Debug, Clone)]
pub struct Smaps<'a> {
    rest: &'a [u8],
    want: Want,
    /// The whole text, kept because lines are only counted once there is an error.
    text: &'a [u8],
    /// Length of the lines between header and `VmFlags:` in the VMA before.
    distance: usize,
}

/// Parses an `smaps` text. After an error the iterator ends.
///
/// # Errors
/// An item is an error if the header line is malformed (see [`crate::maps::parse`]), `VmFlags` is missing, or a
/// wanted value is malformed.
pub fn parse(text: &[u8], want: Want) -> Smaps<'_> {
    Smaps { rest: text, want, text, distance: 0 }
}

impl<'a> Iterator for Smaps<'a> {
    type Item = Result<Smap<'a>, ParseError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let mut scan = Scan::new(self.rest);
        match self.vma(&mut scan) {
            Ok(vma) => {
                self.rest = scan.rest;
                Some(Ok(vma))
            }
            Err(field) => Some(Err(self.fault(field))),
        }
    }
}

impl FusedIterator for Smaps<'_> {}

impl<'a> Smaps<'a> {
    /// Takes one VMA; an error is the name of the field it is in.
    #[inline]
    fn vma(&mut self, scan: &mut Scan<'a>) -> Result<Smap<'a>, &'static str> {
        let map = header(scan)?;
        let body = scan.rest;
        if !body.get(self.distance..).is_some_and(|text| text.starts_with(VM_FLAGS)) {
            self.distance = find_flags(body).ok_or("VmFlags")?;
        }
        let (details, flags) = body.split_at(self.distance);
        scan.rest = &flags[VM_FLAGS.len()..];
        let raw_flags = scan.until(b'\n').ok_or("VmFlags")?;
        let walk = Want { shared: false, ..self.want } != Want::FLAGS;
        let mut values = if walk { values(details, self.want)? } else { Values::default() };
        if self.want.shared {
            (values.shared_clean, values.shared_dirty) = shared(details).ok_or("Shared_Clean")?;
        }
        Ok(Smap { map, flags: flag_set(raw_flags), raw_flags, values })
    }

    #[cold]
    fn fault(&mut self, field: &'static str) -> ParseError {
        let before = &self.text[..self.text.len() - self.rest.len()];
        let line = 1 + memchr::memchr_iter(b'\n', before).count();
        let text = self.rest.split(|b| *b == b'\n').next().unwrap_or_default();
        self.rest = &[];
        ParseError::malformed(FILE, field, line, text)
    }
}

/// Where `VmFlags:` is, walking line by line so that the next VMA's is never taken: all detail lines begin with a
/// capital, header lines with a hexadecimal digit in lower case.
#[cold]
fn find_flags(body: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let rest = body.get(at..)?;
        if rest.starts_with(VM_FLAGS) {
            return Some(at);
        }
        if !rest.first()?.is_ascii_uppercase() {
            return None;
        }
        at += memchr::memchr(b'\n', rest)? + 1;
    }
}

#[inline]
fn flag_set(text: &[u8]) -> VmFlags {
    let mut flags = VmFlags::NONE;
    let mut rest = text;
    loop {
        match rest {
            [] => return flags,
            [b' ', tail @ ..] => rest = tail,
            [a, b, b' ', tail @ ..] if *b != b' ' => {
                flags |= VmFlags::from_code([*a, *b]);
                rest = tail;
            }
            [a, b] if *b != b' ' => return flags | VmFlags::from_code([*a, *b]),
            _ => {
                // A code that is not two letters long: newer than this crate.
                flags |= VmFlags::UNKNOWN;
                let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
                rest = &rest[end..];
            }
        }
    }
}

fn values(details: &[u8], want: Want) -> Result<Values, &'static str> {
    let mut found = Values::default();
    let mut rest = details;
    while let Some(end) = memchr::memchr(b'\n', rest) {
        let line = &rest[..end];
        rest = &rest[end + 1..];
        let (slot, field) = match line {
            [b'R', b's', b's', b':', ..] if want.rss => (&mut found.rss, "Rss"),
            [b'P', b's', b's', b':', ..] if want.pss => (&mut found.pss, "Pss"),
            [b'S', b'w', b'a', b'p', b':', ..] if want.swap => (&mut found.swap, "Swap"),
            [b'A', b'n', b'o', b'n', b'H', ..] if want.anon_huge_pages => {
                (&mut found.anon_huge_pages, "AnonHugePages")
            }
            [b'L', b'o', b'c', ..] if want.locked => (&mut found.locked, "Locked"),
            [b'K', b'e', ..] if want.kernel_page_size => {
                (&mut found.kernel_page_size, "KernelPageSize")
            }
            [b'P', b'r', b'o', ..] if want.protection_key => {
                found.protection_key = Some(key(line).ok_or("ProtectionKey")?);
                continue;
            }
            _ => continue,
        };
        // The letters above were only a quick sieve.
        let Some((name, value)) = key_value(line) else { return Err(field) };
        if name == field.as_bytes() {
            *slot = Some(size(value).ok_or(field)?);
        }
    }
    Ok(found)
}

/// The values of two lines that follow each other; none if they are not there.
fn shared(details: &[u8]) -> Option<(Option<u64>, Option<u64>)> {
    let Some(at) = memchr::memmem::find(details, b"Shared_Clean:") else {
        return Some((None, None));
    };
    let mut lines = details[at..].split(|b| *b == b'\n');
    let mut value = |wanted: &[u8]| {
        let (name, value) = key_value(lines.next()?)?;
        if name == wanted { size(value) } else { None }
    };
    Some((Some(value(b"Shared_Clean")?), Some(value(b"Shared_Dirty")?)))
}

fn size(value: &[u8]) -> Option<u64> {
    let mut scan = Scan::new(value);
    let kib = scan.dec_u64()?;
    scan.tag(b" kB")?;
    if scan.is_empty() { kib.checked_mul(1024) } else { None }
}

fn key(line: &[u8]) -> Option<u32> {
    let (name, value) = key_value(line)?;
    let mut scan = Scan::new(value);
    let key = scan.dec()?;
    (name == b"ProtectionKey" && scan.is_empty()).then_some(key)
}
