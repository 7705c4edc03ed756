//! Kernel state: TCP sockets that listen without `SO_REUSEADDR`, at ports where connections linger that they have closed
//! first (`TIME_WAIT`), and which nobody else could bind. One connection stays; more come and go all the time. Dumped with
//! --tcp-established.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use zoo::net::{self, err};
use zoo::{ensure, ensure_eq};

fn listener(family: i32, at: &str) -> Result<TcpListener, String> {
    let socket = net::socket(family, libc::SOCK_STREAM)?;
    if family == libc::AF_INET6 {
        net::set_int(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    net::bind(&socket, at.parse().map_err(|e| format!("{at}: {e}"))?)?;
    net::listen(&socket, 7)?;
    Ok(socket.into())
}

/// A connection that the server closes first.
fn one(listener: &TcpListener, to: SocketAddr) -> zoo::Check {
    let mut client = TcpStream::connect(to).map_err(err)?;
    let (server, peer) = listener.accept().map_err(err)?;
    ensure_eq!(client.local_addr().map_err(err)?, peer, "peer");
    drop(server);
    ensure_eq!(client.read(&mut [0; 1]).map_err(err)?, 0, "what it says at the end");
    Ok(())
}

/// Whether somebody else could bind there with the option.
fn is_free(address: SocketAddr, option: i32) -> Result<bool, String> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = net::socket(family, libc::SOCK_STREAM)?;
    if option != 0 {
        net::set_int(&socket, libc::SOL_SOCKET, option, 1)?;
    }
    Ok(net::bind(&socket, address).is_ok())
}

fn main() {
    zoo::run(|z| {
        let mut listeners = vec![listener(libc::AF_INET, "0.0.0.0:0")?];
        listeners.extend(listener(libc::AF_INET6, "[::]:0").ok());
        let address = |l: &TcpListener| l.local_addr().map_err(err);
        let addresses = listeners.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        let to = |at: SocketAddr| {
            let host = if at.is_ipv4() { "127.0.0.1" } else { "::1" };
            SocketAddr::new(host.parse().unwrap_or(at.ip()), at.port())
        };
        let (mut near, mut far) = {
            let client = TcpStream::connect(to(addresses[0])).map_err(err)?;
            (client, listeners[0].accept().map_err(err)?.0)
        };
        let visit = || {
            listeners.iter().zip(&addresses).try_for_each(|(listener, at)| one(listener, to(*at)))
        };
        visit()?;
        z.ready()?;
        while !z.checking() {
            visit()?;
            zoo::nap(50);
        }
        for (listener, at) in listeners.iter().zip(&addresses) {
            ensure_eq!(address(listener)?, *at, "address");
            for option in [libc::SO_REUSEADDR, libc::SO_REUSEPORT] {
                let value = net::get_int(listener, libc::SOL_SOCKET, option)?;
                ensure_eq!(value, 0, "option {option} of the listener at {at}");
                ensure!(!is_free(*at, option)?, "{at} is free to others with option {option}");
            }
            ensure!(!is_free(*at, 0)?, "{at} is free to others");
        }
        visit()?;
        near.write_all(b"still here").map_err(err)?;
        let mut text = [0; 10];
        far.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"still here", "what came over the connection that stays");
        Ok(())
    })
}
