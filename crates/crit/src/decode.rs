//! Images to JSON.

use std::path::Path;

use rewake_image::{
    ImageError,
    dynamic::DynMessage,
    kind::{self, KindInfo},
    raw::RawImage,
};
use serde_json::{Map, Value};

use crate::{
    Form, Payloads,
    error::{Error, Result},
    message, payload,
};

/// An image as JSON.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The document.
    pub json: Value,
    /// How many entries have something in them that the document has not: fields of a CRIU that is newer than this code.
    pub incomplete: usize,
}

/// The JSON of an image; `name` is for the text of errors.
pub(crate) fn image(name: &Path, bytes: &[u8], form: Form, payloads: Payloads) -> Result<Decoded> {
    let kind = detect(name, bytes)?;
    let mut image = RawImage::detect(name, bytes)?;
    let mut entries = Vec::new();
    let mut incomplete = 0;
    while let Some(entry) = image.next_entry()? {
        let fail = |fault| Error::entry(name, &entry, fault);
        let message = DynMessage::decode(entry.desc, entry.message).map_err(fail)?;
        incomplete += usize::from(message.encode().map_err(fail)? != entry.message);
        let mut members = message::to_json(&message, form);
        if let Some(extra) = payload::to_json(&image, &entry, &message, payloads)? {
            members.insert("extra".to_owned(), extra);
        }
        entries.push(Value::Object(members));
    }
    let document = [("magic", kind.name.into()), ("entries", Value::Array(entries))];
    let json =
        document.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>();
    Ok(Decoded { json: Value::Object(json), incomplete })
}

/// What kind of image it is, and how many entries it has; the head of a pagemap does not count.
pub(crate) fn info(name: &Path, bytes: &[u8]) -> Result<(&'static str, usize)> {
    let kind = detect(name, bytes)?;
    let mut image = RawImage::detect(name, bytes)?;
    let mut count = 0;
    while image.next_entry()?.is_some() {
        count += 1;
    }
    let heads = usize::from(kind.head.is_some() && count > 0);
    Ok((kind.name, count - heads))
}

/// The kind of an image, by its first eight bytes.
pub(crate) fn detect(name: &Path, start: &[u8]) -> Result<&'static KindInfo> {
    let too_short = || Error::NoMagic { path: name.to_owned() };
    let word =
        |at: usize| start.get(at..).and_then(|b| b.first_chunk()).map(|b| u32::from_le_bytes(*b));
    let first = word(0).ok_or_else(too_short)?;
    let magic = match first {
        kind::IMAGE_MAGIC | kind::SERVICE_MAGIC => word(4).ok_or_else(too_short)?,
        _ => first,
    };
    match RawImage::detect(name, start) {
        Ok(image) if image.kind().message.is_some() => Ok(image.kind()),
        Ok(_) | Err(ImageError::UnknownMagic { .. }) => {
            Err(Error::UnknownMagic { path: name.to_owned(), magic })
        }
        Err(e) => Err(e.into()),
    }
}
