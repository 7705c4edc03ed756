//! eventfd(2): a counter, and `EFD_SEMAPHORE`, for which CRIU's format has no place.

use super::collect::{Collector, View};
use crate::Problem;
use rewake_image::messages::{EventfdFileEntry, FdTypes, FileEntry};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;

/// Surveys an eventfd.
///
/// # Errors
/// `/proc` does not tell its counter.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let Some(event) = info.eventfd else {
        return Err(view.problem("fdinfo does not tell its counter"));
    };
    let id = collector.new_id();
    if event.semaphore == Some(true) {
        collector.extra_of(id).semaphore = Some(true);
    }
    let entry =
        EventfdFileEntry { id, flags: view.flags, fown: view.owner()?, counter: event.count };
    collector.push(FileEntry {
        r#type: FdTypes::Eventfd as i32,
        id,
        efd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Eventfd))
}

/// Makes an eventfd of the image.
///
/// # Errors
/// None in practice.
pub fn open(entry: &EventfdFileEntry, semaphore: bool) -> Result<OwnedFd, Problem> {
    let failed = |e: rustix::io::Errno| Problem::new("eventfd", e.to_string());
    let mut flags = EventfdFlags::CLOEXEC;
    if semaphore {
        flags |= EventfdFlags::SEMAPHORE;
    }
    let fd = rustix::event::eventfd(0, flags).map_err(failed)?;
    // eventfd(2) takes 32 bits only.
    if entry.counter != 0 {
        rustix::io::write(&fd, &entry.counter.to_ne_bytes()).map_err(failed)?;
    }
    Ok(fd)
}
