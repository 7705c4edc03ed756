//! The tree's files, gathered task by task: mappings, exe, cwd, root, descriptors.

use super::inside::Inside;
use super::outside::Outside;
use crate::error::Result;
use crate::freeze::Task;
use rewake_image::messages::{FdinfoEntry, FsEntry, MmEntry};
use rewake_objects::files::collect::{Collector, View};
use rewake_objects::files::regular;
use rewake_objects::iterators::files::File as Told;
use rewake_objects::memory::vma::Backing;
use rewake_objects::memory::{aio, mm, shared, sysv};
use rewake_objects::{Passing, Problem};
use rewake_sys::file;
use rustix::fd::{AsFd, OwnedFd};
use std::cell::{OnceCell, RefCell};

/// What the images say of one task's files and memory layout.
#[derive(Debug)]
pub struct Files {
    /// `mm-PID.img`, unless the memory is that of a task before it.
    pub mm: Option<MmEntry>,
    /// `fs-PID.img`, unless a task before it has the same working directory, root and umask.
    pub fs: Option<FsEntry>,
    /// `fdinfo-N.img`, which those have in common that share it.
    pub fds: Vec<FdinfoEntry>,
}

/// A task as it was surveyed.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The task.
    pub task: &'a Task,
    /// What `/proc` tells.
    pub outside: &'a Outside,
    /// What it tells itself.
    pub inside: &'a Inside,
    /// A pidfd of it.
    pub pidfd: &'a OwnedFd,
}

/// Device, inode and access of a mapped file, and its id.
type Mapped = ((u32, u32), u64, Option<u32>, u32);

/// Gathers one task's files; what cannot be saved goes to `problems`. `table` is what the owner of a shared table of
/// descriptors has in it.
///
/// # Errors
/// The task is gone.
pub fn survey(
    collector: &mut Collector,
    seen: &Seen<'_>,
    table: Option<&[FdinfoEntry]>,
    problems: &mut Vec<Problem>,
) -> Result<Files> {
    let Seen { task, outside, inside, pidfd } = *seen;
    let owns = outside.owns;
    let mut mm = owns.vm.then(|| memory(collector, seen, problems));
    let fs = owns.fs.then(|| directories(collector, seen, problems));
    let fds = match table.filter(|_| !owns.files) {
        Some(table) => table.to_vec(),
        None => descriptors(collector, task, outside, inside, pidfd, problems)?,
    };
    // Only now it is known which descriptors are of which rings and sockets.
    for (entry, vma) in mm.iter_mut().flat_map(|mm| &mut mm.vmas).zip(&outside.vmas) {
        if vma.backing == Backing::Ring {
            let id = collector.ring_of(vma.inode);
            match id.filter(|id| fds.iter().any(|fd| fd.id == *id)) {
                Some(id) => entry.shmid = u64::from(id),
                // One that is waited for.
                None if problems.iter().any(|problem| problem.passing == Passing::Requests) => {}
                None => problems.push(Problem::new(
                    format!("mapping {:#x}-{:#x}", entry.start, entry.end),
                    "it is of an io_uring instance that the process has no descriptor of, or that cannot be saved",
                )),
            }
        }
    }
    for (entry, vma) in mm.iter_mut().flat_map(|mm| &mut mm.vmas).zip(&outside.vmas) {
        if vma.backing == Backing::Socket {
            match collector.ringed_socket_of(vma.inode, entry.end - entry.start) {
                Some(id) => entry.shmid = u64::from(id),
                None => problems.push(
                    Problem::new(
                        format!("mapping {:#x}-{:#x}", entry.start, entry.end),
                        "it is of a socket that the process has no descriptor of, or a part only of its rings, or of a kind that cannot be saved",
                    )
                    .remedy("unmap it for the time of the dump"),
                ),
            }
        }
    }
    Ok(Files { mm, fs, fds })
}

/// The id of a file, or 0 and a problem.
fn or_report(problems: &mut Vec<Problem>, result: std::result::Result<u32, Problem>) -> u32 {
    result.unwrap_or_else(|problem| {
        problems.push(problem);
        0
    })
}

/// The id of the file that a link of `/proc` leads to.
fn of_link(
    collector: &mut Collector,
    pid: i32,
    link: &[u8],
    flags: u32,
    open: &str,
) -> std::result::Result<u32, Problem> {
    let name = link.strip_suffix(b" (deleted)").unwrap_or(link);
    // Several deleted files may have had one name.
    let identity = match name != link {
        true => rustix::fs::stat(open).map_or(1, |stat| stat.st_ino),
        false => 0,
    };
    regular::of_path(collector, pid, name, flags, identity, open)
}

/// The layout of the address space, and the files that are mapped.
fn memory(collector: &mut Collector, seen: &Seen<'_>, problems: &mut Vec<Problem>) -> MmEntry {
    let Seen { task, outside, inside, .. } = *seen;
    let (pid, tid) = (task.pid(), outside.tid);
    let mut layout = mm::survey(&task.stat, &inside.attributes, &outside.auxv);
    let exe = of_link(collector, pid, &outside.links.exe, 0, &format!("/proc/{tid}/exe"));
    layout.exe_file_id = or_report(problems, exe);
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
            let link = || format!("/proc/{tid}/map_files/{:x}-{:x}", entry.start, entry.end);
            let id = match (&vma.backing, known) {
                (Backing::None | Backing::Ring | Backing::Socket, _) => return entry,
                (Backing::SysV(id), _) => {
                    let noted = sysv::mapping(collector, pid, *id, vma, &link(), &outside.memory);
                    noted.map(|()| *id)
                }
                (_, Some((.., id))) => Ok(id),
                (Backing::File { path: name, deleted }, None) => {
                    // Several deleted files may have had one name.
                    let identity = if *deleted { vma.inode } else { 0 };
                    let flags = entry.fdflags.unwrap_or(0);
                    regular::of_path(collector, pid, name, flags, identity, &link())
                }
                (Backing::SharedAnon, None) => {
                    let writable = entry.fdflags == Some(2);
                    shared::mapping(collector, &link(), shared::ANONYMOUS, writable)
                }
                (Backing::Memfd(name), None) => {
                    let writable = entry.fdflags == Some(2);
                    shared::mapping(collector, &link(), name, writable)
                }
            };
            let id = or_report(problems, id);
            last = Some((vma.device, vma.inode, entry.fdflags, id));
            entry.shmid = u64::from(id);
            entry
        })
        .collect();
    layout.vmas.extend_from_slice(&outside.guards);
    layout.aios = outside.aio.iter().map(aio::Ring::entry).collect();
    layout
}

/// Working directory, root, umask.
fn directories(collector: &mut Collector, seen: &Seen<'_>, problems: &mut Vec<Problem>) -> FsEntry {
    let (pid, tid) = (seen.task.pid(), seen.outside.tid);
    let links = &seen.outside.links;
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let cwd = of_link(collector, pid, &links.cwd, flags, &format!("/proc/{tid}/cwd"));
    let root = of_link(collector, pid, &links.root, flags, &format!("/proc/{tid}/root"));
    FsEntry {
        cwd_id: or_report(problems, cwd),
        root_id: or_report(problems, root),
        umask: seen.outside.status.umask,
    }
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
    for (at, (number, cloexec)) in outside.fds.iter().zip(&inside.cloexec).enumerate() {
        let number = *number;
        let told = outside.told.get(at);
        let known = match told {
            Some(told) => collector.told(outside.tid, told),
            None => collector.inherited(outside.tid, number),
        };
        let collected = match known {
            Some(found) => Ok(found),
            None => {
                let look = |view: &View<'_>| collector.descriptor(view);
                view(task, number, pidfd, &buffer, &outside.fds, told, look)
            }
        };
        match collected {
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

/// Device of all pipes that have no name.
fn pipes() -> Option<u64> {
    static DEVICE: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    *DEVICE.get_or_init(|| {
        let (end, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok()?;
        rustix::fs::fstat(end).ok().map(|stat| stat.st_dev)
    })
}

/// Looks at one descriptor of a task.
fn view<T>(
    task: &Task,
    number: i32,
    pidfd: &OwnedFd,
    buffer: &RefCell<Vec<u8>>,
    numbers: &[i32],
    told: Option<&Told>,
    look: impl FnOnce(&View<'_>) -> std::result::Result<T, Problem>,
) -> std::result::Result<T, Problem> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Problem::new(format!("fd {number}"), format!("{what}: {e}"))
    };
    let fd = rustix::process::pidfd_getfd(pidfd, number, rustix::process::PidfdGetfdFlags::empty())
        .map_err(|e| {
            let problem = failed("cannot be examined (pidfd_getfd)", &e);
            match e {
                rustix::io::Errno::MFILE => problem
                    .remedy("raise the limit of open files of this command (ulimit -Hn), which holds what is to be saved later"),
                _ => problem,
            }
        })?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed("cannot be examined (fstat)", &e))?;
    let link = match stat.st_mode & libc::S_IFMT {
        _ if told.is_some_and(|told| !told.link.is_empty()) => {
            told.map(|told| told.link.clone()).unwrap_or_default()
        }
        // An open socket or pipe has no other name: the link would say the same.
        libc::S_IFSOCK => format!("socket:[{}]", stat.st_ino).into_bytes(),
        libc::S_IFIFO if pipes() == Some(stat.st_dev) => {
            format!("pipe:[{}]", stat.st_ino).into_bytes()
        }
        _ => task
            .dir
            .link(&format!("fd/{number}"), &mut buffer.borrow_mut())
            .map_err(|e| failed("cannot be examined", &e))?
            .to_vec(),
    };
    let flags = match told {
        Some(told) => told.flags,
        None => file::flags(fd.as_fd()).map_err(|e| failed("cannot be examined", &e))?,
    };
    let known = OnceCell::new();
    let fdinfo = || {
        // Asked for by several, and dear.
        if let Some(text) = known.get() {
            return Ok(Vec::clone(text));
        }
        let text = task
            .dir
            .read_single(&format!("fdinfo/{number}"), &mut buffer.borrow_mut())
            .map(<[u8]>::to_vec)
            .map_err(|e| failed("cannot be examined", &e))?;
        Ok(known.get_or_init(|| text).clone())
    };
    let (pid, tid) = (task.pid(), task.tid());
    look(&View { pid, tid, number, fd, link, stat, flags, fdinfo: &fdinfo, numbers, told })
}
