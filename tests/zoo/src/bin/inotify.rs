//! Kernel state: an inotify instance with watches on a directory and on files, one of them removed, so that numbers have a
//! gap.
#![allow(unsafe_code, reason = "inotify through the C library")]

use std::path::Path;
use zoo::{check, ensure, ensure_eq};

fn watch(fd: i32, path: &Path, mask: u32) -> Result<i32, String> {
    let path = zoo::cstring(path);
    // SAFETY: a NUL-terminated string.
    let wd = unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) };
    check(wd, "inotify_add_watch")?;
    Ok(wd)
}

/// All that waits: (watch, events, name).
fn events(fd: i32) -> Vec<(i32, u32, String)> {
    let mut buffer = [0u8; 4096];
    // SAFETY: room for the length given.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) }.max(0) as usize;
    let word = |at: usize| {
        u32::from_ne_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]])
    };
    let mut found = Vec::new();
    let mut at = 0;
    while at + 16 <= n {
        let length = word(at + 12) as usize;
        let name = String::from_utf8_lossy(&buffer[at + 16..at + 16 + length]);
        found.push((word(at) as i32, word(at + 4), name.trim_end_matches('\0').to_owned()));
        at += 16 + length;
    }
    found
}

fn main() {
    zoo::run(|z| {
        let (dir, file) = (z.path("watched"), z.path("file"));
        std::fs::create_dir(&dir).map_err(|e| e.to_string())?;
        std::fs::write(&file, "").map_err(|e| e.to_string())?;
        // SAFETY: integers.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        check(fd, "inotify_init1")?;
        let directory = watch(fd, &dir, libc::IN_CREATE | libc::IN_DELETE | libc::IN_ONLYDIR)?;
        let gap = watch(fd, z.dir(), libc::IN_ATTRIB)?;
        let single = watch(fd, &file, libc::IN_MODIFY)?;
        // SAFETY: integers.
        check(unsafe { libc::inotify_rm_watch(fd, gap) }, "inotify_rm_watch")?;
        // That it is gone is an event too.
        events(fd);
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(events(fd), [], "events before anything happened");
        std::fs::write(dir.join("new"), "").map_err(|e| e.to_string())?;
        std::fs::write(&file, "x").map_err(|e| e.to_string())?;
        std::fs::remove_file(dir.join("new")).map_err(|e| e.to_string())?;
        let got = events(fd);
        let wanted = [
            (directory, libc::IN_CREATE, "new".to_owned()),
            (single, libc::IN_MODIFY, String::new()),
            (directory, libc::IN_DELETE, "new".to_owned()),
        ];
        ensure_eq!(got, wanted, "events");
        // The next watch gets a number that none had.
        let next = watch(fd, z.dir(), libc::IN_ATTRIB)?;
        ensure!(next > single, "number {next} of a new watch, after {single}");
        Ok(())
    })
}
