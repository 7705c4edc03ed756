//! The addresses of this host, as a socket sees them.

use rewake_netlink::{Socket, address};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::net::{IpAddr, SocketAddr};

/// May a socket be bound to `ip` in the network namespace of the caller? The kernel knows of more than interfaces: all of
/// 127.0.0.0/8, and what local routes say.
#[must_use]
pub fn is_local(ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    // Whatever else is wrong with it is told when it is used.
    socket
        .is_ok_and(|fd| rustix::net::bind(&fd, &SocketAddr::new(ip, 0)) != Err(Errno::ADDRNOTAVAIL))
}

/// The addresses of all interfaces, as text for errors.
#[must_use]
pub fn list() -> String {
    let all = Socket::open(libc::NETLINK_ROUTE).and_then(|mut s| address::addresses(&mut s));
    match all {
        Ok(all) => all.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", "),
        Err(e) => format!("(unknown: {e})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_local() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(is_local("127.9.9.9".parse().unwrap()));
        assert!(!is_local("192.0.2.77".parse().unwrap()), "TEST-NET-1 is nobody's");
        assert!(list().contains("127.0.0.1"), "{}", list());
    }
}
