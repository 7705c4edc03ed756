//! Who has an address: for errors only, since it reads all of /proc.

use rewake_netlink::diag;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

/// What keeps an address from being bound.
#[derive(Debug, Default)]
pub struct InTheWay {
    /// Inode numbers of sockets that descriptors refer to.
    pub inodes: HashSet<u32>,
    /// Connections that no process has any more, which say goodbye or wait for stray segments.
    pub lingering: Vec<diag::Inet>,
    /// Sockets that are neither: the kernel's own.
    pub others: usize,
}

/// What keeps a socket of `protocol` from being bound to `address`; `v6only` is its `IPV6_V6ONLY`.
pub fn in_the_way(protocol: u32, address: SocketAddr, v6only: bool) -> InTheWay {
    let mut found = InTheWay::default();
    let Ok(mut socket) = diag::open() else { return found };
    for family in [libc::AF_INET, libc::AF_INET6] {
        let list = diag::inet_list(&mut socket, family as u8, protocol as u8).unwrap_or_default();
        for (inode, one) in list {
            let meet = meet((address.ip(), v6only), (one.source.0, one.v6only));
            // A handshake that is not done is not bound.
            if one.source.1 != address.port() || !meet || one.state == SYN_RECV {
                continue;
            }
            if inode != 0 {
                found.inodes.insert(inode);
            } else if lingers(one.state).is_some() {
                found.lingering.push(one);
            } else {
                found.others += 1;
            }
        }
    }
    found
}

/// `TCP_SYN_RECV`
const SYN_RECV: u8 = 3;

/// The name of a state that TCP has for connections which their programs have closed.
pub fn lingers(state: u8) -> Option<&'static str> {
    Some(match state {
        4 => "FIN_WAIT1",
        5 => "FIN_WAIT2",
        6 => "TIME_WAIT",
        9 => "LAST_ACK",
        11 => "CLOSING",
        _ => return None,
    })
}

/// Whether two sockets at these addresses, the flag being `IPV6_V6ONLY`, would receive the same.
fn meet(a: (IpAddr, bool), b: (IpAddr, bool)) -> bool {
    // A wildcard of IPv6 takes IPv4's port too.
    let takes = |(ip, v6only): (IpAddr, bool), other: IpAddr| {
        ip.is_unspecified() && (ip.is_ipv4() == other.is_ipv4() || ip.is_ipv6() && !v6only)
    };
    let (ip, other) = (a.0.to_canonical(), b.0.to_canonical());
    ip == other || takes((ip, a.1), other) || takes((other, b.1), ip)
}

/// The processes that have a connection from `address`, as text.
pub fn of_connection(protocol: u32, address: SocketAddr) -> Option<String> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let table = diag::inet(&mut diag::open().ok()?, family as u8, protocol as u8).ok()?;
    let own = |s: &diag::Inet| s.source == (address.ip(), address.port()) && s.destination.1 != 0;
    of_inodes(&table.iter().filter(|(_, s)| own(s)).map(|(inode, _)| *inode).collect())
}

/// The processes that hold sockets with these inode numbers, as text.
pub fn of_inodes(inodes: &HashSet<u32>) -> Option<String> {
    let mut holders = Vec::new();
    each(inodes, |process, _| {
        if holders.last() != Some(process) {
            holders.push(process.clone());
        }
    });
    in_words(&holders)
}

/// Those of the sockets with these inode numbers that somebody else than this process has too, or nobody.
pub fn not_ours_alone(inodes: &HashSet<u32>) -> HashSet<u32> {
    let mut holders: HashMap<u32, (bool, bool)> =
        inodes.iter().map(|i| (*i, Default::default())).collect();
    let own = format!("{} (", std::process::id());
    each(inodes, |process, inode| {
        let (us, others) = holders.entry(inode).or_default();
        *if process.starts_with(&own) { us } else { others } = true;
    });
    holders.into_iter().filter(|(_, held)| *held != (true, false)).map(|(inode, _)| inode).collect()
}

/// The processes that hold each of the sockets with these inode numbers, as text.
pub fn of_each(inodes: &HashSet<u32>) -> HashMap<u32, String> {
    let mut holders: HashMap<u32, Vec<String>> = HashMap::new();
    each(inodes, |process, inode| {
        let list = holders.entry(inode).or_default();
        if list.last() != Some(process) {
            list.push(process.clone());
        }
    });
    holders.into_iter().filter_map(|(inode, list)| Some((inode, in_words(&list)?))).collect()
}

fn in_words(holders: &[String]) -> Option<String> {
    match holders {
        [] => None,
        [one] => Some(format!("process {one}")),
        many => Some(format!("processes {}", many.join(", "))),
    }
}

/// Calls `found` with process and inode number for each descriptor of one of the sockets.
fn each(inodes: &HashSet<u32>, mut found: impl FnMut(&String, u32)) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    for process in processes.flatten() {
        let path = process.path();
        // Besides processes there are /proc/self and others.
        if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(path.join("fd")) else { continue };
        let held = descriptors.flatten().filter_map(|d| {
            let link = std::fs::read_link(d.path()).ok()?;
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse::<u32>().ok().filter(|inode| inodes.contains(inode))
        });
        let held: Vec<u32> = held.collect();
        if held.is_empty() {
            continue;
        }
        let comm = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        let name = format!("{} ({})", process.file_name().display(), comm.trim_end());
        held.into_iter().for_each(|inode| found(&name, inode));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_meet_what_they_take_in() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (a, only_a, b, only_b, wanted) in [
            ("127.0.0.1", false, "127.0.0.1", false, true),
            ("127.0.0.1", false, "127.0.0.2", false, false),
            ("127.0.0.1", false, "::ffff:127.0.0.1", false, true),
            ("0.0.0.0", false, "127.0.0.1", false, true),
            ("0.0.0.0", false, "::1", false, false),
            ("::", true, "127.0.0.1", false, false),
            ("::", false, "127.0.0.1", false, true),
            ("::", false, "0.0.0.0", false, true),
            ("::", true, "0.0.0.0", false, false),
            ("::", true, "::1", true, true),
        ] {
            let (a, b) = ((ip(a), only_a), (ip(b), only_b));
            assert_eq!((meet(a, b), meet(b, a)), (wanted, wanted), "{a:?} {b:?}");
        }
    }
}
