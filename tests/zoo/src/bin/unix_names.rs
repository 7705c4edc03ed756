//! Kernel state: addresses of unix sockets. Files that are deleted, renamed, taken over by another socket, of other owners
//! and modes; relative paths, also beyond the directory the program is in; abstract and autobound names; datagram sockets
//! connected to third parties, also to one that was half of a pair; queued datagrams whose senders are gone.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use zoo::unix::{
    accept, bind, client, close, connect, listener, name, pair, receive, send, send_to, socket,
};
use zoo::{Check, check, ensure, ensure_eq, errno};

const STREAM: i32 = libc::SOCK_STREAM;
const DGRAM: i32 = libc::SOCK_DGRAM;
const PACKETS: i32 = libc::SOCK_SEQPACKET;

/// Data and sender of the next datagram.
fn next(fd: RawFd) -> Result<(Vec<u8>, String), String> {
    let message = receive(fd, 100, 0).map_err(|e| format!("receive: errno {e}"))?;
    Ok((message.data, message.sender))
}

/// A connection to a listening socket works.
fn serves(server: RawFd, at: &str, what: &str) -> Check {
    let calling = client(STREAM, at).map_err(|e| format!("{what}: {e}"))?;
    let called = accept(server)?;
    send(calling, b"hello", &[])?;
    ensure_eq!(next(called)?.0, b"hello", "{what}");
    close(calling);
    close(called);
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let at = |name: &str| z.path(name).to_str().unwrap_or_default().to_string();
        let pid = zoo::pid();
        // Owner and mode.
        let plain = listener(STREAM, &at("plain"), 7)?;
        std::fs::set_permissions(z.path("plain"), PermissionsExt::from_mode(0o641))
            .map_err(|e| e.to_string())?;
        std::os::unix::fs::chown(z.path("plain"), Some(1), Some(2)).map_err(|e| e.to_string())?;
        let accepted = (client(STREAM, &at("plain"))?, accept(plain)?);
        // Deleted; deleted and taken over by another socket, with connections of both.
        let deleted = socket(DGRAM)?;
        bind(deleted, &at("deleted"))?;
        let to_deleted = client(DGRAM, &at("deleted"))?;
        std::fs::remove_file(z.path("deleted")).map_err(|e| e.to_string())?;
        let first = listener(STREAM, &at("taken"), 7)?;
        let of_first = (client(STREAM, &at("taken"))?, accept(first)?);
        std::fs::remove_file(z.path("taken")).map_err(|e| e.to_string())?;
        let second = listener(STREAM, &at("taken"), 7)?;
        // Renamed.
        let renamed = listener(STREAM, &at("old-name"), 7)?;
        std::fs::rename(z.path("old-name"), z.path("new-name")).map_err(|e| e.to_string())?;
        // Relative, from two directories, of which the program is in neither.
        std::fs::create_dir_all(z.path("a/b")).map_err(|e| e.to_string())?;
        let enter = |name: &str| std::env::set_current_dir(z.path(name)).map_err(|e| e.to_string());
        enter("a")?;
        let relative = listener(STREAM, "relative", 7)?;
        let below = listener(STREAM, "b/below", 7)?;
        enter("a/b")?;
        let above = listener(STREAM, "../../above", 7)?;
        let beside = listener(STREAM, "./beside", 7)?;
        std::env::set_current_dir("/").map_err(|e| e.to_string())?;
        // Abstract, and named by the kernel.
        let hidden = format!("@zoo-names-{pid}");
        let abstracted = listener(PACKETS, &hidden, 3)?;
        let auto = socket(DGRAM)?;
        let family = libc::AF_UNIX as u16;
        // SAFETY: an address that is the family alone.
        check(unsafe { libc::bind(auto, (&raw const family).cast(), 2) }, "autobind")?;
        let auto_name = name(auto, false)?;
        ensure_eq!(auto_name.len(), 6, "length of {auto_name}");

        // Third parties: two clients of one server, which itself is connected to another.
        let hub = socket(DGRAM)?;
        bind(hub, &at("hub"))?;
        let (named, unnamed) = (socket(DGRAM)?, socket(DGRAM)?);
        bind(named, &at("named"))?;
        connect(named, &at("hub"))?;
        connect(unnamed, &at("hub"))?;
        send(named, b"from named", &[])?;
        send(unnamed, b"from unnamed", &[])?;
        let gone = socket(DGRAM)?;
        bind(gone, &at("gone"))?;
        send_to(gone, b"from one that is gone", &[], &at("hub"))?;
        close(gone);
        std::fs::remove_file(z.path("gone")).map_err(|e| e.to_string())?;
        send_to(auto, b"from auto", &[], &at("hub"))?;
        // Half of a pair is connected elsewhere; the other half still is connected to it, which has no address.
        let left = pair(DGRAM)?;
        connect(left[1], &at("hub"))?;
        connect(hub, &auto_name)?;

        // Peers that are closed: accepted, calling, and with an address of its own.
        let lost_server = (client(STREAM, &at("plain"))?, accept(plain)?);
        send(lost_server.1, b"last words", &[])?;
        close(lost_server.1);
        let caller = socket(STREAM)?;
        bind(caller, &at("caller"))?;
        connect(caller, &at("plain"))?;
        let lost_caller = accept(plain)?;
        send(caller, b"bye", &[])?;
        close(caller);
        // One that closed before it had read everything.
        let reset = pair(STREAM)?;
        send(reset[0], b"never read", &[])?;
        send(reset[1], b"but this", &[])?;
        close(reset[1]);

        z.ready()?;
        z.wait_for_check();

        let stat = std::fs::metadata(z.path("plain")).map_err(|e| e.to_string())?;
        ensure_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o641, 1, 2), "plain");
        serves(plain, &at("plain"), "plain")?;
        ensure_eq!(name(accepted.1, false)?, at("plain"), "address of the accepted one");
        ensure_eq!(name(accepted.0, true)?, at("plain"), "address of its peer");
        ensure!(!z.path("deleted").exists(), "the deleted file is back");
        ensure_eq!(name(deleted, false)?, at("deleted"), "address with a deleted file");
        send(to_deleted, b"still", &[])?;
        ensure_eq!(next(deleted)?.0, b"still", "to the deleted address");
        ensure_eq!(name(first, false)?, at("taken"), "address of the first");
        serves(second, &at("taken"), "taken over")?;
        ensure_eq!(receive(first, 1, 0), Err(libc::EINVAL), "the first listens");
        send(of_first.0, b"through", &[])?;
        ensure_eq!(next(of_first.1)?.0, b"through", "connection of the first");
        ensure_eq!(name(renamed, false)?, at("old-name"), "address of the renamed one");
        serves(renamed, &at("new-name"), "renamed")?;
        ensure!(!z.path("old-name").exists(), "the old name is back");
        for (fd, own, path) in [
            (relative, "relative", "a/relative"),
            (below, "b/below", "a/b/below"),
            (above, "../../above", "above"),
            (beside, "./beside", "a/b/beside"),
        ] {
            ensure_eq!(name(fd, false)?, own, "relative address");
            serves(fd, &at(path), path)?;
        }
        let through = client(PACKETS, &hidden)?;
        accept(abstracted)?;
        ensure_eq!(name(through, true)?, hidden, "abstract address");
        ensure_eq!(name(auto, false)?, auto_name, "autobound address");

        for (text, sender) in [
            (&b"from named"[..], at("named")),
            (b"from unnamed", String::new()),
            (b"from one that is gone", at("gone")),
            (b"from auto", auto_name.clone()),
        ] {
            ensure_eq!(next(hub)?, (text.to_vec(), sender), "datagram to the hub");
        }
        ensure!(!z.path("gone").exists(), "the file of the sender who is gone is back");
        ensure_eq!(name(hub, true)?, auto_name, "peer of the hub");
        send(hub, b"on", &[])?;
        ensure_eq!(next(auto)?, (b"on".to_vec(), at("hub")), "from the hub");
        ensure_eq!(send(named, b"x", &[]).is_err(), true, "others may not send to the hub now");
        ensure_eq!(name(named, true)?, at("hub"), "peer of the named one");
        ensure_eq!(name(left[1], true)?, at("hub"), "peer of half a pair");
        // SAFETY: the buffer is valid.
        let sent = unsafe { libc::send(left[0], b"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL) };
        ensure_eq!((sent, errno()), (-1, libc::EPERM), "the other half still has it for a peer");

        ensure_eq!(next(lost_server.0)?.0, b"last words", "from a server that is gone");
        ensure_eq!(next(lost_server.0)?.0, b"", "the end, from a server that is gone");
        ensure_eq!(name(lost_server.0, true)?, at("plain"), "address of a server that is gone");
        ensure_eq!(name(lost_caller, true)?, at("caller"), "address of a client that is gone");
        ensure_eq!(name(lost_caller, false)?, at("plain"), "address of a server without client");
        ensure_eq!(next(lost_caller)?.0, b"bye", "from a client that is gone");
        ensure_eq!(next(reset[0])?.0, b"but this", "what was sent before");
        ensure_eq!(receive(reset[0], 9, 0), Err(libc::ECONNRESET), "what was never read");
        Ok(())
    })
}
