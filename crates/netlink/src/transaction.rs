//! Transactions of nftables and the expressions that rules are made of (linux/netfilter/nf_tables.h).

use crate::message::Builder;
use crate::socket::{Error, Socket};

pub(crate) const SUBSYSTEM: u16 = 10;
pub(crate) const BATCH_BEGIN: u16 = 0x10;
pub(crate) const BATCH_END: u16 = 0x11;
pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const DELETE_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const DELETE_CHAIN: u16 = 5;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const DELETE_RULE: u16 = 8;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;

pub(crate) const NFPROTO_INET: u8 = 1;
pub(crate) const NFPROTO_IPV4: u8 = 2;
pub(crate) const NFPROTO_IPV6: u8 = 10;
/// The table goes when the socket that made it is closed.
pub(crate) const TABLE_OWNER: u32 = 0x2;

pub(crate) const LIST_ELEMENT: u16 = 1;
pub(crate) const HOOK_INPUT: u32 = 1;
pub(crate) const HOOK_OUTPUT: u32 = 3;
/// The first of the registers of four bytes.
pub(crate) const REGISTER: u32 = 8;
pub(crate) const VERDICT: u32 = 0;
pub(crate) const DROP: u32 = 0;
/// `NFT_JUMP`
pub(crate) const JUMP: u32 = -3i32 as u32;
pub(crate) const EQUAL: u32 = 0;
pub(crate) const NOT_EQUAL: u32 = 1;
pub(crate) const META_MARK: u32 = 3;
pub(crate) const META_NFPROTO: u32 = 15;
pub(crate) const META_L4PROTO: u32 = 16;
pub(crate) const NETWORK_HEADER: u32 = 1;
pub(crate) const TRANSPORT_HEADER: u32 = 2;
/// Attributes have lengths of 16 bits: so many elements go into one.
pub(crate) const ELEMENTS: usize = 800;

pub(crate) fn text(name: &str) -> Vec<u8> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    text
}

/// Messages that take effect together or not at all.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    socket: &'a mut Socket,
    builder: Builder,
    first: u32,
    next: u32,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(socket: &'a mut Socket) -> Batch<'a> {
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
    pub(crate) fn message(&mut self, kind: u16, family: u8, flags: i32) -> &mut Builder {
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags;
        self.builder
            .begin(SUBSYSTEM << 8 | kind, flags as u16, self.next)
            .bytes(&[family, 0, 0, 0]);
        self.next += 1;
        &mut self.builder
    }

    pub(crate) fn commit(mut self) -> Result<(), Error> {
        self.builder.begin(BATCH_END, libc::NLM_F_REQUEST as u16, self.next).bytes(&[
            0,
            0,
            0,
            SUBSYSTEM as u8,
        ]);
        self.socket.transact(self.builder.as_bytes(), self.first, self.next)
    }
}

pub(crate) fn number(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

pub(crate) fn expression(to: &mut Builder, name: &str, body: impl FnOnce(&mut Builder)) {
    let element = to.nest(LIST_ELEMENT);
    to.attribute(1, &text(name));
    let data = to.nest(2);
    body(to);
    to.end(data).end(element);
}

pub(crate) fn meta(to: &mut Builder, key: u32) {
    expression(to, "meta", |to| {
        to.attribute(1, &number(REGISTER)).attribute(2, &number(key));
    });
}

pub(crate) fn compare(to: &mut Builder, operation: u32, value: &[u8]) {
    expression(to, "cmp", |to| {
        to.attribute(1, &number(REGISTER)).attribute(2, &number(operation));
        let data = to.nest(3);
        to.attribute(1, value).end(data);
    });
}

/// The verdict that ends a packet.
pub(crate) fn drop_packet(to: &mut Builder) {
    expression(to, "immediate", |to| {
        to.attribute(1, &number(VERDICT));
        let data = to.nest(2);
        let verdict = to.nest(2);
        to.attribute(1, &number(DROP)).end(verdict).end(data);
    });
}
