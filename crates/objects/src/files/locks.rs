//! File locks: flock(2), record locks of processes and of open file descriptions (fcntl(2)), leases.
//!
//! What is locked is told by the `lock:` lines of `fdinfo`: those of a description for each of its descriptors, a
//! process's record locks for the descriptor by which it took them. For large trees `/proc/locks` tells which files need looking at.
//! A restore has the tasks take their locks again, each by its own agent, when all else is in its place.

use super::collect::{Collector, View};
use crate::Problem;
use crate::problem::text;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::FileLockEntry;
use rewake_proc::locks::{Lock, LockKind, LockType};
use rewake_proc::read::ProcRoot;
use rewake_sys::Errno;
use rustix::fs::Stat;
use rustix::process::{Flock, FlockType};
use std::collections::{HashMap, HashSet};

/// `FileLockEntry::flag`.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;

/// Inode number of the first PID namespace: whose `/proc/locks` tells all locks.
const INITIAL_PIDNS: u64 = 0xefff_fffc;

/// The locks of a tree.
#[derive(Debug, Default)]
pub struct Survey {
    /// Inode numbers of locked files; `None` if the listing may lack some, or was not read.
    listed: Option<HashSet<u64>>,
    /// Inode numbers of files with leases, as far as they are told.
    leased: HashSet<u64>,
    /// `filelocks.img`.
    pub entries: Vec<FileLockEntry>,
    /// Places in `entries` of locks that descriptions have, by file id, kind and first byte.
    of_files: HashMap<(u32, u32, i64), usize>,
    /// Record locks of processes that are noted: process, device, inode, first byte.
    of_processes: HashSet<(i32, u64, u64, i64)>,
}

impl Survey {
    /// Reads which files are locked now, if that pays: whoever reads `/proc/locks` after a while makes the kernel wait for a
    /// grace period of RCU, 10 to 20 ms, and to ask one file takes 9 µs. The tree has to stand still.
    /// `descriptors` are those of which the kernel has not told this already; `leased` are the inode numbers of files with
    /// leases of which it has.
    #[must_use]
    pub fn begin(descriptors: usize, leased: HashSet<u64>) -> Survey {
        const ONE_BY_ONE: usize = 1500;
        if descriptors <= ONE_BY_ONE {
            return Survey { leased, ..Survey::default() };
        }
        let locks = listing();
        let inode = |lock: &Lock| lock.file.map(|(_, _, inode)| inode);
        let leases = locks.iter().flatten().filter(|lock| lock.kind == LockKind::Lease);
        let leased = leased.into_iter().chain(leases.filter_map(inode)).collect();
        let listed = locks.as_ref().map(|locks| locks.iter().filter_map(inode).collect());
        // Elsewhere the locks of a process that is gone or outside are not listed, though its children have them.
        let all = rustix::fs::stat("/proc/self/ns/pid").is_ok_and(|s| s.st_ino == INITIAL_PIDNS);
        Survey { listed: listed.filter(|_| all), leased, ..Survey::default() }
    }

    /// Is there a lease on a file with this number, as far as that was looked for?
    #[must_use]
    pub fn is_leased(&self, inode: u64) -> bool {
        self.leased.contains(&inode)
    }

    /// May this file be locked? By its number only: devices are not called the same everywhere.
    fn may_be_locked(&self, view: &View<'_>) -> bool {
        if view.flags & libc::O_PATH as u32 != 0 {
            return false;
        }
        if let Some(told) = view.told {
            return told.locked;
        }
        match &self.listed {
            Some(inodes) => inodes.contains(&view.stat.st_ino),
            None => {
                let kind = view.stat.st_mode & libc::S_IFMT;
                view.link.starts_with(b"/") && kind != libc::S_IFSOCK
            }
        }
    }

    /// Has no process a record lock on this file? As the file's description has no lock either, whoever else has it has none.
    #[must_use]
    pub fn is_free(&self, view: &View<'_>) -> bool {
        use libc::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, PROC_SUPER_MAGIC};
        use libc::{TMPFS_MAGIC, XFS_SUPER_MAGIC};
        const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
        // Elsewhere the question may go to a server, which may be a process that stands still.
        const LOCAL: [i64; 7] = [
            BTRFS_SUPER_MAGIC,
            DEVPTS_SUPER_MAGIC,
            EXT4_SUPER_MAGIC,
            OVERLAYFS_SUPER_MAGIC,
            PROC_SUPER_MAGIC,
            TMPFS_MAGIC,
            XFS_SUPER_MAGIC,
        ];
        if !self.may_be_locked(view) {
            return true;
        }
        let local = rustix::fs::fstatfs(view.as_fd()).is_ok_and(|fs| LOCAL.contains(&fs.f_type));
        let all = Flock::from(FlockType::WriteLock);
        local && rustix::process::fcntl_getlk(view.as_fd(), &all).is_ok_and(|lock| lock.is_none())
    }
}

fn listing() -> Option<Vec<Lock>> {
    let mut buffer = Vec::new();
    let read = ProcRoot::open().map_err(|e| e.to_string()).and_then(|proc| {
        let listing = proc.read("locks", &mut buffer).map_err(|e| e.to_string())?;
        rewake_proc::locks::parse(listing).map_err(|e| e.to_string())
    });
    read.inspect_err(|e| log::debug!("file locks: {e}")).ok()
}

/// The locks that come with a descriptor.
///
/// # Errors
/// They are not to be saved (`--file-locks`), or cannot be.
pub fn of(collector: &Collector, view: &View<'_>) -> Result<Vec<FileLockEntry>, Problem> {
    if !collector.locks.may_be_locked(view) {
        return Ok(Vec::new());
    }
    let fdinfo = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&fdinfo).map_err(|e| view.problem(e.to_string()))?;
    let held = info.locks.iter().filter(|lock| !lock.waiting);
    let entries = held.map(|lock| entry(view, lock)).collect::<Result<Vec<_>, _>>()?;
    match entries.first() {
        Some(lock) if !collector.options.file_locks => Err(view
            .problem(format!("it holds {} on the file", name(lock.flag)))
            .remedy("use --file-locks, if nobody takes the lock meanwhile")),
        _ => Ok(entries),
    }
}

fn entry(view: &View<'_>, lock: &Lock) -> Result<FileLockEntry, Problem> {
    let wants = |word: &[u8]| *lock.mode == *word;
    let refused = |reason: &str| {
        Err(view.problem(reason).remedy("give the lock up for the time of the dump"))
    };
    let flag = match &lock.kind {
        LockKind::Posix => POSIX,
        LockKind::Ofd => OFD,
        LockKind::Flock => FLOCK,
        LockKind::Lease if wants(b"ACTIVE") => LEASE,
        LockKind::Lease => {
            return Err(view
                .problem("its lease is being broken: another process waits until it is given up")
                .remedy("try again when the program has answered"));
        }
        LockKind::Deleg => return refused("it has a delegation, which cannot be saved"),
        LockKind::Other(word) => {
            return refused(&format!("it has a lock of an unknown kind ({})", text(word)));
        }
    };
    if flag != LEASE && !wants(b"ADVISORY") {
        return refused(&format!("its lock is a mandatory one ({})", text(&lock.mode)));
    }
    let kind = match &lock.lock_type {
        LockType::Read => READ,
        LockType::Write => WRITE,
        LockType::Unlock | LockType::Other(_) => {
            return refused("its lock is of an unknown type");
        }
    };
    if flag == LEASE && kind == WRITE && view.stat.st_nlink == 0 {
        return refused(
            "it has a write lease on a deleted file, which reading the file would break",
        );
    }
    let start = i64::try_from(lock.start);
    let len = match lock.end {
        None => Ok(0),
        Some(end) => i64::try_from(end.saturating_sub(lock.start)).map(|len| len.saturating_add(1)),
    };
    let (Ok(start), Ok(len)) = (start, len) else {
        return refused("its lock has an impossible range");
    };
    Ok(FileLockEntry { flag, r#type: kind, pid: lock.pid, fd: view.number, start, len })
}

/// Notes the locks of a descriptor whose description is file `id`: each once.
///
/// # Errors
/// No task has the descriptor.
pub fn note(
    collector: &mut Collector,
    view: &View<'_>,
    id: u32,
    locks: Vec<FileLockEntry>,
) -> Result<(), Problem> {
    let in_flight = collector.carrier.is_some();
    let survey = &mut collector.locks;
    for lock in locks {
        let taken_by = lock.pid;
        let lock = FileLockEntry { pid: view.pid, ..lock };
        if lock.flag == POSIX {
            let key = (view.pid, view.stat.st_dev, view.stat.st_ino, lock.start);
            if survey.of_processes.insert(key) {
                survey.entries.push(lock);
            }
            continue;
        }
        match survey.of_files.entry((id, lock.flag, lock.start)) {
            std::collections::hash_map::Entry::Vacant(_) if in_flight => {
                return Err(view
                    .problem(format!("it holds {}, and no process has it open", name(lock.flag)))
                    .remedy("try again once it is received"));
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(survey.entries.len());
                survey.entries.push(lock);
            }
            // Of several who share it, preferably who took it.
            std::collections::hash_map::Entry::Occupied(place) => {
                if let Some(known) = survey.entries.get_mut(*place.get())
                    && taken_by == view.pid
                    && known.pid != taken_by
                {
                    *known = lock;
                }
            }
        }
    }
    Ok(())
}

/// How error texts call a kind.
fn name(flag: u32) -> &'static str {
    match flag {
        POSIX => "a record lock (fcntl)",
        FLOCK => "a lock (flock)",
        OFD => "a record lock of an open file description (fcntl)",
        LEASE => "a lease",
        _ => "a file lock",
    }
}

/// Checks what the images say of a lock.
///
/// # Errors
/// It is of no kind that can be restored.
pub fn check(lock: &FileLockEntry) -> Result<(), Problem> {
    let bad =
        |reason: String| Err(Problem::new(format!("a lock of descriptor {}", lock.fd), reason));
    if !matches!(lock.flag, POSIX | FLOCK | OFD | LEASE) {
        return bad(format!("its kind {} is unknown", lock.flag));
    }
    if !matches!(lock.r#type, READ | WRITE) {
        let kind = name(lock.flag);
        return bad(format!(
            "{kind} of type {:#x} (mandatory, or a lease being broken) cannot be restored",
            lock.r#type
        ));
    }
    if lock.start < 0 || lock.len < 0 {
        return bad(format!("its range is impossible: {} bytes from {}", lock.len, lock.start));
    }
    Ok(())
}

/// Has the task take its locks, one operation each.
pub fn restore(steps: &mut Steps, locks: &[FileLockEntry]) {
    for lock in locks {
        let fd = lock.fd as u64;
        let op = match lock.flag {
            FLOCK => {
                let how = if lock.r#type == WRITE { libc::LOCK_EX } else { libc::LOCK_SH };
                Op::new(libc::SYS_flock, &[fd, (how | libc::LOCK_NB) as u64])
            }
            LEASE => {
                Op::new(libc::SYS_fcntl, &[fd, libc::F_SETLEASE as u64, u64::from(lock.r#type)])
            }
            flag => {
                // struct flock: type and whence, start, length, pid
                let range =
                    steps.words(&[u64::from(lock.r#type), lock.start as u64, lock.len as u64, 0]);
                let how = if flag == OFD { libc::F_OFD_SETLK } else { libc::F_SETLK };
                Op::new(libc::SYS_fcntl, &[fd, how as u64, range.address])
            }
        };
        steps.must(Label::Lock(lock.fd as u32), op);
    }
}

/// Is it a lease?
#[must_use]
pub fn is_lease(lock: &FileLockEntry) -> bool {
    lock.flag == LEASE
}

/// Can only one have it?
#[must_use]
pub fn excludes(lock: &FileLockEntry) -> bool {
    lock.r#type == WRITE
}

/// The problem that several copies of a tree cannot have a lock.
#[must_use]
pub fn only_one(lock: &FileLockEntry, path: &[u8]) -> Problem {
    let reason = format!("{} that it had can be had by one copy only", name(lock.flag));
    Problem::new(format!("fd {} ({})", lock.fd, text(path)), reason)
}

/// Why a lock could not be taken: by whom it is held, if so. `stat` and `path` are the file's.
#[must_use]
pub fn failure(lock: &FileLockEntry, errno: Errno, stat: Option<&Stat>, path: &[u8]) -> Problem {
    let object = format!("fd {} ({})", lock.fd, text(path));
    let kind = name(lock.flag);
    if !matches!(errno, Errno::AGAIN | Errno::ACCESS) {
        return Problem::new(object, format!("{kind} that it had cannot be taken: {errno}"));
    }
    if lock.flag == LEASE {
        let who = stat.and_then(|stat| openers(stat, lock.pid));
        let who = who.unwrap_or_else(|| "another file description".to_owned());
        let wants = if lock.r#type == WRITE { "" } else { " for writing" };
        return Problem::new(
            object,
            format!("its lease cannot be taken: the file is open{wants} elsewhere too ({who})"),
        )
        .remedy("close the file there")
        .contested();
    }
    let holder = stat.and_then(|stat| holder(lock, stat).or_else(|| openers(stat, lock.pid)));
    let holder = holder.unwrap_or_else(|| "somebody else".to_owned());
    Problem::new(object, format!("{kind} that it had is taken by {holder}"))
        .remedy("end who holds the lock, or have it given up")
        .contested()
}

/// Who holds a lock that is in the way, as `/proc/locks` has it.
fn holder(lock: &FileLockEntry, stat: &Stat) -> Option<String> {
    let in_the_way = |other: &Lock| is_in_the_way(other, lock) && is_of(other, stat);
    let found = listing()?.into_iter().find(|other| in_the_way(other) && other.pid > 0)?;
    comm(found.pid).map(|comm| format!("process {} ({comm})", found.pid))
}

fn is_of(lock: &Lock, stat: &Stat) -> bool {
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    lock.file.is_some_and(|(major, minor, inode)| (major, minor) == device && inode == stat.st_ino)
}

fn is_in_the_way(other: &Lock, lock: &FileLockEntry) -> bool {
    let end = match lock.len {
        0 => u64::MAX,
        len => (lock.start as u64).saturating_add(len as u64 - 1),
    };
    let comparable = match lock.flag {
        FLOCK => other.kind == LockKind::Flock,
        POSIX | OFD => matches!(other.kind, LockKind::Posix | LockKind::Ofd),
        _ => false,
    };
    let overlap = other.start <= end && lock.start as u64 <= other.end.unwrap_or(u64::MAX);
    let exclusive = lock.r#type == WRITE || other.lock_type == LockType::Write;
    comparable && overlap && exclusive && !other.waiting
}

/// The locks that are held on this machine, for [`Held::check`].
#[derive(Debug)]
pub struct Held(Vec<Lock>);

impl Held {
    /// Reads them.
    #[must_use]
    pub fn read() -> Held {
        Held(listing().unwrap_or_default())
    }

    /// Looks for what is in the way of a lock, or of opening the file that is locked: opening would break a lease.
    ///
    /// # Errors
    /// Somebody holds a lock or a lease on the file.
    pub fn check(&self, lock: &FileLockEntry, path: &[u8], flags: u32) -> Result<(), Problem> {
        // Whatever else is wrong with it is told when it is opened.
        let Ok(stat) = rustix::fs::stat(path) else { return Ok(()) };
        let writes = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        for other in self.0.iter().filter(|other| is_of(other, &stat)) {
            if is_in_the_way(other, lock) {
                return Err(failure(lock, Errno::AGAIN, Some(&stat), path));
            }
            let leased = other.kind == LockKind::Lease && !other.waiting;
            if leased && (writes || other.lock_type == LockType::Write) {
                let who = comm(other.pid).map(|comm| format!(" by process {} ({comm})", other.pid));
                return Err(Problem::new(
                    format!("fd {} ({})", lock.fd, text(path)),
                    format!("there is a lease on the file{}", who.unwrap_or_default()),
                )
                .remedy("end who holds the lease, or have it given up")
                .contested());
            }
        }
        Ok(())
    }
}

fn comm(pid: i32) -> Option<String> {
    let comm = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(text(comm.trim_ascii_end()))
}

/// The processes that have a file open besides `but` and ourselves: for errors only, since it reads all of `/proc`.
fn openers(stat: &Stat, but: i32) -> Option<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if pid == but || pid == std::process::id() as i32 {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let same = |d: std::fs::DirEntry| {
            rustix::fs::stat(d.path())
                .is_ok_and(|s| (s.st_dev, s.st_ino) == (stat.st_dev, stat.st_ino))
        };
        if descriptors.flatten().any(same) {
            found.push(format!("{pid} ({})", comm(pid).unwrap_or_default()));
        }
    }
    match found.as_slice() {
        [] => None,
        [one] => Some(format!("process {one}")),
        many => Some(format!("one of the processes {}", many.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(flag: u32, kind: u32, start: i64, len: i64) -> FileLockEntry {
        FileLockEntry { flag, r#type: kind, pid: 1, fd: 5, start, len }
    }

    #[test]
    fn impossible_locks_are_refused() {
        for good in [lock(FLOCK, READ, 0, 0), lock(POSIX, WRITE, 5, 10), lock(LEASE, WRITE, 0, 0)] {
            assert_eq!(check(&good), Ok(()));
        }
        let bad = [lock(3, READ, 0, 0), lock(LEASE, WRITE | 4, 0, 0), lock(FLOCK, 2, 0, 0)];
        for bad in bad.iter().chain(&[lock(OFD, READ, -1, 0), lock(OFD, READ, 0, -1)]) {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_lock_is_one_operation() {
        let mut steps = Steps::new(0x1000);
        let locks = [lock(FLOCK, WRITE, 0, 0), lock(OFD, READ, 7, 3), lock(LEASE, READ, 0, 0)];
        restore(&mut steps, &locks);
        let ops = &steps.script.ops;
        assert_eq!(ops.len(), 3);
        assert_eq!(ops[0].args[..2], [5, (libc::LOCK_EX | libc::LOCK_NB) as u64]);
        assert_eq!(ops[1].args[..2], [5, libc::F_OFD_SETLK as u64]);
        assert_eq!(ops[2].args[..3], [5, libc::F_SETLEASE as u64, 0]);
    }

    #[test]
    fn a_holder_is_named() {
        let path = std::env::temp_dir().join(format!("rewake-lock-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        std::fs::remove_file(&path).unwrap();
        let wanted = lock(FLOCK, READ, 0, 0);
        let told = failure(&wanted, Errno::AGAIN, Some(&stat), b"/file").reason;
        let own = format!("is taken by process {} (", std::process::id());
        assert!(told.contains(&own), "{told}");
        let told = failure(&wanted, Errno::BADF, Some(&stat), b"/file").reason;
        assert!(told.contains("cannot be taken"), "{told}");
    }
}
