//! Kernel state: listening unix sockets whose clients wait to be accepted, in their order, one half closed, one (with ZOO_NAMED=1)
//! with an address of its own; a backlog that is full.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::unix::{accept, bind, client, connect, listener, name, receive, send, socket};
use zoo::{check, ensure_eq, errno};

fn main() {
    zoo::run(|z| {
        let at = z.path("server").to_str().unwrap_or_default().to_string();
        let own = z.path("client").to_str().unwrap_or_default().to_string();
        let server = listener(libc::SOCK_STREAM, &at, 2)?;
        let one = client(libc::SOCK_STREAM, &at)?;
        let two = socket(libc::SOCK_STREAM)?;
        let named = z.param("ZOO_NAMED", 0) == 1;
        if named {
            bind(two, &own)?;
        }
        connect(two, &at)?;
        let three = client(libc::SOCK_STREAM, &at)?;
        // SAFETY: integers.
        check(unsafe { libc::shutdown(three, libc::SHUT_WR) }, "shutdown")?;
        let hidden = format!("@zoo-backlog-{}", zoo::pid());
        let packets = listener(libc::SOCK_SEQPACKET, &hidden, 5)?;
        let waiting = client(libc::SOCK_SEQPACKET, &hidden)?;
        z.ready()?;
        z.wait_for_check();

        let late = socket(libc::SOCK_STREAM | libc::SOCK_NONBLOCK)?;
        ensure_eq!(connect(late, &at).is_err().then(errno), Some(libc::EAGAIN), "a full backlog");
        let ends = [(one, accept(server)?), (two, accept(server)?), (three, accept(server)?)];
        for (number, (calling, called)) in ends.into_iter().enumerate() {
            let text = format!("for {number}");
            send(called, text.as_bytes(), &[])?;
            let got = receive(calling, 99, 0).map_err(|e| format!("receive: errno {e}"))?;
            ensure_eq!(got.data, text.as_bytes(), "in the order of the backlog");
            ensure_eq!(name(calling, true)?, at, "address of the server");
        }
        let own = if named { own } else { String::new() };
        ensure_eq!(name(ends[1].1, true)?, own, "address of the second client");
        ensure_eq!(receive(ends[2].1, 9, 0).map(|m| m.data), Ok(vec![]), "half closed");
        send(two, b"and back", &[])?;
        let got = receive(ends[1].1, 99, 0).map_err(|e| format!("receive: errno {e}"))?;
        ensure_eq!(got.data, b"and back", "the other way");
        let called = accept(packets)?;
        send(waiting, b"packet", &[])?;
        let got = receive(called, 99, 0).map_err(|e| format!("receive: errno {e}"))?;
        ensure_eq!(got.data, b"packet", "sequential packet");
        connect(late, &at)
    })
}
