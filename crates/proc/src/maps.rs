//! `/proc/PID/maps` (proc_pid_maps(5)), parsed line by line without copying.

use std::borrow::Cow;
use std::iter::FusedIterator;

use crate::ParseError;
use crate::scan::Scan;

const FILE: &str = "maps";

/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// One VMA, as one line of `maps` (or the header line of a VMA in `smaps`) tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Map<'a> {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `VM_READ`.
    pub read: bool,
    /// `VM_WRITE`.
    pub write: bool,
    /// `VM_EXEC`.
    pub exec: bool,
    /// `VM_MAYSHARE`: made with `MAP_SHARED`.
    pub shared: bool,
    /// Offset in the file, in bytes; 0 if there is no file.
    pub pgoff: u64,
    /// Major number of the file system's device (`s_dev`, which for some file systems is not `st_dev`).
    pub dev_major: u32,
    /// Minor number of the same.
    pub dev_minor: u32,
    /// Inode number, 0 if there is no file.
    pub ino: u64,
    /// The name column as the kernel printed it, empty if there is none: newline as `\012`, with " (deleted)".
    pub raw_name: &'a [u8],
}

/// What the name column of a [`Map`] stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapName<'a> {
    /// No name: private anonymous memory.
    None,
    /// `[heap]`: the brk area.
    Heap,
    /// `[stack]`: the main thread's stack.
    Stack,
    /// `[vdso]`.
    Vdso,
    /// `[vvar]`.
    Vvar,
    /// `[vvar_vclock]` (since Linux 6.13).
    VvarVclock,
    /// `[vsyscall]`: the gate page, in no address space's list.
    Vsyscall,
    /// `[uprobes]`: the kernel's trampoline page for uprobes.
    Uprobes,
    /// `[anon:NAME]`: private anonymous memory named with `PR_SET_VMA_ANON_NAME`.
    Anon(&'a [u8]),
    /// `[anon_shmem:NAME]`: shared anonymous memory named so.
    AnonShmem(&'a [u8]),
    /// Another name in brackets.
    Special(&'a [u8]),
    /// `/dev/zero (deleted)`: shared anonymous memory (or, where `ino` says so, a real deleted `/dev/zero`).
    SharedAnon,
    /// `/SYSV%08x (deleted)`: a System V segment; the key. The inode number is the segment's id.
    SysV(u32),
    /// `/memfd:NAME (deleted)`; the name is still escaped.
    Memfd(&'a [u8]),
    /// `/anon_hugepage (deleted)`: anonymous hugetlb memory.
    AnonHugepage,
    /// `/[aio] (deleted)`: the ring of io_setup(2).
    Aio,
    /// `//anon`, as some kernels name special anonymous memory.
    SlashAnon,
    /// A path (see [`Map::path`]), or another file's name as `anon_inode:[perf_event]` or `socket:[17]`.
    File,
}

impl<'a> Map<'a> {
    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)] // the kernel has no empty VMA, and the parser refuses one
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Does the name end in " (deleted)"?
    ///
    /// A file may really be called so: only its inode, against the one at that path, decides.
    pub fn deleted(&self) -> bool {
        self.raw_name.first() != Some(&b'[') && self.raw_name.ends_with(DELETED)
    }

    /// The file's path without the " (deleted)" suffix and with `\012` undone; `None` without name or in brackets.
    ///
    /// The kernel does not escape the backslash, so a path that really holds the four bytes `\012` reads the same as
    /// one with a newline; where it matters, use the link in `/proc/PID/map_files`, which is exact.
    pub fn path(&self) -> Option<Cow<'a, [u8]>> {
        match self.raw_name {
            [] | [b'[', ..] => None,
            name => Some(unescape_newline(name.strip_suffix(DELETED).unwrap_or(name))),
        }
    }

    /// Classifies the name column.
    ///
    /// Names in brackets cannot be forged by a file, for a path begins with `/`. The forms with `/` (memfd, SysV,
    /// /dev/zero) can, so check the device too: theirs is the kernel's internal tmpfs or hugetlbfs mount.
    pub fn name(&self) -> MapName<'a> {
        let name = self.raw_name;
        match name {
            [] => MapName::None,
            [b'[', inner @ .., b']'] => match inner {
                b"heap" => MapName::Heap,
                b"stack" => MapName::Stack,
                b"vdso" => MapName::Vdso,
                b"vvar" => MapName::Vvar,
                b"vvar_vclock" => MapName::VvarVclock,
                b"vsyscall" => MapName::Vsyscall,
                b"uprobes" => MapName::Uprobes,
                _ => {
                    if let Some(given) = inner.strip_prefix(b"anon:") {
                        MapName::Anon(given)
                    } else if let Some(given) = inner.strip_prefix(b"anon_shmem:") {
                        MapName::AnonShmem(given)
                    } else {
                        MapName::Special(inner)
                    }
                }
            },
            b"//anon" => MapName::SlashAnon,
            _ => name.strip_suffix(DELETED).and_then(unnamed_file).unwrap_or(MapName::File),
        }
    }
}

/// Names of the kernel's own files, which are always "deleted".
fn unnamed_file(name: &[u8]) -> Option<MapName<'_>> {
    match name {
        b"/dev/zero" => Some(MapName::SharedAnon),
        b"/anon_hugepage" => Some(MapName::AnonHugepage),
        b"/[aio]" => Some(MapName::Aio),
        [b'/', b'S', b'Y', b'S', b'V', key @ ..] if key.len() == 8 => {
            let mut scan = Scan::new(key);
            let key = scan.hex()?;
            scan.is_empty().then_some(MapName::SysV(key))
        }
        _ => name.strip_prefix(b"/memfd:").map(MapName::Memfd),
    }
}

/// `maps` escapes nothing but the newline.
fn unescape_newline(name: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memmem::find(name, b"\\012").is_none() {
        return Cow::Borrowed(name);
    }
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = memchr::memmem::find(rest, b"\\012") {
        out.extend_from_slice(&rest[..at]);
        out.push(b'\n');
        rest = &rest[at + 4..];
    }
    out.extend_from_slice(rest);
    Cow::Owned(out)
}

/// Iterator over the lines of a `maps` text, made by [`parse`].
#[derive(Debug, Clone)]
pub struct Maps<'a> {
    rest: &'a [u8],
    line: usize,
}

/// Parses a `maps` text line by line. After an error the iterator ends.
///
/// # Errors
/// An item is an error if its line has not the documented form, an empty or inverted range, or no newline (a text
/// that was cut off).
pub fn parse(text: &[u8]) -> Maps<'_> {
    Maps { rest: text, line: 0 }
}

impl<'a> Iterator for Maps<'a> {
    type Item = Result<Map<'a>, ParseError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        self.line += 1;
        let mut scan = Scan::new(self.rest);
        match header(&mut scan) {
            Ok(map) => {
                self.rest = scan.rest;
                Some(Ok(map))
            }
            Err(field) => {
                let line = self.rest.split(|b| *b == b'\n').next().unwrap_or_default();
                self.rest = &[];
                Some(Err(ParseError::malformed(FILE, field, self.line, line)))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // No line is shorter than "0-1 rwxp 0 0:0 0\n".
        (0, Some(self.rest.len() / 17 + 1))
    }
}

impl FusedIterator for Maps<'_> {}

/// Takes one line with its newline; an error is the name of the field it is in.
#[inline]
pub(crate) fn header<'a>(scan: &mut Scan<'a>) -> Result<Map<'a>, &'static str> {
    let (start, end) = range(scan).ok_or("address")?;
    let perms = permissions(scan).ok_or("perms")?;
    let pgoff = scan.hex_u64().ok_or("offset")?;
    let (dev_major, dev_minor) = device(scan).ok_or("dev")?;
    let ino = scan.dec_u64().ok_or("inode")?;
    // Names are padded to a column; none begins with a blank.
    scan.eat(b' ').ok_or("inode")?;
    while let Some((b"        ", rest)) = scan.rest.split_first_chunk::<8>() {
        scan.rest = rest;
    }
    while let [b' ', rest @ ..] = scan.rest {
        scan.rest = rest;
    }
    let raw_name = if let [b'\n', rest @ ..] = scan.rest {
        scan.rest = rest;
        &[]
    } else {
        scan.until(b'\n').ok_or("pathname")?
    };
    let [read, write, exec, shared] = perms;
    Ok(Map { start, end, read, write, exec, shared, pgoff, dev_major, dev_minor, ino, raw_name })
}

#[inline]
fn range(scan: &mut Scan<'_>) -> Option<(u64, u64)> {
    let start = scan.hex_u64()?;
    scan.eat(b'-')?;
    let end = scan.hex_u64()?;
    scan.eat(b' ')?;
    (start < end).then_some((start, end))
}

#[inline]
fn permissions(scan: &mut Scan<'_>) -> Option<[bool; 4]> {
    let (&[r, w, x, s, b' '], rest) = scan.rest.split_first_chunk::<5>()? else { return None };
    scan.rest = rest;
    let bit = |letter: u8, on: u8, off: u8| {
        if letter == on {
            Some(true)
        } else if letter == off {
            Some(false)
        } else {
            None
        }
    };
    Some([bit(r, b'r', b'-')?, bit(w, b'w', b'-')?, bit(x, b'x', b'-')?, bit(s, b's', b'p')?])
}

#[inline]
fn device(scan: &mut Scan<'_>) -> Option<(u32, u32)> {
    scan.eat(b' ')?;
    // Nearly always two digits each.
    let mut short = *scan;
    if let (Some(major), Some(()), Some(minor), Some(())) =
        (short.hex2(), short.eat(b':'), short.hex2(), short.eat(b' '))
    {
        *scan = short;
        return Some((major, minor));
    }
    let major = scan.hex()?;
    scan.eat(b':')?;
    let minor = scan.hex()?;
    scan.eat(b' ')?;
    Some((major, minor))
}
