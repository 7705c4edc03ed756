//! Files that are watched (inotify(7), fanotify(7)): the kernel tells an inode and a handle of it, and a path has to be
//! found for that, or a descriptor of a file that has none any more.

use super::collect::View;
use super::open::Opener;
use crate::problem::text;
use rewake_image::messages::FhEntry;
use rewake_proc::fdinfo::{FileHandle, KernelDev};
use rewake_proc::mountinfo::{self, Mount};
use rewake_sys::descriptors;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Words of a handle in the image.
const HANDLE_WORDS: usize = descriptors::MAX_HANDLE / 8;
/// Directory entries looked at for one file whose file system cannot look it up by its handle: some seconds at most.
const MOST_LOOKED_AT: usize = 1 << 20;

/// A watched inode.
#[derive(Debug, Clone, Copy)]
pub struct Watched<'a> {
    /// Its file system.
    pub sdev: KernelDev,
    /// Its number.
    pub ino: u64,
    /// Its handle, if its file system gives any.
    pub handle: Option<&'a FileHandle>,
}

/// Where a watched file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At this path.
    Path(Vec<u8>),
    /// Nowhere: it is deleted. `st_dev` and `st_ino`.
    Deleted(u64, u64),
}

/// How watched files are looked for.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// `--force-irmap`: before their file system is asked for them by their handles.
    pub first: bool,
    /// `--irmap-scan-path`: here before anywhere else.
    pub paths: Vec<PathBuf>,
}

/// The mounts of the task that watches, read once.
#[derive(Debug, Default)]
pub struct Mounts {
    text: Option<Vec<u8>>,
    scan: Scan,
}

impl Mounts {
    /// Not read yet.
    #[must_use]
    pub fn new(scan: &Scan) -> Mounts {
        Mounts { text: None, scan: scan.clone() }
    }

    /// The text of `mountinfo`.
    fn text(&mut self, pid: i32) -> Result<&[u8], String> {
        if self.text.is_none() {
            let read = std::fs::read(format!("/proc/{pid}/mountinfo"));
            self.text = Some(read.map_err(|e| e.to_string())?);
        }
        Ok(self.text.as_deref().unwrap_or_default())
    }

    /// Finds a watched file.
    ///
    /// # Errors
    /// Why it cannot be found.
    pub fn find(&mut self, view: &View<'_>, watched: Watched<'_>) -> Result<Place, String> {
        let scan = self.scan.clone();
        let mounts = mountinfo::parse(self.text(view.tid)?).map_err(|e| e.to_string())?;
        let device = (watched.sdev.major(), watched.sdev.minor());
        let mut why = "no mount of its file system can be reached".to_string();
        let here = |m: &&Mount<'_>| m.dev == device;
        let is_here = |path: &&PathBuf| mount_of(&mounts, path).is_some_and(|m| m.dev == device);
        let scanned = |path: &PathBuf| look_for(path, watched.ino);
        let mut places = scan.paths.iter().filter(is_here);
        if scan.first {
            let all = mounts.iter().filter(here).filter(|m| is_looked_through(m));
            let roots = all.map(|mount| PathBuf::from(text_path(mount)));
            if let Some(path) =
                places.find_map(scanned).or_else(|| roots.into_iter().find_map(|r| scanned(&r)))
            {
                return Ok(Place::Path(path));
            }
        }
        for mount in mounts.iter().filter(here) {
            let Some(handle) = watched.handle else { break };
            match by_handle(mount, handle.handle_type as i32, &handle.bytes) {
                Ok(file) => match place_of(&file) {
                    Ok(place) => return Ok(place),
                    Err(e) => why = e,
                },
                Err(e) => why = e,
            }
        }
        if let Some(path) = places.find_map(scanned) {
            return Ok(Place::Path(path));
        }
        // Overlays and others cannot be asked: look for it.
        for mount in mounts.iter().filter(here).filter(|m| is_looked_through(m)) {
            match look_for(Path::new(OsStr::new(&*text_path(mount))), watched.ino) {
                Some(path) => return Ok(Place::Path(path)),
                None => why = format!("{why}, nor by looking for it"),
            }
        }
        Err(why)
    }

    /// The directory where mount `id` is.
    ///
    /// # Errors
    /// There is no such mount in the task's namespace.
    pub fn directory(&mut self, view: &View<'_>, id: u32) -> Result<Vec<u8>, String> {
        let mounts = mountinfo::parse(self.text(view.tid)?).map_err(|e| e.to_string())?;
        let mount = mounts.iter().find(|m| m.id == id);
        mount.map(|m| m.mount_point.to_vec()).ok_or_else(|| format!("mount {id} is not there"))
    }

    /// A directory where file system `sdev` is mounted.
    ///
    /// # Errors
    /// It is not mounted in the task's namespace.
    pub fn any_directory(&mut self, view: &View<'_>, sdev: KernelDev) -> Result<Vec<u8>, String> {
        let mounts = mountinfo::parse(self.text(view.tid)?).map_err(|e| e.to_string())?;
        let device = (sdev.major(), sdev.minor());
        let mount = mounts.iter().find(|m| m.dev == device);
        mount.map(|m| m.mount_point.to_vec()).ok_or_else(|| "it is not mounted".into())
    }
}

/// The mount that a path is in.
fn mount_of<'m>(mounts: &'m [Mount<'_>], path: &Path) -> Option<&'m Mount<'m>> {
    let has = |m: &&Mount<'_>| path.starts_with(Path::new(OsStr::from_bytes(&m.mount_point)));
    // The last of those that are mounted at one place is on top.
    mounts.iter().filter(has).max_by_key(|m| m.mount_point.len())
}

fn text_path(mount: &Mount<'_>) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(mount.mount_point.to_vec())
}

/// File systems in which looking for an inode number makes sense.
fn is_looked_through(mount: &Mount<'_>) -> bool {
    !matches!(&*mount.fs_type, b"proc" | b"sysfs" | b"devpts" | b"cgroup" | b"cgroup2" | b"tracefs")
}

/// The file of a handle, on the file system of `mount`.
fn by_handle(mount: &Mount<'_>, kind: i32, bytes: &[u8]) -> Result<OwnedFd, String> {
    // Not O_PATH: open_by_handle_at wants an open file.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let root = rustix::fs::open(&*mount.mount_point, flags, Mode::empty());
    let root = root.map_err(|e| format!("{}: {e}", text(&mount.mount_point)))?;
    descriptors::open_by_handle(root.as_fd(), kind, bytes).map_err(|e| e.to_string())
}

/// The path of an open file, if it has one that leads to it.
fn place_of(file: &OwnedFd) -> Result<Place, String> {
    let own = rustix::fs::fstat(file).map_err(|e| e.to_string())?;
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())
        .map_err(|e| e.to_string())?;
    // It may be below another mount's root, or removed.
    let same = |s: Stat| (s.st_dev, s.st_ino) == (own.st_dev, own.st_ino);
    if rustix::fs::lstat(&link).is_ok_and(same) {
        Ok(Place::Path(link.into_bytes()))
    } else if own.st_nlink == 0 || link.as_bytes().ends_with(b" (deleted)") {
        Ok(Place::Deleted(own.st_dev, own.st_ino))
    } else {
        Err(format!("{} is not its path any more", text(link.as_bytes())))
    }
}

/// Looks for an inode by its number below `root`, without leaving its file system.
fn look_for(root: &Path, ino: u64) -> Option<Vec<u8>> {
    let device = rustix::fs::lstat(root).ok()?;
    if device.st_ino == ino {
        return Some(root.as_os_str().as_bytes().to_vec());
    }
    let mut waiting: VecDeque<PathBuf> = [root.to_owned()].into();
    let mut looked = 0;
    while let Some(directory) = waiting.pop_front() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::open(&directory, flags, Mode::empty()) else { continue };
        // A directory of an overlay has the device of the overlay, a file of it that of its layer.
        if rustix::fs::fstat(&fd).map_or(true, |s| s.st_dev != device.st_dev) {
            continue;
        }
        let Ok(entries) = rustix::fs::Dir::read_from(&fd) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            looked += 1;
            if looked > MOST_LOOKED_AT {
                return None;
            }
            let path = directory.join(OsStr::from_bytes(name.to_bytes()));
            let is_it = entry.ino() == ino
                && rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)
                    .is_ok_and(|s| s.st_ino == ino);
            if is_it {
                return Some(path.as_os_str().as_bytes().to_vec());
            }
            if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
                waiting.push_back(path);
            }
        }
    }
    None
}

/// A handle in the image's form.
#[must_use]
pub fn handle_entry(handle: Option<&FileHandle>, path: Option<Vec<u8>>) -> FhEntry {
    let mut words = vec![0u64; HANDLE_WORDS];
    let bytes = handle.map_or(&[][..], |h| &h.bytes);
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    FhEntry {
        bytes: bytes.len() as u32,
        r#type: handle.map_or(0, |h| h.handle_type),
        handle: words,
        path,
        mnt_id: None,
    }
}

/// The file to watch: by its path if there is one there, else by its handle.
///
/// # Errors
/// It cannot be found.
pub fn target(
    opener: &Opener<'_>,
    entry: &FhEntry,
    ino: u64,
    s_dev: u32,
) -> Result<OwnedFd, String> {
    let by_path = |path: &[u8]| {
        // On another machine, or from a copy, the inode is another one, but the path is what was meant.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        opener.open_path(Path::new(OsStr::from_bytes(path)), flags).ok()
    };
    find_target(&by_path, entry, ino, s_dev)
}

/// As [`target`], with a way to open paths.
pub(super) fn find_target(
    by_path: &dyn Fn(&[u8]) -> Option<OwnedFd>,
    entry: &FhEntry,
    ino: u64,
    s_dev: u32,
) -> Result<OwnedFd, String> {
    let path = entry.path.as_deref();
    if let Some(file) = path.and_then(by_path) {
        return Ok(file);
    }
    let bytes: Vec<u8> = entry.handle.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let handle = bytes.get(..entry.bytes as usize).ok_or("its file handle is cut off")?;
    let mountinfo = std::fs::read("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let mounts = mountinfo::parse(&mountinfo).map_err(|e| e.to_string())?;
    let device = (s_dev >> 20, s_dev & 0xf_ffff);
    let name = || path.map_or_else(|| format!("inode {ino}"), text);
    let mut why = "no mount of its file system can be reached".to_string();
    for mount in mounts.iter().filter(|m| m.dev == device) {
        match by_handle(mount, entry.r#type as i32, handle) {
            Ok(file) => return Ok(file),
            Err(e) => why = e,
        }
    }
    Err(format!("the watched file ({}) cannot be found: {why}", name()))
}

/// Takes away the events of a group that the restore itself has caused (deleted files had a name for a while).
pub fn forget_events(group: BorrowedFd<'_>) {
    let is_fanotify =
        rustix::fs::readlink(format!("/proc/self/fd/{}", group.as_raw_fd()), Vec::new())
            .is_ok_and(|link| link.as_bytes() == b"anon_inode:[fanotify]");
    let mut buffer = [0u8; 4096];
    while rustix::io::ioctl_fionread(group).is_ok_and(|waiting| waiting > 0) {
        let Ok(length) = rustix::io::read(group, &mut buffer) else { return };
        if is_fanotify {
            descriptors::close_event_files(&buffer[..length]);
        }
    }
}

/// Events of a watching group that nobody has read yet cannot be given back: says so.
pub(super) fn warn_of_unread(view: &View<'_>) {
    let waiting = rustix::io::ioctl_fionread(view.as_fd()).unwrap_or(0);
    if waiting > 0 {
        log::warn!(
            "process {}: {}: {waiting} bytes of events that were not read yet are not saved",
            view.pid,
            view.object()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_found_by_its_number() {
        let root = std::env::temp_dir().join(format!("rewake-watched-{}", std::process::id()));
        let deep = root.join("a/b/c");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), "").unwrap();
        let ino = rustix::fs::stat(deep.join("file")).unwrap().st_ino;
        let found = look_for(&root, ino).unwrap();
        assert_eq!(found, deep.join("file").to_str().unwrap().as_bytes());
        let ino = rustix::fs::stat(&root).unwrap().st_ino;
        assert_eq!(look_for(&root, ino).unwrap(), root.to_str().unwrap().as_bytes());
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(look_for(&root, ino), None);
    }
}
