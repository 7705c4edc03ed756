//! The kernel's description of its own types (BTF, `/sys/kernel/btf/vmlinux`): where the members of its structures are.
//!
//! Millions of bytes, of which a few names are wanted: they are looked for in one pass, which keeps only where each type is.

use crate::ParseError;

const FILE: &str = "btf/vmlinux";

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
/// The last kind there was when this was written.
const KIND_LAST: u32 = KIND_ENUM64;

/// A text of type information.
#[derive(Debug, Clone, Copy)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// Structures and functions by name: [`Btf::find`].
#[derive(Debug)]
pub struct Found<'a> {
    btf: Btf<'a>,
    /// Where each type is, by number; the first is number 1.
    places: Vec<u32>,
    structs: Vec<Option<u32>>,
    functions: Vec<Option<u32>>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Bytes that follow the first twelve of a type.
fn more(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        1 | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => count * 12,
        KIND_ENUM | KIND_FUNC_PROTO => count * 8,
        0 => return None,
        kind if kind <= KIND_LAST => 0,
        _ => return None,
    })
}

impl<'a> Btf<'a> {
    /// Looks at the header.
    ///
    /// # Errors
    /// It is none.
    pub fn new(text: &'a [u8]) -> Result<Btf<'a>, ParseError> {
        const MAGIC: u32 = 0xeb9f;
        let part = |offset: usize, len: usize, header: usize| {
            let start = header.checked_add(word(text, offset)? as usize)?;
            text.get(start..start.checked_add(word(text, len)? as usize)?)
        };
        let parts = || {
            let header = word(text, 4)? as usize;
            (word(text, 0)? & 0xffff == MAGIC).then_some(())?;
            Some(Btf { types: part(8, 12, header)?, strings: part(16, 20, header)? })
        };
        let start = &text[..text.len().min(24)];
        parts().ok_or_else(|| ParseError::malformed(FILE, "header", 1, start))
    }

    fn is_called(&self, name: u32, wanted: &[u8]) -> bool {
        let rest = self.strings.get(name as usize..).unwrap_or_default();
        rest.starts_with(wanted) && rest.get(wanted.len()) == Some(&0)
    }

    /// Looks for structures and functions.
    ///
    /// # Errors
    /// A type is of a kind that is not known, so that what follows cannot be found.
    pub fn find(self, structs: &[&str], functions: &[&str]) -> Result<Found<'a>, ParseError> {
        let mut found = Found {
            btf: self,
            places: Vec::with_capacity(self.types.len() / 40),
            structs: vec![None; structs.len()],
            functions: vec![None; functions.len()],
        };
        let mut at = 0;
        while at < self.types.len() {
            let head = || Some((word(self.types, at)?, word(self.types, at + 4)?));
            let size = head().and_then(|(_, info)| {
                let kind = info >> 24 & 0x1f;
                Some(12 + more(kind, (info & 0xffff) as usize)?)
            });
            let (Some((name, info)), Some(size)) = (head(), size) else {
                let rest = &self.types[at..];
                return Err(ParseError::malformed(
                    FILE,
                    "type",
                    found.places.len() + 1,
                    &rest[..rest.len().min(12)],
                ));
            };
            found.places.push(at as u32);
            let (wanted, places) = match info >> 24 & 0x1f {
                KIND_STRUCT => (structs, &mut found.structs),
                KIND_FUNC => (functions, &mut found.functions),
                _ => (&[][..], &mut found.structs),
            };
            if let Some(which) = wanted.iter().position(|w| self.is_called(name, w.as_bytes())) {
                places[which].get_or_insert(found.places.len() as u32);
            }
            at += size;
        }
        Ok(found)
    }
}

/// A member of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the beginning.
    pub offset: u32,
    /// Is it a pointer?
    pub pointer: bool,
}

/// The bits of a member: bytes from the beginning, how many bytes, and which bits of the first one if it is a bit field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bits {
    /// Bytes from the beginning.
    pub offset: u32,
    /// How many bytes it is in.
    pub len: u32,
    /// Which bits of them, if they are less than all of one byte.
    pub mask: u8,
}

/// Where a member is: its type, its first bit, and how many bits it has if it is a bit field (else 0).
#[derive(Debug, Clone, Copy)]
struct Place {
    kind: u32,
    bit: u32,
    width: u32,
}

impl Found<'_> {
    /// The number of a function, by its place among those asked for.
    #[must_use]
    pub fn function(&self, which: usize) -> Option<u32> {
        *self.functions.get(which)?
    }

    /// Where a member of a structure is (by its place among those asked for), be it in a nameless structure or union in it.
    /// Bit fields are not found.
    #[must_use]
    pub fn member(&self, which: usize, name: &str) -> Option<Member> {
        const POINTER: u32 = 2;
        let found = self.search((*self.structs.get(which)?)?, name.as_bytes(), 0)?;
        if found.width != 0 || !found.bit.is_multiple_of(8) {
            return None;
        }
        Some(Member { offset: found.bit / 8, pointer: self.bare_kind(found.kind)? == POINTER })
    }

    /// The size of a structure (by its place among those asked for).
    #[must_use]
    pub fn size(&self, which: usize) -> Option<u32> {
        word(self.btf.types, self.place((*self.structs.get(which)?)?)? + 8)
    }

    /// Which bits a member of a structure has, be it a bit field (one that is within a byte).
    #[must_use]
    pub fn bits(&self, which: usize, name: &str) -> Option<Bits> {
        let Place { kind, bit, width } =
            self.search((*self.structs.get(which)?)?, name.as_bytes(), 0)?;
        let offset = bit / 8;
        match width {
            0 => Some(Bits { offset, len: self.size_of(kind, 0)?, mask: 0xff }),
            // In the order of little-endian machines.
            1..8 if bit % 8 + width <= 8 && cfg!(target_endian = "little") => {
                let mask = ((1u32 << width) - 1) << (bit % 8);
                Some(Bits { offset, len: 1, mask: mask as u8 })
            }
            _ => None,
        }
    }

    /// The size of a type.
    fn size_of(&self, id: u32, depth: u32) -> Option<u32> {
        const POINTER: u32 = 2;
        let at = self.place(id)?;
        if depth > 16 {
            return None;
        }
        match word(self.btf.types, at + 4)? >> 24 & 0x1f {
            POINTER => Some(size_of::<usize>() as u32),
            KIND_ARRAY => {
                let count = word(self.btf.types, at + 20)?;
                self.size_of(word(self.btf.types, at + 12)?, depth + 1)?.checked_mul(count)
            }
            // Integer, structure, union, enumerations, floating point.
            1 | KIND_STRUCT | KIND_UNION | KIND_ENUM | 16 | KIND_ENUM64 => {
                word(self.btf.types, at + 8)
            }
            // Qualifiers and other names.
            8..=11 | 18 => self.size_of(word(self.btf.types, at + 8)?, depth + 1),
            _ => None,
        }
    }

    fn place(&self, id: u32) -> Option<usize> {
        self.places.get(id.checked_sub(1)? as usize).map(|at| *at as usize)
    }

    fn kind(&self, id: u32) -> Option<u32> {
        Some(word(self.btf.types, self.place(id)? + 4)? >> 24 & 0x1f)
    }

    /// The kind of a type without its qualifiers and other names.
    fn bare_kind(&self, mut id: u32) -> Option<u32> {
        const TYPEDEF: u32 = 8;
        // typedef, volatile, const, restrict, and tags of types.
        for _ in 0..16 {
            match self.kind(id)? {
                TYPEDEF..=11 | 18 => id = word(self.btf.types, self.place(id)? + 8)?,
                kind => return Some(kind),
            }
        }
        None
    }

    fn search(&self, id: u32, name: &[u8], depth: u32) -> Option<Place> {
        let at = self.place(id)?;
        let info = word(self.btf.types, at + 4)?;
        if !matches!(info >> 24 & 0x1f, KIND_STRUCT | KIND_UNION) || depth > 8 {
            return None;
        }
        let bits_too = info >> 31 != 0;
        (0..(info & 0xffff) as usize).find_map(|n| {
            let member = at + 12 + n * 12;
            let called = word(self.btf.types, member)?;
            let kind = word(self.btf.types, member + 4)?;
            let bit = word(self.btf.types, member + 8)?;
            let (width, bit) = if bits_too { (bit >> 24, bit & 0xff_ffff) } else { (0, bit) };
            if called != 0 && self.btf.is_called(called, name) {
                return Some(Place { kind, bit, width });
            }
            // Nameless, or all names begin at 0.
            if width != 0 || called != 0 && !self.btf.is_called(called, b"") {
                return None;
            }
            let inner = self.search(kind, name, depth + 1)?;
            Some(Place { bit: bit.checked_add(inner.bit)?, ..inner })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int a; union { struct { void *b; int c; }; }; int d : 3; }`, and a function.
    fn text() -> Vec<u8> {
        let strings = b"\0outer\0a\0b\0c\0d\0act\0";
        let name = |wanted: &str| {
            let all = std::str::from_utf8(strings).unwrap();
            all.find(&format!("\0{wanted}\0")).unwrap() as u32 + 1
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([0, 1 << 24, 4, 32]); // 1: int
        types.extend([0, 2 << 24, 0]); // 2: void *
        types.extend([0, 4 << 24 | 2, 16, name("b"), 2, 0, name("c"), 1, 64]); // 3
        types.extend([0, 5 << 24 | 1, 16, 0, 3, 0]); // 4: union of it
        types.extend([name("outer"), 1 << 31 | 4 << 24 | 3, 32]); // 5
        types.extend([name("a"), 1, 0, 0, 4, 64, name("d"), 1, 3 << 24 | 192]);
        types.extend([0, 13 << 24 | 1, 0, 0, 1]); // 6: a prototype
        types.extend([name("act"), 12 << 24, 6]); // 7
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let (len, end) = (types.len() as u32, strings.len() as u32);
        let head = [0x1_eb9f, 24, 0, len, len, end];
        let head = head.iter().flat_map(|w: &u32| w.to_ne_bytes());
        head.chain(types.iter().copied()).chain(strings.iter().copied()).collect()
    }

    #[test]
    fn members_are_found_in_nameless_parts() {
        let text = text();
        let found = Btf::new(&text).unwrap().find(&["none", "outer"], &["act", "none"]).unwrap();
        let member = |offset, pointer| Some(Member { offset, pointer });
        assert_eq!(found.member(1, "a"), member(0, false));
        assert_eq!(found.member(1, "b"), member(8, true));
        assert_eq!(found.member(1, "c"), member(16, false));
        assert_eq!((found.member(1, "d"), found.member(0, "a")), (None, None));
        assert_eq!((found.function(0), found.function(1)), (Some(7), None));
        let bits = |name, offset, len, mask| {
            assert_eq!(found.bits(1, name), Some(Bits { offset, len, mask }), "{name}");
        };
        bits("a", 0, 4, 0xff);
        bits("b", 8, 8, 0xff);
        bits("c", 16, 4, 0xff);
        bits("d", 24, 1, 7);
        assert_eq!((found.bits(1, "e"), found.size(1), found.size(0)), (None, Some(32), None));
    }

    #[test]
    fn damaged_texts_are_errors_or_find_less() {
        let text = text();
        for cut in 0..text.len() {
            let _ = Btf::new(&text[..cut]).and_then(|b| b.find(&["outer"], &[]).map(drop));
        }
        for at in 0..text.len() {
            let mut damaged = text.clone();
            damaged[at] ^= 0xff;
            if let Ok(found) = Btf::new(&damaged).and_then(|b| b.find(&["outer"], &["act"])) {
                for name in ["a", "b", "c", "d"] {
                    let _ = (found.member(0, name), found.bits(0, name));
                }
            }
        }
    }
}
