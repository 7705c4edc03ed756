//! Kernel state: TCP connections and listeners, and threads that wait on them in recv, send, poll, epoll_wait, accept and
//! connect. If the file `closed` exists at the check, a restore with --tcp-close has been: every connection must be
//! closed in the way that programs know (end of file, EPIPE, hang-up), every waiting thread must have been told, and the
//! listeners must serve. Otherwise all connections must have survived.
//!
//! The peers of some are in the tree, of others outside.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use zoo::net::{self, err, pair, state};
use zoo::{Check, ensure, ensure_eq, now};

/// What the waiting threads have come back with.
static RETURNED: Mutex<Vec<(&str, i64)>> = Mutex::new(Vec::new());

fn returned(what: &'static str, value: i64) {
    RETURNED.lock().unwrap_or_else(|e| e.into_inner()).push((what, value));
}

fn outcome(what: &str) -> Result<i64, String> {
    let until = now() + 10_000_000_000;
    loop {
        let all = RETURNED.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some((_, value)) = all.iter().find(|(name, _)| *name == what) {
            return Ok(*value);
        }
        ensure!(now() < until, "the thread in {what} waits still");
        zoo::nap(1);
    }
}

fn thread(what: &'static str, body: impl FnOnce() -> i64 + Send + 'static) {
    std::thread::spawn(move || {
        zoo::here();
        returned(what, body());
        // Threads stay, so that the tree looks the same.
        zoo::nap(3_600_000);
    });
}

fn epoll_of(socket: &TcpStream) -> Result<i32, String> {
    // SAFETY: integers and a local.
    unsafe {
        let epoll = zoo::ok(libc::epoll_create1(libc::EPOLL_CLOEXEC).into(), "epoll")? as i32;
        let events = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: 77 };
        zoo::check(
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, socket.as_raw_fd(), &mut event),
            "epoll_ctl",
        )?;
        Ok(epoll)
    }
}

/// Answers "?" with "!" on every connection and keeps them open; the file `full` tells the port of a listener that accepts
/// nothing until the file `drain` exists.
fn client_outside(z: &zoo::Zoo, server: SocketAddr) -> Check {
    let full = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;
    net::bind(&full, ([127, 0, 0, 1], 0).into())?;
    net::listen(&full, 0)?;
    let full = TcpListener::from(full);
    let address = full.local_addr().map_err(err)?;
    let _filler = TcpStream::connect(address).map_err(err)?;
    let mut talk = TcpStream::connect(server).map_err(err)?;
    let _idle = TcpStream::connect(server).map_err(err)?;
    z.publish("full", &address.port().to_string());
    talk.set_read_timeout(Some(std::time::Duration::from_millis(20))).map_err(err)?;
    let mut told = false;
    while !z.is_over() {
        match talk.read(&mut [0]) {
            Ok(1) => talk.write_all(b"!").map_err(err)?,
            Ok(_) => zoo::nap(5),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
            // The server's host says that the connection is gone.
            Err(_) if !told => {
                told = true;
                z.publish("client_told", "");
            }
            Err(_) => zoo::nap(5),
        }
        if z.path("drain").exists() {
            full.set_nonblocking(true).map_err(err)?;
            while let Ok((socket, _)) = full.accept() {
                std::mem::forget(socket);
            }
        }
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let listener = net::listener("127.0.0.1")?;
        let address = listener.local_addr().map_err(err)?;
        let waited_at = net::listener("127.0.0.1")?;
        let six = net::listener("::")?;
        z.outside(move |z| client_outside(z, address))?;
        z.wait_for("full")?;
        let (mut talk, _) = listener.accept().map_err(err)?;
        let (idle, _) = listener.accept().map_err(err)?;
        let full: u16 = std::fs::read_to_string(z.path("full"))
            .map_err(err)?
            .parse()
            .map_err(|e| format!("port: {e}"))?;

        let pairs = (0..7).map(|_| pair(&listener)).collect::<Result<Vec<_>, _>>()?;
        let [receiving, sending, polled, watched, unread, own_fin, peer_fin] =
            pairs.try_into().map_err(|_| "seven pairs")?;
        let v4_in_6 = {
            let port = six.local_addr().map_err(err)?.port();
            let near = TcpStream::connect(("127.0.0.1", port)).map_err(err)?;
            (near, six.accept().map_err(err)?.0)
        };
        (&unread.1).write_all(b"not read").map_err(err)?;
        own_fin.0.shutdown(Shutdown::Write).map_err(err)?;
        peer_fin.1.shutdown(Shutdown::Write).map_err(err)?;
        net::await_state(&own_fin.0, state::FIN_WAIT2, "own FIN")?;
        net::await_state(&peer_fin.0, state::CLOSE_WAIT, "peer's FIN")?;
        idle.set_nodelay(true).map_err(err)?;
        net::set_int(&idle, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        net::set_int(&idle, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77)?;
        let never = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;
        let bound = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;
        net::bind(&bound, ([127, 0, 0, 1], 0).into())?;
        let stuffed = net::stuff(&sending.0)?;
        let plain = net::socket(libc::AF_INET, libc::SOCK_STREAM)?;

        let socket = receiving.0.as_raw_fd();
        receiving.0.set_read_timeout(None).map_err(err)?;
        thread("recv", move || net::recv(&socket, &mut [0; 8], 0));
        let socket = sending.0.as_raw_fd();
        thread("send", move || net::send(&socket, b"more", 0));
        let socket = polled.0.as_raw_fd();
        thread("poll", move || {
            net::poll_for(&socket, libc::POLLIN | libc::POLLRDHUP, -1).map_or(-1, i64::from)
        });
        let epoll = epoll_of(&watched.0)?;
        thread("epoll_wait", move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event.
            let n = unsafe { libc::epoll_wait(epoll, &mut event, 1, -1) };
            let (data, events) = (event.u64, event.events);
            if n == 1 && data == 77 { i64::from(events) } else { -1 }
        });
        let accepting = waited_at.as_raw_fd();
        thread("accept", move || {
            // SAFETY: no address is asked for.
            i64::from(unsafe {
                libc::accept(accepting, std::ptr::null_mut(), std::ptr::null_mut())
            })
        });
        let connecting = plain.as_raw_fd();
        thread("connect", move || {
            i64::from(net::connect(&connecting, ([127, 0, 0, 1], full).into()))
        });
        zoo::all_here(6)?;
        net::await_state(&plain, state::SYN_SENT, "who calls")?;
        z.ready()?;
        z.wait_for_check();

        z.publish("drain", "");
        let late = TcpStream::connect(waited_at.local_addr().map_err(err)?).map_err(err)?;
        if z.path("closed").exists() {
            closed(
                z,
                &talk,
                &[&receiving, &sending, &polled, &watched, &unread, &own_fin, &peer_fin],
            )?;
            net::is_closed(&v4_in_6.1, "IPv4 in IPv6")?;
            net::is_closed(&idle, "idle")?;
        } else {
            talk.write_all(b"?").map_err(err)?;
            talk.read_exact(&mut [0]).map_err(err)?;
            (&receiving.1).write_all(b"go").map_err(err)?;
            ensure_eq!(outcome("recv")?, 2, "recv");
            let mut gone = vec![0; stuffed + 4];
            (&sending.1).read_exact(&mut gone).map_err(err)?;
            ensure_eq!(outcome("send")?, 4, "send");
            ensure!(gone.ends_with(b"more") && gone[..stuffed].iter().all(|b| *b == 0x5a), "sent");
            for peer in [&polled.1, &watched.1] {
                let mut peer = peer;
                peer.write_all(b"x").map_err(err)?;
            }
            ensure_eq!(outcome("poll")?, libc::POLLIN.into(), "poll");
            ensure_eq!(outcome("epoll_wait")?, libc::EPOLLIN.into(), "epoll_wait");
            ensure_eq!(net::tcp_state(&own_fin.0)?, state::FIN_WAIT2, "own FIN");
            ensure_eq!(net::tcp_state(&peer_fin.0)?, state::CLOSE_WAIT, "peer's FIN");
            (&v4_in_6.0).write_all(b"4in6").map_err(err)?;
            ensure_eq!(net::recv(&v4_in_6.1, &mut [0; 8], 0), 4, "IPv4 in IPv6");
        }
        ensure!(outcome("accept")? >= 0, "accept: {}", outcome("accept")?);
        ensure_eq!(outcome("connect")?, 0, "connect");
        drop(late);
        ensure!(idle.nodelay().map_err(err)?, "TCP_NODELAY");
        ensure_eq!(net::get_int(&idle, libc::SOL_SOCKET, libc::SO_KEEPALIVE)?, 1, "SO_KEEPALIVE");
        ensure_eq!(net::get_int(&idle, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE)?, 77, "TCP_KEEPIDLE");
        // Those that had no connection are as they were, and the listeners serve.
        ensure_eq!(net::poll(&never, 0)?, libc::POLLOUT | libc::POLLHUP, "never connected");
        ensure_eq!(net::connect(&never, address), 0, "connect of the never connected");
        ensure_eq!(net::connect(&bound, address), 0, "connect of the bound one");
        for _ in 0..2 {
            listener.accept().map_err(err)?;
        }
        let (mut client, mut server) = pair(&listener)?;
        client.write_all(b"again").map_err(err)?;
        server.read_exact(&mut [0; 5]).map_err(err)
    })
}

fn closed(z: &zoo::Zoo, talk: &TcpStream, pairs: &[&(TcpStream, TcpStream)]) -> Check {
    ensure_eq!(outcome("recv")?, 0, "recv");
    ensure_eq!(outcome("send")?, -i64::from(libc::EPIPE), "send");
    let hung_up = libc::POLLIN | libc::POLLHUP | libc::POLLRDHUP;
    ensure_eq!(outcome("poll")?, hung_up.into(), "poll");
    let hung_up = libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLRDHUP;
    ensure_eq!(outcome("epoll_wait")?, hung_up.into(), "epoll_wait");
    net::is_closed(talk, "whose peer is outside")?;
    for (i, (near, far)) in pairs.iter().enumerate() {
        net::is_closed(near, &format!("near end of pair {i}"))?;
        net::is_closed(far, &format!("far end of pair {i}"))?;
    }
    // The client outside hears of it when it sends.
    let _ = z;
    Ok(())
}
