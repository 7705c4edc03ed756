//! Who has an address: for errors only, since it reads all of /proc.

use rewake_netlink::diag;
use std::collections::{HashMap, HashSet};
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
    each(inodes, |process, _| {
        if holders.last() != Some(process) {
            holders.push(process.clone());
        }
    });
    in_words(&holders)
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
