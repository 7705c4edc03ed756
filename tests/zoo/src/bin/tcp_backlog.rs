//! Kernel state: listening TCP sockets with connections that nobody has accepted yet, of clients outside the tree
//! (`ZOO_OUTSIDE=1`) or in it: silent ones, some that have sent little, much, or their last words; of both families, and with
//! `TCP_DEFER_ACCEPT`. With `ZOO_BIND=IP` it is a server alone, which publishes `address`; with `ZOO_SERVER=DIR` the clients
//! of the server in that directory.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;
use zoo::net::{self, err};
use zoo::{Check, Zoo, ensure, ensure_eq};

/// How much a client sends, and whether it closes.
const CLIENTS: &[(usize, bool)] = &[(0, false), (5, false), (40_000, false), (7, true), (0, true)];

fn byte(who: usize, at: usize) -> u8 {
    (who * 31 + at * 7 + at / 251) as u8
}

fn data(who: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| byte(who, at)).collect()
}

/// Connects all clients to one listener, each when the one before is in the queue.
fn connect(address: SocketAddr, deferred: bool) -> Result<Vec<TcpStream>, String> {
    let mut all = Vec::new();
    for (who, (len, closes)) in CLIENTS.iter().enumerate() {
        if deferred && *len == 0 {
            continue;
        }
        let mut stream = TcpStream::connect(address).map_err(err)?;
        stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(err)?;
        stream.write_all(&data(who, *len)).map_err(err)?;
        if *closes {
            stream.shutdown(Shutdown::Write).map_err(err)?;
        }
        all.push(stream);
    }
    Ok(all)
}

/// What clients do once they are accepted.
fn talk(all: &mut [TcpStream], deferred: bool) -> Check {
    let ours = CLIENTS.iter().enumerate().filter(|(_, (len, _))| !deferred || *len != 0);
    for (stream, (who, (_, closes))) in all.iter_mut().zip(ours) {
        if !closes {
            stream.write_all(b"more").map_err(|e| format!("client {who}: {e}"))?;
            stream.shutdown(Shutdown::Write).map_err(err)?;
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|e| format!("client {who}: {e}"))?;
        ensure_eq!(answer, format!("answer to {who}"), "what client {who} is told");
    }
    Ok(())
}

/// `dir` is where the server is told of them.
fn clients(z: &Zoo, dir: &Path, addresses: &[SocketAddr], first: usize) -> Check {
    let mut all = Vec::new();
    for (n, address) in addresses.iter().enumerate() {
        all.push(connect(*address, first + n == 0)?);
    }
    std::fs::write(dir.join("connected"), "").map_err(err)?;
    while !dir.join("serving").exists() {
        if z.is_over() || dir.join("result").exists() {
            return Ok(());
        }
        zoo::nap(5);
    }
    for (n, streams) in all.iter_mut().enumerate() {
        talk(streams, first + n == 0)?;
    }
    std::fs::write(dir.join("told"), "").map_err(err)?;
    Ok(())
}

/// How many wait: `TCP_INFO` of a listening socket.
fn waiting(listener: &TcpListener) -> Result<u32, String> {
    let mut info = [0u8; 104];
    net::get(listener, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(u32::from_ne_bytes([info[24], info[25], info[26], info[27]]))
}

fn expected(n: usize) -> usize {
    if n == 0 { CLIENTS.iter().filter(|(len, _)| *len != 0).count() } else { CLIENTS.len() }
}

/// Accepts everybody, in their order.
fn serve(n: usize, listener: &TcpListener) -> Check {
    listener.set_nonblocking(true).map_err(err)?;
    let ours = CLIENTS.iter().enumerate().filter(|(_, (len, _))| n != 0 || *len != 0);
    for (who, (len, closes)) in ours {
        let what = format!("listener {n}, client {who}");
        let (mut stream, _) = listener.accept().map_err(|e| format!("{what}: accept: {e}"))?;
        stream.set_nonblocking(false).map_err(err)?;
        stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(err)?;
        let mut first = vec![0; *len];
        stream.read_exact(&mut first).map_err(|e| format!("{what}: {e}"))?;
        ensure!(first == data(who, *len), "{what}: what it has sent has changed");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).map_err(|e| format!("{what}: {e}"))?;
        ensure_eq!(rest, if *closes { "" } else { "more" }, "{what}: the rest");
        let answer = format!("answer to {who}");
        stream.write_all(answer.as_bytes()).map_err(|e| format!("{what}: {e}"))?;
    }
    ensure!(listener.accept().is_err(), "listener {n}: somebody else waits");
    Ok(())
}

/// The number of the listener with `TCP_DEFER_ACCEPT`.
const DEFERRED: usize = 0;

fn listen() -> Result<(usize, Vec<TcpListener>), String> {
    if let Ok(ip) = std::env::var("ZOO_BIND") {
        return Ok((DEFERRED + 1, vec![net::listener(&ip)?]));
    }
    let mut listeners = vec![net::listener("127.0.0.1")?, net::listener("0.0.0.0")?];
    net::set_int(&listeners[0], libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 30)?;
    if let Ok(six) = net::listener("::1") {
        // One that has IPv4 connections, too.
        listeners.extend([six, net::listener("::")?]);
    }
    Ok((DEFERRED, listeners))
}

fn main() {
    zoo::run(|z| {
        if let Ok(server) = std::env::var("ZOO_SERVER") {
            let address = std::fs::read_to_string(format!("{server}/address")).map_err(err)?;
            let address = address.parse().map_err(|e| format!("{address}: {e}"))?;
            z.ready()?;
            return clients(z, Path::new(&server), &[address], DEFERRED + 1);
        }
        let (first, listeners) = listen()?;
        let mut addresses = listeners
            .iter()
            .map(|listener| listener.local_addr().map_err(err))
            .collect::<Result<Vec<_>, _>>()?;
        for address in addresses.iter_mut().filter(|a| a.ip().is_unspecified()) {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let mut children = Vec::new();
        if z.param("ZOO_OUTSIDE", 0) == 1 {
            z.outside(move |z| clients(z, z.dir(), &addresses, first))?;
        } else if first == DEFERRED {
            children.push(z.fork(move |z| clients(z, z.dir(), &addresses, first))?);
        } else {
            z.publish("address", &addresses[0].to_string());
        }
        z.wait_for("connected")?;
        for (n, listener) in (first..).zip(&listeners) {
            for _ in 0..1000 {
                if waiting(listener)? as usize == expected(n) {
                    break;
                }
                zoo::nap(5);
            }
            ensure_eq!(waiting(listener)? as usize, expected(n), "who waits at listener {n}");
        }
        z.ready()?;
        z.wait_for_check();
        for (n, listener) in (first..).zip(&listeners) {
            ensure_eq!(waiting(listener)? as usize, expected(n), "who waits at listener {n}");
        }
        if first == DEFERRED {
            let deferred = net::get_int(&listeners[0], libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT)?;
            ensure!(deferred > 0, "TCP_DEFER_ACCEPT is off");
        }
        z.publish("serving", "");
        for (n, listener) in (first..).zip(&listeners) {
            serve(n, listener)?;
        }
        z.wait_for("told")?;
        children.into_iter().try_for_each(|child| z.join(child))
    })
}
