//! Just enough netlink(7) for a question and its answer.

use std::num::NonZeroU32;

use rewake_sys::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, sendto, socket_with,
};

use super::Reason;

/// `NETLINK_ROUTE`.
pub const ROUTE: u32 = 0;
/// `NETLINK_SOCK_DIAG`.
pub const SOCK_DIAG: u32 = 4;
/// `NETLINK_NETFILTER`.
pub const NETFILTER: u32 = 12;

/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub const ACK: u16 = 4;
/// `NLM_F_DUMP`.
pub const DUMP: u16 = 0x300;
/// `NLM_F_EXCL | NLM_F_CREATE`.
pub const CREATE: u16 = 0x600;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// An answer: its type and what follows the header.
#[derive(Debug)]
pub struct Answer {
    /// `nlmsg_type`; an error of 0 (an acknowledgement) is type 2 here.
    pub kind: u16,
    /// Payload.
    pub payload: Vec<u8>,
}

/// One message, padded.
pub fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let len = 16 + payload.len();
    let mut out = Vec::with_capacity(len.next_multiple_of(4));
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&[0; 8]); // sequence and port
    out.extend_from_slice(payload);
    out.resize(len.next_multiple_of(4), 0);
    out
}

/// One attribute, padded.
pub fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = 4 + payload.len();
    let mut out = Vec::with_capacity(len.next_multiple_of(4));
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(payload);
    out.resize(len.next_multiple_of(4), 0);
    out
}

/// The payload of attribute `kind` in `attributes`.
pub fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let body = attributes.get(4..len)?;
        if u16::from_ne_bytes([c, d]) & 0x3fff == kind {
            return Some(body);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
    None
}

/// Sends `messages` in one datagram and reads as many answers as `answers` says; an error in any of them is an `Err`.
pub fn ask(protocol: u32, messages: &[u8], answers: usize) -> Result<Vec<Answer>, Reason> {
    exchange(protocol, messages, answers)?.map_err(Reason::from)
}

/// As [`ask`], with the kernel's refusal apart from failures of the exchange.
pub fn exchange(
    protocol: u32,
    messages: &[u8],
    answers: usize,
) -> Result<Result<Vec<Answer>, Errno>, Reason> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        NonZeroU32::new(protocol).map(Protocol::from_raw),
    )?;
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(std::time::Duration::from_secs(2)),
    )?;
    sendto(&socket, messages, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut buffer = vec![0u8; 32 << 10];
    let mut all = Vec::new();
    while all.len() < answers {
        let (got, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = buffer.get(..got).unwrap_or_default();
        while let [a, b, c, d, e, f, ..] = *rest {
            let len = u32::from_ne_bytes([a, b, c, d]) as usize;
            let kind = u16::from_ne_bytes([e, f]);
            let payload = rest.get(16..len).ok_or(Reason::from("a netlink answer is cut off"))?;
            if matches!(kind, ERROR | DONE) {
                // Both begin with a negative errno, or 0.
                if let [a, b, c, d, ..] = *payload
                    && let code @ i32::MIN..0 = i32::from_ne_bytes([a, b, c, d])
                {
                    return Ok(Err(Errno::from_raw_os_error(code.saturating_neg())));
                }
            }
            all.push(Answer { kind, payload: payload.to_vec() });
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(Ok(all))
}
