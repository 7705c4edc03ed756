//! Kernel state: unix sockets connected to a server outside the tree, whose addresses are ZOO_SERVER with `.stream` and
//! `.dgram` at the end. Used by trials of their own.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::unix::{client, receive, send};
use zoo::{ensure_eq, nap};

fn main() {
    zoo::run(|z| {
        let Some(server) = std::env::var("ZOO_SERVER").ok() else {
            z.skip("it needs a server outside the tree");
        };
        let stream = client(libc::SOCK_STREAM, &format!("{server}.stream"))?;
        let datagrams = client(libc::SOCK_DGRAM, &format!("{server}.dgram"))?;
        send(datagrams, b"before", &[])?;
        z.ready()?;
        z.wait_for_check();
        send(datagrams, b"after", &[])?;
        send(stream, b"echo", &[])?;
        let mut got = receive(stream, 9, 0);
        for _ in 0..500 {
            if got != Err(libc::EAGAIN) {
                break;
            }
            nap(10);
            got = receive(stream, 9, 0);
        }
        ensure_eq!(got.map(|m| m.data), Ok(b"echo".to_vec()), "from the server");
        Ok(())
    })
}
