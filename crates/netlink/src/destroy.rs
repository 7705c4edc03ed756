//! Ending what is left of TCP connections whose programs are gone: `SOCK_DESTROY` of sock_diag(7).

use crate::message::{Builder, u32_at};
use crate::socket::{Error, Socket};
use rustix::io::Errno;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `struct inet_diag_req_v2`
const REQUEST: usize = 56;
/// Where both have a `struct inet_diag_sockid`: the request and the answer.
const REQUEST_ID: usize = 8;
const RECORD_ID: usize = 4;
const ID: usize = 48;
/// Where the answer has the inode number; 0 for sockets that no descriptor refers to.
const RECORD_INODE: usize = 68;

/// One end of a connection, then the other.
pub type Ends = ((IpAddr, u16), (IpAddr, u16));

/// Destroys the TCP sockets of `family` (`AF_INET`, `AF_INET6`) that no process holds any more (they send their last
/// segments, or wait for stray ones) and that are `unwanted`; their peers may be told by a reset. Returns how many.
///
/// # Errors
/// The tables cannot be read. A kernel that cannot destroy sockets is no error: then there are none.
pub fn orphans(
    socket: &mut Socket,
    family: u8,
    unwanted: impl Fn(&Ends) -> bool,
) -> Result<usize, Error> {
    let mut request = [0u8; REQUEST];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let found =
        socket.dump(SOCK_DIAG_BY_FAMILY, &request, |found: &mut Vec<[u8; ID]>, message| {
            let id = message.body.get(RECORD_ID..).and_then(|b| b.first_chunk::<ID>());
            if let Some(id) = id
                && u32_at(message.body, RECORD_INODE) == Some(0)
                && unwanted(&ends(id, family))
            {
                found.push(*id);
            }
        })?;
    let mut destroyed = 0;
    for id in found {
        request[REQUEST_ID..].copy_from_slice(&id);
        let sequence = socket.next_sequence();
        let mut builder = Builder::new();
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        builder.begin(SOCK_DESTROY, flags, sequence).bytes(&request);
        match socket.transact(builder.as_bytes(), sequence, sequence + 1) {
            Ok(()) => destroyed += 1,
            // It has ended by itself.
            Err(Error::Refused(Errno::NOENT)) => {}
            Err(Error::Refused(Errno::OPNOTSUPP | Errno::PERM)) => return Ok(destroyed),
            Err(e) => return Err(e),
        }
    }
    Ok(destroyed)
}

/// How many bytes wait in the receive queues of connections of `family` (`AF_INET`, `AF_INET6`) that no process holds: those
/// that a listening socket has not accepted yet, among others. A FIN counts as a byte.
///
/// # Errors
/// The tables cannot be read.
pub fn held_by_nobody(socket: &mut Socket, family: u8) -> Result<HashMap<Ends, u32>, Error> {
    /// `TCP_ESTABLISHED`, `TCP_CLOSE_WAIT`
    const STATES: u32 = 1 << 1 | 1 << 8;
    /// Where the answer has the length of the receive queue.
    const RECORD_RECEIVED: usize = 56;
    let mut request = [0u8; REQUEST];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&STATES.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |found: &mut HashMap<Ends, u32>, message| {
        let id = message.body.get(RECORD_ID..).and_then(|b| b.first_chunk::<ID>());
        if let Some(id) = id
            && u32_at(message.body, RECORD_INODE) == Some(0)
        {
            found.insert(ends(id, family), u32_at(message.body, RECORD_RECEIVED).unwrap_or(0));
        }
    })
}

/// Handshakes of `family` (`AF_INET`, `AF_INET6`) that listening sockets have begun and that are not done.
///
/// # Errors
/// The tables cannot be read.
pub fn half_open(socket: &mut Socket, family: u8) -> Result<Vec<Ends>, Error> {
    /// `TCP_SYN_RECV`
    const STATES: u32 = 1 << 3;
    let mut request = [0u8; REQUEST];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&STATES.to_ne_bytes());
    socket.dump(SOCK_DIAG_BY_FAMILY, &request, |found: &mut Vec<Ends>, message| {
        let id = message.body.get(RECORD_ID..).and_then(|b| b.first_chunk::<ID>());
        found.extend(id.map(|id| ends(id, family)));
    })
}

/// IPv4 addresses in IPv6 sockets as IPv4.
fn ends(id: &[u8; ID], family: u8) -> Ends {
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let address = |at: usize| match i32::from(family) {
        libc::AF_INET => Ipv4Addr::new(id[at], id[at + 1], id[at + 2], id[at + 3]).into(),
        _ => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&id[at..at + 16]);
            IpAddr::from(Ipv6Addr::from(octets)).to_canonical()
        }
    };
    ((address(4), port(0)), (address(20), port(2)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diag;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn what_lingers_is_destroyed_and_what_is_held_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let held = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let lingers = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _servers = [listener.accept().unwrap(), listener.accept().unwrap()];
        let end = |s: &TcpStream| {
            let (a, b) = (s.local_addr().unwrap(), s.peer_addr().unwrap());
            ((a.ip(), a.port()), (b.ip(), b.port()))
        };
        let wanted = [end(&held), end(&lingers)];
        // It waits for the FIN of the other end, which does not come.
        drop(lingers);
        let mut socket = diag::open().unwrap();
        let unwanted = |e: &Ends| wanted.contains(e);
        match orphans(&mut socket, libc::AF_INET as u8, unwanted).unwrap() {
            // Without the capability, or on a kernel without SOCK_DESTROY.
            0 => return,
            n => assert_eq!(n, 1),
        }
        assert_eq!(orphans(&mut socket, libc::AF_INET as u8, unwanted), Ok(0));
        assert!(held.peer_addr().is_ok());
    }
}
