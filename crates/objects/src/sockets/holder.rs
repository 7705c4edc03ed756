//! Who has an address: for errors only, since it reads all of /proc.

use rewake_netlink::diag;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// The processes that keep `address` from being bound, as text.
pub fn of_address(protocol: u32, address: SocketAddr) -> Option<String> {
    let mut socket = diag::open().ok()?;
    let mut inodes = HashSet::new();
    // A wildcard of IPv6 takes IPv4's port too.
    for family in [libc::AF_INET, libc::AF_INET6] {
        let table = diag::inet(&mut socket, family as u8, protocol as u8).unwrap_or_default();
        let in_the_way = |source: (IpAddr, u16)| {
            let (a, b) = (source.0.to_canonical(), address.ip().to_canonical());
            source.1 == address.port() && (a == b || a.is_unspecified() || b.is_unspecified())
        };
        inodes.extend(table.iter().filter(|(_, s)| in_the_way(s.source)).map(|(inode, _)| *inode));
    }
    of_inodes(&inodes)
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
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let path = process.path();
        // Besides processes there are /proc/self and others.
        if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(path.join("fd")) else { continue };
        let holds = descriptors.flatten().any(|d| {
            std::fs::read_link(d.path())
                .ok()
                .and_then(|link| {
                    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u32>().ok()
                })
                .is_some_and(|inode| inodes.contains(&inode))
        });
        if holds {
            let comm = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            holders.push(format!("{} ({})", process.file_name().display(), comm.trim_end()));
        }
    }
    match holders.as_slice() {
        [] => None,
        [one] => Some(format!("process {one}")),
        many => Some(format!("processes {}", many.join(", "))),
    }
}
