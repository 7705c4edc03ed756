//! The one error of all parsers.

use std::fmt;

/// What is wrong with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The field is not there at all.
    Missing,
    /// The field is there but does not have the form or the range the kernel documents.
    Malformed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Missing => "is missing",
            Fault::Malformed => "is malformed",
        })
    }
}

/// A text that is not what the kernel's documentation (proc(5)) says it is.
///
/// The text comes from the kernel, so this means a kernel newer or older than known, or a file that is not from
/// `/proc`. The process is named by [`crate::read::ReadError`], which knows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: field {field} {fault} in line {line}: \"{excerpt}\"")]
pub struct ParseError {
    /// Name of the file below `/proc/PID` (or `/proc`), as `"maps"`.
    pub file: &'static str,
    /// The field by the name proc(5) or the kernel gives it.
    pub field: &'static str,
    /// Missing or malformed.
    pub fault: Fault,
    /// Line, counted from 1.
    pub line: usize,
    /// The first 120 bytes of the offending text, escaped to ASCII.
    pub excerpt: String,
}

/// How much of an offending text is quoted.
const EXCERPT: usize = 120;

impl ParseError {
    /// A field that is there but wrong; `text` is the line or value it was found in.
    #[cold]
    pub(crate) fn malformed(
        file: &'static str,
        field: &'static str,
        line: usize,
        text: &[u8],
    ) -> Self {
        let excerpt = text[..text.len().min(EXCERPT)].escape_ascii().to_string();
        ParseError { file, field, fault: Fault::Malformed, line, excerpt }
    }

    /// A field that is not there.
    #[cold]
    pub(crate) fn missing(
        file: &'static str,
        field: &'static str,
        line: usize,
        text: &[u8],
    ) -> Self {
        ParseError { fault: Fault::Missing, ..ParseError::malformed(file, field, line, text) }
    }
}
