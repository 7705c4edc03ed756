//! fanotify(7): groups with their marks on inodes, mounts and file systems. Events that nobody has read yet are lost (the
//! kernel cannot be given them again). Groups that permit or deny are refused: whoever waits for their answer waits for the
//! whole time that the program stands still, ourselves among them.

use super::collect::{Collector, View};
use super::open::Opener;
use super::watched::{self, Mounts, Place, Watched};
use crate::Problem;
use rewake_image::messages::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes,
    FileEntry, MarkType, RewakeFilesystemMarkEntry,
};
use rewake_proc::fdinfo::{FanotifyMark, FanotifyTarget};
use rewake_sys::notify;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`.
const PERMISSIONS: u64 = 0x1_0000 | 0x2_0000 | 0x4_0000 | 0x10_0000;
/// Bits of `FAN_REPORT_*` that a process without privileges must have at least one of.
const FID_BITS: u32 = 0x200 | 0x400 | 0x800 | 0x1000;
const CAP_SYS_ADMIN: u32 = 21;

/// Surveys a fanotify group.
///
/// # Errors
/// A watched file cannot be found out, or the group decides about others.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let info_text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&info_text).map_err(|e| view.problem(e.to_string()))?;
    let group = info.fanotify.ok_or_else(|| view.problem("the kernel does not tell its flags"))?;
    watched::warn_of_unread(view);
    let id = collector.new_id();
    let mut mounts = Mounts::new(&collector.options.scan);
    let mut mark = Vec::with_capacity(info.fanotify_marks.len());
    let mut filesystems = Vec::new();
    // The kernel tells the newest first.
    for found in info.fanotify_marks.iter().rev() {
        if (found.mask | found.ignored_mask) & PERMISSIONS != 0 {
            return Err(view
                .problem(
                    "this group permits or denies what others do, who would wait for its answers all the time",
                )
                .remedy("end those watches for the time of the dump"));
        }
        survey_mark(view, found, &mut mounts, &mut mark, &mut filesystems)?;
    }
    // What it may be told depends on who made the group.
    let unprivileged = group.flags & FID_BITS != 0
        && filesystems.is_empty()
        && mark.iter().all(|m| m.r#type == MarkType::Inode as i32)
        && !is_admin(view.tid);
    if unprivileged || !filesystems.is_empty() {
        let extra = collector.extra_of(id);
        extra.filesystem_marks = filesystems;
        extra.unprivileged = unprivileged.then_some(true);
    }
    let entry = FanotifyFileEntry {
        id,
        flags: view.flags,
        fown: view.owner()?,
        faflags: group.flags,
        evflags: group.event_flags,
        mark,
    };
    collector.push(FileEntry {
        r#type: FdTypes::Fanotify as i32,
        id,
        ffy: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Fanotify))
}

/// Has the process `CAP_SYS_ADMIN` in effect?
fn is_admin(pid: i32) -> bool {
    let status = rewake_proc::read::ProcDir::open(pid).and_then(|d| d.status(&mut Vec::new()));
    status.is_ok_and(|s| s.cap_eff & 1 << CAP_SYS_ADMIN != 0)
}

fn survey_mark(
    view: &View<'_>,
    found: &FanotifyMark,
    mounts: &mut Mounts,
    marks: &mut Vec<FanotifyMarkEntry>,
    filesystems: &mut Vec<RewakeFilesystemMarkEntry>,
) -> Result<(), Problem> {
    let unknown = |what: String, why: String| {
        view.problem(format!("where its mark on {what} is cannot be found out: {why}"))
            .remedy("end the watch for the time of the dump")
    };
    let mut entry = FanotifyMarkEntry {
        mflags: found.mflags,
        mask: found.mask as u32,
        ignored_mask: found.ignored_mask as u32,
        ..FanotifyMarkEntry::default()
    };
    match &found.target {
        FanotifyTarget::Inode { ino, sdev, handle } => {
            let what = || format!("inode {ino} of device {}:{}", sdev.major(), sdev.minor());
            let watched = Watched { sdev: *sdev, ino: *ino, handle: handle.as_ref() };
            let path = match mounts.find(view, watched).map_err(|why| unknown(what(), why))? {
                Place::Path(path) => path,
                Place::Deleted(..) => return Err(unknown(what(), "it is deleted".into())),
            };
            let f_handle = watched::handle_entry(handle.as_ref(), Some(path));
            entry.r#type = MarkType::Inode as i32;
            entry.s_dev = sdev.0;
            entry.ie = Some(FanotifyInodeMarkEntry { i_ino: *ino, f_handle });
        }
        FanotifyTarget::Mount(id) => {
            let path =
                mounts.directory(view, *id).map_err(|why| unknown(format!("mount {id}"), why))?;
            entry.r#type = MarkType::Mount as i32;
            entry.me = Some(FanotifyMountMarkEntry { mnt_id: *id, path: Some(path) });
        }
        FanotifyTarget::SuperBlock(sdev) => {
            let what = || format!("file system {}:{}", sdev.major(), sdev.minor());
            let path = mounts.any_directory(view, *sdev).map_err(|why| unknown(what(), why))?;
            filesystems.push(RewakeFilesystemMarkEntry {
                path,
                mflags: found.mflags,
                mask: found.mask,
                ignored_mask: found.ignored_mask,
            });
            return Ok(());
        }
        FanotifyTarget::MountNamespace(_) => {
            return Err(view
                .problem("marks on mount namespaces cannot be saved")
                .remedy("end the watch for the time of the dump"));
        }
    }
    marks.push(entry);
    Ok(())
}

/// Makes a fanotify group of the image with its marks.
///
/// # Errors
/// A watched file is gone, or the kernel refuses.
pub fn open(opener: &Opener<'_>, entry: &FanotifyFileEntry) -> Result<OwnedFd, Problem> {
    let extra = opener.extra.get(&entry.id);
    let problem = |reason: String| Problem::new(format!("fanotify {}", entry.id), reason);
    let failed = |e: rewake_sys::SyscallError| problem(e.to_string());
    let make = || notify::fanotify_init(entry.faflags | notify::FAN_CLOEXEC, entry.evflags);
    let unprivileged = extra.is_some_and(|e| e.unprivileged == Some(true));
    let fd = if unprivileged { without_admin(make)? } else { make() }.map_err(failed)?;
    for mark in &entry.mark {
        let (kind, target) = match (mark.r#type, &mark.ie, &mark.me) {
            (t, Some(ie), _) if t == MarkType::Inode as i32 => {
                (notify::MARK_INODE, watched::target(opener, &ie.f_handle, ie.i_ino, mark.s_dev))
            }
            (t, _, Some(me)) if t == MarkType::Mount as i32 => {
                (notify::MARK_MOUNT, at(opener, me.path.as_deref().unwrap_or_default()))
            }
            _ => (0, Err("one of its marks is on nothing".into())),
        };
        let target = target.map_err(problem)?;
        let masks = (u64::from(mark.mask), u64::from(mark.ignored_mask));
        add(fd.as_fd(), kind, mark.mflags, masks, target.as_fd()).map_err(failed)?;
    }
    for mark in extra.map_or(&[][..], |e| &e.filesystem_marks) {
        let target = at(opener, &mark.path).map_err(problem)?;
        let masks = (mark.mask, mark.ignored_mask);
        add(fd.as_fd(), notify::MARK_FILESYSTEM, mark.mflags, masks, target.as_fd())
            .map_err(failed)?;
    }
    Ok(fd)
}

/// In the tree's own mount namespace, if it gets one.
fn at(opener: &Opener<'_>, path: &[u8]) -> Result<OwnedFd, String> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    opener
        .open_path(Path::new(OsStr::from_bytes(path)), flags)
        .map_err(|e| format!("{}: {e}", crate::problem::text(path)))
}

/// Adds a mark: what it reports and what it ignores are asked for one after the other.
fn add(
    group: BorrowedFd<'_>,
    kind: u32,
    mflags: u32,
    (mask, ignored): (u64, u64),
    target: BorrowedFd<'_>,
) -> rewake_sys::call::Result<()> {
    // FAN_MARK_IGNORED_SURV_MODIFY and FAN_MARK_IGNORE go with what is ignored, FAN_MARK_EVICTABLE with both.
    const SURVIVES: u32 = 0x40;
    const EVICTABLE: u32 = 0x200;
    const IGNORE: u32 = 0x400;
    const IGNORED_MASK: u32 = 0x20;
    let both = kind | mflags & EVICTABLE;
    if mask != 0 || ignored == 0 {
        notify::fanotify_mark(group, both, mask, target)?;
    }
    if ignored != 0 {
        let how = if mflags & IGNORE != 0 { IGNORE } else { IGNORED_MASK };
        notify::fanotify_mark(group, both | how | mflags & SURVIVES, ignored, target)?;
    }
    Ok(())
}

/// Does something without `CAP_SYS_ADMIN` in effect, in a thread that ends with it.
fn without_admin<T: Send>(job: impl FnOnce() -> T + Send) -> Result<T, Problem> {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let failed = |reason: String| Problem::new("fanotify", reason);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            let mut sets = capabilities(None)?;
            sets.effective -= CapabilitySet::SYS_ADMIN;
            set_capabilities(None, sets)?;
            Ok(job())
        });
        let thread = thread.map_err(|e| failed(format!("no thread of its own: {e}")))?;
        let done = thread.join().map_err(|_| failed("a thread died".into()))?;
        done.map_err(|e: rustix::io::Errno| failed(format!("dropping a capability: {e}")))
    })
}
