//! What belongs to the outside. A dump leaves it out (`--external file[MNT_ID:INODE]`, `tty[RDEV:DEV]`) and saves only
//! its key; a restore puts descriptors of its caller in the place of what has a key (`--inherit-fd fd[N]:KEY`), whether a
//! dump has left it out or not.
//!
//! Files, terminals and sockets are the caller's own descriptions, with the position that they have and the status flags
//! of the images. Pipes are opened anew by theirs, so that the flags of each end are its own.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{FdTypes, FileEntry, PipeEntry, RegFileEntry, TtyInfoEntry, TtyType};
use rewake_sys::{Errno, descriptors};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use std::collections::{HashMap, HashSet};

/// Keys of what a dump leaves out, as `--external` gives them.
#[derive(Debug, Clone, Default)]
pub struct Outside {
    /// `file[MNT_ID:INODE]`, in hexadecimal.
    pub files: HashSet<String>,
    /// `tty[RDEV:DEV]`, in hexadecimal.
    pub terminals: HashSet<String>,
}

/// The key under which an open file (or a path that leads to it) is to be left out of the images.
///
/// # Errors
/// Its mount cannot be told.
pub(super) fn file_key(collector: &Collector, path: &str) -> Result<Option<Vec<u8>>, Errno> {
    let wanted = &collector.options.external.files;
    if wanted.is_empty() {
        return Ok(None);
    }
    let mask = StatxFlags::MNT_ID | StatxFlags::INO;
    let stat = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), mask)?;
    let key = format!("file[{:x}:{:x}]", stat.stx_mnt_id, stat.stx_ino);
    Ok(wanted.contains(&key).then(|| key.into_bytes()))
}

/// The key of a terminal.
fn terminal_key(rdev: u64, dev: u64) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

/// Is this terminal to be left out of the images?
pub(super) fn has_terminal(collector: &Collector, view: &View<'_>) -> bool {
    let wanted = &collector.options.external.terminals;
    !wanted.is_empty() && wanted.contains(&terminal_key(view.stat.st_rdev, view.stat.st_dev))
}

/// The caller's descriptors by the keys of what they replace.
pub type Inherited = HashMap<Vec<u8>, i32>;

/// The key of a terminal of the images.
fn key_of_terminal(info: &TtyInfoEntry) -> Vec<u8> {
    terminal_key(info.rdev.into(), info.dev.unwrap_or(0).into()).into_bytes()
}

/// The key of a regular file: that of an external one, or its path without the leading slash.
fn key_of_file(reg: &RegFileEntry) -> &[u8] {
    match reg.ext {
        Some(true) => &reg.name,
        _ => reg.name.strip_prefix(b"/").unwrap_or(&reg.name),
    }
}

/// The key of a memfd.
fn key_of_memfd(name: &[u8]) -> Vec<u8> {
    [b"/memfd:", name].concat()
}

/// The key of any entry of `files.img` but memfds, whose name is elsewhere, and packet sockets, which have no number in the images.
fn key(opener: &Opener<'_>, file: &FileEntry) -> Option<Vec<u8>> {
    let socket = |inode: u32| format!("socket:[{inode}]").into_bytes();
    if let Some(pipe) = &file.pipe {
        return Some(format!("pipe:[{}]", pipe.pipe_id).into_bytes());
    }
    if let Some(tty) = &file.tty {
        return opener.ttys.get(&tty.tty_info_id).map(key_of_terminal);
    }
    if let Some(reg) = &file.reg {
        return Some(key_of_file(reg).to_vec());
    }
    let inet = file.isk.as_ref().map(|s| s.ino);
    let inode = inet.or(file.usk.as_ref().map(|s| s.ino));
    let inode = inode.or(file.nlsk.as_ref().map(|s| s.ino));
    inode.map(socket)
}

/// Checks that what a dump has left out is given, before any process exists; says which of the caller's descriptors nothing
/// asks for.
///
/// # Errors
/// Something is not given, or the images are damaged.
pub(super) fn check(opener: &Opener<'_>) -> Result<(), Problem> {
    let given = &opener.options.inherited;
    let mut unused: HashSet<&[u8]> = given.keys().map(Vec::as_slice).collect();
    for file in opener.files.values() {
        let key = key(opener, file);
        if let Some(key) = &key {
            unused.remove(key.as_slice());
        }
        let Some(reg) = file.reg.as_ref().filter(|reg| reg.ext == Some(true)) else { continue };
        if !given.contains_key(&reg.name) {
            return Err(Problem::new(
                text(&reg.name),
                "the dump left this file out (--external), and nothing is given in its place",
            )
            .remedy(format!("give one: --inherit-fd fd[N]:{}", text(&reg.name))));
        }
    }
    for info in opener.ttys.values().filter(|info| info.r#type == TtyType::ExtTty as i32) {
        let key = key_of_terminal(info);
        if !given.contains_key(&key) {
            return Err(Problem::new(
                text(&key),
                "the dump left this terminal out (--external), and nothing is given in its place",
            )
            .remedy(format!("give one: --inherit-fd fd[N]:{}", text(&key))));
        }
    }
    if unused.iter().any(|key| key.starts_with(b"/memfd:")) {
        for inode in opener.memfd_inodes.values() {
            unused.remove(key_of_memfd(&inode.name).as_slice());
        }
    }
    for key in unused {
        log::warn!(
            "--inherit-fd fd[{}]:{}: the images have nothing of that name; the descriptor is not used",
            given[key],
            text(key)
        );
    }
    Ok(())
}

/// A further descriptor of the caller's description for `key`, if one is given.
fn given(opener: &Opener<'_>, key: &[u8]) -> Result<Option<OwnedFd>, Problem> {
    let Some(number) = opener.options.inherited.get(key) else { return Ok(None) };
    let fd = descriptors::duplicate(*number).map_err(|e| {
        Problem::new(text(key), format!("--inherit-fd fd[{number}]:{}: {e}", text(key)))
    })?;
    Ok(Some(fd))
}

/// Is something of the caller's put in the place of this file?
pub(crate) fn replaces(opener: &Opener<'_>, file: &FileEntry) -> bool {
    !opener.options.inherited.is_empty()
        && key(opener, file).is_some_and(|key| opener.options.inherited.contains_key(&key))
}

/// The caller's descriptor in the place of a regular file (or whatever else has a path).
pub(super) fn file(opener: &Opener<'_>, reg: &RegFileEntry) -> Result<Option<OwnedFd>, Problem> {
    if opener.options.inherited.is_empty() {
        return Ok(None);
    }
    let Some(fd) = given(opener, key_of_file(reg))? else { return Ok(None) };
    let access = |flags: u32| flags & libc::O_ACCMODE as u32;
    let flags = rewake_sys::file::flags(fd.as_fd())
        .map_err(|e| Problem::new(text(&reg.name), e.to_string()))?;
    let path = reg.flags & libc::O_PATH as u32 != 0;
    if !path && (access(flags) != access(reg.flags) && access(flags) != libc::O_RDWR as u32) {
        let wanted = match access(reg.flags) as i32 {
            libc::O_RDONLY => "reading",
            libc::O_WRONLY => "writing",
            _ => "reading and writing",
        };
        let number = opener.options.inherited[key_of_file(reg)];
        let reason =
            format!("--inherit-fd fd[{number}] is put in its place, but is not open for {wanted}");
        return Err(Problem::new(text(&reg.name), reason).remedy("open it so"));
    }
    Ok(Some(fd))
}

/// The caller's memory in the place of a memfd.
pub(crate) fn memfd(opener: &Opener<'_>, name: &[u8]) -> Result<Option<OwnedFd>, Problem> {
    if opener.options.inherited.is_empty() {
        return Ok(None);
    }
    given(opener, &key_of_memfd(name))
}

/// The caller's descriptor in the place of any other file; regular files, memfds and unix sockets, which have more to them, ask
/// for it where they are opened.
pub(super) fn other(opener: &mut Opener<'_>, file: &FileEntry) -> Result<Option<OwnedFd>, Problem> {
    let here = FdTypes::try_from(file.r#type).is_ok_and(|kind| {
        matches!(kind, FdTypes::Pipe | FdTypes::Tty | FdTypes::Inetsk | FdTypes::Netlinksk)
    });
    if !here || opener.options.inherited.is_empty() {
        return Ok(None);
    }
    let Some(key) = key(opener, file) else { return Ok(None) };
    let Some(fd) = given(opener, &key)? else { return Ok(None) };
    if let Some(entry) = &file.pipe {
        return pipe(opener, entry, &fd).map(Some);
    }
    if let Some(tty) = &file.tty {
        note_terminal(opener, tty.tty_info_id, &fd, &key)?;
    }
    Ok(Some(fd))
}

/// Opens an end of the caller's pipe as the images have it.
fn pipe(opener: &Opener<'_>, entry: &PipeEntry, fd: &OwnedFd) -> Result<OwnedFd, Problem> {
    let object = format!("pipe:[{}]", entry.pipe_id);
    let waiting = opener.pipe_data.get(&entry.pipe_id).map_or(0, |(_, data)| data.len());
    if waiting != 0 {
        log::warn!(
            "{object}: {waiting} bytes that waited in it are not put into the pipe that is given in its place"
        );
    }
    let failed = |e: &dyn std::fmt::Display| {
        Problem::new(&*object, format!("what --inherit-fd puts in its place cannot be opened: {e}"))
    };
    let stat = rustix::fs::fstat(fd).map_err(|e| failed(&e))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFIFO {
        // A socket, which nobody can open, or a file, which has a position.
        return fd.try_clone().map_err(|e| failed(&e));
    }
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlags::from_bits_retain(entry.flags) & OFlags::RWMODE;
    // A FIFO without a reader is not waited for.
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(own, flags, Mode::empty()).map_err(|e| failed(&e))
}

/// Notes that the caller's terminal is put in the place of one of the images, whose settings it gets at the end.
fn note_terminal(
    opener: &mut Opener<'_>,
    id: u32,
    fd: &OwnedFd,
    key: &[u8],
) -> Result<(), Problem> {
    use rewake_sys::tty::{Settings, settings};
    settings(fd.as_fd(), Settings::Current).map_err(|e| {
        Problem::new(text(key), format!("what --inherit-fd puts in its place is no terminal: {e}"))
    })?;
    if !opener.given_terminals.iter().any(|(known, _)| *known == id) {
        let own = fd.try_clone().map_err(|e| Problem::new(text(key), e.to_string()))?;
        opener.given_terminals.push((id, own));
    }
    Ok(())
}

/// The path of the caller's terminal that is put in the place of this one.
pub(super) fn terminal_path(opener: &Opener<'_>, info: &TtyInfoEntry) -> Option<Vec<u8>> {
    let number = *opener.options.inherited.get(&key_of_terminal(info))?;
    let fd = descriptors::duplicate(number).ok()?;
    rustix::termios::ttyname(fd, Vec::new()).ok().map(|name| name.into_bytes())
}
