//! Kernel state: processes with one working directory, root and umask (`CLONE_FS`): a child, a grandchild, one whose parent has
//! taken its own since, two that are siblings but share something that their parent does not; and one that shares nothing.
#![allow(unsafe_code, reason = "umask")]

use libc::{CLONE_FILES, CLONE_FS, CLONE_PARENT};
use std::path::{Path, PathBuf};
use zoo::kin::Kin;
use zoo::{Check, Zoo, ensure_eq};

fn enter(kin: &Kin, path: &Path) -> Check {
    let at = kin.put(path.as_os_str().as_encoded_bytes());
    kin.call(libc::SYS_chdir, [at, 0, 0, 0, 0, 0]).map(drop)
}

/// Where a process is.
fn place(kin: &Kin) -> Result<PathBuf, String> {
    let len = kin.call(libc::SYS_getcwd, [kin.data(), 2000, 0, 0, 0, 0])?;
    let mut path = kin.get(len as usize);
    path.pop();
    String::from_utf8(path).map(PathBuf::from).map_err(|e| e.to_string())
}

/// Its umask; setting it is the only way to see it.
fn mask(kin: &Kin) -> Result<i64, String> {
    let mask = kin.call(libc::SYS_umask, [0o22, 0, 0, 0, 0, 0])?;
    kin.call(libc::SYS_umask, [mask as u64, 0, 0, 0, 0, 0])?;
    Ok(mask)
}

fn directory(z: &Zoo, name: &str) -> Result<PathBuf, String> {
    let path = z.path(name);
    std::fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    path.canonicalize().map_err(|e| e.to_string())
}

fn main() {
    zoo::run(|z| {
        let [one, two, three, four] =
            ["one", "two", "three", "four"].map(|name| directory(z, name));
        let (one, two, three, four) = (one?, two?, three?, four?);
        let child = Kin::child("child", CLONE_FS)?;
        let grandchild = child.spawn("grandchild", CLONE_FS | CLONE_FILES)?;
        let left = Kin::child("left", CLONE_FS)?;
        let behind = left.spawn("behind", CLONE_FS)?;
        left.call(libc::SYS_unshare, [CLONE_FS as u64, 0, 0, 0, 0, 0])?;
        let own = Kin::child("own", 0)?;
        let sibling = own.spawn("sibling", CLONE_FS | CLONE_PARENT)?;
        let alone = Kin::child("alone", 0)?;
        enter(&grandchild, &one)?;
        enter(&left, &two)?;
        enter(&sibling, &three)?;
        behind.call(libc::SYS_umask, [0o31, 0, 0, 0, 0, 0])?;
        own.call(libc::SYS_umask, [0o77, 0, 0, 0, 0, 0])?;
        z.ready()?;
        z.wait_for_check();

        let here = || std::env::current_dir().map_err(|e| e.to_string());
        let sharers = [&child, &grandchild, &behind];
        ensure_eq!(here()?, one, "where the grandchild went");
        for (i, kin) in sharers.iter().enumerate() {
            ensure_eq!((place(kin)?, mask(kin)?), (one.clone(), 0o31), "{i} of those who share");
        }
        ensure_eq!((place(&left)?, mask(&left)?), (two.clone(), 0o22), "the one that left");
        for kin in [&own, &sibling] {
            ensure_eq!((place(kin)?, mask(kin)?), (three.clone(), 0o77), "the siblings");
        }
        let before = place(&alone)?;
        for (i, by) in sharers.iter().enumerate() {
            let (to, mode) = if i % 2 == 0 { (&four, 0o15) } else { (&two, 0o26) };
            enter(by, to)?;
            by.call(libc::SYS_umask, [mode, 0, 0, 0, 0, 0])?;
            ensure_eq!(&here()?, to, "where {i} went");
            for kin in &sharers {
                ensure_eq!((&place(kin)?, mask(kin)?), (to, mode as i64), "where {i} went");
            }
        }
        // SAFETY: an integer.
        unsafe { libc::umask(0o44) };
        ensure_eq!(mask(&grandchild)?, 0o44, "the umask that was set here");
        enter(&own, &one)?;
        ensure_eq!(place(&sibling)?, one, "where its sibling went");
        ensure_eq!((place(&left)?, place(&alone)?), (two.clone(), before), "who shares nothing");
        ensure_eq!((mask(&left)?, mask(&alone)?), (0o22, 0o22), "their umasks");

        grandchild.end(Some(&child))?;
        behind.end(Some(&left))?;
        [child, left, own, sibling, alone].into_iter().try_for_each(|kin| kin.end(None))
    });
}
