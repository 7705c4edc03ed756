//! Kernel state: what is without a name beyond plain files: the executable, working directories, a root directory, files
//! in directories that are deleted too, FIFOs with content, a symbolic link.
#![allow(unsafe_code, reason = "mkfifo, chroot, raw open flags")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use zoo::{Zoo, check, cstring, ensure, ensure_eq};

fn err(e: std::io::Error) -> String {
    e.to_string()
}

fn inode(path: impl AsRef<Path>) -> Result<u64, String> {
    std::fs::metadata(path).map(|m| m.ino()).map_err(err)
}

/// Goes on as a copy of the program, which is deleted.
fn become_deleted(z: &Zoo) -> zoo::Check {
    let copy = z.path("exe");
    if std::env::var_os("ZOO_COPIED").is_none() {
        std::fs::copy("/proc/self/exe", &copy).map_err(err)?;
        let failed = std::process::Command::new(&copy).arg(z.dir()).env("ZOO_COPIED", "1").exec();
        return Err(failed.to_string());
    }
    std::fs::remove_file(copy).map_err(err)
}

fn make_fifo(z: &Zoo, name: &str) -> zoo::Check {
    let path = cstring(z.path(name));
    // SAFETY: NUL-terminated.
    check(unsafe { libc::mkfifo(path.as_ptr(), 0o640) }, "mkfifo")
}

fn open_fifo(z: &Zoo, name: &str, read: bool, write: bool) -> Result<File, String> {
    let mut options = File::options();
    options.read(read).write(write).custom_flags(libc::O_NONBLOCK);
    options.open(z.path(name)).map_err(|e| format!("open {name}: {e}"))
}

/// Makes a directory, enters it and deletes it.
fn enter_deleted(z: &Zoo, name: &str) -> zoo::Check {
    std::fs::create_dir(z.path(name)).map_err(err)?;
    std::env::set_current_dir(z.path(name)).map_err(err)?;
    std::fs::remove_dir(z.path(name)).map_err(err)
}

fn is_deleted_directory(path: &str) -> zoo::Check {
    let it = std::fs::metadata(path).map_err(|e| format!("{path}: {e}"))?;
    ensure!(it.is_dir() && it.nlink() == 0, "{path} is no deleted directory: {it:?}");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        become_deleted(z)?;
        std::fs::create_dir_all(z.path("dir/sub")).map_err(err)?;
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let mut deep = options.open(z.path("dir/sub/deep")).map_err(err)?;
        deep.write_all(b"deep down").map_err(err)?;
        let deep_again = File::open(z.path("dir/sub/deep")).map_err(err)?;
        let dir = File::open(z.path("dir")).map_err(err)?;
        std::fs::remove_dir_all(z.path("dir")).map_err(err)?;

        make_fifo(z, "both")?;
        make_fifo(z, "ends")?;
        let mut both = open_fifo(z, "both", true, true)?;
        both.write_all(b"in the fifo").map_err(err)?;
        let mut reader = open_fifo(z, "ends", true, false)?;
        let mut writer = open_fifo(z, "ends", false, true)?;
        writer.write_all(b"before ").map_err(err)?;
        std::os::unix::fs::symlink("nowhere at all", z.path("link")).map_err(err)?;
        options = File::options();
        options.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        let link = options.open(z.path("link")).map_err(err)?;
        for name in ["both", "ends", "link"] {
            std::fs::remove_file(z.path(name)).map_err(err)?;
        }

        enter_deleted(z, "cwd")?;
        let own = zoo::pid();
        let other = z.fork(|z| {
            enter_deleted(z, "cwd")?;
            z.publish("up", "");
            z.wait_for("compare")?;
            is_deleted_directory(".")?;
            let theirs = inode(format!("/proc/{}/cwd", own))?;
            ensure!(inode(".")? != theirs, "two working directories became one");
            Ok(())
        })?;
        z.wait_for("up")?;
        let (mut told, mut tell) = std::io::pipe().map_err(err)?;
        let rooted = z.fork(|z| {
            std::fs::create_dir(z.path("root")).map_err(err)?;
            let root = z.path("root");
            std::os::unix::fs::chroot(&root).map_err(err)?;
            // Its name is out of reach now, but not for the parent.
            told.read_exact(&mut [0]).map_err(err)?;
            is_deleted_directory("/")?;
            ensure!(!Path::new("/proc").exists(), "the root directory is not its own");
            Ok(())
        })?;
        while std::fs::read_link(format!("/proc/{rooted}/root")).map_err(err)? != z.path("root") {
            zoo::nap(2);
        }
        std::fs::remove_dir(z.path("root")).map_err(err)?;
        z.ready()?;
        z.wait_for_check();

        for name in ["exe", "dir", "both", "ends", "link", "cwd", "root"] {
            ensure!(!z.path(name).exists(), "{name} has its name back");
        }
        let exe = std::fs::read_link("/proc/self/exe").map_err(err)?;
        ensure!(exe.to_string_lossy().ends_with("/exe (deleted)"), "the executable is {exe:?}");
        is_deleted_directory(".")?;
        ensure!(std::env::current_dir().is_err(), "the working directory has a name");
        ensure_eq!(dir.metadata().map_err(err)?.nlink(), 0, "names of the directory");
        let mut text = [0u8; 9];
        deep.write_all_at(b"DEEP", 0).map_err(err)?;
        deep_again.read_exact_at(&mut text, 0).map_err(err)?;
        ensure_eq!(&text, b"DEEP down", "content of the file in the directory");
        let mut text = [0u8; 11];
        both.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"in the fifo", "content of the FIFO that is open for both");
        writer.write_all(b"and after").map_err(err)?;
        let mut text = [0u8; 16];
        reader.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"before and after", "content of the FIFO with two ends");
        let it =
            std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&link)));
        ensure!(it.map_err(err)?.to_string_lossy().contains("/link"), "the link's name");
        ensure!(link.metadata().map_err(err)?.is_symlink(), "the link is something else");
        z.publish("compare", "");
        z.join(other)?;
        tell.write_all(b"!").map_err(err)?;
        z.join(rooted)
    })
}
