//! `/proc/PID/net/raw` and its like (`raw6`, `icmp`, `icmp6`: proc_net_tcp's form), `igmp` and `igmp6`.

use crate::ParseError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An internet socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// Its own address; of a raw socket, the port is the protocol.
    pub source: (IpAddr, u16),
    /// Where it is connected to.
    pub destination: (IpAddr, u16),
    /// `TCP_*` number.
    pub state: u8,
    /// Inode number; 0 if no descriptor is left.
    pub inode: u64,
}

/// Parses `/proc/PID/net/raw`, `raw6`, `icmp`, `icmp6`, `udp`, …; `file` is the name for errors.
///
/// # Errors
/// If a line is not as the kernel writes it.
pub fn sockets(file: &'static str, text: &[u8]) -> Result<Vec<Socket>, ParseError> {
    // The first line names the columns.
    let lines = text.split(|b| *b == b'\n').enumerate().skip(1).filter(|(_, l)| !l.is_empty());
    lines
        .map(|(at, line)| {
            let bad = |field| ParseError::malformed(file, field, at + 1, line);
            let mut words = line.split(|b| *b == b' ').filter(|word| !word.is_empty()).skip(1);
            let mut end = |field| words.next().and_then(endpoint).ok_or_else(|| bad(field));
            let (source, destination) = (end("local_address")?, end("rem_address")?);
            let state = words.next().and_then(|w| hex(w, 2)).ok_or_else(|| bad("st"))?;
            // Queues, timer, retransmissions, owner, timeout.
            let inode = words
                .nth(5)
                .and_then(|w| std::str::from_utf8(w).ok()?.parse().ok())
                .ok_or_else(|| bad("inode"))?;
            Ok(Socket { source, destination, state: state as u8, inode })
        })
        .collect()
}

/// A multicast group that an interface listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Number of the interface.
    pub interface: u32,
    /// The group.
    pub address: IpAddr,
}

/// Parses `/proc/PID/net/igmp`: an interface a line, followed by its groups.
///
/// # Errors
/// If a line is not as the kernel writes it.
pub fn igmp(text: &[u8]) -> Result<Vec<Group>, ParseError> {
    let mut groups = Vec::new();
    let mut interface = None;
    let lines = text.split(|b| *b == b'\n').enumerate().skip(1).filter(|(_, l)| !l.is_empty());
    for (at, line) in lines {
        let bad = |field| ParseError::malformed("igmp", field, at + 1, line);
        let mut words = line.split(|b| matches!(*b, b' ' | b'\t')).filter(|word| !word.is_empty());
        let first = words.next().ok_or_else(|| bad("Idx"))?;
        if line[0] == b'\t' {
            let word = hex(first, 8).ok_or_else(|| bad("Group"))?;
            let interface = interface.ok_or_else(|| bad("Group"))?;
            // A word of memory, in the machine's order.
            let address = Ipv4Addr::from(word.to_ne_bytes()).into();
            groups.push(Group { interface, address });
        } else {
            interface = Some(number(first).ok_or_else(|| bad("Idx"))?);
        }
    }
    Ok(groups)
}

/// Parses `/proc/PID/net/igmp6`: a group a line.
///
/// # Errors
/// If a line is not as the kernel writes it.
pub fn igmp6(text: &[u8]) -> Result<Vec<Group>, ParseError> {
    let lines = text.split(|b| *b == b'\n').enumerate().filter(|(_, l)| !l.is_empty());
    lines
        .map(|(at, line)| {
            let bad = |field| ParseError::malformed("igmp6", field, at + 1, line);
            let mut words = line.split(|b| *b == b' ').filter(|word| !word.is_empty());
            let interface = words.next().and_then(number).ok_or_else(|| bad("index"))?;
            let digits = words.nth(1).filter(|w| w.len() == 32).ok_or_else(|| bad("address"))?;
            let mut octets = [0; 16];
            for (octet, digits) in octets.iter_mut().zip(digits.chunks(2)) {
                *octet = hex(digits, 2).ok_or_else(|| bad("address"))? as u8;
            }
            Ok(Group { interface, address: Ipv6Addr::from(octets).into() })
        })
        .collect()
}

fn number(word: &[u8]) -> Option<u32> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// A number of exactly so many hexadecimal digits.
fn hex(word: &[u8], digits: usize) -> Option<u32> {
    let word = std::str::from_utf8(word).ok().filter(|w| w.len() == digits)?;
    word.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(word, 16).ok())?
}

/// `ADDRESS:PORT`: words of memory in the machine's order, and a number.
fn endpoint(word: &[u8]) -> Option<(IpAddr, u16)> {
    let colon = word.iter().position(|b| *b == b':')?;
    let (address, port) = (&word[..colon], hex(&word[colon + 1..], 4)?);
    let ip = match address.len() {
        8 => Ipv4Addr::from(hex(address, 8)?.to_ne_bytes()).into(),
        32 => {
            let mut octets = [0; 16];
            for (octets, digits) in octets.chunks_mut(4).zip(address.chunks(8)) {
                octets.copy_from_slice(&hex(digits, 8)?.to_ne_bytes());
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some((ip, port as u16))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn raw_sockets() {
        let text = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
    1: 0100007F:0001 0202A8C0:0000 01 00000000:00000000 00:00000000 00000000     0        0 31541 2 0000000000000000 0
";
        let found = sockets("raw", text).unwrap();
        assert_eq!(
            found,
            [Socket {
                source: ("127.0.0.1".parse().unwrap(), 1),
                destination: ("192.168.2.2".parse().unwrap(), 0),
                state: 1,
                inode: 31541,
            }]
        );
        let text = b"  sl  local_address                         remote_address
   58: 00000000000000000000000001000000:003A 000080FE000000000000000002000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 9 2 0000000000000000 0
";
        let found = sockets("raw6", text).unwrap();
        assert_eq!(found[0].source, ("::1".parse().unwrap(), 58));
        assert_eq!(found[0].destination.0, "fe80::2".parse::<IpAddr>().unwrap());
        for cut in 60..text.len() - 30 {
            let _ = sockets("raw6", &text[..cut]);
        }
        assert!(sockets("raw6", b"header\n 1: nonsense\n").is_err());
    }

    #[test]
    fn groups() {
        let text = b"Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n4\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t1\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let found = igmp(text).unwrap();
        let group =
            |interface, address: &str| Group { interface, address: address.parse().unwrap() };
        assert_eq!(found, [group(1, "224.0.0.1"), group(4, "224.0.0.251"), group(4, "224.0.0.1")]);
        assert!(igmp(b"Idx\n\t\t010000E0 1\n").is_err(), "a group of no interface");
        let text = b"4    eth0            ff0200000000000000000001ff000002     1 00000004 0\n";
        assert_eq!(igmp6(text).unwrap(), [group(4, "ff02::1:ff00:2")]);
        assert!(igmp6(b"4    eth0            ff02     1 00000004 0\n").is_err());
    }
}
