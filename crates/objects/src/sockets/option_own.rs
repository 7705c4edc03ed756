//! Socket options that CRIU's format has no place for: those of a socket that differ from what a new one has, in
//! `rewake.img`.
//!
//! A new socket of the same family, type and protocol is made and read once for all that are saved.

use super::option_table::{Kinds, OPTIONS, Place, Shape, SocketOption, When};
use super::options::Making;
use super::reading::Reading;
use super::{Survey, hidden, interface_index};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::problem::text;
use rewake_image::messages::RewakeSocketOptionEntry;
use rewake_sys::SyscallError;
use rewake_sys::sockets::{option, set_option};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::{AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType};
use std::sync::Arc;

/// The largest value: an extension header of IPv6.
const ROOM: usize = 2048;

/// An option, and what a new socket has; nothing if that is not known.
pub(super) type Usual = (&'static SocketOption, Option<Vec<u8>>);

/// What is usual for sockets of a family, type and protocol.
pub(super) type Usuals = std::collections::HashMap<(i32, i32, i32), Arc<[Usual]>>;

fn read(fd: BorrowedFd<'_>, row: &SocketOption) -> Result<Vec<u8>, SyscallError> {
    match row.shape {
        Shape::Bytes => {
            option::<ROOM>(fd, row.level, row.number).map(|(value, len)| value[..len].to_vec())
        }
        _ => option::<4>(fd, row.level, row.number).map(|(value, len)| value[..len].to_vec()),
    }
}

impl Survey {
    /// What is usual for such a socket.
    pub(super) fn usual(&mut self, family: i32, kind: i32, protocol: i32) -> Arc<[Usual]> {
        let usual = self.usuals.entry((family, kind, protocol)).or_insert_with(|| {
            let kinds = Kinds::of(family, kind, protocol);
            let own = OPTIONS
                .iter()
                .filter(|row| row.kinds.any(kinds) && matches!(row.place, Place::Own));
            let new = rustix::net::socket_with(
                AddressFamily::from_raw(family as u16),
                SocketType::from_raw(kind as u32),
                SocketFlags::CLOEXEC,
                RawProtocol::new(protocol as u32).map(Protocol::from_raw),
            );
            match new {
                // What it does not have, this kernel does not.
                Ok(new) => {
                    own.filter_map(|row| Some((row, Some(read(new.as_fd(), row).ok()?)))).collect()
                }
                Err(_) => own.map(|row| (row, None)).collect(),
            }
        });
        Arc::clone(usual)
    }
}

/// Adds to the extra state of file `id` the options that are not as usual.
///
/// # Errors
/// An option cannot be read.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    id: u32,
    (family, kind, protocol): (i32, i32, i32),
) -> Result<(), Problem> {
    let object = view.object();
    let usual = collector.sockets.usual(family, kind, protocol);
    let mut found = unusual(Making { fd: view.as_fd(), object: &object }.into(), &usual)?;
    if let Some((row, _)) = usual.iter().find(|(row, _)| row.shape == Shape::Multicast) {
        hidden::add_interface(&mut collector.sockets.hidden, view, row, &mut found)?;
    }
    if !found.is_empty() {
        collector.extra_of(id).socket_options = found;
    }
    Ok(())
}

/// The options of a socket that are not as usual.
///
/// # Errors
/// An option cannot be read.
pub(super) fn unusual(
    reading: Reading<'_>,
    usual: &[Usual],
) -> Result<Vec<RewakeSocketOptionEntry>, Problem> {
    let socket = reading.socket;
    let fd = socket.fd;
    let mut found = Vec::new();
    for (row, usual) in usual {
        let as_usual = |value: &[u8]| usual.as_deref() == Some(value);
        if reading.connected && row.unconnected
            || usual.as_ref().is_some_and(|v| reading.is_known(row.level, row.number, v))
        {
            continue;
        }
        let value = match row.shape {
            // Nothing is kept of those that are as usual, which nearly all are.
            Shape::Int | Shape::Interface | Shape::NetworkInterface | Shape::Multicast => {
                option::<4>(fd, row.level, row.number)
                    .map(|(value, len)| (!as_usual(&value[..len])).then(|| value[..len].to_vec()))
            }
            Shape::Bytes => read(fd, row).map(|value| Some(value).filter(|v| !as_usual(v))),
        };
        let value = match (value, usual) {
            (Ok(Some(value)), _) => value,
            (Ok(None), _) | (Err(_), None) => continue,
            (Err(e), Some(_)) => {
                return Err(socket.problem(format!("{} cannot be read: {e}", row.name)));
            }
        };
        if row.programs.is_none_or(|decide| decide(reading, &value)) {
            found.push(entry(socket, row, value)?);
        }
    }
    Ok(found)
}

fn entry(
    socket: Making<'_>,
    row: &SocketOption,
    value: Vec<u8>,
) -> Result<RewakeSocketOptionEntry, Problem> {
    let index = match (row.shape, value.first_chunk()) {
        (Shape::Interface, Some(value)) => u32::from_ne_bytes(*value),
        (Shape::NetworkInterface, Some(value)) => u32::from_be_bytes(*value),
        _ => 0,
    };
    let interface = match index {
        0 => None,
        index => Some(
            rustix::net::netdevice::index_to_name(socket.fd, index)
                .map_err(|e| socket.problem(format!("{}: interface {index}: {e}", row.name)))?
                .into_bytes(),
        ),
    };
    Ok(RewakeSocketOptionEntry {
        level: row.level as u32,
        number: row.number as u32,
        value: if interface.is_some() { Vec::new() } else { value },
        interface,
    })
}

/// Sets those of a phase.
///
/// # Errors
/// The kernel refuses one, or an interface does not exist.
pub(super) fn apply(
    making: Making<'_>,
    options: &[RewakeSocketOptionEntry],
    kinds: Kinds,
    when: When,
) -> Result<(), Problem> {
    if options.is_empty() {
        return Ok(());
    }
    let rows = OPTIONS
        .iter()
        .filter(|row| row.when == when && row.kinds.any(kinds) && matches!(row.place, Place::Own));
    for row in rows {
        let key = (row.level as u32, row.number as u32);
        let Some(option) = options.iter().find(|o| (o.level, o.number) == key) else { continue };
        let (value, shown) = match &option.interface {
            None => (option.value.clone(), show(&option.value)),
            Some(name) => {
                let index = interface_index(making.fd, name)
                    .map_err(|e| making.problem(format!("{}: {e}", row.name)))?;
                let value = match row.shape {
                    Shape::NetworkInterface => index.to_be_bytes().to_vec(),
                    // A `struct ip_mreqn`.
                    Shape::Multicast => {
                        let address = option.value.first_chunk().copied().unwrap_or_default();
                        [[0; 4], address, index.to_ne_bytes()].concat()
                    }
                    _ => index.to_ne_bytes().to_vec(),
                };
                (value, text(name))
            }
        };
        let set = set_option(making.fd, row.level, row.number, &value);
        making.settled(row.name, shown, set)?;
    }
    Ok(())
}

/// A value for people.
fn show(value: &[u8]) -> String {
    match value.try_into() {
        Ok(int) => i32::from_ne_bytes(int).to_string(),
        Err(_) => value.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}
