//! TCP segments in the name of a peer: what it has sent before the dump and will not send again.

use rewake_netlink::nftables::PASS_MARK;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RawProtocol, SendFlags, SocketFlags, SocketType};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

const TCP_HEADER: usize = 20;
/// `FIN`
pub const FIN: u8 = 0x01;
/// `SYN`
pub const SYN: u8 = 0x02;
/// `RST`
pub const RST: u8 = 0x04;
/// `PSH`
pub const PUSH: u8 = 0x08;
/// `ACK`
pub const ACK: u8 = 0x10;
const HOPS: u8 = 64;

/// A segment without data that carries a FIN.
#[derive(Debug, Clone, Copy)]
pub struct Fin {
    /// The peer.
    pub from: SocketAddr,
    /// The own end.
    pub to: SocketAddr,
    /// Its place in the peer's sequence.
    pub sequence: u32,
    /// What the peer has acknowledged.
    pub acknowledged: u32,
    /// The peer's window, scaled down.
    pub window: u16,
}

impl Fin {
    /// Delivers the segment through the loopback, past the network lock.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`.
    pub fn deliver(&self) -> Result<(), Errno> {
        Courier::default().deliver(&Segment {
            from: self.from,
            to: self.to,
            sequence: self.sequence,
            acknowledged: self.acknowledged,
            flags: FIN | ACK,
            window: self.window,
            options: &[],
            data: &[],
        })
    }
}

/// Any segment.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// The peer.
    pub from: SocketAddr,
    /// The own end.
    pub to: SocketAddr,
    /// The place of its first byte in the peer's sequence.
    pub sequence: u32,
    /// What the peer has acknowledged.
    pub acknowledged: u32,
    /// [`SYN`], [`ACK`]…
    pub flags: u8,
    /// The peer's window, scaled down.
    pub window: u16,
    /// Options, a multiple of four bytes.
    pub options: &'a [u8],
    /// No more than fits into a packet of the loopback.
    pub data: &'a [u8],
}

/// Delivers segments through the loopback, past the network lock.
#[derive(Debug, Default)]
pub struct Courier {
    sockets: [Option<OwnedFd>; 2],
}

impl Courier {
    /// Delivers a segment: when this returns, it has mostly arrived; see [`arrives`].
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`.
    pub fn deliver(&mut self, segment: &Segment<'_>) -> Result<(), Errno> {
        let from = SocketAddr::new(segment.from.ip().to_canonical(), segment.from.port());
        let to = SocketAddr::new(segment.to.ip().to_canonical(), segment.to.port());
        let known = &mut self.sockets[usize::from(to.is_ipv6())];
        let socket = match known {
            Some(socket) => &*socket,
            none => none.insert(open(to.is_ipv6())?),
        };
        let packet = packet(segment, from, to);
        // The interface that a link-local address belongs to is that of the own end.
        let mut target = match segment.to {
            SocketAddr::V6(_) if to.is_ipv6() => segment.to,
            _ => to,
        };
        target.set_port(0);
        rustix::net::sendto(socket, &packet, SendFlags::empty(), &target).map(drop)
    }
}

/// What is sent to ourselves mostly arrives at once; where the kernel is busy (its softirqs are left to `ksoftirqd` then), a
/// little later: so long it is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits until something sent to ourselves `is_there`, which is false if it never is.
///
/// # Errors
/// Those of asking for it.
pub fn arrives<E>(mut is_there: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    let patience = Instant::now() + PATIENCE;
    loop {
        if is_there()? {
            return Ok(true);
        }
        if Instant::now() > patience {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn open(v6: bool) -> Result<OwnedFd, Errno> {
    let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
    let raw = RawProtocol::new(libc::IPPROTO_RAW as u32).map(Protocol::from_raw);
    let socket = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, raw)?;
    let mark = PASS_MARK as i32;
    rewake_sys::sockets::set_option_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, mark)
        .map_err(|e| e.errno)?;
    Ok(socket)
}

fn packet(segment: &Segment<'_>, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let header = TCP_HEADER + segment.options.len();
    let length = (header + segment.data.len()) as u16;
    let mut tcp = Vec::with_capacity(length.into());
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(segment.sequence.to_be_bytes());
    tcp.extend(segment.acknowledged.to_be_bytes());
    tcp.extend([(header as u8 / 4) << 4, segment.flags]);
    tcp.extend(segment.window.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(segment.options);
    tcp.extend(segment.data);
    let mut pseudo = Vec::new();
    let mut packet = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            // Length, identification and checksum are filled in by the kernel.
            packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, HOPS, libc::IPPROTO_TCP as u8, 0, 0]);
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
            packet.extend(length.to_be_bytes());
            packet.extend([libc::IPPROTO_TCP as u8, HOPS]);
            packet.extend(octets(a));
            packet.extend(octets(b));
            pseudo.extend_from_slice(&packet[8..]);
        }
    }
    pseudo.extend([0, libc::IPPROTO_TCP as u8]);
    pseudo.extend(length.to_be_bytes());
    pseudo.extend_from_slice(&tcp);
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    packet.extend(tcp);
    packet
}

/// The ones' complement sum of RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_cover_everything() {
        for (from, to, header) in
            [("1.2.3.4:5", "127.0.0.1:80", 20), ("[fe80::1]:5", "[::1]:80", 40)]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let segment = Segment {
                from,
                to,
                sequence: u32::MAX,
                acknowledged: 7,
                flags: ACK | PUSH,
                window: 512,
                options: &[1, 1, 1, 0],
                data: b"odd",
            };
            let packet = packet(&segment, from, to);
            assert_eq!(packet.len(), header + 24 + 3);
            let addresses = if header == 20 { &packet[12..20] } else { &packet[8..40] };
            let pseudo = [addresses, &[0, 6, 0, 27], &packet[header..]].concat();
            assert_eq!(checksum(&pseudo), 0, "{from}");
        }
    }
}
