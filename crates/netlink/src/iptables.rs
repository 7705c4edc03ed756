//! Rules in the form of iptables on top of nftables: the chains `INPUT` and `OUTPUT` of the tables `ip filter` and
//! `ip6 filter`. This is what CRIU's network lock leaves when it has run `iptables`, and what it looks for then.
//!
//! Rules of the older kind, which iptables-legacy makes, are in tables that only its own interface shows.

use crate::message::{Builder, attributes};
use crate::nftables::{self, Connection, PASS_MARK};
use crate::socket::{Error, Socket};
use crate::transaction::{
    Batch, DELETE_CHAIN, DELETE_RULE, DELETE_TABLE, DROP, EQUAL, GET_RULE, HOOK_INPUT, HOOK_OUTPUT,
    JUMP, META_L4PROTO, META_MARK, NETWORK_HEADER, NEW_CHAIN, NEW_RULE, NEW_TABLE, NFPROTO_IPV4,
    NFPROTO_IPV6, NOT_EQUAL, REGISTER, SUBSYSTEM, TRANSPORT_HEADER, compare, drop_packet,
    expression, meta, number, text,
};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// One end of a connection, then the other.
pub type Ends = ((IpAddr, u16), (IpAddr, u16));

const TABLE: &str = "filter";
/// A kind of data of rules that no other program knows: a comment would have to be named to have iptables remove the rule.
const NOTE: u8 = b'r';
/// The chain that blocks a whole network namespace, with a jump to it in the others.
const CRIU_CHAIN: &[u8] = b"CRIU\0";

/// A protocol family: its number, the length of its addresses, where they are in the header.
struct Family {
    number: u8,
    address: u32,
    source: u32,
    destination: u32,
}

const FAMILIES: [Family; 2] = [
    Family { number: NFPROTO_IPV4, address: 4, source: 12, destination: 16 },
    Family { number: NFPROTO_IPV6, address: 16, source: 8, destination: 24 },
];

/// Blocks `connections` by a rule each and direction, all in one transaction. The comment is seen by [`comments`] only.
///
/// # Errors
/// The kernel has no nftables, or permission is missing (`CAP_NET_ADMIN`).
pub fn block(connections: &[Connection], comment: &str) -> Result<(), Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let mut batch = Batch::new(&mut socket);
    let create = libc::NLM_F_CREATE;
    let table = text(TABLE);
    for family in &FAMILIES {
        let of_family = |c: &&Connection| {
            let four = c.0.ip().to_canonical().is_ipv4();
            four == (family.number == NFPROTO_IPV4)
        };
        let connections: Vec<&Connection> = connections.iter().filter(of_family).collect();
        if connections.is_empty() {
            continue;
        }
        // What is there already stays as it is.
        let data = nftables::user_data(nftables::COMMENT, comment);
        batch.message(NEW_TABLE, family.number, create).attribute(1, &table).attribute(6, &data);
        let data = nftables::user_data(NOTE, comment);
        for (chain, hook) in [("INPUT", HOOK_INPUT), ("OUTPUT", HOOK_OUTPUT)] {
            let message = batch.message(NEW_CHAIN, family.number, create);
            message.attribute(1, &table).attribute(3, &text(chain));
            let hooked = message.nest(4);
            message.attribute(1, &number(hook)).attribute(2, &number(0)).end(hooked);
            message.attribute(7, &text("filter"));
        }
        for (own, peer) in connections {
            for (chain, from, to) in [("INPUT", peer, own), ("OUTPUT", own, peer)] {
                let message = batch.message(NEW_RULE, family.number, create | libc::NLM_F_APPEND);
                message.attribute(1, &table).attribute(2, &text(chain));
                let list = message.nest(4);
                family.rule(message, from, to);
                message.end(list);
                message.attribute(7, &data);
            }
        }
    }
    batch.commit()
}

impl Family {
    /// Each part where iptables has it, or it would not know the rule again.
    fn rule(&self, to: &mut Builder, from: &std::net::SocketAddr, dest: &std::net::SocketAddr) {
        let octets = |ip: IpAddr| match ip.to_canonical() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let ports = [from.port().to_be_bytes(), dest.port().to_be_bytes()].concat();
        meta(to, META_L4PROTO);
        compare(to, EQUAL, &[libc::IPPROTO_TCP as u8]);
        for (offset, value) in
            [(self.source, octets(from.ip())), (self.destination, octets(dest.ip()))]
        {
            load(to, NETWORK_HEADER, offset, self.address);
            compare(to, EQUAL, &value);
        }
        meta(to, META_MARK);
        compare(to, NOT_EQUAL, &PASS_MARK.to_ne_bytes());
        load(to, TRANSPORT_HEADER, 0, 4);
        compare(to, EQUAL, &ports);
        expression(to, "counter", |to| {
            to.attribute(1, &[0; 8]).attribute(2, &[0; 8]);
        });
        drop_packet(to);
    }
}

fn load(to: &mut Builder, header: u32, offset: u32, len: u32) {
    expression(to, "payload", |to| {
        to.attribute(1, &number(REGISTER))
            .attribute(2, &number(header))
            .attribute(3, &number(offset))
            .attribute(4, &number(len));
    });
}

/// Removes the rules that block a connection for which `unwanted` says so: the sender comes first. Returns how many.
///
/// # Errors
/// Permission is missing.
pub fn remove_connections(unwanted: impl Fn(&Ends) -> bool) -> Result<usize, Error> {
    remove(|rule| rule.connection().is_some_and(|ends| unwanted(&ends)))
}

/// Removes the rules of [`block`] with a comment for which `unwanted` says so. Returns how many.
///
/// # Errors
/// Permission is missing.
pub fn remove_commented(unwanted: impl Fn(&str) -> bool) -> Result<usize, Error> {
    remove(|rule| rule.comment.as_deref().is_some_and(&unwanted))
}

/// Removes all rules that block single connections but for packets with [`PASS_MARK`], and those that block all of the
/// network namespace so (the chain `CRIU`). Returns how many.
///
/// # Errors
/// Permission is missing.
pub fn remove_all() -> Result<usize, Error> {
    remove(|rule| {
        rule.connection().is_some() || rule.jumps_to == CRIU_CHAIN || rule.chain == CRIU_CHAIN
    })
}

/// How many rules block single connections but for packets with [`PASS_MARK`], by their comments; those of CRIU have none.
///
/// # Errors
/// Permission is missing.
pub fn comments() -> Result<BTreeMap<Option<String>, usize>, Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let mut all = BTreeMap::new();
    for family in &FAMILIES {
        for rule in rules(&mut socket, family.number)? {
            if rule.connection().is_some() {
                *all.entry(rule.comment).or_default() += 1;
            }
        }
    }
    Ok(all)
}

/// The rules of the table; none if there is no such table.
fn rules(socket: &mut Socket, family: u8) -> Result<Vec<Rule>, Error> {
    let mut request = Builder::new();
    request.attribute(1, &text(TABLE));
    let mut body = vec![family, 0, 0, 0];
    body.extend_from_slice(request.as_bytes());
    let rules = socket.dump(SUBSYSTEM << 8 | GET_RULE, &body, |rules: &mut Vec<Rule>, message| {
        rules.extend(Rule::parse(message.body));
    });
    match rules {
        Err(Error::Refused(Errno::NOENT | Errno::AFNOSUPPORT)) => Ok(Vec::new()),
        rules => rules,
    }
}

fn remove(unwanted: impl Fn(&Rule) -> bool) -> Result<usize, Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let mut count = 0;
    for family in FAMILIES.iter().map(|f| f.number) {
        let (gone, left): (Vec<_>, Vec<_>) =
            rules(&mut socket, family)?.into_iter().partition(&unwanted);
        if gone.is_empty() {
            continue;
        }
        count += gone.len();
        let mut batch = Batch::new(&mut socket);
        for rule in &gone {
            batch
                .message(DELETE_RULE, family, 0)
                .attribute(1, &text(TABLE))
                .attribute(2, &rule.chain)
                .attribute(3, &rule.handle);
        }
        if gone.iter().any(|rule| rule.jumps_to == CRIU_CHAIN) {
            batch
                .message(DELETE_CHAIN, family, 0)
                .attribute(1, &text(TABLE))
                .attribute(3, CRIU_CHAIN);
        }
        batch.commit()?;
        if left.is_empty() {
            remove_own_table(&mut socket, family)?;
        }
    }
    Ok(count)
}

/// Removes the table, which has no rules, if it was [`block`] that made it.
fn remove_own_table(socket: &mut Socket, family: u8) -> Result<(), Error> {
    let own = nftables::tables_of(socket, family)?
        .iter()
        .any(|t| t.name == TABLE && t.comment.as_deref().is_some_and(|c| c.starts_with(COMMENT)));
    if own {
        let mut batch = Batch::new(socket);
        batch.message(DELETE_TABLE, family, 0).attribute(1, &text(TABLE));
        batch.commit()?;
    }
    Ok(())
}

/// How comments begin by which [`block`] knows what it has made itself.
pub const COMMENT: &str = "rewake";

/// What a rule of iptables compares and does.
#[derive(Debug, Default)]
struct Rule {
    chain: Vec<u8>,
    handle: Vec<u8>,
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
    ports: (Option<u16>, Option<u16>),
    spares_marked: bool,
    drops: bool,
    jumps_to: Vec<u8>,
    comment: Option<String>,
}

impl Rule {
    fn parse(body: &[u8]) -> Option<Rule> {
        let mut rule = Rule::default();
        // Where the register was loaded from last: header and offset, or the mark.
        let mut loaded = None;
        for (kind, value) in attributes(body.get(4..)?) {
            match kind {
                2 => rule.chain = value.to_vec(),
                3 => rule.handle = value.to_vec(),
                4 => {
                    for (_, element) in attributes(value) {
                        rule.expression(element, &mut loaded);
                    }
                }
                7 => rule.comment = nftables::text_of(NOTE, value),
                _ => {}
            }
        }
        Some(rule)
    }

    fn expression(&mut self, element: &[u8], loaded: &mut Option<(u32, u32)>) {
        let get = |within: &[u8], wanted| {
            attributes(within)
                .find_map(|(k, v)| (k == wanted).then(|| v.to_vec()))
                .unwrap_or_default()
        };
        let word = |bytes: &[u8]| bytes.first_chunk().map(|b| u32::from_be_bytes(*b));
        let (name, data) = (get(element, 1), get(element, 2));
        match name.strip_suffix(b"\0").unwrap_or(&name) {
            b"payload" => *loaded = word(&get(&data, 2)).zip(word(&get(&data, 3))),
            b"meta" => *loaded = word(&get(&data, 2)).map(|key| (MARK_LOADED, key)),
            b"cmp" => {
                let value = get(&get(&data, 3), 1);
                let equal = word(&get(&data, 2)) == Some(EQUAL);
                self.compared(*loaded, equal, &value);
            }
            b"immediate" => {
                let verdict = get(&get(&data, 2), 2);
                self.drops = word(&get(&verdict, 1)) == Some(DROP);
                if word(&get(&verdict, 1)) == Some(JUMP) {
                    self.jumps_to = get(&verdict, 2);
                }
            }
            // Matches of iptables that are not translated.
            b"match" => self.matched(&get(&data, 1), &get(&data, 3)),
            _ => {}
        }
    }

    fn compared(&mut self, loaded: Option<(u32, u32)>, equal: bool, value: &[u8]) {
        let ip = || match value.len() {
            4 => value.first_chunk::<4>().map(|b| IpAddr::from(*b)),
            _ => value.first_chunk::<16>().map(|b| IpAddr::from(*b)),
        };
        let port = |at| value.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b));
        match (loaded, equal) {
            (Some((NETWORK_HEADER, 12 | 8)), true) => self.source = ip(),
            (Some((NETWORK_HEADER, 16 | 24)), true) => self.destination = ip(),
            (Some((TRANSPORT_HEADER, 0)), true) => {
                self.ports.0 = port(0);
                // Both ports are compared at once if both are given.
                self.ports.1 = port(2).or(self.ports.1);
            }
            (Some((TRANSPORT_HEADER, 2)), true) => self.ports.1 = port(0),
            (Some((MARK_LOADED, META_MARK)), false) => {
                self.spares_marked = value == PASS_MARK.to_ne_bytes();
            }
            _ => {}
        }
    }

    /// `struct xt_tcp`, `struct xt_mark_mtinfo1`
    fn matched(&mut self, name: &[u8], info: &[u8]) {
        let port = |at: usize| {
            let (low, high) = (info.get(at..at + 2)?, info.get(at + 2..at + 4)?);
            (low == high).then(|| low.first_chunk().map(|b| u16::from_ne_bytes(*b)))?
        };
        match name.strip_suffix(b"\0").unwrap_or(name) {
            b"tcp" => self.ports = (port(0), port(4)),
            b"mark" => {
                self.spares_marked =
                    info.get(..4) == Some(&PASS_MARK.to_ne_bytes()) && info.get(8) == Some(&1);
            }
            _ => {}
        }
    }

    /// The connection whose packets it drops, unless they are marked to pass; the sender first.
    fn connection(&self) -> Option<Ends> {
        let ends = ((self.source?, self.ports.0?), (self.destination?, self.ports.1?));
        (self.drops && self.spares_marked).then_some(ends)
    }
}

/// Stands for "metadata" where else a header is.
const MARK_LOADED: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_iptables_are_found() {
        let rule = |both_ports: bool, mark: u32| {
            let mut to = Builder::new();
            to.bytes(&[NFPROTO_IPV4, 0, 0, 0]).attribute(2, b"INPUT\0").attribute(3, &[0; 8]);
            let list = to.nest(4);
            let load = |to: &mut Builder, base: u32, offset: u32, value: &[u8]| {
                super::load(to, base, offset, value.len() as u32);
                compare(to, EQUAL, value);
            };
            load(&mut to, NETWORK_HEADER, 12, &[127, 0, 0, 9]);
            load(&mut to, NETWORK_HEADER, 16, &[127, 0, 0, 8]);
            meta(&mut to, META_MARK);
            compare(&mut to, NOT_EQUAL, &mark.to_ne_bytes());
            if both_ports {
                load(&mut to, TRANSPORT_HEADER, 0, &[0, 9, 0, 80]);
            } else {
                load(&mut to, TRANSPORT_HEADER, 0, &[0, 9]);
                load(&mut to, TRANSPORT_HEADER, 2, &[0, 80]);
            }
            drop_packet(&mut to);
            to.end(list);
            Rule::parse(to.as_bytes()).unwrap().connection()
        };
        for both in [false, true] {
            let ends = (([127, 0, 0, 9].into(), 9), ([127, 0, 0, 8].into(), 80));
            assert_eq!(rule(both, PASS_MARK), Some(ends), "ports at once: {both}");
            assert_eq!(rule(both, 7), None, "someone else's rule");
        }
    }

    #[test]
    fn own_rules_are_found_again() {
        let own = std::net::SocketAddr::from(([127, 0, 0, 8], 80));
        let peer = std::net::SocketAddr::from(([127, 0, 0, 9], 9));
        let mut to = Builder::new();
        to.bytes(&[NFPROTO_IPV4, 0, 0, 0]).attribute(2, b"INPUT\0").attribute(3, &[0; 8]);
        let list = to.nest(4);
        FAMILIES[0].rule(&mut to, &peer, &own);
        to.end(list).attribute(7, &nftables::user_data(NOTE, "rewake 1"));
        let rule = Rule::parse(to.as_bytes()).unwrap();
        assert_eq!(rule.connection(), Some(((peer.ip(), 9), (own.ip(), 80))));
        assert_eq!(rule.comment.as_deref(), Some("rewake 1"));
    }
}
