//! What follows the messages of some kinds of images: `extra` in JSON.

use rewake_image::{
    descriptor::MessageDesc,
    dynamic::{DynMessage, Value as FieldValue},
    kind::{KindInfo, Payload},
    messages::{GhostChunkEntry, ImageMessage, IpcMsg},
    raw::{IpcMessages, RawEntry, RawImage},
};
use serde_json::{Value, json};

use crate::{
    Form, Payloads,
    encode::put_frame,
    error::{Error, Result},
    message,
    path::JsonPath,
    text::base64,
};

/// The JSON of what follows an entry; `None` if it is of a kind that nothing follows.
pub(crate) fn to_json(
    image: &RawImage<'_>,
    entry: &RawEntry<'_>,
    message: &DynMessage,
    payloads: Payloads,
) -> Result<Option<Value>> {
    let bytes = entry.payload;
    let size = match image.kind().payload {
        Payload::Nothing => return Ok(None),
        Payload::GhostContent if payloads == Payloads::Sizes || integer(message, "chunks") != 0 => {
            return Ok(None);
        }
        Payload::GhostContent | Payload::Lengths(_) => bytes.len() as u64,
        Payload::Semaphores => integer(message, "nsems") * 2,
        Payload::SharedMemory => integer(message, "size"),
        Payload::Messages => return ipc_messages(image, entry, payloads).map(Some),
    };
    if payloads == Payloads::Sizes {
        return Ok(Some(size_text(size)));
    }
    // Without the zeros that fill it up.
    let bytes = usize::try_from(size).ok().and_then(|size| bytes.get(..size)).unwrap_or(bytes);
    Ok(Some(match image.kind().payload {
        Payload::Semaphores => {
            bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect()
        }
        _ if is_tcp(image.kind()) => {
            let received = usize::try_from(integer(message, "inq_len")).unwrap_or(usize::MAX);
            let (received, sent) = bytes.split_at_checked(received).unwrap_or((bytes, &[]));
            json!({"inq": base64::encode(received), "outq": base64::encode(sent)})
        }
        _ => base64::encode(bytes).into(),
    }))
}

fn ipc_messages(image: &RawImage<'_>, entry: &RawEntry<'_>, payloads: Payloads) -> Result<Value> {
    let mut items = Vec::new();
    let mut size = 0;
    let mut messages = IpcMessages::new(image, entry);
    while let Some((header, text)) = messages.next_message()? {
        size += header.len() + text.len();
        let header = DynMessage::decode(IpcMsg::desc(), header)
            .map_err(|fault| Error::entry(image.path(), entry, fault))?;
        items.push(Value::Object(message::to_json(&header, Form::Plain)));
        items.push(base64::encode(text).into());
    }
    Ok(match payloads {
        Payloads::Whole => items.into(),
        Payloads::Sizes => size_text(size as u64),
    })
}

/// Appends what follows the entry `message`, from its `extra`, which is at `at`.
///
/// # Errors
/// It is not of the form that belongs there, or not as long as the message says.
pub(crate) fn from_json(
    kind: &KindInfo,
    message: &DynMessage,
    extra: Option<&Value>,
    at: &JsonPath<'_>,
    out: &mut Vec<u8>,
) -> Result<()> {
    // Nothing at all is as good as no bytes.
    let bytes = |of: Option<&Value>, at: &JsonPath<'_>| {
        of.map_or(Ok(Vec::new()), |value| message::bytes_from_json(value, at))
    };
    match kind.payload {
        Payload::Nothing => match extra {
            Some(_) => Err(Error::document(
                at,
                format!("{} images have nothing beside their fields", kind.name),
            )),
            None => Ok(()),
        },
        Payload::Lengths(fields) if is_tcp(kind) => {
            let queues = match extra {
                Some(value) => Some(
                    value.as_object().ok_or_else(|| message::expected("an object", value, at))?,
                ),
                None => None,
            };
            for (number, name) in fields.iter().zip(["inq", "outq"]) {
                let at = at.member(name);
                let queue = bytes(queues.and_then(|q| q.get(name)), &at)?;
                expect_length(&queue, field_value(message, *number), &at)?;
                out.extend(queue);
            }
            Ok(())
        }
        Payload::Lengths(fields) => {
            let content = bytes(extra, at)?;
            expect_length(
                &content,
                fields.iter().map(|&number| field_value(message, number)).sum(),
                at,
            )?;
            out.extend(content);
            Ok(())
        }
        Payload::Semaphores => semaphores(message, extra, at, out),
        Payload::Messages => messages(message, extra, at, out),
        Payload::SharedMemory => {
            let content = bytes(extra, at)?;
            let length =
                if integer(message, "in_pagemaps") != 0 { 0 } else { integer(message, "size") };
            expect_length(&content, length, at)?;
            put_padded(out, &content, 4);
            Ok(())
        }
        Payload::GhostContent => {
            let content = bytes(extra, at)?;
            if is_chunk(message.desc) {
                expect_length(&content, integer(message, "len"), at)?;
            } else if integer(message, "chunks") != 0 {
                expect_length(&content, 0, at)?;
            }
            out.extend(content);
            Ok(())
        }
    }
}

fn semaphores(
    message: &DynMessage,
    extra: Option<&Value>,
    at: &JsonPath<'_>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let values = array(extra, at)?;
    let mut content = Vec::with_capacity(2 * values.len());
    for (index, value) in values.iter().enumerate() {
        let number = value.as_u64().and_then(|v| u16::try_from(v).ok());
        let number = number
            .ok_or_else(|| message::expected("a number up to 65535", value, &at.item(index)))?;
        content.extend(number.to_le_bytes());
    }
    expect_count(values.len(), integer(message, "nsems"), "values", at)?;
    put_padded(out, &content, 8);
    Ok(())
}

fn messages(
    message: &DynMessage,
    extra: Option<&Value>,
    at: &JsonPath<'_>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let (pairs, odd) = array(extra, at)?.as_chunks::<2>();
    if !odd.is_empty() {
        return Err(Error::document(
            at,
            "a message's header and its text take turns here, but the last text is missing",
        ));
    }
    for (index, [header, text]) in pairs.iter().enumerate() {
        let (header_at, text_at) = (at.item(2 * index), at.item(2 * index + 1));
        let members =
            header.as_object().ok_or_else(|| message::expected("an object", header, &header_at))?;
        let header = message::from_json(IpcMsg::desc(), members, None, &header_at)?;
        let text = message::bytes_from_json(text, &text_at)?;
        expect_length(&text, integer(&header, "msize"), &text_at)?;
        put_frame(out, &header, &header_at)?;
        put_padded(out, &text, 8);
    }
    expect_count(pairs.len(), integer(message, "qnum"), "messages", at)
}

/// Whether a message of this type is followed by another of the same file's content.
pub(crate) fn is_chunk(desc: &MessageDesc) -> bool {
    desc.name == GhostChunkEntry::desc().name
}

/// TCP streams have two queues instead of one run of bytes.
fn is_tcp(kind: &KindInfo) -> bool {
    kind.name == "TCP_STREAM"
}

fn array<'v>(extra: Option<&'v Value>, at: &JsonPath<'_>) -> Result<&'v [Value]> {
    match extra {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(message::expected("an array", other, at)),
    }
}

/// The value of a field that is not repeated; 0 if it has none.
pub(crate) fn integer(message: &DynMessage, name: &str) -> u64 {
    match message.values(name) {
        [FieldValue::Uint(v)] => *v,
        [FieldValue::Bool(v)] => (*v).into(),
        _ => 0,
    }
}

fn field_value(message: &DynMessage, number: u32) -> u64 {
    message.desc.field(number).map_or(0, |field| integer(message, field.name))
}

fn expect_length(bytes: &[u8], length: u64, at: &JsonPath<'_>) -> Result<()> {
    expect_count(bytes.len(), length, "bytes", at)
}

fn expect_count(found: usize, count: u64, of: &str, at: &JsonPath<'_>) -> Result<()> {
    if found as u64 == count {
        return Ok(());
    }
    Err(Error::document(at, format!("{found} {of} are here, but the entry says {count}")))
}

fn put_padded(out: &mut Vec<u8>, bytes: &[u8], unit: usize) {
    out.extend(bytes);
    out.extend(std::iter::repeat_n(0, bytes.len().next_multiple_of(unit) - bytes.len()));
}

fn size_text(size: u64) -> Value {
    format!("... <{size}B>").into()
}
