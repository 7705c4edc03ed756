//! Ghosts: files without a name that are still open or mapped. Their contents are saved; a restore makes them again
//! under a temporary name, which is unlinked as soon as they are open.

use super::collect::{Collector, Contents, View};
use crate::Problem;
use crate::problem::text;
use rewake_image::ghost::Ghost;
use rewake_image::messages::{
    GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use std::ffi::OsStr;
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
        if !regular && kind != libc::S_IFDIR {
            return Err(view
                .problem("its name is removed; of such, only regular files and directories can be saved yet")
                .remedy("bring the name back, or close it"));
        }
        let plain = view.link.strip_suffix(b" (deleted)").unwrap_or(&view.link);
        let directory = Path::new(OsStr::from_bytes(plain)).parent().unwrap_or(Path::new("/"));
        match rustix::fs::stat(directory) {
            Ok(_) => {}
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                return Err(view
                    .problem("its name is removed, and the directory in which that was too, which cannot be saved yet")
                    .remedy(format!("make the directory {} again", text(directory.as_os_str().as_bytes()))));
            }
            Err(e) => return Err(view.problem(format!("its directory cannot be examined: {e}"))),
        }
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
            rdev: None,
            atim: Some(time(stat.st_atime, stat.st_atime_nsec)),
            mtim: Some(time(stat.st_mtime, stat.st_mtime_nsec)),
            chunks: None,
            size: None,
            symlnk_target: None,
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

/// A ghost that has a name for a moment; dropping this takes the name away again.
#[derive(Debug)]
pub struct Named {
    path: PathBuf,
    is_dir: bool,
    gone: bool,
}

impl Named {
    fn new(path: PathBuf, is_dir: bool) -> Named {
        Named { path, is_dir, gone: false }
    }

    fn take_away(&mut self) -> rustix::io::Result<()> {
        let flags =
            if self.is_dir { rustix::fs::AtFlags::REMOVEDIR } else { rustix::fs::AtFlags::empty() };
        rustix::fs::unlinkat(rustix::fs::CWD, &self.path, flags)?;
        self.gone = true;
        Ok(())
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if !self.gone
            && let Err(e) = self.take_away()
        {
            log::warn!(
                "the name {} of a restored deleted file stays behind: {e}",
                self.path.display()
            );
        }
    }
}

/// A ghost that was made again: kept so that further openers get the same file.
#[derive(Debug)]
pub struct Raised {
    file: OwnedFd,
    is_dir: bool,
    /// Names it has for the moment: without one left, it could not be given another.
    names: Vec<Named>,
}

impl Raised {
    /// Takes the names away that it has for the moment: who needs it has opened it.
    ///
    /// # Errors
    /// One cannot be removed; it was tried twice.
    pub fn end(self) -> Result<(), Problem> {
        let Raised { file, mut names, .. } = self;
        // First: what ends the last use of a name that it was made without (`O_TMPFILE`) takes watches (inotify(7)) off a
        // file that has no other name left.
        drop(file);
        names.iter_mut().try_for_each(|named| {
            named
                .take_away()
                .map_err(|e| problem(&named.path, "rid of the name it has for a moment", e))
        })
    }
}

fn problem(path: &Path, what: &str, e: impl std::fmt::Display) -> Problem {
    Problem::new(text(path.as_os_str().as_bytes()), format!("a deleted file cannot be {what}: {e}"))
}

/// Makes the file of `ghost` again beside `path`, without a name.
///
/// # Errors
/// The directory is gone or not writable, or the disk is full.
pub fn raise(ghost: &Ghost, path: &Path) -> Result<Raised, Problem> {
    let entry = &ghost.entry;
    let kind = entry.mode & libc::S_IFMT;
    let mode = Mode::from_raw_mode(entry.mode & 0o7777);
    if kind == libc::S_IFDIR {
        let path = &unused(path);
        rustix::fs::mkdir(path, mode).map_err(|e| problem(path, "made again", e))?;
        let names = vec![Named::new(path.to_owned(), true)];
        let file = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| problem(path, "made again", e))?;
        let _ = rustix::fs::fchown(
            &file,
            Some(rustix::fs::Uid::from_raw(entry.uid)),
            Some(rustix::fs::Gid::from_raw(entry.gid)),
        );
        return Ok(Raised { file, is_dir: true, names });
    }
    if kind != libc::S_IFREG {
        return Err(problem(
            path,
            "made again",
            "only regular files and directories can be so far",
        ));
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mut names = Vec::new();
    let file = match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(file) => file,
        // Not every file system has O_TMPFILE.
        Err(_) => {
            let path = unused(path);
            let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)
                .map_err(|e| problem(&path, "made again", e))?;
            names.push(Named::new(path, false));
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
    Ok(Raised { file: file.into(), is_dir: false, names })
}

/// Copies the contents; what is in no chunk stays a hole.
fn fill(ghost: &Ghost, to: &std::fs::File) -> std::io::Result<()> {
    let size = ghost
        .entry
        .size
        .or_else(|| ghost.chunks.iter().map(|c| c.offset + c.length).max())
        .unwrap_or(0);
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

/// `path`, or a name beside it if that is taken by another file now.
fn unused(path: &Path) -> PathBuf {
    if rustix::fs::lstat(path).is_err() {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.ghost", std::process::id()));
    PathBuf::from(name)
}

impl Raised {
    /// Gives the file the name `path`, or one beside it if that is taken, until this is dropped.
    ///
    /// # Errors
    /// The directory is gone or not writable.
    pub fn name(&mut self, path: &Path) -> Result<PathBuf, Problem> {
        if let Some(named) = self.names.iter().find(|n| self.is_dir || n.path == path) {
            return Ok(named.path.clone());
        }
        let path = unused(path);
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        rustix::fs::linkat(
            rustix::fs::CWD,
            own,
            rustix::fs::CWD,
            &path,
            rustix::fs::AtFlags::SYMLINK_FOLLOW,
        )
        .map_err(|e| problem(&path, "given its name for a moment", e))?;
        self.names.push(Named::new(path.clone(), false));
        Ok(path)
    }
}
