//! inotify(7): watches come back with their numbers. Events that nobody has read yet are lost (the kernel cannot be given
//! them again).

use super::collect::{Collector, View};
use super::open::Opener;
use super::watched::{self, Mounts, Place, Watched};
use crate::Problem;
use rewake_image::messages::{
    FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry, RewakeDeletedWatchEntry,
};
use rewake_proc::fdinfo::InotifyWatch;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::os::fd::AsRawFd;

/// What may be asked for: events and how to watch. The kernel adds bits of its own.
const ASKABLE: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

/// Numbers that are passed over at most, at some microseconds each: more than any program gets to.
const MOST_SKIPPED: i32 = 1 << 24;

/// Surveys an inotify instance.
///
/// # Errors
/// The path of a watched file cannot be found out.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let info_text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&info_text).map_err(|e| view.problem(e.to_string()))?;
    watched::warn_of_unread(view);
    let id = collector.new_id();
    let mut mounts = Mounts::new(&collector.options.scan);
    let mut wd = Vec::with_capacity(info.inotify.len());
    for watch in &info.inotify {
        let (entry, deleted) = watch_entry(view, watch, &mut mounts)?;
        if let Some((dev, ino)) = deleted {
            let problem = view
                .problem(format!(
                    "watch {} is of a deleted file that nobody in the tree has open",
                    watch.wd
                ))
                .remedy("end the watch for the time of the dump");
            let pid = collector.holder(view);
            collector.orphans.push(Orphan { pid, id, wd: entry.wd, dev, ino, problem });
        }
        wd.push(entry);
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

/// The entry of a watch, and which file it is of if that is deleted.
fn watch_entry(
    view: &View<'_>,
    watch: &InotifyWatch,
    mounts: &mut Mounts,
) -> Result<(InotifyWdEntry, Option<(u64, u64)>), Problem> {
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
    let watched = Watched { sdev: watch.sdev, ino: watch.ino, handle: watch.handle.as_ref() };
    let (path, deleted) = match mounts.find(view, watched).map_err(unknown)? {
        Place::Path(path) => (Some(path), None),
        Place::Deleted(dev, ino) => (None, Some((dev, ino))),
    };
    let entry = InotifyWdEntry {
        id: 0,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: watch.ignored_mask,
        s_dev: watch.sdev.0,
        wd: watch.wd as u32,
        f_handle: watched::handle_entry(watch.handle.as_ref(), path),
    };
    Ok((entry, deleted))
}

/// Watches of deleted files, which wait until all descriptors are known.
#[derive(Debug)]
pub struct Orphan {
    pid: i32,
    id: u32,
    wd: u32,
    dev: u64,
    ino: u64,
    problem: Problem,
}

impl Collector {
    /// Finds descriptors of the deleted files that are watched; call it when all tasks are collected. Returns those that
    /// nobody of the tree has open, with the processes that watch them.
    pub fn deleted_watches(&mut self) -> Vec<(i32, Problem)> {
        let mut lost = Vec::new();
        for Orphan { pid, id, wd, dev, ino, problem } in std::mem::take(&mut self.orphans) {
            match self.file_of(dev, ino) {
                Some(file) => {
                    let watches = &mut self.extra_of(id).deleted_watches;
                    watches.push(RewakeDeletedWatchEntry { wd, file });
                }
                None => lost.push((pid, problem)),
            }
        }
        lost
    }
}

/// Makes an inotify instance of the image with its watches.
///
/// # Errors
/// A watched file is gone.
pub fn open(opener: &mut Opener<'_>, entry: &InotifyFileEntry) -> Result<OwnedFd, Problem> {
    let mut target = |watch: &InotifyWdEntry| target(opener, entry.id, watch);
    make(entry, &mut target)
}

/// How a watched file is found.
type Target<'a> = &'a mut dyn FnMut(&InotifyWdEntry) -> Result<OwnedFd, String>;

fn make(entry: &InotifyFileEntry, target: Target<'_>) -> Result<OwnedFd, Problem> {
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
        last = add(&fd, watch, last, &filler, target)
            .map_err(|reason| Problem::new(object(), reason))?;
    }
    // What the numbers skipped above left behind (IN_IGNORED), and nothing else that anybody waits for.
    let mut buffer = [0; 4096];
    while rustix::io::read(&fd, &mut buffer).is_ok_and(|n| n > 0) {}
    rustix::fs::fcntl_setfl(&fd, OFlags::empty()).map_err(failed)?;
    Ok(fd)
}

/// Adds `watch` after the one with number `last`; returns its number.
fn add(
    fd: &OwnedFd,
    watch: &InotifyWdEntry,
    last: i32,
    filler: &str,
    target: Target<'_>,
) -> Result<i32, String> {
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

/// The file to watch.
fn target(opener: &mut Opener<'_>, id: u32, watch: &InotifyWdEntry) -> Result<OwnedFd, String> {
    let deleted = opener.extra.get(&id).map_or(&[][..], |e| &e.deleted_watches);
    if let Some(found) = deleted.iter().find(|d| d.wd == watch.wd) {
        let file = opener.open(found.file).map_err(|p| p.to_string())?;
        return file.try_clone_to_owned().map_err(|e| e.to_string());
    }
    watched::target(opener, &watch.f_handle, watch.i_ino, watch.s_dev)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_image::messages::FhEntry;

    fn by_path(watch: &InotifyWdEntry) -> Result<OwnedFd, String> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let open = |path: &[u8]| rustix::fs::open(path, flags, rustix::fs::Mode::empty()).ok();
        watched::find_target(&open, &watch.f_handle, watch.i_ino, watch.s_dev)
    }

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
        let fd = make(&entry, &mut by_path).unwrap();
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
        assert!(make(&entry, &mut by_path).unwrap_err().reason.contains("inode 99"));
    }
}
