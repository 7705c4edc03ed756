//! Binding an internet socket of the image to its address: also where connections linger that no process has any more. Who
//! has it otherwise, in words.
//!
//! A port that connections have which linger (`TIME_WAIT`) is free to a socket with `SO_REUSEADDR` only if they had it too.
//! A server that did not ask for it goes on listening beside such connections, but nobody could begin to: not until a minute
//! later. In repair mode the kernel lets a socket be bound to any port; it asks again when the socket is to listen, and
//! believes one that shares its port (`SO_REUSEPORT`) and was the last that was bound there.

use super::options::Making;
use super::{holder, raw};
use crate::Problem;
use rewake_image::messages::InetSkEntry;
use rewake_sys::sockets::{option, option_int, set_option};
use rewake_sys::tcp::{self, Repair};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::AsFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::net::SocketAddr;

/// How a socket was bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a socket that shares its port has to stop that"]
pub(super) enum Bound {
    /// As any other.
    Usual,
    /// Over connections that linger. It shares its port until [`alone`].
    Sharing,
}

/// Binds, and explains why it cannot be.
pub(super) fn bind(
    making: Making<'_>,
    entry: &InetSkEntry,
    source: SocketAddr,
) -> Result<Bound, Problem> {
    let errno = match rustix::net::bind(making.fd, &source) {
        Ok(()) => return Ok(Bound::Usual),
        Err(errno) => errno,
    };
    let stream = entry.r#type as i32 == libc::SOCK_STREAM;
    if errno != Errno::ADDRINUSE || !stream {
        return Err(problem(making, entry, source, errno));
    }
    let found = holder::in_the_way(entry.proto, source, is_v6only(entry));
    // The tree's own have been beside each other before.
    let foreign = holder::not_ours_alone(&found.inodes);
    if found.lingering.is_empty() || found.others != 0 || !foreign.is_empty() {
        return Err(in_use(making, source, &found));
    }
    let sharing = over(making, source).map_err(|e| match e.errno {
        Errno::PERM => in_use(making, source, &found),
        _ => making.problem(format!("cannot be bound to {source}: {e}")),
    })?;
    log::debug!("{}: bound over {} connections that linger", making.object, found.lingering.len());
    Ok(if sharing { Bound::Usual } else { Bound::Sharing })
}

/// Listens, and explains why it cannot.
pub(super) fn listen(
    making: Making<'_>,
    entry: &InetSkEntry,
    source: SocketAddr,
) -> Result<(), Problem> {
    rustix::net::listen(making.fd, entry.backlog as i32)
        .map_err(|e| problem(making, entry, source, e))
}

/// Binds whoever has the port. Returns whether the socket shares its port anyway.
fn over(making: Making<'_>, source: SocketAddr) -> Result<bool, SyscallError> {
    let level = libc::SOL_SOCKET;
    let shares = option_int(making.fd, level, libc::SO_REUSEPORT)? != 0;
    if !shares {
        set_option(making.fd, level, libc::SO_REUSEPORT, &1i32.to_ne_bytes())?;
    }
    let reuse = option_int(making.fd, level, libc::SO_REUSEADDR)?;
    tcp::repair(making.fd, Repair::On)?;
    let bound = rustix::net::bind(making.fd, &source);
    tcp::repair(making.fd, Repair::OffSilent)?;
    // Leaving repair mode clears it.
    set_option(making.fd, level, libc::SO_REUSEADDR, &reuse.to_ne_bytes())?;
    bound.map_err(|e| SyscallError::new("bind", e))?;
    Ok(shares)
}

/// Has a socket that is bound, and listens if it is to, share its port no longer.
///
/// # Errors
/// The kernel refuses it.
pub(super) fn alone(making: Making<'_>) -> Result<(), Problem> {
    making.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT", 0)?;
    match close_port(making) {
        // Without CAP_NET_ADMIN; whoever has the port's address and user id may join it.
        Err(e) if e.errno == Errno::PERM => Ok(()),
        other => {
            other.map_err(|e| making.problem(format!("its port cannot be closed to others: {e}")))
        }
    }
}

/// The kernel remembers of a port that all who are bound there share it, until one is bound that does not.
fn close_port(making: Making<'_>) -> Result<(), SyscallError> {
    let failed = |name| move |e| SyscallError::new(name, e);
    let (level, fd) = (libc::SOL_SOCKET, making.fd);
    if option_int(fd, level, libc::SO_PROTOCOL)? != libc::IPPROTO_TCP {
        return Ok(());
    }
    let address = rustix::net::getsockname(fd).map_err(failed("getsockname"))?;
    let Ok(address) = SocketAddr::try_from(address) else { return Ok(()) };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let other = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(failed("socket"))?;
    let (device, length) = option::<16>(fd, level, libc::SO_BINDTODEVICE)?;
    if length != 0 {
        set_option(other.as_fd(), level, libc::SO_BINDTODEVICE, &device[..length])?;
    }
    if !address.is_ipv4() {
        let v6only = option_int(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?;
        set_option(other.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &v6only.to_ne_bytes())?;
    }
    set_option(other.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, &1i32.to_ne_bytes())?;
    tcp::repair(other.as_fd(), Repair::On)?;
    rustix::net::bind(&other, &address).map_err(failed("bind"))
}

fn is_v6only(entry: &InetSkEntry) -> bool {
    entry.v6only == Some(true)
}

fn problem(making: Making<'_>, entry: &InetSkEntry, source: SocketAddr, errno: Errno) -> Problem {
    match errno {
        Errno::ADDRINUSE if raw::is_echo(entry) => {
            let inodes = raw::echo_inodes(entry.family, source.port()).into_iter().collect();
            let found = holder::InTheWay { inodes, ..holder::InTheWay::default() };
            in_use(making, source, &found)
        }
        Errno::ADDRINUSE => {
            in_use(making, source, &holder::in_the_way(entry.proto, source, is_v6only(entry)))
        }
        Errno::ADDRNOTAVAIL => making
            .problem(format!("no network interface here has the address {}", source.ip()))
            .remedy("add the address to an interface"),
        e => making.problem(format!("cannot be bound to {source}: {e}")),
    }
}

/// The problem that others have the address.
fn in_use(making: Making<'_>, source: SocketAddr, found: &holder::InTheWay) -> Problem {
    let by = |who: &str| making.problem(format!("address {source} is in use by {who}"));
    if let Some(holder) = holder::of_inodes(&found.inodes) {
        return by(&holder).remedy("end that process, or restore in another network namespace");
    }
    if !found.inodes.is_empty() || found.others != 0 {
        return by("a socket that no process here has").remedy(
            "its process may be in a PID namespace that is not seen here; or restore in another network namespace",
        );
    }
    let Some(first) = found.lingering.first() else {
        return making
            .problem(format!("address {source} is in use, and the kernel does not tell by whom"))
            .remedy("try again, or restore in another network namespace");
    };
    let [own, peer] = [first.source, first.destination].map(SocketAddr::from);
    let state = holder::lingers(first.state).unwrap_or("?");
    let more = match found.lingering.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    by(&format!(
        "a connection that no process has any more, {own} to {peer} ({state}){more}"
    ))
    .remedy("try again when it has ended, mostly within a minute; with CAP_NET_ADMIN in the network namespace rewake does not wait for that")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_netlink::diag;
    use rustix::fd::OwnedFd;
    use std::io::Read;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    fn socket() -> OwnedFd {
        rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap()
    }

    /// A port at which a connection of a socket without `SO_REUSEADDR` lingers.
    fn taken() -> SocketAddr {
        let server = socket();
        rustix::net::bind(&server, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        rustix::net::listen(&server, 1).unwrap();
        let server = TcpListener::from(server);
        let address = server.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        drop(server.accept().unwrap());
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        drop(client);
        address
    }

    fn entry() -> InetSkEntry {
        InetSkEntry {
            family: libc::AF_INET as u32,
            r#type: libc::SOCK_STREAM as u32,
            proto: libc::IPPROTO_TCP as u32,
            backlog: 3,
            ..InetSkEntry::default()
        }
    }

    #[test]
    fn a_port_at_which_connections_linger_is_bound_and_is_nobody_elses() {
        let address = taken();
        let fd = socket();
        let making = Making { fd: fd.as_fd(), object: "a socket" };
        let found = holder::in_the_way(entry().proto, address, false);
        assert!(found.inodes.is_empty() && found.others == 0, "{found:?}");
        assert!(!found.lingering.is_empty());
        let bound = match bind(making, &entry(), address) {
            Ok(bound) => bound,
            // Without the capability.
            Err(problem) => {
                let text = problem.to_string();
                let words = ["in use by a connection", "TIME_WAIT"];
                assert!(words.iter().all(|word| text.contains(word)), "{text}");
                return;
            }
        };
        assert_eq!(bound, Bound::Sharing);
        listen(making, &entry(), address).unwrap();
        alone(making).unwrap();
        let shares = |fd: &OwnedFd| option_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT);
        assert_eq!(shares(&fd), Ok(0));
        for option in [libc::SO_REUSEADDR, libc::SO_REUSEPORT] {
            let other = socket();
            set_option(other.as_fd(), libc::SOL_SOCKET, option, &1i32.to_ne_bytes()).unwrap();
            assert_eq!(rustix::net::bind(&other, &address), Err(Errno::ADDRINUSE), "{option}");
        }
        let client = TcpStream::connect(address).unwrap();
        let (_, peer) = TcpListener::from(fd).accept().unwrap();
        assert_eq!(client.local_addr().unwrap(), peer);
    }

    #[test]
    fn who_has_an_address_is_told() {
        let address = taken();
        let making_fd = socket();
        let making = Making { fd: making_fd.as_fd(), object: "a socket" };
        let lingering = holder::in_the_way(entry().proto, address, false).lingering;
        let one = *lingering.first().unwrap();
        let (peer, more) = (SocketAddr::from(one.destination), diag::Inet { state: 5, ..one });
        let found = holder::InTheWay { lingering: vec![one, more], ..Default::default() };
        let text = in_use(making, address, &found).to_string();
        let wanted = format!("no process has any more, {address} to {peer} (TIME_WAIT) and 1 more");
        assert!(text.contains(&wanted), "{text}");
        let found = holder::InTheWay { others: 1, ..Default::default() };
        let text = in_use(making, address, &found).to_string();
        assert!(text.contains("a socket that no process here has"), "{text}");
        let text = in_use(making, address, &holder::InTheWay::default()).to_string();
        assert!(text.contains("does not tell by whom"), "{text}");
    }
}
