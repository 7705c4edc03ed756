//! Netlink sockets: netlink(7). They hold no connection: bound to their address and groups again, they are what they were,
//! but for messages that waited. Nobody but the kernel can send in its name, so they cannot be given back: news of groups is
//! dropped with a warning, since programs have to cope with losing some (`ENOBUFS`); an answer that the program has asked for,
//! and would wait for in vain, makes the dump refuse.

use super::options::{self, Making};
use super::{SOCKETS_NETNS, holder};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use rewake_image::messages::{FdTypes, FileEntry, NetlinkSkEntry};
use rewake_sys::sockets::option;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType};

const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// Room for the bitmap of a protocol's groups, in bytes.
const BITMAP: usize = 512;
/// `NETLINK_UNCONNECTED`, which the format has for bound sockets.
const UNCONNECTED: u32 = 0;
const ESTABLISHED: u32 = 1;
const CLOSE: u32 = 7;

/// Surveys a netlink socket.
///
/// # Errors
/// It has received an answer, or its state cannot be read.
pub fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
    protocol: i32,
) -> Result<(u32, FdTypes), Problem> {
    let fd = view.as_fd();
    let name = protocol_name(protocol);
    let refused = |reason: String| view.problem(format!("netlink socket ({name}): {reason}"));
    let failed = |e: Errno| refused(format!("its address cannot be read: {e}"));
    if !matches!(kind, libc::SOCK_RAW | libc::SOCK_DGRAM) {
        return Err(refused(format!("type {kind} cannot be saved")));
    }
    let own = rustix::net::getsockname(fd).map_err(failed)?;
    let own = SocketAddrNetlink::try_from(own).map_err(failed)?;
    let peer = rustix::net::getpeername(fd).map_err(failed)?;
    let peer = peer.map(SocketAddrNetlink::try_from).transpose().map_err(failed)?;
    let (peer_port, peer_groups) = peer.map_or((0, 0), |p| (p.pid(), p.groups()));
    match waiting(view).map_err(|e| refused(format!("its queue cannot be read: {e}")))? {
        None => {}
        Some(Waiting::News) => log::warn!(
            "{}: netlink socket ({name}): the news it has received of its groups, and not read, is not saved",
            view.object()
        ),
        Some(Waiting::Answer) if collector.options.skip_in_flight => log::warn!(
            "{}: netlink socket ({name}): the messages it has received, and not read, are not saved",
            view.object()
        ),
        Some(Waiting::Answer) => {
            return Err(refused(
                "it has received an answer to a request of its own, which cannot be saved"
                    .to_owned(),
            )
            .remedy("try again once the program has read it; --skip-in-flight drops it"));
        }
    }
    // Groups beyond the 32 that an address has room for; a bitmap.
    let (bitmap, length) = option::<BITMAP>(fd, libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS)
        .map_err(|e| refused(format!("its groups cannot be read: {e}")))?;
    if length > BITMAP {
        return Err(refused("its protocol has too many groups".to_owned()));
    }
    let hears = |group: &u32| {
        let bit = group - 1;
        bitmap[bit as usize / 8] >> (bit % 8) & 1 != 0
    };
    let far: Vec<u32> = (33..=length as u32 * 8).filter(hears).collect();
    let connected = peer_port != 0 || peer_groups != 0;
    let entry = NetlinkSkEntry {
        id: collector.new_id(),
        ino: view.stat.st_ino as u32,
        protocol: protocol as u32,
        state: if connected {
            ESTABLISHED
        } else if own.pid() != 0 {
            UNCONNECTED
        } else {
            CLOSE
        },
        flags: view.flags,
        portid: own.pid(),
        groups: if own.groups() == 0 { Vec::new() } else { vec![own.groups()] },
        dst_portid: peer_port,
        // The kernel tells a bitmap with one bit; the format has the number of the group.
        dst_group: if peer_groups == 0 { 0 } else { peer_groups.trailing_zeros() + 1 },
        fown: view.owner()?,
        opts: options::survey(view, true)?,
        ns_id: Some(SOCKETS_NETNS),
    };
    let id = entry.id;
    if !far.is_empty() {
        collector.extra_of(id).netlink_groups = far;
    }
    if kind != libc::SOCK_RAW {
        collector.extra_of(id).netlink_type = Some(kind as u32);
    }
    collector.push(FileEntry {
        r#type: FdTypes::Netlinksk as i32,
        id,
        nlsk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Netlinksk))
}

/// What the first message that waits is.
enum Waiting {
    /// What happened, told to all who hear a group.
    News,
    /// For this socket alone.
    Answer,
}

/// What waits first; others cannot be seen without taking it out. None if nothing does.
fn waiting(view: &View<'_>) -> Result<Option<Waiting>, Errno> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::RecvFlags;
    let mut wanted = [PollFd::from_borrowed_fd(view.as_fd(), PollFlags::IN)];
    poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    let ready = wanted[0].revents();
    if ready.contains(PollFlags::ERR) {
        // News was lost. A look at the queue would take away the error that tells the program so.
        return Ok(Some(Waiting::News));
    }
    if !ready.contains(PollFlags::IN) {
        return Ok(None);
    }
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let fd = view.as_fd();
    let (_, _, from) = match rustix::net::recvfrom(fd, &mut [0; 16][..], flags) {
        Ok(message) => message,
        Err(Errno::AGAIN) => return Ok(None),
        Err(e) => return Err(e),
    };
    let groups =
        from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).map_or(0, |a| a.groups());
    Ok(Some(if groups == 0 { Waiting::Answer } else { Waiting::News }))
}

/// Makes a netlink socket of the image.
///
/// # Errors
/// Its address is in use, or the kernel lacks its protocol.
pub fn open(opener: &Opener<'_>, entry: &NetlinkSkEntry) -> Result<OwnedFd, Problem> {
    let object = describe(entry);
    let failed =
        |what: &str, e: Errno| Problem::new(object.clone(), format!("cannot be {what}: {e}"));
    let extra = opener.extra.get(&entry.id);
    let kind = extra.and_then(|extra| extra.netlink_type).unwrap_or(libc::SOCK_RAW as u32);
    let fd = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::from_raw(kind),
        SocketFlags::CLOEXEC,
        RawProtocol::new(entry.protocol).map(Protocol::from_raw),
    )
    .map_err(|e| failed("made", e))?;
    let making = Making { fd: fd.as_fd(), object: &object };
    let groups = entry.groups.first().copied().unwrap_or(0);
    if entry.portid != 0 || groups != 0 {
        rustix::net::bind(&fd, &SocketAddrNetlink::new(entry.portid, groups)).map_err(|e| {
            let holder = (e == Errno::ADDRINUSE).then(|| held_by(entry)).flatten();
            match holder {
                Some(holder) => making
                    .problem(format!("its address {} is in use by {holder}", entry.portid))
                    .remedy("end that process, or restore in another network namespace"),
                None => failed(&format!("bound to address {}", entry.portid), e),
            }
        })?;
    }
    for group in extra.iter().flat_map(|extra| &extra.netlink_groups) {
        making.set(
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            "NETLINK_ADD_MEMBERSHIP",
            *group as i32,
        )?;
    }
    if entry.dst_portid != 0 || entry.dst_group != 0 {
        let groups = match entry.dst_group {
            0 => 0,
            group => 1u32.checked_shl(group - 1).unwrap_or(0),
        };
        rustix::net::connect(&fd, &SocketAddrNetlink::new(entry.dst_portid, groups))
            .map_err(|e| failed("connected", e))?;
    }
    options::apply_before_bind(making, &entry.opts, false)?;
    options::apply(making, &entry.opts)?;
    Ok(fd)
}

/// The process that has the address of a socket of the image, as text.
fn held_by(entry: &NetlinkSkEntry) -> Option<String> {
    let table = std::fs::read_to_string("/proc/thread-self/net/netlink").ok()?;
    let inodes = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let same = words.get(1)?.parse() == Ok(entry.protocol)
            && words.get(2)?.parse() == Ok(entry.portid);
        same.then(|| words.get(9)?.parse().ok())?
    });
    holder::of_inodes(&inodes.collect())
}

/// How error texts call a socket of the image.
pub(super) fn describe(entry: &NetlinkSkEntry) -> String {
    format!("netlink socket ({})", protocol_name(entry.protocol as i32))
}

fn protocol_name(protocol: i32) -> String {
    match protocol {
        libc::NETLINK_ROUTE => "route".to_owned(),
        libc::NETLINK_SOCK_DIAG => "sock_diag".to_owned(),
        libc::NETLINK_AUDIT => "audit".to_owned(),
        libc::NETLINK_NETFILTER => "netfilter".to_owned(),
        libc::NETLINK_KOBJECT_UEVENT => "kobject_uevent".to_owned(),
        libc::NETLINK_GENERIC => "generic".to_owned(),
        libc::NETLINK_CONNECTOR => "connector".to_owned(),
        other => format!("protocol {other}"),
    }
}
