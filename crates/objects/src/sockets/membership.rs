//! Multicast groups that a socket has joined: ip(7), ipv6(7).
//!
//! No interface lists them for a socket. But a socket can be asked for its filter of any one group on any one interface
//! (`MCAST_MSFILTER`, RFC 3678), and has none if it has not joined it; and /proc/net/igmp and igmp6 list all groups that
//! somebody has joined.

use super::options::Making;
use super::{Survey, interface_index};
use crate::Problem;
use crate::files::collect::View;
use crate::problem::text;
use rewake_image::messages::RewakeMembershipEntry;
use rewake_proc::net::{self, Group};
use rewake_sys::Errno;
use rewake_sys::sockets::{ask_option, set_option};
use std::net::IpAddr;

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;
/// `MCAST_EXCLUDE`: everybody but those listed.
const EXCLUDE: u32 = 0;
/// `struct sockaddr_storage`
const STORAGE: usize = 128;
/// Where `struct group_filter` has the group, the mode, the number of sources, the sources.
const GROUP: usize = 8;
const MODE: usize = GROUP + STORAGE;
const COUNT: usize = MODE + 4;
const SOURCES: usize = COUNT + 4;

impl Survey {
    /// All groups that somebody in the network namespace has joined.
    fn groups(&mut self) -> Result<&[Group], Problem> {
        if self.groups.is_none() {
            let mut groups = Vec::new();
            type Parse = fn(&[u8]) -> Result<Vec<Group>, rewake_proc::ParseError>;
            for (name, parse) in [("igmp", net::igmp as Parse), ("igmp6", net::igmp6)] {
                let path = format!("/proc/thread-self/net/{name}");
                let failed = |e: &dyn std::fmt::Display| Problem::new(path.as_str(), e.to_string());
                match std::fs::read(&path) {
                    Ok(content) => groups.extend(parse(&content).map_err(|e| failed(&e))?),
                    // A kernel without the protocol, or without multicast.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(failed(&e)),
                }
            }
            self.groups = Some(groups);
        }
        Ok(self.groups.as_deref().unwrap_or_default())
    }
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// A `struct sockaddr_storage` of port 0.
fn storage(ip: IpAddr) -> [u8; STORAGE] {
    let mut storage = [0; STORAGE];
    match ip {
        IpAddr::V4(ip) => {
            storage[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            storage[4..8].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            storage[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            storage[8..24].copy_from_slice(&ip.octets());
        }
    }
    storage
}

/// The address in a `struct sockaddr_storage`, four or sixteen bytes as `like` has.
fn octets(storage: &[u8], like: IpAddr) -> Vec<u8> {
    let range = if like.is_ipv4() { 4..8 } else { 8..24 };
    storage.get(range).unwrap_or_default().to_vec()
}

/// The groups that an internet socket of `family` has joined.
///
/// # Errors
/// They cannot be read.
pub(super) fn survey(
    sockets: &mut Survey,
    view: &View<'_>,
    family: i32,
) -> Result<Vec<RewakeMembershipEntry>, Problem> {
    let mut joined = Vec::new();
    // A socket of IPv6 may have joined groups of IPv4 too.
    let v6 = family == libc::AF_INET6;
    for group in sockets.groups()?.iter().filter(|group| v6 || group.address.is_ipv4()) {
        let Some((exclude, sources)) = filter(view, *group)? else { continue };
        let name = rustix::net::netdevice::index_to_name(view.as_fd(), group.interface)
            .map_err(|e| view.problem(format!("interface {}: {e}", group.interface)))?;
        joined.push(RewakeMembershipEntry {
            interface: name.into_bytes(),
            group: match group.address {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            },
            exclude,
            sources,
        });
    }
    Ok(joined)
}

/// Which senders a socket hears: whether all but those listed, and the list.
type Filter = (bool, Vec<Vec<u8>>);

/// Whom a socket hears in a group; nothing if it has not joined.
fn filter(view: &View<'_>, group: Group) -> Result<Option<Filter>, Problem> {
    let mut room = 16usize;
    loop {
        let mut value = vec![0; SOURCES + room * STORAGE];
        value[..4].copy_from_slice(&group.interface.to_ne_bytes());
        value[GROUP..MODE].copy_from_slice(&storage(group.address));
        value[COUNT..SOURCES].copy_from_slice(&(room as u32).to_ne_bytes());
        match ask_option(view.as_fd(), level(group.address), MCAST_MSFILTER, &mut value) {
            Ok(_) => {}
            // The latter: a socket that has no options of IPv4.
            Err(e) if matches!(e.errno, Errno::ADDRNOTAVAIL | Errno::NOPROTOOPT) => {
                return Ok(None);
            }
            Err(e) => {
                return Err(view.problem(format!(
                    "whether it has joined {} cannot be read: {e}",
                    group.address
                )));
            }
        }
        let word = |at: usize| {
            u32::from_ne_bytes([value[at], value[at + 1], value[at + 2], value[at + 3]])
        };
        let count = word(COUNT) as usize;
        if count <= room {
            let sources = value[SOURCES..].chunks(STORAGE).take(count);
            let sources = sources.map(|s| octets(s, group.address)).collect();
            return Ok(Some((word(MODE) == EXCLUDE, sources)));
        }
        room = count;
    }
}

/// Joins the groups of the image.
///
/// # Errors
/// An interface does not exist, or the kernel refuses a group.
pub(super) fn join(making: Making<'_>, joined: &[RewakeMembershipEntry]) -> Result<(), Problem> {
    for entry in joined {
        let damaged = || making.problem("the image has no valid multicast group");
        let group = address(&entry.group).ok_or_else(damaged)?;
        let index = interface_index(making.fd, &entry.interface).map_err(|e| {
            making
                .problem(format!("it had joined the multicast group {group} on a missing {e}"))
                .remedy("create the interface, or restore in a network namespace that has it")
        })?;
        let mut request = index.to_ne_bytes().to_vec();
        request.resize(GROUP, 0);
        request.extend(storage(group));
        let set = |option, value: &[u8]| {
            set_option(making.fd, level(group), option, value).map_err(|e| {
                making.problem(format!(
                    "the multicast group {group} cannot be joined on {}: {e}",
                    text(&entry.interface)
                ))
            })
        };
        if entry.exclude {
            set(MCAST_JOIN_GROUP, &request)?;
        }
        let one = if entry.exclude { MCAST_BLOCK_SOURCE } else { MCAST_JOIN_SOURCE_GROUP };
        for source in &entry.sources {
            let source = address(source).filter(|s| s.is_ipv4() == group.is_ipv4());
            let mut request = request.clone();
            request.extend(storage(source.ok_or_else(damaged)?));
            set(one, &request)?;
        }
    }
    Ok(())
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(octets).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?)),
        _ => None,
    }
}
