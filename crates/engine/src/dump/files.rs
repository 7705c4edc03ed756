//! The tree's files, gathered task by task: mappings, exe, cwd, root, descriptors.

use super::inside::Inside;
use super::outside::Outside;
use crate::error::{Error, Result};
use crate::freeze::Task;
use rewake_image::messages::{FdinfoEntry, FsEntry, MmEntry};
use rewake_objects::Problem;
use rewake_objects::files::collect::{Collector, View};
use rewake_objects::files::regular;
use rewake_objects::memory::vma::Backing;
use rewake_objects::memory::{aio, mm, shared, sysv};
use rewake_sys::file;
use rustix::fd::{AsFd, OwnedFd};
use std::cell::RefCell;
use std::sync::Arc;

/// What the images say of one task's files and memory layout.
#[derive(Debug)]
pub struct Files {
    /// `mm-PID.img`.
    pub mm: MmEntry,
    /// `fs-PID.img`.
    pub fs: FsEntry,
    /// `fdinfo-N.img`.
    pub fds: Vec<FdinfoEntry>,
}

/// Device, inode and access of a mapped file, and its id.
type Mapped = ((u32, u32), u64, Option<u32>, u32);

/// Gathers one task's files; what cannot be saved goes to `problems`.
///
/// # Errors
/// The task is gone.
pub fn survey(
    collector: &mut Collector,
    task: &Task,
    outside: &Outside,
    inside: &Inside,
    pidfd: &OwnedFd,
    problems: &mut Vec<Problem>,
) -> Result<Files> {
    let pid = task.pid();
    let mut or_report = |result: std::result::Result<u32, Problem>| match result {
        Ok(id) => id,
        Err(problem) => {
            problems.push(problem);
            0
        }
    };
    let mut layout = mm::survey(&task.stat, &inside.attributes, &outside.auxv);
    let path = |c: &mut Collector, link: &[u8], flags: u32, open: &str| {
        let name = link.strip_suffix(b" (deleted)").unwrap_or(link);
        // Several deleted files may have had one name.
        let identity = match name != link {
            true => rustix::fs::stat(open).map_or(1, |stat| stat.st_ino),
            false => 0,
        };
        regular::of_path(c, pid, name, flags, identity, open)
    };
    layout.exe_file_id =
        or_report(path(collector, &outside.links.exe, 0, &format!("/proc/{pid}/exe")));
    // Neighbouring mappings are mostly of one file: look it up once.
    let mut last: Option<Mapped> = None;
    layout.vmas = outside
        .vmas
        .iter()
        .map(|vma| {
            let mut entry = vma.entry.clone();
            let known = last.filter(|(device, inode, access, _)| {
                (*device, *inode, *access) == (vma.device, vma.inode, entry.fdflags)
            });
            let link = || format!("/proc/{pid}/map_files/{:x}-{:x}", entry.start, entry.end);
            let id = match (&vma.backing, known) {
                (Backing::None | Backing::Ring, _) => return entry,
                (Backing::SysV(id), _) => {
                    let noted = sysv::mapping(collector, pid, *id, vma, &link(), &outside.memory);
                    or_report(noted.map(|()| *id))
                }
                (_, Some((.., id))) => id,
                (Backing::File { path: name, deleted }, None) => {
                    // Several deleted files may have had one name.
                    let identity = if *deleted { vma.inode } else { 0 };
                    let flags = entry.fdflags.unwrap_or(0);
                    or_report(regular::of_path(collector, pid, name, flags, identity, &link()))
                }
                (Backing::SharedAnon, None) => {
                    let writable = entry.fdflags == Some(2);
                    or_report(shared::mapping(collector, &link(), shared::ANONYMOUS, writable))
                }
                (Backing::Memfd(name), None) => {
                    let writable = entry.fdflags == Some(2);
                    or_report(shared::mapping(collector, &link(), name, writable))
                }
            };
            last = Some((vma.device, vma.inode, entry.fdflags, id));
            entry.shmid = u64::from(id);
            entry
        })
        .collect();
    layout.vmas.extend_from_slice(&outside.guards);
    layout.aios = outside.aio.iter().map(aio::Ring::entry).collect();
    let directory = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let fs = FsEntry {
        cwd_id: or_report(path(
            collector,
            &outside.links.cwd,
            directory,
            &format!("/proc/{pid}/cwd"),
        )),
        root_id: or_report(path(
            collector,
            &outside.links.root,
            directory,
            &format!("/proc/{pid}/root"),
        )),
        umask: outside.status.umask,
    };
    let fds = descriptors(collector, task, outside, inside, pidfd, problems)?;
    // Only now it is known which descriptors are of which rings.
    for (entry, vma) in layout.vmas.iter_mut().zip(&outside.vmas) {
        if vma.backing == Backing::Ring {
            let id = collector.ring_of(vma.inode);
            match id.filter(|id| fds.iter().any(|fd| fd.id == *id)) {
                Some(id) => entry.shmid = u64::from(id),
                None => problems.push(Problem::new(
                    format!("mapping {:#x}-{:#x}", entry.start, entry.end),
                    "it is of an io_uring instance that the process has no descriptor of, or that cannot be saved",
                )),
            }
        }
    }
    Ok(Files { mm: layout, fs, fds })
}

fn descriptors(
    collector: &mut Collector,
    task: &Task,
    outside: &Outside,
    inside: &Inside,
    pidfd: &OwnedFd,
    problems: &mut Vec<Problem>,
) -> Result<Vec<FdinfoEntry>> {
    let buffer = RefCell::new(Vec::with_capacity(4096));
    let mut entries = Vec::with_capacity(outside.fds.len());
    for (number, cloexec) in outside.fds.iter().zip(&inside.cloexec) {
        let number = *number;
        match view(task, number, pidfd, &buffer, &outside.fds, |view| collector.descriptor(view)) {
            Ok((id, kind)) => entries.push(FdinfoEntry {
                id,
                flags: u32::from(*cloexec),
                r#type: kind as i32,
                fd: number as u32,
                xattr_security_selinux: None,
            }),
            Err(problem) => problems.push(problem),
        }
    }
    Ok(entries)
}

/// Looks at one descriptor of a task.
fn view<T>(
    task: &Task,
    number: i32,
    pidfd: &OwnedFd,
    buffer: &RefCell<Vec<u8>>,
    numbers: &[i32],
    look: impl FnOnce(&View<'_>) -> std::result::Result<T, Problem>,
) -> std::result::Result<T, Problem> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Problem::new(format!("fd {number}"), format!("{what}: {e}"))
    };
    let fd = rustix::process::pidfd_getfd(pidfd, number, rustix::process::PidfdGetfdFlags::empty())
        .map_err(|e| failed("cannot be examined (pidfd_getfd)", &e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed("cannot be examined (fstat)", &e))?;
    let link = match stat.st_mode & libc::S_IFMT {
        // An open socket has no other name: the link would say the same.
        libc::S_IFSOCK => format!("socket:[{}]", stat.st_ino).into_bytes(),
        _ => task
            .dir
            .link(&format!("fd/{number}"), &mut buffer.borrow_mut())
            .map_err(|e| failed("cannot be examined", &e))?
            .to_vec(),
    };
    let flags = file::flags(fd.as_fd()).map_err(|e| failed("cannot be examined", &e))?;
    let fdinfo = || {
        task.dir
            .read(&format!("fdinfo/{number}"), &mut buffer.borrow_mut())
            .map(<[u8]>::to_vec)
            .map_err(|e| failed("cannot be examined", &e))
    };
    look(&View { pid: task.pid(), number, fd, link, stat, flags, fdinfo: &fdinfo, numbers })
}

/// Processes may not share what a restore could not share again.
///
/// # Errors
/// Two tasks share an address space, a descriptor table, or the like.
pub fn refuse_sharing(tasks: &[Arc<Task>]) -> Result<()> {
    use rewake_sys::kcmp::{Kind, compare};
    let kinds = [
        (Kind::Vm, "address space"),
        (Kind::Files, "descriptor table"),
        (Kind::Fs, "working directory and umask"),
        (Kind::Sighand, "table of signal handlers"),
    ];
    for (kind, name) in kinds {
        let mut sorted: Vec<&Task> = Vec::new();
        for task in tasks.iter().filter(|t| !t.tids.is_empty()) {
            let found = sorted.binary_search_by(|other| {
                compare(other.pid(), task.pid(), kind).unwrap_or(std::cmp::Ordering::Less)
            });
            match found {
                Err(at) => sorted.insert(at, task),
                Ok(at) => {
                    let problem = Problem::new(
                        name,
                        format!(
                            "it is shared with process {} ({}) (vfork or clone), which cannot be saved yet",
                            sorted[at].pid(),
                            rewake_objects::problem::text(sorted[at].comm())
                        ),
                    );
                    return Err(Error::refused(vec![problem.of(task.pid(), task.comm())]));
                }
            }
        }
    }
    Ok(())
}
