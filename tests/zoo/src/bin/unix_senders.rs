//! Kernel state: credentials of messages that wait in unix sockets (`SO_PASSCRED`), whose senders are alive: this process, and
//! a child under other ids. Also in a PID namespace of its own.

use std::os::fd::RawFd;
use zoo::unix::{pair, receive, send, set_option};
use zoo::{Zoo, ensure_eq};

type Ids = (i32, u32, u32);

/// A pair in which messages of both wait.
fn told(z: &Zoo, kind: i32, name: &str) -> Result<(RawFd, Ids), String> {
    let ends = pair(kind)?;
    set_option(ends[1], libc::SO_PASSCRED, 1)?;
    send(ends[0], b"from here", &[])?;
    let (sent, file) = (format!("sent_{name}"), format!("sent_{name}"));
    let child = z.fork(move |z| {
        // SAFETY: integers; the raw calls change this process alone, which has one thread.
        unsafe {
            libc::syscall(libc::SYS_setresgid, 8, 8, 8);
            libc::syscall(libc::SYS_setresuid, 7, 7, 7);
        }
        send(ends[0], b"from the child", &[])?;
        z.publish(&sent, "");
        z.wait_for_check();
        Ok(())
    })?;
    z.wait_for(&file)?;
    Ok((ends[1], (child, 7, 8)))
}

fn main() {
    zoo::run(|z| {
        let own = zoo::unix::peer(pair(libc::SOCK_STREAM)?[0])?;
        ensure_eq!(own.0, zoo::pid(), "SO_PEERCRED of an own pair");
        let kinds = [("stream", libc::SOCK_STREAM), ("dgram", libc::SOCK_DGRAM)];
        let all =
            kinds.iter().map(|(name, kind)| told(z, *kind, name)).collect::<Result<Vec<_>, _>>()?;
        z.ready()?;
        z.wait_for_check();
        for ((name, _), (fd, child)) in kinds.iter().zip(all) {
            for (text, ids) in [("from here", own), ("from the child", child)] {
                let got = receive(fd, 99, 0).map_err(|e| format!("{name}: errno {e}"))?;
                ensure_eq!(String::from_utf8_lossy(&got.data), text, "{name}");
                ensure_eq!(got.credentials, Some(ids), "{name}: who has sent {text:?}");
            }
            z.join(child.0)?;
        }
        Ok(())
    })
}
