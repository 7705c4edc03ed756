//! Kernel state: fanotify groups: one that hands out descriptors, with marks on a directory, on a mount and with something
//! ignored; one that reports handles of files, with a mark on a whole file system (ZOO_PLAIN: without it, and only what
//! CRIU's format has).
#![allow(unsafe_code, reason = "fanotify through the C library")]

use std::path::Path;
use zoo::{check, ensure, ensure_eq};

fn group(flags: u32) -> Result<i32, String> {
    // SAFETY: integers.
    let fd = unsafe {
        libc::fanotify_init(
            flags | libc::FAN_NONBLOCK | libc::FAN_CLOEXEC,
            (libc::O_RDONLY | libc::O_LARGEFILE) as u32,
        )
    };
    check(fd, "fanotify_init")?;
    Ok(fd)
}

fn mark(fd: i32, flags: u32, mask: u64, path: &Path) -> zoo::Check {
    let path = zoo::cstring(path);
    // SAFETY: a NUL-terminated string.
    let done = unsafe {
        libc::fanotify_mark(fd, flags | libc::FAN_MARK_ADD, mask, libc::AT_FDCWD, path.as_ptr())
    };
    check(done, "fanotify_mark")
}

/// All that waits: (events, path or nothing), of this process only. Others may be busy on the same mount.
fn events(fd: i32) -> Vec<(u64, String)> {
    let mut found = Vec::new();
    loop {
        let mut buffer = [0u8; 8192];
        // SAFETY: room for the length given.
        let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
        if n <= 0 {
            return found;
        }
        let mut at = 0;
        while at + 24 <= n as usize {
            let word = |offset: usize| {
                let bytes = &buffer[at + offset..at + offset + 4];
                u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            };
            let mask = u64::from(word(8)) | u64::from(word(12)) << 32;
            let (file, pid) = (word(16) as i32, word(20) as i32);
            let mut path = String::new();
            if file >= 0 {
                let link = std::fs::read_link(format!("/proc/self/fd/{file}"));
                path = link.map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
                // SAFETY: it came with the event.
                unsafe { libc::close(file) };
            }
            if pid == zoo::pid() {
                found.push((mask, path));
            }
            at += word(0) as usize;
        }
    }
}

fn main() {
    zoo::run(|z| {
        let plain = z.param("ZOO_PLAIN", 0) != 0;
        let (dir, file, ignored) = (z.path("watched"), z.path("file"), z.path("ignored"));
        std::fs::create_dir(&dir).map_err(|e| e.to_string())?;
        std::fs::write(&file, "").map_err(|e| e.to_string())?;
        std::fs::write(&ignored, "").map_err(|e| e.to_string())?;
        let names = group(libc::FAN_CLASS_NOTIF)?;
        mark(names, 0, libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD, &dir)?;
        mark(names, 0, libc::FAN_CLOSE_WRITE, &file)?;
        let mount = group(libc::FAN_CLASS_CONTENT | libc::FAN_UNLIMITED_QUEUE)?;
        mark(mount, libc::FAN_MARK_MOUNT, libc::FAN_CLOSE_WRITE, z.dir())?;
        let survives = libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
        mark(mount, survives, libc::FAN_CLOSE_WRITE, &ignored)?;
        let handles = if plain {
            None
        } else {
            let fd = group(libc::FAN_CLASS_NOTIF | libc::FAN_REPORT_FID)?;
            mark(fd, libc::FAN_MARK_FILESYSTEM, libc::FAN_CREATE | libc::FAN_DELETE, z.dir())?;
            Some(fd)
        };
        z.ready()?;
        z.wait_for_check();
        for fd in [Some(names), Some(mount), handles].into_iter().flatten() {
            events(fd);
        }
        let new = dir.join("new");
        std::fs::write(&new, "x").map_err(|e| e.to_string())?;
        std::fs::write(&file, "x").map_err(|e| e.to_string())?;
        std::fs::write(&ignored, "x").map_err(|e| e.to_string())?;
        std::fs::remove_file(&new).map_err(|e| e.to_string())?;
        let text = |p: &Path| p.to_string_lossy().into_owned();
        let got = events(names);
        let deleted = format!("{} (deleted)", text(&new));
        let wanted = [(libc::FAN_OPEN, deleted.clone()), (libc::FAN_CLOSE_WRITE, text(&file))];
        ensure_eq!(got, wanted, "events of inodes");
        let got = events(mount);
        ensure!(
            got.contains(&(libc::FAN_CLOSE_WRITE, text(&file))),
            "no event of the mount: {got:?}"
        );
        ensure!(got.contains(&(libc::FAN_CLOSE_WRITE, deleted)), "one event of the mount: {got:?}");
        ensure!(!got.iter().any(|(_, p)| *p == text(&ignored)), "what was ignored: {got:?}");
        if let Some(handles) = handles {
            let got: u64 = events(handles).iter().fold(0, |all, (mask, _)| all | mask);
            let wanted = libc::FAN_CREATE | libc::FAN_DELETE;
            ensure_eq!(got & wanted, wanted, "events of the file system");
        }
        Ok(())
    })
}
