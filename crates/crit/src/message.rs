//! Messages to JSON objects and back, along their descriptors.

use rewake_image::{
    descriptor::{FieldDesc, FieldKind, Hint, Label, MessageDesc},
    dynamic::{DynMessage, Value as FieldValue},
};
use serde_json::{Map, Number, Value, json};

use crate::{
    Form,
    error::{Error, Result},
    path::JsonPath,
    text::{
        address, base64,
        device::{self, Encoding},
        names, number, quoted_printable,
    },
};

/// The key of the object that stands for a string which is not UTF-8.
const BASE64: &str = "base64";

/// A message's members: the fields that have values, ascending by number.
pub(crate) fn to_json(message: &DynMessage, form: Form) -> Map<String, Value> {
    members(message, form, false)
}

/// `hex` is for the numbers of a message whose field has the hint: they are hexadecimal though they have none themselves.
fn members(message: &DynMessage, form: Form, hex: bool) -> Map<String, Value> {
    let member = |(field, values): &(&'static FieldDesc, Vec<FieldValue>)| {
        let hint = match (form, field.hint) {
            (Form::Plain, Hint::Conv(map)) => Hint::Conv(map),
            (Form::Plain, _) => Hint::Plain,
            (Form::Pretty, Hint::Plain) if hex => Hint::Hex,
            (Form::Pretty, hint) => hint,
        };
        let mut items = values.iter().map(|value| one_to_json(field, hint, value, form));
        let json = match field.label {
            Label::Repeated => address_to_json(hint, values).unwrap_or_else(|| items.collect()),
            Label::Required | Label::Optional => items.next().unwrap_or_default(),
        };
        (field.name.to_owned(), json)
    };
    message.fields.iter().map(member).collect()
}

fn one_to_json(field: &FieldDesc, hint: Hint, value: &FieldValue, form: Form) -> Value {
    match value {
        FieldValue::Uint(v) => uint_to_json(field, hint, *v),
        FieldValue::Int(v) => match (hint, u64::try_from(*v)) {
            (Hint::Plain, _) | (_, Err(_)) => (*v).into(),
            (hint, Ok(v)) => uint_to_json(field, hint, v),
        },
        FieldValue::Bool(v) => (*v).into(),
        FieldValue::Enum(v) => match field.kind {
            FieldKind::Enum(desc) => desc.name_of(*v).map_or((*v).into(), Value::from),
            _ => (*v).into(),
        },
        FieldValue::Bytes(bytes) => match (field.kind, hint) {
            (FieldKind::String, _) => match str::from_utf8(bytes) {
                Ok(text) => text.into(),
                Err(_) => json!({BASE64: base64::encode(bytes)}),
            },
            (_, Hint::Conv("unix_name")) => quoted_printable::encode(bytes).into(),
            _ => base64::encode(bytes).into(),
        },
        FieldValue::Message(nested) => Value::Object(members(nested, form, hint == Hint::Hex)),
    }
}

fn uint_to_json(field: &FieldDesc, hint: Hint, value: u64) -> Value {
    if hint == Hint::Hex {
        return format!("{value:#x}").into();
    }
    let Ok(small) = u32::try_from(value) else { return value.into() };
    let text = match hint {
        Hint::Dev => Some(device::to_text(small, Encoding::Kernel)),
        Hint::Odev => Some(device::to_text(small, Encoding::Stat)),
        Hint::Flags(map) => names::bits(map).map(|table| names::bits_to_text(table, small)),
        Hint::Dict(map) => names::numbers(map, field.name)
            .and_then(|table| names::name_of(table, small))
            .map(str::to_owned),
        Hint::Plain | Hint::Hex | Hint::Ip | Hint::Conv(_) => None,
    };
    text.map_or(value.into(), Value::from)
}

/// The words of an address together are one text.
fn address_to_json(hint: Hint, values: &[FieldValue]) -> Option<Value> {
    if hint != Hint::Ip {
        return None;
    }
    let word = |value: &FieldValue| match value {
        FieldValue::Uint(v) => u32::try_from(*v).ok(),
        _ => None,
    };
    let words: Vec<u32> = values.iter().map(word).collect::<Option<_>>()?;
    address::to_text(&words).map(|text| json!([text]))
}

/// The message of an object's members; a member called `skip` is not the message's.
///
/// # Errors
/// A member that the message type has no field for, a value that does not fit its field, a required field without one.
pub(crate) fn from_json(
    desc: &'static MessageDesc,
    members: &Map<String, Value>,
    skip: Option<&str>,
    at: &JsonPath<'_>,
) -> Result<DynMessage> {
    let mut message = DynMessage::new(desc);
    for (key, value) in members.iter().filter(|(key, _)| Some(key.as_str()) != skip) {
        let at = at.member(key);
        let field = desc
            .field_named(key)
            .ok_or_else(|| Error::document(&at, format!("{} has no such field", desc.name)))?;
        if field.label != Label::Repeated {
            message.push(field, one_from_json(field, value, &at)?);
            continue;
        }
        let items = value.as_array().ok_or_else(|| expected("an array", value, &at))?;
        for (index, item) in items.iter().enumerate() {
            let at = at.item(index);
            match (field.hint, item.as_str().and_then(address::from_text)) {
                (Hint::Ip, Some(words)) => {
                    words
                        .into_iter()
                        .for_each(|word| message.push(field, FieldValue::Uint(word.into())));
                }
                _ => message.push(field, one_from_json(field, item, &at)?),
            }
        }
    }
    let missing = desc
        .fields
        .iter()
        .find(|f| f.label == Label::Required && message.values(f.name).is_empty());
    match missing {
        Some(field) => {
            Err(Error::document(at, format!("{} needs a field `{}`", desc.name, field.name)))
        }
        None => Ok(message),
    }
}

fn one_from_json(
    field: &'static FieldDesc,
    value: &Value,
    at: &JsonPath<'_>,
) -> Result<FieldValue> {
    use FieldKind::*;
    let unsigned =
        |max| integer(field, value, 0, max, at).map(|v| FieldValue::Uint(v.cast_unsigned() as u64));
    let signed = |min: i64, max: i64| {
        integer(field, value, min.into(), max.into(), at).map(|v| FieldValue::Int(v as i64))
    };
    match field.kind {
        Uint32 => unsigned(u32::MAX.into()),
        Uint64 | Fixed64 => unsigned(u64::MAX.into()),
        Int32 | Sint32 => signed(i32::MIN.into(), i32::MAX.into()),
        Int64 | Sint64 => signed(i64::MIN, i64::MAX),
        Bool => match (value, value.as_u64()) {
            (Value::Bool(v), _) => Ok(FieldValue::Bool(*v)),
            (_, Some(v @ (0 | 1))) => Ok(FieldValue::Bool(v == 1)),
            _ => Err(expected("true or false", value, at)),
        },
        Enum(desc) => {
            if let Some(v) = value.as_str().and_then(|name| desc.value_of(name)) {
                return Ok(FieldValue::Enum(v));
            }
            let v = integer(field, value, i32::MIN.into(), i32::MAX.into(), at)? as i32;
            match (field.label, desc.name_of(v)) {
                (Label::Required, None) => {
                    Err(Error::document(at, format!("{v} is no value of {}", desc.name)))
                }
                _ => Ok(FieldValue::Enum(v)),
            }
        }
        String => match (value, value.as_object().and_then(|o| o.get(BASE64))) {
            (Value::String(text), _) => Ok(FieldValue::Bytes(text.as_bytes().to_vec())),
            (_, Some(bytes)) => bytes_from_json(bytes, &at.member(BASE64)).map(FieldValue::Bytes),
            _ => Err(expected("a string", value, at)),
        },
        Bytes if field.hint == Hint::Conv("unix_name") => {
            let text = value.as_str().ok_or_else(|| expected("a string", value, at))?;
            Ok(FieldValue::Bytes(quoted_printable::decode(text.as_bytes())))
        }
        Bytes => bytes_from_json(value, at).map(FieldValue::Bytes),
        Message(nested) => {
            let members = value.as_object().ok_or_else(|| expected("an object", value, at))?;
            from_json(nested(), members, None, at).map(FieldValue::Message)
        }
    }
}

/// The integer of a value, in whichever form.
fn integer(
    field: &FieldDesc,
    value: &Value,
    min: i128,
    max: i128,
    at: &JsonPath<'_>,
) -> Result<i128> {
    let number = match value {
        Value::Number(number) => {
            number_to_integer(number).ok_or_else(|| expected("an integer", value, at))?
        }
        Value::String(text) => text_to_integer(field, text).map_err(|part| {
            Error::document(
                at,
                format!("`{part}` is neither a number nor a name that fits {}", field.name),
            )
        })?,
        _ => return Err(expected("a number", value, at)),
    };
    if (min..=max).contains(&number) {
        return Ok(number);
    }
    Err(Error::document(at, format!("{number} is not within {min} to {max}")))
}

fn number_to_integer(number: &Number) -> Option<i128> {
    let whole = number.as_u64().map(i128::from).or_else(|| number.as_i64().map(i128::from));
    // Some writers of JSON have no integers. Up to 2⁵³ a float is exact.
    let float =
        || number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= 9_007_199_254_740_992.0);
    whole.or_else(|| float().map(|f| f as i128))
}

/// What a text says for a field, or the part of it that says nothing.
fn text_to_integer<'t>(field: &FieldDesc, text: &'t str) -> Result<i128, &'t str> {
    let hinted = match field.hint {
        Hint::Dev => device::from_text(text, Encoding::Kernel),
        Hint::Odev => device::from_text(text, Encoding::Stat),
        Hint::Dict(map) => {
            names::numbers(map, field.name).and_then(|table| names::number_from_text(table, text))
        }
        Hint::Flags(map) => match names::bits(map) {
            Some(table) => Some(names::bits_from_text(table, text)?),
            None => None,
        },
        Hint::Plain | Hint::Hex | Hint::Ip | Hint::Conv(_) => None,
    };
    hinted.map(i128::from).or_else(|| number::from_text(text)).ok_or(text)
}

/// The bytes of a base64 text.
pub(crate) fn bytes_from_json(value: &Value, at: &JsonPath<'_>) -> Result<Vec<u8>> {
    let text = value.as_str().ok_or_else(|| expected("a base64 string", value, at))?;
    base64::decode(text).map_err(|e| match text.starts_with("... <") {
        true => Error::document(
            at,
            "only the size is here: the JSON was made without payloads (--nopl)",
        ),
        false => Error::document(at, format!("not base64: {e}")),
    })
}

/// The error of a value of the wrong type.
pub(crate) fn expected(what: &str, found: &Value, at: &JsonPath<'_>) -> Error {
    let found = match found {
        Value::Null => "null".to_owned(),
        Value::Bool(v) => v.to_string(),
        Value::Number(v) => v.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    Error::document(at, format!("{what} belongs here, not {found}"))
}
