//! Sockets of the internet families: ip(7), ipv6(7). TCP connections are in [`stream`](super::stream) and
//! [`repair`](super::repair).

use super::bind::{self, Bound};
use super::option_table::When;
use super::options::{self, Making};
use super::reading::Reading;
use super::repair::Pending;
use super::{
    SOCKETS_NETNS, accept_queue, datagram, ended, ip, membership, raw, reuseport, stream, udp,
};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use rewake_image::messages::{
    FdTypes, FileEntry, InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry,
};
use rewake_sys::sockets::{option, option_int, set_option_int};
use rewake_sys::{Errno, SyscallError, tcp};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// `TCP_ESTABLISHED`
pub const ESTABLISHED: u32 = 1;
/// `TCP_SYN_SENT`
pub const SYN_SENT: u32 = 2;
/// `TCP_FIN_WAIT1`
pub const FIN_WAIT1: u32 = 4;
/// `TCP_FIN_WAIT2`
pub const FIN_WAIT2: u32 = 5;
/// `TCP_CLOSE`
pub const CLOSE: u32 = 7;
/// `TCP_CLOSE_WAIT`
pub const CLOSE_WAIT: u32 = 8;
/// `TCP_LAST_ACK`
pub const LAST_ACK: u32 = 9;
/// `TCP_LISTEN`
pub const LISTEN: u32 = 10;
/// `TCP_CLOSING`
pub const CLOSING: u32 = 11;

const TCP: u32 = libc::IPPROTO_TCP as u32;
/// Minor number of multipath TCP, which is a socket of its own kind.
const MPTCP: u32 = 262;

const DCCP: u32 = 33;
const L2TP: u32 = 115;

/// Surveys a TCP, UDP, UDP-Lite, ICMP echo or raw socket; `kind` is `SOCK_*`, `protocol` `IPPROTO_*`.
///
/// # Errors
/// It is connected and no option says what to do with it, or it has state that the image format has no place for.
pub fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    family: i32,
    kind: i32,
    protocol: i32,
) -> Result<(u32, FdTypes), Problem> {
    let echo = matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6);
    match protocol as u32 {
        _ if kind == libc::SOCK_RAW || echo => {}
        TCP => {}
        MPTCP => {
            return Err(view.problem("multipath TCP sockets cannot be saved").remedy(
                "run the program with multipath TCP switched off (sysctl net.mptcp.enabled=0)",
            ));
        }
        _ if matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => {}
        _ if protocol == libc::IPPROTO_SCTP => {
            return Err(view.problem("SCTP sockets cannot be saved"));
        }
        DCCP => return Err(view.problem("DCCP sockets cannot be saved")),
        L2TP => return Err(view.problem("L2TP sockets (tunnels) cannot be saved")),
        _ => {
            return Err(view.problem(format!("sockets of IP protocol {protocol} cannot be saved")));
        }
    }
    let fd = view.as_fd();
    let failed = |e: Errno| view.problem(format!("its address cannot be read: {e}"));
    let source = address(rustix::net::getsockname(fd).map_err(failed)?)
        .ok_or_else(|| view.problem("its address is of another family"))?;
    let destination = match rustix::net::getpeername(fd) {
        Ok(peer) => peer.and_then(address),
        Err(Errno::NOTCONN) => None,
        Err(e) => return Err(failed(e)),
    };
    let mut entry = InetSkEntry {
        ino: view.stat.st_ino as u32,
        family: family as u32,
        r#type: kind as u32,
        proto: protocol as u32,
        state: if destination.is_some() { ESTABLISHED } else { CLOSE },
        src_port: source.port().into(),
        dst_port: destination.map_or(0, |d| d.port().into()),
        flags: view.flags,
        src_addr: words(source.ip(), family),
        dst_addr: words(destination.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |d| d.ip()), family),
        fown: view.owner()?,
        ifname: scope(view, source)?,
        ns_id: Some(SOCKETS_NETNS),
        tcp_opts: Some(TcpOptsEntry::default()),
        ..InetSkEntry::default()
    };
    if family == libc::AF_INET6 {
        let v6only = option_int(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
        entry.v6only = Some(v6only.map_err(|e| view.problem(e.to_string()))? != 0);
    }
    let mut datagrams = Vec::new();
    let mut memberships = Vec::new();
    let mut ended = None;
    let connection = if kind == libc::SOCK_STREAM {
        let connection;
        (connection, ended) = stream::survey(collector, view, &mut entry, source)?;
        connection
    } else {
        memberships = membership::survey(&mut collector.sockets, view, family)?;
        if raw::is_one(&entry) {
            raw::survey(collector, view, &mut entry)?;
        } else {
            datagrams = udp::survey(collector, view, &mut entry)?;
        }
        false
    };
    let held = connection && collector.options.tcp_established && !collector.options.tcp_close;
    let mut filter = Vec::new();
    if held {
        // Other options are read by other threads.
        filter = options::filter_of(view)?;
    } else {
        read_options(Making { fd, object: &view.object() }.into(), &mut entry)?;
    }
    entry.id = collector.new_id();
    let id = entry.id;
    if entry.state == LISTEN && kind == libc::SOCK_STREAM {
        accept_queue::note(collector, view, &entry)?;
    }
    let freely = entry.ip_opts.as_ref().and_then(|o| o.freebind) == Some(true);
    if !connection && !freely && !collector.sockets.is_local(source.ip()) {
        collector.extra_of(id).foreign_address = Some(true);
    }
    if ended.is_some() {
        collector.extra_of(id).ended = ended;
    }
    if !connection {
        reuseport::survey(collector, view, &entry)?;
    }
    if !datagrams.is_empty() || !memberships.is_empty() {
        let extra = collector.extra_of(id);
        (extra.datagrams, extra.memberships) = (datagrams, memberships);
    }
    if held {
        let fd = view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?;
        let at = collector.entries.len();
        let peer = ip_of(entry.family, &entry.dst_addr).unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        let peer = SocketAddr::new(peer, entry.dst_port as u16);
        let connection = stream::Connection::new(
            fd,
            view.object(),
            at,
            &entry,
            source,
            destination.unwrap_or(peer),
        );
        let job = connection.job(&mut collector.sockets, filter)?;
        collector.sockets.readers.add(job);
        collector.sockets.connections.push(connection);
    }
    collector.push(FileEntry {
        r#type: FdTypes::Inetsk as i32,
        id,
        isk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Inetsk))
}

/// Reads the options that the image has fields for.
pub(super) fn read_options(reading: Reading<'_>, entry: &mut InetSkEntry) -> Result<(), Problem> {
    let socket = reading.socket;
    entry.opts = options::read(reading, false)?;
    let raw = entry.ip_opts.take().and_then(|options| options.raw);
    entry.ip_opts = Some(IpOptsEntry { raw, ..ip::survey(reading, ip::kinds(entry))? });
    // A raw socket may have the number of TCP too.
    if entry.proto == TCP && entry.r#type as i32 == libc::SOCK_STREAM {
        let read = tcp_options(socket.fd);
        entry.tcp_opts = Some(read.map_err(|e| socket.problem(e.to_string()))?);
    }
    Ok(())
}

fn address(any: rustix::net::SocketAddrAny) -> Option<SocketAddr> {
    SocketAddr::try_from(any).ok()
}

/// An address as the image has it: its bytes, a word for four of them.
pub(super) fn words(ip: IpAddr, family: i32) -> Vec<u32> {
    let word = |bytes: &[u8]| bytes.first_chunk().map(|b| u32::from_ne_bytes(*b));
    match ip {
        IpAddr::V6(ip) => ip.octets().chunks(4).filter_map(word).collect(),
        // What is not connected has no address of its family.
        IpAddr::V4(_) if family == libc::AF_INET6 => vec![0; 4],
        IpAddr::V4(ip) => ip.octets().chunks(4).filter_map(word).collect(),
    }
}

/// The interface that a link-local address belongs to.
fn scope(view: &View<'_>, source: SocketAddr) -> Result<Option<Vec<u8>>, Problem> {
    match source {
        SocketAddr::V6(source) if source.scope_id() != 0 => {
            rustix::net::netdevice::index_to_name(view.as_fd(), source.scope_id())
                .map(|name| Some(name.into_bytes()))
                .map_err(|e| view.problem(format!("interface {}: {e}", source.scope_id())))
        }
        _ => Ok(None),
    }
}

/// Whether a socket of the image is a TCP connection.
#[must_use]
pub fn is_connection(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_STREAM && entry.dst_port != 0 && entry.state != LISTEN
}

/// Makes an internet socket of the image; of a connection, also what is still to be done for it.
///
/// # Errors
/// Its address is in use or does not exist here, or it is a connection and no option says what to do with it.
pub fn open(
    opener: &Opener<'_>,
    entry: &InetSkEntry,
) -> Result<(OwnedFd, Option<Pending>), Problem> {
    let object = describe(entry);
    let damaged =
        |what: &str| Problem::new(object.clone(), format!("the image has no valid {what}"));
    let family = AddressFamily::from_raw(
        u16::try_from(entry.family)
            .ok()
            .filter(|f| matches!(i32::from(*f), libc::AF_INET | libc::AF_INET6))
            .ok_or_else(|| damaged("address family"))?,
    );
    if !matches!(entry.r#type as i32, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_RAW) {
        return Err(damaged("socket type"));
    }
    let made = if raw::is_echo(entry) {
        raw::open_echo(family, entry.proto)
    } else {
        let protocol = RawProtocol::new(entry.proto).map(Protocol::from_raw);
        let kind = SocketType::from_raw(entry.r#type);
        rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, protocol)
            .map_err(|e| e.to_string())
    };
    let fd = made.map_err(|e| Problem::new(object.clone(), format!("cannot be made: {e}")))?;
    let making = Making { fd: fd.as_fd(), object: &object };
    let source = endpoint(entry, making.fd, &entry.src_addr, entry.src_port)
        .ok_or_else(|| damaged("address"))??;
    let destination = endpoint(entry, making.fd, &entry.dst_addr, entry.dst_port)
        .ok_or_else(|| damaged("address of the peer"))??;
    let stream = entry.r#type as i32 == libc::SOCK_STREAM;
    super::apply_own(opener, entry.id, making, When::BeforeBind)?;
    if is_connection(entry) {
        let pending = super::repair::open(opener, entry, making, source, destination)?;
        return Ok((fd, pending));
    }
    if opener.extra.get(&entry.id).is_some_and(|extra| extra.ended.is_some()) {
        ended::prepare(making, entry)?;
        return Ok((fd, None));
    }
    ip::apply_before_bind(making, entry)?;
    // A server's port is not free while connections of its last run linger (TIME_WAIT); UDP has none.
    options::apply_before_bind(making, &entry.opts, stream)?;
    // The port of a raw socket is its protocol.
    let port = entry.src_port != 0 && entry.r#type as i32 != libc::SOCK_RAW;
    if opener.sockets.sharing.as_ref().is_some_and(|ids| ids.contains(&entry.id)) {
        making.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT", 1)?;
    }
    // Those who share a port have to have the same owner.
    super::set_owner(opener, entry.id, making);
    let mut bound = Bound::Usual;
    if port || !source.ip().is_unspecified() {
        let extra = opener.extra.get(&entry.id);
        let foreign = extra.is_some_and(|e| e.foreign_address == Some(true));
        // It works for both families.
        let freely = |on| making.set(libc::IPPROTO_IP, libc::IP_FREEBIND, "IP_FREEBIND", on);
        if foreign {
            freely(1)?;
        }
        bound = bind::bind(making, entry, source)?;
        if foreign {
            freely(0)?;
        }
    }
    if let Some(extra) = opener.extra.get(&entry.id).filter(|_| !stream) {
        datagram::give_back(making, entry, source, &extra.datagrams)?;
        membership::join(making, &extra.memberships)?;
    }
    if stream && entry.state == LISTEN {
        bind::listen(making, entry, source)?;
    } else if entry.dst_port != 0 || (!stream && !destination.ip().is_unspecified()) {
        rustix::net::connect(making.fd, &destination)
            .map_err(|e| making.problem(format!("cannot be connected to {destination}: {e}")))?;
    }
    if bound == Bound::Sharing {
        bind::alone(making)?;
    }
    ip::apply(making, entry)?;
    raw::apply(making, entry)?;
    options::apply(making, &entry.opts)?;
    if stream {
        apply_tcp(making, entry)?;
    }
    let shutdown = entry.shutdown.unwrap_or(0);
    if shutdown != 0 {
        shut_down(making, shutdown)?;
    }
    Ok((fd, None))
}

/// Shuts a socket down in the directions of the image (`SkShutdown`).
pub(super) fn shut_down(making: Making<'_>, directions: i32) -> Result<(), Problem> {
    use rustix::net::Shutdown;
    let how = match SkShutdown::try_from(directions) {
        Ok(SkShutdown::None) => return Ok(()),
        Ok(SkShutdown::Read) => Shutdown::Read,
        Ok(SkShutdown::Write) => Shutdown::Write,
        Ok(SkShutdown::Both) => Shutdown::Both,
        Err(_) => return Err(making.problem("the image has no valid shutdown state")),
    };
    match rustix::net::shutdown(making.fd, how) {
        // It takes effect all the same.
        Ok(()) | Err(Errno::NOTCONN) => Ok(()),
        Err(e) => Err(making.problem(format!("cannot be shut down: {e}"))),
    }
}

/// Options of tcp(7), as they are in a socket.
pub(super) fn tcp_options(fd: BorrowedFd<'_>) -> Result<TcpOptsEntry, SyscallError> {
    let number = |name| option_int(fd, libc::IPPROTO_TCP, name);
    let positive = |value: i32| (value != 0).then_some(value as u32);
    Ok(TcpOptsEntry {
        cork: (number(libc::TCP_CORK)? != 0).then_some(true),
        nodelay: (number(libc::TCP_NODELAY)? != 0).then_some(true),
        keepcnt: positive(number(libc::TCP_KEEPCNT)?),
        keepidle: positive(number(libc::TCP_KEEPIDLE)?),
        keepintvl: positive(number(libc::TCP_KEEPINTVL)?),
    })
}

/// Sets the options of tcp(7).
pub(super) fn apply_tcp(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    let Some(options) = &entry.tcp_opts else { return Ok(()) };
    let now = tcp_options(making.fd).map_err(|e| making.problem(e.to_string()))?;
    let set = |name, what: &str, now: Option<u32>, wanted: Option<u32>| match wanted {
        Some(value) if now != wanted => making.set(libc::IPPROTO_TCP, name, what, value as i32),
        _ => Ok(()),
    };
    let flag = |value: Option<bool>| value.map(u32::from);
    set(libc::TCP_NODELAY, "TCP_NODELAY", flag(now.nodelay), flag(options.nodelay))?;
    set(libc::TCP_CORK, "TCP_CORK", flag(now.cork), flag(options.cork))?;
    set(libc::TCP_KEEPCNT, "TCP_KEEPCNT", now.keepcnt, options.keepcnt)?;
    set(libc::TCP_KEEPIDLE, "TCP_KEEPIDLE", now.keepidle, options.keepidle)?;
    set(libc::TCP_KEEPINTVL, "TCP_KEEPINTVL", now.keepintvl, options.keepintvl)
}

/// Address and port of the image; `None` if it has no valid ones.
fn endpoint(
    entry: &InetSkEntry,
    fd: BorrowedFd<'_>,
    address: &[u32],
    port: u32,
) -> Option<Result<SocketAddr, Problem>> {
    let ip = ip_of(entry.family, address)?;
    let port = u16::try_from(port).ok()?;
    let scope = match (&entry.ifname, ip) {
        (Some(name), IpAddr::V6(ip)) if ip.is_unicast_link_local() => {
            match super::interface_index(fd, name) {
                Ok(index) => index,
                Err(reason) => return Some(Err(Problem::new(describe(entry), reason))),
            }
        }
        _ => 0,
    };
    Some(Ok(match ip {
        IpAddr::V4(_) => SocketAddr::new(ip, port),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, scope).into(),
    }))
}

/// The address of a socket as `rewake.img` has it; `None` if it has no valid one.
pub(super) fn local_address(
    entry: &InetSkEntry,
    making: Making<'_>,
    octets: &[u8],
    port: u32,
) -> Option<Result<SocketAddr, Problem>> {
    let ip: IpAddr = match (entry.family as i32, octets.len()) {
        (libc::AF_INET, 4) => <[u8; 4]>::try_from(octets).ok()?.into(),
        (libc::AF_INET6, 16) => <[u8; 16]>::try_from(octets).ok()?.into(),
        _ => return None,
    };
    endpoint(entry, making.fd, &words(ip, entry.family as i32), port)
}

/// An address of the image.
fn ip_of(family: u32, words: &[u32]) -> Option<IpAddr> {
    match (family as i32, words) {
        (libc::AF_INET, [word, ..]) => Some(IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes()))),
        (libc::AF_INET6, [a, b, c, d, ..]) => {
            let mut octets = [0; 16];
            for (at, word) in octets.chunks_mut(4).zip([a, b, c, d]) {
                at.copy_from_slice(&word.to_ne_bytes());
            }
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        // Nothing is said of a peer that does not exist.
        (libc::AF_INET, []) => Some(Ipv4Addr::UNSPECIFIED.into()),
        (libc::AF_INET6, []) => Some(Ipv6Addr::UNSPECIFIED.into()),
        _ => None,
    }
}

/// Protocol and address of a socket that no other can have: one that listens, or receives datagrams.
#[must_use]
pub fn exclusive_address(entry: &InetSkEntry) -> Option<(u32, SocketAddr)> {
    let listens = entry.proto == TCP && entry.state == LISTEN;
    let datagrams = matches!(entry.proto as i32, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
    let set = |flag: Option<bool>| flag == Some(true);
    let shared = set(entry.opts.so_reuseport) || datagrams && set(entry.opts.reuseaddr);
    let port = u16::try_from(entry.src_port).ok()?;
    if !(listens || datagrams) || shared || port == 0 {
        return None;
    }
    Some((entry.proto, SocketAddr::new(ip_of(entry.family, &entry.src_addr)?, port)))
}

/// The file ids of the sockets of the image that can only be bound if they may share their ports: there are several at an
/// address, and not all say that they share it (`SO_REUSEPORT` counts when a socket is bound, and may change later).
pub(super) fn sharing(opener: &Opener<'_>) -> std::collections::HashSet<u32> {
    let mut by_port: HashMap<(u32, u32), Vec<(&InetSkEntry, IpAddr)>> = HashMap::new();
    for entry in opener.files.values().filter_map(|f| f.isk.as_deref()) {
        let bound = entry.src_port != 0 && !is_connection(entry);
        if bound
            && entry.r#type as i32 != libc::SOCK_RAW
            && let Some(ip) = ip_of(entry.family, &entry.src_addr)
        {
            by_port.entry((entry.proto, entry.src_port)).or_default().push((entry, ip));
        }
    }
    let set = |flag: Option<bool>| flag == Some(true);
    let shares =
        |e: &InetSkEntry| set(e.opts.so_reuseport) || e.proto != TCP && set(e.opts.reuseaddr);
    let meet = |a: IpAddr, b: IpAddr| {
        let (a, b) = (a.to_canonical(), b.to_canonical());
        a == b || a.is_unspecified() || b.is_unspecified()
    };
    let crowded = |all: &&Vec<(&InetSkEntry, IpAddr)>| {
        all.iter().any(|(e, _)| !shares(e))
            && all.iter().enumerate().any(|(i, (_, a))| all[..i].iter().any(|(_, b)| meet(*a, *b)))
    };
    let all = by_port.values().filter(crowded).flatten();
    all.map(|(entry, _)| entry.id).collect()
}

/// Both addresses of a connection of the image, IPv4 ones in IPv6 as IPv4.
pub(super) fn ends_of(entry: &InetSkEntry) -> Option<super::repair::Ends> {
    let end = |words: &[u32], port: u32| {
        Some((ip_of(entry.family, words)?.to_canonical(), u16::try_from(port).ok()?))
    };
    Some((end(&entry.src_addr, entry.src_port)?, end(&entry.dst_addr, entry.dst_port)?))
}

/// How error texts call a socket of the image.
#[must_use]
pub fn describe(entry: &InetSkEntry) -> String {
    let protocol = match entry.proto as i32 {
        _ if entry.r#type as i32 == libc::SOCK_RAW => "raw",
        libc::IPPROTO_TCP => "TCP",
        libc::IPPROTO_UDP => "UDP",
        libc::IPPROTO_UDPLITE => "UDP-Lite",
        libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => "ICMP echo",
        _ => "internet",
    };
    let show = |words: &[u32], port: u32| match ip_of(entry.family, words) {
        Some(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        Some(ip) => format!("{ip}:{port}"),
        None => "?".to_owned(),
    };
    let source = show(&entry.src_addr, entry.src_port);
    if entry.state == LISTEN {
        format!("{protocol} socket listening at {source}")
    } else if entry.dst_port != 0 {
        format!("{protocol} connection {source} to {}", show(&entry.dst_addr, entry.dst_port))
    } else {
        format!("{protocol} socket {source}")
    }
}

/// Whether a `getsockopt(2)` names a protocol on top of TCP (`TCP_ULP`), such as kernel TLS.
pub(super) fn upper_protocol(fd: BorrowedFd<'_>) -> Option<String> {
    const TCP_ULP: i32 = 31;
    let (name, length) = option::<16>(fd, libc::IPPROTO_TCP, TCP_ULP).ok()?;
    let name = name[..length].split(|b| *b == 0).next()?;
    (!name.is_empty()).then(|| crate::problem::text(name))
}

/// Puts `SO_REUSEADDR` back, which leaving repair mode clears.
pub(super) fn restore_reuse(fd: BorrowedFd<'_>, reuse: bool) -> Result<(), SyscallError> {
    if reuse {
        set_option_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    Ok(())
}

/// The state of a TCP socket.
pub(super) fn state(fd: BorrowedFd<'_>) -> Result<tcp::Info, SyscallError> {
    tcp::info(fd)
}
