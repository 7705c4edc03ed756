//! `/proc/PID/limits` (proc_pid_limits(5)).

use crate::ParseError;
use crate::scan::{Scan, lines};

const FILE: &str = "limits";

/// A soft and a hard limit; `None` is `RLIM_INFINITY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Soft limit, in the resource's unit of getrlimit(2).
    pub soft: Option<u64>,
    /// Hard limit.
    pub hard: Option<u64>,
}

/// The file's names in the order of the `RLIMIT_*` numbers (of all architectures but alpha, mips and sparc).
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Parses the text of `/proc/PID/limits` to the 16 limits, indexed by `RLIMIT_*`.
///
/// # Errors
/// If one is missing or malformed. Names of later kernels are skipped.
pub fn parse(text: &[u8]) -> Result<[Limit; 16], ParseError> {
    let mut found = [None; 16];
    for (number, line) in lines(text) {
        // No name is the beginning of another, so the first that fits is the one.
        let Some(index) = NAMES.iter().position(|name| line.starts_with(name.as_bytes())) else {
            continue;
        };
        let field = NAMES[index];
        let mut scan = Scan::new(&line[field.len()..]);
        let limits = (|| Some(Limit { soft: value(scan.word()?)?, hard: value(scan.word()?)? }))();
        found[index] =
            Some(limits.ok_or_else(|| ParseError::malformed(FILE, field, number, line))?);
    }
    let mut all = [Limit::default(); 16];
    for ((slot, limit), name) in all.iter_mut().zip(found).zip(NAMES) {
        *slot = limit.ok_or_else(|| ParseError::missing(FILE, name, 1, text))?;
    }
    Ok(all)
}

#[allow(clippy::option_option)] // outer: well-formed? inner: is there a limit?
fn value(word: &[u8]) -> Option<Option<u64>> {
    if word == b"unlimited" {
        return Some(None);
    }
    let mut scan = Scan::new(word);
    let value = scan.dec_u64()?;
    scan.is_empty().then_some(Some(value))
}
