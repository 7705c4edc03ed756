//! Kernel state: Unix socket pairs (stream, datagram, sequential packets), with data queued both ways, half closed ones,
//! ends in different processes.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{Check, Rng, check, ensure, ensure_eq, errno, ok};

fn pair(kind: i32) -> Result<[i32; 2], String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, "socketpair")?;
    Ok(fds)
}

fn send(fd: i32, data: &[u8]) -> Check {
    // SAFETY: the buffer is valid for its length.
    let n = ok(
        unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) } as i64,
        "send",
    )?;
    ensure_eq!(n as usize, data.len(), "bytes sent");
    Ok(())
}

/// One receive: what it gives, or its errno.
fn receive(fd: i32, len: usize, flags: i32) -> Result<Vec<u8>, i32> {
    let mut data = vec![0; len];
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::recv(fd, data.as_mut_ptr().cast(), len, flags) };
    if n < 0 {
        return Err(errno());
    }
    data.truncate(n as usize);
    Ok(data)
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    Rng(seed).fill(&mut data);
    data
}

fn main() {
    zoo::run(|z| {
        let stream = pair(libc::SOCK_STREAM)?;
        send(stream[0], &random(1, 20_000))?;
        send(stream[0], b"second")?;
        send(stream[1], b"answer")?;
        let dgram = pair(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK)?;
        // With ZOO_EMPTY=1: an empty datagram among them.
        let middle: &[u8] = if z.param("ZOO_EMPTY", 0) == 1 { b"" } else { b"two" };
        for text in [&b"one"[..], middle, b"three"] {
            send(dgram[0], text)?;
        }
        let packets = pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)?;
        send(packets[1], b"packet one")?;
        send(packets[1], b"packet two")?;
        let half = pair(libc::SOCK_STREAM)?;
        send(half[0], b"last")?;
        // SAFETY: integers.
        check(unsafe { libc::shutdown(half[0], libc::SHUT_WR) }, "shutdown")?;
        let apart = pair(libc::SOCK_STREAM)?;
        send(apart[0], b"to the child")?;
        let child = z.fork(|z| {
            // SAFETY: integers.
            unsafe { libc::close(apart[0]) };
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(
                receive(apart[1], 12, libc::MSG_WAITALL),
                Ok(b"to the child".to_vec()),
                "queue of the child"
            );
            send(apart[1], b"from the child")?;
            ensure_eq!(
                receive(apart[1], 100, 0),
                Ok(Vec::new()),
                "end of the stream, in the child"
            );
            Ok(())
        })?;
        // SAFETY: integers.
        unsafe { libc::close(apart[1]) };
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        let got = receive(stream[1], 20_006, libc::MSG_WAITALL)
            .map_err(|e| format!("stream: errno {e}"))?;
        ensure!(
            got[..20_000] == random(1, 20_000) && &got[20_000..] == b"second",
            "queue of the stream differs"
        );
        ensure_eq!(
            receive(stream[0], 6, libc::MSG_WAITALL),
            Ok(b"answer".to_vec()),
            "queue the other way"
        );
        for text in [&b"one"[..], middle, b"three"] {
            ensure_eq!(receive(dgram[1], 100, 0), Ok(text.to_vec()), "datagram");
        }
        ensure_eq!(receive(dgram[1], 100, 0), Err(libc::EAGAIN), "after the last datagram");
        for text in [b"packet one", b"packet two"] {
            ensure_eq!(receive(packets[0], 100, 0), Ok(text.to_vec()), "sequential packet");
        }
        ensure_eq!(
            receive(half[1], 4, libc::MSG_WAITALL),
            Ok(b"last".to_vec()),
            "queue of the half closed one"
        );
        ensure_eq!(receive(half[1], 100, 0), Ok(Vec::new()), "end of the half closed one");
        send(half[1], b"back")?;
        ensure_eq!(
            receive(half[0], 4, libc::MSG_WAITALL),
            Ok(b"back".to_vec()),
            "through the open half"
        );
        ensure!(send(half[0], b"x").is_err(), "the closed half can be written");
        let text = receive(apart[0], 14, libc::MSG_WAITALL);
        ensure_eq!(text, Ok(b"from the child".to_vec()), "from the child");
        // SAFETY: integers.
        unsafe { libc::close(apart[0]) };
        z.join(child)
    })
}
