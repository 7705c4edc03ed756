//! Shared memory: what has to be written while its users stand still, and copies of it, which are written later.

use super::{Counters, workers};
use crate::crew::cpus;
use crate::dump::survey::Surveyed;
use crate::error::{Error, Result};
use rewake_image::{ImageDir, ImageWriter};
use rewake_objects::files::collect::{Collector, Contents};
use rewake_objects::memory::{contents, sysv};
use std::sync::atomic::Ordering;

/// Writes that of which there is no copy.
pub(super) fn still(
    images: &ImageWriter,
    surveyed: &Surveyed,
    parent: Option<&ImageDir>,
    further: Option<u32>,
    counters: &Counters,
) -> Result<()> {
    let Collector { contents, sysv, .. } = &surveyed.files;
    let sources = sources(contents, sysv, false);
    let (pages_id, workers, runs) = (1, cpus(), false);
    let target = contents::Target { images, parent, pages_id, further, workers, runs };
    write_shared(&sources, &target, surveyed, counters)
}

/// Writes the copies of shared memory, of a tree that runs on.
///
/// # Errors
/// They cannot be read, or the images cannot be written; the text says which.
pub fn copies(
    images: &ImageWriter,
    surveyed: &Surveyed,
    (contents, sysv): (&[Contents], &sysv::Survey),
    further: Option<u32>,
    counters: &Counters,
) -> Result<()> {
    // The others were written before.
    let pages_id = 1 + sources(contents, sysv, false).len() as u32;
    let (parent, workers, runs) = (None, workers(true), false);
    let used = counters.further.load(Ordering::Relaxed);
    let further = further.map(|first| first.saturating_add(used));
    let target = contents::Target { images, parent, pages_id, further, workers, runs };
    write_shared(&sources(contents, sysv, true), &target, surveyed, counters)
}

/// Shared memory of which there are copies (`kept`), or the other.
fn sources<'a>(
    contents: &'a [Contents],
    sysv: &'a sysv::Survey,
    kept: bool,
) -> Vec<contents::Source<'a>> {
    let segments = contents.iter().filter_map(|contents| match contents {
        Contents::Shared(segment) if segment.kept == kept => Some(segment.source()),
        _ => None,
    });
    segments.chain(sysv.sources(kept)).collect()
}

fn write_shared(
    sources: &[contents::Source<'_>],
    target: &contents::Target<'_>,
    surveyed: &Surveyed,
    counters: &Counters,
) -> Result<()> {
    let root = surveyed.tasks.first().map_or((0, &b""[..]), |t| (t.pid, t.comm.as_slice()));
    let written =
        contents::write(sources, target).map_err(|problem| Error::of(root.0, root.1, problem))?;
    counters.add(written);
    Ok(())
}
