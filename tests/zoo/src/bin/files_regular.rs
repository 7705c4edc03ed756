//! Kernel state: open regular files and directories: position, status flags, close-on-exec, high numbers, owner and
//! signal; descriptions shared by dup and by fork, and separate descriptions of one file. `ZOO_LINK`: a symbolic link itself, too.
#![allow(unsafe_code, reason = "raw descriptors through the C library")]

use zoo::{Check, Zoo, check, cstring, ensure, ensure_eq, ok};

fn open(z: &Zoo, name: &str, flags: i32) -> Result<i32, String> {
    let path = cstring(z.path(name));
    // SAFETY: `path` is NUL-terminated and outlives the call.
    Ok(ok(unsafe { libc::open(path.as_ptr(), flags, 0o644) } as i64, &format!("open {name}"))?
        as i32)
}

fn fcntl(fd: i32, command: i32, arg: i32) -> Result<i32, String> {
    // SAFETY: integer commands only.
    Ok(ok(unsafe { libc::fcntl(fd, command, arg) } as i64, &format!("fcntl {command} on fd {fd}"))?
        as i32)
}

fn seek(fd: i32, to: i64, whence: i32) -> Result<i64, String> {
    // SAFETY: integers only.
    ok(unsafe { libc::lseek(fd, to, whence) }, &format!("lseek on fd {fd}"))
}

fn position(fd: i32) -> Result<i64, String> {
    seek(fd, 0, libc::SEEK_CUR)
}

/// Everything fcntl tells of a descriptor.
#[derive(Debug, PartialEq)]
struct State {
    status: i32,
    cloexec: i32,
    position: Option<i64>,
    owner: i32,
    signal: i32,
}

fn state(fd: i32) -> Result<State, String> {
    // O_DIRECTORY is reported but means nothing after open (the harness compares it from outside).
    let status = fcntl(fd, libc::F_GETFL, 0)? & !libc::O_DIRECTORY;
    let path_only = status & libc::O_PATH != 0;
    const F_GETSIG: i32 = 11;
    Ok(State {
        status,
        cloexec: fcntl(fd, libc::F_GETFD, 0)?,
        position: if path_only { None } else { Some(position(fd)?) },
        owner: if path_only { 0 } else { fcntl(fd, libc::F_GETOWN, 0)? },
        signal: if path_only { 0 } else { fcntl(fd, F_GETSIG, 0)? },
    })
}

fn main() {
    zoo::run(|z| {
        let text: String = (0..1000).map(|i| format!("line {i:04}\n")).collect();
        for name in ["data", "append", "other", "readonly", "direct", "sync"] {
            std::fs::write(z.path(name), &text).map_err(|e| format!("{name}: {e}"))?;
        }
        check(unsafe { libc::chmod(cstring(z.path("readonly")).as_ptr(), 0o444) }, "chmod")?;
        std::fs::create_dir(z.path("d")).map_err(|e| e.to_string())?;
        for i in 0..100 {
            std::fs::write(z.path(&format!("d/{i}")), "").map_err(|e| e.to_string())?;
        }
        std::os::unix::fs::symlink("data", z.path("link")).map_err(|e| e.to_string())?;

        let data = open(z, "data", libc::O_RDWR)?;
        seek(data, 1234, libc::SEEK_SET)?;
        let dup = fcntl(data, libc::F_DUPFD, 900)?;
        let dup_cloexec = fcntl(data, libc::F_DUPFD_CLOEXEC, 901)?;
        let separate = open(z, "data", libc::O_RDWR | libc::O_CLOEXEC)?;
        seek(separate, 77, libc::SEEK_SET)?;
        let linked = open(z, "link", libc::O_RDONLY)?;
        let link = match z.param("ZOO_LINK", 0) {
            1 => Some(open(z, "link", libc::O_PATH | libc::O_NOFOLLOW)?),
            _ => None,
        };
        let append = open(z, "append", libc::O_WRONLY | libc::O_APPEND | libc::O_NONBLOCK)?;
        let wronly = open(z, "other", libc::O_WRONLY)?;
        let readonly = open(z, "readonly", libc::O_RDONLY | libc::O_NOATIME)?;
        let direct = open(z, "direct", libc::O_RDWR | libc::O_DIRECT)?;
        let sync = open(z, "sync", libc::O_RDWR | libc::O_SYNC)?;
        let dsync = open(z, "sync", libc::O_RDWR | libc::O_DSYNC)?;
        let path_only = open(z, "other", libc::O_PATH)?;
        let dir = open(z, "d", libc::O_RDONLY | libc::O_DIRECTORY)?;
        let beyond = open(z, "other", libc::O_RDONLY)?;
        seek(beyond, 1 << 40, libc::SEEK_SET)?;
        let renamed = open(z, "other", libc::O_RDONLY)?;
        std::fs::rename(z.path("other"), z.path("new name with a space"))
            .map_err(|e| e.to_string())?;
        fcntl(wronly, libc::F_SETOWN, zoo::pid())?;
        fcntl(wronly, 10 /* F_SETSIG */, libc::SIGRTMIN() + 3)?;
        // A directory half read: its position is the file system's cookie.
        let mut names = vec![0u8; 2000];
        // SAFETY: the buffer is valid for its length.
        let read =
            unsafe { libc::syscall(libc::SYS_getdents64, dir, names.as_mut_ptr(), names.len()) };
        ok(read, "getdents64")?;

        let child = z.fork(|z| {
            z.wait_for("moved")?;
            ensure_eq!(position(data)?, 4000, "position that the parent moved, seen in the child");
            seek(data, 5000, libc::SEEK_SET)?;
            z.publish("child-moved", "");
            Ok(())
        })?;
        let own_copy = z.fork(|z| {
            // A description of its own under a number the parent uses for another.
            check(unsafe { libc::close(data) }, "close")?;
            let mine = open(z, "data", libc::O_RDONLY)?;
            ensure_eq!(mine, data, "lowest free descriptor");
            seek(mine, 10, libc::SEEK_SET)?;
            z.publish("own", "");
            z.wait_for("child-moved")?;
            ensure_eq!(position(mine)?, 10, "position of the child's own description");
            Ok(())
        })?;
        z.wait_for("own")?;

        let all = [
            data,
            dup,
            dup_cloexec,
            separate,
            linked,
            append,
            wronly,
            readonly,
            direct,
            sync,
            dsync,
            path_only,
            dir,
            beyond,
            renamed,
        ];
        let before = all.iter().map(|&fd| state(fd)).collect::<Result<Vec<_>, _>>()?;
        z.ready()?;
        z.wait_for_check();
        if let Some(link) = link {
            let target = std::fs::read_link(format!("/proc/self/fd/{link}"));
            let target = target.and_then(std::fs::read_link).map_err(|e| e.to_string())?;
            ensure_eq!(target.as_os_str(), "data", "where the link leads");
        }
        for (&fd, before) in all.iter().zip(&before) {
            ensure_eq!(state(fd)?, *before, "fd {fd}");
        }
        used(data, dup, dup_cloexec, separate, append, wronly, dir)?;
        z.publish("moved", "");
        z.wait_for("child-moved").map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        ensure_eq!(position(dup)?, 5000, "position that the child moved");
        z.join(child)?;
        z.join(own_copy)?;
        let now = std::fs::read(z.path("append")).map_err(|e| e.to_string())?;
        ensure!(
            now.ends_with(b"appended") && now.len() == text.len() + 8,
            "O_APPEND wrote elsewhere"
        );
        Ok(())
    })
}

fn used(
    data: i32,
    dup: i32,
    dup_cloexec: i32,
    separate: i32,
    append: i32,
    wronly: i32,
    dir: i32,
) -> Check {
    let mut buf = [0u8; 9];
    // SAFETY: the buffers are valid for the lengths given.
    unsafe {
        ensure_eq!(libc::read(separate, buf.as_mut_ptr().cast(), 3), 3, "read");
        ensure_eq!(&buf[..3], b"07\n", "content at position 77");
        ensure_eq!(position(data)?, 1234, "position moved by a separate description");
        ensure_eq!(libc::read(dup, buf.as_mut_ptr().cast(), 6), 6, "read");
        ensure_eq!(position(data)?, 1240, "position moved by a dup");
        ensure_eq!(seek(dup_cloexec, 4000, libc::SEEK_SET)?, 4000, "seek");
        ensure_eq!(libc::write(append, c"appended".as_ptr().cast(), 8), 8, "append");
        ensure_eq!(libc::write(wronly, c"X".as_ptr().cast(), 1), 1, "write");
        ensure!(
            libc::read(wronly, buf.as_mut_ptr().cast(), 1) < 0,
            "a write-only descriptor could be read"
        );
        let mut names = vec![0u8; 32 << 10];
        let mut more = 0;
        loop {
            let n = ok(
                libc::syscall(libc::SYS_getdents64, dir, names.as_mut_ptr(), names.len()),
                "getdents64",
            )?;
            if n == 0 {
                break;
            }
            more += n;
        }
        ensure!(more > 0, "the directory's position was lost: nothing more to read");
        ensure!(more < 102 * 32, "the directory was read from its start: {more} bytes");
    }
    Ok(())
}
