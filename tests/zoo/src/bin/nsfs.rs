//! Kernel state: open namespaces: the ones that the program lives in, one of them twice, one only as a name (`O_PATH`).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use zoo::{Zoo, ensure_eq};

/// Not those that a restore in a PID namespace of its own replaces.
const KINDS: [&str; 5] = ["net", "ipc", "uts", "user", "cgroup"];

fn inode(file: &File) -> Result<u64, String> {
    Ok(file.metadata().map_err(|e| e.to_string())?.ino())
}

fn open(name: &str, flags: i32) -> Result<File, String> {
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(flags);
    options.open(format!("/proc/self/ns/{name}")).map_err(|e| format!("{name}: {e}"))
}

fn right(name: &str, file: &File) -> zoo::Check {
    let now = std::fs::metadata(format!("/proc/self/ns/{name}")).map_err(|e| e.to_string())?;
    ensure_eq!(inode(file)?, now.ino(), "the open {name} namespace");
    Ok(())
}

fn main() {
    zoo::run(|z: &Zoo| {
        let mut files = Vec::new();
        for name in KINDS {
            files.push((name, open(name, 0)?));
        }
        let again = files[0].1.try_clone().map_err(|e| e.to_string())?;
        files.push(("net", again));
        files.push(("uts", open("uts", libc::O_PATH)?));
        let before = files.iter().map(|(_, f)| inode(f)).collect::<Result<Vec<_>, _>>()?;
        z.ready()?;
        z.wait_for_check();
        for ((name, file), before) in files.iter().zip(before) {
            right(name, file)?;
            ensure_eq!(inode(file)?, before, "the {name} namespace of before");
        }
        Ok(())
    })
}
