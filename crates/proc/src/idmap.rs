//! `/proc/PID/uid_map`, `gid_map` and `setgroups` (user_namespaces(7)).

use crate::ParseError;
use crate::scan::{Scan, lines};

/// One range of a user or group id map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside the namespace.
    pub inside: u32,
    /// First id outside: in the reader's namespace, or the parent's if the reader is inside; `u32::MAX` if it has none.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Parses the text of `uid_map` or `gid_map`; empty until it is written.
///
/// # Errors
/// If a line is not three numbers.
pub fn parse(text: &[u8]) -> Result<Vec<IdRange>, ParseError> {
    lines(text)
        .map(|(number, line)| {
            let mut scan = Scan::new(line);
            let mut next = || {
                scan.blanks();
                scan.dec()
            };
            let range = (|| Some(IdRange { inside: next()?, outside: next()?, count: next()? }))();
            range
                .filter(|_| scan.end().is_some())
                .ok_or_else(|| ParseError::malformed("uid_map", "range", number, line))
        })
        .collect()
}

/// Parses `/proc/PID/setgroups`: may the namespace's members call setgroups(2)?
///
/// # Errors
/// If it is neither `allow` nor `deny`.
pub fn setgroups(text: &[u8]) -> Result<bool, ParseError> {
    match text.trim_ascii_end() {
        b"allow" => Ok(true),
        b"deny" => Ok(false),
        _ => Err(ParseError::malformed("setgroups", "setgroups", 1, text)),
    }
}
