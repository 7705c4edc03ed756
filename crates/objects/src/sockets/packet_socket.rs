//! Packet sockets: packet(7). Bound to their protocol and interface again, with what they have the interface receive and the
//! group they share packets with, and their rings ([`packet_ring`]); packets that wait elsewhere are dropped with a warning, as on a link that is down.

use super::option_table::When;
use super::options::{self, Making};
use super::{SOCKETS_NETNS, interface_index, packet_ring};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use rewake_image::messages::{
    FdTypes, FileEntry, PacketMclist, PacketRing, PacketSockEntry, RewakeInterfaceEntry,
};
use rewake_sys::sockets::{bind_to, option_int, own_address, set_option};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType};

const LEVEL: i32 = libc::SOL_PACKET;
/// Linux 6.5.
const PACKET_VNET_HDR_SZ: i32 = 24;
/// Where `struct sockaddr_ll` has the protocol, in network order.
const PROTOCOL: usize = 2;
/// The type of packet sockets of old.
const SOCK_PACKET: i32 = 10;
/// `PDI_*`: flags of [`rewake_netlink::diag::Packet`].
const AUXILIARY_DATA: u32 = 0x2;
const ORIGINAL_DEVICE: u32 = 0x4;
const VIRTIO_HEADER: u32 = 0x8;
const LOSS: u32 = 0x10;
/// `PACKET_FANOUT_CBPF` and `PACKET_FANOUT_EBPF`: a program chooses the socket.
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];

/// Surveys a packet socket of type `kind` (`SOCK_*`).
///
/// # Errors
/// It has state that cannot be read back: a program that distributes packets.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
) -> Result<(u32, FdTypes), Problem> {
    let fd = view.as_fd();
    let ino = view.stat.st_ino as u32;
    let record = collector
        .sockets
        .packet(ino)
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?
        .ok_or_else(|| view.problem("sock_diag does not list it"))?;
    if rustix::io::ioctl_fionread(fd).is_ok_and(|waiting| waiting != 0) {
        log::warn!("{}: the packets it has received, and not read, are not saved", view.object());
    }
    let address = own_address(fd).map_err(|e| view.problem(format!("its address: {e}")))?;
    let protocol = match kind {
        // Its address is the name of the interface.
        SOCK_PACKET => record.protocol.to_be(),
        _ => u16::from_ne_bytes([address[PROTOCOL], address[PROTOCOL + 1]]),
    };
    // Besides what sock_diag tells, this has the flags of the group.
    let fanout = match record.fanout {
        Some(_) => Some(
            option_int(fd, LEVEL, libc::PACKET_FANOUT)
                .map_err(|e| view.problem(format!("PACKET_FANOUT cannot be read: {e}")))?
                as u32,
        ),
        None => None,
    };
    if fanout.is_some_and(|group| FANOUT_PROGRAMS.contains(&(group >> 16 & 0xff))) {
        return Err(view.problem(
            "a BPF program distributes its packets (PACKET_FANOUT_CBPF or …_EBPF), which cannot be read back",
        ));
    }
    let flag = |bit| record.flags & bit != 0;
    let entry = PacketSockEntry {
        id: collector.new_id(),
        r#type: kind as u32,
        protocol: protocol.into(),
        flags: view.flags,
        ifindex: record.interface,
        fown: view.owner()?,
        opts: options::survey(view, false)?,
        version: record.version,
        reserve: record.reserve,
        aux_data: flag(AUXILIARY_DATA),
        orig_dev: flag(ORIGINAL_DEVICE),
        vnet_hdr: flag(VIRTIO_HEADER),
        loss: flag(LOSS),
        timestamp: record.timestamp,
        copy_thresh: record.copy_threshold,
        mclist: record
            .memberships
            .iter()
            .flat_map(|m| {
                let one = PacketMclist {
                    index: m.interface,
                    r#type: m.kind.into(),
                    addr: m.address.clone(),
                };
                std::iter::repeat_n(one, m.count.clamp(1, 1024) as usize)
            })
            .collect(),
        fanout,
        rx_ring: record.receive_ring.map(ring),
        tx_ring: record.send_ring.map(ring),
        ns_id: Some(SOCKETS_NETNS),
    };
    if entry.rx_ring.is_some() || entry.tx_ring.is_some() {
        let object = view.object();
        let making = Making { fd, object: &object };
        let rings = [entry.rx_ring.as_ref(), entry.tx_ring.as_ref()];
        let rings = packet_ring::survey(making, entry.version, entry.loss, rings)?;
        collector.extra_of(entry.id).packet_rings = Some(rings);
    }
    let mut numbers: Vec<u32> =
        entry.mclist.iter().map(|m| m.index).chain([entry.ifindex]).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for index in numbers.into_iter().filter(|index| *index != 0) {
        let name = rustix::net::netdevice::index_to_name(fd, index)
            .map_err(|e| view.problem(format!("interface {index}: {e}")))?;
        let interface = RewakeInterfaceEntry { index, name: name.into_bytes() };
        collector.extra_of(entry.id).interfaces.push(interface);
    }
    let id = entry.id;
    collector.push(FileEntry {
        r#type: FdTypes::Packetsk as i32,
        id,
        psk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Packetsk))
}

/// The words of `struct tpacket_req3`.
fn ring(words: [u32; 7]) -> PacketRing {
    let [block_size, block_nr, frame_size, frame_nr, retire_tmo, sizeof_priv, features] = words;
    PacketRing { block_size, block_nr, frame_size, frame_nr, retire_tmo, sizeof_priv, features }
}

/// Binds to a protocol (in network order) and the number of an interface, 0 for all.
fn bind(making: Making<'_>, protocol: u16, interface: u32) -> Result<(), Problem> {
    // struct sockaddr_ll
    let mut address = [0; 20];
    address[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    address[PROTOCOL..PROTOCOL + 2].copy_from_slice(&protocol.to_ne_bytes());
    address[4..8].copy_from_slice(&interface.to_ne_bytes());
    bind_to(making.fd, &address).map_err(|e| making.problem(format!("cannot be bound: {e}")))
}

/// Binds a socket of type `SOCK_PACKET`, whose address is the name of an interface.
fn bind_by_name(making: Making<'_>, interface: u32) -> Result<(), Problem> {
    let name = rustix::net::netdevice::index_to_name(making.fd, interface)
        .map_err(|e| making.problem(format!("interface {interface}: {e}")))?;
    // struct sockaddr
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    let room = &mut address[2..15];
    let length = name.len().min(room.len());
    room[..length].copy_from_slice(&name.as_bytes()[..length]);
    bind_to(making.fd, &address).map_err(|e| making.problem(format!("cannot be bound: {e}")))
}

/// Makes a packet socket of the image.
///
/// # Errors
/// An interface does not exist here, or the kernel refuses an option.
pub(super) fn open(opener: &Opener<'_>, entry: &PacketSockEntry) -> Result<OwnedFd, Problem> {
    let object = describe(entry);
    let problem = |reason: String| Problem::new(object.clone(), reason);
    let old = entry.r#type as i32 == SOCK_PACKET;
    // Of no protocol: nothing is received before it is bound. Where binding cannot tell it, it is told now.
    let protocol = RawProtocol::new(entry.protocol).filter(|_| old).map(Protocol::from_raw);
    let fd = rustix::net::socket_with(
        AddressFamily::PACKET,
        SocketType::from_raw(entry.r#type),
        SocketFlags::CLOEXEC,
        protocol,
    )
    .map_err(|e| problem(format!("cannot be made: {e}")))?;
    let making = Making { fd: fd.as_fd(), object: &object };
    super::apply_own(opener, entry.id, making, When::BeforeBind)?;
    for (name, what, value, new) in [
        (libc::PACKET_VERSION, "PACKET_VERSION", entry.version, 0),
        (libc::PACKET_RESERVE, "PACKET_RESERVE", entry.reserve, 0),
        (libc::PACKET_AUXDATA, "PACKET_AUXDATA", entry.aux_data.into(), 0),
        (libc::PACKET_ORIGDEV, "PACKET_ORIGDEV", entry.orig_dev.into(), 0),
        (libc::PACKET_VNET_HDR, "PACKET_VNET_HDR", entry.vnet_hdr.into(), 0),
        (libc::PACKET_LOSS, "PACKET_LOSS", entry.loss.into(), 0),
        (libc::PACKET_TIMESTAMP, "PACKET_TIMESTAMP", entry.timestamp, 0),
        (libc::PACKET_COPY_THRESH, "PACKET_COPY_THRESH", entry.copy_thresh, 0),
    ] {
        // PACKET_VNET_HDR_SZ may have been set before, and says more than PACKET_VNET_HDR.
        if value != new && option_int(making.fd, LEVEL, name) != Ok(value as i32) {
            making.set(LEVEL, name, what, value as i32)?;
        }
    }
    if entry.rx_ring.is_some() || entry.tx_ring.is_some() {
        let saved = opener.extra.get(&entry.id).and_then(|extra| extra.packet_rings.as_ref());
        let rings = [entry.rx_ring.as_ref(), entry.tx_ring.as_ref()];
        let virtio = match option_int(making.fd, LEVEL, PACKET_VNET_HDR_SZ) {
            Ok(size) => size as usize,
            // Before Linux 6.5 it is of one size.
            Err(_) if entry.vnet_hdr => 10,
            Err(_) => 0,
        };
        packet_ring::restore(making, entry.version, virtio, rings, saved)?;
    }
    options::apply_before_bind(making, &entry.opts, false)?;
    options::apply(making, &entry.opts)?;
    let interface = |index: u32| match index {
        0 => Ok(0),
        index => here(opener, entry.id, making, index),
    };
    match interface(entry.ifindex)? {
        0 if old => {}
        index if old => bind_by_name(making, index)?,
        index => bind(making, entry.protocol as u16, index)?,
    }
    for member in &entry.mclist {
        // struct packet_mreq, whose address may be longer than eight bytes.
        let mut request = interface(member.index)?.to_ne_bytes().to_vec();
        request.extend((member.r#type as u16).to_ne_bytes());
        request.extend((member.addr.len() as u16).to_ne_bytes());
        request.extend(&member.addr);
        request.resize(request.len().max(16), 0);
        set_option(making.fd, LEVEL, libc::PACKET_ADD_MEMBERSHIP, &request)
            .map_err(|e| making.problem(format!("PACKET_ADD_MEMBERSHIP: {e}")))?;
    }
    if let Some(group) = entry.fanout.filter(|group| *group != u32::MAX) {
        making.set(LEVEL, libc::PACKET_FANOUT, "PACKET_FANOUT", group as i32)?;
    }
    Ok(fd)
}

/// The number here of an interface of the image: the one of its name, if that is known.
fn here(opener: &Opener<'_>, id: u32, making: Making<'_>, index: u32) -> Result<u32, Problem> {
    let known = opener.extra.get(&id).and_then(|e| e.interfaces.iter().find(|i| i.index == index));
    match known {
        Some(interface) => interface_index(making.fd, &interface.name),
        None => rustix::net::netdevice::index_to_name(making.fd, index)
            .map(|_| index)
            .map_err(|e| format!("network interface {index}: {e}")),
    }
    .map_err(|e| {
        making
            .problem(format!("it was bound to a missing {e}"))
            .remedy("create the interface, or restore in a network namespace that has it")
    })
}

/// How error texts call a socket of the image.
pub(super) fn describe(entry: &PacketSockEntry) -> String {
    format!("packet socket (protocol {:#06x})", u16::from_be(entry.protocol as u16))
}
