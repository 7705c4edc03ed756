//! inotify(7): watches come back with their numbers. Events that nobody has read yet are lost (the kernel cannot be given
//! them again).

use super::collect::{Collector, View};
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};
use rewake_proc::fdinfo::{FileHandle, InotifyWatch};
use rewake_sys::descriptors;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;

/// What may be asked for: events and how to watch. The kernel adds bits of its own.
const ASKABLE: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

/// Numbers that are passed over at most, at some microseconds each: more than any program gets to.
const MOST_SKIPPED: i32 = 1 << 24;

/// Words of a handle in the image.
const HANDLE_WORDS: usize = descriptors::MAX_HANDLE / 8;

/// Surveys an inotify instance.
///
/// # Errors
/// The path of a watched file cannot be found out.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let info_text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&info_text).map_err(|e| view.problem(e.to_string()))?;
    let waiting = rustix::io::ioctl_fionread(view.as_fd()).unwrap_or(0);
    if waiting > 0 {
        log::warn!(
            "process {}: {}: {waiting} bytes of events that were not read yet are not saved",
            view.pid,
            view.object()
        );
    }
    let id = collector.new_id();
    let mut mounts = None;
    let mut wd = Vec::with_capacity(info.inotify.len());
    for watch in &info.inotify {
        wd.push(watch_entry(view, watch, &mut mounts)?);
    }
    let entry = InotifyFileEntry { id, flags: view.flags, fown: view.owner()?, wd };
    collector.push(FileEntry {
        r#type: FdTypes::Inotify as i32,
        id,
        ify: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Inotify))
}

fn watch_entry(
    view: &View<'_>,
    watch: &InotifyWatch,
    mounts: &mut Option<Vec<u8>>,
) -> Result<InotifyWdEntry, Problem> {
    let unknown = |why: String| {
        view.problem(format!(
            "the path of watch {} (inode {} of device {}:{}) cannot be found out: {why}",
            watch.wd,
            watch.ino,
            watch.sdev.major(),
            watch.sdev.minor()
        ))
        .remedy("end the watch for the time of the dump")
    };
    let Some(handle) = &watch.handle else {
        return Err(unknown("its file system has no file handles".into()));
    };
    if mounts.is_none() {
        let read = std::fs::read(format!("/proc/{}/mountinfo", view.pid));
        *mounts = Some(read.map_err(|e| unknown(e.to_string()))?);
    }
    let mounts = mounts.as_deref().unwrap_or_default();
    let path = path_of(watch, handle, mounts).map_err(unknown)?;
    let mut words = vec![0u64; HANDLE_WORDS];
    for (word, bytes) in words.iter_mut().zip(handle.bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    Ok(InotifyWdEntry {
        id: 0,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: watch.ignored_mask,
        s_dev: watch.sdev.0,
        wd: watch.wd as u32,
        f_handle: FhEntry {
            bytes: handle.bytes.len() as u32,
            r#type: handle.handle_type,
            handle: words,
            path: Some(path),
            mnt_id: None,
        },
    })
}

/// A path that leads to the watched inode.
fn path_of(watch: &InotifyWatch, handle: &FileHandle, mountinfo: &[u8]) -> Result<Vec<u8>, String> {
    let mounts = rewake_proc::mountinfo::parse(mountinfo).map_err(|e| e.to_string())?;
    let device = (watch.sdev.major(), watch.sdev.minor());
    let mut why = "no mount of its file system can be reached".to_string();
    for mount in mounts.iter().filter(|m| m.dev == device) {
        // Not O_PATH: open_by_handle_at wants an open file.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(root) = rustix::fs::open(&*mount.mount_point, flags, Mode::empty()) else {
            continue;
        };
        let opened =
            descriptors::open_by_handle(root.as_fd(), handle.handle_type as i32, &handle.bytes);
        let file = match opened {
            Ok(file) => file,
            Err(e) => {
                why = e.to_string();
                continue;
            }
        };
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())
            .map_err(|e| e.to_string())?;
        // It may be below another mount's root, or removed.
        let same = |s: rustix::fs::Stat| {
            s.st_ino == watch.ino
                && (rustix::fs::major(s.st_dev), rustix::fs::minor(s.st_dev)) == device
        };
        if rustix::fs::lstat(&link).is_ok_and(same) {
            return Ok(link.into_bytes());
        }
        why = format!("{} is not its path any more", text(link.as_bytes()));
    }
    Err(why)
}

/// Makes an inotify instance of the image with its watches.
///
/// # Errors
/// A watched file is gone.
pub fn open(entry: &InotifyFileEntry) -> Result<OwnedFd, Problem> {
    let object = || format!("inotify {}", entry.id);
    let failed = |e: rustix::io::Errno| Problem::new(object(), e.to_string());
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed)?;
    let mut watches: Vec<&InotifyWdEntry> = entry.wd.iter().collect();
    watches.sort_by_key(|w| w.wd);
    // Watched to use up numbers: a file that nobody else watches and that costs nothing to watch.
    let memfd =
        rustix::fs::memfd_create("rewake", rustix::fs::MemfdFlags::CLOEXEC).map_err(failed)?;
    let filler = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let mut last = 0;
    for watch in watches {
        last = add(&fd, watch, last, &filler).map_err(|reason| Problem::new(object(), reason))?;
    }
    // What the numbers skipped above left behind (IN_IGNORED), and nothing else that anybody waits for.
    let mut buffer = [0; 4096];
    while rustix::io::read(&fd, &mut buffer).is_ok_and(|n| n > 0) {}
    rustix::fs::fcntl_setfl(&fd, OFlags::empty()).map_err(failed)?;
    Ok(fd)
}

/// Adds `watch` after the one with number `last`; returns its number.
fn add(fd: &OwnedFd, watch: &InotifyWdEntry, last: i32, filler: &str) -> Result<i32, String> {
    let wanted = i32::try_from(watch.wd).map_err(|_| format!("watch {} is no number", watch.wd))?;
    if wanted - last > MOST_SKIPPED {
        return Err(format!("watch {wanted} has a number that cannot be reached"));
    }
    let failed = |e: rustix::io::Errno| format!("watch {wanted} cannot be added: {e}");
    let taken = |got| format!("watch {wanted} got the number {got}");
    // Numbers count up (idr_alloc_cyclic), also over those that are free again.
    for skipped in last + 1..wanted {
        let got = inotify::add_watch(fd, filler, WatchFlags::OPEN).map_err(failed)?;
        if got != skipped {
            return Err(taken(got));
        }
        inotify::remove_watch(fd, got).map_err(failed)?;
    }
    let target = target(watch)?;
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    let flags = WatchFlags::from_bits_retain(watch.mask & ASKABLE);
    match inotify::add_watch(fd, &path, flags).map_err(failed)? {
        got if got == wanted => Ok(got),
        got if got <= last => Err(format!("watches {got} and {wanted} are of the same file now")),
        got => Err(taken(got)),
    }
}

/// The file to watch: by its path if that leads to the same inode, else by its handle.
fn target(watch: &InotifyWdEntry) -> Result<OwnedFd, String> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path = watch.f_handle.path.as_deref();
    if let Some(path) = path
        && let Ok(file) = rustix::fs::open(path, flags, Mode::empty())
    {
        // On another machine, or from a copy, the inode is another one, but the path is what was meant.
        return Ok(file);
    }
    let bytes: Vec<u8> = watch.f_handle.handle.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let handle = bytes.get(..watch.f_handle.bytes as usize).ok_or("its file handle is cut off")?;
    let mountinfo = std::fs::read("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let mounts = rewake_proc::mountinfo::parse(&mountinfo).map_err(|e| e.to_string())?;
    let device = (watch.s_dev >> 20, watch.s_dev & 0xf_ffff);
    let name = || path.map_or_else(|| format!("inode {}", watch.i_ino), text);
    let mut why = "no mount of its file system can be reached".to_string();
    for mount in mounts.iter().filter(|m| m.dev == device) {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(root) = rustix::fs::open(&*mount.mount_point, flags, Mode::empty()) else {
            continue;
        };
        match descriptors::open_by_handle(root.as_fd(), watch.f_handle.r#type as i32, handle) {
            Ok(file) => return Ok(file),
            Err(e) => why = e.to_string(),
        }
    }
    Err(format!("the watched file ({}) cannot be found: {why}", name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_get_their_numbers_and_no_events_stay() {
        let path = std::env::temp_dir();
        let watch = |wd| InotifyWdEntry {
            wd,
            mask: 0x0800_0000 | libc::IN_CREATE,
            f_handle: FhEntry {
                path: Some(if wd == 7 { path.to_str().unwrap().into() } else { "/proc".into() }),
                ..FhEntry::default()
            },
            ..InotifyWdEntry::default()
        };
        let entry = InotifyFileEntry { wd: vec![watch(7), watch(3)], ..Default::default() };
        let fd = open(&entry).unwrap();
        let info = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        let info = rewake_proc::fdinfo::parse(&info).unwrap();
        let found: Vec<_> = info.inotify.iter().map(|w| (w.wd, w.mask)).collect();
        assert_eq!(found, [(7, libc::IN_CREATE), (3, libc::IN_CREATE)]);
        assert_eq!(rustix::io::ioctl_fionread(&fd).unwrap(), 0);
    }

    #[test]
    fn a_watch_without_its_file_is_refused() {
        let watch = InotifyWdEntry { wd: 1, i_ino: 99, ..InotifyWdEntry::default() };
        let entry = InotifyFileEntry { wd: vec![watch], ..Default::default() };
        assert!(open(&entry).unwrap_err().reason.contains("inode 99"));
    }
}
