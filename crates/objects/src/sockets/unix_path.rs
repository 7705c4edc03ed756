//! Binding unix sockets to the addresses of the image.

use super::{holder, unix::shown};
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::UnixSkEntry;
use rewake_netlink::diag;
use rustix::fd::BorrowedFd;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The address of an entry that has one.
pub fn address(entry: &UnixSkEntry) -> Result<SocketAddrUnix, Problem> {
    let made = match entry.name.split_first() {
        Some((0, name)) => SocketAddrUnix::new_abstract_name(name),
        _ => SocketAddrUnix::new(path_in(entry)),
    };
    made.map_err(|e| problem(entry, format!("the image has no valid address: {e}")))
}

/// The path as the program named it.
fn path_in(entry: &UnixSkEntry) -> &[u8] {
    entry.name.strip_suffix(b"\0").unwrap_or(&entry.name)
}

fn is_abstract(entry: &UnixSkEntry) -> bool {
    entry.name.first() == Some(&0)
}

fn problem(entry: &UnixSkEntry, reason: impl Into<String>) -> Problem {
    Problem::new(format!("unix socket {}", shown(&entry.name)), reason)
}

/// Binds a socket to the address of `entry`, calls `meanwhile` with the address, and removes the file again if it was
/// deleted. Without an address nothing is done.
pub fn bind(
    entry: &UnixSkEntry,
    fd: BorrowedFd<'_>,
    meanwhile: impl FnOnce(&SocketAddrUnix) -> Result<(), Problem> + Send,
) -> Result<(), Problem> {
    if entry.name.is_empty() {
        return Ok(());
    }
    let address = address(entry)?;
    let refused = |e: Errno| problem(entry, format!("cannot be bound: {e}"));
    if is_abstract(entry) {
        return match rustix::net::bind(fd, &address) {
            Ok(()) => meanwhile(&address),
            Err(Errno::ADDRINUSE) => Err(in_use(entry, |other| other.name == entry.name)),
            Err(e) => Err(refused(e)),
        };
    }
    in_directory(entry, || {
        let path = Path::new(OsStr::from_bytes(path_in(entry)));
        let aside = clear(entry, path)?;
        let bound = rustix::net::bind(fd, &address).map_err(refused).and_then(|()| {
            dress(entry, path)?;
            meanwhile(&address)
        });
        if entry.deleted == Some(true) && bound.is_ok() {
            rustix::fs::unlink(path)
                .map_err(|e| problem(entry, format!("cannot be unlinked: {e}")))?;
        }
        if let Some(aside) = aside {
            rustix::fs::rename(&aside, path)
                .map_err(|e| problem(entry, format!("{}: {e}", aside.display())))?;
        }
        bound
    })
}

/// Calls `body` with the address of `entry`, from where it is valid.
pub fn at(
    entry: &UnixSkEntry,
    body: impl FnOnce(&SocketAddrUnix) -> Result<(), Problem> + Send,
) -> Result<(), Problem> {
    let address = address(entry)?;
    if is_abstract(entry) { body(&address) } else { in_directory(entry, || body(&address)) }
}

/// Runs `body` in the directory that the entry's path starts from.
fn in_directory(
    entry: &UnixSkEntry,
    body: impl FnOnce() -> Result<(), Problem> + Send,
) -> Result<(), Problem> {
    let name = path_in(entry);
    if name.first() == Some(&b'/') {
        return body();
    }
    let Some(directory) = &entry.name_dir else {
        return Err(problem(entry, "its path is relative, and the image does not tell to what"));
    };
    let failed = |e: Errno| problem(entry, format!("{}: {e}", text(directory)));
    // A working directory belongs to a thread only once it is unshared.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            rewake_sys::sockets::unshare_directory().map_err(|e| failed(e.errno))?;
            rustix::process::chdir(directory.as_slice()).map_err(failed)?;
            body()
        });
        thread.join().unwrap_or_else(|_| Err(problem(entry, "cannot be bound")))
    })
}

/// Makes way at `path`. A socket that nobody has any more is what a killed process leaves; it is removed. What is there and
/// the socket's own file is not, because that had been deleted, is moved to the name returned.
fn clear(entry: &UnixSkEntry, path: &Path) -> Result<Option<PathBuf>, Problem> {
    let failed = |e: Errno| problem(entry, format!("cannot be bound: {e}"));
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    if entry.deleted == Some(true) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".rewake-{}", std::process::id()));
        let aside = PathBuf::from(aside);
        rustix::fs::rename(path, &aside).map_err(failed)?;
        return Ok(Some(aside));
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(problem(entry, "its path is taken by a file that is no socket")
            .remedy("move the file away"));
    }
    if is_alive(path) {
        let same = |other: &diag::Unix| {
            let file = other.file.is_some_and(|(dev, inode)| {
                dev == stat.st_dev && u64::from(inode) == stat.st_ino & 0xffff_ffff
            });
            file || other.name == entry.name
        };
        return Err(in_use(entry, same));
    }
    rustix::fs::unlink(path).map_err(failed)?;
    Ok(None)
}

/// Whether a socket is bound to the file. A datagram socket is not let in by other kinds, and nothing is sent, so that
/// nobody notices the question.
fn is_alive(path: &Path) -> bool {
    let asked = SocketAddrUnix::new(path).and_then(|address| {
        let asking = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&asking, &address)
    });
    asked != Err(Errno::CONNREFUSED)
}

fn table() -> Option<std::collections::HashMap<u32, diag::Unix>> {
    diag::unix(&mut diag::open().ok()?).ok()
}

/// The problem that other sockets have the address.
fn in_use(entry: &UnixSkEntry, same: impl Fn(&diag::Unix) -> bool) -> Problem {
    let inodes: HashSet<u32> = table()
        .unwrap_or_default()
        .iter()
        .filter(|(_, other)| same(other))
        .map(|(inode, _)| *inode)
        .collect();
    match holder::of_inodes(&inodes) {
        Some(holder) => problem(entry, format!("its address is in use by {holder}"))
            .remedy("end that process, or restore where the address is free"),
        None => problem(entry, "its address is in use"),
    }
}

/// Owner and mode of the file, as they were.
fn dress(entry: &UnixSkEntry, path: &Path) -> Result<(), Problem> {
    let Some(perms) = &entry.file_perms else { return Ok(()) };
    let failed = |e: Errno| problem(entry, format!("owner and mode cannot be set: {e}"));
    let stat = rustix::fs::lstat(path).map_err(failed)?;
    if (stat.st_uid, stat.st_gid) != (perms.uid, perms.gid) {
        let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed)?;
    }
    if stat.st_mode != perms.mode {
        let mode = Mode::from_raw_mode(perms.mode & 0o7777);
        rustix::fs::chmodat(CWD, path, mode, AtFlags::empty()).map_err(failed)?;
    }
    Ok(())
}

/// Sends a packet to an address.
pub fn send_to(
    from: BorrowedFd<'_>,
    address: &SocketAddrUnix,
    data: &[u8],
) -> Result<usize, Errno> {
    rustix::net::sendto(from, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, address)
}
