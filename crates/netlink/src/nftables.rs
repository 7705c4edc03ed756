//! nftables by netlink (linux/netfilter/nf_tables.h): a table that drops the packets of a set of TCP connections, made and
//! removed in one transaction.

use crate::message::{Builder, attributes};
use crate::socket::{Error, Socket};
use rustix::io::Errno;
use std::net::{IpAddr, SocketAddr};

/// Packets with this mark pass: what a restore sends itself, on behalf of the peer. It is CRIU's.
pub const PASS_MARK: u32 = 0xc114;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;

const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// The table goes when the socket that made it is closed.
const TABLE_OWNER: u32 = 0x2;

const LIST_ELEMENT: u16 = 1;
const HOOK_INPUT: u32 = 1;
const HOOK_OUTPUT: u32 = 3;
/// The first of the registers of four bytes.
const REGISTER: u32 = 8;
const VERDICT: u32 = 0;
const DROP: u32 = 0;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// Attributes have lengths of 16 bits: so many elements go into one.
const ELEMENTS: usize = 800;

/// A TCP connection: own address, the peer's.
pub type Connection = (SocketAddr, SocketAddr);

/// A table that blocks connections, and vanishes when this is dropped or its process ends.
#[derive(Debug)]
pub struct Block {
    _owner: Socket,
}

impl Block {
    /// Blocks `connections` for as long as this lives, by a table named `table`.
    ///
    /// # Errors
    /// The kernel has no nftables, or permission is missing (`CAP_NET_ADMIN`).
    pub fn new(table: &str, connections: &[Connection]) -> Result<Block, Error> {
        let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
        block(&mut socket, table, connections, TABLE_OWNER)?;
        Ok(Block { _owner: socket })
    }

    /// Blocks `connections` by a table named `table` until [`remove`].
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn stay(table: &str, connections: &[Connection]) -> Result<(), Error> {
        block(&mut Socket::open(libc::NETLINK_NETFILTER)?, table, connections, 0)
    }
}

/// Removes the table `table` (of the family `inet`): whether there was one.
///
/// # Errors
/// Permission is missing, or it belongs to another process.
pub fn remove(table: &str) -> Result<bool, Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let mut batch = Batch::new(&mut socket);
    batch.message(DELETE_TABLE, NFPROTO_INET, 0).attribute(1, &text(table));
    match batch.commit() {
        Ok(()) => Ok(true),
        Err(Error::Refused(Errno::NOENT)) => Ok(false),
        Err(e) => Err(e),
    }
}

fn text(name: &str) -> Vec<u8> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    text
}

/// Messages that take effect together or not at all.
struct Batch<'a> {
    socket: &'a mut Socket,
    builder: Builder,
    first: u32,
    next: u32,
}

impl<'a> Batch<'a> {
    fn new(socket: &'a mut Socket) -> Batch<'a> {
        let first = socket.next_sequence();
        let mut builder = Builder::new();
        builder.begin(BATCH_BEGIN, libc::NLM_F_REQUEST as u16, first).bytes(&[
            0,
            0,
            0,
            SUBSYSTEM as u8,
        ]);
        Batch { socket, builder, first: first + 1, next: first + 1 }
    }

    /// Begins a message; `flags` besides those that every one has.
    fn message(&mut self, kind: u16, family: u8, flags: i32) -> &mut Builder {
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags;
        self.builder
            .begin(SUBSYSTEM << 8 | kind, flags as u16, self.next)
            .bytes(&[family, 0, 0, 0]);
        self.next += 1;
        &mut self.builder
    }

    fn commit(mut self) -> Result<(), Error> {
        self.builder.begin(BATCH_END, libc::NLM_F_REQUEST as u16, self.next).bytes(&[
            0,
            0,
            0,
            SUBSYSTEM as u8,
        ]);
        self.socket.transact(self.builder.as_bytes(), self.first, self.next)
    }
}

fn number(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn block(
    socket: &mut Socket,
    table: &str,
    connections: &[Connection],
    flags: u32,
) -> Result<(), Error> {
    let name = text(table);
    let mut batch = Batch::new(socket);
    let create = libc::NLM_F_CREATE;
    let exclusive = create | libc::NLM_F_EXCL;
    batch
        .message(NEW_TABLE, NFPROTO_INET, exclusive)
        .attribute(1, &name)
        .attribute(2, &number(flags));
    let keys: Vec<Vec<u8>> = connections.iter().map(key).collect();
    let families = [
        Family {
            proto: NFPROTO_IPV4,
            set: "conns4",
            address: 4,
            source: 12,
            destination: 16,
            id: 1,
        },
        Family {
            proto: NFPROTO_IPV6,
            set: "conns6",
            address: 16,
            source: 8,
            destination: 24,
            id: 2,
        },
    ];
    for family in &families {
        let set = text(family.set);
        batch
            .message(NEW_SET, NFPROTO_INET, create)
            .attribute(1, &name)
            .attribute(2, &set)
            .attribute(3, &number(0))
            .attribute(4, &number(family.key_type()))
            .attribute(5, &number(family.key_len() as u32))
            .attribute(10, &number(family.id));
        let keys: Vec<&Vec<u8>> = keys.iter().filter(|k| k.len() == family.key_len()).collect();
        for keys in keys.chunks(ELEMENTS) {
            let message = batch.message(NEW_ELEMENT, NFPROTO_INET, create);
            message.attribute(1, &name).attribute(2, &set).attribute(4, &number(family.id));
            let list = message.nest(3);
            for key in keys {
                let element = message.nest(LIST_ELEMENT);
                let data = message.nest(1);
                message.attribute(1, key).end(data).end(element);
            }
            message.end(list);
        }
    }
    for (chain, hook) in [("INPUT", HOOK_INPUT), ("OUTPUT", HOOK_OUTPUT)] {
        let message = batch.message(NEW_CHAIN, NFPROTO_INET, create);
        message.attribute(1, &name).attribute(3, &text(chain));
        let hooked = message.nest(4);
        // Where filters are.
        message.attribute(1, &number(hook)).attribute(2, &number(0)).end(hooked);
        message.attribute(7, &text("filter"));
    }
    for (chain, incoming) in [("INPUT", true), ("OUTPUT", false)] {
        for family in &families {
            let message = batch.message(NEW_RULE, NFPROTO_INET, create | libc::NLM_F_APPEND);
            message.attribute(1, &name).attribute(2, &text(chain));
            let expressions = message.nest(4);
            family.rule(message, incoming);
            message.end(expressions);
        }
    }
    batch.commit()
}

/// Own address, own port, the peer's address, the peer's port, each padded to four bytes.
fn key((source, destination): &Connection) -> Vec<u8> {
    let mut key = Vec::with_capacity(40);
    for end in [source, destination] {
        match end.ip().to_canonical() {
            IpAddr::V4(ip) => key.extend(ip.octets()),
            IpAddr::V6(ip) => key.extend(ip.octets()),
        }
        key.extend(end.port().to_be_bytes());
        key.extend([0, 0]);
    }
    key
}

struct Family {
    proto: u8,
    set: &'static str,
    /// Length of an address.
    address: u32,
    /// Where the addresses are in the network header.
    source: u32,
    destination: u32,
    id: u32,
}

impl Family {
    fn key_len(&self) -> usize {
        self.address as usize * 2 + 8
    }

    /// How nft(8) shows the key: address . service . address . service, six bits each.
    fn key_type(&self) -> u32 {
        const SERVICE: u32 = 13;
        let address = if self.address == 4 { 7 } else { 8 };
        [address, SERVICE, address, SERVICE].iter().fold(0, |all, kind| all << 6 | kind)
    }

    fn rule(&self, to: &mut Builder, incoming: bool) {
        meta(to, META_MARK);
        compare(to, NOT_EQUAL, &PASS_MARK.to_ne_bytes());
        meta(to, META_NFPROTO);
        compare(to, EQUAL, &[self.proto]);
        meta(to, META_L4PROTO);
        compare(to, EQUAL, &[libc::IPPROTO_TCP as u8]);
        let (own, peer) = if incoming {
            (self.destination, self.source)
        } else {
            (self.source, self.destination)
        };
        let (own_port, peer_port) = if incoming { (2, 0) } else { (0, 2) };
        let mut register = REGISTER;
        for (base, offset, len) in [
            (NETWORK_HEADER, own, self.address),
            (TRANSPORT_HEADER, own_port, 2),
            (NETWORK_HEADER, peer, self.address),
            (TRANSPORT_HEADER, peer_port, 2),
        ] {
            expression(to, "payload", |to| {
                to.attribute(1, &number(register))
                    .attribute(2, &number(base))
                    .attribute(3, &number(offset))
                    .attribute(4, &number(len));
            });
            register += len.div_ceil(4);
        }
        expression(to, "lookup", |to| {
            to.attribute(1, &text(self.set))
                .attribute(2, &number(REGISTER))
                .attribute(4, &number(self.id));
        });
        expression(to, "immediate", |to| {
            to.attribute(1, &number(VERDICT));
            let data = to.nest(2);
            let verdict = to.nest(2);
            to.attribute(1, &number(DROP)).end(verdict).end(data);
        });
    }
}

fn expression(to: &mut Builder, name: &str, body: impl FnOnce(&mut Builder)) {
    let element = to.nest(LIST_ELEMENT);
    to.attribute(1, &text(name));
    let data = to.nest(2);
    body(to);
    to.end(data).end(element);
}

fn meta(to: &mut Builder, key: u32) {
    expression(to, "meta", |to| {
        to.attribute(1, &number(REGISTER)).attribute(2, &number(key));
    });
}

fn compare(to: &mut Builder, operation: u32, value: &[u8]) {
    expression(to, "cmp", |to| {
        to.attribute(1, &number(REGISTER)).attribute(2, &number(operation));
        let data = to.nest(3);
        to.attribute(1, value).end(data);
    });
}

/// Removes what CRIU, using iptables, leaves in the chains `INPUT` and `OUTPUT` of the table `filter` for these
/// connections: how many rules. Only iptables that stand on nftables are seen.
///
/// # Errors
/// Permission is missing.
pub fn remove_criu_rules(connections: &[Connection]) -> Result<usize, Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let mut found: Vec<(u8, Rule)> = Vec::new();
    for family in [NFPROTO_IPV4, NFPROTO_IPV6] {
        let mut request = Builder::new();
        request.attribute(1, &text("filter"));
        let mut body = vec![family, 0, 0, 0];
        body.extend_from_slice(request.as_bytes());
        let rules =
            socket.dump(SUBSYSTEM << 8 | GET_RULE, &body, |rules: &mut Vec<Rule>, message| {
                rules.extend(Rule::parse(message.body));
            });
        match rules {
            Ok(rules) => found.extend(
                rules.into_iter().filter(|r| r.blocks(connections)).map(|rule| (family, rule)),
            ),
            // No such table.
            Err(Error::Refused(Errno::NOENT | Errno::AFNOSUPPORT)) => {}
            Err(e) => return Err(e),
        }
    }
    if found.is_empty() {
        return Ok(0);
    }
    let mut batch = Batch::new(&mut socket);
    for (family, rule) in &found {
        batch
            .message(DELETE_RULE, *family, 0)
            .attribute(1, b"filter\0")
            .attribute(2, &rule.chain)
            .attribute(3, &rule.handle);
    }
    batch.commit()?;
    Ok(found.len())
}

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
            b"immediate" => self.drops = word(&get(&get(&get(&data, 2), 2), 1)) == Some(DROP),
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

    fn blocks(&self, connections: &[Connection]) -> bool {
        let ends = (self.source, self.ports.0, self.destination, self.ports.1);
        let (Some(a), Some(ap), Some(b), Some(bp)) = ends else { return false };
        self.drops
            && self.spares_marked
            && connections.iter().any(|(own, peer)| {
                let own = (own.ip().to_canonical(), own.port());
                let peer = (peer.ip().to_canonical(), peer.port());
                (own, peer) == ((a, ap), (b, bp)) || (peer, own) == ((a, ap), (b, bp))
            })
    }
}

/// Stands for "metadata" where else a header is.
const MARK_LOADED: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    fn pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (a, listener.accept().unwrap().0)
    }

    fn arrives(from: &mut TcpStream, to: &mut TcpStream) -> bool {
        to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        from.write_all(b"x").unwrap();
        to.read(&mut [0; 8]).is_ok()
    }

    fn ends(s: &TcpStream) -> Connection {
        (s.local_addr().unwrap(), s.peer_addr().unwrap())
    }

    /// Root only: elsewhere the kernel refuses, which is told.
    fn blocked(address: &str) {
        let name = format!("rewake-test-{}-{}", std::process::id(), address.len());
        let (mut a, mut b) = pair(address);
        let (mut c, mut d) = pair(address);
        let block = match Block::new(&name, &[ends(&a)]) {
            Err(Error::Refused(Errno::PERM)) => return,
            block => block.unwrap(),
        };
        assert!(!arrives(&mut a, &mut b) && !arrives(&mut b, &mut a));
        assert!(arrives(&mut c, &mut d), "others pass");
        let kept = format!("{name}-kept");
        Block::stay(&kept, &[ends(&a)]).unwrap();
        drop(block);
        assert_eq!(remove(&name), Ok(false), "it goes with its owner");
        assert!(!arrives(&mut a, &mut b));
        assert_eq!(remove(&kept), Ok(true));
        assert_eq!(remove(&kept), Ok(false));
        b.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        b.read_exact(&mut [0; 2]).unwrap();
    }

    #[test]
    fn ipv4_connections_are_blocked() {
        blocked("127.0.0.1:0");
    }

    #[test]
    fn ipv6_connections_are_blocked() {
        blocked("[::1]:0");
    }

    #[test]
    fn rules_of_iptables_are_found() {
        let (own, peer) = (([127, 0, 0, 8], 80).into(), ([127, 0, 0, 9], 9).into());
        let rule = |both_ports: bool, mark: u32| {
            let mut to = Builder::new();
            to.bytes(&[NFPROTO_IPV4, 0, 0, 0]).attribute(2, b"INPUT\0").attribute(3, &[0; 8]);
            let list = to.nest(4);
            let load = |to: &mut Builder, base: u32, offset: u32, value: &[u8]| {
                expression(to, "payload", |to| {
                    to.attribute(2, &number(base)).attribute(3, &number(offset));
                });
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
            expression(&mut to, "immediate", |to| {
                let data = to.nest(2);
                let verdict = to.nest(2);
                to.attribute(1, &number(DROP)).end(verdict).end(data);
            });
            to.end(list);
            Rule::parse(to.as_bytes()).unwrap()
        };
        for both in [false, true] {
            assert!(rule(both, PASS_MARK).blocks(&[(own, peer)]), "ports at once: {both}");
            assert!(!rule(both, 7).blocks(&[(own, peer)]), "someone else's rule");
            assert!(!rule(both, PASS_MARK).blocks(&[(own, SocketAddr::new(peer.ip(), 10))]));
        }
    }

    #[test]
    fn many_connections_are_one_transaction() {
        let peer = SocketAddr::from(([127, 0, 0, 9], 9));
        let all: Vec<Connection> =
            (0..20_000u16).map(|port| (SocketAddr::from(([127, 0, 0, 8], port)), peer)).collect();
        match Block::new(&format!("rewake-test-many-{}", std::process::id()), &all) {
            Err(Error::Refused(Errno::PERM)) => {}
            block => drop(block.unwrap()),
        }
    }
}
