//! `/proc/PID/timens_offsets` (time_namespaces(7)).

use crate::ParseError;
use crate::scan::{Scan, lines};

const FILE: &str = "timens_offsets";

/// Offset of a clock to the initial time namespace's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offset {
    /// Seconds, may be negative.
    pub seconds: i64,
    /// Nanoseconds to add, 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// The offsets of the time namespace the process's children will be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TimensOffsets {
    /// `CLOCK_MONOTONIC`.
    pub monotonic: Offset,
    /// `CLOCK_BOOTTIME`.
    pub boottime: Offset,
}

/// Parses the text of `/proc/PID/timens_offsets`. Unknown clocks are skipped.
///
/// # Errors
/// If a clock is missing or malformed.
pub fn parse(text: &[u8]) -> Result<TimensOffsets, ParseError> {
    let mut monotonic = None;
    let mut boottime = None;
    for (number, line) in lines(text) {
        let mut scan = Scan::new(line);
        let (slot, field) = match scan.word() {
            // Linux before 5.7 printed clock numbers.
            Some(b"monotonic" | b"1") => (&mut monotonic, "monotonic"),
            Some(b"boottime" | b"7") => (&mut boottime, "boottime"),
            _ => continue,
        };
        let offset = (|| {
            scan.blanks();
            let seconds = scan.sdec()?;
            scan.blanks();
            let nanoseconds = scan.dec().filter(|n| *n < 1_000_000_000)?;
            scan.end()?;
            Some(Offset { seconds, nanoseconds })
        })();
        *slot = Some(offset.ok_or_else(|| ParseError::malformed(FILE, field, number, line))?);
    }
    let missing = |field| ParseError::missing(FILE, field, 1, text);
    Ok(TimensOffsets {
        monotonic: monotonic.ok_or_else(|| missing("monotonic"))?,
        boottime: boottime.ok_or_else(|| missing("boottime"))?,
    })
}
