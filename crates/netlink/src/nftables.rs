//! nftables by netlink (linux/netfilter/nf_tables.h): a table that drops the packets of a set of TCP connections, made and
//! removed in one transaction.

use crate::message::{Builder, attributes};
use crate::socket::{Error, Socket};
use crate::transaction::{
    Batch, DELETE_ELEMENT, DELETE_TABLE, ELEMENTS, EQUAL, GET_ELEMENT, GET_TABLE, HOOK_INPUT,
    HOOK_OUTPUT, LIST_ELEMENT, META_L4PROTO, META_MARK, META_NFPROTO, NETWORK_HEADER, NEW_CHAIN,
    NEW_ELEMENT, NEW_RULE, NEW_SET, NEW_TABLE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NOT_EQUAL,
    REGISTER, SUBSYSTEM, TABLE_OWNER, TRANSPORT_HEADER, compare, drop_packet, expression, meta,
    number, text,
};
use rustix::io::Errno;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// Packets with this mark pass: what a restore sends itself, on behalf of the peer. It is CRIU's.
pub const PASS_MARK: u32 = 0xc114;

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
        block(&mut socket, table, connections, TABLE_OWNER, None)?;
        Ok(Block { _owner: socket })
    }

    /// Blocks `connections` by a table named `table` until [`remove`]. Everybody who lists the table sees the comment.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn stay(table: &str, connections: &[Connection], comment: &str) -> Result<(), Error> {
        let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
        block(&mut socket, table, connections, 0, Some(comment))
    }
}

/// A table of the family `inet`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// What it says of itself.
    pub comment: Option<String>,
    /// The port of the netlink socket with which it goes: no other can remove it.
    pub owner: Option<u32>,
}

/// All tables of the family `inet` in the thread's network namespace.
///
/// # Errors
/// The kernel has no nftables, or permission is missing (`CAP_NET_ADMIN`).
pub fn tables() -> Result<Vec<Table>, Error> {
    tables_of(&mut Socket::open(libc::NETLINK_NETFILTER)?, NFPROTO_INET)
}

/// The same of another family (`NFPROTO_*`).
pub(crate) fn tables_of(socket: &mut Socket, family: u8) -> Result<Vec<Table>, Error> {
    let request = [family, 0, 0, 0];
    socket.dump(SUBSYSTEM << 8 | GET_TABLE, &request, |tables: &mut Vec<Table>, message| {
        let mut table = Table::default();
        for (kind, value) in attributes(message.body.get(4..).unwrap_or_default()) {
            match kind {
                1 => table.name = String::from_utf8_lossy(until_nul(value)).into_owned(),
                6 => table.comment = text_of(COMMENT, value),
                7 => table.owner = value.first_chunk().map(|b| u32::from_be_bytes(*b)),
                _ => {}
            }
        }
        // Not every kernel keeps to the family that was asked for.
        if message.body.first() == Some(&family) {
            tables.push(table);
        }
    })
}

/// Takes `connections` out of the sets of the table `table`, which blocks others still, or else is removed. Returns how
/// many there were.
///
/// # Errors
/// As [`tables`].
pub fn release(table: &str, connections: &[Connection]) -> Result<usize, Error> {
    let mut socket = Socket::open(libc::NETLINK_NETFILTER)?;
    let unwanted: HashSet<Vec<u8>> = connections.iter().map(key).collect();
    let (mut gone, mut left) = (Vec::new(), 0);
    for set in SETS {
        let keys = elements(&mut socket, table, set)?;
        let (out, other): (Vec<_>, Vec<_>) = keys.into_iter().partition(|k| unwanted.contains(k));
        left += other.len();
        gone.extend(out.into_iter().map(|key| (set, key)));
    }
    if gone.is_empty() {
        return Ok(0);
    }
    if left == 0 {
        return remove(table).map(|_| gone.len());
    }
    let mut batch = Batch::new(&mut socket);
    for (set, key) in &gone {
        let message = batch.message(DELETE_ELEMENT, NFPROTO_INET, 0);
        message.attribute(1, &text(table)).attribute(2, &text(set));
        let list = message.nest(3);
        let element = message.nest(LIST_ELEMENT);
        let data = message.nest(1);
        message.attribute(1, key).end(data).end(element).end(list);
    }
    batch.commit()?;
    Ok(gone.len())
}

/// The elements of a set; none if there is no such set.
fn elements(socket: &mut Socket, table: &str, set: &str) -> Result<Vec<Vec<u8>>, Error> {
    let mut request = Builder::new();
    request.attribute(1, &text(table)).attribute(2, &text(set));
    let body = [&[NFPROTO_INET, 0, 0, 0], request.as_bytes()].concat();
    let find = |within: &[u8], wanted| {
        attributes(within).find_map(|(k, v)| (k == wanted).then(|| v.to_vec())).unwrap_or_default()
    };
    let elements =
        socket.dump(SUBSYSTEM << 8 | GET_ELEMENT, &body, |keys: &mut Vec<Vec<u8>>, message| {
            let list = find(message.body.get(4..).unwrap_or_default(), 3);
            keys.extend(attributes(&list).map(|(_, element)| find(&find(element, 1), 1)));
        });
    match elements {
        Err(Error::Refused(Errno::NOENT)) => Ok(Vec::new()),
        elements => elements,
    }
}

/// The sets of a table: of IPv4, of IPv6.
const SETS: [&str; 2] = ["conns4", "conns6"];

/// A name without its end mark.
pub(crate) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// Data for a table or rule: kind, length, text with a NUL.
pub(crate) fn user_data(kind: u8, text: &str) -> Vec<u8> {
    let text: Vec<u8> = text.bytes().filter(|b| *b != 0).take(127).chain([0]).collect();
    let mut data = vec![kind, text.len() as u8];
    data.extend(text);
    data
}

/// The text of that kind in the data of a table or rule.
pub(crate) fn text_of(wanted: u8, mut data: &[u8]) -> Option<String> {
    while let [kind, len, rest @ ..] = data {
        let (value, after) = rest.split_at_checked(usize::from(*len))?;
        if *kind == wanted {
            return Some(String::from_utf8_lossy(until_nul(value)).into_owned());
        }
        data = after;
    }
    None
}

/// What nft(8) and iptables show as a comment, of tables as of rules.
pub(crate) const COMMENT: u8 = 0;

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

fn block(
    socket: &mut Socket,
    table: &str,
    connections: &[Connection],
    flags: u32,
    comment: Option<&str>,
) -> Result<(), Error> {
    let name = text(table);
    let mut batch = Batch::new(socket);
    let create = libc::NLM_F_CREATE;
    let exclusive = create | libc::NLM_F_EXCL;
    let message = batch.message(NEW_TABLE, NFPROTO_INET, exclusive);
    message.attribute(1, &name).attribute(2, &number(flags));
    if let Some(comment) = comment {
        message.attribute(6, &user_data(COMMENT, comment));
    }
    let keys: Vec<Vec<u8>> = connections.iter().map(key).collect();
    let families = [
        Family {
            proto: NFPROTO_IPV4,
            set: SETS[0],
            address: 4,
            source: 12,
            destination: 16,
            id: 1,
        },
        Family {
            proto: NFPROTO_IPV6,
            set: SETS[1],
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
        drop_packet(to);
    }
}

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
        Block::stay(&kept, &[ends(&a)], "kept by a test").unwrap();
        let listed = tables().unwrap();
        let find = |name: &str| listed.iter().find(|t| t.name == name).unwrap().clone();
        assert_eq!(find(&kept).comment.as_deref(), Some("kept by a test"));
        assert_eq!((find(&kept).owner, find(&name).owner.is_some()), (None, true));
        drop(block);
        assert_eq!(remove(&name), Ok(false), "it goes with its owner");
        assert!(!arrives(&mut a, &mut b));
        assert_eq!(release(&kept, &[ends(&c), ends(&a)]), Ok(1));
        assert_eq!(remove(&kept), Ok(false), "it blocked nothing more");
        Block::stay(&kept, &[ends(&a), ends(&c)], "").unwrap();
        assert_eq!(release(&kept, &[ends(&c)]), Ok(1));
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
