//! The image tool `crit`: images to JSON and back, and views of a checkpoint.
//!
//! [`main`] is the command line; [`decode`] and [`encode`] are for programs. The JSON is that of CRIU's crit, so that either tool
//! reads what the other wrote, and the text is laid out as Python's `json` module does, so that the two can be compared byte by byte.
//!
//! An image becomes `{"magic": …, "entries": […]}`, each entry an object of its message's fields. What follows a message in
//! the file, the content of a pipe say, is the entry's member `extra`. How a message becomes JSON is in `message`, `extra` is in
//! `payload`, and the text forms of single values are in `text`.
//!
//! Where crit would lose something we do not:
//! - a `string` field that is not UTF-8 (Linux paths need not be) becomes `{"base64": …}`;
//! - an enum value without a name stays a number;
//! - `encode` refuses what it would have to leave out: unknown names, or an `extra` that is not as long as its message says.

#![forbid(unsafe_code)]

mod cli;
mod decode;
mod encode;
mod error;
mod message;
mod path;
mod payload;
mod python_json;
mod text;
mod x;

use std::path::Path;

use serde_json::Value;

pub use cli::main;
pub use error::{Error, Result};
pub use python_json::{Layout, write as write_json};
pub use x::{View, explore};

/// How numbers look in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As numbers.
    Plain,
    /// In the form that suits their field: hexadecimal, addresses, names.
    Pretty,
}

/// What becomes of the data that follow messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payloads {
    /// They are in the JSON.
    Whole,
    /// Only their sizes are. Such JSON cannot be encoded.
    Sizes,
}

/// The JSON of an image, in its plain form.
///
/// # Errors
/// The bytes are not an image, or a malformed one; the text says which entry and byte.
pub fn decode(bytes: &[u8]) -> Result<Value> {
    decode_as(bytes, Form::Plain, Payloads::Whole)
}

/// The JSON of an image, as told.
///
/// # Errors
/// As [`decode`].
pub fn decode_as(bytes: &[u8], form: Form, payloads: Payloads) -> Result<Value> {
    Ok(decode::image(Path::new("the image"), bytes, form, payloads)?.json)
}

/// The image of a JSON document, in whichever form.
///
/// # Errors
/// [`Error::Document`], which names the place in the document.
pub fn encode(document: &Value) -> Result<Vec<u8>> {
    encode::image(document)
}
