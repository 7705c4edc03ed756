//! What can go wrong with an image or its JSON.

use std::{
    io,
    path::{Path, PathBuf},
};

use rewake_image::{ImageError, raw::RawEntry, wire::Fault};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be shown or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The result could not be written where it should go.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    /// No kind of image starts so.
    #[error("Unknown magic {magic:#x}: {} is no image, or one of raw data (such as pages-1.img), which has no JSON form", path.display())]
    UnknownMagic {
        /// The file.
        path: PathBuf,
        /// The number that should tell the kind.
        magic: u32,
    },
    /// The file is too short to say what it is.
    #[error("{} ends before its magic number does", path.display())]
    NoMagic {
        /// The file.
        path: PathBuf,
    },
    /// The file holds an image of another kind than its name says.
    #[error("{} is a {found} image, not {expected}", path.display())]
    OtherKind {
        /// The file.
        path: PathBuf,
        /// crit's name of what it is.
        found: &'static str,
        /// crit's name of what it should be.
        expected: &'static str,
    },
    /// The image is malformed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The text is no JSON.
    #[error("the text is not JSON: {0}")]
    Syntax(#[from] serde_json::Error),
    /// The JSON is not an image's.
    #[error("{at}: {problem}")]
    Document {
        /// The way to the value, such as `entries[2].vmas[0].prot`.
        at: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl Error {
    /// A fault within an entry; its offset counts from the entry's first byte.
    pub(crate) fn entry(path: &Path, entry: &RawEntry<'_>, mut fault: Fault) -> Self {
        fault.offset = fault.offset.saturating_add(entry.offset as u64);
        Error::Image(ImageError::Malformed { path: path.to_owned(), entry: entry.index, fault })
    }

    /// A value of a document that is not what belongs there.
    pub(crate) fn document(at: &crate::path::JsonPath<'_>, problem: impl Into<String>) -> Self {
        Error::Document { at: at.to_string(), problem: problem.into() }
    }
}
