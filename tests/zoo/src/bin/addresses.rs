//! Kernel state: internet sockets at all sorts of addresses: listening, bound UDP, IPv4 as IPv6 sees it, the wildcard, and
//! a connection with both ends here. Their addresses are in the file `addresses`, a name and an address a line. At the
//! check they must be what the file `expected` says if the harness has left one (it restored them elsewhere), or else as
//! before; and all of them must work.
#![allow(unsafe_code, reason = "a socket that is not bound")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;
use zoo::{ensure, ensure_eq};

fn err(e: std::io::Error) -> String {
    e.to_string()
}

/// Address of this family's loopback network that only these tests use.
const OWN: &str = "127.0.71.1";

/// Both ends connected over the listener.
fn connect(listener: &TcpListener, to: SocketAddr) -> Result<(TcpStream, TcpStream), String> {
    let client = TcpStream::connect(to).map_err(|e| format!("{to}: {e}"))?;
    let (server, _) = listener.accept().map_err(err)?;
    client.set_read_timeout(Some(Duration::from_secs(10))).map_err(err)?;
    Ok((client, server))
}

fn says(from: &mut TcpStream, to: &mut TcpStream, what: &str) -> zoo::Check {
    from.write_all(b"hello").map_err(|e| format!("{what}: {e}"))?;
    let mut text = [0u8; 5];
    to.read_exact(&mut text).map_err(|e| format!("{what}: {e}"))?;
    ensure_eq!(&text, b"hello", "what came over {what}");
    Ok(())
}

/// A wildcard address is reached at the loopback address.
fn reachable(address: SocketAddr) -> SocketAddr {
    let mut to = address;
    if address.ip().is_unspecified() {
        to.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    to
}

fn main() {
    zoo::run(|z| {
        let listen = zoo::net::listener;
        let listeners = [
            ("listener", listen(OWN)?),
            ("mapped", listen(&format!("::ffff:{OWN}"))?),
            ("loopback", listen("127.0.0.1")?),
            ("wildcard", listen("0.0.0.0")?),
            ("loopback6", listen("::1")?),
        ];
        let udp = zoo::net::udp(OWN)?;
        udp.set_read_timeout(Some(Duration::from_secs(10))).map_err(err)?;
        let ours = std::net::Ipv4Addr::new(127, 0, 71, 1);
        let multicast_if = libc::IP_MULTICAST_IF;
        zoo::net::set_int(&udp, libc::IPPROTO_IP, multicast_if, i32::from_ne_bytes(ours.octets()))?;
        // It waits across the checkpoint, and tells who has sent it.
        let early = zoo::net::udp(OWN)?;
        early.send_to(b"early", udp.local_addr().map_err(err)?).map_err(err)?;
        // Not bound to anything: has no address, and gets none.
        // SAFETY: integers only.
        let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        zoo::check(raw, "socket")?;
        // SAFETY: just opened, and owned by nobody else.
        let unbound = unsafe { UdpSocket::from_raw_fd(raw) };
        let main = &listeners[0].1;
        let (mut near, mut far) = connect(main, main.local_addr().map_err(err)?)?;
        let own = |name: &str, address: std::io::Result<SocketAddr>| match address {
            Ok(address) => format!("{name} {address}\n"),
            Err(e) => format!("{name} {e}\n"),
        };
        let all = |near: &TcpStream, far: &TcpStream| {
            let mut text: String =
                listeners.iter().map(|(name, l)| own(name, l.local_addr())).collect();
            text.push_str(&own("udp", udp.local_addr()));
            text.push_str(&own("early", early.local_addr()));
            text.push_str(&own("sender", udp.peek_from(&mut [0; 9]).map(|(_, from)| from)));
            let interface = zoo::net::get_int(&udp, libc::IPPROTO_IP, multicast_if);
            let interface = interface.map(|i| std::net::Ipv4Addr::from(i.to_ne_bytes()));
            text.push_str(&format!("multicast {interface:?}\n"));
            text.push_str(&own("unbound", unbound.local_addr()));
            text.push_str(&own("near", near.local_addr()));
            text.push_str(&own("near_peer", near.peer_addr()));
            text.push_str(&own("far", far.local_addr()));
            text.push_str(&own("far_peer", far.peer_addr()));
            text
        };
        let before = all(&near, &far);
        z.publish("addresses", &before);
        z.ready()?;
        z.wait_for_check();
        let expected = std::fs::read_to_string(z.path("expected")).unwrap_or(before);
        ensure_eq!(all(&near, &far), expected, "addresses");
        says(&mut near, &mut far, "the connection there")?;
        says(&mut far, &mut near, "the connection back")?;
        for (name, listener) in &listeners {
            let (mut client, mut server) =
                connect(listener, reachable(listener.local_addr().map_err(err)?))?;
            says(&mut client, &mut server, name)?;
        }
        let sender = UdpSocket::bind(format!("{OWN}:0")).map_err(err)?;
        sender.send_to(b"hello", udp.local_addr().map_err(err)?).map_err(err)?;
        let mut text = [0u8; 16];
        let len = udp.recv(&mut text).map_err(err)?;
        ensure_eq!(&text[..len], b"early", "what waited");
        let len = udp.recv(&mut text).map_err(err)?;
        ensure_eq!(&text[..len], b"hello", "what came by UDP");
        ensure!(unbound.as_raw_fd() >= 0, "the unbound socket");
        Ok(())
    })
}
