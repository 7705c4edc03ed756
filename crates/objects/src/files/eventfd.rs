//! eventfd(2): a counter, and `EFD_SEMAPHORE`, for which CRIU's format has no place.

use super::collect::{Collector, View};
use crate::Problem;
use crate::iterators::files::File as Told;
use rewake_image::messages::{EventfdFileEntry, FdTypes, FileEntry, FownEntry};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;

/// Surveys an eventfd.
///
/// # Errors
/// `/proc` does not tell its counter.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let fown = view.owner()?;
    if let Some(told) = view.told {
        return Ok(add_told(collector, told, fown));
    }
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let Some(event) = info.eventfd else {
        return Err(view.problem("fdinfo does not tell its counter"));
    };
    Ok(add(collector, view.flags, fown, event.count, event.semaphore == Some(true)))
}

/// Adds an eventfd of which the kernel has told all.
pub(super) fn add_told(collector: &mut Collector, told: &Told, fown: FownEntry) -> (u32, FdTypes) {
    let (counter, flags, _) = told.event;
    let semaphore = flags & EventfdFlags::SEMAPHORE.bits() != 0;
    add(collector, told.flags, fown, counter, semaphore)
}

fn add(
    collector: &mut Collector,
    flags: u32,
    fown: FownEntry,
    counter: u64,
    semaphore: bool,
) -> (u32, FdTypes) {
    let id = collector.new_id();
    if semaphore {
        collector.extra_of(id).semaphore = Some(true);
    }
    let entry = EventfdFileEntry { id, flags, fown, counter };
    collector.push(FileEntry {
        r#type: FdTypes::Eventfd as i32,
        id,
        efd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    (id, FdTypes::Eventfd)
}

/// What the link of an eventfd says.
pub(super) const LINK: &[u8] = b"anon_inode:[eventfd]";

/// The kernel's number of an eventfd, by its `fdinfo`: if two differ, so do the descriptions. They all have one inode, so that
/// without it each would have to be compared with many others.
pub(super) fn object_number(fdinfo: &[u8]) -> Option<i32> {
    // What is wrong with the text is told when the file is surveyed.
    let event = rewake_proc::fdinfo::parse(fdinfo).ok()?.eventfd?;
    event.id.filter(|id| *id >= 0)
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
    // eventfd(2) takes 32 bits only.
    let at_once = u32::try_from(entry.counter);
    let fd = rustix::event::eventfd(at_once.unwrap_or(0), flags).map_err(failed)?;
    if at_once.is_err() {
        rustix::io::write(&fd, &entry.counter.to_ne_bytes()).map_err(failed)?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn number(fd: &OwnedFd) -> Option<i32> {
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        object_number(&text)
    }

    #[test]
    fn eventfds_are_told_apart_by_their_numbers() {
        let make = |count| rustix::event::eventfd(count, EventfdFlags::CLOEXEC).unwrap();
        let [one, other] = [0, 0].map(make);
        assert!(number(&one).is_some());
        assert_ne!(number(&one), number(&other));
        assert_eq!(number(&one), number(&one.try_clone().unwrap()));
        assert_eq!(object_number(b"pos:\t0\nflags:\t02\nmnt_id:\t1\nino:\t1\n"), None);
    }

    #[test]
    fn counters_of_any_size_come_back() {
        for counter in [0, 7, u64::from(u32::MAX), u64::from(u32::MAX) + 1, u64::MAX - 1] {
            let entry = EventfdFileEntry { counter, ..EventfdFileEntry::default() };
            let fd = open(&entry, false).unwrap();
            let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
            let info = rewake_proc::fdinfo::parse(&text).unwrap();
            assert_eq!(info.eventfd.unwrap().count, counter);
        }
    }
}
