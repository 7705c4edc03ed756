//! The text forms of single values: what `--pretty` shows of numbers and addresses, and how bytes become JSON strings.
//!
//! Each has its way back; `encode` takes all of them, pretty or plain.

pub mod address;
pub mod base64;
pub mod device;
pub mod names;
pub mod number;
pub mod quoted_printable;
