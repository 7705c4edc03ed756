//! What no call tells of internet sockets, of those of a dump: [`crate::iterators::hidden`].

use super::option_table::SocketOption;
use crate::Problem;
use crate::files::collect::View;
use crate::iterators::hidden;
use rewake_image::messages::RewakeSocketOptionEntry;
use rewake_sys::sockets::{option, set_option};
use rustix::fd::{AsFd, AsRawFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::collections::HashMap;

/// What the kernel has told of sockets, by thread and number of the descriptor.
#[derive(Debug, Default)]
pub(super) struct Hidden {
    told: HashMap<i32, HashMap<i32, hidden::Hidden>>,
    /// Why it does not tell.
    silent: Option<String>,
}

/// A thread of ours or of a task, and a descriptor that it has.
fn place(view: &View<'_>) -> (i32, i32) {
    if view.pid == std::process::id() as i32 {
        (own(), view.fd.as_raw_fd())
    } else {
        (view.tid, view.number)
    }
}

fn own() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

impl Hidden {
    /// What the kernel tells of a socket, or why it does not.
    pub(super) fn of(&mut self, view: &View<'_>) -> Result<hidden::Hidden, String> {
        if let Some(why) = &self.silent {
            return Err(why.clone());
        }
        let (tid, fd) = place(view);
        // What is in flight we have now, and not later.
        if tid == own() || !self.told.contains_key(&tid) {
            let told = hidden::of(tid).inspect_err(|why| self.silent = Some(why.clone()))?;
            self.told.insert(tid, told);
        }
        self.told[&tid].get(&fd).copied().ok_or_else(|| "it was not told of".to_owned())
    }
}

/// Adds the network interface that `IP_MULTICAST_IF` (`row`) was given, unless that is the one that has the address.
pub(super) fn add_interface(
    hidden: &mut Hidden,
    view: &View<'_>,
    row: &SocketOption,
    found: &mut Vec<RewakeSocketOptionEntry>,
) -> Result<(), Problem> {
    let interface = match hidden.of(view) {
        Ok(told) => told.interface,
        Err(why) => {
            log::debug!("{}: its interface for multicast is not known: {why}", view.object());
            return Ok(());
        }
    };
    let (address, _) = option::<4>(view.as_fd(), row.level, row.number)
        .map_err(|e| view.problem(format!("{} cannot be read: {e}", row.name)))?;
    if interface == 0 || address != [0; 4] && of_address(row, address) == Some(interface) {
        return Ok(());
    }
    let name = match rustix::net::netdevice::index_to_name(view.as_fd(), interface) {
        Ok(name) => name,
        Err(e) => {
            let object = view.object();
            log::warn!("{object}: {} is not kept, its interface {interface}: {e}", row.name);
            return Ok(());
        }
    };
    let key = (row.level as u32, row.number as u32);
    found.retain(|option| (option.level, option.number) != key);
    found.push(RewakeSocketOptionEntry {
        level: key.0,
        number: key.1,
        value: address.to_vec(),
        interface: Some(name.into_bytes()),
    });
    Ok(())
}

/// The interface that a socket gets with an address alone.
fn of_address(row: &SocketOption, address: [u8; 4]) -> Option<u32> {
    let family = AddressFamily::INET;
    let fd =
        rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    set_option(fd.as_fd(), row.level, row.number, &address).ok()?;
    Some(hidden::of(own()).ok()?.get(&fd.as_raw_fd())?.interface)
}
