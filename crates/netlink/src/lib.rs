//! Netlink (netlink(7)), as far as a checkpoint needs it: what sock_diag(7) tells of sockets, in one dump a family, and an
//! nftables transaction that blocks connections.
//!
//! Messages are read and built in place: a dump of ten thousand sockets is a few hundred receives and one record a socket.
#![forbid(unsafe_code)]

pub mod address;
pub mod destroy;
pub mod diag;
pub mod iptables;
pub mod message;
pub mod nftables;
pub mod socket;
mod transaction;

pub use socket::{Error, Socket};
