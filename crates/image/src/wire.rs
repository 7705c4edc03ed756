//! The protobuf encoding: what a message's bytes must satisfy before they are decoded.
//!
//! prost forgives much (a missing required field becomes a zero), and a checkpoint that is restored wrongly is worse than one
//! that is refused. So every message is walked along its descriptor first. The walk is stricter than proto2 where no writer
//! of the format does what it refuses: packed fields, groups, a second value for a field that takes one.

use std::fmt;

use crate::{
    descriptor::{EnumDesc, FieldDesc, FieldKind, Label, MessageDesc},
    messages::ImageMessage,
};

/// How deep messages may nest; prost's own limit is 100. Only cgroup directories and AppArmor namespaces nest by themselves.
const MAX_DEPTH: u32 = 90;

/// What is wrong with a message, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Byte offset: of a whole file where an [`ImageError`](crate::ImageError) says it, otherwise of the message.
    pub offset: u64,
    /// The way to the field, such as `thread_core.creds.uid`; empty if it is the message itself.
    pub field: String,
    /// What is wrong.
    pub reason: Reason,
}

/// What can be wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The bytes end within something.
    #[error("the bytes end within {0}")]
    Truncated(&'static str),
    /// A length reaches beyond what holds it.
    #[error("a length of {length} bytes where {left} are left")]
    Length {
        /// The length as given.
        length: u64,
        /// The bytes that are there.
        left: u64,
    },
    /// A varint of more than 64 bits.
    #[error("a number of more than 64 bits")]
    Varint,
    /// A key that is no field's.
    #[error("an impossible field key {0:#x}")]
    Key(u64),
    /// The field is encoded as another type.
    #[error("encoded as {found}, but the field is {expected}")]
    WireType {
        /// What the descriptor says.
        expected: &'static str,
        /// What the key says.
        found: &'static str,
    },
    /// A required field has no value.
    #[error("the required field is missing")]
    Missing,
    /// A field that takes one value has a second.
    #[error("a second value for the field")]
    Duplicate,
    /// The number does not fit the field's type.
    #[error("{0} is out of the field's range")]
    Range(u64),
    /// The enum has no such value.
    #[error("{value} is not a value of {of}")]
    Enum {
        /// The number.
        value: i32,
        /// The enum's name.
        of: &'static str,
    },
    /// Messages nest too deep.
    #[error("messages nest more than {MAX_DEPTH} deep")]
    Depth,
    /// The values fit their types, but not one another.
    #[error("{0}")]
    Invalid(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}: ", self.offset)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        self.reason.fmt(f)
    }
}

impl std::error::Error for Fault {}

impl Fault {
    pub(crate) fn new(offset: usize, reason: Reason) -> Self {
        Fault { offset: offset as u64, field: String::new(), reason }
    }

    /// The same fault, seen from the message whose field `name` holds it.
    pub(crate) fn within(mut self, name: &str) -> Self {
        if !self.field.is_empty() {
            self.field.insert(0, '.');
        }
        self.field.insert_str(0, name);
        self
    }

    pub(crate) fn shifted(mut self, by: usize) -> Self {
        self.offset += by as u64;
        self
    }
}

/// Checks that `bytes` are a message of type `desc`: well-formed, no required field missing, no value out of range.
/// Fields without a descriptor are skipped, as proto2 says.
pub fn check(desc: &MessageDesc, bytes: &[u8]) -> Result<(), Fault> {
    check_nested(desc, bytes, 0, 0)
}

/// Checks and decodes a message.
pub fn decode<M: ImageMessage>(bytes: &[u8]) -> Result<M, Fault> {
    check(M::desc(), bytes)?;
    decode_checked(bytes)
}

/// Decodes a message that [`check`] has passed.
pub(crate) fn decode_checked<M: ImageMessage>(bytes: &[u8]) -> Result<M, Fault> {
    // the walk is stricter than prost, so this does not fail
    M::decode(bytes).map_err(|e| Fault::new(0, Reason::Invalid(e.to_string())))
}

fn check_nested(desc: &MessageDesc, bytes: &[u8], base: usize, depth: u32) -> Result<(), Fault> {
    if depth > MAX_DEPTH {
        return Err(Fault::new(base, Reason::Depth));
    }
    let mut seen = 0u64; // one bit a field; the tests see to it that no message type has more than 64
    let mut guess = 0;
    let mut fields = Fields::new(bytes);
    while let Some(raw) = fields.next().map_err(|f| f.shifted(base))? {
        // writers go by ascending number, so it is mostly the field after the last one, or that one again
        let index = (guess..desc.fields.len().min(guess + 2))
            .find(|&i| desc.fields[i].number == raw.number)
            .or_else(|| desc.fields.binary_search_by_key(&raw.number, |f| f.number).ok());
        let Some(index) = index else { continue };
        let field = &desc.fields[index];
        guess = index;

        let at = base + raw.offset;
        let fail = |reason| Err(Fault::new(at, reason).within(field.name));
        if seen & (1 << index) != 0 && field.label != Label::Repeated {
            return fail(Reason::Duplicate);
        }
        seen |= 1 << index;
        match (field.kind, raw.value) {
            (FieldKind::Message(nested), RawValue::Bytes(inner)) => {
                let start = base + raw.end - inner.len();
                check_nested(nested(), inner, start, depth + 1)
                    .map_err(|f| f.within(field.name))?;
            }
            (_, value) => {
                if let Err(reason) = fits(field, value) {
                    return fail(reason);
                }
            }
        }
    }
    for (index, field) in desc.fields.iter().enumerate() {
        if field.label == Label::Required && seen & (1 << index) == 0 {
            return Err(Fault::new(base, Reason::Missing).within(field.name));
        }
    }
    Ok(())
}

/// Whether a value other than a message fits its field.
fn fits(field: &FieldDesc, value: RawValue<'_>) -> Result<(), Reason> {
    use FieldKind::*;
    let in_range = |ok: bool, v| if ok { Ok(()) } else { Err(Reason::Range(v)) };
    match (field.kind, value) {
        (Uint64 | Int64 | Sint64, RawValue::Varint(_)) => Ok(()),
        (Uint32 | Sint32, RawValue::Varint(v)) => in_range(v <= u32::MAX.into(), v),
        (Int32, RawValue::Varint(v)) => in_range(as_int32(v).is_some(), v),
        (Bool, RawValue::Varint(v)) => in_range(v <= 1, v),
        (Enum(desc), RawValue::Varint(v)) => match as_int32(v) {
            Some(value) => known(desc, field.label, value),
            None => Err(Reason::Range(v)),
        },
        (Fixed64, RawValue::Fixed64(_)) | (String | Bytes, RawValue::Bytes(_)) => Ok(()),
        (kind, value) => Err(Reason::WireType { expected: expected(kind), found: value.name() }),
    }
}

/// A value unknown to the enum is legal where the field may be absent: proto2 treats it so.
fn known(desc: &EnumDesc, label: Label, value: i32) -> Result<(), Reason> {
    if label == Label::Required && desc.name_of(value).is_none() {
        return Err(Reason::Enum { value, of: desc.name });
    }
    Ok(())
}

/// A negative `int32` is sign-extended to 64 bits; some writers stop at 32.
pub(crate) fn as_int32(v: u64) -> Option<i32> {
    let signed = v as i64;
    i32::try_from(signed).ok().or_else(|| u32::try_from(v).ok().map(|v| v as i32))
}

fn expected(kind: FieldKind) -> &'static str {
    match kind {
        FieldKind::Fixed64 => "eight bytes",
        FieldKind::String => "a string",
        FieldKind::Bytes => "bytes",
        FieldKind::Message(_) => "a message",
        _ => "a varint",
    }
}

/// A value as the wire has it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RawValue<'a> {
    Varint(u64),
    Fixed64(u64),
    /// No field of the format is of such a type.
    Fixed32,
    Bytes(&'a [u8]),
}

impl RawValue<'_> {
    fn name(&self) -> &'static str {
        match self {
            RawValue::Varint(_) => "a varint",
            RawValue::Fixed64(_) => "eight bytes",
            RawValue::Fixed32 => "four bytes",
            RawValue::Bytes(_) => "a length and bytes",
        }
    }
}

/// A field as the wire has it.
#[derive(Debug)]
pub(crate) struct RawField<'a> {
    pub number: u32,
    /// Where its key starts, and where its value ends, in the message.
    pub offset: usize,
    pub end: usize,
    pub value: RawValue<'a>,
}

/// The fields of a message, one after the other.
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Fields { bytes, pos: 0 }
    }

    pub fn next(&mut self) -> Result<Option<RawField<'a>>, Fault> {
        if self.pos == self.bytes.len() {
            return Ok(None);
        }
        let offset = self.pos;
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|n| (1..1 << 29).contains(n));
        let bad_key = || Fault::new(offset, Reason::Key(key));
        let number = number.ok_or_else(bad_key)?;
        let value = match key & 7 {
            0 => RawValue::Varint(self.varint()?),
            1 => RawValue::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let at = self.pos;
                let length = self.varint()?;
                let left = self.bytes.len() - self.pos;
                match usize::try_from(length).ok().filter(|n| *n <= left) {
                    Some(n) => RawValue::Bytes(self.take(n)),
                    None => {
                        return Err(Fault::new(at, Reason::Length { length, left: left as u64 }));
                    }
                }
            }
            5 => self.array::<4>().map(|_| RawValue::Fixed32)?,
            _ => return Err(bad_key()), // groups, which proto2 deprecates and the format never had, and undefined ones
        };
        Ok(Some(RawField { number, offset, end: self.pos, value }))
    }

    fn varint(&mut self) -> Result<u64, Fault> {
        let start = self.pos;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.pos) else {
                return Err(Fault::new(start, Reason::Truncated("a number")));
            };
            self.pos += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Fault::new(start, Reason::Varint))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let chunk = self.bytes[self.pos..].first_chunk::<N>().copied();
        let chunk = chunk.ok_or_else(|| Fault::new(self.pos, Reason::Truncated("a number")))?;
        self.pos += N;
        Ok(chunk)
    }

    fn take(&mut self, n: usize) -> &'a [u8] {
        let taken = &self.bytes[self.pos..self.pos + n];
        self.pos += n;
        taken
    }
}

/// The value of an integer field of a message that [`check`] has passed; 0 if it is absent.
pub(crate) fn integer(bytes: &[u8], number: u32) -> u64 {
    let mut fields = Fields::new(bytes);
    while let Ok(Some(field)) = fields.next() {
        if let (true, RawValue::Varint(v)) = (field.number == number, field.value) {
            return v;
        }
    }
    0
}
