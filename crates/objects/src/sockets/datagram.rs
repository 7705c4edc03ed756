//! What waits in the receive queue of a UDP socket: looked at with `MSG_PEEK`, which takes nothing out; put back by sending
//! it to ourselves in the name of whoever sent it, through a raw socket (raw(7)) on the loopback.
//!
//! The program gets the same bytes from the same addresses in the same order; times, hop limits and the like are new ones.
//! A datagram is dropped with a warning, as networks may, where it could reach somebody else or could not arrive: if another
//! socket shares the port, if the socket is bound to a device, if an address is of multicast or of one link only.

use super::options::{self, Making};
use crate::Problem;
use crate::files::collect::View;
use rewake_image::messages::{InetSkEntry, RewakeDatagramEntry};
use rewake_netlink::diag;
use rewake_sys::SyscallError;
use rewake_sys::sockets::{self, option_int, set_option_int};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RawProtocol, SendFlags, SocketFlags, SocketType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const SO_PEEK_OFF: i32 = 42;
const UDP_HEADER: usize = 8;
const HOPS: u8 = 64;

/// The datagrams in the receive queue, without those that could not be given back.
///
/// # Errors
/// The queue cannot be read.
pub(super) fn read(view: &View<'_>) -> Result<Vec<RewakeDatagramEntry>, Problem> {
    let fd = view.as_fd();
    if !readable(fd) {
        return Ok(Vec::new());
    }
    let failed = |e: SyscallError| view.problem(format!("its receive queue cannot be read: {e}"));
    // From here on every look goes on where the last one ended.
    let before = option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF).map_err(failed)?;
    set_option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, 0).map_err(failed)?;
    let read = read_on(fd).map_err(failed);
    set_option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, before).map_err(failed)?;
    let (datagrams, left_out) = read?;
    if left_out != 0 {
        log::warn!(
            "{}: {left_out} datagrams that it has received are not saved, for they could not be given back",
            view.object()
        );
    }
    Ok(datagrams)
}

fn read_on(fd: BorrowedFd<'_>) -> Result<(Vec<RewakeDatagramEntry>, usize), SyscallError> {
    // No datagram is longer.
    let mut data = vec![0; 1 << 16];
    let mut control = [0; 512];
    let (mut datagrams, mut left_out) = (Vec::new(), 0);
    loop {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let received = match sockets::receive(fd, &mut data, &mut control, flags) {
            Ok(received) => received,
            Err(e) if e.errno == Errno::AGAIN => return Ok((datagrams, left_out)),
            Err(e) => return Err(e),
        };
        match received.source {
            Some(source) if can_be_given_back(source.ip()) => {
                datagrams.push(RewakeDatagramEntry {
                    data: data[..received.data].to_vec(),
                    source: octets(source.ip().to_canonical()),
                    source_port: source.port().into(),
                    destination: destination(&control[..received.control]).map(octets),
                });
            }
            // The end of a socket that is shut down has no sender.
            None if received.data == 0 => return Ok((datagrams, left_out)),
            _ => left_out += 1,
        }
    }
}

/// Whether a datagram waits.
fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut wanted, Some(&at_once)).is_ok() && wanted[0].revents().contains(PollFlags::IN)
}

/// Addresses that mean the same on the loopback.
fn can_be_given_back(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => !ip.is_multicast() && !ip.is_broadcast(),
        IpAddr::V6(ip) => !ip.is_multicast() && !ip.is_unicast_link_local(),
    }
}

/// The address it was sent to, if the program has it told.
fn destination(control: &[u8]) -> Option<IpAddr> {
    sockets::control_messages(control).find_map(|message| match message {
        // struct in_pktinfo: interface, local address, address of the header.
        (libc::IPPROTO_IP, libc::IP_PKTINFO, info) => {
            Some(Ipv4Addr::from(*info.get(8..)?.first_chunk::<4>()?).into())
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info) => {
            Some(Ipv6Addr::from(*info.first_chunk::<16>()?).to_canonical())
        }
        _ => None,
    })
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(octets).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?).to_canonical()),
        _ => None,
    }
}

/// Gives a bound socket, not connected yet, what it had received. What cannot be given back is dropped with a warning.
///
/// # Errors
/// The receive buffer cannot be made large enough.
pub(super) fn give_back(
    making: Making<'_>,
    entry: &InetSkEntry,
    bound: SocketAddr,
    datagrams: &[RewakeDatagramEntry],
) -> Result<(), Problem> {
    if datagrams.is_empty() {
        return Ok(());
    }
    let dropped = |count: usize, why: &str| {
        log::warn!("{}: {count} datagrams that it had received are dropped: {why}", making.object);
        Ok(())
    };
    if entry.opts.so_bound_dev.is_some() {
        return dropped(datagrams.len(), "it is bound to a network interface");
    }
    if !bound.ip().is_unspecified() && !can_be_given_back(bound.ip()) {
        return dropped(datagrams.len(), "its address is not one that the loopback could reach");
    }
    if is_shared(entry, bound) {
        return dropped(datagrams.len(), "other sockets share its port");
    }
    // What the kernel counts for a small datagram is much more than its bytes.
    let room = datagrams.iter().map(|d| d.data.len() + 512).sum();
    options::make_room(making, room, 0)?;
    let mut senders = Senders::default();
    for (at, datagram) in datagrams.iter().enumerate() {
        if let Err(why) = deliver(&mut senders, entry, bound, datagram) {
            return dropped(datagrams.len() - at, &why);
        }
    }
    if !readable(making.fd) {
        return dropped(datagrams.len(), "they did not arrive (a packet filter?)");
    }
    Ok(())
}

/// Whether somebody else might get what is sent to the port.
fn is_shared(entry: &InetSkEntry, bound: SocketAddr) -> bool {
    if entry.opts.reuseaddr != Some(true) && entry.opts.so_reuseport != Some(true) {
        return false;
    }
    let Ok(mut socket) = diag::open() else { return true };
    let mut count = 0;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let Ok(table) = diag::inet(&mut socket, family as u8, entry.proto as u8) else {
            return true;
        };
        count += table.values().filter(|s| s.source.1 == bound.port()).count();
    }
    count > 1
}

fn deliver(
    senders: &mut Senders,
    entry: &InetSkEntry,
    bound: SocketAddr,
    datagram: &RewakeDatagramEntry,
) -> Result<(), String> {
    let source = address(&datagram.source).ok_or("the image has no valid sender")?;
    let port = u16::try_from(datagram.source_port).map_err(|_| "the image has no valid sender")?;
    let loopback = match source {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let told = datagram.destination.as_deref().and_then(address).filter(|to| is_local(*to));
    let to = match bound.ip().to_canonical() {
        ip if ip.is_unspecified() => told.unwrap_or(loopback),
        ip => ip,
    };
    if source.is_ipv4() != to.is_ipv4() {
        return Err("sender and receiver are of different families".to_owned());
    }
    let packet = packet(
        entry.proto as u8,
        SocketAddr::new(source, port),
        SocketAddr::new(to, bound.port()),
        &datagram.data,
    );
    senders.send(&packet, to).map_err(|e| match e {
        Errno::PERM => "it takes CAP_NET_RAW to give them back".to_owned(),
        e => format!("they cannot be sent on the loopback: {e}"),
    })
}

/// Whether this host has the address.
fn is_local(ip: IpAddr) -> bool {
    std::net::UdpSocket::bind((ip, 0)).is_ok()
}

/// Raw sockets on the loopback, one a family: nothing leaves the host, whatever the image says.
#[derive(Debug, Default)]
struct Senders {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Senders {
    fn send(&mut self, packet: &[u8], to: IpAddr) -> Result<(), Errno> {
        let (family, place) = match to {
            IpAddr::V4(_) => (AddressFamily::INET, &mut self.v4),
            IpAddr::V6(_) => (AddressFamily::INET6, &mut self.v6),
        };
        let socket = match place {
            Some(socket) => socket,
            None => {
                let raw = RawProtocol::new(libc::IPPROTO_RAW as u32).map(Protocol::from_raw);
                let flags = SocketFlags::CLOEXEC;
                let socket = rustix::net::socket_with(family, SocketType::RAW, flags, raw)?;
                sockets::set_option(
                    socket.as_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_BINDTODEVICE,
                    b"lo\0",
                )
                .map_err(|e| e.errno)?;
                place.insert(socket)
            }
        };
        rustix::net::sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(to, 0)).map(drop)
    }
}

/// The datagram with its headers.
fn packet(protocol: u8, from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = UDP_HEADER + data.len();
    let mut udp = Vec::with_capacity(length);
    udp.extend(from.port().to_be_bytes());
    udp.extend(to.port().to_be_bytes());
    // UDP-Lite has how much the checksum covers: 0 is everything.
    let covered = if i32::from(protocol) == libc::IPPROTO_UDPLITE { 0 } else { length as u16 };
    udp.extend(covered.to_be_bytes());
    udp.extend([0; 2]);
    udp.extend(data);
    let mut packet = Vec::with_capacity(40 + length);
    let mut pseudo = Vec::with_capacity(40 + length);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            // Length, identification and checksum are filled in by the kernel.
            packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, HOPS, protocol, 0, 0]);
            packet.extend(a.octets());
            packet.extend(b.octets());
            pseudo.extend_from_slice(&packet[12..]);
        }
        (a, b) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((length as u16).to_be_bytes());
            packet.extend([protocol, HOPS]);
            packet.extend(octets(a));
            packet.extend(octets(b));
            pseudo.extend_from_slice(&packet[8..]);
        }
    }
    pseudo.extend((length as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    pseudo.extend_from_slice(&udp);
    // Zero would mean that there is no checksum.
    let sum = match checksum(&pseudo) {
        0 => u16::MAX,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend(udp);
    packet
}

/// The ones' complement sum of RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    let mut sum: u64 = bytes.chunks(2).map(|pair| u64::from(word(pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_rfc_1071() {
        // The example of its section 3, whose sum is ddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0x12]), !0x1200, "an odd byte is padded");
    }

    #[test]
    fn a_packet_verifies() {
        let packet = packet(
            libc::IPPROTO_UDP as u8,
            "[::1]:7".parse().unwrap(),
            "[fd00::2]:9".parse().unwrap(),
            b"odd",
        );
        let mut pseudo = packet[8..40].to_vec();
        pseudo.extend([0, 0, 0, 11, 0, 0, 0, 17]);
        pseudo.extend_from_slice(&packet[40..]);
        assert_eq!(checksum(&pseudo), 0);
    }
}
