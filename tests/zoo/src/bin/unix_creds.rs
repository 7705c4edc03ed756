//! Kernel state: what unix sockets tell of the other side. `SO_PEERCRED` of pairs and connections made by processes that
//! are alive, that are gone, and under other ids; credentials of queued messages (`SO_PASSCRED`, `SO_PASSPIDFD`), also of
//! senders who are gone; the byte out of band; where peeks start (`SO_PEEK_OFF`); a queue larger than its buffer.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::os::fd::RawFd;
use zoo::unix::{accept, client, close, listener, option, pair, peer, receive, send, set_option};
use zoo::{Check, Rng, check, ensure, ensure_eq};

const PASSPIDFD: i32 = 76;
const PEEK_OFF: i32 = 42;

fn send_flags(fd: RawFd, data: &[u8], flags: i32) -> Check {
    // SAFETY: the buffer is valid for its length.
    let sent = unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), flags) };
    ensure_eq!(sent, data.len() as isize, "bytes sent");
    Ok(())
}

fn mark(fd: RawFd) -> Result<bool, String> {
    let mut at = 0i32;
    // SAFETY: SIOCATMARK writes an int.
    check(unsafe { libc::ioctl(fd, 0x8905, &mut at) }, "SIOCATMARK")?;
    Ok(at != 0)
}

/// Leaves a socket in this process that a child which is gone has made, under other ids.
fn by_child(z: &zoo::Zoo, carrier: [RawFd; 2]) -> Result<(RawFd, i32), String> {
    let child = z.fork(|_| {
        // SAFETY: integers; the raw calls change this process alone, which has one thread.
        unsafe {
            libc::syscall(libc::SYS_setresgid, 8, 8, 8);
            libc::syscall(libc::SYS_setresuid, 7, 7, 7);
        }
        let made = pair(libc::SOCK_STREAM)?;
        send(carrier[0], b"x", &[made[0], made[1]])
    })?;
    z.join(child)?;
    let got = receive(carrier[1], 9, 0).map_err(|e| format!("receive: errno {e}"))?;
    ensure_eq!(got.rights.len(), 2, "descriptors from the child");
    close(got.rights[1]);
    // The other end lives on under another number, so that the pair stays connected.
    Ok((got.rights[0], child))
}

fn main() {
    zoo::run(|z| {
        let own = zoo::pid();
        let ids = peer(pair(libc::SOCK_STREAM)?[0])?;
        ensure_eq!(ids.0, own, "SO_PEERCRED of an own pair");
        let mine = pair(libc::SOCK_STREAM)?;
        let (gone, gone_pid) = by_child(z, pair(libc::SOCK_DGRAM)?)?;
        ensure_eq!(peer(gone)?, (gone_pid, 7, 8), "SO_PEERCRED of the child's pair");

        // A server here, its client in a child that stays.
        let at = format!("@zoo-creds-{own}");
        let server = listener(libc::SOCK_STREAM, &at, 5)?;
        let name = at.clone();
        let child = z.fork(|z| {
            // SAFETY: integers; as above.
            unsafe { libc::syscall(libc::SYS_setresgid, -1, 4, -1) };
            let calling = client(libc::SOCK_STREAM, &name)?;
            z.publish("called", "");
            z.wait_for_check();
            ensure_eq!(peer(calling)?, ids, "SO_PEERCRED of the client");
            Ok(())
        })?;
        z.wait_for("called")?;
        let called = accept(server)?;
        let expected = (child, ids.1, 4);
        ensure_eq!(peer(called)?, expected, "SO_PEERCRED of the accepted socket");

        // Messages with credentials: from here, and from one who is gone.
        let told = pair(libc::SOCK_DGRAM)?;
        set_option(told[1], libc::SO_PASSCRED, 1)?;
        let quiet = pair(libc::SOCK_STREAM)?;
        send(quiet[0], b"nobody asked", &[])?;
        set_option(quiet[1], libc::SO_PASSCRED, 1)?;
        send(quiet[0], b"now", &[])?;
        send(told[0], b"from here", &[])?;
        let sender = z.fork(|_| send(told[0], b"from gone", &[]))?;
        z.join(sender)?;
        let pidfds = pair(libc::SOCK_SEQPACKET)?;
        let with_pidfd = set_option(pidfds[1], PASSPIDFD, 1).is_ok();
        send(pidfds[0], b"pidfd", &[])?;

        // Out of band: in the middle, at the front; read in line.
        let (middle, front, inline) =
            (pair(libc::SOCK_STREAM)?, pair(libc::SOCK_STREAM)?, pair(libc::SOCK_STREAM)?);
        for (ends, before) in [(middle, &b"before"[..]), (front, b""), (inline, b"in line ")] {
            if !before.is_empty() {
                send(ends[0], before, &[])?;
            }
            send_flags(ends[0], b"!", libc::MSG_OOB)?;
            send(ends[0], b"after", &[])?;
        }
        set_option(inline[1], libc::SO_OOBINLINE, 1)?;

        let peeked = pair(libc::SOCK_STREAM)?;
        send(peeked[0], b"0123456789", &[])?;
        set_option(peeked[1], PEEK_OFF, 4)?;

        // More than the buffer of a new socket holds, and the buffer made small again afterwards.
        let full = pair(libc::SOCK_STREAM)?;
        set_option(full[0], libc::SO_SNDBUFFORCE, 4 << 20)?;
        let mut noise = vec![0; 2 << 20];
        Rng(7).fill(&mut noise);
        send(full[0], &noise, &[])?;
        set_option(full[0], libc::SO_SNDBUF, 4096)?;
        let many = pair(libc::SOCK_DGRAM)?;
        set_option(many[0], libc::SO_SNDBUFFORCE, 4 << 20)?;
        for number in 0..500u32 {
            send(many[0], &number.to_le_bytes(), &[])?;
        }
        let size = option(full[0], libc::SO_SNDBUF)?;

        z.ready()?;
        z.wait_for_check();

        ensure_eq!(peer(mine[0])?, ids, "SO_PEERCRED of an own pair");
        ensure_eq!(peer(mine[1])?, ids, "SO_PEERCRED of its other end");
        ensure_eq!(peer(gone)?, (gone_pid, 7, 8), "SO_PEERCRED, made by one who is gone");
        ensure_eq!(peer(called)?, expected, "SO_PEERCRED of the accepted socket");
        ensure_eq!(peer(server)?, ids, "SO_PEERCRED of the listening socket");
        let message = |fd| receive(fd, 99, 0).map_err(|e| format!("receive: errno {e}"));
        let first = message(told[1])?;
        ensure_eq!((&first.data[..], first.credentials), (&b"from here"[..], Some(ids)), "first");
        let second = message(told[1])?;
        let theirs = Some((sender, ids.1, ids.2));
        ensure_eq!((&second.data[..], second.credentials), (&b"from gone"[..], theirs), "second");
        let unasked = message(quiet[1])?;
        ensure_eq!(unasked.data, b"nobody asked", "bytes without credentials");
        ensure_eq!(unasked.credentials.map(|c| c.0), Some(0), "credentials nobody asked for");
        let now = message(quiet[1])?;
        ensure_eq!((&now.data[..], now.credentials), (&b"now"[..], Some(ids)), "asked for");
        let packet = message(pidfds[1])?;
        ensure_eq!(packet.data, b"pidfd", "packet");
        if with_pidfd {
            let pidfd = packet.pidfd.ok_or("no pidfd")?;
            let pid = zoo::status_of(&format!("/proc/self/fdinfo/{pidfd}"), "Pid")?;
            ensure_eq!(pid, own.to_string(), "process of the pidfd");
            ensure_eq!(option(pidfds[1], PASSPIDFD)?, 1, "SO_PASSPIDFD");
        }
        ensure_eq!(option(told[1], libc::SO_PASSCRED)?, 1, "SO_PASSCRED");

        ensure!(!mark(middle[1])?, "the mark is not at the front");
        ensure_eq!(message(middle[1])?.data, b"before", "before the mark");
        ensure!(mark(middle[1])?, "the mark");
        let oob = receive(middle[1], 1, libc::MSG_OOB).map(|m| m.data);
        ensure_eq!(oob, Ok(b"!".to_vec()), "the byte out of band");
        ensure_eq!(message(middle[1])?.data, b"after", "after the mark");
        ensure!(mark(front[1])?, "the mark at the front");
        let oob = receive(front[1], 1, libc::MSG_OOB).map(|m| m.data);
        ensure_eq!(oob, Ok(b"!".to_vec()), "the byte out of band at the front");
        ensure_eq!(message(front[1])?.data, b"after", "after the mark at the front");
        ensure_eq!(message(inline[1])?.data, b"in line ", "in line, before the mark");
        ensure!(mark(inline[1])?, "the mark in line");
        ensure_eq!(message(inline[1])?.data, b"!after", "in line, from the mark on");

        ensure_eq!(option(peeked[1], PEEK_OFF)?, 4, "SO_PEEK_OFF");
        let peek = receive(peeked[1], 3, libc::MSG_PEEK).map(|m| m.data);
        ensure_eq!(peek, Ok(b"456".to_vec()), "peek");
        ensure_eq!(option(full[0], libc::SO_SNDBUF)?, size, "SO_SNDBUF");
        ensure!(send(full[0], b"x", &[]).is_err(), "there is room in a full queue");
        let mut got = Vec::new();
        while let Ok(piece) = receive(full[1], 1 << 20, 0) {
            got.extend(piece.data);
        }
        ensure!(got == noise, "the full queue differs ({} bytes)", got.len());
        for number in 0..500u32 {
            ensure_eq!(message(many[1])?.data, number.to_le_bytes(), "one of many");
        }
        z.join(child)
    })
}
