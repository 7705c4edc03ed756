//! Messages as data: what crit turns into JSON and back.

use crate::{
    descriptor::{FieldDesc, FieldKind, Label, MessageDesc},
    wire::{self, Fault, Fields, RawValue, Reason},
};

/// A message of any type.
#[derive(Debug, Clone, PartialEq)]
pub struct DynMessage {
    /// Its type.
    pub desc: &'static MessageDesc,
    /// The fields that have values, ascending by number, with all their values: one, if the field is not repeated.
    pub fields: Vec<(&'static FieldDesc, Vec<Value>)>,
}

/// A value of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of an unsigned integer field.
    Uint(u64),
    /// Of a signed integer field.
    Int(i64),
    /// Of a `bool` field.
    Bool(bool),
    /// Of an enum field, which may be none of the enum's values.
    Enum(i32),
    /// Of a `string` or `bytes` field.
    Bytes(Vec<u8>),
    /// Of a message field.
    Message(DynMessage),
}

impl DynMessage {
    /// A message without fields.
    pub fn new(desc: &'static MessageDesc) -> Self {
        DynMessage { desc, fields: Vec::new() }
    }

    /// Decodes a message. Fields without a descriptor are left out.
    pub fn decode(desc: &'static MessageDesc, bytes: &[u8]) -> Result<Self, Fault> {
        wire::check(desc, bytes)?;
        Self::decode_checked(desc, bytes)
    }

    fn decode_checked(desc: &'static MessageDesc, bytes: &[u8]) -> Result<Self, Fault> {
        let mut message = DynMessage::new(desc);
        let mut fields = Fields::new(bytes);
        while let Some(raw) = fields.next()? {
            let Some(field) = desc.field(raw.number) else { continue };
            let value = match (field.kind, raw.value) {
                (FieldKind::Message(nested), RawValue::Bytes(inner)) => {
                    Value::Message(Self::decode_checked(nested(), inner)?)
                }
                (kind, value) => Value::from_raw(kind, value)
                    .ok_or_else(|| Fault::new(raw.offset, Reason::Key(raw.number.into())))?,
            };
            message.push(field, value);
        }
        Ok(message)
    }

    /// Adds a value to a field.
    pub fn push(&mut self, field: &'static FieldDesc, value: Value) {
        match self.fields.binary_search_by_key(&field.number, |(f, _)| f.number) {
            Ok(at) => self.fields[at].1.push(value),
            Err(at) => self.fields.insert(at, (field, vec![value])),
        }
    }

    /// The values of the field with this name; none if it has none.
    pub fn values(&self, name: &str) -> &[Value] {
        let found = self.fields.iter().find(|(field, _)| field.name == name);
        found.map_or(&[], |(_, values)| values)
    }

    /// Encodes the message as protobuf libraries do: fields ascending by number. Any message that [`wire::check`] passes,
    /// that was encoded so and has no unknown fields, becomes the same bytes again.
    ///
    /// # Errors
    /// A required field has no value, another but a repeated one has several, a value is not of its field's type or
    /// range. The fault names the field.
    pub fn encode(&self) -> Result<Vec<u8>, Fault> {
        let mut buf = Vec::new();
        for field in self.desc.fields {
            let empty = Vec::new();
            let found = self.fields.iter().find(|(f, _)| f.number == field.number);
            let values = found.map_or(&empty, |(_, values)| values);
            let reason = match (field.label, values.len()) {
                (Label::Required, 0) => Some(Reason::Missing),
                (Label::Required | Label::Optional, 2..) => Some(Reason::Duplicate),
                _ => None,
            };
            let fail = |reason| Fault::new(buf.len(), reason).within(field.name);
            if let Some(reason) = reason {
                return Err(fail(reason));
            }
            for value in values {
                put_value(&mut buf, field, value)?;
            }
        }
        Ok(buf)
    }
}

impl Value {
    /// A value from the wire; none if it is not encoded as its type is.
    fn from_raw(kind: FieldKind, raw: RawValue<'_>) -> Option<Self> {
        use FieldKind::*;
        Some(match (kind, raw) {
            (Uint32 | Uint64, RawValue::Varint(v)) | (Fixed64, RawValue::Fixed64(v)) => {
                Value::Uint(v)
            }
            (Int32, RawValue::Varint(v)) => Value::Int(wire::as_int32(v)?.into()),
            (Int64, RawValue::Varint(v)) => Value::Int(v.cast_signed()),
            (Sint32 | Sint64, RawValue::Varint(v)) => {
                Value::Int((v >> 1).cast_signed() ^ -(v & 1).cast_signed())
            }
            (Bool, RawValue::Varint(v)) => Value::Bool(v != 0),
            (Enum(_), RawValue::Varint(v)) => Value::Enum(wire::as_int32(v)?),
            (String | Bytes, RawValue::Bytes(v)) => Value::Bytes(v.to_vec()),
            _ => return None,
        })
    }
}

fn put_value(buf: &mut Vec<u8>, field: &FieldDesc, value: &Value) -> Result<(), Fault> {
    use FieldKind::*;
    let fail = |reason| Fault::new(buf.len(), reason).within(field.name);
    let out_of_range = |v: i64| fail(Reason::Range(v.cast_unsigned()));
    let varint = match (field.kind, value) {
        (Uint32, &Value::Uint(v)) if v > u32::MAX.into() => return Err(fail(Reason::Range(v))),
        (Uint32 | Uint64, &Value::Uint(v)) => v,
        (Int32, &Value::Int(v)) if i32::try_from(v).is_err() => return Err(out_of_range(v)),
        (Int32 | Int64, &Value::Int(v)) => v.cast_unsigned(),
        (Sint32, &Value::Int(v)) if i32::try_from(v).is_err() => return Err(out_of_range(v)),
        (Sint32 | Sint64, &Value::Int(v)) => ((v << 1) ^ (v >> 63)).cast_unsigned(),
        (Bool, &Value::Bool(v)) => v.into(),
        (Enum(_), &Value::Enum(v)) => i64::from(v).cast_unsigned(),
        (Fixed64, &Value::Uint(v)) => {
            put_key(buf, field, 1);
            buf.extend(v.to_le_bytes());
            return Ok(());
        }
        (String | Bytes, Value::Bytes(bytes)) => {
            put_bytes(buf, field, bytes);
            return Ok(());
        }
        (Message(_), Value::Message(nested)) => {
            let bytes = nested.encode().map_err(|f| f.within(field.name))?;
            put_bytes(buf, field, &bytes);
            return Ok(());
        }
        _ => {
            return Err(fail(Reason::Invalid(
                "a value of another type than the field's".to_owned(),
            )));
        }
    };
    put_key(buf, field, 0);
    put_varint(buf, varint);
    Ok(())
}

fn put_key(buf: &mut Vec<u8>, field: &FieldDesc, wire_type: u64) {
    put_varint(buf, u64::from(field.number) << 3 | wire_type);
}

fn put_bytes(buf: &mut Vec<u8>, field: &FieldDesc, bytes: &[u8]) {
    put_key(buf, field, 2);
    put_varint(buf, bytes.len() as u64);
    buf.extend_from_slice(bytes);
}

pub(crate) fn put_varint(buf: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buf.push(value as u8 | 0x80);
        value >>= 7;
    }
    buf.push(value as u8);
}
