//! Kernel state: the current directory and the root: a directory of one's own in a child, another file system's in a
//! second, a chroot in a third (as root), with different umasks.
#![allow(unsafe_code, reason = "chroot and umask through the C library")]

use std::path::Path;
use zoo::{check, cstring, ensure, ensure_eq};

fn cwd() -> Result<std::path::PathBuf, String> {
    std::env::current_dir().map_err(|e| format!("current directory: {e}"))
}

fn exists(path: &str) -> bool {
    Path::new(path).exists()
}

fn main() {
    zoo::run(|z| {
        for dir in ["sub", "sub/deep dir", "jail", "jail/in"] {
            std::fs::create_dir(z.path(dir)).map_err(|e| format!("{dir}: {e}"))?;
        }
        std::fs::write(z.path("jail/mark"), "").map_err(|e| e.to_string())?;
        let other = z.fork(|z| {
            std::env::set_current_dir("/dev/shm").map_err(|e| e.to_string())?;
            // SAFETY: an integer.
            unsafe { libc::umask(0o007) };
            z.publish("up.other", "");
            z.wait_for_check();
            ensure_eq!(cwd()?, Path::new("/dev/shm"), "cwd of the child");
            // SAFETY: an integer.
            ensure_eq!(unsafe { libc::umask(0) }, 0o007, "umask of the child");
            Ok(())
        })?;
        // SAFETY: integers only.
        let root = unsafe { libc::geteuid() } == 0;
        let jailed = z.fork(|z| {
            if root {
                let jail = cstring(z.path("jail"));
                std::env::set_current_dir(z.path("jail/in")).map_err(|e| e.to_string())?;
                // SAFETY: NUL-terminated.
                check(unsafe { libc::chroot(jail.as_ptr()) }, "chroot")?;
                ensure!(exists("/mark"), "set-up of the jail");
                std::fs::write("/up", "").map_err(|e| e.to_string())?;
                // From in here the harness's files cannot be seen: the parent tells.
                while !exists("/check") {
                    zoo::nap(2);
                }
                ensure!(exists("/mark") && !exists("/proc"), "root is not the jail any more");
                ensure!(exists("../mark") && exists("../in"), "cwd is not in the jail any more");
                ensure_eq!(cwd()?, Path::new("/in"), "cwd in the jail");
                let up = std::fs::metadata("/..").map_err(|e| e.to_string())?;
                let top = std::fs::metadata("/").map_err(|e| e.to_string())?;
                use std::os::unix::fs::MetadataExt;
                ensure_eq!(up.ino(), top.ino(), "the jail's root is its own parent");
            }
            Ok(())
        })?;
        z.wait_for("up.other")?;
        if root {
            z.wait_for("jail/up")?;
        }
        std::env::set_current_dir(z.path("sub/deep dir")).map_err(|e| e.to_string())?;
        // SAFETY: an integer.
        unsafe { libc::umask(0o123) };
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(cwd()?, z.path("sub/deep dir"), "cwd");
        std::fs::write("made after", "").map_err(|e| e.to_string())?;
        ensure!(z.path("sub/deep dir/made after").exists(), "a relative path led elsewhere");
        // SAFETY: an integer.
        ensure_eq!(unsafe { libc::umask(0) }, 0o123, "umask");
        std::fs::write(z.path("jail/check"), "").map_err(|e| e.to_string())?;
        z.join(other)?;
        z.join(jailed)
    })
}
