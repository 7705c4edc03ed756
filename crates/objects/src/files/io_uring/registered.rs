//! What is registered with io_uring instances: files, buffers, an eventfd.
//!
//! The kernel tells descriptions and pages by numbers of its own; which descriptors and addresses these are is found when
//! all tasks are surveyed.

use super::super::collect::{Collector, View};
use super::super::eventfd;
use crate::Problem;
use crate::iterators::files;
use crate::iterators::rings::{self, Buffer, Instance};
use rewake_image::messages::{FdinfoEntry, RewakeRingBufferEntry, RewakeRingFileEntry};
use std::collections::HashMap;

/// An instance whose registrations are still to be found.
#[derive(Debug)]
pub struct Pending {
    id: u32,
    /// Who has it, and how it calls it.
    holder: i32,
    object: String,
    instance: Instance,
    /// Names of its files.
    names: Vec<(u32, String)>,
}

/// A task whose descriptors are surveyed.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    /// Its number.
    pub pid: i32,
    /// A living thread of it.
    pub tid: i32,
    /// All of them.
    pub tids: &'a [i32],
    /// Its descriptors.
    pub fds: &'a [FdinfoEntry],
}

/// Notes what is to be found later.
pub(super) fn note(
    collector: &mut Collector,
    view: &View<'_>,
    id: u32,
    instance: Instance,
    names: Vec<(u32, String)>,
) {
    let holder = collector.holder(view);
    collector.rings.push(Pending { id, holder, object: view.object(), instance, names });
}

/// What the kernel tells of the tree's descriptors.
#[derive(Debug, Default)]
struct Known {
    /// File ids by description.
    described: HashMap<u64, u32>,
    /// File ids of eventfds by their number.
    eventfds: HashMap<i32, u32>,
}

impl Known {
    fn of(holders: &[Holder<'_>]) -> Result<Known, String> {
        let mut known = Known::default();
        for holder in holders {
            let ids: HashMap<i32, u32> =
                holder.fds.iter().map(|fd| (fd.fd as i32, fd.id)).collect();
            for file in files::of(holder.tid)? {
                let Some(id) = ids.get(&file.number) else { continue };
                known.described.insert(file.description, *id);
                if file.link == eventfd::LINK {
                    known.eventfds.insert(file.event.2, *id);
                }
            }
        }
        Ok(known)
    }
}

/// Finds what is registered, when all tasks are surveyed. Problems come with the process that has the instance.
pub fn settle(collector: &mut Collector, holders: &[Holder<'_>]) -> Vec<(i32, Problem)> {
    let pending = std::mem::take(&mut collector.rings);
    let registers = |p: &Pending| !p.instance.files.is_empty() || p.instance.eventfd.is_some();
    let known = match pending.iter().any(registers) {
        true => Known::of(holders),
        false => Ok(Known::default()),
    };
    let mut problems = Vec::new();
    for ring in &pending {
        if let Err(problem) = ring.settle(collector, holders, &known) {
            problems.push((ring.holder, problem));
        }
    }
    problems
}

impl Pending {
    fn problem(&self, what: &str) -> Problem {
        Problem::new(self.object.clone(), format!("io_uring instances {what} cannot be saved"))
    }

    fn settle(
        &self,
        collector: &mut Collector,
        holders: &[Holder<'_>],
        known: &Result<Known, String>,
    ) -> Result<(), Problem> {
        let known = known.as_ref().map_err(|why| {
            self.problem("with registered files")
                .remedy(format!("the kernel does not tell which they are: {why}"))
        })?;
        let instance = &self.instance;
        let has_it = |holder: &&Holder<'_>| holder.fds.iter().any(|fd| fd.id == self.id);
        let holders = || holders.iter().filter(has_it);
        let mut files = Vec::with_capacity(instance.files.len());
        for slot in &instance.files {
            let Some(file) = known.described.get(&slot.description) else {
                let name = self.names.iter().find(|(number, _)| *number == slot.number);
                let name = name.map_or(String::new(), |(_, name)| format!(" ({name})"));
                let what = format!(
                    "with a file, slot {}{name}, that no process has open besides",
                    slot.number
                );
                return Err(self.problem(&what).remedy("have the program keep a descriptor of it"));
            };
            let tag = (slot.tag != 0).then_some(slot.tag);
            files.push(RewakeRingFileEntry { slot: slot.number, file: *file, tag });
        }
        let eventfd = match instance.eventfd {
            None => None,
            Some((number, is_async, shared)) => match known.eventfds.get(&number) {
                Some(id) => Some((*id, is_async)),
                None if !shared => Some((0, is_async)),
                None => {
                    return Err(
                        self.problem("with an eventfd that only processes outside the tree have")
                    );
                }
            },
        };
        let issuer = match instance.issuer {
            Some(Ok(tid)) => {
                if !holders().any(|holder| holder.tids.contains(&tid)) {
                    let what = format!(
                        "of which the only thread that may submit ({tid}, IORING_SETUP_SINGLE_ISSUER) has no descriptor"
                    );
                    return Err(self.problem(&what));
                }
                Some(tid)
            }
            _ => None,
        };
        let mut buffers_of = None;
        if instance.buffer_slots > 0 {
            let mut may_own = holders().filter(|h| issuer.is_none_or(|tid| h.tids.contains(&tid)));
            let owner = may_own.find(|holder| owns(holder.tid, &instance.buffers));
            let Some(owner) = owner else {
                return Err(self
                    .problem("with registered buffers that are not mapped any more where they were, or not by a process that has the instance,")
                    .remedy("have the program register them anew"));
            };
            buffers_of = Some(owner.pid as u32);
        }
        let whole = (0, instance.file_slots);
        let range = (instance.file_range != whole && instance.file_slots > 0)
            .then_some(instance.file_range);
        let Some(entry) = &mut collector.extra_of(self.id).ring else { return Ok(()) };
        entry.issuer = issuer.map(|tid| tid as u32);
        entry.file_slots = (instance.file_slots > 0).then_some(instance.file_slots);
        entry.files = files;
        (entry.files_from, entry.files_to) = range.unzip();
        entry.buffer_slots = (instance.buffer_slots > 0).then_some(instance.buffer_slots);
        entry.buffers = instance
            .buffers
            .iter()
            .map(|b| RewakeRingBufferEntry {
                slot: b.number,
                address: b.address,
                len: b.len,
                tag: (b.tag != 0).then_some(b.tag),
            })
            .collect();
        entry.buffers_of = buffers_of;
        entry.eventfd = eventfd.map(|(id, _)| id);
        entry.eventfd_async = eventfd.and_then(|(_, only_async)| only_async.then_some(true));
        entry.workers = instance.workers.map(Vec::from).unwrap_or_default();
        entry.clock = (instance.clock != libc::CLOCK_MONOTONIC as u32).then_some(instance.clock);
        Ok(())
    }
}

/// Are these buffers what a task has mapped at their addresses?
fn owns(tid: i32, buffers: &[Buffer]) -> bool {
    buffers.iter().all(|buffer| {
        is_mapped(tid, buffer).unwrap_or_else(|why| {
            log::debug!("buffer {} of an io_uring instance: {why}", buffer.number);
            false
        })
    })
}

fn is_mapped(tid: i32, buffer: &Buffer) -> Result<bool, String> {
    const PAGE: u64 = 4096;
    let first = buffer.address / PAGE;
    let count = (buffer.address % PAGE + u64::from(buffer.len)).div_ceil(PAGE);
    let there = rings::frames(tid, first * PAGE, count as usize)?;
    let mut there = there.into_iter();
    // Bytes of the buffer that were looked at.
    let mut done = 0;
    for (page, offset, len) in &buffer.pieces {
        let (page, offset) = (page + u64::from(offset / 4096), u64::from(offset % 4096));
        if offset != (buffer.address + done) % PAGE {
            return Ok(false);
        }
        // A piece that begins within a page begins in one that the piece before it has not.
        for n in 0..(offset + u64::from(*len)).div_ceil(PAGE) {
            if there.next().flatten() != Some(page + n) {
                return Ok(false);
            }
        }
        done += u64::from(*len);
    }
    Ok(done == u64::from(buffer.len))
}
