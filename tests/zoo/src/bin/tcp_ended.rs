//! Kernel state: TCP connections that have ended, with bytes that nobody has read, or an error that nobody has been told: closed by
//! both sides in either order, reset before, after and between that, refused. Each is made twice: what is found in
//! one of them before the checkpoint is found in the other one after it. (`ZOO_V6=1`: of IPv6.)
#![allow(unsafe_code, reason = "a connection that is not waited for")]

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{self, err, state};
use zoo::{ensure, ensure_eq, errno};

const TCP: i32 = libc::IPPROTO_TCP;

/// How a connection ends: what is done to this end and to the peer's.
type Ending = fn(&TcpStream, TcpStream) -> zoo::Check;

/// The peer closes and this end does.
fn closed(own: &TcpStream, peer: TcpStream) -> zoo::Check {
    peer.shutdown(Shutdown::Write).map_err(err)?;
    net::await_state(own, state::CLOSE_WAIT, "own end")?;
    own.shutdown(Shutdown::Write).map_err(err)
}

/// This end closes and the peer does.
fn closed_first(own: &TcpStream, peer: TcpStream) -> zoo::Check {
    own.shutdown(Shutdown::Write).map_err(err)?;
    net::await_state(&peer, state::CLOSE_WAIT, "peer")?;
    peer.shutdown(Shutdown::Write).map_err(err)
}

fn reset(_: &TcpStream, peer: TcpStream) -> zoo::Check {
    let linger = [1i32.to_ne_bytes(), [0; 4]].concat();
    net::set(&peer, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// The peer closes and resets.
fn broken(own: &TcpStream, peer: TcpStream) -> zoo::Check {
    peer.shutdown(Shutdown::Write).map_err(err)?;
    net::await_state(own, state::CLOSE_WAIT, "own end")?;
    reset(own, peer)
}

/// The peer closes, is gone, and then this end closes too.
fn reset_at_last(own: &TcpStream, peer: TcpStream) -> zoo::Check {
    peer.shutdown(Shutdown::Write).map_err(err)?;
    net::await_state(own, state::CLOSE_WAIT, "own end")?;
    // An acknowledgement that meets nobody would be answered by a reset.
    net::await_state(&peer, state::FIN_WAIT2, "peer")?;
    net::set_int(&peer, TCP, libc::TCP_REPAIR, 1)?;
    drop(peer);
    own.shutdown(Shutdown::Write).map_err(err)
}

const ENDINGS: &[(&str, usize, Ending)] = &[
    ("closed", 4, closed),
    ("closed first", 4, closed_first),
    ("closed, much", 300_000, closed),
    ("closed with nothing", 0, closed),
    ("reset", 4, reset),
    ("reset, much", 200_000, reset),
    ("reset with nothing", 0, reset),
    ("broken", 5, broken),
    ("broken with nothing", 0, broken),
    ("reset at last", 6, reset_at_last),
    ("reset at last with nothing", 0, reset_at_last),
];

fn ended(listener: &TcpListener, length: usize, ending: Ending) -> Result<TcpStream, String> {
    // Either side may be the one that listens.
    let (mut peer, own) = net::pair(listener)?;
    net::set_int(&own, libc::SOL_SOCKET, libc::SO_RCVBUF, 1 << 20)?;
    let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    peer.write_all(&bytes).map_err(err)?;
    for _ in 0..1000 {
        if waiting(&own) == Ok(length) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    ensure_eq!(waiting(&own), Ok(length), "what has come");
    ending(&own, peer)?;
    net::await_state(&own, state::CLOSE, "own end")?;
    Ok(own)
}

/// A connection that was refused, which nobody has asked about.
fn refused(address: SocketAddr) -> Result<TcpStream, String> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: integers; the descriptor is new and ours.
    let fd = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        OwnedFd::from_raw_fd(zoo::ok(libc::socket(family, kind, 0).into(), "socket")? as i32)
    };
    ensure!(net::connect(&fd, address) != 0, "nobody is there");
    net::await_state(&fd, state::CLOSE, "a connection to nobody")?;
    Ok(TcpStream::from(fd))
}

fn waiting(fd: &impl AsRawFd) -> Result<usize, i32> {
    let mut length = 0i32;
    // SAFETY: the kernel writes an int.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut length) } {
        0 => Ok(length as usize),
        _ => Err(errno()),
    }
}

/// All that can be found in such a socket, which is used up by that.
fn findings(own: &TcpStream) -> Result<Vec<String>, String> {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLPRI | libc::POLLRDHUP;
    let mut all = vec![
        format!("state {}", net::tcp_state(own)?),
        format!("poll {:#x}", net::poll_for(own, events, 0)?),
        format!("waiting {:?}", waiting(own)),
        format!("peer {:?}", own.peer_addr().map_err(|e| e.raw_os_error())),
    ];
    let mut room = vec![0; 1 << 20];
    for call in ["first", "second", "third"] {
        let mut got = 0;
        loop {
            let n = net::recv(own, &mut room[got..], libc::MSG_DONTWAIT);
            if n <= 0 {
                let error = if n < 0 { errno() } else { 0 };
                all.push(format!("{call}: {got} bytes, then {n} ({error})"));
                break;
            }
            got += n as usize;
        }
        let right = room[..got].iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8);
        all.push(format!("as sent: {right}"));
        all.push(format!("poll {:#x}", net::poll_for(own, events, 0)?));
        if call == "second" {
            all.push(format!("error {:?}", net::get_int(own, libc::SOL_SOCKET, libc::SO_ERROR)));
        }
    }
    let sent = net::send(own, b"x", libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
    all.push(format!("send {sent} ({})", errno()));
    all.push(format!("poll {:#x}", net::poll_for(own, events, 0)?));
    Ok(all)
}

fn main() {
    zoo::run(|z| {
        let listener = net::listener(if z.param("ZOO_V6", 0) == 1 { "::1" } else { "127.0.0.1" })?;
        let local = |own: &TcpStream| own.local_addr().map_err(err);
        let mut all = Vec::new();
        for &(name, length, ending) in ENDINGS {
            let found = findings(&ended(&listener, length, ending)?)?;
            println!("{name}: {found:?}");
            let own = ended(&listener, length, ending)?;
            // One with nothing in it and no error has no address worth keeping.
            let address = if name == "closed with nothing" { None } else { Some(local(&own)?) };
            all.push((name, own, found, address));
        }
        let nobody = {
            let mut at = listener.local_addr().map_err(err)?;
            at.set_port(9);
            at
        };
        let found = findings(&refused(nobody)?)?;
        println!("refused: {found:?}");
        let own = refused(nobody)?;
        all.push(("refused", own, found, None));

        z.ready()?;
        z.wait_for_check();

        let mut wrong = Vec::new();
        for (name, own, found, address) in &all {
            if let Some(address) = address {
                ensure_eq!(&local(own)?, address, "{name}");
            }
            let now = findings(own)?;
            if now != *found {
                wrong.push(format!("{name}: {now:?} instead of {found:?}"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        // Nothing is in the way of the listener.
        let (a, b) = net::pair(&listener)?;
        drop((a, b));
        Ok(())
    })
}
