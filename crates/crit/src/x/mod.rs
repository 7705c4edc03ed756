//! `crit x DIR …`: views of a whole checkpoint.
//!
//! Each view reads the images it shows and no others, so that what is left of a damaged checkpoint can still be looked at. Processes
//! come in the order of pstree.img. One that has no image of the kind (a zombie has neither memory nor descriptors) is passed over.

mod dir;
mod fds;
mod files;
mod mems;
mod ps;
mod rss;
mod vma;

use std::{
    io::{self, Write},
    path::Path,
};

use clap::ValueEnum;

use crate::error::Error;

use self::dir::Dir;

/// What to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum View {
    /// The process tree.
    Ps,
    /// Descriptors, working directory and root of each process.
    Fds,
    /// The mappings of each process.
    Mems,
    /// The stored pages of each process, against its mappings.
    Rss,
}

/// Writes a view of the checkpoint in `dir` as text.
///
/// # Errors
/// An image that is missing or malformed, with its name; what `out` reports.
pub fn explore(dir: &Path, view: View, out: &mut impl Write) -> Result<(), Error> {
    let dir = Dir::new(dir);
    match view {
        View::Ps => ps::show(&dir, out),
        View::Fds => fds::show(&dir, out),
        View::Mems => mems::show(&dir, out),
        View::Rss => rss::show(&dir, out),
    }
}

/// Writes bytes from an image for a terminal: control characters that could drive it as `\x1b`.
fn write_name(out: &mut impl Write, name: &[u8]) -> io::Result<()> {
    let mut rest = name;
    while let Some(at) =
        rest.iter().position(|b| b.is_ascii_control() && !matches!(b, b'\n' | b'\t'))
    {
        out.write_all(&rest[..at])?;
        write!(out, "\\x{:02x}", rest[at])?;
        rest = &rest[at + 1..];
    }
    out.write_all(rest)
}
