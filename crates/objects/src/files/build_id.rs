//! Build ids: what tells one build of a program or library from another (`.note.gnu.build-id`). Images have those of
//! executable files, so that a restore notices if one was replaced (`--file-validation buildid`).

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// `PT_NOTE`, `NT_GNU_BUILD_ID`.
const NOTE_SEGMENT: u32 = 4;
const BUILD_ID: u32 = 3;
/// More is no note that anybody has made on purpose.
const MOST_NOTES: u64 = 1 << 16;
const MOST_SEGMENTS: usize = 256;

/// The build id of the file at `path`, as images have it: empty if it has none.
#[must_use]
pub fn of_path(path: &[u8]) -> Vec<u32> {
    // Reading it is nothing that its times should tell, and nobody can give up a lease for it now.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = |flags| rustix::fs::open(path, flags, Mode::empty());
    let opened = open(flags | OFlags::NOATIME).or_else(|e| match e {
        Errno::PERM => open(flags),
        e => Err(e),
    });
    opened.map_or_else(|_| Vec::new(), |file: OwnedFd| of(&file))
}

/// The build id of an open file.
#[must_use]
pub fn of(file: &impl AsFd) -> Vec<u32> {
    let read = |at: u64, buffer: &mut [u8]| rustix::io::pread(file, buffer, at).unwrap_or(0);
    packed(&find(read).unwrap_or_default())
}

/// Four bytes a word, the first lowest.
fn packed(id: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    };
    id.chunks(4).map(word).collect()
}

/// A build id as people write it.
#[must_use]
pub fn shown(id: &[u32]) -> String {
    id.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    number(bytes, at).map(u64::from_le_bytes)
}

/// Looks for the build id in an ELF file, of which `read` reads a part.
fn find(read: impl Fn(u64, &mut [u8]) -> usize) -> Option<Vec<u8>> {
    // Mostly all of it is in the first page.
    let mut first = vec![0; 4096];
    let len = read(0, &mut first);
    first.truncate(len);
    let part = |at: u64, len: usize| -> Option<Vec<u8>> {
        let start = usize::try_from(at).ok()?;
        if let Some(bytes) = first.get(start..start.checked_add(len)?) {
            return Some(bytes.to_vec());
        }
        let mut bytes = vec![0; len];
        (read(at, &mut bytes) == len).then_some(bytes)
    };
    // Magic, class, little-endian.
    let long = match first.get(..6)? {
        b"\x7fELF\x02\x01" => true,
        b"\x7fELF\x01\x01" => false,
        _ => return None,
    };
    let (table, size, count) = if long {
        (u64_at(&first, 32)?, u16_at(&first, 54)?, u16_at(&first, 56)?)
    } else {
        (u64::from(u32_at(&first, 28)?), u16_at(&first, 42)?, u16_at(&first, 44)?)
    };
    let (size, count) = (usize::from(size), usize::from(count).min(MOST_SEGMENTS));
    let table = part(table, size.checked_mul(count)?)?;
    for segment in table.chunks_exact(size.max(1)) {
        if u32_at(segment, 0)? != NOTE_SEGMENT {
            continue;
        }
        let (offset, length) = if long {
            (u64_at(segment, 8)?, u64_at(segment, 32)?)
        } else {
            (u64::from(u32_at(segment, 4)?), u64::from(u32_at(segment, 16)?))
        };
        if length > MOST_NOTES {
            continue;
        }
        let Some(notes) = part(offset, length as usize) else { continue };
        if let Some(id) = in_notes(&notes) {
            return Some(id);
        }
    }
    None
}

fn in_notes(mut notes: &[u8]) -> Option<Vec<u8>> {
    loop {
        let name_len = u32_at(notes, 0)? as usize;
        let len = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let bytes = notes.get(at..at.checked_add(len)?)?;
        if kind == BUILD_ID && notes.get(12..16)? == b"GNU\0" && name_len == 4 {
            return Some(bytes.to_vec());
        }
        notes = notes.get(at.checked_add(len.checked_next_multiple_of(4)?)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with two notes, the second of them the build id 1, 2, … 20.
    fn elf(long: bool, notes_at: usize) -> Vec<u8> {
        let mut file = vec![0; notes_at];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        let notes: Vec<u8> = [
            &[4, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0][..],
            b"GNU\0abc\0",
            &[4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0],
            b"GNU\0",
            &(1..=20).collect::<Vec<u8>>(),
        ]
        .concat();
        put(0, if long { b"\x7fELF\x02\x01" } else { b"\x7fELF\x01\x01" });
        let (at, len) = (notes_at as u64, notes.len() as u64);
        if long {
            put(32, &64u64.to_le_bytes());
            put(54, &[56, 0, 1, 0]);
            put(64, &NOTE_SEGMENT.to_le_bytes());
            put(72, &at.to_le_bytes());
            put(96, &len.to_le_bytes());
        } else {
            put(28, &64u32.to_le_bytes());
            put(42, &[32, 0, 1, 0]);
            put(64, &NOTE_SEGMENT.to_le_bytes());
            put(68, &(at as u32).to_le_bytes());
            put(80, &(len as u32).to_le_bytes());
        }
        file.extend(notes);
        file
    }

    fn id_of(file: &[u8]) -> Option<Vec<u8>> {
        find(|at, buffer| {
            let rest = file.get(at as usize..).unwrap_or_default();
            let len = rest.len().min(buffer.len());
            buffer[..len].copy_from_slice(&rest[..len]);
            len
        })
    }

    #[test]
    fn found_wherever_it_is() {
        let wanted: Vec<u8> = (1..=20).collect();
        for long in [true, false] {
            for at in [200, 4090, 70_000] {
                assert_eq!(id_of(&elf(long, at)), Some(wanted.clone()), "{long} {at}");
            }
        }
        assert_eq!(packed(&[1, 2, 3, 4, 5]), [0x0403_0201, 5]);
        assert_eq!(shown(&[0x0403_0201, 0x0807_0605]), "0102030405060708");
    }

    #[test]
    fn damaged_files_have_none() {
        let file = elf(true, 200);
        for len in 0..file.len() {
            assert_eq!(id_of(&file[..len]), None, "{len} bytes");
        }
        // Whatever a byte says, it is looked at without harm.
        for at in 0..120 {
            for value in [0, 0x7f, 0xff] {
                let mut file = file.clone();
                file[at] = value;
                let _ = id_of(&file);
            }
        }
        assert_eq!(id_of(b"#!/bin/sh\n"), None);
    }

    #[test]
    fn own_executable() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(of(&file), of_path(b"/proc/self/exe"));
        assert!(of_path(b"/nowhere").is_empty());
    }
}
