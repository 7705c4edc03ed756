//! Kernel state: connections to listening unix sockets that are not accepted yet and have sent something already, with
//! descriptors, with credentials of their senders, half closed, closed again, beside others that have sent nothing. Only a
//! dump that ends the program can save them.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use zoo::unix::{
    Message, accept, bind, client, close, connect, listener, name, pair, peer, receive, send,
    set_option, socket,
};
use zoo::{Check, Rng, Zoo, check, ensure, ensure_eq};

/// More than goes into a page, and less than a new socket takes.
const LONG: usize = 100_000;

fn got(fd: RawFd, what: &str) -> Result<Message, String> {
    receive(fd, 2 * LONG, 0).map_err(|e| format!("{what}: errno {e}"))
}

/// What a stream holds, up to its end or until nothing more waits; with what came with it.
fn drain(fd: RawFd, what: &str) -> Result<(Vec<u8>, Vec<RawFd>), String> {
    let (mut data, mut rights) = (Vec::new(), Vec::new());
    loop {
        match receive(fd, LONG, 0) {
            Ok(message) if message.data.is_empty() => return Ok((data, rights)),
            Ok(message) => {
                data.extend(message.data);
                rights.extend(message.rights);
            }
            Err(libc::EAGAIN) => return Ok((data, rights)),
            Err(e) => return Err(format!("{what}: errno {e}")),
        }
    }
}

/// A child under other ids sends and is gone; `closed`: nobody else has its end.
fn from_child(z: &Zoo, at: &str, own: &str, texts: &'static [&'static str]) -> Result<i32, String> {
    let (at, own) = (at.to_owned(), own.to_owned());
    let child = z.fork(move |_| {
        // SAFETY: integers; the raw calls change this process alone, which has one thread.
        unsafe {
            libc::syscall(libc::SYS_setresgid, 8, 8, 8);
            libc::syscall(libc::SYS_setresuid, 7, 7, 7);
        }
        let calling = socket(libc::SOCK_STREAM)?;
        bind(calling, &own)?;
        connect(calling, &at)?;
        texts.iter().try_for_each(|text| send(calling, text.as_bytes(), &[]))
    })?;
    z.join(child)?;
    Ok(child)
}

fn packets(fd: RawFd, own: (i32, u32, u32)) -> Check {
    set_option(fd, libc::SO_PASSCRED, 1)?;
    for (number, text) in ["one", "", "three"].into_iter().enumerate() {
        let message = got(fd, "a packet")?;
        ensure_eq!(message.data, text.as_bytes(), "packet {number}");
        ensure_eq!(message.credentials, Some(own), "who has sent packet {number}");
        ensure_eq!(message.rights.len(), usize::from(number == 2), "descriptors of {number}");
    }
    ensure_eq!(receive(fd, 9, 0), Err(libc::EAGAIN), "after the packets");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let own = peer(pair(libc::SOCK_STREAM)?[0])?;
        let at = z.path("server").to_str().unwrap_or_default().to_string();
        let server = listener(libc::SOCK_STREAM, &at, 9)?;
        // For children under other ids.
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o777))
            .map_err(|e| format!("{at}: {e}"))?;
        let mut noise = vec![0; LONG];
        Rng(7).fill(&mut noise);

        let talks = client(libc::SOCK_STREAM, &at)?;
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors.
        check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
        send(talks, b"before", &[])?;
        // One end is nowhere but in flight, and so is a socket with a message of its own.
        let inner = pair(libc::SOCK_DGRAM)?;
        send(inner[0], b"deep", &[])?;
        send(talks, b"with descriptors", &[pipe[0], inner[1]])?;
        close(pipe[0]);
        close(inner[1]);
        send(talks, b"after", &[])?;

        let silent = client(libc::SOCK_STREAM, &at)?;
        let hidden = format!("@zoo-backlog-{}", zoo::pid());
        let gone = from_child(z, &at, &hidden, &["good", "bye"])?;
        let ended = client(libc::SOCK_STREAM, &at)?;
        send(ended, &noise, &[])?;
        // SAFETY: integers.
        check(unsafe { libc::shutdown(ended, libc::SHUT_WR) }, "shutdown")?;
        let mute = from_child(z, &at, &format!("{hidden}-mute"), &[])?;
        let last = client(libc::SOCK_STREAM, &at)?;

        let other = format!("@zoo-packets-{}", zoo::pid());
        let packet_server = listener(libc::SOCK_SEQPACKET, &other, 5)?;
        let packet_client = client(libc::SOCK_SEQPACKET, &other)?;
        send(packet_client, b"one", &[])?;
        send(packet_client, b"", &[])?;
        send(packet_client, b"three", &[talks])?;
        z.ready()?;
        z.wait_for_check();

        let first = accept(server)?;
        ensure_eq!(peer(first)?, own, "SO_PEERCRED of the first");
        let (data, rights) = drain(first, "the first")?;
        ensure_eq!(data, b"beforewith descriptorsafter", "what the first has sent");
        ensure_eq!(rights.len(), 2, "descriptors");
        ensure_eq!(got(rights[1], "the inner socket")?.data, b"deep", "in the inner socket");
        // SAFETY: the buffer is valid for its length.
        check(unsafe { libc::write(pipe[1], c"x".as_ptr().cast(), 1) } as i32, "write")?;
        let mut byte = 0u8;
        // SAFETY: as above.
        check(unsafe { libc::read(rights[0], (&raw mut byte).cast(), 1) } as i32, "read")?;
        ensure_eq!(byte, b'x', "through the pipe");
        send(first, b"answer", &[])?;
        ensure_eq!(got(talks, "the answer")?.data, b"answer", "the answer");

        let second = accept(server)?;
        ensure_eq!(receive(second, 9, 0), Err(libc::EAGAIN), "the silent one");
        send(silent, b"now", &[])?;
        ensure_eq!(got(second, "the silent one")?.data, b"now", "the silent one");

        let third = accept(server)?;
        ensure_eq!(peer(third)?, (gone, 7, 8), "SO_PEERCRED of the one who is gone");
        ensure_eq!(name(third, true)?, hidden, "its address");
        set_option(third, libc::SO_PASSCRED, 1)?;
        let message = got(third, "the one who is gone")?;
        ensure_eq!(message.data, b"goodbye", "of the one who is gone");
        ensure_eq!(message.credentials, Some((gone, 7, 8)), "its credentials");
        ensure_eq!(got(third, "its end")?.data, b"", "the end of the one who is gone");

        let fourth = accept(server)?;
        let (data, _) = drain(fourth, "the half closed one")?;
        ensure!(data == noise, "the half closed one has sent {} bytes", data.len());
        ensure_eq!(got(fourth, "its end")?.data, b"", "the end of the half closed one");
        send(fourth, b"still there", &[])?;
        ensure_eq!(got(ended, "the half closed one")?.data, b"still there", "half closed");

        let fifth = accept(server)?;
        ensure_eq!(peer(fifth)?, (mute, 7, 8), "SO_PEERCRED of the mute one");
        ensure_eq!(got(fifth, "the mute one")?.data, b"", "the end of the mute one");
        let sixth = accept(server)?;
        send(last, b"last", &[])?;
        ensure_eq!(got(sixth, "the last")?.data, b"last", "the last");
        packets(accept(packet_server)?, own)
    })
}
