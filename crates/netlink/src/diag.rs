//! sock_diag(7): tables of sockets, by inode number.

use crate::message::{attributes, u16_at, u32_at};
use crate::socket::{Error, Socket};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const SOCK_DIAG_BY_FAMILY: u16 = 20;

const INET_DIAG_INFO: u8 = 2;
const INET_DIAG_SHUTDOWN: u16 = 8;
const INET_DIAG_CONG: u8 = 4;
const INET_DIAG_TOS: u8 = 5;
const INET_DIAG_TCLASS: u8 = 6;
const INET_DIAG_SKMEMINFO: u8 = 7;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_MD5SIG: u16 = 18;
const INET_DIAG_SOCKOPT: u16 = 22;
/// Where a record has the interface.
const INET_INTERFACE: usize = 40;
/// Where a record has the inode number.
const INET_INODE: usize = 68;
/// `struct inet_diag_msg`
const INET_RECORD: usize = 72;

const UDIAG_SHOW_NAME: u32 = 0x1;
const UDIAG_SHOW_VFS: u32 = 0x2;
const UDIAG_SHOW_PEER: u32 = 0x4;
const UDIAG_SHOW_ICONS: u32 = 0x8;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_VFS: u16 = 1;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// `struct unix_diag_msg`
const UNIX_RECORD: usize = 16;

const PACKET_SHOW_INFO: u32 = 0x1;
const PACKET_SHOW_MCLIST: u32 = 0x2;
const PACKET_SHOW_RINGS: u32 = 0x4;
const PACKET_SHOW_FANOUT: u32 = 0x8;
const PACKET_DIAG_INFO: u16 = 0;
const PACKET_DIAG_MCLIST: u16 = 1;
const PACKET_DIAG_RX_RING: u16 = 2;
const PACKET_DIAG_TX_RING: u16 = 3;
const PACKET_DIAG_FANOUT: u16 = 4;
/// `struct packet_diag_msg`
const PACKET_RECORD: usize = 16;
/// `struct packet_diag_mclist`
const PACKET_MEMBER: usize = 44;

/// An internet socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inet {
    /// `TCP_*` number.
    pub state: u8,
    /// Where it is bound: address and port.
    pub source: (IpAddr, u16),
    /// Where it is connected to.
    pub destination: (IpAddr, u16),
    /// Of a listening socket: connections that wait for accept(2); else bytes to be read.
    pub receive_queue: u32,
    /// Of a listening socket: its backlog; else bytes in the send queue.
    pub send_queue: u32,
    /// Owner.
    pub uid: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
    /// `IPV6_V6ONLY`; told of sockets that are not connected.
    pub v6only: bool,
}

/// All sockets of `family` (`AF_INET`, `AF_INET6`) and `protocol` (`IPPROTO_*`) that are bound, by inode number.
///
/// # Errors
/// The kernel has no inet_diag for the protocol.
pub fn inet(socket: &mut Socket, family: u8, protocol: u8) -> Result<HashMap<u32, Inet>, Error> {
    Ok(inet_list(socket, family, protocol)?.into_iter().collect())
}

/// The same as a list: those that no descriptor refers to all have the inode number 0.
///
/// # Errors
/// As [`inet`].
pub fn inet_list(socket: &mut Socket, family: u8, protocol: u8) -> Result<Vec<(u32, Inet)>, Error> {
    // struct inet_diag_req_v2
    let mut request = [0u8; 56];
    request[0] = family;
    request[1] = protocol;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |list: &mut Vec<(u32, Inet)>, message| {
        list.extend(inet_record(message.body));
    })
}

fn inet_record(body: &[u8]) -> Option<(u32, Inet)> {
    let address = |at: usize| match i32::from(body[0]) {
        libc::AF_INET => Some(IpAddr::V4(Ipv4Addr::from(*body[at..].first_chunk::<4>()?))),
        _ => Some(IpAddr::V6(Ipv6Addr::from(*body[at..].first_chunk::<16>()?))),
    };
    // Ports are in network order.
    let port = |at: usize| u16_at(body, at).map(u16::from_be);
    if body.len() < INET_RECORD {
        return None;
    }
    let byte = |wanted| {
        let mut all = attributes(&body[INET_RECORD..]);
        let found = all.find_map(|(kind, value)| (kind == wanted).then_some(value));
        found.and_then(|value| value.first().copied()).unwrap_or(0)
    };
    let record = Inet {
        state: body[1],
        source: (address(8)?, port(4)?),
        destination: (address(24)?, port(6)?),
        receive_queue: u32_at(body, 56)?,
        send_queue: u32_at(body, 60)?,
        uid: u32_at(body, 64)?,
        shutdown: byte(INET_DIAG_SHUTDOWN),
        v6only: byte(INET_DIAG_SKV6ONLY) != 0,
    };
    Some((u32_at(body, INET_INODE)?, record))
}

/// What sock_diag tells of a TCP socket besides [`Inet`]: options that getsockopt(2) need not be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tcp {
    /// `TCP_*` number.
    pub state: u8,
    /// Where it is connected to.
    pub destination: Option<(IpAddr, u16)>,
    /// Number of the interface it is bound to (`SO_BINDTODEVICE`); 0: none.
    pub interface: u32,
    /// It has keys for signing segments (`TCP_MD5SIG`), which nothing else tells. Only `CAP_NET_ADMIN` sees them.
    pub signs: bool,
    /// `SO_RCVBUF` and `SO_SNDBUF`.
    pub buffers: Option<(u32, u32)>,
    /// `SO_MARK`; told to `CAP_NET_ADMIN` only.
    pub mark: Option<u32>,
    /// `IP_TOS`
    pub tos: Option<u8>,
    /// `IPV6_TCLASS`
    pub traffic_class: Option<u8>,
    /// `TCP_CONGESTION`, without the NUL.
    pub congestion: Option<Vec<u8>>,
    /// `struct inet_diag_sockopt` (Linux 5.10), its first bit in the lowest one.
    pub flags: Option<u16>,
}

impl Tcp {
    /// In [`Tcp::flags`]: `IP_RECVERR`.
    pub const RECVERR: u16 = 1;
    /// `IP_FREEBIND`, `IPV6_FREEBIND`
    pub const FREEBIND: u16 = 1 << 2;
    /// `IP_TRANSPARENT`, `IPV6_TRANSPARENT`
    pub const TRANSPARENT: u16 = 1 << 5;
    /// `IP_MULTICAST_ALL`
    pub const MULTICAST_ALL: u16 = 1 << 6;
    /// `IP_BIND_ADDRESS_NO_PORT`
    pub const BIND_ADDRESS_NO_PORT: u16 = 1 << 8;
    /// `IP_RECVERR_RFC4884`
    pub const RECVERR_RFC4884: u16 = 1 << 9;
}

/// The TCP sockets of `family` (`AF_INET`, `AF_INET6`) that are bound, by inode number.
///
/// # Errors
/// As [`inet`].
pub fn tcp(socket: &mut Socket, family: u8) -> Result<HashMap<u32, Tcp>, Error> {
    let mut request = [0u8; 56];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    // Keys come with what TCP_INFO gives.
    let wanted =
        [INET_DIAG_INFO, INET_DIAG_CONG, INET_DIAG_TOS, INET_DIAG_TCLASS, INET_DIAG_SKMEMINFO];
    request[2] = wanted.iter().fold(0, |bits, kind| bits | 1 << (kind - 1));
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |table: &mut HashMap<u32, Tcp>, message| {
        if let Some((inode, record)) = tcp_record(message.body) {
            table.insert(inode, record);
        }
    })
}

fn tcp_record(body: &[u8]) -> Option<(u32, Tcp)> {
    let (inode, inet) = inet_record(body)?;
    let mut record = Tcp {
        state: inet.state,
        destination: Some(inet.destination),
        interface: u32_at(body, INET_INTERFACE)?,
        ..Tcp::default()
    };
    for (kind, value) in attributes(&body[INET_RECORD..]) {
        match kind {
            INET_DIAG_MD5SIG => record.signs = !value.is_empty(),
            INET_DIAG_MARK => record.mark = u32_at(value, 0),
            INET_DIAG_SOCKOPT => record.flags = value.first_chunk().map(|b| u16::from_le_bytes(*b)),
            _ => {}
        }
        match u8::try_from(kind) {
            // SK_MEMINFO_RCVBUF, SK_MEMINFO_SNDBUF
            Ok(INET_DIAG_SKMEMINFO) => record.buffers = u32_at(value, 4).zip(u32_at(value, 12)),
            Ok(INET_DIAG_TOS) => record.tos = value.first().copied(),
            Ok(INET_DIAG_TCLASS) => record.traffic_class = value.first().copied(),
            Ok(INET_DIAG_CONG) => {
                record.congestion = value.split(|b| *b == 0).next().map(<[u8]>::to_vec);
            }
            _ => {}
        }
    }
    Some((inode, record))
}

/// A unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unix {
    /// `SOCK_*`
    pub kind: u8,
    /// `TCP_ESTABLISHED` (1), `TCP_CLOSE` (7) or `TCP_LISTEN` (10).
    pub state: u8,
    /// Its address; a path comes with its final NUL, an abstract name with a NUL before it. Empty: not bound.
    pub name: Vec<u8>,
    /// Device (as in stat(2)) and inode number of the file it is bound to.
    pub file: Option<(u64, u32)>,
    /// Inode number of the peer; 0: the peer is closed.
    pub peer: Option<u32>,
    /// Inode numbers of the clients that wait for accept(2); 0: the client is closed again.
    pub waiting: Vec<u32>,
    /// Of a listening socket: how many wait for accept(2); else bytes to be read.
    pub receive_queue: u32,
    /// Of a listening socket: its backlog; else what its sent messages occupy.
    pub send_queue: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
}

/// All unix sockets, by inode number.
///
/// # Errors
/// The kernel has no unix_diag.
pub fn unix(socket: &mut Socket) -> Result<HashMap<u32, Unix>, Error> {
    // struct unix_diag_req
    let mut request = [0u8; 24];
    request[0] = libc::AF_UNIX as u8;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let show =
        UDIAG_SHOW_NAME | UDIAG_SHOW_VFS | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN;
    request[12..16].copy_from_slice(&show.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |table: &mut HashMap<u32, Unix>, message| {
        if let Some((inode, record)) = unix_record(message.body) {
            table.insert(inode, record);
        }
    })
}

fn unix_record(body: &[u8]) -> Option<(u32, Unix)> {
    let mut record = Unix { kind: *body.get(1)?, state: *body.get(2)?, ..Unix::default() };
    for (kind, value) in attributes(body.get(UNIX_RECORD..)?) {
        match kind {
            UNIX_DIAG_NAME => record.name = value.to_vec(),
            UNIX_DIAG_VFS => record.file = u32_at(value, 4).map(device).zip(u32_at(value, 0)),
            UNIX_DIAG_PEER => record.peer = u32_at(value, 0),
            UNIX_DIAG_ICONS => {
                record.waiting =
                    (0..value.len() / 4).filter_map(|i| u32_at(value, i * 4)).collect();
            }
            UNIX_DIAG_RQLEN => {
                record.receive_queue = u32_at(value, 0)?;
                record.send_queue = u32_at(value, 4)?;
            }
            UNIX_DIAG_SHUTDOWN => record.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
    }
    Some((u32_at(body, 4)?, record))
}

/// The kernel's inner device number (12 bits major, 20 bits minor) as stat(2) has it.
fn device(inner: u32) -> u64 {
    libc::makedev(inner >> 20, inner & 0xf_ffff)
}

/// A packet socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packet {
    /// `ETH_P_*`
    pub protocol: u16,
    /// Number of the interface it is bound to; 0: all.
    pub interface: u32,
    /// `PACKET_VERSION`
    pub version: u32,
    /// `PACKET_RESERVE`
    pub reserve: u32,
    /// `PACKET_COPY_THRESH`
    pub copy_threshold: u32,
    /// `PACKET_TIMESTAMP`
    pub timestamp: u32,
    /// `PDI_*`: running 1, auxiliary data 2, original device 4, virtio header 8, loss 16.
    pub flags: u32,
    /// Memberships.
    pub memberships: Vec<PacketMembership>,
    /// The words of `struct tpacket_req3`, of the receive ring.
    pub receive_ring: Option<[u32; 7]>,
    /// The same of the send ring.
    pub send_ring: Option<[u32; 7]>,
    /// `PACKET_FANOUT`, without its flags.
    pub fanout: Option<u32>,
}

/// What a packet socket has an interface receive (`PACKET_ADD_MEMBERSHIP`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketMembership {
    /// Number of the interface.
    pub interface: u32,
    /// How often it was added.
    pub count: u32,
    /// `PACKET_MR_*`
    pub kind: u16,
    /// Hardware address.
    pub address: Vec<u8>,
}

/// All packet sockets, by inode number.
///
/// # Errors
/// The kernel has no packet_diag.
pub fn packet(socket: &mut Socket) -> Result<HashMap<u32, Packet>, Error> {
    // struct packet_diag_req
    let mut request = [0u8; 20];
    request[0] = libc::AF_PACKET as u8;
    let show = PACKET_SHOW_INFO | PACKET_SHOW_MCLIST | PACKET_SHOW_RINGS | PACKET_SHOW_FANOUT;
    request[8..12].copy_from_slice(&show.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |table: &mut HashMap<u32, Packet>, message| {
        if let Some((inode, record)) = packet_record(message.body) {
            table.insert(inode, record);
        }
    })
}

fn packet_record(body: &[u8]) -> Option<(u32, Packet)> {
    // struct packet_diag_msg
    let mut record = Packet { protocol: u16_at(body, 2)?, ..Packet::default() };
    for (kind, value) in attributes(body.get(PACKET_RECORD..)?) {
        let word = |at: usize| u32_at(value, at * 4);
        let ring = || {
            let mut words = [0; 7];
            words.iter_mut().enumerate().try_for_each(|(i, w)| word(i).map(|value| *w = value))?;
            Some(words)
        };
        match kind {
            PACKET_DIAG_INFO => {
                record.interface = word(0)?;
                record.version = word(1)?;
                record.reserve = word(2)?;
                record.copy_threshold = word(3)?;
                record.timestamp = word(4)?;
                record.flags = word(5)?;
            }
            PACKET_DIAG_MCLIST => {
                record.memberships =
                    value.chunks_exact(PACKET_MEMBER).filter_map(packet_membership).collect();
            }
            PACKET_DIAG_RX_RING => record.receive_ring = ring(),
            PACKET_DIAG_TX_RING => record.send_ring = ring(),
            PACKET_DIAG_FANOUT => record.fanout = word(0),
            _ => {}
        }
    }
    Some((u32_at(body, 4)?, record))
}

/// `struct packet_diag_mclist`
fn packet_membership(bytes: &[u8]) -> Option<PacketMembership> {
    let length = usize::from(u16_at(bytes, 10)?);
    Some(PacketMembership {
        interface: u32_at(bytes, 0)?,
        count: u32_at(bytes, 4)?,
        kind: u16_at(bytes, 8)?,
        address: bytes.get(12..)?.get(..length)?.to_vec(),
    })
}

/// Opens a socket for the tables of the thread's network namespace.
///
/// # Errors
/// The kernel has no sock_diag.
pub fn open() -> Result<Socket, Error> {
    Socket::open(libc::NETLINK_SOCK_DIAG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsFd;

    fn inode(fd: &impl AsFd) -> u32 {
        rustix::fs::fstat(fd).unwrap().st_ino as u32
    }

    #[test]
    fn own_inet_sockets_are_listed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        udp.connect("[::1]:9").unwrap();
        rustix::net::shutdown(&udp, rustix::net::Shutdown::Write).unwrap();
        let mut socket = open().unwrap();
        let tcp = inet(&mut socket, libc::AF_INET as u8, libc::IPPROTO_TCP as u8).unwrap();
        let record = tcp[&inode(&listener)];
        assert_eq!((record.state, record.send_queue), (10, 4096.min(record.send_queue)));
        assert_eq!(record.source.1, listener.local_addr().unwrap().port());
        assert_eq!(record.source.0, listener.local_addr().unwrap().ip());
        let found = inet(&mut socket, libc::AF_INET6 as u8, libc::IPPROTO_UDP as u8).unwrap();
        let record = found[&inode(&udp)];
        assert_eq!(record.destination, ("::1".parse().unwrap(), 9));
        assert_eq!((record.state, record.shutdown), (1, 2));
    }

    #[test]
    fn packet_records_are_read() {
        let mut builder = crate::message::Builder::new();
        // family, type, protocol; inode; cookie
        let mut fixed = vec![17, 3, 0, 3];
        fixed.extend(99u32.to_ne_bytes());
        fixed.extend([0; 8]);
        let words = |words: &[u32]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        let mut member = words(&[1, 2]);
        member.extend([0u16.to_ne_bytes(), 6u16.to_ne_bytes()].concat());
        member.extend([1, 2, 3, 4, 5, 6]);
        member.resize(PACKET_MEMBER, 0);
        builder
            .begin(20, 0, 1)
            .bytes(&fixed)
            .attribute(PACKET_DIAG_INFO, &words(&[4, 1, 8, 0, 0, 3]))
            .attribute(PACKET_DIAG_MCLIST, &member)
            .attribute(PACKET_DIAG_RX_RING, &words(&[4096, 2, 2048, 4, 0, 0, 0]))
            .attribute(PACKET_DIAG_FANOUT, &words(&[7]));
        let (inode, record) = packet_record(&builder.as_bytes()[16..]).unwrap();
        assert_eq!(inode, 99);
        assert_eq!((record.interface, record.version, record.reserve, record.flags), (4, 1, 8, 3));
        assert_eq!(record.receive_ring, Some([4096, 2, 2048, 4, 0, 0, 0]));
        assert_eq!((record.send_ring, record.fanout), (None, Some(7)));
        let member = &record.memberships[0];
        assert_eq!((member.interface, member.count, member.kind), (1, 2, 0));
        assert_eq!(member.address, [1, 2, 3, 4, 5, 6]);
        for cut in 16..builder.as_bytes().len() {
            let _ = packet_record(&builder.as_bytes()[16..cut]);
        }
    }

    #[test]
    fn own_unix_sockets_are_listed() {
        use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
        let (a, b) = UnixStream::pair().unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let path = std::env::temp_dir().join(format!("rewake-diag-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let unbound = UnixDatagram::unbound().unwrap();
        let table = unix(&mut open().unwrap()).unwrap();
        let stat = rustix::fs::stat(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(table[&inode(&a)].peer, Some(inode(&b)));
        assert_eq!((table[&inode(&a)].shutdown, table[&inode(&b)].shutdown), (2, 1));
        let record = &table[&inode(&listener)];
        assert_eq!(record.file, Some((stat.st_dev, stat.st_ino as u32)));
        assert_eq!(record.name.split_last().unwrap(), (&0, path.as_os_str().as_encoded_bytes()));
        assert_eq!((record.state, record.waiting.as_slice()), (10, &[inode(&waiting)][..]));
        assert_eq!(
            table[&inode(&unbound)],
            Unix { kind: 2, state: 7, ..record_of_nothing(&table[&inode(&unbound)]) }
        );
    }

    fn record_of_nothing(record: &Unix) -> Unix {
        Unix { send_queue: record.send_queue, ..Unix::default() }
    }
}
