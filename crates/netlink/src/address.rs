//! Addresses of the interfaces of a network namespace: rtnetlink(7), `RTM_GETADDR`.

use crate::message::attributes;
use crate::socket::{Error, Socket};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const RTM_GETADDR: u16 = 22;
const RTM_NEWADDR: u16 = 20;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// `struct ifaddrmsg`
const RECORD: usize = 8;

/// All addresses, in the order of the interfaces; `socket` is one of `NETLINK_ROUTE`.
///
/// # Errors
/// The kernel refuses the request.
pub fn addresses(socket: &mut Socket) -> Result<Vec<IpAddr>, Error> {
    socket.dump(RTM_GETADDR, &[0; RECORD], |list: &mut Vec<IpAddr>, message| {
        if message.kind == RTM_NEWADDR {
            list.extend(record(message.body));
        }
    })
}

fn record(body: &[u8]) -> Option<IpAddr> {
    let attributes: Vec<_> = attributes(body.get(RECORD..)?).collect();
    let find = |kind| attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| *value);
    // Of a point-to-point interface IFA_ADDRESS is the other end.
    let value = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS))?;
    if let Ok(v4) = <[u8; 4]>::try_from(value) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(value).ok().map(|v6| Ipv6Addr::from(v6).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there() {
        let mut socket = Socket::open(libc::NETLINK_ROUTE).unwrap();
        let all = addresses(&mut socket).unwrap();
        assert!(all.contains(&Ipv4Addr::LOCALHOST.into()), "{all:?}");
    }

    #[test]
    fn records() {
        let mut body = vec![0; RECORD];
        assert_eq!(record(&body), None);
        body.extend([8, 0, 1, 0, 10, 0, 0, 9]);
        assert_eq!(record(&body), Some(Ipv4Addr::new(10, 0, 0, 9).into()));
        body.extend([8, 0, 2, 0, 10, 0, 0, 1]);
        assert_eq!(record(&body), Some(Ipv4Addr::new(10, 0, 0, 1).into()));
        assert_eq!(record(&body[..RECORD + 6]), None, "cut off");
    }
}
