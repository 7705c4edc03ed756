//! JSON to images.

use rewake_image::{
    dynamic::DynMessage,
    kind::{self, Header, KindInfo, Payload},
    messages::{GhostChunkEntry, ImageMessage},
    wire,
};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    message,
    path::JsonPath,
    payload,
};

/// The image of a document.
pub(crate) fn image(document: &Value) -> Result<Vec<u8>> {
    let root = JsonPath::Root;
    let members =
        document.as_object().ok_or_else(|| message::expected("an object", document, &root))?;
    let member = |name: &'static str| {
        members.get(name).ok_or_else(|| {
            Error::document(&root, format!("an image's JSON needs a member `{name}`"))
        })
    };
    if let Some(other) = members.keys().find(|key| !matches!(key.as_str(), "magic" | "entries")) {
        return Err(Error::document(&root.member(other), "an image's JSON has no such member"));
    }
    let at = root.member("magic");
    let magic = member("magic")?;
    let kind =
        kind_of(magic.as_str().ok_or_else(|| message::expected("a string", magic, &at))?, &at)?;
    let at = root.member("entries");
    let entries = member("entries")?;
    let entries = entries.as_array().ok_or_else(|| message::expected("an array", entries, &at))?;

    let mut out = header(kind);
    let mut ghost = None;
    for (index, entry) in entries.iter().enumerate() {
        let at = at.item(index);
        let members =
            entry.as_object().ok_or_else(|| message::expected("an object", entry, &at))?;
        if kind.payload == Payload::GhostContent {
            ghost = put_ghost(&mut out, kind, members, ghost, &at)?;
        } else {
            let desc = kind.message_at(index).ok_or_else(|| no_form(kind, &at))?;
            put_entry(
                &mut out,
                kind,
                message::from_json(desc, members, Some("extra"), &at)?,
                members,
                &at,
            )?;
        }
    }
    Ok(out)
}

/// What the first entry of a ghost file says of those after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GhostForm {
    Whole,
    Chunks,
}

fn put_ghost(
    out: &mut Vec<u8>,
    kind: &KindInfo,
    members: &Map<String, Value>,
    form: Option<GhostForm>,
    at: &JsonPath<'_>,
) -> Result<Option<GhostForm>> {
    let desc = match form {
        None => kind.message_at(0).ok_or_else(|| no_form(kind, at))?,
        Some(GhostForm::Chunks) => GhostChunkEntry::desc(),
        Some(GhostForm::Whole) => {
            return Err(Error::document(
                at,
                "more than one entry, though the first does not say that the file is in chunks",
            ));
        }
    };
    let message = message::from_json(desc, members, Some("extra"), at)?;
    let form = form.unwrap_or(match payload::integer(&message, "chunks") {
        0 => GhostForm::Whole,
        _ => GhostForm::Chunks,
    });
    put_entry(out, kind, message, members, at)?;
    Ok(Some(form))
}

fn put_entry(
    out: &mut Vec<u8>,
    kind: &KindInfo,
    message: DynMessage,
    members: &Map<String, Value>,
    at: &JsonPath<'_>,
) -> Result<()> {
    put_frame(out, &message, at)?;
    payload::from_json(kind, &message, members.get("extra"), &at.member("extra"), out)
}

/// Appends a message's length and the message.
pub(crate) fn put_frame(out: &mut Vec<u8>, message: &DynMessage, at: &JsonPath<'_>) -> Result<()> {
    let bytes = message.encode().map_err(|fault| Error::document(at, fault.to_string()))?;
    // Only what can be read again is written: it may still be nested too deep.
    wire::check(message.desc, &bytes).map_err(|fault| Error::document(at, fault.to_string()))?;
    let length = u32::try_from(bytes.len())
        .map_err(|_| Error::document(at, "a message of more than 4 GiB"))?;
    out.extend(length.to_le_bytes());
    out.extend(bytes);
    Ok(())
}

fn kind_of(name: &str, at: &JsonPath<'_>) -> Result<&'static KindInfo> {
    let kind = kind::by_name(name)
        .ok_or_else(|| Error::document(at, format!("no kind of image is called `{name}`")))?;
    if kind.message.is_none() {
        return Err(no_form(kind, at));
    }
    Ok(kind)
}

fn no_form(kind: &KindInfo, at: &JsonPath<'_>) -> Error {
    Error::document(at, format!("{} images are raw data, which have no JSON form", kind.name))
}

fn header(kind: &KindInfo) -> Vec<u8> {
    let numbers: &[u32] = match kind.header {
        Header::Inventory => &[kind::INVENTORY_MAGIC],
        Header::Image(magic) => &[kind::IMAGE_MAGIC, magic],
        Header::Service(magic) => &[kind::SERVICE_MAGIC, magic],
        Header::Unmarked => &[],
    };
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
