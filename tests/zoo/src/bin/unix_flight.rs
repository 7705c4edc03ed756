//! Kernel state: descriptors in flight over unix sockets (`SCM_RIGHTS`): of files that live only there and of files that
//! are open elsewhere too, of many kinds, in streams, datagrams and sequential packets, sockets
//! inside sockets, a socket that has sent itself; with ZOO_EPOLL=1, an epoll instance.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::os::fd::RawFd;
use zoo::unix::{Message, accept, client, close, listener, pair, receive, send};
use zoo::{Check, check, cstring, ensure, ensure_eq, ok};

fn open(path: &std::path::Path, flags: i32) -> Result<RawFd, String> {
    let path = cstring(path);
    // SAFETY: `path` is a NUL-terminated string.
    ok(unsafe { libc::open(path.as_ptr(), flags, 0o600) } as i64, "open").map(|fd| fd as RawFd)
}

fn read(fd: RawFd, len: usize) -> Result<Vec<u8>, String> {
    let mut data = vec![0; len];
    // SAFETY: the buffer is valid for its length.
    let n = ok(unsafe { libc::read(fd, data.as_mut_ptr().cast(), len) } as i64, "read")?;
    data.truncate(n as usize);
    Ok(data)
}

fn write(fd: RawFd, data: &[u8]) -> Check {
    // SAFETY: the buffer is valid for its length.
    let n = ok(unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) } as i64, "write")?;
    ensure_eq!(n as usize, data.len(), "bytes written");
    Ok(())
}

fn seek(fd: RawFd, offset: i64, whence: i32) -> Result<i64, String> {
    // SAFETY: integers.
    ok(unsafe { libc::lseek(fd, offset, whence) }, "lseek")
}

/// Receives one message of these bytes and so many descriptors.
fn take(fd: RawFd, text: &[u8], count: usize, what: &str) -> Result<Vec<RawFd>, String> {
    let Message { data, rights, .. } =
        receive(fd, text.len().max(1), 0).map_err(|e| format!("{what}: errno {e}"))?;
    ensure_eq!(data, text, "{what}: data");
    ensure_eq!(rights.len(), count, "{what}: descriptors");
    Ok(rights)
}

fn nothing(fd: RawFd, what: &str) -> Check {
    ensure_eq!(receive(fd, 10, 0), Err(libc::EAGAIN), "{what}: what is left");
    Ok(())
}

fn inode(fd: RawFd) -> Result<u64, String> {
    let link = std::fs::metadata(format!("/proc/self/fd/{fd}")).map_err(|e| e.to_string())?;
    Ok(std::os::unix::fs::MetadataExt::ino(&link))
}

fn main() {
    zoo::run(|z| {
        let stream = pair(libc::SOCK_STREAM)?;
        let file = open(&z.path("file"), libc::O_RDWR | libc::O_CREAT)?;
        write(file, b"0123456789")?;
        seek(file, 3, libc::SEEK_SET)?;
        let deleted = open(&z.path("deleted"), libc::O_RDWR | libc::O_CREAT)?;
        write(deleted, b"gone but here")?;
        std::fs::remove_file(z.path("deleted")).map_err(|e| e.to_string())?;
        seek(deleted, 5, libc::SEEK_SET)?;
        // SAFETY: integers.
        let event = ok(unsafe { libc::eventfd(77, 0) } as i64, "eventfd")? as RawFd;
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors.
        check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
        write(pipe[1], b"in the pipe")?;
        // SAFETY: integers.
        let timer = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, 0) };
        let timer = ok(timer as i64, "timerfd_create")? as RawFd;
        let name = cstring("flying");
        // SAFETY: `name` is a NUL-terminated string.
        let memory = ok(unsafe { libc::memfd_create(name.as_ptr(), 0) } as i64, "memfd")? as RawFd;
        write(memory, b"memory")?;
        let at = format!("@zoo-flight-{}", zoo::pid());
        let server = listener(libc::SOCK_STREAM, &at, 5)?;
        // With ZOO_BORDERS=1, plain bytes right before those that come with descriptors.
        let borders = z.param("ZOO_BORDERS", 0) == 1;
        if borders {
            send(stream[0], b"before", &[])?;
        }
        // The file stays open here, with the same position; all others live in the message alone.
        send(stream[0], b"with", &[file, deleted, event, pipe[0], timer, memory, server])?;
        if borders {
            send(stream[0], b"after", &[])?;
        }
        send(stream[0], b"again", &[file])?;
        for fd in [deleted, event, pipe[0], timer, memory, server] {
            close(fd);
        }

        let datagrams = pair(libc::SOCK_DGRAM)?;
        let null = open(std::path::Path::new("/dev/null"), libc::O_WRONLY)?;
        send(datagrams[0], b"one", &[])?;
        send(datagrams[0], b"two", &[null])?;
        send(datagrams[0], b"three", &[null, null])?;
        close(null);
        let packets = pair(libc::SOCK_SEQPACKET)?;
        send(packets[0], b"packet", &[packets[0], packets[1]])?;

        // A pair inside a pair inside a pair; of the inner ones nobody has a descriptor.
        let (outer, middle, inner) =
            (pair(libc::SOCK_STREAM)?, pair(libc::SOCK_STREAM)?, pair(libc::SOCK_DGRAM)?);
        // With ZOO_DEEP=1.
        let deep = z.param("ZOO_DEEP", 0) == 1;
        if deep {
            send(inner[0], b"innermost", &[])?;
            send(middle[0], b"inner", &inner)?;
            send(outer[0], b"middle", &middle)?;
        }
        inner.into_iter().chain(middle).for_each(close);

        // A socket that is in its own queue, and one end in the queue of the other.
        let own = pair(libc::SOCK_STREAM)?;
        if deep {
            send(own[0], b"you", &[own[1]])?;
            send(own[1], b"me", &[own[1]])?;
        }
        close(own[1]);

        let watched = pair(libc::SOCK_STREAM)?;
        let with_epoll = z.param("ZOO_EPOLL", 0) == 1;
        if with_epoll {
            // SAFETY: integers.
            let epoll = ok(unsafe { libc::epoll_create1(0) } as i64, "epoll_create1")? as RawFd;
            for (end, data) in [(watched[0], 0xabcd), (outer[0], 0xef)] {
                let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: data };
                // SAFETY: the event is valid.
                let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, end, &mut event) };
                check(added, "epoll_ctl")?;
            }
            send(watched[0], b"epoll", &[epoll])?;
            close(epoll);
        }
        let inodes = (inode(file)?, z.path("file"));

        z.ready()?;
        z.wait_for_check();

        if borders {
            take(stream[1], b"before", 0, "plain bytes")?;
        }
        let got = take(stream[1], b"with", 7, "many kinds")?;
        if borders {
            take(stream[1], b"after", 0, "bytes after")?;
        }
        let again = take(stream[1], b"again", 1, "the file again")?;
        nothing(stream[1], "stream")?;
        ensure_eq!((inode(got[0])?, z.path("file")), inodes, "the file");
        ensure_eq!(read(got[0], 2)?, b"34", "the file's contents");
        ensure_eq!(read(again[0], 2)?, b"56", "position shared with the file sent again");
        ensure_eq!(seek(file, 0, libc::SEEK_CUR)?, 7, "position shared with the open file");
        ensure_eq!(read(got[1], 20)?, b"but here", "the deleted file");
        ensure_eq!(read(got[2], 8)?, 77u64.to_ne_bytes(), "the eventfd");
        ensure_eq!(read(got[3], 20)?, b"in the pipe", "the pipe");
        write(pipe[1], b"more")?;
        ensure_eq!(read(got[3], 20)?, b"more", "the pipe's other end");
        let soon = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let once = libc::itimerspec { it_interval: zoo::timespec(0), it_value: soon };
        // SAFETY: the value is valid.
        let set = unsafe { libc::timerfd_settime(got[4], 0, &once, std::ptr::null_mut()) };
        check(set, "timerfd_settime")?;
        ensure_eq!(read(got[4], 8)?, 1u64.to_ne_bytes(), "the timerfd");
        seek(got[5], 0, libc::SEEK_SET)?;
        ensure_eq!(read(got[5], 20)?, b"memory", "the memfd");
        let calling = client(libc::SOCK_STREAM, &at)?;
        let called = accept(got[6])?;
        send(calling, b"hello", &[])?;
        take(called, b"hello", 0, "the listening socket's connection")?;

        take(datagrams[1], b"one", 0, "datagram")?;
        let null = take(datagrams[1], b"two", 1, "datagram with a descriptor")?;
        write(null[0], b"into the void")?;
        take(datagrams[1], b"three", 2, "datagram with two descriptors")?;
        nothing(datagrams[1], "datagrams")?;
        let both = take(packets[1], b"packet", 2, "packet with its own ends")?;
        send(both[0], b"through", &[])?;
        take(packets[1], b"through", 0, "what went through the received end")?;

        if deep {
            let middle = take(outer[1], b"middle", 2, "outer pair")?;
            let inner = take(middle[1], b"inner", 2, "middle pair")?;
            take(inner[1], b"innermost", 0, "inner pair")?;
            send(inner[1], b"back", &[])?;
            take(inner[0], b"back", 0, "inner pair, the other way")?;

            let you = take(own[0], b"me", 1, "a socket sent by itself")?;
            let itself = take(you[0], b"you", 1, "a socket in its own queue")?;
            ensure_eq!(inode(you[0])?, inode(itself[0])?, "the same socket twice");
            send(own[0], b"end", &[])?;
            take(itself[0], b"end", 0, "the socket that was in its own queue")?;
        }

        if with_epoll {
            let epoll = take(watched[1], b"epoll", 1, "the epoll instance")?[0];
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let mut wait = |ms| {
                // SAFETY: room for one event.
                let n = unsafe { libc::epoll_wait(epoll, &mut event, 1, ms) };
                (n, event.u64)
            };
            ensure_eq!(wait(0).0, 0, "events before there is any");
            send(watched[1], b"!", &[])?;
            ensure_eq!(wait(1000), (1, 0xabcd), "event");
            take(watched[0], b"!", 0, "what was watched")?;
            ensure!(wait(0).0 == 0, "an event although nothing waits");
            send(outer[1], b"?", &[])?;
            ensure_eq!(wait(1000), (1, 0xef), "second event");
        }
        Ok(())
    })
}
