//! Kernel state: pipes: content, capacity, flags of each end, ends in different processes, half-closed ones,
//! a second description of one end, a full pipe with a blocked writer, an empty one with a blocked reader.
#![allow(unsafe_code, reason = "raw descriptors through the C library")]

use zoo::{Check, Rng, check, cstring, ensure, ensure_eq, ok};

fn pipe(flags: i32) -> Result<(i32, i32), String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), flags) }, "pipe2")?;
    Ok((fds[0], fds[1]))
}

fn write(fd: i32, data: &[u8]) -> Check {
    // SAFETY: the buffer is valid for its length.
    let n = ok(unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) } as i64, "write")?;
    ensure_eq!(n as usize, data.len(), "write to fd {fd}");
    Ok(())
}

/// Reads until `len` bytes are there or the end comes.
fn read(fd: i32, len: usize) -> Result<Vec<u8>, String> {
    let mut data = vec![0; len];
    let mut got = 0;
    while got < len {
        // SAFETY: the rest of the buffer is valid.
        let n = ok(
            unsafe { libc::read(fd, data[got..].as_mut_ptr().cast(), len - got) } as i64,
            "read",
        )?;
        if n == 0 {
            break;
        }
        got += n as usize;
    }
    data.truncate(got);
    Ok(data)
}

fn fcntl(fd: i32, command: i32, arg: i32) -> Result<i32, String> {
    // SAFETY: integer commands only.
    Ok(ok(unsafe { libc::fcntl(fd, command, arg) } as i64, "fcntl")? as i32)
}

fn close(fd: i32) -> Check {
    // SAFETY: an integer; the descriptor is ours.
    check(unsafe { libc::close(fd) }, "close")
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    Rng(seed).fill(&mut data);
    data
}

fn main() {
    zoo::run(|z| {
        let small = pipe(0)?;
        write(small.1, b"hello")?;
        write(small.1, b" world")?;
        let big = pipe(libc::O_CLOEXEC)?;
        fcntl(big.1, libc::F_SETPIPE_SZ, 512 << 10)?;
        write(big.1, &random(1, 300_000))?;
        let flags = pipe(0)?;
        fcntl(flags.0, libc::F_SETFL, libc::O_NONBLOCK)?;
        // Writer gone, content left; reader gone.
        let no_writer = pipe(0)?;
        write(no_writer.1, b"last words")?;
        close(no_writer.1)?;
        let no_reader = pipe(0)?;
        close(no_reader.0)?;
        // A second description of the read end, with flags of its own.
        let twice = pipe(0)?;
        write(twice.1, b"either")?;
        let path = cstring(format!("/proc/self/fd/{}", twice.0));
        // SAFETY: the path is NUL-terminated.
        let again = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_NONBLOCK) };
        ok(again as i64, "reopen")?;

        // Each end in its own process, neither in the root; one blocked writer, one blocked reader.
        let between = pipe(0)?;
        let blocked_reader = pipe(0)?;
        let blocked_writer = pipe(0)?;
        let writer = z.fork(|z| {
            close(between.0)?;
            close(blocked_writer.0)?;
            write(between.1, b"sent before; ")?;
            z.publish("writer", "");
            // 64 KiB fit; the rest waits for a reader.
            // A signal, or a checkpoint, may make the system call return with what it has written so far: a short
            // count is what write(2) promises then, an error is not.
            let data = random(2, 200_000);
            let mut done = 0;
            while done < data.len() {
                let rest = &data[done..];
                // SAFETY: the rest of the buffer is valid.
                let n = unsafe { libc::write(blocked_writer.1, rest.as_ptr().cast(), rest.len()) };
                done += ok(n as i64, "blocked write")? as usize;
            }
            z.wait_for_check();
            write(between.1, b"sent after")?;
            close(between.1)?;
            Ok(())
        })?;
        let reader = z.fork(|z| {
            close(between.1)?;
            close(blocked_reader.1)?;
            z.publish("reader", "");
            ensure_eq!(read(blocked_reader.0, 5)?, b"woken", "what woke the blocked reader");
            let all = read(between.0, 100)?;
            ensure_eq!(
                String::from_utf8_lossy(&all),
                "sent before; sent after",
                "what came from the other process"
            );
            Ok(())
        })?;
        close(between.0)?;
        close(between.1)?;
        close(blocked_reader.0)?;
        close(blocked_writer.1)?;
        z.wait_for("writer")?;
        z.wait_for("reader")?;
        zoo::wait_state(writer, 'S')?;
        zoo::wait_state(reader, 'S')?;
        let sizes = [small, big, flags].map(|p| fcntl(p.1, libc::F_GETPIPE_SZ, 0));
        z.ready()?;
        z.wait_for_check();

        ensure_eq!(
            [small, big, flags].map(|p| fcntl(p.1, libc::F_GETPIPE_SZ, 0)),
            sizes,
            "capacities"
        );
        ensure_eq!(read(small.0, 11)?, b"hello world", "small pipe");
        write(small.1, b"again")?;
        ensure_eq!(read(small.0, 5)?, b"again", "small pipe used again");
        ensure!(read(big.0, 300_000)? == random(1, 300_000), "content of the big pipe differs");
        write(big.1, &random(3, 500_000))?;
        ensure!(read(big.0, 500_000)? == random(3, 500_000), "big pipe used again differs");
        ensure_eq!(
            fcntl(flags.0, libc::F_GETFL, 0)? & libc::O_NONBLOCK,
            libc::O_NONBLOCK,
            "read end's O_NONBLOCK"
        );
        ensure_eq!(
            fcntl(flags.1, libc::F_GETFL, 0)? & libc::O_NONBLOCK,
            0,
            "write end's O_NONBLOCK"
        );
        ensure_eq!(read(no_writer.0, 100)?, b"last words", "pipe without a writer, up to its end");
        // SAFETY: one valid byte. SIGPIPE is ignored by the standard library.
        let refused = unsafe { libc::write(no_reader.1, c"x".as_ptr().cast(), 1) };
        ensure_eq!((refused, zoo::errno()), (-1, libc::EPIPE), "write to a pipe without a reader");
        ensure_eq!(
            fcntl(again, libc::F_GETFL, 0)? & libc::O_NONBLOCK,
            libc::O_NONBLOCK,
            "O_NONBLOCK of the second"
        );
        ensure_eq!(read(again, 3)?, b"eit", "second description");
        ensure_eq!(read(twice.0, 3)?, b"her", "first description");
        write(blocked_reader.1, b"woken")?;
        ensure!(
            read(blocked_writer.0, 200_000)? == random(2, 200_000),
            "what the blocked writer wrote differs"
        );
        ensure_eq!(read(blocked_writer.0, 1)?.len(), 0, "end of the blocked writer's pipe");
        z.join(writer)?;
        z.join(reader)
    })
}
