//! Kernel state: TCP connections in FIN_WAIT1, LAST_ACK, CLOSING and CLOSE_WAIT, with data that the peer has no room for in
//! front of the FIN. The peer is in a child process, or with `ZOO_OUTSIDE=1` outside of the tree. `ZOO_V6=1`: over IPv6.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;
use zoo::net::{self, err, state};
use zoo::{Check, Zoo, ensure, ensure_eq};

const CASES: [&str; 4] = ["FIN_WAIT1", "LAST_ACK", "CLOSING", "CLOSE_WAIT"];

/// The byte of a stream at a place.
fn byte(case: usize, at: usize) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)).wrapping_mul(31).wrapping_add(case) as u8
}

/// Sends until nothing more fits; how much that was.
fn stuff(case: usize, socket: &TcpStream) -> Result<usize, String> {
    let (mut at, mut patience) = (0, 20);
    while patience > 0 {
        let piece: Vec<u8> = (at..at + 5000).map(|i| byte(case, i)).collect();
        match net::send(socket, &piece, libc::MSG_DONTWAIT) {
            n if n > 0 => at += n as usize,
            n if n == -i64::from(libc::EAGAIN) => {
                patience -= 1;
                zoo::nap(5);
            }
            n => return Err(format!("send: error {}", -n)),
        }
    }
    Ok(at)
}

/// Reads to the end of the stream and finds all of it in order.
fn drain(case: usize, socket: &mut TcpStream, expected: usize) -> Check {
    let mut buffer = [0; 4096];
    let mut at = 0;
    loop {
        let what = CASES[case];
        let n = socket.read(&mut buffer).map_err(|e| format!("{what}: read at {at}: {e}"))?;
        if n == 0 {
            ensure_eq!(at, expected, "{what}: bytes before the end");
            return Ok(());
        }
        for (i, b) in buffer[..n].iter().enumerate() {
            ensure_eq!(*b, byte(case, at + i), "{what}: byte {}", at + i);
        }
        at += n;
    }
}

fn peer(z: &Zoo, address: SocketAddr) -> Check {
    let mut all = Vec::new();
    for _ in CASES {
        let stream = TcpStream::connect(address).map_err(err)?;
        stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(err)?;
        all.push(stream);
    }
    all[3].write_all(b"last words").map_err(err)?;
    for case in [1, 3] {
        all[case].shutdown(Shutdown::Write).map_err(err)?;
    }
    z.wait_for("stuffed")?;
    all[2].shutdown(Shutdown::Write).map_err(err)?;
    while !z.path("verified").exists() {
        if z.is_over() {
            return Ok(());
        }
        zoo::nap(5);
    }
    let sizes = std::fs::read_to_string(z.path("stuffed")).map_err(err)?;
    for (case, size) in sizes.split_whitespace().enumerate() {
        drain(case, &mut all[case], size.parse().map_err(|e| format!("{e}"))?)?;
    }
    all[0].write_all(b"still open").map_err(err)?;
    let mut text = String::new();
    all[3].read_to_string(&mut text).map_err(|e| format!("CLOSE_WAIT: {e}"))?;
    ensure_eq!(text, "answer", "what came through the half that was open");
    z.publish("drained", "");
    while !z.is_over() && !z.path("end").exists() {
        zoo::nap(5);
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let host = if z.param("ZOO_V6", 0) == 1 { "[::1]:0" } else { "127.0.0.1:0" };
        let address: SocketAddr = host.parse().map_err(|e| format!("{e}"))?;
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = net::socket(family, libc::SOCK_STREAM)?;
        // Accepted sockets get these; the buffers of the peer tune themselves.
        net::set_int(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000)?;
        net::bind(&socket, address)?;
        net::listen(&socket, 10)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().map_err(err)?;
        let outside = z.param("ZOO_OUTSIDE", 0) == 1;
        let child = match outside {
            true => z.outside(move |z| peer(z, address)).map(|()| 0)?,
            false => z.fork(move |z| peer(z, address))?,
        };
        let mut all = Vec::new();
        for _ in CASES {
            let stream = listener.accept().map_err(err)?.0;
            stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(err)?;
            all.push(stream);
        }
        drop(listener);
        net::await_state(&all[1], state::CLOSE_WAIT, "before LAST_ACK")?;
        let mut sizes = String::new();
        for case in [0, 1, 2] {
            sizes += &format!("{} ", stuff(case, &all[case])?);
            all[case].shutdown(Shutdown::Write).map_err(err)?;
        }
        z.publish("stuffed", &sizes);
        let states = [state::FIN_WAIT1, state::LAST_ACK, state::CLOSING, state::CLOSE_WAIT];
        for (case, state) in states.into_iter().enumerate() {
            net::await_state(&all[case], state, CASES[case])?;
        }
        z.ready()?;
        z.wait_for_check();
        for (case, state) in states.into_iter().enumerate() {
            net::await_state(&all[case], state, CASES[case])?;
        }
        z.publish("verified", "");
        let mut text = [0; 10];
        all[3].read_exact(&mut text).map_err(|e| format!("CLOSE_WAIT: {e}"))?;
        ensure_eq!(&text, b"last words", "before the FIN of the peer");
        ensure_eq!(all[3].read(&mut text).map_err(err)?, 0, "the FIN of the peer");
        all[3].write_all(b"answer").map_err(err)?;
        all[3].shutdown(Shutdown::Write).map_err(err)?;
        let drained = z.wait_for("drained");
        z.complaints()?;
        drained?;
        net::await_state(&all[0], state::FIN_WAIT2, "FIN_WAIT1, drained")?;
        all[0].read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"still open", "what the peer of FIN_WAIT1 sends");
        for case in [1, 2, 3] {
            net::await_state(&all[case], state::CLOSE, CASES[case])?;
            ensure!(all[case].as_raw_fd() > 2, "descriptor");
        }
        z.publish("end", "");
        if outside { Ok(()) } else { z.join(child) }
    })
}
