//! Ghosts: files without a name that are still open or mapped. Their contents are saved; a restore makes them again
//! under a temporary name, which is unlinked as soon as they are open.

use super::collect::{Collector, Contents, View};
use super::passing::{Names, unused};
use crate::Problem;
use crate::memory::hugetlb;
use crate::problem::text;
use rewake_image::ghost::Ghost;
use rewake_image::messages::{
    GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use rewake_sys::memory::SharedMapping;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Makes the file of `view` a ghost behind regular-file id `id`.
///
/// # Errors
/// It is larger than `--ghost-limit`, or cannot be opened for reading.
pub fn survey(collector: &mut Collector, id: u32, view: &View<'_>) -> Result<(), Problem> {
    let stat = &view.stat;
    let key = (stat.st_dev, stat.st_ino);
    let ghost = if let Some(ghost) = collector.ghosts.get(&key) {
        *ghost
    } else {
        let ghost = collector.ghosts.len() as u64;
        let allocated = stat.st_blocks as u64 * 512;
        if allocated > collector.options.ghost_limit {
            return Err(view
                .problem(format!(
                    "the file is deleted and holds {allocated} bytes, more than --ghost-limit {}",
                    collector.options.ghost_limit
                ))
                .remedy(format!("raise the limit: --ghost-limit {allocated}")));
        }
        // The descriptor may be write-only; /proc gives a fresh description of the same file.
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&view.as_fd()));
        let kind = stat.st_mode & libc::S_IFMT;
        let regular = kind == libc::S_IFREG;
        if kind == libc::S_IFSOCK {
            return Err(view
                .problem("it is a path (O_PATH) of a socket whose name is removed, which cannot be saved")
                .remedy("bring the name back, or close it"));
        }
        let target = (kind == libc::S_IFLNK).then(|| {
            rustix::fs::readlinkat(view.as_fd(), "", Vec::new())
                .map(|target| target.into_bytes())
                .map_err(|e| view.problem(format!("the deleted link cannot be read: {e}")))
        });
        // Whoever has a lease on it stands still and could not answer.
        let flags = if regular { OFlags::RDONLY | OFlags::NONBLOCK } else { OFlags::PATH };
        let file = rustix::fs::open(own, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| view.problem(format!("the deleted file cannot be read: {e}")))?;
        let time = |sec: i64, nsec: u64| Timeval { tv_sec: sec as u64, tv_usec: nsec / 1000 };
        let entry = GhostFileEntry {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode,
            dev: Some((rustix::fs::major(stat.st_dev) << 20) | rustix::fs::minor(stat.st_dev)),
            ino: Some(stat.st_ino),
            rdev: matches!(kind, libc::S_IFCHR | libc::S_IFBLK).then(|| old_device(stat.st_rdev)),
            atim: Some(time(stat.st_atime, stat.st_atime_nsec)),
            mtim: Some(time(stat.st_mtime, stat.st_mtime_nsec)),
            chunks: None,
            size: None,
            symlnk_target: target.transpose()?,
        };
        let size = if regular { stat.st_size as u64 } else { 0 };
        collector.contents.push(Contents::Ghost { id: ghost, entry, file, size });
        collector.ghosts.insert(key, ghost);
        ghost
    };
    collector.remaps.push(RemapFilePathEntry {
        orig_id: id,
        remap_id: ghost as u32,
        remap_type: Some(RemapType::Ghost as i32),
    });
    Ok(())
}

/// How images have the number of a device.
fn old_device(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn device(old: u32) -> u64 {
    rustix::fs::makedev((old >> 8) & 0xfff, (old & 0xff) | ((old >> 12) & 0xfff00))
}

/// A file without a name of its own: kept so that further openers get the same file.
#[derive(Debug)]
pub struct Raised {
    file: OwnedFd,
    is_dir: bool,
    /// Names it has for the moment.
    names: Vec<PathBuf>,
}

fn problem(path: &Path, what: &str, e: impl std::fmt::Display) -> Problem {
    Problem::new(text(path.as_os_str().as_bytes()), format!("a deleted file cannot be {what}: {e}"))
}

/// Makes the file of `ghost` again beside `path`, without a name if that is possible.
///
/// # Errors
/// The directory is not writable, or the disk is full.
pub fn raise(ghost: &Ghost, path: &Path, names: &mut Names) -> Result<Raised, Problem> {
    let entry = &ghost.entry;
    let mode = Mode::from_raw_mode(entry.mode & 0o7777);
    names.make_parents(path)?;
    if entry.mode & libc::S_IFMT == libc::S_IFREG {
        return raise_regular(ghost, path, mode, names);
    }
    let made = |e| problem(path, "made again", e);
    let is_dir = entry.mode & libc::S_IFMT == libc::S_IFDIR;
    // It may be there already, for the sake of what was in it.
    let there = is_dir && names.take_directory(path);
    let path = if there { path.to_owned() } else { unused(path) };
    if !there {
        make(entry, &path, mode).map_err(made)?;
        names.add(path.clone(), is_dir);
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(made)?;
    let ids = (rustix::fs::Uid::from_raw(entry.uid), rustix::fs::Gid::from_raw(entry.gid));
    rustix::fs::chownat(CWD, &path, Some(ids.0), Some(ids.1), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| problem(&path, "given to its owner", e))?;
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        rustix::fs::chmodat(CWD, &path, mode, AtFlags::empty())
            .map_err(|e| problem(&path, "given its mode", e))?;
    }
    Ok(Raised { file, is_dir, names: vec![path] })
}

/// Makes what is no regular file.
fn make(entry: &GhostFileEntry, path: &Path, mode: Mode) -> Result<(), Errno> {
    let node = |kind, device| rustix::fs::mknodat(CWD, path, kind, mode, device);
    let rdev = || device(entry.rdev.unwrap_or(0));
    match entry.mode & libc::S_IFMT {
        libc::S_IFDIR => rustix::fs::mkdir(path, mode),
        libc::S_IFIFO => node(FileType::Fifo, 0),
        libc::S_IFCHR => node(FileType::CharacterDevice, rdev()),
        libc::S_IFBLK => node(FileType::BlockDevice, rdev()),
        libc::S_IFLNK => {
            rustix::fs::symlink(entry.symlnk_target.as_deref().unwrap_or_default(), path)
        }
        _ => Err(Errno::INVAL),
    }
}

fn raise_regular(
    ghost: &Ghost,
    path: &Path,
    mode: Mode,
    names: &mut Names,
) -> Result<Raised, Problem> {
    let entry = &ghost.entry;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mut own_names = Vec::new();
    let file = match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(file) => file,
        // Not every file system has O_TMPFILE.
        Err(_) => {
            let path = unused(path);
            let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)
                .map_err(|e| problem(&path, "made again", e))?;
            names.add(path.clone(), false);
            own_names.push(path);
            file
        }
    };
    let file = std::fs::File::from(file);
    fill(ghost, &file).map_err(|e| problem(path, "filled", e))?;
    let ids = (rustix::fs::Uid::from_raw(entry.uid), rustix::fs::Gid::from_raw(entry.gid));
    rustix::fs::fchown(&file, Some(ids.0), Some(ids.1))
        .map_err(|e| problem(path, "given to its owner", e))?;
    // After chown, which clears set-id bits, and regardless of our umask.
    rustix::fs::fchmod(&file, mode).map_err(|e| problem(path, "given its mode", e))?;
    if let (Some(atim), Some(mtim)) = (&entry.atim, &entry.mtim) {
        let time = |t: &Timeval| rustix::fs::Timespec {
            tv_sec: t.tv_sec as i64,
            tv_nsec: (t.tv_usec % 1_000_000 * 1000) as i64,
        };
        let times =
            rustix::fs::Timestamps { last_access: time(atim), last_modification: time(mtim) };
        rustix::fs::futimens(&file, &times).map_err(|e| problem(path, "given its times", e))?;
    }
    // Nobody may execute what is open for writing.
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let file = rustix::fs::open(own, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| problem(path, "opened again", e))?;
    Ok(Raised { file, is_dir: false, names: own_names })
}

/// Copies the contents; what is in no chunk stays a hole.
fn fill(ghost: &Ghost, to: &std::fs::File) -> std::io::Result<()> {
    let size = ghost
        .entry
        .size
        .or_else(|| ghost.chunks.iter().map(|c| c.offset + c.length).max())
        .unwrap_or(0);
    if let Some(page) = hugetlb::of_file(to) {
        // hugetlbfs has no write(2).
        let size = size.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        rustix::fs::ftruncate(to, size)?;
        let of = |e: rewake_sys::SyscallError| std::io::Error::from(e.errno);
        let memory = SharedMapping::new(to, size as usize).map_err(of)?;
        return ghost.chunks.iter().try_for_each(|c| {
            memory.fill_all(&ghost.file, c.image_offset, c.offset, c.length).map_err(of)
        });
    }
    rustix::fs::ftruncate(to, size)?;
    let mut buffer = vec![0u8; 1 << 20];
    for chunk in &ghost.chunks {
        let mut done = 0;
        while done < chunk.length {
            let len = ((chunk.length - done) as usize).min(buffer.len());
            ghost.file.read_exact_at(&mut buffer[..len], chunk.image_offset + done)?;
            to.write_all_at(&buffer[..len], chunk.offset + done)?;
            done += len as u64;
        }
    }
    Ok(())
}

/// Writes the image of a ghost: small files whole, larger ones as chunks without the holes.
///
/// # Errors
/// Reading the file or writing the image fails.
pub fn write(
    images: &rewake_image::ImageWriter,
    id: u64,
    entry: &GhostFileEntry,
    file: &OwnedFd,
    size: u64,
) -> Result<(), Problem> {
    const CHUNKED_FROM: u64 = 12_288;
    let failed =
        |e: &dyn std::fmt::Display| Problem::new(format!("deleted file {id}"), e.to_string());
    let mut entry = entry.clone();
    let mut out = images.stream(rewake_image::kind::GHOST_FILE, id);
    let chunked = size >= CHUNKED_FROM;
    if chunked {
        (entry.chunks, entry.size) = (Some(true), Some(size));
    }
    out.push_other(&entry).map_err(|e| failed(&e))?;
    let source = std::fs::File::from(file.try_clone().map_err(|e| failed(&e))?);
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < size {
        let (start, end) = if chunked {
            let start = match rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(at)) {
                Ok(start) => start,
                // Nothing but a hole is left.
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(failed(&e)),
            };
            let end = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(start))
                .map_err(|e| failed(&e))?;
            let chunk = GhostChunkEntry { len: end - start, off: start };
            out.push_other(&chunk).map_err(|e| failed(&e))?;
            (start, end)
        } else {
            (0, size)
        };
        let mut from = start;
        while from < end {
            let len = ((end - from) as usize).min(buffer.len());
            source.read_exact_at(&mut buffer[..len], from).map_err(|e| failed(&e))?;
            out.payload(&buffer[..len]).map_err(|e| failed(&e))?;
            from += len as u64;
        }
        at = end;
    }
    out.finish().map_err(|e| failed(&e))
}

fn is_same(file: &OwnedFd, path: &Path) -> bool {
    match (rustix::fs::fstat(file), rustix::fs::lstat(path)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

impl Raised {
    /// A file that is still there, under another name, as `file` (`O_PATH`).
    #[must_use]
    pub fn linked(file: OwnedFd) -> Raised {
        Raised { file, is_dir: false, names: Vec::new() }
    }

    /// Gives the file the name `path`, or one beside it if that is taken, until `names` end.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn name(&mut self, path: &Path, names: &mut Names) -> Result<PathBuf, Problem> {
        if let Some(named) = self.names.iter().find(|n| self.is_dir || *n == path) {
            return Ok(named.clone());
        }
        names.make_parents(path)?;
        // Images may have given it several names, of which another has led to this one already.
        if names.has(path) && is_same(&self.file, path) {
            self.names.push(path.to_owned());
            return Ok(path.to_owned());
        }
        let path = unused(path);
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        rustix::fs::linkat(CWD, own, CWD, &path, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| problem(&path, "given its name for a moment", e))?;
        names.add(path.clone(), false);
        self.names.push(path.clone());
        Ok(path)
    }
}
