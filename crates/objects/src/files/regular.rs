//! Regular files, directories and plain devices: open(2) by path.
//!
//! A path counts only if it still leads to the same inode; a file whose last name is gone becomes a ghost
//! ([`super::ghost`]).

use super::collect::{Collector, View};
use super::open::Opener;
use super::{build_id, external, ghost, link_remap};
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{FdTypes, FileEntry, FownEntry, RegFileEntry};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

/// Devices that are no more than a file with a funny driver: `/dev/null`, `zero`, `full`, `random`, `urandom`, `kmsg`.
#[must_use]
pub fn is_plain_device(rdev: u64) -> bool {
    const MEM: u32 = 1;
    // /dev/autofs: what is done by it is said in each call.
    const AUTOFS: (u32, u32) = (10, 235);
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    major == MEM || (major, minor) == AUTOFS
}

/// The flags an image keeps: not those that only mattered while opening.
const KEPT: u32 =
    !((libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY | libc::O_CLOEXEC) as u32);

/// Surveys an open file.
///
/// # Errors
/// It can no longer be reached, or is too large a ghost.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let pos = match rustix::fs::tell(view.as_fd()) {
        Ok(pos) => pos,
        // Devices that cannot seek, and O_PATH, have no position.
        Err(Errno::SPIPE | Errno::BADF | Errno::INVAL) => 0,
        Err(e) => return Err(view.problem(format!("its position cannot be read: {e}"))),
    };
    let id = collector.new_id();
    let own = format!("/proc/self/fd/{}", view.fd.as_raw_fd());
    let key = external::file_key(collector, &own)
        .map_err(|e| view.problem(format!("its mount cannot be told: {e}")))?;
    let flags = view.flags & KEPT;
    if let Some(key) = key {
        collector.push(outside(entry(id, flags, pos, view.owner()?, key, &view.stat)));
        return Ok((id, FdTypes::Reg));
    }
    let name = place(collector, id, &view.link, &view.stat, Some(view))?;
    let mut entry = entry(id, flags, pos, view.owner()?, name, &view.stat);
    // Reading other files would be seen in their times.
    let readable =
        flags & libc::O_PATH as u32 == 0 && flags & libc::O_ACCMODE as u32 != libc::O_WRONLY as u32;
    if collector.options.build_ids && readable && view.stat.st_mode & 0o111 != 0 {
        add_build_id(&mut entry, || build_id::of(&view.fd));
    }
    collector.push(entry);
    Ok((id, FdTypes::Reg))
}

fn entry(id: u32, flags: u32, pos: u64, fown: FownEntry, name: Vec<u8>, stat: &Stat) -> FileEntry {
    let regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    // A log that is only appended to may grow between dump and restore.
    let log = flags & (libc::O_APPEND | libc::O_ACCMODE) as u32
        == (libc::O_APPEND | libc::O_WRONLY) as u32;
    let reg = RegFileEntry {
        id,
        flags,
        pos,
        fown,
        name,
        size: (regular && !log).then_some(stat.st_size as u64),
        mode: Some(stat.st_mode),
        ..RegFileEntry::default()
    };
    FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(Box::new(reg)), ..FileEntry::default() }
}

/// Makes an entry one of a file that is left outside.
fn outside(mut entry: FileEntry) -> FileEntry {
    if let Some(reg) = &mut entry.reg {
        // Whatever is put in its place need not be like it.
        (reg.ext, reg.size, reg.mode) = (Some(true), None, None);
    }
    entry
}

/// Has an entry of a regular file tell of which build it is.
fn add_build_id(entry: &mut FileEntry, read: impl FnOnce() -> Vec<u32>) {
    let Some(reg) = &mut entry.reg else { return };
    if reg.mode.is_some_and(|mode| mode & libc::S_IFMT == libc::S_IFREG) {
        reg.build_id = read();
    }
}

/// The entry of a name that nobody has open.
pub(super) fn entry_of_name(id: u32, name: Vec<u8>, stat: &Stat) -> FileEntry {
    entry(id, 0, 0, FownEntry::default(), name, stat)
}

/// Finds the name under which a restore can open the file that the kernel calls `link`, making it a ghost if it has none.
fn place(
    collector: &mut Collector,
    id: u32,
    link: &[u8],
    stat: &Stat,
    view: Option<&View<'_>>,
) -> Result<Vec<u8>, Problem> {
    let object = || view.map_or_else(|| text(link), View::object);
    let plain = link.strip_suffix(b" (deleted)").unwrap_or(link);
    let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    if stat.st_nlink > 0 && leads_to(link, stat).map_err(|e| Problem::new(object(), e))? {
        if let Some(view) = view.filter(|view| is_silly(view)) {
            link_remap::survey(collector, id, view, plain)?;
        }
        return Ok(link.to_vec());
    }
    if collector.options.evasive_devices
        && let Some(path) = same_device(plain, stat)
    {
        return Ok(path);
    }
    if !link.starts_with(b"/") {
        return Err(Problem::new(object(), "it has no path that a restore could open")
            .remedy("close it, or mount its file system where the tree can see it"));
    }
    let Some(view) = view else {
        return Err(Problem::new(object(), "the file is deleted"));
    };
    if stat.st_nlink == 0 || is_dir {
        ghost::survey(collector, id, view)?;
    } else {
        link_remap::survey(collector, id, view, plain)?;
    }
    Ok(plain.to_vec())
}

/// Has NFS given a deleted file a name for as long as it is open? That goes with who has it open.
fn is_silly(view: &View<'_>) -> bool {
    const NFS_SUPER_MAGIC: i64 = 0x6969;
    let name = view.link.rsplit(|b| *b == b'/').next().unwrap_or_default();
    name.starts_with(b".nfs")
        && rustix::fs::fstatfs(view.as_fd()).is_ok_and(|fs| fs.f_type == NFS_SUPER_MAGIC)
}

/// A path to the same device, be it another inode: the one it had, or that of its number.
fn same_device(path: &[u8], stat: &Stat) -> Option<Vec<u8>> {
    let kind = stat.st_mode & libc::S_IFMT;
    let class = match kind {
        libc::S_IFCHR => "char",
        libc::S_IFBLK => "block",
        _ => return None,
    };
    let is_same = |path: &[u8]| {
        rustix::fs::stat(path)
            .is_ok_and(|s| s.st_mode & libc::S_IFMT == kind && s.st_rdev == stat.st_rdev)
    };
    if is_same(path) {
        return Some(path.to_vec());
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let path = std::fs::canonicalize(format!("/dev/{class}/{major}:{minor}")).ok()?;
    let path = path.into_os_string().into_encoded_bytes();
    is_same(&path).then_some(path)
}

/// Does `path` lead to the inode of `stat`? Why, if that cannot be told.
fn leads_to(path: &[u8], stat: &Stat) -> Result<bool, String> {
    // A symbolic link itself (O_PATH | O_NOFOLLOW) is where its path ends.
    let found = match stat.st_mode & libc::S_IFMT {
        libc::S_IFLNK => rustix::fs::lstat(path),
        _ => rustix::fs::stat(path),
    };
    match found {
        Ok(s) => Ok((s.st_dev, s.st_ino) == (stat.st_dev, stat.st_ino)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => Ok(false),
        Err(e) => Err(format!("its path cannot be followed: {e}")),
    }
}

/// The file id of a path that is not held by a descriptor (mapping, exe, cwd, root), opened with `flags`. `open` is how to
/// reach the file itself if its name is gone; `identity` tells files apart that had the same name; as `/proc/PID/map_files/…` or `/proc/PID/cwd`.
///
/// # Errors
/// The path no longer leads there, and it cannot be saved as a ghost.
pub fn of_path(
    collector: &mut Collector,
    pid: i32,
    path: &[u8],
    flags: u32,
    identity: u64,
    open: &str,
) -> Result<u32, Problem> {
    let key = (path.to_vec(), flags, identity);
    if let Some(id) = collector.by_path.get(&key) {
        return Ok(*id);
    }
    let unreadable = |e: rustix::io::Errno| Problem::new(text(path), format!("{open}: {e}"));
    let real = rustix::fs::stat(open).map_err(unreadable)?;
    let id = collector.new_id();
    if let Some(name) = external::file_key(collector, open).map_err(unreadable)? {
        collector.push(outside(entry(id, flags & KEPT, 0, FownEntry::default(), name, &real)));
        collector.by_path.insert(key, id);
        return Ok(id);
    }
    let named =
        real.st_nlink > 0 && leads_to(path, &real).map_err(|e| Problem::new(text(path), e))?;
    let name = if named {
        path.to_vec()
    } else {
        let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(open, how, Mode::empty()).map_err(unreadable)?;
        let view = View {
            pid,
            tid: pid,
            number: -1,
            fd,
            link: [path, b" (deleted)"].concat(),
            stat: real,
            flags,
            fdinfo: &|| Err(Problem::new("mapping", "has no fdinfo")),
            numbers: &[],
            told: None,
        };
        place(collector, id, &view.link, &real, Some(&view)).map_err(|mut p| {
            p.object = text(path);
            p
        })?
    };
    let mut entry = entry(id, flags & KEPT, 0, FownEntry::default(), name, &real);
    // Opening a file would break a lease on it. But for large trees that is not looked for: nobody else can have the lease
    // that reading breaks on a file that is mapped, and the program itself only by the description that it has mapped.
    if collector.options.build_ids && named && !collector.locks.is_leased(real.st_ino) {
        add_build_id(&mut entry, || build_id::of_path(open.as_bytes()));
    }
    collector.push(entry);
    collector.by_path.insert(key, id);
    Ok(id)
}

/// Opens a regular file of the image.
///
/// # Errors
/// It is gone, or not the one that was dumped.
pub fn open(opener: &mut Opener<'_>, reg: &RegFileEntry) -> Result<OwnedFd, Problem> {
    if let Some(fd) = external::file(opener, reg)? {
        return Ok(fd);
    }
    let path = absolute(&reg.name);
    let ghost = opener.place_ghost(reg.id, &path)?;
    let flags = OFlags::from_bits_retain(reg.flags & KEPT) | OFlags::CLOEXEC | OFlags::NOCTTY;
    // O_TMPFILE names a directory; the file itself comes back as a ghost with a name.
    let flags = flags.difference(OFlags::TMPFILE.difference(OFlags::DIRECTORY));
    let flags = if ghost.is_some() && reg.mode.is_some_and(|m| m & libc::S_IFMT == libc::S_IFREG) {
        flags.difference(OFlags::DIRECTORY)
    } else {
        flags
    };
    let place: &std::path::Path = match &ghost {
        Some(placed) => &placed.path,
        None => std::path::Path::new(std::ffi::OsStr::from_bytes(&path)),
    };
    let opened = opener.open_path(place, flags);
    if opened.as_ref().is_err_and(|e| *e == Errno::NOENT)
        && let Some(fd) = opener.put_off(reg.id, &path)?
    {
        return Ok(fd);
    }
    let fd = opened.map_err(|e| Problem::new(text(&path), format!("cannot be opened: {e}")))?;
    if ghost.is_none_or(|placed| !placed.made) {
        validate(opener, reg, &path, &fd)?;
    }
    if reg.pos != 0 && reg.pos != u64::MAX && !flags.contains(OFlags::PATH) {
        rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(reg.pos))
            .map_err(|e| Problem::new(text(&path), format!("cannot seek to {}: {e}", reg.pos)))?;
    }
    Ok(fd)
}

/// Is it a file of `/proc` that is about something that a task has, and not there before the task has that: a thread, a
/// descriptor, a mapping?
pub(super) fn is_of_task(path: &[u8]) -> bool {
    let Some(rest) = path.strip_prefix(b"/proc/") else { return false };
    let mut parts = rest.split(|b| *b == b'/');
    let pid = parts.next().is_some_and(|p| !p.is_empty() && p.iter().all(u8::is_ascii_digit));
    pid && matches!(parts.next(), Some(b"fdinfo" | b"task" | b"map_files"))
}

/// CRIU writes paths with a leading slash, but accepts them without.
pub(super) fn absolute(name: &[u8]) -> Vec<u8> {
    if name.starts_with(b"/") { name.to_vec() } else { [b"/", name].concat() }
}

fn validate(
    opener: &Opener<'_>,
    reg: &RegFileEntry,
    path: &[u8],
    fd: &OwnedFd,
) -> Result<(), Problem> {
    let stat = rustix::fs::fstat(fd).map_err(|e| Problem::new(text(path), e.to_string()))?;
    let changed = |what: String| {
        Problem::new(text(path), what).remedy("bring back the file as it was at the dump")
    };
    if let Some(size) = reg.size.filter(|s| *s != stat.st_size as u64) {
        return Err(changed(format!(
            "its size is {} bytes now, at the dump it was {size}",
            stat.st_size
        )));
    }
    if opener.options.build_ids && !reg.build_id.is_empty() {
        let now = build_id_of(path, fd);
        if now != reg.build_id {
            let then = build_id::shown(&reg.build_id);
            let now = match now.as_slice() {
                [] => "none".to_owned(),
                now => build_id::shown(now),
            };
            return Err(changed(format!(
                "it is another build: its build id is {now}, at the dump it was {then}"
            ))
            .remedy("bring back the file as it was at the dump; --file-validation filesize looks at the size only"));
        }
    }
    if let Some(mode) = reg.mode.filter(|m| *m != stat.st_mode)
        && !opener.options.skip_mode_check
    {
        return Err(changed(format!(
            "its mode is {:o} now, at the dump it was {mode:o}",
            stat.st_mode
        ))
        .remedy("bring back the mode, or use --skip-file-rwx-check"));
    }
    Ok(())
}

/// The build id of an open file, which may not be open for reading.
fn build_id_of(path: &[u8], fd: &OwnedFd) -> Vec<u32> {
    match build_id::of(fd) {
        id if id.is_empty() => {
            let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let id = build_id::of_path(own.as_bytes());
            log::debug!("{}: opened once more for its build id", text(path));
            id
        }
        id => id,
    }
}
