//! `/proc/PID/auxv` (proc_pid_auxv(5), getauxval(3)): binary pairs of native words.

use crate::ParseError;

const FILE: &str = "auxv";

/// The auxiliary vector.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Auxv {
    /// `AT_*` type and value, in order, without the final `AT_NULL`.
    pub entries: Vec<(u64, u64)>,
}

impl Auxv {
    /// The value of the first entry of this `AT_*` type.
    pub fn get(&self, at: u64) -> Option<u64> {
        self.entries.iter().find(|(t, _)| *t == at).map(|(_, value)| *value)
    }
}

/// Parses the `auxv` of a 64-bit process.
///
/// # Errors
/// If it does not end in an `AT_NULL` pair. An empty text (a kernel thread) gives an empty vector.
pub fn parse(bytes: &[u8]) -> Result<Auxv, ParseError> {
    pairs(bytes, bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)))
}

/// Parses the `auxv` of a 32-bit process, which has words of four bytes also under a 64-bit kernel.
///
/// # Errors
/// As [`parse`].
pub fn parse32(bytes: &[u8]) -> Result<Auxv, ParseError> {
    pairs(bytes, bytes.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_ne_bytes(*word))))
}

fn pairs(bytes: &[u8], mut words: impl Iterator<Item = u64>) -> Result<Auxv, ParseError> {
    let mut entries = Vec::new();
    while let (Some(at), Some(value)) = (words.next(), words.next()) {
        if at == 0 {
            return Ok(Auxv { entries });
        }
        entries.push((at, value));
    }
    if bytes.is_empty() {
        return Ok(Auxv { entries });
    }
    Err(ParseError::missing(FILE, "AT_NULL", 1, bytes))
}
