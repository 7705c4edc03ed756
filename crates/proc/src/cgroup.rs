//! `/proc/PID/cgroup` (cgroups(7)).

use crate::ParseError;
use crate::scan::{Scan, lines};

const FILE: &str = "cgroup";

/// Membership in one hierarchy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cgroup<'a> {
    /// Hierarchy number, 0 for cgroup v2.
    pub hierarchy: u32,
    /// Controllers of a v1 hierarchy with commas between, or `name=NAME`; empty for v2.
    pub controllers: &'a [u8],
    /// Path below the root of the reader's cgroup namespace, beginning with `/` (and `/..` where outside of it),
    /// without the " (deleted)" suffix.
    pub path: &'a [u8],
    /// The directory is removed (only v2 says so).
    pub deleted: bool,
}

impl<'a> Cgroup<'a> {
    /// The v1 controllers one by one.
    pub fn controllers(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.controllers.split(|b| *b == b',').filter(|c| !c.is_empty())
    }
}

/// Parses the text of `/proc/PID/cgroup`.
///
/// # Errors
/// If a line is not `number:controllers:/path`. (The kernel refuses cgroups with a newline in their name.)
pub fn parse(text: &[u8]) -> Result<Vec<Cgroup<'_>>, ParseError> {
    lines(text)
        .map(|(number, line)| {
            let bad = |field| ParseError::malformed(FILE, field, number, line);
            let mut scan = Scan::new(line);
            let hierarchy = scan.dec().ok_or_else(|| bad("hierarchy"))?;
            scan.eat(b':').ok_or_else(|| bad("hierarchy"))?;
            let controllers = scan.until(b':').ok_or_else(|| bad("controllers"))?;
            let path = scan.rest;
            if path.first() != Some(&b'/') {
                return Err(bad("path"));
            }
            let alive =
                path.strip_suffix(b" (deleted)").filter(|p| hierarchy == 0 && !p.is_empty());
            Ok(Cgroup {
                hierarchy,
                controllers,
                path: alive.unwrap_or(path),
                deleted: alive.is_some(),
            })
        })
        .collect()
}
