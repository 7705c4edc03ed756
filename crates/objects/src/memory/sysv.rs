//! System V shared memory segments: shmget(2), shmat(2), `ipcns-shm-N.img`.
//!
//! A segment belongs to its IPC namespace and not to those who map it. It can be saved if only the tree maps it (whoever
//! else did would see it replaced by another one), and stays when the tree is killed unless it is marked for removal. A
//! restore takes such a leftover over if nobody maps it, and otherwise makes the segment again under its id.

use super::contents;
use super::vma::{Vma, status};
use super::{PAGE, hugetlb};
use crate::Problem;
use crate::files::collect::{Collector, Contents};
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{IpcDescEntry, IpcShmEntry, RewakeSegmentEntry, VmaEntry};
use rewake_image::{ImageDir, ImageWriter, kind};
use rewake_proc::sysvipc::{self, Shm};
use rewake_sys::{Errno, shm};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// How error texts call a segment.
fn name(id: u32) -> String {
    format!("System V shared memory segment {id}")
}

/// All segments of our IPC namespace.
fn list() -> Result<Vec<Shm>, Problem> {
    const FILE: &str = "/proc/sysvipc/shm";
    let text = std::fs::read(FILE).map_err(|e| Problem::new(FILE, e.to_string()))?;
    sysvipc::shm(&text).map_err(|e| Problem::new(FILE, e.to_string()))
}

/// A segment that tasks of the tree have mapped.
#[derive(Debug)]
struct Seen {
    /// Mappings in the tree.
    mappings: u64,
    /// The first process that maps it.
    pid: i32,
    /// The memory as a file.
    file: OwnedFd,
    /// That is a copy, which stays as it is.
    kept: bool,
    /// What the last page holds beyond the size.
    tail: Vec<u8>,
    /// What the kernel tells of it; filled in when all tasks have been looked at.
    shm: Shm,
}

/// The tree's segments by id.
#[derive(Debug, Default)]
pub struct Survey {
    seen: BTreeMap<u32, Seen>,
}

/// Notes a mapping of segment `id` by process `pid`. `link` is its `/proc/PID/map_files` entry, `memory` its
/// `/proc/PID/mem`.
///
/// # Errors
/// It cannot be examined.
pub fn mapping(
    collector: &mut Collector,
    pid: i32,
    id: u32,
    vma: &Vma,
    link: &str,
    memory: &File,
) -> Result<(), Problem> {
    let failed = |e: &dyn std::fmt::Display| Problem::new(name(id), format!("{link}: {e}"));
    let seen = match collector.sysv.seen.entry(id) {
        std::collections::btree_map::Entry::Occupied(seen) => seen.into_mut(),
        std::collections::btree_map::Entry::Vacant(place) => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let file = rustix::fs::open(link, flags, Mode::empty()).map_err(|e| failed(&e))?;
            let (tail, shm) = (Vec::new(), Shm::default());
            place.insert(Seen { mappings: 0, pid, file, kept: false, tail, shm })
        }
    };
    seen.mappings += 1;
    // Its file ends where the segment does, but mappings have the whole page.
    let size = rustix::fs::fstat(&seen.file).map_err(|e| failed(&e))?.st_size as u64;
    let entry = &vma.entry;
    let mapped = entry.pgoff..entry.pgoff + (entry.end - entry.start);
    if seen.tail.is_empty() && !size.is_multiple_of(PAGE) && mapped.contains(&size) {
        let mut tail = vec![0; (size.next_multiple_of(PAGE) - size) as usize];
        memory
            .read_exact_at(&mut tail, entry.start + (size - entry.pgoff))
            .map_err(|e| failed(&e))?;
        seen.tail = tail;
    }
    Ok(())
}

/// When all tasks have been looked at: what stands in the way of saving their segments, each with a process that maps it.
pub fn judge(collector: &mut Collector) -> Vec<(i32, Problem)> {
    let mut problems = Vec::new();
    if collector.sysv.seen.is_empty() {
        return problems;
    }
    let all = match list() {
        Ok(all) => all,
        Err(problem) => {
            let first = collector.sysv.seen.values().next();
            problems.extend(first.map(|seen| (seen.pid, problem)));
            return problems;
        }
    };
    for (id, seen) in &mut collector.sysv.seen {
        let mut refuse = |reason: String, remedy: String| {
            problems.push((seen.pid, Problem::new(name(*id), reason).remedy(remedy)));
        };
        match all.iter().find(|shm| shm.id as u32 == *id) {
            None => refuse(
                "it belongs to another IPC namespace than the processes that map it".into(),
                "detach it for the time of the dump".into(),
            ),
            Some(shm) if shm.attached > seen.mappings => {
                let others = others(*id, &collector.pids);
                refuse(
                    format!(
                        "it is shared with processes outside the tree{others}, which would be left with another one"
                    ),
                    "dump a tree that has all of its users".into(),
                );
            }
            Some(shm) => seen.shm = *shm,
        }
    }
    problems
}

/// Pagemaps of segments are numbered by id, those of other shared memory by inode. Call it before they are written, when all
/// are known.
pub fn number_apart(collector: &mut Collector) {
    let numbers = collector.contents.iter_mut().filter_map(|contents| match contents {
        Contents::Shared(segment) => Some(&mut segment.entry.shmid),
        Contents::Ghost { .. } | Contents::Link { .. } => None,
    });
    contents::number_apart(&collector.sysv.seen.keys().copied().collect(), numbers);
}

/// Who else maps a segment, as part of a sentence; empty if that cannot be seen.
fn others(id: u32, tree: &HashSet<i32>) -> String {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if tree.contains(&pid) {
            continue;
        }
        let Ok(text) = std::fs::read(entry.path().join("maps")) else { continue };
        let maps = rewake_proc::maps::parse(&text).filter_map(Result::ok);
        let is_it = |m: &rewake_proc::maps::Map<'_>| {
            m.ino == u64::from(id) && matches!(m.name(), rewake_proc::maps::MapName::SysV(_))
        };
        if maps.into_iter().any(|m| is_it(&m)) {
            let comm = std::fs::read(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("{pid} ({})", crate::problem::text(comm.trim_ascii_end())));
        }
    }
    if found.is_empty() { String::new() } else { format!(": {}", found.join(", ")) }
}

impl Survey {
    /// How many segments there are: each may have a pages file.
    #[must_use]
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// How much memory they have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let stats = self.seen.values().filter_map(|seen| rustix::fs::fstat(&seen.file).ok());
        stats.map(|stat| stat.st_blocks as u64 * 512).sum()
    }

    /// The memory of each, as a file, and whether that is a copy, which stays as it is.
    pub fn files(&mut self) -> impl Iterator<Item = (&mut OwnedFd, &mut bool)> {
        self.seen.values_mut().map(|seen| (&mut seen.file, &mut seen.kept))
    }

    /// Are there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// Extra state for `rewake.img`.
    pub fn extra(&self) -> impl Iterator<Item = RewakeSegmentEntry> {
        self.seen.iter().map(|(id, seen)| RewakeSegmentEntry {
            id: *id,
            removed: (seen.shm.mode & Shm::DEST != 0).then_some(true),
            locked: (seen.shm.mode & Shm::LOCKED != 0).then_some(true),
            changed: Some(seen.shm.changed),
        })
    }
}

impl Survey {
    /// What of the segments is to be written to `pagemap-shmem-ID` and their pages: of those that are copies (`kept`), or of the
    /// others.
    pub fn sources(&self, kept: bool) -> impl Iterator<Item = contents::Source<'_>> {
        self.seen.iter().filter(move |(_, seen)| seen.kept == kept).map(|(id, seen)| {
            let huge = hugetlb::of_file(&seen.file);
            contents::Source {
                object: name(*id),
                file: seen.file.as_fd(),
                size: whole(seen.shm.size, huge),
                shmid: u64::from(*id),
                tail: &seen.tail,
                huge,
            }
        })
    }

    /// Writes `ipcns-shm-NS.img`.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn write(&self, images: &ImageWriter, ns: u32) -> Result<(), Problem> {
        let entries: Vec<IpcShmEntry> = self
            .seen
            .iter()
            .map(|(id, seen)| {
                let Shm { key, mode, size, uid, gid, cuid, cgid, .. } = seen.shm;
                let (key, mode) = (key as u32, mode & 0o777);
                IpcShmEntry {
                    desc: IpcDescEntry { key, uid, gid, cuid, cgid, mode, id: *id },
                    size,
                    in_pagemaps: Some(true),
                    hugetlb_flag: hugetlb::of_file(&seen.file).map(huge_flags),
                }
            })
            .collect();
        images
            .write_all(kind::IPCNS_SHM, ns, &entries)
            .map_err(|e| Problem::new("ipcns-shm", e.to_string()))
    }
}

/// A segment of the images.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The image's entry.
    pub entry: IpcShmEntry,
    /// Its content, if it is not in a pagemap.
    pub payload: Vec<u8>,
    /// What CRIU's format has no place for.
    pub extra: RewakeSegmentEntry,
}

/// The size of a segment in whole pages, which those who map it have; huge ones are not told of in the segment's own size.
fn whole(size: u64, huge: Option<u64>) -> u64 {
    huge.map_or(size, |page| size.next_multiple_of(page))
}

/// The flags of shmget(2) that ask for huge pages of this size.
fn huge_flags(size: u64) -> u32 {
    libc::SHM_HUGETLB as u32 | hugetlb::bits(size)
}

impl Saved {
    /// The page size, if it has huge pages.
    fn huge(&self) -> Option<u64> {
        self.entry.hugetlb_flag.filter(|f| *f != 0).and_then(hugetlb::size)
    }

    /// Its size in whole pages.
    #[must_use]
    pub fn size(&self) -> u64 {
        whole(self.entry.size, self.huge()).next_multiple_of(PAGE)
    }
}

/// Reads and checks the segments of IPC namespace `ns`.
///
/// # Errors
/// The image is damaged, or asks for something impossible.
pub fn read(
    images: &ImageDir,
    ns: u32,
    extra: &HashMap<u32, RewakeSegmentEntry>,
) -> Result<BTreeMap<u32, Saved>, Problem> {
    let failed = |e: rewake_image::ImageError| Problem::new("ipcns-shm", e.to_string());
    let mut all = BTreeMap::new();
    for (entry, payload) in images.read_with_payload(kind::IPCNS_SHM, ns).map_err(failed)? {
        let id = entry.desc.id;
        let bad = |reason: &str| Err(Problem::new(format!("{} of the images", name(id)), reason));
        if id > i32::MAX as u32 || entry.size == 0 || entry.size > i64::MAX as u64 - PAGE {
            return bad("its id or size is out of range");
        }
        if entry.hugetlb_flag.is_some_and(|f| f != 0 && hugetlb::size(f).is_none()) {
            return bad("it has pages of an impossible size");
        }
        let extra = extra.get(&id).cloned().unwrap_or_default();
        if all.insert(id, Saved { entry, payload, extra }).is_some() {
            return bad("it occurs twice");
        }
    }
    Ok(all)
}

/// Does a mapping of the images fit the segment it names?
///
/// # Errors
/// There is no such segment, or it is too small.
pub fn check(segments: &BTreeMap<u32, Saved>, vma: &VmaEntry) -> Result<(), Problem> {
    if vma.status & status::SYSVIPC == 0 {
        return Ok(());
    }
    let bad =
        |reason: String| Err(Problem::new(Label::Vma(vma.start, vma.end).to_string(), reason));
    let segment = u32::try_from(vma.shmid).ok().and_then(|id| segments.get(&id));
    let Some(segment) = segment else {
        return bad(format!("the images have no segment {}", vma.shmid));
    };
    let size = segment.size();
    let len = vma.end - vma.start;
    if vma.pgoff.checked_add(len).is_none_or(|end| end > size) {
        return bad(format!("it reaches beyond the end of segment {}", vma.shmid));
    }
    if vma.pgoff > i32::MAX as u64 {
        return bad("a part of a segment beyond 2 GiB cannot be mapped by itself".into());
    }
    Ok(())
}

/// Maps (a part of) a segment in a task; `size` is that of the whole, see [`Saved::size`].
///
/// # Errors
/// The image asks for something impossible.
pub fn attach(steps: &mut Steps, vma: &VmaEntry, size: u64) -> Result<(), Problem> {
    let (start, len) = (vma.start, vma.end - vma.start);
    let label = Label::Vma(vma.start, vma.end);
    let write = vma.prot & libc::PROT_WRITE as u32 != 0;
    let may_write = write || vma.fdflags.is_none_or(|f| f & libc::O_ACCMODE as u32 != 0);
    let flags = if may_write { 0 } else { libc::SHM_RDONLY as u64 };
    if vma.pgoff == 0 && len == size {
        let attach = Op::new(libc::SYS_shmat, &[vma.shmid, start, flags]);
        steps.must_be(label, start as i64, attach);
    } else {
        let offset = i32::try_from(vma.pgoff)
            .map_err(|_| Problem::new(label.to_string(), "its offset is out of range"))?;
        // A segment can only be attached as a whole: somewhere else, for which its own place must not be taken.
        let keep = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let reserve = Op::new(libc::SYS_mmap, &[start, len, 0, keep, u64::MAX, 0]);
        steps.must_be(label, start as i64, reserve);
        let all = steps.must(label, Op::new(libc::SYS_shmat, &[vma.shmid, 0, flags])) as u32;
        const MAYMOVE_FIXED: u64 = 3;
        let part = Op::new(libc::SYS_mremap, &[0, len, len, MAYMOVE_FIXED, start]);
        steps.must_be(label, start as i64, part.arg_result(0, all, offset));
        steps.must(label, Op::new(libc::SYS_munmap, &[0, size]).arg_result(0, all, 0));
    }
    let given = libc::PROT_READ as u32 | if may_write { libc::PROT_WRITE as u32 } else { 0 };
    if vma.prot != given {
        steps.must(label, Op::new(libc::SYS_mprotect, &[start, len, u64::from(vma.prot)]));
    }
    Ok(())
}

/// Segments that are there for a restore; dropping it removes those that were made.
#[derive(Debug, Default)]
pub struct Raised {
    made: Vec<i32>,
    /// To be marked for removal once they are mapped.
    marked: Vec<i32>,
}

impl Raised {
    /// Call it when all tasks have mapped what they map.
    ///
    /// # Errors
    /// The kernel does not mark a segment for removal.
    pub fn settle(&mut self) -> Result<(), Problem> {
        for id in self.marked.drain(..) {
            shm::remove(id).map_err(|e| Problem::new(name(id as u32), e.to_string()))?;
            self.made.retain(|made| *made != id);
        }
        Ok(())
    }

    /// Lets them stay: the restore has succeeded.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        for id in self.made.drain(..) {
            let _ = shm::remove(id);
        }
    }
}

/// Makes the segments of the images, or takes over those that a dump has left, and fills them.
///
/// # Errors
/// An id or key is taken, or memory does not suffice.
pub fn raise(images: &ImageDir, segments: &BTreeMap<u32, Saved>) -> Result<Raised, Problem> {
    let mut raised = Raised::default();
    if segments.is_empty() {
        return Ok(raised);
    }
    let present = list()?;
    for (id, saved) in segments {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            Problem::new(name(*id), format!("it cannot be {what}: {e}"))
        };
        let desc = &saved.entry.desc;
        let number = *id as i32;
        let left = present.iter().find(|shm| shm.id == number);
        match left {
            Some(shm) if is_leftover(shm, saved) => {}
            Some(shm) => return Err(taken(shm)),
            None => {
                let made = make(saved)?;
                raised.made.push(made);
                if made != number {
                    return Err(Problem::new(
                        name(*id),
                        format!("the kernel gave it the id {made} instead, because somebody else made one meanwhile or has its place"),
                    )
                    .remedy("try again, or remove segments that nobody uses (ipcs -m, ipcrm -m ID)"));
                }
            }
        }
        let attached =
            shm::Attached::new(number, saved.size()).map_err(|e| failed("attached", &e))?;
        if left.is_some() {
            attached.clear().map_err(|e| failed("emptied", &e))?;
        }
        fill(images, saved, &attached)?;
        drop(attached);
        shm::set_owner(number, desc.uid, desc.gid, desc.mode)
            .map_err(|e| failed("given to its owner", &e))?;
        if saved.extra.locked == Some(true) {
            shm::lock(number).map_err(|e| failed("locked", &e))?;
        }
        if saved.extra.removed == Some(true) {
            raised.marked.push(number);
        }
    }
    Ok(raised)
}

/// Adds the huge pages that segments need, unless they are there already.
///
/// # Errors
/// `/proc` does not tell of segments.
pub fn add_needs(
    segments: &BTreeMap<u32, Saved>,
    needs: &mut hugetlb::Needs,
) -> Result<(), Problem> {
    let present = if segments.values().any(|s| s.huge().is_some()) { list()? } else { Vec::new() };
    let is_there = |id: u32| present.iter().any(|shm| shm.id == id as i32);
    for (_, saved) in segments.iter().filter(|(id, _)| !is_there(**id)) {
        if let Some(page) = saved.huge() {
            needs.add_reserved(page, saved.size());
        }
    }
    Ok(())
}

/// Is this the segment of the images, left by a tree that is gone?
fn is_leftover(shm: &Shm, saved: &Saved) -> bool {
    let desc = &saved.entry.desc;
    let same = shm.key as u32 == desc.key
        && shm.size == saved.entry.size
        && (shm.uid, shm.gid, shm.cuid, shm.cgid) == (desc.uid, desc.gid, desc.cuid, desc.cgid);
    // Somebody who has made another one like it, and is about to map it, lives.
    let gone = || !std::path::Path::new(&format!("/proc/{}", shm.creator)).exists();
    same && shm.attached == 0 && (saved.extra.changed == Some(shm.changed) || gone())
}

/// Why an id cannot be had.
fn taken(shm: &Shm) -> Problem {
    let users = match shm.attached {
        0 => "nobody maps it".to_owned(),
        1 => "it is mapped once".to_owned(),
        n => format!("it is mapped {n} times"),
    };
    Problem::new(
        name(shm.id as u32),
        format!("there is one with this id already, made by process {}; {users}", shm.creator),
    )
    .remedy(format!("end its users, and remove it if it is not needed: ipcrm -m {}", shm.id))
}

/// Makes a segment, under its id if the kernel has that free.
fn make(saved: &Saved) -> Result<i32, Problem> {
    const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";
    let desc = &saved.entry.desc;
    std::fs::write(NEXT_ID, desc.id.to_string()).map_err(|e| {
        Problem::new(name(desc.id), format!("its id cannot be asked for: {NEXT_ID}: {e}")).remedy(
            "run rewake with CAP_CHECKPOINT_RESTORE, on a kernel with CONFIG_CHECKPOINT_RESTORE",
        )
    })?;
    let new = shm::New {
        key: desc.key as i32,
        size: saved.entry.size,
        flags: (desc.mode & 0o777 | saved.huge().map_or(0, huge_flags)) as i32,
        creator: (desc.cuid, desc.cgid),
    };
    shm::create(&new).map_err(|e| {
        let problem = |reason: String| Problem::new(name(desc.id), reason);
        match e.errno {
            Errno::EXIST => problem(format!("another segment has its key {:#x}", desc.key))
                .remedy("end its users and remove it: ipcs -m, ipcrm -M KEY"),
            Errno::NOSPC => {
                problem("no more segments can be made (kernel.shmmni, kernel.shmall)".into())
            }
            Errno::INVAL => {
                problem(format!("its size of {} bytes is above kernel.shmmax", saved.entry.size))
            }
            Errno::NOMEM => problem(format!("no memory for {} bytes", saved.entry.size)),
            _ => problem(format!("it cannot be made: {e}")),
        }
    })
}

/// Brings the contents back; the segment is all zeros.
fn fill(images: &ImageDir, saved: &Saved, attached: &shm::Attached) -> Result<(), Problem> {
    let id = saved.entry.desc.id;
    let failed =
        |e: &dyn std::fmt::Display| Problem::new(name(id), format!("it cannot be filled: {e}"));
    if saved.entry.in_pagemaps != Some(true) {
        let memory = rustix::fs::memfd_create("payload", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| failed(&e))?;
        let memory = File::from(memory);
        let len = saved.payload.len().min(saved.entry.size as usize);
        memory.write_all_at(&saved.payload[..len], 0).map_err(|e| failed(&e))?;
        return read_into(attached, &memory, 0, 0, len as u64).map_err(|e| failed(&e));
    }
    let stored = images.stored_pages_shmem(u64::from(id)).map_err(|e| failed(&e))?;
    let stored = stored.unwrap_or_default();
    let mut files = HashMap::new();
    for store in stored.stores() {
        files.insert(store, images.open_store(store).map_err(|e| failed(&e))?);
    }
    for run in &stored.runs {
        if run.vaddr.checked_add(run.bytes()).is_none_or(|end| end > saved.size()) {
            return Err(failed(&"the image has pages beyond its end"));
        }
        read_into(attached, &files[&run.store], run.offset, run.vaddr, run.bytes())
            .map_err(|e| failed(&e))?;
    }
    Ok(())
}

/// Reads `len` bytes of a file into a segment.
fn read_into(
    attached: &shm::Attached,
    file: &File,
    offset: u64,
    at: u64,
    len: u64,
) -> Result<(), String> {
    let mut done = 0;
    while done < len {
        let part = (len - done).min(1 << 30) as usize;
        let got = attached.fill(file, offset + done, at + done, part).map_err(|e| e.to_string())?;
        if got == 0 {
            return Err("the pages file is too short".into());
        }
        done += got as u64;
    }
    Ok(())
}
