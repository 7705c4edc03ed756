//! Kernel state: every option of tcp(7), and those of other levels that connections are used with, each with an unusual
//! value, on a listener, on both ends of a connection in the tree, on one whose peer is outside, on an IPv6 connection that
//! carries IPv4, and on a socket that is not connected. All are read again in the end, and the connections work.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use zoo::net::{self, err};
use zoo::{Check, Zoo, ensure, ensure_eq};

const T: i32 = libc::IPPROTO_TCP;
const S: i32 = libc::SOL_SOCKET;
const I: i32 = libc::IPPROTO_IP;

/// For which sockets an option is: where the kernel refuses it or decides it alone, it is not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    All,
    /// Those that are not connected.
    Loose,
    Listener,
}
use For::{All, Listener, Loose};

struct Row {
    name: &'static str,
    level: i32,
    number: i32,
    value: &'static [u8],
    on: For,
    /// A kernel without it is no failure.
    new: bool,
}

const fn row(name: &'static str, level: i32, number: i32, value: &'static [u8], on: For) -> Row {
    Row { name, level, number, value, on, new: false }
}

const fn new(name: &'static str, number: i32, value: &'static [u8]) -> Row {
    Row { name, level: T, number, value, on: All, new: true }
}

const fn int<const N: i32>() -> &'static [u8] {
    &const { N.to_ne_bytes() }
}

const ROWS: &[Row] = &[
    row("TCP_NODELAY", T, libc::TCP_NODELAY, int::<1>(), All),
    row("TCP_CORK", T, libc::TCP_CORK, int::<1>(), Listener),
    row("TCP_KEEPIDLE", T, libc::TCP_KEEPIDLE, int::<71>(), All),
    row("TCP_KEEPINTVL", T, libc::TCP_KEEPINTVL, int::<23>(), All),
    row("TCP_KEEPCNT", T, libc::TCP_KEEPCNT, int::<5>(), All),
    row("TCP_SYNCNT", T, libc::TCP_SYNCNT, int::<3>(), All),
    row("TCP_LINGER2", T, libc::TCP_LINGER2, int::<17>(), All),
    row("TCP_DEFER_ACCEPT", T, libc::TCP_DEFER_ACCEPT, int::<1>(), Loose),
    row("TCP_WINDOW_CLAMP", T, libc::TCP_WINDOW_CLAMP, int::<9000>(), All),
    row("TCP_CONGESTION", T, libc::TCP_CONGESTION, b"reno", All),
    row("TCP_MAXSEG", T, libc::TCP_MAXSEG, int::<1111>(), Loose),
    row("TCP_QUICKACK", T, libc::TCP_QUICKACK, int::<0>(), Listener),
    row("TCP_USER_TIMEOUT", T, libc::TCP_USER_TIMEOUT, int::<45_678>(), All),
    row("TCP_THIN_LINEAR_TIMEOUTS", T, libc::TCP_THIN_LINEAR_TIMEOUTS, int::<1>(), All),
    row("TCP_NOTSENT_LOWAT", T, 25, int::<12_345>(), All),
    row("TCP_FASTOPEN", T, libc::TCP_FASTOPEN, int::<6>(), Listener),
    row("TCP_FASTOPEN_KEY", T, 33, b"0123456789abcdef", Listener),
    new("TCP_SAVE_SYN", 27, int::<1>()),
    new("TCP_FASTOPEN_NO_COOKIE", 34, int::<1>()),
    new("TCP_INQ", 36, int::<1>()),
    new("TCP_RTO_MAX_MS", 44, int::<5000>()),
    new("TCP_RTO_MIN_US", 45, int::<300_000>()),
    new("TCP_DELACK_MAX_US", 46, int::<20_000>()),
    row("SO_REUSEADDR", S, libc::SO_REUSEADDR, int::<1>(), All),
    row("SO_REUSEPORT", S, libc::SO_REUSEPORT, int::<1>(), All),
    row("SO_KEEPALIVE", S, libc::SO_KEEPALIVE, int::<1>(), All),
    row("SO_MARK", S, libc::SO_MARK, int::<0x321>(), All),
    row("SO_SNDBUF", S, libc::SO_SNDBUF, int::<70_000>(), All),
    row("SO_RCVBUF", S, libc::SO_RCVBUF, int::<90_000>(), All),
    row("SO_RCVLOWAT", S, libc::SO_RCVLOWAT, int::<3>(), All),
    row("SO_OOBINLINE", S, libc::SO_OOBINLINE, int::<1>(), All),
    row("IP_TOS", I, libc::IP_TOS, int::<0x28>(), All),
    row("SO_PRIORITY", S, libc::SO_PRIORITY, int::<5>(), All),
    row("IP_TTL", I, libc::IP_TTL, int::<99>(), All),
    row("IP_MTU_DISCOVER", I, libc::IP_MTU_DISCOVER, int::<0>(), All),
    row("SO_LINGER", S, libc::SO_LINGER, b"\x01\0\0\0\x07\0\0\0", All),
    row("SO_RCVTIMEO", S, libc::SO_RCVTIMEO, b"\x15\0\0\0\0\0\0\0\x50\xc3\0\0\0\0\0\0", All),
];

/// Before a socket is bound.
const EARLY: &[Row] = &[
    row("IP_FREEBIND", I, libc::IP_FREEBIND, int::<1>(), All),
    row("IP_TRANSPARENT", I, libc::IP_TRANSPARENT, int::<1>(), All),
    row("IP_BIND_ADDRESS_NO_PORT", I, 24, int::<1>(), All),
    row("SO_BINDTODEVICE", S, libc::SO_BINDTODEVICE, b"lo", All),
];

fn set_all(rows: &[Row], socket: &impl AsRawFd, kind: For) -> Check {
    for row in rows.iter().filter(|r| r.on == All || kind == Listener || r.on == kind) {
        match net::set(socket, row.level, row.number, row.value) {
            Err(_) if row.new => {}
            other => other.map_err(|e| format!("{}: {e}", row.name))?,
        }
    }
    Ok(())
}

/// What is read depends on the kernel in places: as it was is as it should be.
fn read_all(socket: &impl AsRawFd, kind: For) -> BTreeMap<&'static str, Vec<u8>> {
    let rows = EARLY.iter().chain(ROWS);
    let rows = rows.filter(|r| r.on == All || kind == Listener || r.on == kind);
    let read = |row: &Row| {
        let mut value = [0; 64];
        let len = net::get(socket, row.level, row.number, &mut value).ok()?;
        Some((row.name, value[..len].to_vec()))
    };
    rows.filter_map(read).collect()
}

fn peer(z: &Zoo, address: SocketAddr) -> Check {
    let mut stream = TcpStream::connect(address).map_err(err)?;
    while !z.is_over() {
        match stream.read(&mut [0; 64]).map_err(err)? {
            0 => return Ok(()),
            n => stream.write_all(&vec![b'!'; n]).map_err(err)?,
        }
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let plain = net::listener("127.0.0.1")?;
        let six = net::listener("::")?;
        let address = plain.local_addr().map_err(err)?;
        z.outside(move |z| peer(z, address))?;
        let (outside, _) = plain.accept().map_err(err)?;
        let (near, far) = net::pair(&plain)?;
        let port = six.local_addr().map_err(err)?.port();
        let mapped_peer = TcpStream::connect(("127.0.0.1", port)).map_err(err)?;
        let (mapped, _) = six.accept().map_err(err)?;
        let listener = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;
        set_all(EARLY, &listener, Listener)?;
        // An address that is nobody's.
        net::bind(&listener, ([10, 9, 8, 7], 0).into())?;
        net::listen(&listener, 9)?;
        set_all(ROWS, &listener, Listener)?;
        let loose = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;
        set_all(EARLY, &loose, Loose)?;
        set_all(ROWS, &loose, Loose)?;
        net::set_int(&loose, T, 30, 1)?; // TCP_FASTOPEN_CONNECT
        for stream in [&outside, &near, &far, &mapped] {
            set_all(ROWS, stream, All)?;
        }
        // Only what is inherited can be there on a connection.
        net::set(&near, S, libc::SO_BINDTODEVICE, b"lo")?;
        let all = || {
            let mut read = vec![read_all(&listener, Listener), read_all(&loose, Loose)];
            for stream in [&outside, &near, &far, &mapped, &mapped_peer] {
                read.push(read_all(stream, All));
            }
            let connect = net::get_int(&loose, T, 30);
            read[1].insert("TCP_FASTOPEN_CONNECT", connect.unwrap_or(-1).to_ne_bytes().to_vec());
            read
        };
        let before = all();
        for row in EARLY.iter().chain(ROWS).filter(|r| !r.new) {
            ensure!(before[0].contains_key(row.name), "{} cannot be read", row.name);
        }
        z.ready()?;
        z.wait_for_check();
        for (i, (before, after)) in before.iter().zip(all()).enumerate() {
            for (name, value) in before {
                ensure_eq!(after.get(name), Some(value), "socket {i}: {name}");
            }
        }
        for (from, to) in [(&near, &far), (&far, &near), (&mapped, &mapped_peer)] {
            let (mut from, mut to) = (from, to);
            from.write_all(b"words").map_err(err)?;
            to.read_exact(&mut [0; 5]).map_err(err)?;
        }
        let mut outside = &outside;
        outside.write_all(b"???").map_err(err)?;
        let mut text = [0; 3];
        outside.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"!!!", "the peer outside");
        Ok(())
    })
}
