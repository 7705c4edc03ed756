//! Kernel state: a listening TCP socket on the loopback: options, backlog, address. Serves an echo to clients from
//! outside the tree (the harness connects before, between and after), its port in `DIR/port`. `ZOO_BIND` is its address,
//! `ZOO_DEVICE` the interface it is bound to; with `ZOO_STILL=1` it accepts nobody until the check.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;
use zoo::{ensure, ensure_eq};

fn serve(listener: &TcpListener) -> zoo::Check {
    match listener.accept() {
        Ok((mut client, _)) => {
            client.set_nonblocking(false).map_err(|e| e.to_string())?;
            client.set_read_timeout(Some(Duration::from_secs(5))).map_err(|e| e.to_string())?;
            // The client closes first, so that no TIME_WAIT stays on this side.
            let mut text = [0u8; 64];
            loop {
                match client.read(&mut text) {
                    Ok(0) | Err(_) => return Ok(()),
                    Ok(n) => client.write_all(&text[..n]).map_err(|e| format!("echo: {e}"))?,
                }
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
        Err(e) => Err(format!("accept: {e}")),
    }
}

fn main() {
    zoo::run(|z| {
        let address = std::env::var("ZOO_BIND").unwrap_or_else(|_| "127.0.0.1".into());
        let listener = zoo::net::listener(&address)?;
        if let Ok(device) = std::env::var("ZOO_DEVICE") {
            zoo::net::set(&listener, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes())?;
        }
        let other = zoo::net::listener("::1").ok();
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        listener.set_ttl(33).map_err(|e| e.to_string())?;
        let address = listener.local_addr().map_err(|e| e.to_string())?;
        let other_address = other.as_ref().and_then(|o| o.local_addr().ok());
        z.publish("port", &address.port().to_string());
        z.ready()?;
        while !z.checking() {
            if z.param("ZOO_STILL", 0) == 0 {
                serve(&listener)?;
            }
            zoo::nap(2);
        }
        ensure_eq!(listener.local_addr().map_err(|e| e.to_string())?, address, "address");
        ensure_eq!(listener.ttl().map_err(|e| e.to_string())?, 33, "TTL");
        let mut clients: Vec<TcpStream> = Vec::new();
        for _ in 0..20 {
            clients.push(TcpStream::connect(address).map_err(|e| format!("connect: {e}"))?);
        }
        for (i, client) in clients.iter_mut().enumerate() {
            let (mut server, peer) = listener.accept().map_err(|e| format!("accept {i}: {e}"))?;
            ensure_eq!(peer, client.local_addr().map_err(|e| e.to_string())?, "order of clients");
            server.write_all(b"hello").map_err(|e| e.to_string())?;
            let mut text = [0u8; 5];
            client.read_exact(&mut text).map_err(|e| e.to_string())?;
            ensure_eq!(&text, b"hello", "what client {i} got");
        }
        if let (Some(other), Some(address)) = (other, other_address) {
            ensure_eq!(other.local_addr().ok(), Some(address), "IPv6 address");
            let client = TcpStream::connect(address).map_err(|e| format!("connect IPv6: {e}"))?;
            let (_, peer) = other.accept().map_err(|e| format!("accept IPv6: {e}"))?;
            ensure!(client.local_addr().is_ok_and(|a| a == peer), "IPv6 peer");
        }
        Ok(())
    })
}
