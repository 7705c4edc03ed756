//! Kernel state: sockets that could not be bound again by what their options say now: listeners that share an address, but
//! not the option (SO_REUSEPORT); addresses that no interface has (IP_FREEBIND while binding); the packet sockets of old
//! (SOCK_PACKET), whose address is a name.
#![allow(unsafe_code, reason = "socket options and raw addresses")]

use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{bind, get_int, listen, set_int, socket};
use zoo::{check, ensure, ensure_eq, ok};

const PROTOCOL: u16 = 0x88b6;
const SOCK_PACKET: i32 = 10;

fn listener(port: u16, backlog: i32) -> Result<OwnedFd, String> {
    let fd = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    bind(&fd, ([127, 0, 0, 1], port).into())?;
    listen(&fd, backlog)?;
    Ok(fd)
}

/// A socket of old, bound to the loopback.
fn old() -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    let fd = unsafe {
        let kind = SOCK_PACKET | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_PACKET, kind, PROTOCOL.to_be().into());
        OwnedFd::from_raw_fd(ok(fd as i64, "socket(AF_PACKET, SOCK_PACKET)")? as i32)
    };
    let mut name = [0u8; 16];
    name[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    name[2..4].copy_from_slice(b"lo");
    // SAFETY: the address is live for its length.
    check(unsafe { libc::bind(fd.as_raw_fd(), name.as_ptr().cast(), 16) }, "bind by name")?;
    Ok(fd)
}

fn name_of(fd: &OwnedFd) -> Result<[u8; 16], String> {
    let mut name = [0u8; 16];
    let mut len = 16;
    // SAFETY: there is room for `len` bytes.
    check(
        unsafe { libc::getsockname(fd.as_raw_fd(), name.as_mut_ptr().cast(), &mut len) },
        "getsockname",
    )?;
    Ok(name)
}

fn main() {
    zoo::run(|z| {
        let port = 7101;
        let options = |fd: &OwnedFd| get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT);
        let listeners = [listener(port, 5)?, listener(port, 6)?, listener(port, 7)?];
        set_int(&listeners[0], libc::SOL_SOCKET, libc::SO_REUSEPORT, 0)?;
        set_int(&listeners[2], libc::SOL_SOCKET, libc::SO_REUSEPORT, 0)?;
        let mut foreign = Vec::new();
        for ip in ["192.0.2.71", "2001:db8::71"] {
            let ip: IpAddr = ip.parse().map_err(|_| "no address".to_owned())?;
            let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
                let fd = socket(family, kind)?;
                set_int(&fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
                bind(&fd, (ip, 7102).into())?;
                set_int(&fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 0)?;
                if kind == libc::SOCK_STREAM {
                    listen(&fd, 1)?;
                }
                foreign.push(fd);
            }
        }
        let packets = old()?;
        let name = name_of(&packets)?;
        z.ready()?;
        z.wait_for_check();
        for (fd, want) in listeners.iter().zip([0, 1, 0]) {
            ensure_eq!(options(fd)?, want, "SO_REUSEPORT");
        }
        // No more than each of them has room for.
        for _ in 0..5 {
            drop(TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("connect: {e}"))?);
        }
        for fd in &foreign {
            ensure_eq!(get_int(fd, libc::IPPROTO_IP, libc::IP_FREEBIND)?, 0, "IP_FREEBIND");
            let mut address = [0u8; 28];
            let mut len = 28;
            // SAFETY: there is room for `len` bytes.
            check(
                unsafe { libc::getsockname(fd.as_raw_fd(), address.as_mut_ptr().cast(), &mut len) },
                "getsockname",
            )?;
            ensure!(address.contains(&71) || address.contains(&0x71), "{address:?}");
        }
        ensure_eq!(name_of(&packets)?, name, "name of the interface");
        // A frame of its protocol reaches it.
        let sender = socket(libc::AF_PACKET, libc::SOCK_DGRAM)?;
        // SAFETY: all-zero is a valid address.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = PROTOCOL.to_be();
        to.sll_ifindex = 1;
        to.sll_halen = 6;
        let len = size_of_val(&to) as libc::socklen_t;
        // SAFETY: the address is live for its length.
        let bound = unsafe { libc::bind(sender.as_raw_fd(), (&raw const to).cast(), len) };
        check(bound, "bind")?;
        // SAFETY: text and address are live for their lengths.
        let sent = unsafe {
            libc::sendto(
                sender.as_raw_fd(),
                b"hello".as_ptr().cast(),
                5,
                0,
                (&raw const to).cast(),
                len,
            )
        };
        ensure_eq!(sent, 5, "sendto");
        let mut got = [0u8; 64];
        // SAFETY: a live buffer of that length.
        let count =
            unsafe { libc::recv(packets.as_raw_fd(), got.as_mut_ptr().cast(), got.len(), 0) };
        ensure!(count >= 5, "recv: {count}");
        ensure!(got[..count as usize].ends_with(b"hello"), "{:?}", &got[..count as usize]);
        Ok(())
    })
}
