//! `/proc/PID/task/TID/children` (proc_tid_children(5)): the children a thread has made.
//!
//! Only exact while the thread and its children are stopped; a child that dies meanwhile can make the kernel skip
//! another. Needs CONFIG_PROC_CHILDREN.

use crate::ParseError;
use crate::scan::Scan;

/// Parses the blank-separated process ids.
///
/// # Errors
/// If a word is not a process id.
pub fn parse(text: &[u8]) -> Result<Vec<i32>, ParseError> {
    let bad = || ParseError::malformed("children", "pid", 1, text);
    let mut scan = Scan::new(text.trim_ascii_end());
    let mut all = Vec::new();
    while !scan.is_empty() {
        all.push(scan.dec::<u64>().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(bad)?);
        if !scan.is_empty() {
            scan.eat(b' ').ok_or_else(bad)?;
        }
    }
    Ok(all)
}
