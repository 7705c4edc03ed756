//! Every socket option that can be read back, once: which sockets have it, where the image has it, when it is to be set.
//!
//! Options of the same phase are set in the order of the table. What is not an `int` in a field of the image (buffers,
//! timeouts, linger, filters, the device) is in [`options`](super::options); the options of tcp(7) that CRIU's format has are
//! in [`inet`](super::inet).
//!
//! Not in the table, because getsockopt(2) does not give them: `SO_BUSY_POLL_BUDGET`, `SO_ATTACH_REUSEPORT_CBPF` and
//! `…_EBPF` (see [`reuseport`](super::reuseport)), `IPV6_MTU`, `IPV6_PKTINFO`, `IP_IPSEC_POLICY`. Not either, because the kernel alone decides them: `SO_INCOMING_NAPI_ID`, `SO_COOKIE`, `SO_ERROR`.

use super::reading::Reading;
use rewake_image::messages::{IpOptsEntry, SkOptsEntry};

/// Sets of sockets that have the same options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kinds(u16);

const TCP4: Kinds = Kinds(1);
const TCP6: Kinds = Kinds(1 << 1);
/// UDP and UDP-Lite.
const UDP4: Kinds = Kinds(1 << 2);
const UDP6: Kinds = Kinds(1 << 3);
const RAW4: Kinds = Kinds(1 << 4);
const RAW6: Kinds = Kinds(1 << 5);
/// ICMP echo.
const PING4: Kinds = Kinds(1 << 6);
const PING6: Kinds = Kinds(1 << 7);
const UNIX: Kinds = Kinds(1 << 8);
const NETLINK: Kinds = Kinds(1 << 9);
const PACKET: Kinds = Kinds(1 << 10);
const VSOCK: Kinds = Kinds(1 << 11);

const TCP: Kinds = TCP4.and(TCP6);
const UDP: Kinds = UDP4.and(UDP6);
/// Internet sockets that are not of TCP.
const LOOSE4: Kinds = UDP4.and(RAW4).and(PING4);
const LOOSE6: Kinds = UDP6.and(RAW6).and(PING6);
const V4: Kinds = LOOSE4.and(TCP4);
const V6: Kinds = LOOSE6.and(TCP6);
/// Sockets that have options of ip(7): those of IPv6 too, for IPv4 inside, but not raw ones.
const IP: Kinds = V4.and(TCP6).and(UDP6).and(PING6);
/// The same without TCP.
const IP_LOOSE: Kinds = LOOSE4.and(UDP6).and(PING6);
const LOCAL: Kinds = UNIX.and(NETLINK);
const ALL: Kinds = Kinds::REMOTE.and(LOCAL);

impl Kinds {
    /// Sockets whose messages can carry credentials.
    pub const LOCAL: Kinds = LOCAL;
    /// All others.
    pub const REMOTE: Kinds = V4.and(V6).and(PACKET).and(VSOCK);

    const fn and(self, other: Kinds) -> Kinds {
        Kinds(self.0 | other.0)
    }

    /// The kind of a socket by family, type and protocol; none of what has no options to keep.
    #[must_use]
    pub fn of(family: i32, kind: i32, protocol: i32) -> Kinds {
        let v6 = family == libc::AF_INET6;
        let one = |four, six| if v6 { six } else { four };
        match family {
            libc::AF_UNIX => UNIX,
            libc::AF_NETLINK => NETLINK,
            libc::AF_PACKET => PACKET,
            libc::AF_VSOCK => VSOCK,
            libc::AF_INET | libc::AF_INET6 if kind == libc::SOCK_RAW => one(RAW4, RAW6),
            libc::AF_INET | libc::AF_INET6 => match protocol {
                libc::IPPROTO_TCP => one(TCP4, TCP6),
                libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE => one(UDP4, UDP6),
                libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => one(PING4, PING6),
                _ => Kinds(0),
            },
            _ => Kinds(0),
        }
    }

    /// Whether a socket of these kinds may be one of `others`.
    #[must_use]
    pub fn any(self, others: Kinds) -> bool {
        self.0 & others.0 != 0
    }
}

/// When an option is to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// It decides where a socket may be bound or whom it may be connected to.
    BeforeBind,
    /// The socket is what it shall be.
    Made,
    /// Just before the tasks go on: nothing can be changed, or read from the queue, afterwards.
    Last,
}

/// What the value of an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// An `int`.
    Int,
    /// Bytes that have no meaning elsewhere in this program.
    Bytes,
    /// The number of a network interface, as an `int`.
    Interface,
    /// The same in network order.
    NetworkInterface,
    /// An address of IPv4, and a network interface of which getsockopt(2) does not tell.
    Multicast,
}

/// A field of an image's message that holds an option.
#[derive(Debug)]
pub struct Field<M> {
    /// The value in the image.
    pub get: fn(&M) -> Option<i32>,
    /// Puts it there.
    pub put: fn(&mut M, i32),
    /// Whether zero is written too.
    pub always: bool,
    /// What a new socket has: not set again.
    pub default: Default,
}

/// What a new socket has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Default {
    /// Always this.
    Is(i32),
    /// It depends on sysctls or other options; the socket has to be asked.
    Varies,
}

/// Where an image has an option.
#[derive(Debug)]
pub enum Place {
    /// In `rewake.img`, if it is not what a new socket has: `RewakeFileEntry::socket_options`.
    Own,
    /// The options of any socket.
    Socket(Field<SkOptsEntry>),
    /// The options of an internet socket.
    Ip(Field<IpOptsEntry>),
}

/// A socket option.
#[derive(Debug)]
pub struct SocketOption {
    /// As in C.
    pub name: &'static str,
    /// `SOL_SOCKET`, `IPPROTO_IP`, …
    pub level: i32,
    /// Within the level.
    pub number: i32,
    /// Which sockets have it.
    pub kinds: Kinds,
    /// What its value is.
    pub shape: Shape,
    /// Where the image has it.
    pub place: Place,
    /// When to set it.
    pub when: When,
    /// Whether the value that a socket has is the program's, where it may be the kernel's.
    pub programs: Option<fn(Reading<'_>, &[u8]) -> bool>,
    /// Of a connected socket, it is the kernel that sets it.
    pub unconnected: bool,
}

impl SocketOption {
    const fn new(kinds: Kinds, level: i32, number: i32, name: &'static str) -> SocketOption {
        SocketOption {
            name,
            level,
            number,
            kinds,
            shape: Shape::Int,
            place: Place::Own,
            when: When::Made,
            programs: None,
            unconnected: false,
        }
    }

    const fn shape(mut self, shape: Shape) -> SocketOption {
        self.shape = shape;
        self
    }

    const fn when(mut self, when: When) -> SocketOption {
        self.when = when;
        self
    }

    const fn socket(mut self, field: Field<SkOptsEntry>) -> SocketOption {
        self.place = Place::Socket(field);
        self
    }

    const fn ip(mut self, field: Field<IpOptsEntry>) -> SocketOption {
        self.place = Place::Ip(field);
        self
    }

    const fn unconnected(mut self) -> SocketOption {
        self.unconnected = true;
        self.if_programs(|reading, _| !is_connected(reading))
    }

    const fn if_programs(mut self, programs: fn(Reading<'_>, &[u8]) -> bool) -> SocketOption {
        self.programs = Some(programs);
        self
    }
}

/// A field that is a flag.
macro_rules! flag {
    ($message:ident, $field:ident) => {
        Field {
            get: |m: &$message| m.$field.map(i32::from),
            put: |m: &mut $message, value| m.$field = Some(value != 0),
            always: true,
            default: Default::Is(0),
        }
    };
}

/// A field that is a number.
macro_rules! number {
    ($message:ident, $field:ident) => {
        Field {
            get: |m: &$message| m.$field.map(|value| value as i32),
            put: |m: &mut $message, value| m.$field = Some(value as u32),
            always: true,
            default: Default::Is(0),
        }
    };
}

impl<M> Field<M> {
    /// Zero is not written.
    const fn unless_zero(mut self) -> Field<M> {
        self.always = false;
        self
    }

    const fn default(mut self, default: Default) -> Field<M> {
        self.default = default;
        self
    }
}

const fn so(kinds: Kinds, number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(kinds, libc::SOL_SOCKET, number, name)
}

const fn ip(kinds: Kinds, number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(kinds, libc::IPPROTO_IP, number, name)
}

const fn ipv6(kinds: Kinds, number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(kinds, libc::IPPROTO_IPV6, number, name)
}

const fn udp(number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(UDP, libc::IPPROTO_UDP, number, name)
}

const fn tcp(number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(TCP, libc::IPPROTO_TCP, number, name)
}

/// Is it connected? Then much is what both ends have agreed on.
fn is_connected(reading: Reading<'_>) -> bool {
    reading.connected
        || rustix::net::getpeername(reading.socket.fd).is_ok_and(|peer| peer.is_some())
}

/// Is this segment size one that the program asked for? Until a connection is made, and after it is closed, the kernel tells
/// what it works with if nothing was asked for, and that may be less (with IP options) or more (over the loopback) than it
/// lets anybody ask for: `TCP_MIN_MSS` to `MAX_TCP_WINDOW`.
fn is_wanted_mss(reading: Reading<'_>, value: &[u8]) -> bool {
    const ASKED_FOR: std::ops::RangeInclusive<i32> = 88..=32767;
    let size = value.first_chunk().map(|v| i32::from_ne_bytes(*v));
    !is_connected(reading) && size.is_some_and(|size| ASKED_FOR.contains(&size))
}

/// Whether a window is smaller than the kernel would ever have it for the size of the receive buffer.
fn is_clamped(reading: Reading<'_>, value: &[u8]) -> bool {
    let clamp = value.first_chunk().map_or(0, |v| i32::from_ne_bytes(*v));
    !is_connected(reading)
        || reading.int(libc::SOL_SOCKET, libc::SO_RCVBUF).is_ok_and(|buffer| clamp < buffer / 8)
}

const fn netlink(number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(NETLINK, libc::SOL_NETLINK, number, name)
}

const fn packet(number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(PACKET, libc::SOL_PACKET, number, name)
}

const fn vsock(number: i32, name: &'static str) -> SocketOption {
    SocketOption::new(VSOCK, libc::AF_VSOCK, number, name).shape(Shape::Bytes)
}

use Shape::{Bytes, Interface, NetworkInterface};
use When::{BeforeBind, Last};

/// All of them.
pub static OPTIONS: &[SocketOption] = &[
    // ip(7)
    ip(V4, libc::IP_FREEBIND, "IP_FREEBIND")
        .ip(flag!(IpOptsEntry, freebind).unless_zero())
        .when(BeforeBind),
    ip(V4, libc::IP_TRANSPARENT, "IP_TRANSPARENT").when(BeforeBind),
    ip(IP, 24, "IP_BIND_ADDRESS_NO_PORT").when(BeforeBind),
    ip(TCP.and(UDP), 51, "IP_LOCAL_PORT_RANGE").when(BeforeBind),
    ip(IP, 50, "IP_UNICAST_IF").shape(NetworkInterface).when(BeforeBind),
    ip(IP_LOOSE, libc::IP_MULTICAST_IF, "IP_MULTICAST_IF").shape(Shape::Multicast).when(BeforeBind),
    ip(IP, libc::IP_OPTIONS, "IP_OPTIONS").shape(Bytes),
    ip(V4, libc::IP_PKTINFO, "IP_PKTINFO").ip(flag!(IpOptsEntry, pktinfo).unless_zero()),
    ip(TCP6.and(UDP6).and(PING6), libc::IP_PKTINFO, "IP_PKTINFO"),
    // It changes SO_PRIORITY.
    ip(IP, libc::IP_TOS, "IP_TOS").ip(number!(IpOptsEntry, tos).unless_zero()),
    // To set it is to pin it, even to what it is anyway (sysctl net.ipv4.ip_default_ttl).
    ip(V4, libc::IP_TTL, "IP_TTL")
        .ip(number!(IpOptsEntry, ttl).unless_zero().default(Default::Varies)),
    ip(TCP6.and(UDP6).and(PING6), libc::IP_TTL, "IP_TTL"),
    ip(RAW4, libc::IP_ROUTER_ALERT, "IP_ROUTER_ALERT"),
    ip(IP, libc::IP_RECVOPTS, "IP_RECVOPTS"),
    ip(IP, libc::IP_RETOPTS, "IP_RETOPTS"),
    ip(IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER"),
    ip(IP, libc::IP_RECVERR, "IP_RECVERR"),
    ip(IP, libc::IP_RECVTTL, "IP_RECVTTL"),
    ip(IP, libc::IP_RECVTOS, "IP_RECVTOS"),
    ip(IP, libc::IP_PASSSEC, "IP_PASSSEC"),
    ip(IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"),
    ip(IP, libc::IP_MINTTL, "IP_MINTTL"),
    ip(IP_LOOSE, 23, "IP_CHECKSUM"),
    ip(IP_LOOSE, 25, "IP_RECVFRAGSIZE"),
    ip(IP, 26, "IP_RECVERR_RFC4884"),
    ip(IP_LOOSE, libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL"),
    ip(IP_LOOSE, libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP"),
    ip(IP, 49, "IP_MULTICAST_ALL"),
    // ipv6(7)
    ipv6(V6, 78, "IPV6_FREEBIND").ip(flag!(IpOptsEntry, freebind).unless_zero()).when(BeforeBind),
    ipv6(V6, 75, "IPV6_TRANSPARENT").when(BeforeBind),
    ipv6(V6, 76, "IPV6_UNICAST_IF").shape(NetworkInterface).when(BeforeBind),
    ipv6(LOOSE6, libc::IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF").shape(Interface).when(BeforeBind),
    ipv6(V6, 72, "IPV6_ADDR_PREFERENCES").when(BeforeBind),
    ipv6(V6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO")
        .ip(flag!(IpOptsEntry, pktinfo).unless_zero()),
    ipv6(V6, 2, "IPV6_2292PKTINFO"),
    ipv6(V6, 3, "IPV6_2292HOPOPTS"),
    ipv6(V6, 4, "IPV6_2292DSTOPTS"),
    ipv6(V6, 5, "IPV6_2292RTHDR"),
    ipv6(V6, 8, "IPV6_2292HOPLIMIT"),
    ipv6(RAW6, 7, "IPV6_CHECKSUM"),
    ipv6(RAW6, 36, "IPV6_HDRINCL"),
    ipv6(V6, 11, "IPV6_FLOWINFO"),
    ipv6(V6, 33, "IPV6_FLOWINFO_SEND"),
    ipv6(V6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS"),
    ipv6(LOOSE6, libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS"),
    ipv6(LOOSE6, libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP"),
    ipv6(V6, 29, "IPV6_MULTICAST_ALL"),
    ipv6(RAW6, 22, "IPV6_ROUTER_ALERT"),
    ipv6(RAW6, 30, "IPV6_ROUTER_ALERT_ISOLATE"),
    ipv6(V6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER"),
    ipv6(V6, libc::IPV6_RECVERR, "IPV6_RECVERR"),
    ipv6(V6, 31, "IPV6_RECVERR_RFC4884"),
    ipv6(V6, libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT"),
    ipv6(V6, 53, "IPV6_RECVHOPOPTS"),
    ipv6(V6, 56, "IPV6_RECVRTHDR"),
    ipv6(V6, 58, "IPV6_RECVDSTOPTS"),
    ipv6(V6, 60, "IPV6_RECVPATHMTU"),
    ipv6(V6, libc::IPV6_RECVTCLASS, "IPV6_RECVTCLASS"),
    ipv6(V6, 74, "IPV6_RECVORIGDSTADDR"),
    ipv6(V6, 77, "IPV6_RECVFRAGSIZE"),
    ipv6(V6, 54, "IPV6_HOPOPTS").shape(Bytes),
    ipv6(V6, 57, "IPV6_RTHDR").shape(Bytes),
    ipv6(V6, 55, "IPV6_RTHDRDSTOPTS").shape(Bytes),
    ipv6(V6, 59, "IPV6_DSTOPTS").shape(Bytes),
    ipv6(V6, libc::IPV6_TCLASS, "IPV6_TCLASS"),
    ipv6(V6, 62, "IPV6_DONTFRAG"),
    ipv6(V6, 70, "IPV6_AUTOFLOWLABEL"),
    ipv6(V6, 73, "IPV6_MINHOPCOUNT"),
    // udp(7), udplite(7)
    udp(libc::UDP_ENCAP, "UDP_ENCAP"),
    udp(101, "UDP_NO_CHECK6_TX"),
    udp(102, "UDP_NO_CHECK6_RX"),
    udp(libc::UDP_SEGMENT, "UDP_SEGMENT"),
    udp(libc::UDP_GRO, "UDP_GRO"),
    udp(10, "UDPLITE_SEND_CSCOV"),
    udp(11, "UDPLITE_RECV_CSCOV"),
    udp(libc::UDP_CORK, "UDP_CORK"),
    // tcp(7)
    tcp(libc::TCP_CONGESTION, "TCP_CONGESTION").shape(Bytes).when(BeforeBind),
    tcp(libc::TCP_MAXSEG, "TCP_MAXSEG").unconnected().if_programs(is_wanted_mss).when(BeforeBind),
    tcp(libc::TCP_SYNCNT, "TCP_SYNCNT"),
    tcp(libc::TCP_LINGER2, "TCP_LINGER2"),
    tcp(libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT"),
    tcp(libc::TCP_WINDOW_CLAMP, "TCP_WINDOW_CLAMP").if_programs(is_clamped),
    tcp(libc::TCP_QUICKACK, "TCP_QUICKACK"),
    tcp(libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS"),
    tcp(libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT"),
    tcp(33, "TCP_FASTOPEN_KEY").shape(Bytes).unconnected(),
    tcp(libc::TCP_FASTOPEN, "TCP_FASTOPEN").unconnected(),
    tcp(30, "TCP_FASTOPEN_CONNECT").unconnected(),
    tcp(34, "TCP_FASTOPEN_NO_COOKIE"),
    tcp(25, "TCP_NOTSENT_LOWAT"),
    tcp(27, "TCP_SAVE_SYN"),
    tcp(36, "TCP_INQ"),
    tcp(37, "TCP_TX_DELAY"),
    tcp(44, "TCP_RTO_MAX_MS"),
    tcp(45, "TCP_RTO_MIN_US"),
    tcp(46, "TCP_DELACK_MAX_US"),
    // netlink(7)
    netlink(libc::NETLINK_PKTINFO, "NETLINK_PKTINFO"),
    netlink(libc::NETLINK_BROADCAST_ERROR, "NETLINK_BROADCAST_ERROR"),
    netlink(libc::NETLINK_NO_ENOBUFS, "NETLINK_NO_ENOBUFS"),
    netlink(libc::NETLINK_LISTEN_ALL_NSID, "NETLINK_LISTEN_ALL_NSID"),
    netlink(libc::NETLINK_CAP_ACK, "NETLINK_CAP_ACK"),
    netlink(11, "NETLINK_EXT_ACK"),
    netlink(12, "NETLINK_GET_STRICT_CHK"),
    // packet(7)
    packet(19, "PACKET_TX_HAS_OFF").when(BeforeBind),
    packet(24, "PACKET_VNET_HDR_SZ").when(BeforeBind),
    packet(20, "PACKET_QDISC_BYPASS"),
    packet(23, "PACKET_IGNORE_OUTGOING"),
    // vsock(7): the largest size first, which bounds the others
    vsock(2, "SO_VM_SOCKETS_BUFFER_MAX_SIZE"),
    vsock(1, "SO_VM_SOCKETS_BUFFER_MIN_SIZE"),
    vsock(0, "SO_VM_SOCKETS_BUFFER_SIZE"),
    vsock(8, "SO_VM_SOCKETS_CONNECT_TIMEOUT"),
    // socket(7)
    so(ALL, libc::SO_REUSEADDR, "SO_REUSEADDR")
        .socket(flag!(SkOptsEntry, reuseaddr))
        .when(BeforeBind),
    so(ALL, libc::SO_REUSEPORT, "SO_REUSEPORT")
        .socket(flag!(SkOptsEntry, so_reuseport))
        .when(BeforeBind),
    so(ALL, libc::SO_MARK, "SO_MARK")
        .socket(number!(SkOptsEntry, so_mark).unless_zero())
        .when(BeforeBind),
    so(ALL, libc::SO_BROADCAST, "SO_BROADCAST")
        .socket(flag!(SkOptsEntry, so_broadcast))
        .when(BeforeBind),
    so(ALL, libc::SO_DONTROUTE, "SO_DONTROUTE")
        .socket(flag!(SkOptsEntry, so_dontroute))
        .when(BeforeBind),
    so(ALL, libc::SO_PRIORITY, "SO_PRIORITY")
        .socket(number!(SkOptsEntry, so_priority).default(Default::Varies)),
    so(ALL, libc::SO_RCVLOWAT, "SO_RCVLOWAT")
        .socket(number!(SkOptsEntry, so_rcvlowat).default(Default::Is(1))),
    so(LOCAL, libc::SO_PASSCRED, "SO_PASSCRED").socket(flag!(SkOptsEntry, so_passcred)),
    so(LOCAL, libc::SO_PASSSEC, "SO_PASSSEC").socket(flag!(SkOptsEntry, so_passsec)),
    so(ALL, libc::SO_NO_CHECK, "SO_NO_CHECK").socket(flag!(SkOptsEntry, so_no_check)),
    so(ALL, libc::SO_KEEPALIVE, "SO_KEEPALIVE").socket(flag!(SkOptsEntry, so_keepalive)),
    so(ALL, libc::SO_OOBINLINE, "SO_OOBINLINE").socket(number!(SkOptsEntry, so_oobinline)),
    so(ALL, libc::SO_DEBUG, "SO_DEBUG"),
    so(UNIX, 76, "SO_PASSPIDFD"),
    so(UNIX, 83, "SO_PASSRIGHTS"),
    // What sets the newer of two forms sets the older one as well: it comes second.
    so(ALL, 29, "SO_TIMESTAMP_OLD"),
    so(ALL, 35, "SO_TIMESTAMPNS_OLD"),
    so(ALL, 63, "SO_TIMESTAMP_NEW"),
    so(ALL, 64, "SO_TIMESTAMPNS_NEW"),
    so(ALL, 37, "SO_TIMESTAMPING_OLD").shape(Bytes),
    so(ALL, 65, "SO_TIMESTAMPING_NEW").shape(Bytes),
    so(ALL, libc::SO_RXQ_OVFL, "SO_RXQ_OVFL"),
    so(ALL, 41, "SO_WIFI_STATUS"),
    so(PACKET, 43, "SO_NOFCS"),
    so(ALL, 45, "SO_SELECT_ERR_QUEUE"),
    so(ALL, libc::SO_BUSY_POLL, "SO_BUSY_POLL"),
    so(ALL, 69, "SO_PREFER_BUSY_POLL"),
    so(ALL, libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE").shape(Bytes),
    so(TCP.and(UDP), 49, "SO_INCOMING_CPU").unconnected(),
    so(TCP.and(UDP), libc::SO_ZEROCOPY, "SO_ZEROCOPY"),
    so(ALL, libc::SO_TXTIME, "SO_TXTIME").shape(Bytes),
    so(TCP.and(UDP), 73, "SO_RESERVE_MEM"),
    so(TCP, 74, "SO_TXREHASH"),
    so(ALL, 75, "SO_RCVMARK"),
    so(ALL, 82, "SO_RCVPRIORITY"),
    so(TCP.and(UDP).and(UNIX), libc::SO_PEEK_OFF, "SO_PEEK_OFF").when(Last),
    so(ALL, libc::SO_LOCK_FILTER, "SO_LOCK_FILTER").when(Last),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_an_option_once() {
        for (at, one) in OPTIONS.iter().enumerate() {
            for other in &OPTIONS[at + 1..] {
                let same = (one.level, one.number) == (other.level, other.number);
                assert!(!(same && one.kinds.any(other.kinds)), "{} is there twice", one.name);
            }
            assert!(matches!(one.place, Place::Own) || one.shape == Shape::Int, "{}", one.name);
        }
    }
}
