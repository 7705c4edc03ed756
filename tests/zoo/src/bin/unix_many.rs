//! Kernel state: many pairs of unix sockets (ZOO_PAIRS), each with a message in its queue: what one dump of all sockets and
//! one batch of pairs are for.

use zoo::ensure_eq;
use zoo::unix::{pair, receive, send};

fn main() {
    zoo::run(|z| {
        let pairs = (0..z.param("ZOO_PAIRS", 300))
            .map(|number| {
                let kind = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET][number % 3];
                let ends = pair(kind)?;
                send(ends[0], &number.to_le_bytes(), &[])?;
                Ok(ends)
            })
            .collect::<Result<Vec<_>, String>>()?;
        z.ready()?;
        z.wait_for_check();
        for (number, ends) in pairs.iter().enumerate() {
            let got = receive(ends[1], 99, 0).map_err(|e| format!("pair {number}: errno {e}"))?;
            ensure_eq!(got.data, number.to_le_bytes(), "message of pair {number}");
            send(ends[1], b"back", &[])?;
            let got = receive(ends[0], 99, 0).map_err(|e| format!("pair {number}: errno {e}"))?;
            ensure_eq!(got.data, b"back", "pair {number}, the other way");
        }
        Ok(())
    })
}
