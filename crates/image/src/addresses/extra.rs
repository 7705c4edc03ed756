//! Rules applied to what `rewake.img` says of internet sockets: datagrams that wait, multicast groups, options, connections that
//! have ended.

use super::rewrite::Outcome;
use super::rule::Rule;
use crate::messages::{RewakeFileEntry, RewakeSocketOptionEntry};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// `IPPROTO_IP`, `IP_MULTICAST_IF`: the address of an interface.
const MULTICAST_IF: (u32, u32) = (0, 32);

fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(<[u8; 4]>::try_from(octets).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(octets).ok()?.into()),
        _ => None,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Applies the rules to the extra state of all files of the checkpoint whose sockets had `outcome`, and counts there what
/// has matched. Returns the file ids of what was changed.
pub fn rewrite_extra<'f>(
    files: impl IntoIterator<Item = &'f mut RewakeFileEntry>,
    rules: &[Rule],
    outcome: &mut Outcome,
) -> HashSet<u32> {
    let Outcome { matches, locals, .. } = outcome;
    let mut changed = HashSet::new();
    let is_ours = |sender: SocketAddr| {
        locals.values().any(|own| {
            own.port() == sender.port()
                && (own.ip().is_unspecified() || own.ip().to_canonical() == sender.ip())
        })
    };
    for file in files {
        let own_port = locals.get(&file.id).map_or(0, SocketAddr::port);
        let mut apply = |ip: IpAddr, port: Option<u16>, named: bool| {
            for (rule, matches) in rules.iter().zip(matches.iter_mut()) {
                if (named && rule.is_port_only()) || port.is_none() && rule.has_port() {
                    continue;
                }
                if let Some((now, port)) = rule.apply(ip, port.unwrap_or(0)) {
                    *matches += 1;
                    changed.insert(file.id);
                    return (now, port);
                }
            }
            (ip, port.unwrap_or(0))
        };
        for datagram in &mut file.datagrams {
            if let Some(ip) = address(&datagram.source)
                && let Ok(port) = u16::try_from(datagram.source_port)
            {
                let sender = SocketAddr::new(ip.to_canonical(), port);
                let (ip, port) = apply(ip, Some(port), !is_ours(sender));
                (datagram.source, datagram.source_port) = (octets(ip), port.into());
            }
            if let Some(ip) = datagram.destination.as_deref().and_then(address) {
                datagram.destination = Some(octets(apply(ip, Some(own_port), true).0));
            }
        }
        for joined in &mut file.memberships {
            for place in std::iter::once(&mut joined.group).chain(&mut joined.sources) {
                if let Some(ip) = address(place) {
                    *place = octets(apply(ip, None, true).0);
                }
            }
        }
        if let Some(ended) = &mut file.ended
            && let (Some(ip), Ok(port)) = (address(&ended.address), u16::try_from(ended.port))
        {
            let (ip, port) = apply(ip, Some(port), false);
            (ended.address, ended.port) = (octets(ip), port.into());
        }
        let of_interface =
            |option: &&mut RewakeSocketOptionEntry| (option.level, option.number) == MULTICAST_IF;
        for option in file.socket_options.iter_mut().filter(of_interface) {
            if let Some(ip) = address(&option.value).filter(|ip| !ip.is_unspecified()) {
                option.value = octets(apply(ip, None, true).0);
            }
        }
    }
    changed
}
