//! CRIU's image format: the files a checkpoint consists of.
//!
//! - [`messages`] declares every message, [`kind`] every kind of file;
//! - [`ImageDir`] reads a checkpoint, [`ImageWriter`] writes one that appears whole or not at all;
//! - [`pagemap`] and [`ghost`] are the files that need more than a list of messages;
//! - [`raw`] and [`wire`] are the layers beneath: framing, and the checks on a message before it is decoded;
//! - [`dedup()`] frees parents of what a checkpoint stores itself;
//! - [`addresses`] gives the sockets of a checkpoint other addresses;
//! - [`dynamic`] treats messages as data, for crit.
//!
//! This crate knows files and no processes. It believes nothing a file says: a damaged or hostile image gives an
//! [`ImageError`] that names the file, the entry and the byte, and no allocation is made on the word of a length.

#![forbid(unsafe_code)]

pub mod addresses;
mod chain;
mod compress;
mod dedup;
pub mod descriptor;
mod dir;
pub mod dynamic;
mod error;
mod file;
pub mod ghost;
pub mod kind;
pub mod manifest;
pub mod messages;
pub mod pagemap;
#[cfg(test)]
mod property_tests;
pub mod raw;
mod raw_check;
pub mod wire;
mod workers;
mod writer;

pub use chain::{PageStore, StoredPages, StoredRun};
pub use compress::Compression;
pub use dedup::dedup;
pub use dir::{ImageDir, OpenOptions, read_file};
pub use error::{ImageError, Result};
pub use ghost::{Ghost, GhostChunk};
pub use kind::{Id, Kind};
pub use pagemap::{PageRun, PageSource, Pagemap, SEVERAL_STORES, StorePage};
pub use raw_check::{RawCheck, Taker};
pub use workers::together;
pub use writer::{ImageWriter, PageStream, RawStream, Stream, write_file};
