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

/// So many types are walked through at most to find one by its number: a place for each would take as long to write down as all
/// the rest.
const STEP: usize = 32;

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
    /// Where every [`STEP`]th type is; the first is number 1.
    places: Vec<u32>,
    structs: Vec<Option<u32>>,
    functions: Vec<Option<u32>>,
}

/// Names of three letters or more that are looked for, each with its first four bytes (or its end among them), by which nearly
/// all others are told apart at once.
struct Wanted<'n>(Vec<(u32, &'n [u8])>);

impl<'n> Wanted<'n> {
    fn new(names: &[&'n str]) -> Wanted<'n> {
        let first = |name: &[u8]| {
            let mut bytes = name.iter().copied();
            u32::from_ne_bytes(std::array::from_fn(|_| bytes.next().unwrap_or(0)))
        };
        Wanted(names.iter().map(|name| (first(name.as_bytes()), name.as_bytes())).collect())
    }

    /// Which of them a name is.
    fn find(&self, btf: Btf<'_>, name: u32) -> Option<usize> {
        let begin = word(btf.strings, name as usize)?;
        self.0.iter().position(|(first, wanted)| *first == begin && btf.is_called(name, wanted))
    }
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

    /// The name, the kind with its number of parts, and the size of a type.
    fn head(&self, at: usize) -> Option<(u32, u32, usize)> {
        let (name, info) = (word(self.types, at)?, word(self.types, at + 4)?);
        Some((name, info, 12 + more(info >> 24 & 0x1f, (info & 0xffff) as usize)?))
    }

    fn is_called(&self, name: u32, wanted: &[u8]) -> bool {
        let rest = self.strings.get(name as usize..).unwrap_or_default();
        rest.starts_with(wanted) && rest.get(wanted.len()) == Some(&0)
    }

    /// Looks for structures and functions, whose names have three letters at least.
    ///
    /// # Errors
    /// A type is of a kind that is not known, so that what follows cannot be found.
    pub fn find(self, structs: &[&str], functions: &[&str]) -> Result<Found<'a>, ParseError> {
        let mut found = Found {
            btf: self,
            places: Vec::with_capacity(self.types.len() / (20 * STEP)),
            structs: vec![None; structs.len()],
            functions: vec![None; functions.len()],
        };
        let (structs, functions) = (Wanted::new(structs), Wanted::new(functions));
        let (mut at, mut number) = (0, 0u32);
        while at < self.types.len() {
            number += 1;
            let Some((name, info, size)) = self.head(at) else {
                let rest = &self.types[at..];
                let start = &rest[..rest.len().min(12)];
                return Err(ParseError::malformed(FILE, "type", number as usize, start));
            };
            if (number as usize - 1).is_multiple_of(STEP) {
                found.places.push(at as u32);
            }
            let of_kind = match info >> 24 & 0x1f {
                KIND_STRUCT => Some((&structs, &mut found.structs)),
                KIND_FUNC => Some((&functions, &mut found.functions)),
                _ => None,
            };
            if let Some((wanted, places)) = of_kind
                && let Some(which) = wanted.find(self, name)
            {
                places[which].get_or_insert(number);
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
        let index = id.checked_sub(1)? as usize;
        let mut at = *self.places.get(index / STEP)? as usize;
        for _ in 0..index % STEP {
            let (_, _, size) = self.btf.head(at)?;
            at += size;
        }
        Some(at)
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
    fn types_are_found_by_number_among_many() {
        let mut text = text();
        let types = word(&text, 12).unwrap() as usize;
        // Integers, then another structure whose only member is of the last of them.
        const MANY: u32 = 3 * STEP as u32 + 5;
        let integer = |n: u32| [0, 1 << 24, n, 32];
        let mut more: Vec<u32> = (1..=MANY).flat_map(integer).collect();
        // Their names are those of the first text: "outer" is at 1, "act" at 15.
        more.extend([15, 4 << 24 | 1, 4, 15, 7 + MANY, 64]);
        let more: Vec<u8> = more.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let len = (types + more.len()) as u32;
        text.splice(24 + types..24 + types, more);
        text[12..16].copy_from_slice(&len.to_ne_bytes());
        text[16..20].copy_from_slice(&len.to_ne_bytes());
        let found = Btf::new(&text).unwrap().find(&["act"], &[]).unwrap();
        let bits = Bits { offset: 8, len: MANY, mask: 0xff };
        assert_eq!(found.bits(0, "act"), Some(bits));
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
