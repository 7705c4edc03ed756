//! Ports that a run has for itself.
//!
//! A program gives its ports up with the dump and gets them back with the restore. One that the kernel has chosen may be
//! somebody else's by then. So every run has a block of them outside the range from which the kernel chooses, and claims
//! it by an abstract unix socket of that name, which is there once in each network namespace, as the ports are, and gone
//! with this process at the latest.

use crate::harness::Fail;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU16, Ordering};
use zoo::net::PORTS;

/// The first port of all.
const START: u16 = 10_240;

/// A block of [`PORTS`] ports; its number is a multiple of that.
#[derive(Debug)]
pub struct Ports {
    /// The first of them.
    pub first: u16,
    _claim: UnixDatagram,
}

impl Ports {
    /// A block that nobody else has in the thread's network namespace.
    pub fn claim() -> Result<Ports, Fail> {
        // Not the one that was given back last: connections may linger there.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        let lowest = range.ok().and_then(|r| r.split_whitespace().next()?.parse().ok());
        let end = lowest.filter(|end| *end >= START + 32 * PORTS).unwrap_or(32_768);
        let blocks = (end - START) / PORTS;
        let begin = (std::process::id() as u16).wrapping_mul(61);
        for _ in 0..blocks {
            let n = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % blocks;
            let first = START + n * PORTS;
            let name = SocketAddr::from_abstract_name(format!("rewake-zoo-ports-{first}"));
            let name = name.map_err(|e| e.to_string())?;
            // A server of this machine may be there.
            if let Ok(claim) = UnixDatagram::bind_addr(&name)
                && TcpListener::bind(("0.0.0.0", first)).is_ok()
            {
                return Ok(Ports { first, _claim: claim });
            }
        }
        Err(format!("all {blocks} blocks of ports are taken"))
    }
}
