//! Rules applied to the sockets of a checkpoint.

use super::rule::Rule;
use crate::messages::{FileEntry, InetSkEntry};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const TCP: u32 = 6;
const UDP: u32 = 17;
const UDP_LITE: u32 = 136;

/// A socket whose addresses were changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// File id.
    pub id: u32,
    /// `IPPROTO_*`.
    pub protocol: u32,
    /// Its own address, before and now.
    pub local: (SocketAddr, SocketAddr),
    /// Its peer's address, before and now; `None` if it is not connected.
    pub peer: Option<(SocketAddr, SocketAddr)>,
    /// Its peer is a socket of the same checkpoint.
    pub peer_inside: bool,
    /// It may be bound to addresses that no interface has (`IP_FREEBIND`).
    pub freebind: bool,
}

/// What rules did to a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many addresses each rule has matched.
    pub matches: Vec<usize>,
    /// The sockets that were changed.
    pub changes: Vec<Change>,
    /// The addresses that sockets had, by file id.
    pub locals: HashMap<u32, SocketAddr>,
}

impl Change {
    /// How texts call the socket: as it was before.
    #[must_use]
    pub fn object(&self) -> String {
        let protocol = match self.protocol {
            TCP => "TCP",
            UDP => "UDP",
            UDP_LITE => "UDP-Lite",
            _ => "raw",
        };
        match &self.peer {
            Some((peer, _)) => format!("{protocol} connection {} to {peer}", self.local.0),
            None => format!("{protocol} socket {}", self.local.0),
        }
    }

    /// What its peer must do, if it has one outside the checkpoint that knows it by its old address.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let (_, peer) = self.peer.filter(|_| !self.peer_inside && self.local.0 != self.local.1)?;
        let (old, new) = self.local;
        let remedy = if self.protocol == TCP {
            "restore it from images with the same rule, translate the address on its side, or use --tcp-close"
        } else {
            "it must be told"
        };
        Some(format!(
            "{} goes on at {new}, but its peer {peer} still sends to {old}: {remedy}",
            self.object()
        ))
    }
}

/// One end of a socket, with the width of its address in the image.
fn end(family: u32, words: &[u32], port: u32) -> Option<SocketAddr> {
    let ip: IpAddr = match (family, words) {
        (AF_INET, [word, ..]) => Ipv4Addr::from(word.to_ne_bytes()).into(),
        (AF_INET6, [a, b, c, d, ..]) => {
            let mut octets = [0; 16];
            for (at, word) in octets.chunks_mut(4).zip([a, b, c, d]) {
                at.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::try_from(port).ok()?))
}

fn words(ip: IpAddr) -> Vec<u32> {
    let word = |bytes: &[u8]| bytes.first_chunk().map(|b| u32::from_ne_bytes(*b));
    match ip {
        IpAddr::V4(v4) => v4.octets().chunks(4).filter_map(word).collect(),
        IpAddr::V6(v6) => v6.octets().chunks(4).filter_map(word).collect(),
    }
}

/// An address as it is compared: mapped IPv4 as IPv4.
fn plain(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

fn has_ports(entry: &InetSkEntry) -> bool {
    matches!(entry.proto, TCP | UDP | UDP_LITE)
}

fn ends(entry: &InetSkEntry) -> Option<(SocketAddr, Option<SocketAddr>)> {
    let local = end(entry.family, &entry.src_addr, entry.src_port)?;
    let peer = end(entry.family, &entry.dst_addr, entry.dst_port).filter(|p| p.port() != 0);
    Some((local, peer))
}

/// Applies the first rule that matches to every address of every internet socket: to their own addresses, and to those of
/// peers where a rule names an address, or the peer is in the same checkpoint.
pub fn rewrite<'f>(files: impl IntoIterator<Item = &'f mut FileEntry>, rules: &[Rule]) -> Outcome {
    let mut outcome = Outcome { matches: vec![0; rules.len()], ..Outcome::default() };
    let mut sockets: Vec<&mut InetSkEntry> =
        files.into_iter().filter_map(|f| f.isk.as_deref_mut()).collect();
    // Both ends of a connection are in the checkpoint if it is there seen from either side.
    let connections: HashSet<(u32, SocketAddr, SocketAddr)> = sockets
        .iter()
        .filter_map(|s| Some((s, ends(s)?)))
        .filter_map(|(s, (local, peer))| Some((s.proto, plain(local), plain(peer?))))
        .collect();
    for socket in &mut sockets {
        let Some((local, peer)) = ends(socket) else { continue };
        outcome.locals.insert(socket.id, local);
        let ports = has_ports(socket);
        let inside = peer
            .is_some_and(|peer| connections.contains(&(socket.proto, plain(peer), plain(local))));
        let mut change = |end: SocketAddr, is_peer: bool| {
            // A socket that is bound to nothing has no address.
            if end.port() == 0 && end.ip().is_unspecified() {
                return end;
            }
            for (rule, matches) in rules.iter().zip(&mut outcome.matches) {
                let applies =
                    (ports || !rule.has_port()) && (!is_peer || inside || !rule.is_port_only());
                if applies && let Some((ip, port)) = rule.apply(end.ip(), end.port()) {
                    *matches += 1;
                    return SocketAddr::new(ip, port);
                }
            }
            end
        };
        let now = change(local, false);
        let peer_now = peer.map(|peer| (peer, change(peer, true)));
        if now == local && peer_now.is_none_or(|(old, new)| old == new) {
            continue;
        }
        outcome.changes.push(Change {
            id: socket.id,
            protocol: socket.proto,
            local: (local, now),
            peer: peer_now,
            peer_inside: inside,
            freebind: socket.ip_opts.as_ref().and_then(|o| o.freebind) == Some(true),
        });
        (socket.src_addr, socket.src_port) = (words(now.ip()), now.port().into());
        if let Some((_, peer)) = peer_now {
            (socket.dst_addr, socket.dst_port) = (words(peer.ip()), peer.port().into());
        }
    }
    outcome.changes.sort_by_key(|change| change.id);
    outcome
}
