//! TCP sockets as zoo programs look at them.

use crate::{Check, check, ensure, ensure_eq, errno, ok};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// States of `TCP_INFO`.
pub mod state {
    #![allow(missing_docs, reason = "the kernel's names")]
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// An error as text.
pub fn err(e: io::Error) -> String {
    e.to_string()
}

/// How many ports a program may bind.
pub const PORTS: u16 = 64;

/// Binds to a port of the program's own: the next of the [`PORTS`] from `$ZOO_PORTS`, which the harness gives to nobody
/// else and the kernel to nobody at all. A port that the kernel chooses could be somebody else's between dump and restore.
/// Where there is no harness the kernel chooses (port 0).
pub fn on_own_port<T>(mut bind: impl FnMut(u16) -> io::Result<T>) -> io::Result<T> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let Some(first) = std::env::var("ZOO_PORTS").ok().and_then(|first| first.parse().ok()) else {
        return bind(0);
    };
    let first: u16 = first;
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        if n >= PORTS {
            return Err(io::Error::other("all ports of the program are bound"));
        }
        match bind(first + n) {
            // A connection of an earlier program lingers.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
}

fn ip(ip: &str) -> io::Result<IpAddr> {
    ip.parse().map_err(|e| io::Error::other(format!("{ip}: {e}")))
}

/// A TCP socket that listens at a port of the program's own.
pub fn listener(at: &str) -> Result<TcpListener, String> {
    ip(at)
        .and_then(|ip| on_own_port(|port| TcpListener::bind((ip, port))))
        .map_err(|e| format!("listen at {at}: {e}"))
}

/// A UDP socket at a port of the program's own.
pub fn udp(at: &str) -> Result<UdpSocket, String> {
    ip(at)
        .and_then(|ip| on_own_port(|port| UdpSocket::bind((ip, port))))
        .map_err(|e| format!("bind to {at}: {e}"))
}

/// A connected pair by way of the listener: the client's end, the server's; both give up reading after ten seconds.
pub fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream), String> {
    let client = TcpStream::connect(listener.local_addr().map_err(err)?).map_err(err)?;
    let (server, _) = listener.accept().map_err(err)?;
    for s in [&client, &server] {
        s.set_read_timeout(Some(Duration::from_secs(10))).map_err(err)?;
    }
    Ok((client, server))
}

/// The socket's state, as the kernel numbers it.
pub fn tcp_state(socket: &impl AsRawFd) -> Result<u8, String> {
    let mut info = [0u8; 104];
    get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info[0])
}

/// Waits until the socket is in the state.
pub fn await_state(socket: &impl AsRawFd, state: u8, what: &str) -> Check {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let now = tcp_state(socket)?;
        if now == state {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{what} is in TCP state {now}, not {state}");
        crate::nap(1);
    }
}

/// Reads a socket option; returns its length.
pub fn get(
    socket: &impl AsRawFd,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> Result<usize, String> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is live for `len` bytes.
    let ret = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len)
    };
    check(ret, &format!("getsockopt {level} {name}"))?;
    Ok(len as usize)
}

/// Reads an `int` option.
pub fn get_int(socket: &impl AsRawFd, level: i32, name: i32) -> Result<i32, String> {
    let mut value = [0; 4];
    get(socket, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets a socket option.
pub fn set(socket: &impl AsRawFd, level: i32, name: i32, value: &[u8]) -> Check {
    // SAFETY: `value` is live for its length.
    let ret = unsafe {
        let len = value.len() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), len)
    };
    check(ret, &format!("setsockopt {level} {name}"))
}

/// Sets an `int` option.
pub fn set_int(socket: &impl AsRawFd, level: i32, name: i32, value: i32) -> Check {
    set(socket, level, name, &value.to_ne_bytes())
}

/// A new socket of the family (`AF_*`).
pub fn socket(family: i32, kind: i32) -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new and ours.
    unsafe {
        let fd = ok(libc::socket(family, kind | libc::SOCK_CLOEXEC, 0).into(), "socket")?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn raw(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero is a valid address storage, and the two kinds of address fit into it.
    unsafe {
        let mut storage: libc::sockaddr_storage = std::mem::zeroed();
        let len = match address {
            SocketAddr::V4(a) => {
                let to = &mut *(&raw mut storage).cast::<libc::sockaddr_in>();
                to.sin_family = libc::AF_INET as u16;
                to.sin_port = a.port().to_be();
                to.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(a) => {
                let to = &mut *(&raw mut storage).cast::<libc::sockaddr_in6>();
                to.sin6_family = libc::AF_INET6 as u16;
                to.sin6_port = a.port().to_be();
                to.sin6_addr.s6_addr = a.ip().octets();
                to.sin6_scope_id = a.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        (storage, len as libc::socklen_t)
    }
}

/// bind(2); port 0 stands for one of the program's own.
pub fn bind(socket: &impl AsRawFd, address: SocketAddr) -> Check {
    let bind = |address: SocketAddr| {
        let (storage, len) = raw(address);
        // SAFETY: a local of that length.
        match unsafe { libc::bind(socket.as_raw_fd(), (&raw const storage).cast(), len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    match address.port() {
        0 => on_own_port(|port| bind(SocketAddr::new(address.ip(), port))),
        _ => bind(address),
    }
    .map_err(|e| format!("bind to {address}: {e}"))
}

/// listen(2)
pub fn listen(socket: &impl AsRawFd, backlog: i32) -> Check {
    // SAFETY: integers.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) }, "listen")
}

/// connect(2): 0 or the error number.
pub fn connect(socket: &impl AsRawFd, address: SocketAddr) -> i32 {
    let (storage, len) = raw(address);
    // SAFETY: a local of that length.
    let ret = unsafe { libc::connect(socket.as_raw_fd(), (&raw const storage).cast(), len) };
    if ret == 0 { 0 } else { errno() }
}

/// send(2) without SIGPIPE: how many bytes, or the error number, negative.
pub fn send(socket: &impl AsRawFd, data: &[u8], flags: i32) -> i64 {
    // SAFETY: `data` is live for its length.
    let n = unsafe {
        let flags = flags | libc::MSG_NOSIGNAL;
        libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags)
    };
    if n < 0 { -i64::from(errno()) } else { n as i64 }
}

/// recv(2): how many bytes, or the error number, negative.
pub fn recv(socket: &impl AsRawFd, data: &mut [u8], flags: i32) -> i64 {
    // SAFETY: `data` is live for its length.
    let n = unsafe { libc::recv(socket.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
    if n < 0 { -i64::from(errno()) } else { n as i64 }
}

/// poll(2) for everything: what the socket is ready for.
pub fn poll(socket: &impl AsRawFd, timeout: i32) -> Result<i16, String> {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLPRI | libc::POLLRDHUP;
    poll_for(socket, events, timeout)
}

/// poll(2) for `events`.
pub fn poll_for(socket: &impl AsRawFd, events: i16, timeout: i32) -> Result<i16, String> {
    let mut fd = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    // SAFETY: one local.
    check(unsafe { libc::poll(&mut fd, 1, timeout) }, "poll")?;
    Ok(fd.revents)
}

/// Sends without waiting until nothing more fits; how much that was.
pub fn stuff(socket: &impl AsRawFd) -> Result<usize, String> {
    let piece = [0x5au8; 16 << 10];
    let mut total = 0;
    let mut patience = 20;
    loop {
        match send(socket, &piece, libc::MSG_DONTWAIT) {
            n if n > 0 => total += n as usize,
            n if n == -i64::from(libc::EAGAIN) => {
                // What is under way may still make room.
                patience -= 1;
                if patience == 0 {
                    return Ok(total);
                }
                crate::nap(5);
            }
            n => return Err(format!("send: error {}", -n)),
        }
    }
}

/// How a socket looks whose connection a restore has closed.
pub fn is_closed(socket: &impl AsRawFd, what: &str) -> Check {
    let ready = poll(socket, 0)?;
    let hung_up = libc::POLLIN | libc::POLLOUT | libc::POLLHUP | libc::POLLRDHUP;
    ensure_eq!(ready, hung_up, "{what}: poll");
    ensure_eq!(tcp_state(socket)?, state::CLOSE, "{what}: state");
    ensure_eq!(get_int(socket, libc::SOL_SOCKET, libc::SO_ERROR)?, 0, "{what}: SO_ERROR");
    ensure_eq!(recv(socket, &mut [0; 8], 0), 0, "{what}: recv");
    ensure_eq!(send(socket, b"x", 0), -i64::from(libc::EPIPE), "{what}: send");
    let mut peer = [0u8; 128];
    let mut len = peer.len() as libc::socklen_t;
    // SAFETY: room of that length.
    let ret = unsafe { libc::getpeername(socket.as_raw_fd(), peer.as_mut_ptr().cast(), &mut len) };
    ensure_eq!((ret, errno()), (-1, libc::ENOTCONN), "{what}: getpeername");
    let mut own = [0u8; 128];
    let mut len = own.len() as libc::socklen_t;
    // SAFETY: room of that length.
    check(
        unsafe { libc::getsockname(socket.as_raw_fd(), own.as_mut_ptr().cast(), &mut len) },
        "getsockname",
    )?;
    ensure_eq!(own[2..4], [0, 0], "{what}: its port");
    Ok(())
}
