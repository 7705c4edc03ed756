//! Addresses of unix sockets.
//!
//! bind(2) makes a file at the path it is given, and the socket keeps both: the path as it was written, and the file. The
//! file may be moved or deleted later, and the path may be relative to a directory that nobody knows any more. So a restore
//! binds every socket in a directory of its own beside the file's place ([`Places`]), as seen from which the path leads into
//! that directory, and moves the file to where it was at the dump just before the tasks go on. Until then nobody else finds
//! it; whoever has to, among us, goes by the file ([`Reach`]).

use super::holder;
use super::unix::shown;
use crate::Problem;
use crate::files::collect::View;
use rewake_image::messages::{FilePermsEntry, RewakeUnixEntry, UnixSkEntry};
use rewake_netlink::diag;
use rewake_sys::sockets::{bound_file, unshare_directory};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// What the directories are called, before a random number. Process ids would not do: restores in different PID namespaces
/// may work in the same directory. Whoever made one holds a lock on it, and so nobody else takes it for a remainder.
const PREFIX: &str = ".rewake-sockets-";

/// The file a socket is bound to: owner and mode, whether and where it is still there, and from where it was named.
///
/// # Errors
/// The file cannot be examined.
pub fn survey(
    view: &View<'_>,
    task: i32,
    entry: &mut UnixSkEntry,
    extra: &mut RewakeUnixEntry,
) -> Result<(), Problem> {
    let failed =
        |e: String| view.problem(format!("the file it is bound to cannot be examined: {e}"));
    let file = bound_file(view.as_fd()).map_err(|e| failed(e.to_string()))?;
    let stat = rustix::fs::fstat(&file).map_err(|e| failed(e.to_string()))?;
    entry.file_perms =
        Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid });
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|e| failed(e.to_string()))?;
    let link = link.as_os_str().as_bytes();
    let deleted = stat.st_nlink == 0;
    let path = link.strip_suffix(b" (deleted)").filter(|_| deleted).unwrap_or(link);
    entry.deleted = deleted.then_some(true);
    let name = written(&entry.name);
    let leads_there = |path: &[u8]| !deleted && leads_to(path, &stat);
    if name.first() == Some(&b'/') {
        if !deleted && path != name && !leads_there(name) {
            extra.path = Some(path.to_vec());
        }
        return Ok(());
    }
    // A name without dots was given in what remains of the path without it; for others the task's own directory may do.
    let dotted = name.split(|b| *b == b'/').any(|part| matches!(part, b"." | b".."));
    let above = path.strip_suffix(name).and_then(|dir| dir.strip_suffix(b"/"));
    let directory = match above.filter(|_| !dotted) {
        Some(dir) => Some(if dir.is_empty() { b"/".to_vec() } else { dir.to_vec() }),
        None => rustix::fs::readlink(format!("/proc/{task}/cwd"), Vec::new())
            .ok()
            .map(|cwd| cwd.into_bytes())
            .filter(|cwd| leads_there(&[cwd, &b"/"[..], name].concat())),
    };
    if directory.is_none() && !deleted {
        extra.path = Some(path.to_vec());
    }
    entry.name_dir = Some(directory.unwrap_or_else(|| b"/".to_vec()));
    Ok(())
}

fn leads_to(path: &[u8], stat: &Stat) -> bool {
    rustix::fs::lstat(path).is_ok_and(|s| (s.st_dev, s.st_ino) == (stat.st_dev, stat.st_ino))
}

/// The address of the peer, in the form unix_diag has; empty if it has none.
pub fn name_of_peer(fd: BorrowedFd<'_>) -> Vec<u8> {
    let peer = rustix::net::getpeername(fd).ok().flatten();
    let Some(peer) = peer.and_then(|peer| SocketAddrUnix::try_from(peer).ok()) else {
        return Vec::new();
    };
    if let Some(name) = peer.abstract_name().filter(|name| !name.is_empty()) {
        return [b"\0", name].concat();
    }
    let path = peer.path_bytes().filter(|path| !path.is_empty());
    path.map_or_else(Vec::new, |path| [path, b"\0"].concat())
}

/// A path as the program gave it.
fn written(name: &[u8]) -> &[u8] {
    name.strip_suffix(b"\0").unwrap_or(name)
}

/// Is it a name that leads to no file?
pub fn is_abstract(name: &[u8]) -> bool {
    name.first() == Some(&0)
}

/// A `struct sockaddr_un` as bytes.
fn address(name: &[u8]) -> Vec<u8> {
    let mut bytes = libc::sa_family_t::to_ne_bytes(libc::AF_UNIX as u16).to_vec();
    bytes.extend_from_slice(name);
    bytes
}

/// How to reach a bound socket, wherever its file is.
#[derive(Debug)]
pub struct Reach {
    address: Vec<u8>,
    /// By which the address leads to it.
    _file: Option<OwnedFd>,
}

impl Reach {
    /// The way to the socket `fd`, whose address is `name`.
    ///
    /// # Errors
    /// It is not bound.
    pub fn to(fd: BorrowedFd<'_>, name: &[u8]) -> Result<Reach, Problem> {
        if is_abstract(name) {
            return Ok(Reach { address: address(name), _file: None });
        }
        let file = bound_file(fd).map_err(|e| problem(name, format!("is not bound: {e}")))?;
        let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        Ok(Reach { address: address(path.as_bytes()), _file: Some(file) })
    }

    /// The way to a socket outside the tree, whose address is `name`.
    pub fn outside(name: &[u8]) -> Reach {
        Reach { address: address(name), _file: None }
    }

    /// `struct sockaddr_un`
    pub fn address(&self) -> &[u8] {
        &self.address
    }
}

fn problem(name: &[u8], reason: impl Into<String>) -> Problem {
    Problem::new(format!("unix socket {}", shown(name)), reason)
}

/// A file that is to be moved to its place.
#[derive(Debug)]
struct Waiting {
    from: PathBuf,
    to: PathBuf,
    name: Vec<u8>,
}

/// The files of bound sockets, until they have to be in their places. Dropping it removes them.
#[derive(Debug, Default)]
pub struct Places {
    /// Our directory in each directory that will get a file.
    own: HashMap<PathBuf, (PathBuf, OwnedFd)>,
    waiting: Vec<Waiting>,
    /// In their places.
    placed: Vec<(PathBuf, Stat)>,
    count: usize,
}

impl Places {
    /// Binds a socket of the image to its address. Without an address nothing is done.
    ///
    /// # Errors
    /// The address is in use, or its file cannot be made.
    pub fn bind(
        &mut self,
        entry: &UnixSkEntry,
        extra: &RewakeUnixEntry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), Problem> {
        if entry.name.is_empty() || is_abstract(&entry.name) || entry.deleted == Some(true) {
            return self.bind_apart(&entry.name, fd);
        }
        let name = written(&entry.name);
        let name_dir = entry.name_dir.as_deref();
        let path = match (&extra.path, name.first(), name_dir) {
            (Some(path), ..) => path.clone(),
            (None, Some(b'/'), _) => name.to_vec(),
            (None, _, Some(directory)) => [directory, b"/", name].concat(),
            (None, _, None) => {
                let reason = "its path is relative, and the image does not tell to what";
                return Err(problem(name, reason));
            }
        };
        let to = PathBuf::from(OsStr::from_bytes(&path));
        way_is_free(name, &to)?;
        let directory = to.parent().unwrap_or(Path::new("/"));
        let from = self.bind_in(directory, name, fd)?;
        dress(entry, &from)?;
        self.waiting.push(Waiting { from, to, name: name.to_vec() });
        Ok(())
    }

    /// Binds a socket to an address whose file is deleted, or of which nobody shall find the file.
    ///
    /// # Errors
    /// An abstract address is in use.
    pub fn bind_apart(&mut self, name: &[u8], fd: BorrowedFd<'_>) -> Result<(), Problem> {
        if name.is_empty() {
            return Ok(());
        }
        if is_abstract(name) {
            let bound = SocketAddrUnix::new_abstract_name(&name[1..])
                .and_then(|address| rustix::net::bind(fd, &address));
            return bound.map_err(|e| match e {
                Errno::ADDRINUSE => in_use(name, |other| other.name == name),
                e => problem(name, format!("cannot be bound: {e}")),
            });
        }
        let name = written(name);
        let directory = Path::new(OsStr::from_bytes(name)).parent();
        let there = directory.filter(|d| d.is_absolute() && d.is_dir());
        let directory = there.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let path = self.bind_in(&directory, name, fd)?;
        rustix::fs::unlink(&path).map_err(|e| problem(name, format!("{}: {e}", path.display())))
    }

    /// Binds `fd` to the path `name`, which is made to lead into our directory in `directory`. Returns where the file is.
    fn bind_in(
        &mut self,
        directory: &Path,
        name: &[u8],
        fd: BorrowedFd<'_>,
    ) -> Result<PathBuf, Problem> {
        self.count += 1;
        let own = self.own(directory, name)?;
        // The next one may have the same name.
        let (root, path) = (own.join(self.count.to_string()), own.join(format!(".{}", self.count)));
        let failed = |e: std::io::Error| problem(name, format!("{}: {e}", root.display()));
        let refused = |e: Errno| problem(name, format!("cannot be bound: {e}"));
        std::fs::create_dir(&root).map_err(failed)?;
        let mut at = root.clone();
        let mut parts = Path::new(OsStr::from_bytes(name)).components().peekable();
        while let Some(part) = parts.next() {
            match part {
                Component::ParentDir if at != root => drop(at.pop()),
                Component::Normal(part) => {
                    at.push(part);
                    if parts.peek().is_some() && !at.is_dir() {
                        std::fs::create_dir(&at).map_err(failed)?;
                    }
                }
                _ => {}
            }
        }
        let address = SocketAddrUnix::new(name).map_err(refused)?;
        // Root and working directory belong to a thread only once they are unshared.
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || {
                unshare_directory().map_err(|e| refused(e.errno))?;
                rustix::process::chroot(&root).map_err(refused)?;
                rustix::process::chdir("/").map_err(refused)?;
                rustix::net::bind(fd, &address).map_err(refused)
            });
            let thread = thread.map_err(|e| problem(name, format!("cannot be bound: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(problem(name, "cannot be bound")))
        })?;
        std::fs::rename(&at, &path).map_err(failed)?;
        std::fs::remove_dir_all(&root).map_err(failed)?;
        Ok(path)
    }

    /// Our directory in `directory`.
    fn own(&mut self, directory: &Path, name: &[u8]) -> Result<PathBuf, Problem> {
        if let Some((own, _)) = self.own.get(directory) {
            return Ok(own.clone());
        }
        let failed = |e: Errno| {
            problem(name, format!("its file cannot be made in {}: {e}", directory.display()))
        };
        clean(directory);
        let (own, lock) = loop {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(failed)?;
            let own = directory.join(format!("{PREFIX}{:016x}", u64::from_ne_bytes(random)));
            match rustix::fs::mkdir(&own, Mode::from_raw_mode(0o777)).and_then(|()| locked(&own)) {
                Ok(lock) => break (own, lock),
                // Another restore has cleaned it away before it was locked.
                Err(Errno::EXIST | Errno::NOENT | Errno::WOULDBLOCK) => {}
                Err(e) => return Err(failed(e)),
            }
        };
        self.own.insert(directory.to_path_buf(), (own.clone(), lock));
        Ok(own)
    }

    /// Moves the files to their places. What sockets that nobody has any more have left there is replaced.
    ///
    /// # Errors
    /// A place is taken by now.
    pub fn settle(&mut self) -> Result<(), Problem> {
        for Waiting { from, to, name } in std::mem::take(&mut self.waiting) {
            way_is_free(&name, &to)?;
            let failed = |e: Errno| problem(&name, format!("{}: {e}", to.display()));
            let stat = rustix::fs::lstat(&from).map_err(failed)?;
            rustix::fs::rename(&from, &to).map_err(failed)?;
            self.placed.push((to, stat));
        }
        self.remove_own();
        Ok(())
    }

    /// Lets the files stay.
    pub fn keep(&mut self) {
        self.placed.clear();
    }

    fn remove_own(&mut self) {
        for (own, _lock) in self.own.drain().map(|(_, own)| own) {
            if let Err(e) = std::fs::remove_dir_all(&own) {
                log::warn!("{} cannot be removed: {e}", own.display());
            }
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        for (path, stat) in self.placed.drain(..) {
            if leads_to(path.as_os_str().as_bytes(), &stat) {
                let _ = std::fs::remove_file(path);
            }
        }
        self.remove_own();
    }
}

/// Opens a directory and locks it, if nobody else has.
fn locked(path: &Path) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{FlockOperation, OFlags, flock};
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    // It may have been removed while it was not locked.
    let stat = rustix::fs::fstat(&fd)?;
    leads_to(path.as_os_str().as_bytes(), &stat).then_some(fd).ok_or(Errno::NOENT)
}

/// Removes what a restore that was killed has left in `directory`.
fn clean(directory: &Path) {
    let Ok(names) = std::fs::read_dir(directory) else { return };
    for entry in names.flatten() {
        if entry.file_name().as_bytes().starts_with(PREFIX.as_bytes())
            && let Ok(_lock) = locked(&entry.path())
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A socket that nobody has any more is what a killed process leaves; it will be replaced. Anything else is in the way.
fn way_is_free(name: &[u8], path: &Path) -> Result<(), Problem> {
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(problem(name, format!("{}: {e}", path.display()))),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(problem(name, "its path is taken by a file that is no socket")
            .remedy("move the file away"));
    }
    if !is_alive(path) {
        return Ok(());
    }
    Err(in_use(name, |other| {
        other.file.is_some_and(|(dev, inode)| {
            dev == stat.st_dev && u64::from(inode) == stat.st_ino & 0xffff_ffff
        })
    }))
}

/// Whether a socket is bound to the file. A datagram socket is not let in by other kinds, and nothing is sent, so that
/// nobody notices the question.
fn is_alive(path: &Path) -> bool {
    let ask = || {
        let flags = SocketFlags::CLOEXEC;
        let asking = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        // By the file, since paths may be longer than addresses.
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::net::connect(asking.as_fd(), &SocketAddrUnix::new(path)?)
    };
    ask() != Err(Errno::CONNREFUSED)
}

/// The problem that other sockets have the address.
fn in_use(name: &[u8], same: impl Fn(&diag::Unix) -> bool) -> Problem {
    let table = diag::open().and_then(|mut socket| diag::unix(&mut socket)).unwrap_or_default();
    let inodes: HashSet<u32> =
        table.iter().filter(|(_, other)| same(other)).map(|(inode, _)| *inode).collect();
    let by = match holder::of_inodes(&inodes) {
        Some(holder) => holder,
        // The table is that of a network namespace; files are everybody's.
        None if inodes.is_empty() => "a socket of another network namespace".to_owned(),
        None => "a socket that no process here has".to_owned(),
    };
    let problem = problem(name, format!("its address is in use by {by}"));
    if is_abstract(name) {
        return problem.remedy(
            "end that process, or restore in another network namespace (copies: --copy-netns)",
        );
    }
    problem.remedy("end that process, or restore where the address is free").contested()
}

/// Owner and mode of the file, as they were.
fn dress(entry: &UnixSkEntry, path: &Path) -> Result<(), Problem> {
    let Some(perms) = &entry.file_perms else { return Ok(()) };
    let failed = |e: Errno| problem(&entry.name, format!("owner and mode cannot be set: {e}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_work_in_is_not_cleaned_away() {
        let base = std::env::temp_dir().join(format!("rewake-clean-{}", std::process::id()));
        let dir = |name: &str| base.join(format!("{PREFIX}{name}"));
        for name in ["left", "held", "old-77"] {
            std::fs::create_dir_all(dir(name).join("inside")).unwrap();
        }
        std::fs::create_dir(base.join("other")).unwrap();
        let held = locked(&dir("held")).unwrap();
        assert_eq!(locked(&dir("held")).unwrap_err(), Errno::WOULDBLOCK);
        clean(&base);
        assert!(!dir("left").exists() && !dir("old-77").exists());
        assert!(dir("held").join("inside").exists() && base.join("other").exists());
        drop(held);
        clean(&base);
        assert!(!dir("held").exists());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
