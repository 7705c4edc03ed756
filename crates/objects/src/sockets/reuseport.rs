//! Groups of sockets that share a port (`SO_REUSEPORT`), and the BPF programs that decide which member gets what arrives.
//!
//! Such a program tells a member by its place in the group, and where there is none what comes from one sender always goes to the
//! same place. So the members are made in the order in which they were in the group. The program belongs to the group, and is attached by one
//! of them when all are there.

use super::inet;
use super::options::Making;
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::{external, open::Opener};
use crate::iterators::hidden::{Decider, members, program};
use rewake_image::messages::{InetSkEntry, RewakeFileEntry, RewakeReuseportEntry};
use rewake_sys::sockets::attach_reuseport_filter;
use std::collections::HashMap;

/// The groups of a tree, by the kernel's addresses of them: number and members.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<u64, (u32, Vec<u64>)>);

/// Surveys the group of an internet socket that is no TCP connection, and has its entry but for the id.
///
/// # Errors
/// It has a program that cannot be saved.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &InetSkEntry,
) -> Result<(), Problem> {
    let datagrams = matches!(entry.proto as i32, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
    let shares = entry.opts.so_reuseport == Some(true);
    if entry.r#type as i32 == libc::SOCK_RAW || !(datagrams || shares) {
        return Ok(());
    }
    let told = match collector.sockets.hidden.of(view) {
        Ok(told) => told,
        Err(why) => {
            if shares {
                log::warn!(
                    "{} ({}): if a BPF program decides which socket of its SO_REUSEPORT group gets what arrives, it is lost: {why}",
                    view.object(),
                    inet::describe(entry),
                );
            }
            return Ok(());
        }
    };
    let Some(group) = told.group else { return Ok(()) };
    let failed = |why: String| view.problem(format!("its SO_REUSEPORT group: {why}"));
    let groups = &mut collector.sockets.groups_of_ports.0;
    let next = groups.len() as u32 + 1;
    let (number, all) = match groups.entry(group.address) {
        std::collections::hash_map::Entry::Occupied(group) => group.into_mut(),
        std::collections::hash_map::Entry::Vacant(place) => {
            place.insert((next, members(&group).map_err(failed)?))
        }
    };
    let number = *number;
    let Some(index) = all.iter().position(|member| *member == told.address) else {
        return Err(failed("it is not a member of that".to_owned()));
    };
    let program = match group.decider {
        None => Vec::new(),
        // Another member has it.
        Some(_) if number != next => Vec::new(),
        Some(Decider::Classic(at, len)) => program(at, len).map_err(failed)?,
        Some(Decider::Extended) => return Err(extended(view, entry)),
    };
    let extra = collector.extra_of(entry.id);
    extra.reuseport = Some(RewakeReuseportEntry { group: number, index: index as u32, program });
    Ok(())
}

fn extended(view: &View<'_>, entry: &InetSkEntry) -> Problem {
    view.problem(format!(
        "{}: an eBPF program decides which socket of its SO_REUSEPORT group gets what arrives (SO_ATTACH_REUSEPORT_EBPF), which cannot be saved",
        inet::describe(entry)
    ))
    .remedy("have the program detach it for the time of the dump (SO_DETACH_REUSEPORT_BPF), or attach a classic one (SO_ATTACH_REUSEPORT_CBPF)")
}

/// The files that are to be opened before, or with, file `id`: all members of its group in their order, if it is in one
/// that has not been made yet.
pub(crate) fn with(opener: &mut Opener<'_>, id: u32) -> Vec<u32> {
    let Some(own) = opener.extra.get(&id).and_then(|extra| extra.reuseport.as_ref()) else {
        return Vec::new();
    };
    let group = own.group;
    if !opener.sockets.port_groups.insert(group) {
        return Vec::new();
    }
    let mut members = group_of(opener, group);
    members.sort_unstable();
    members.into_iter().map(|(_, id)| id).collect()
}

/// Index and file id of those members of a group that are made.
fn group_of(opener: &Opener<'_>, group: u32) -> Vec<(u32, u32)> {
    let of_group = |(id, extra): (&u32, &RewakeFileEntry)| {
        let own = extra.reuseport.as_ref().filter(|own| own.group == group)?;
        let file = opener.files.get(id).filter(|file| file.isk.is_some())?;
        (!external::replaces(opener, file)).then_some((own.index, *id))
    };
    opener.extra.iter().filter_map(of_group).collect()
}

/// Attaches the program of a group, whose members are open, if it had one.
///
/// # Errors
/// The kernel refuses it.
pub(crate) fn attach(opener: &Opener<'_>, members: &[u32]) -> Result<(), Problem> {
    let place = |id: &u32| opener.extra.get(id).and_then(|extra| extra.reuseport.as_ref());
    let Some((first, group)) = members.first().and_then(|id| Some((*id, place(id)?.group))) else {
        return Ok(());
    };
    // Who has it may have been replaced.
    let all = opener.extra.values().filter_map(|extra| extra.reuseport.as_ref());
    let Some(with) = all.into_iter().find(|p| p.group == group && !p.program.is_empty()) else {
        return Ok(());
    };
    let object = opener.entry(first)?.isk.as_deref().map_or_else(String::new, inet::describe);
    let making = Making { fd: opener.opened(first)?, object: &object };
    attach_reuseport_filter(making.fd, &with.program).map_err(|e| {
        making.problem(format!("the BPF program of its SO_REUSEPORT group cannot be attached: {e}"))
    })
}
