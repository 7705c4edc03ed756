//! Kernel state that cannot be saved, by `ZOO_KIND`: `mptcp` (a multipath TCP listener), `md5` (a listener that signs its
//! segments), `urgent` (a connection that holds an out-of-band byte), `ended` (the same of a connection that both
//! sides have closed). It is unharmed by the refusal.
#![allow(unsafe_code, reason = "a protocol that the standard library does not have")]

use std::io::Read;
use std::net::Shutdown;
use zoo::net::{self, err, state};
use zoo::{ensure_eq, ok};

fn main() {
    zoo::run(|z| {
        let kind = std::env::var("ZOO_KIND").unwrap_or_default();
        let listener = net::listener("127.0.0.1")?;
        let (near, mut far) = net::pair(&listener)?;
        match kind.as_str() {
            "mptcp" => {
                // SAFETY: integers; the descriptor is meant to stay open.
                let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 262) };
                if ok(fd.into(), "socket").is_err() || net::listen(&fd, 1).is_err() {
                    z.skip("this kernel has no multipath TCP, or it is switched off");
                }
                drop((near, far));
            }
            "md5" => {
                // struct tcp_md5sig: address, flags, prefix, length, interface, key
                let mut keys = [0u8; 216];
                keys[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
                keys[4..8].copy_from_slice(&[127, 0, 0, 9]);
                keys[130..132].copy_from_slice(&3u16.to_ne_bytes());
                keys[136..139].copy_from_slice(b"key");
                if net::set(&listener, libc::IPPROTO_TCP, 14, &keys).is_err() {
                    z.skip("this kernel has no TCP_MD5SIG");
                }
                drop((near, far));
            }
            "urgent" => {
                ensure_eq!(net::send(&near, b"!", libc::MSG_OOB), 1, "send");
                z.ready()?;
                z.wait_for_check();
                let mut byte = [0];
                ensure_eq!(net::recv(&far, &mut byte, libc::MSG_OOB), 1, "urgent byte");
                return Ok(());
            }
            "ended" => {
                ensure_eq!(net::send(&near, b"last!", libc::MSG_OOB), 5, "send");
                near.shutdown(Shutdown::Write).map_err(err)?;
                net::await_state(&far, state::CLOSE_WAIT, "peer")?;
                far.shutdown(Shutdown::Write).map_err(err)?;
                net::await_state(&far, state::CLOSE, "both")?;
                z.ready()?;
                z.wait_for_check();
                let mut byte = [0];
                ensure_eq!(net::recv(&far, &mut byte, libc::MSG_OOB), 1, "urgent byte");
                let mut text = [0; 4];
                far.read_exact(&mut text).map_err(err)?;
                ensure_eq!(&text, b"last", "what was not read");
                return Ok(());
            }
            other => return Err(format!("ZOO_KIND={other}")),
        }
        z.ready()?;
        z.wait_for_check();
        Ok(())
    })
}
