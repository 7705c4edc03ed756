//! Kernel state: multicast groups that UDP sockets of both families have joined: any source, all but some, only some. Who
//! sends to the groups of IPv4 afterwards is heard or not accordingly; the loopback has no routes for those of IPv6. And senders
//! that have chosen an interface by its number, which nothing reads back (`IP_MULTICAST_IF`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use zoo::ensure_eq;
use zoo::net::{bind, get, poll, recv, set, set_int, socket};

const JOIN: i32 = 42;
const BLOCK: i32 = 43;
const JOIN_SOURCE: i32 = 46;
/// The loopback's number.
const LO: u32 = 1;

fn storage(ip: IpAddr) -> Vec<u8> {
    let mut bytes = vec![0; 128];
    match ip {
        IpAddr::V4(ip) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            bytes[8..24].copy_from_slice(&ip.octets());
        }
    }
    bytes
}

fn join(fd: &OwnedFd, option: i32, group: &str, source: Option<&str>) -> zoo::Check {
    let ip = |text: &str| text.parse::<IpAddr>().map_err(|e| e.to_string());
    let group = ip(group)?;
    let mut request = [LO.to_ne_bytes(), [0; 4]].concat();
    request.extend(storage(group));
    if let Some(source) = source {
        request.extend(storage(ip(source)?));
    }
    let level = if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    set(fd, level, option, &request)
}

fn listener(port: u16, v6: bool) -> Result<OwnedFd, String> {
    let (family, any): (i32, IpAddr) = if v6 {
        (libc::AF_INET6, Ipv6Addr::UNSPECIFIED.into())
    } else {
        (libc::AF_INET, Ipv4Addr::UNSPECIFIED.into())
    };
    let fd = socket(family, libc::SOCK_DGRAM)?;
    set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    // Only groups of its own.
    let (level, all) = if v6 { (libc::IPPROTO_IPV6, 29) } else { (libc::IPPROTO_IP, 49) };
    set_int(&fd, level, all, 0)?;
    bind(&fd, SocketAddr::new(any, port))?;
    Ok(fd)
}

/// Sends to a group of IPv4 from an address, on the loopback.
fn send(from: &str, group: &str, port: u16) -> zoo::Check {
    let ip = |text: &str| text.parse::<IpAddr>().map_err(|e| e.to_string());
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    bind(&fd, SocketAddr::new(ip(from)?, 0))?;
    let request = [[0; 4], [0; 4], LO.to_ne_bytes()].concat();
    set(&fd, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &request)?;
    let to = SocketAddr::new(ip(group)?, port);
    UdpSocket::from(fd).send_to(b"all", to).map_err(|e| format!("{from} to {group}: {e}"))?;
    Ok(())
}

fn heard(fd: &OwnedFd) -> Result<bool, String> {
    let something = poll(fd, 50)? & libc::POLLIN != 0;
    let mut room = [0; 16];
    while recv(fd, &mut room, libc::MSG_DONTWAIT) >= 0 {}
    Ok(something)
}

/// Who is heard: each listener, sender and group.
fn matrix(fds: &[OwnedFd], port: u16) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for sender in ["127.0.0.1", "127.0.0.2"] {
        for group in ["239.7.7.7", "239.7.7.8"] {
            send(sender, group, port)?;
            for (i, fd) in fds.iter().enumerate() {
                if heard(fd)? {
                    all.push(format!("{i} hears {sender} in {group}"));
                }
            }
        }
    }
    Ok(all)
}

/// The filters of each listener: `struct group_filter` as the kernel gives it.
fn filters(fds: &[OwnedFd], groups: &[&str]) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for (i, fd) in fds.iter().enumerate() {
        for group in groups {
            let ip: IpAddr = group.parse().map_err(|_| "address")?;
            let mut value = [LO.to_ne_bytes(), [0; 4]].concat();
            value.extend(storage(ip));
            value.extend([[0; 4], 3u32.to_ne_bytes()].concat());
            value.resize(144 + 3 * 128, 0);
            let level = if ip.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
            match get(fd, level, 48, &mut value) {
                Ok(n) => all.push(format!("{i} in {group}: {:?}", &value[136..n])),
                Err(_) => all.push(format!("{i} not in {group}")),
            }
        }
    }
    Ok(all)
}

/// Sockets that send by way of the loopback, chosen by its number, and an address besides.
fn senders() -> Result<Vec<(OwnedFd, [u8; 4])>, String> {
    let mut all = Vec::new();
    for (v6, address) in [(false, [0; 4]), (false, [10, 78, 9, 9]), (true, [0; 4])] {
        if v6 && !std::path::Path::new("/proc/net/if_inet6").exists() {
            continue;
        }
        let (family, own) =
            if v6 { (libc::AF_INET6, "::ffff:127.0.0.1") } else { (libc::AF_INET, "127.0.0.1") };
        let fd = socket(family, libc::SOCK_DGRAM)?;
        bind(&fd, SocketAddr::new(own.parse::<IpAddr>().map_err(|e| e.to_string())?, 0))?;
        let request = [[0; 4], address, LO.to_ne_bytes()].concat();
        set(&fd, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &request)?;
        all.push((fd, address));
    }
    Ok(all)
}

/// What they send is heard.
fn are_heard(senders: &[(OwnedFd, [u8; 4])], fds: &[OwnedFd], port: u16) -> zoo::Check {
    for (sender, address) in senders {
        let fd = sender.try_clone().map_err(|e| e.to_string())?;
        let socket = UdpSocket::from(fd);
        let v6 = socket.local_addr().map_err(|e| e.to_string())?.is_ipv6();
        let group = if v6 { "::ffff:239.7.7.7" } else { "239.7.7.7" };
        let to = SocketAddr::new(group.parse::<IpAddr>().map_err(|e| e.to_string())?, port);
        socket.send_to(b"all", to).map_err(|e| format!("to {to}: {e}"))?;
        ensure_eq!(heard(&fds[0])?, true, "whether a sender is heard");
        for fd in &fds[1..] {
            heard(fd)?;
        }
        let mut now = [0; 4];
        ensure_eq!(get(sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &mut now), Ok(4), "length");
        ensure_eq!(&now, address, "IP_MULTICAST_IF");
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let mut sets = Vec::new();
        for v6 in [false, true] {
            if v6 && !std::path::Path::new("/proc/net/if_inet6").exists() {
                continue;
            }
            let first = listener(0, v6)?;
            let port = {
                let socket =
                    std::net::UdpSocket::from(first.try_clone().map_err(|e| e.to_string())?);
                socket.local_addr().map_err(|e| e.to_string())?.port()
            };
            let (group, other, source) = if v6 {
                ("ff05::77", "ff05::78", "::1")
            } else {
                ("239.7.7.7", "239.7.7.8", "127.0.0.1")
            };
            join(&first, JOIN, group, None)?;
            let (only, but, none) = (listener(port, v6)?, listener(port, v6)?, listener(port, v6)?);
            join(&only, JOIN_SOURCE, group, Some(source))?;
            join(&only, JOIN, other, None)?;
            join(&but, JOIN, group, None)?;
            join(&but, BLOCK, group, Some(source))?;
            let fds = vec![first, only, but, none];
            let groups = [group, other];
            let heard = if v6 { Vec::new() } else { matrix(&fds, port)? };
            let joined = filters(&fds, &groups)?;
            println!("{heard:?} {joined:?}");
            ensure_eq!(joined.iter().filter(|f| f.contains(" in ")).count(), 8, "groups");
            ensure_eq!(joined.iter().filter(|f| f.contains("not in")).count(), 4, "not joined");
            ensure_eq!(heard.len(), if v6 { 0 } else { 6 }, "who is heard before the checkpoint");
            sets.push((v6, port, fds, groups, heard, joined));
        }
        let senders = senders()?;
        are_heard(&senders, &sets[0].2, sets[0].1)?;
        z.ready()?;
        z.wait_for_check();
        are_heard(&senders, &sets[0].2, sets[0].1)?;
        for (v6, port, fds, groups, heard, joined) in &sets {
            ensure_eq!(&filters(fds, groups)?, joined, "filters");
            if !v6 {
                ensure_eq!(&matrix(fds, *port)?, heard, "who is heard");
            }
        }
        Ok(())
    })
}
