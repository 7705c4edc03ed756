//! Kernel state: UDP and UDP-Lite sockets of both families: bound, connected to each other, connected to nobody, half shut
//! down, bound to a device; with datagrams in their receive queues, empty ones among them, from senders that are gone
//! (`ZOO_EMPTY=1`: with empty queues).

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use zoo::{check, ensure, ensure_eq, ok};

/// A socket bound to a free port of the address.
fn bound(protocol: i32, ip: &str) -> Result<UdpSocket, String> {
    let ip: std::net::IpAddr = ip.parse().map_err(|e| format!("{ip}: {e}"))?;
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: integers; the descriptor is new.
    let socket = unsafe {
        let fd = libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol);
        UdpSocket::from_raw_fd(ok(fd as i64, "socket")? as i32)
    };
    zoo::net::bind(&socket, SocketAddr::new(ip, 0))?;
    socket.set_nonblocking(true).map_err(|e| e.to_string())?;
    Ok(socket)
}

fn local(socket: &UdpSocket) -> Result<SocketAddr, String> {
    socket.local_addr().map_err(|e| e.to_string())
}

fn is_empty() -> bool {
    std::env::var_os("ZOO_EMPTY").is_some()
}

/// What waits in the queue of another.
fn waiting() -> Vec<Vec<u8>> {
    if is_empty() { Vec::new() } else { vec![b"waiting".to_vec()] }
}

/// What is put into the queue of one socket.
fn letters() -> Vec<Vec<u8>> {
    if is_empty() {
        return Vec::new();
    }
    vec![
        b"first".to_vec(),
        Vec::new(),
        vec![0x5a; 9000],
        b"x".to_vec(),
        Vec::new(),
        vec![7; 60_000],
    ]
}

fn expect(socket: &UdpSocket, letters: &[Vec<u8>], from: SocketAddr, who: &str) -> zoo::Check {
    let mut room = vec![0; 1 << 16];
    for (i, letter) in letters.iter().enumerate() {
        let (n, peer) =
            socket.recv_from(&mut room).map_err(|e| format!("{who}: letter {i}: {e}"))?;
        ensure_eq!(n, letter.len(), "{who}: length of letter {i}");
        ensure!(&room[..n] == letter.as_slice(), "{who}: letter {i} has changed");
        ensure_eq!(peer, from, "{who}: sender of letter {i}");
    }
    let rest = socket.recv_from(&mut room).map(|(n, _)| n).map_err(|e| e.kind());
    ensure_eq!(rest, Err(std::io::ErrorKind::WouldBlock), "{who}: nothing else waits");
    Ok(())
}

fn talk(a: &UdpSocket, b: &UdpSocket, who: &str) -> zoo::Check {
    let mut room = [0; 16];
    for (from, to) in [(a, b), (b, a)] {
        from.send(b"ping").map_err(|e| format!("{who}: send: {e}"))?;
        let n = to.recv(&mut room).map_err(|e| format!("{who}: recv: {e}"))?;
        ensure_eq!(&room[..n], b"ping", "{who}");
    }
    Ok(())
}

/// A socket that has itself told to which address a datagram was sent, with one that was sent to 127.0.0.5.
fn told() -> Result<UdpSocket, String> {
    let socket = bound(libc::IPPROTO_UDP, "0.0.0.0")?;
    zoo::net::set_int(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    let to = SocketAddr::from(([127, 0, 0, 5], local(&socket)?.port()));
    for letter in waiting() {
        bound(libc::IPPROTO_UDP, "127.0.0.1")?.send_to(&letter, to).map_err(|e| e.to_string())?;
    }
    Ok(socket)
}

/// To which address the datagram was sent.
fn destination(socket: &UdpSocket) -> Result<[u8; 4], String> {
    let (mut data, mut control) = ([0u8; 64], [0u64; 16]);
    // SAFETY: all-zero is a valid header; data and control are live and as long as it says.
    unsafe {
        let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        ok(libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) as i64, "recvmsg")?;
    }
    // struct cmsghdr, then struct in_pktinfo: the address of the header is its third part.
    ensure_eq!(control[1] >> 32, libc::IP_PKTINFO as u64, "type of the control message");
    Ok((control[3] as u32).to_ne_bytes())
}

struct Group {
    name: String,
    queue: UdpSocket,
    sender: SocketAddr,
    pair: (UdpSocket, UdpSocket),
    half: UdpSocket,
    device: UdpSocket,
    addresses: Vec<SocketAddr>,
}

fn make(name: &str, protocol: i32, ip: &str, any: &str) -> Result<Group, String> {
    let queue = bound(protocol, ip)?;
    let sender = {
        let sender = bound(protocol, ip)?;
        for letter in letters() {
            sender.send_to(&letter, local(&queue)?).map_err(|e| format!("{name}: send: {e}"))?;
        }
        local(&sender)?
    };
    let pair = (bound(protocol, ip)?, bound(protocol, any)?);
    let to = SocketAddr::new(local(&queue)?.ip(), local(&pair.1)?.port());
    pair.0.connect(to).map_err(|e| e.to_string())?;
    pair.1.connect(local(&pair.0)?).map_err(|e| e.to_string())?;
    for letter in waiting() {
        pair.0.send(&letter).map_err(|e| e.to_string())?;
    }
    let half = bound(protocol, ip)?;
    half.connect(local(&queue)?).map_err(|e| e.to_string())?;
    // SAFETY: integers.
    check(unsafe { libc::shutdown(half.as_raw_fd(), libc::SHUT_WR) }, "shutdown")?;
    let device = bound(protocol, any)?;
    // SAFETY: the name is live for its length.
    let bind = unsafe {
        libc::setsockopt(
            device.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            c"lo".as_ptr().cast(),
            3,
        )
    };
    check(bind, "SO_BINDTODEVICE")?;
    let mut group =
        Group { name: name.to_owned(), queue, sender, pair, half, device, addresses: Vec::new() };
    group.addresses = addresses(&group)?;
    Ok(group)
}

fn addresses(group: &Group) -> Result<Vec<SocketAddr>, String> {
    [&group.queue, &group.pair.0, &group.pair.1, &group.half, &group.device]
        .map(local)
        .into_iter()
        .collect()
}

fn verify(group: &Group) -> zoo::Check {
    let name = &group.name;
    ensure_eq!(addresses(group)?, group.addresses, "{name}: addresses");
    expect(&group.queue, &letters(), group.sender, name)?;
    expect(&group.pair.1, &waiting(), local(&group.pair.0)?, "pair")?;
    ensure_eq!(group.pair.0.peer_addr().ok(), Some(local(&group.pair.1)?), "{name}: peer");
    talk(&group.pair.0, &group.pair.1, name)?;
    let sent = group.half.send(b"no").map_err(|e| e.kind());
    ensure_eq!(sent, Err(std::io::ErrorKind::BrokenPipe), "{name}: sending after a shutdown");
    let outside = bound(libc::IPPROTO_UDP, "127.0.0.1")?;
    ensure!(local(&outside)?.port() != group.addresses[0].port(), "{name}: the port is free");
    let mut device = [0u8; 16];
    let mut len = device.len() as libc::socklen_t;
    // SAFETY: there is room for `len` bytes.
    let ret = unsafe {
        libc::getsockopt(
            group.device.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            device.as_mut_ptr().cast(),
            &mut len,
        )
    };
    check(ret, "SO_BINDTODEVICE")?;
    ensure_eq!(&device[..len as usize], b"lo\0", "{name}: device");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let mut groups = vec![make("UDP", libc::IPPROTO_UDP, "127.0.0.1", "0.0.0.0")?];
        let v6 = std::path::Path::new("/proc/net/if_inet6").exists();
        if v6 {
            groups.push(make("UDP of IPv6", libc::IPPROTO_UDP, "::1", "::")?);
        }
        match make("UDP-Lite", libc::IPPROTO_UDPLITE, "127.0.0.1", "0.0.0.0") {
            Ok(group) => groups.push(group),
            // Taken out of the kernel in some later version.
            Err(e) if e.contains("not supported") => println!("UDP-Lite: {e}"),
            Err(e) => return Err(e),
        }
        if v6 && groups.len() == 3 {
            groups.push(make("UDP-Lite of IPv6", libc::IPPROTO_UDPLITE, "::1", "::")?);
        }
        // A socket of both families that a sender of the older one has written to.
        let both = v6.then(|| bound(libc::IPPROTO_UDP, "::")).transpose()?;
        let old = bound(libc::IPPROTO_UDP, "127.0.0.1")?;
        if let Some(both) = &both {
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, local(both)?.port()));
            for letter in waiting() {
                old.send_to(&letter, to).map_err(|e| e.to_string())?;
            }
        }
        let unbound = ok(
            // SAFETY: integers.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) } as i64,
            "socket",
        )?;
        // SAFETY: the descriptor is new.
        let unbound = unsafe { UdpSocket::from_raw_fd(unbound as i32) };
        let told = told()?;
        z.ready()?;
        z.wait_for_check();
        for group in &groups {
            verify(group)?;
        }
        if let Some(both) = &both {
            let from = match local(&old)? {
                SocketAddr::V4(a) => SocketAddr::from((a.ip().to_ipv6_mapped(), a.port())),
                other => other,
            };
            expect(both, &waiting(), from, "both families")?;
        }
        if !is_empty() {
            ensure_eq!(destination(&told)?, [127, 0, 0, 5], "destination");
        }
        ensure_eq!(local(&unbound)?.port(), 0, "port of an unbound socket");
        Ok(())
    })
}
