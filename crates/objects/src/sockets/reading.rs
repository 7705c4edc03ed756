//! Reading socket options: what sock_diag(7) has told of a socket already need not be asked for again.

use super::options::Making;
use rewake_netlink::diag::Tcp;
use rewake_sys::SyscallError;
use rewake_sys::sockets::option_int;

/// A socket whose options are read.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// The socket.
    pub socket: Making<'a>,
    /// What is known of it.
    pub known: Option<&'a Tcp>,
    /// It is a TCP connection.
    pub connected: bool,
    /// Its classic BPF filter, if that is known.
    pub filter: Option<&'a [u64]>,
}

impl<'a> From<Making<'a>> for Reading<'a> {
    /// A socket of which nothing is known.
    fn from(socket: Making<'a>) -> Reading<'a> {
        Reading { socket, known: None, connected: false, filter: None }
    }
}

impl Reading<'_> {
    /// The value of an option that is an `int`.
    ///
    /// # Errors
    /// As getsockopt(2).
    pub fn int(&self, level: i32, name: i32) -> Result<i32, SyscallError> {
        match self.known.and_then(|known| value(known, level, name)) {
            Some(value) => Ok(value),
            None => option_int(self.socket.fd, level, name),
        }
    }

    /// Whether it is known that an option has this value.
    pub fn is_known(&self, level: i32, name: i32, wanted: &[u8]) -> bool {
        let Some(known) = self.known else { return false };
        if (level, name) == (libc::IPPROTO_TCP, libc::TCP_CONGESTION) {
            let name = wanted.split(|b| *b == 0).next();
            return known.congestion.as_deref().is_some_and(|own| Some(own) == name);
        }
        value(known, level, name).is_some_and(|value| wanted == value.to_ne_bytes())
    }
}

/// The value of an option in a record of sock_diag, as getsockopt(2) would tell it.
fn value(known: &Tcp, level: i32, name: i32) -> Option<i32> {
    let flag = |bit| known.flags.map(|flags| i32::from(flags & bit != 0));
    match (level, name) {
        (libc::SOL_SOCKET, libc::SO_RCVBUF) => known.buffers.map(|(receive, _)| receive as i32),
        (libc::SOL_SOCKET, libc::SO_SNDBUF) => known.buffers.map(|(_, send)| send as i32),
        (libc::SOL_SOCKET, libc::SO_MARK) => known.mark.map(|mark| mark as i32),
        (libc::IPPROTO_IP, libc::IP_TOS) => known.tos.map(i32::from),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => known.traffic_class.map(i32::from),
        (libc::IPPROTO_IP, libc::IP_RECVERR) => flag(Tcp::RECVERR),
        (libc::IPPROTO_IP, RECVERR_RFC4884) => flag(Tcp::RECVERR_RFC4884),
        (libc::IPPROTO_IP, libc::IP_FREEBIND) | (libc::IPPROTO_IPV6, V6_FREEBIND) => {
            flag(Tcp::FREEBIND)
        }
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT) | (libc::IPPROTO_IPV6, V6_TRANSPARENT) => {
            flag(Tcp::TRANSPARENT)
        }
        (libc::IPPROTO_IP, MULTICAST_ALL) => flag(Tcp::MULTICAST_ALL),
        (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT) => flag(Tcp::BIND_ADDRESS_NO_PORT),
        _ => None,
    }
}

/// `IP_RECVERR_RFC4884`
const RECVERR_RFC4884: i32 = 26;
/// `IP_MULTICAST_ALL`
const MULTICAST_ALL: i32 = 49;
/// `IPV6_FREEBIND`
const V6_FREEBIND: i32 = 78;
/// `IPV6_TRANSPARENT`
const V6_TRANSPARENT: i32 = 75;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets::option_table::{Kinds, OPTIONS};
    use rewake_netlink::diag;
    use rewake_sys::sockets::{option, set_option_int};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    /// Every option that both tell of has the same value, as it is and after it was changed.
    #[test]
    fn sock_diag_and_getsockopt_agree() {
        for (family, address) in [(libc::AF_INET, "127.0.0.1:0"), (libc::AF_INET6, "[::1]:0")] {
            let listener = TcpListener::bind(address).unwrap();
            let plain = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let changed = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let kinds = Kinds::of(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
            let mut set = 0;
            for row in OPTIONS.iter().filter(|row| row.kinds.any(kinds)) {
                let odd = match row.name {
                    "IP_TOS" | "IPV6_TCLASS" => 8,
                    "SO_MARK" => 7,
                    "IP_RECVERR"
                    | "IP_FREEBIND"
                    | "IPV6_FREEBIND"
                    | "IP_RECVERR_RFC4884"
                    | "IP_TRANSPARENT"
                    | "IPV6_TRANSPARENT"
                    | "IP_BIND_ADDRESS_NO_PORT" => 1,
                    "IP_MULTICAST_ALL" => 0,
                    _ => continue,
                };
                // Without the capability some are refused.
                set +=
                    i32::from(set_option_int(changed.as_fd(), row.level, row.number, odd).is_ok());
            }
            assert!(set >= 4, "{set} options could be changed");
            let level = libc::SOL_SOCKET;
            set_option_int(changed.as_fd(), level, libc::SO_RCVBUF, 70_000).unwrap();
            set_option_int(changed.as_fd(), level, libc::SO_SNDBUF, 71_000).unwrap();
            let table = diag::tcp(&mut diag::open().unwrap(), family as u8).unwrap();
            for stream in [&plain, &changed] {
                let inode = rustix::fs::fstat(stream).unwrap().st_ino as u32;
                let known = &table[&inode];
                let mut told = 0;
                let asked = OPTIONS.iter().filter(|row| row.kinds.any(kinds));
                let buffers = [(level, libc::SO_RCVBUF), (level, libc::SO_SNDBUF)];
                for (level, name) in asked.map(|row| (row.level, row.number)).chain(buffers) {
                    if let Some(value) = value(known, level, name) {
                        told += 1;
                        assert_eq!(
                            option_int(stream.as_fd(), level, name),
                            Ok(value),
                            "{level} {name}"
                        );
                    }
                }
                assert!(told >= 5, "{told} options are known");
                let (level, name) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
                let (own, len) = option::<16>(stream.as_fd(), level, name).unwrap();
                let socket = Making { fd: stream.as_fd(), object: "a connection" };
                let reading = Reading { socket, known: Some(known), connected: true, filter: None };
                assert!(reading.is_known(level, name, &own[..len]));
                assert!(!reading.is_known(level, name, b"none of them"));
            }
        }
    }
}
