//! A TCP segment in the name of a peer: the FIN that it has sent before the dump and will not send again.

use rewake_netlink::nftables::PASS_MARK;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RawProtocol, SendFlags, SocketFlags, SocketType};
use std::net::{IpAddr, SocketAddr};

const TCP_HEADER: usize = 20;
const FIN: u8 = 0x01;
const ACK: u8 = 0x10;
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
        let from = SocketAddr::new(self.from.ip().to_canonical(), self.from.port());
        let to = SocketAddr::new(self.to.ip().to_canonical(), self.to.port());
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let raw = RawProtocol::new(libc::IPPROTO_RAW as u32).map(Protocol::from_raw);
        let socket = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, raw)?;
        rewake_sys::sockets::set_option_int(
            std::os::fd::AsFd::as_fd(&socket),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            PASS_MARK as i32,
        )
        .map_err(|e| e.errno)?;
        let packet = self.packet(from, to);
        rustix::net::sendto(&socket, &packet, SendFlags::empty(), &SocketAddr::new(to.ip(), 0))
            .map(drop)
    }

    fn packet(&self, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(TCP_HEADER);
        tcp.extend(from.port().to_be_bytes());
        tcp.extend(to.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        tcp.extend([(TCP_HEADER as u8 / 4) << 4, FIN | ACK]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
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
                packet.extend([0x60, 0, 0, 0, 0, TCP_HEADER as u8, libc::IPPROTO_TCP as u8, HOPS]);
                packet.extend(octets(a));
                packet.extend(octets(b));
                pseudo.extend_from_slice(&packet[8..]);
            }
        }
        pseudo.extend([0, libc::IPPROTO_TCP as u8, 0, TCP_HEADER as u8]);
        pseudo.extend_from_slice(&tcp);
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        packet.extend(tcp);
        packet
    }
}

/// The ones' complement sum of RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
