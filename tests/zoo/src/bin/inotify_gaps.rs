//! Kernel state: inotify watches of files whose path is not the one they were given by: moved, deleted while open, and one
//! on an overlay, whose files cannot be looked up by a handle (ZOO_OVERLAY, in a mount namespace that is the harness's).
#![allow(unsafe_code, reason = "inotify through the C library")]

use std::os::fd::AsRawFd;
use std::path::Path;
use zoo::{check, ensure_eq};

fn watch(fd: i32, path: &Path, mask: u32) -> Result<i32, String> {
    let path = zoo::cstring(path);
    // SAFETY: a NUL-terminated string.
    let wd = unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) };
    check(wd, "inotify_add_watch")?;
    Ok(wd)
}

/// All that waits: (watch, events).
fn events(fd: i32) -> Vec<(i32, u32)> {
    let mut buffer = [0u8; 4096];
    // SAFETY: room for the length given.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) }.max(0) as usize;
    let word = |at: usize| {
        u32::from_ne_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]])
    };
    let mut found = Vec::new();
    let mut at = 0;
    while at + 16 <= n {
        found.push((word(at) as i32, word(at + 4)));
        at += 16 + word(at + 12) as usize;
    }
    found
}

fn main() {
    zoo::run(|z| {
        let io = |e: std::io::Error| e.to_string();
        // SAFETY: integers.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        check(fd, "inotify_init1")?;
        let (from, to, gone) = (z.path("from"), z.path("to"), z.path("gone"));
        std::fs::create_dir(&from).map_err(io)?;
        std::fs::write(from.join("inner"), "").map_err(io)?;
        let moved_dir = watch(fd, &from, libc::IN_CREATE)?;
        let moved_file = watch(fd, &from.join("inner"), libc::IN_MODIFY)?;
        std::fs::rename(&from, &to).map_err(io)?;
        let open = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&gone)
            .map_err(io)?;
        let deleted = watch(fd, &gone, libc::IN_MODIFY | libc::IN_ATTRIB)?;
        std::fs::remove_file(&gone).map_err(io)?;
        events(fd);
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(events(fd), [], "events before anything happened");
        std::fs::write(to.join("new"), "").map_err(io)?;
        std::fs::write(to.join("inner"), "x").map_err(io)?;
        // SAFETY: one byte of a literal.
        check(unsafe { libc::write(open.as_raw_fd(), b"x".as_ptr().cast(), 1) } as i32, "write")?;
        let wanted = [
            (moved_dir, libc::IN_CREATE),
            (moved_file, libc::IN_MODIFY),
            (deleted, libc::IN_MODIFY),
        ];
        ensure_eq!(events(fd), wanted, "events");
        Ok(())
    })
}
