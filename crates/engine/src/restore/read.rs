//! Reading and checking all images before the first process exists.

use super::sharing::{self, Part};
use crate::crew::spread;
use crate::error::{Error, Result};
use crate::options::RestoreOptions;
use rewake_image::messages::{
    CoreEntry, FdinfoEntry, FsEntry, March, MmEntry, PstreeEntry, RewakeFileEntry, RewakeTaskEntry,
    RewakeThreadEntry, SignalQueueEntry, TaskCoreEntry, TaskKobjIdsEntry, ThreadCoreEntry,
    TimensEntry,
};
use rewake_image::{ImageDir, StoredPages, kind};
use rewake_objects::memory::vma::status;
use rewake_objects::memory::{PAGE, aio, lazy, mm, sysv};
use rewake_objects::task::seccomp::{self, Filters};
use rewake_objects::task::sharing::Objects;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::FileExt;

/// A thread of the images.
#[derive(Debug)]
pub struct Thread {
    /// Thread id.
    pub tid: i32,
    /// `core-TID.img`.
    pub core: CoreEntry,
    /// Its per-thread part.
    pub thread: ThreadCoreEntry,
    /// What CRIU's format has no place for.
    pub extra: Option<RewakeThreadEntry>,
    /// Its seccomp mode and filters.
    pub seccomp: seccomp::State,
}

impl Thread {
    /// The timer slack that it goes back to with 0, if the images tell it.
    #[must_use]
    pub fn default_slack(&self) -> Option<u64> {
        // 0 is nobody's, but would ask for the default of whoever sets it.
        self.extra.as_ref().and_then(|e| e.default_timer_slack).filter(|slack| *slack != 0)
    }
}

/// A living task of the images.
#[derive(Debug)]
pub struct Alive {
    /// Threads, the leader first.
    pub threads: Vec<Thread>,
    /// `mm-PID.img`, of the task that makes the memory.
    pub mm: MmEntry,
    /// Where its private pages are: `pagemap-PID.img` here and in the parents.
    pub pages: Option<StoredPages>,
    /// Those of them that come when they are touched; `None` if none do.
    pub later: Option<StoredPages>,
    /// Contexts of asynchronous I/O.
    pub aio: Vec<aio::Saved>,
    /// `fs-PID.img`, of the first that has the same.
    pub fs: FsEntry,
    /// `fdinfo-N.img`, by descriptor number.
    pub fds: Vec<FdinfoEntry>,
    /// What CRIU's format has no place for.
    pub extra: Option<RewakeTaskEntry>,
    /// Its kernel objects: tasks share those with the same numbers.
    pub objects: Objects,
}

impl Alive {
    /// Does seccomp apply to any thread?
    #[must_use]
    pub fn is_filtered(&self) -> bool {
        self.threads.iter().any(|thread| !thread.seccomp.is_off())
    }

    /// How many filters all threads have in common.
    #[must_use]
    pub fn common_filters(&self) -> usize {
        seccomp::common(self.threads.iter().map(|thread| &thread.seccomp))
    }
}

/// A task of the images.
#[derive(Debug)]
pub struct Task {
    /// Process id.
    pub pid: i32,
    /// Parent, 0 for the root.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Command name.
    pub comm: Vec<u8>,
    /// The process-wide part of the leader's core.
    pub tc: TaskCoreEntry,
    /// `None` for a zombie.
    pub alive: Option<Alive>,
    /// What it does for those it shares something with.
    pub part: Part,
}

impl Task {
    /// Is it so of a queue of signals of the process or of any of its threads?
    #[must_use]
    pub fn has_queued(&self, so: fn(&SignalQueueEntry) -> bool) -> bool {
        let threads = self.alive.iter().flat_map(|alive| &alive.threads);
        let mut queues = threads.map(|t| &t.thread.signals_p).chain([&self.tc.signals_s]).flatten();
        queues.any(so)
    }
}

/// A whole checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// Tasks, parents before children.
    pub tasks: Vec<Task>,
    /// Clocks at the dump.
    pub clocks: Option<TimensEntry>,
    /// Extra state of file descriptions by file id.
    pub file_extra: HashMap<u32, RewakeFileEntry>,
    /// System V shared memory segments by id.
    pub segments: BTreeMap<u32, sysv::Saved>,
}

impl Checkpoint {
    /// The living tasks that make their memory themselves, with their indices.
    pub fn memories(&self) -> impl Iterator<Item = (usize, &Alive)> {
        let own = self.tasks.iter().enumerate().filter(|(at, task)| task.part.memory == *at);
        own.filter_map(|(at, task)| Some((at, task.alive.as_ref()?)))
    }
}

/// `TaskCoreEntry::task_state` values.
pub const ALIVE: u32 = 1;
/// A zombie.
pub const DEAD: u32 = 2;
/// Stopped by a signal.
pub const STOPPED: u32 = 3;

/// Reads everything.
///
/// # Errors
/// An image is missing, damaged, or asks for something impossible or not yet supported.
pub fn read(images: &ImageDir, options: &RestoreOptions) -> Result<Checkpoint> {
    let inventory = images.inventory();
    if inventory.img_version == 0 {
        return Err(Error::new(format!(
            "{} holds a pre-dump, which alone cannot be restored",
            images.path().display()
        ))
        .hint("restore the directory of the final dump"));
    }
    if inventory.tcp_close == Some(true) && !options.tcp.close {
        return Err(Error::new("the images were made with --tcp-close")
            .hint("give --tcp-close to restore too"));
    }
    if inventory.allow_uprobes == Some(true) && !options.allow_uprobes {
        let what = "the images are of a program with uprobes, and may hold their breakpoints";
        return Err(Error::new(what)
            .hint("set the same probes again and give --allow-uprobes to restore too"));
    }
    let plugins = inventory.plugins_entry.as_ref().map_or(&[][..], |p| p.plugins.as_slice());
    if let Some(plugin) = plugins.first() {
        return Err(Error::new(format!(
            "the images need the plugin {}, and plugins are not supported",
            rewake_objects::problem::text(plugin)
        )));
    }
    let mut extra = Extra::default();
    let mut segments = HashMap::new();
    for entry in images.read_all(kind::REWAKE, ())? {
        if let Some(task) = entry.task {
            extra.tasks.insert(task.pid, task);
        }
        if let Some(thread) = entry.thread {
            extra.threads.insert(thread.tid, thread);
        }
        if let Some(file) = entry.file {
            extra.files.insert(file.id, file);
        }
        if let Some(segment) = entry.segment {
            segments.insert(segment.id, segment);
        }
        if entry.manifest == Some(true) && options.verify && !images.has_manifest() {
            return Err(Error::new(format!(
                "{}: it is gone",
                images.path().join(rewake_image::manifest::FILE_NAME).display()
            ))
            .hint(
                "copy it along with the images; or --no-verify, if these were changed on purpose",
            ));
        }
    }
    let filters = images.read_opt(kind::SECCOMP, ())?.unwrap_or_default();
    extra.filters = Filters::read(&filters)?;
    let pstree = images.read_all(kind::PSTREE, ())?;
    check_tree(&pstree)?;
    let root_ids = inventory.root_ids.clone().unwrap_or_default();
    /// Tasks that are worth a thread of our own.
    const ENOUGH: usize = 8;
    let read = |part: &[PstreeEntry]| {
        let tasks = part.iter().map(|entry| read_task(images, entry, &root_ids, &extra));
        tasks.collect::<Result<Vec<_>>>()
    };
    let read = spread(&pstree, ENOUGH, read)?.into_iter().flatten();
    let (mut tasks, lacks): (Vec<Task>, Vec<Lacks>) = read.unzip();
    share(images, &mut tasks, &lacks)?;
    if options.lazy_pages {
        put_off(&mut tasks);
    }
    let segments = sysv::read(images, root_ids.ipc_ns_id.unwrap_or(0), &segments)?;
    for task in &tasks {
        let mappings = task.alive.iter().flat_map(|alive| &alive.mm.vmas);
        mappings
            .into_iter()
            .try_for_each(|vma| sysv::check(&segments, vma))
            .map_err(|p| Error::of(task.pid, &task.comm, p))?;
    }
    let clocks = read_clocks(images, &pstree)?;
    Ok(Checkpoint { tasks, clocks, file_extra: extra.files, segments })
}

/// The clocks at the dump. CRIU names them after the time namespace of a tree that has its own.
fn read_clocks(images: &ImageDir, pstree: &[PstreeEntry]) -> Result<Option<TimensEntry>> {
    if let Some(clocks) = images.read_opt(kind::TIMENS, 0u32)? {
        return Ok(Some(clocks));
    }
    let Some(root) = pstree.first() else { return Ok(None) };
    let ids = images.read_opt(kind::IDS, root.pid)?;
    match ids.and_then(|ids| ids.time_ns_id) {
        Some(id) => Ok(images.read_opt(kind::TIMENS, id)?),
        None => Ok(None),
    }
}

/// What the images have of a process only under the name of another, if at all.
#[derive(Debug, Clone, Copy, Default)]
struct Lacks {
    memory: bool,
    directories: bool,
}

/// Divides the work among those that share something, and gives all of them what the images have once.
fn share(images: &ImageDir, tasks: &mut [Task], lacks: &[Lacks]) -> Result<()> {
    let objects: Vec<Option<Objects>> =
        tasks.iter().map(|t| t.alive.as_ref().map(|alive| alive.objects)).collect();
    let mut handlers: HashMap<u32, (u32, i32)> = HashMap::new();
    let mut directories: HashMap<u32, FsEntry> = HashMap::new();
    for ((at, part), lacks) in sharing::parts(&objects).into_iter().enumerate().zip(lacks) {
        let (before, rest) = tasks.split_at_mut(at);
        let Some(task) = rest.first_mut() else { continue };
        task.part = part;
        let Some(alive) = &mut task.alive else { continue };
        let Objects { vm, fs, sighand, .. } = alive.objects;
        let (memory, other) = *handlers.entry(sighand).or_insert((vm, task.pid));
        if memory != vm {
            return Err(Error::new(format!(
                "processes {other} and {} of the images share signal handlers but not memory, which no process can",
                task.pid
            )));
        }
        // Reading once more what is not there tells so as for any other file.
        let pid = task.pid as u32;
        if let Some(owner) = before.get(part.memory).and_then(|t| t.alive.as_ref()) {
            (alive.mm, alive.pages) = (owner.mm.clone(), owner.pages.clone());
        } else if lacks.memory {
            images.read_one(kind::MM, pid)?;
        }
        match directories.entry(fs) {
            Entry::Occupied(known) => alive.fs = known.get().clone(),
            Entry::Vacant(_) if lacks.directories => {
                images.read_one(kind::FS, pid)?;
            }
            Entry::Vacant(place) => {
                place.insert(alive.fs.clone());
            }
        }
    }
    Ok(())
}

/// Leaves to the pager what can come later, but for pages that the kernel touches when a thread is made ready, and those of
/// arguments and environment, which others may read at any time (`ps`): nobody but the process itself can wait for them.
fn put_off(tasks: &mut [Task]) {
    /// Of these at most.
    const WORDS: u64 = 256 << 10;
    let soon = |alive: &Alive| {
        let stack = |t: &Thread| Some(t.core.thread_info.as_ref()?.gpregs.sp);
        let rseq = |t: &Thread| Some(t.thread.rseq_entry.as_ref()?.rseq_abi_pointer);
        let threads = alive.threads.iter();
        threads.flat_map(|t| [stack(t), rseq(t)]).flatten().collect::<Vec<u64>>()
    };
    for at in 0..tasks.len() {
        if tasks[at].part.memory != at {
            continue;
        }
        let sharers = tasks.iter().filter(|task| task.part.memory == at);
        let mut soon: Vec<u64> = sharers.filter_map(|t| t.alive.as_ref()).flat_map(soon).collect();
        let Some(alive) = &mut tasks[at].alive else { continue };
        let mm = &alive.mm;
        for (start, end) in [(mm.mm_arg_start, mm.mm_arg_end), (mm.mm_env_start, mm.mm_env_end)] {
            let end = end.min(start.saturating_add(WORDS));
            soon.extend((start / PAGE * PAGE..end).step_by(PAGE as usize));
        }
        let Some(pages) = &alive.pages else { continue };
        let (now, later) = lazy::divide(&alive.mm, pages, &soon);
        if !later.runs.is_empty() {
            (alive.pages, alive.later) = (Some(now), Some(later));
        }
    }
}

/// The memory of a process, if the images have it under its own name.
pub fn read_memory(
    images: &ImageDir,
    pid: u32,
    comm: &[u8],
) -> Result<Option<(MmEntry, Option<StoredPages>)>> {
    let Some(mut memory) = images.read_opt(kind::MM, pid)? else { return Ok(None) };
    if memory.vmas.is_empty() {
        memory.vmas = images.read_all(kind::VMAS, pid)?;
    }
    // The kernel makes them anew for probes that are there.
    memory.vmas.retain(|vma| vma.status & status::UPROBES == 0);
    let pages = images.stored_pages(pid)?;
    mm::validate(&memory, pages.as_ref()).map_err(|p| Error::of(pid as i32, comm, p))?;
    Ok(Some((memory, pages)))
}

#[derive(Default)]
struct Extra {
    tasks: HashMap<u32, RewakeTaskEntry>,
    threads: HashMap<u32, RewakeThreadEntry>,
    files: HashMap<u32, RewakeFileEntry>,
    filters: Filters,
}

/// The largest pid Linux can be told to use.
const PID_MAX: u32 = 1 << 22;

fn check_tree(pstree: &[PstreeEntry]) -> Result<()> {
    let bad =
        |pid: u32, reason: &str| Err(Error::new(format!("pstree.img: process {pid}: {reason}")));
    if pstree.is_empty() {
        return Err(Error::new("pstree.img holds no process"));
    }
    let mut seen: HashSet<u32> = HashSet::new();
    let mut threads: HashSet<u32> = HashSet::new();
    for (i, entry) in pstree.iter().enumerate() {
        let PstreeEntry { pid, ppid, pgid, sid, .. } = *entry;
        if pid == 0 || [pid, ppid, pgid, sid].iter().any(|p| *p >= PID_MAX) {
            return bad(pid, "a process id is out of range");
        }
        if i == 0 && ppid != 0 {
            return bad(pid, "the root has a parent");
        }
        if i > 0 && !seen.contains(&ppid) {
            return bad(pid, &format!("its parent {ppid} is not before it in the file"));
        }
        if !seen.insert(pid) || !threads.insert(pid) {
            return bad(pid, "its id occurs twice");
        }
        for tid in entry.threads.iter().skip(1) {
            if *tid == 0 || *tid >= PID_MAX || !threads.insert(*tid) {
                return bad(pid, &format!("thread id {tid} is out of range or occurs twice"));
            }
        }
    }
    Ok(())
}

fn read_task(
    images: &ImageDir,
    entry: &PstreeEntry,
    root: &TaskKobjIdsEntry,
    extra: &Extra,
) -> Result<(Task, Lacks)> {
    let pid = entry.pid;
    let mut core = images.read_one(kind::CORE, pid)?;
    let bad = |reason: String| Error::new(format!("process {pid} of the images: {reason}"));
    if core.mtype != March::X8664 as i32 {
        return Err(bad(format!("it ran on another architecture (march {})", core.mtype)));
    }
    let tc = core.tc.take().ok_or_else(|| bad("its core has no process-wide part".into()))?;
    let mut task = Task {
        pid: pid as i32,
        ppid: entry.ppid as i32,
        pgid: entry.pgid as i32,
        sid: entry.sid as i32,
        comm: tc.comm.clone(),
        tc,
        alive: None,
        part: Part::default(),
    };
    match task.tc.task_state {
        DEAD => return Ok((task, Lacks::default())),
        ALIVE | STOPPED => {}
        other => return Err(bad(format!("its state {other} is unknown"))),
    }
    let ids = images.read_opt(kind::IDS, pid)?.or(core.ids.take());
    let ids = ids.ok_or_else(|| bad("its kernel object ids are missing".into()))?;
    refuse_namespaces(&ids, root).map_err(&bad)?;
    let mut threads = vec![read_thread(pid, core, extra)?];
    /// Threads that are worth one of our own.
    const ENOUGH: usize = 64;
    let read = |tids: &[u32]| {
        let read = |tid: &u32| read_thread(*tid, images.read_one(kind::CORE, *tid)?, extra);
        tids.iter().map(read).collect::<Result<Vec<_>>>()
    };
    let others = entry.threads.get(1..).unwrap_or(&[]);
    threads.extend(spread(others, ENOUGH, read)?.into_iter().flatten());
    if extra.filters.is_for_all(threads[0].thread.seccomp_filter) {
        let (leader, others) = threads.split_at_mut(1);
        for other in others.iter_mut().filter(|thread| thread.seccomp.is_off()) {
            other.seccomp = leader[0].seccomp.clone();
        }
    }
    let mut fds = images.read_all(kind::FDINFO, ids.files_id)?;
    fds.sort_by_key(|f| f.fd);
    if let Some(twice) = fds.windows(2).find(|w| w[0].fd == w[1].fd) {
        return Err(bad(format!("descriptor {} occurs twice", twice[0].fd)));
    }
    // NR_OPEN: no kernel has more descriptors a process.
    if fds.last().is_some_and(|f| f.fd >= 1 << 30) {
        return Err(bad("a descriptor number is out of range".into()));
    }
    let memory = read_memory(images, pid, &task.comm)?;
    let directories = images.read_opt(kind::FS, pid)?;
    let lacks = Lacks { memory: memory.is_none(), directories: directories.is_none() };
    let (mm, pages) = memory.unwrap_or_default();
    let read_ring = |store, to: &mut [u8], at| {
        let file = images.open_store(store).map_err(std::io::Error::other)?;
        file.read_exact_at(to, at)
    };
    let aio = aio::find(&mm, pages.as_ref(), read_ring)
        .map_err(|p| Error::of(task.pid, &task.comm, p))?;
    task.alive = Some(Alive {
        threads,
        mm,
        pages,
        later: None,
        aio,
        fs: directories.unwrap_or_default(),
        fds,
        extra: extra.tasks.get(&pid).cloned(),
        objects: Objects {
            vm: ids.vm_id,
            files: ids.files_id,
            fs: ids.fs_id,
            sighand: ids.sighand_id,
        },
    });
    Ok((task, lacks))
}

fn read_thread(tid: u32, mut core: CoreEntry, extra: &Extra) -> Result<Thread> {
    let thread = core
        .thread_core
        .take()
        .ok_or_else(|| Error::new(format!("core-{tid}.img has no per-thread part")))?;
    if core.thread_info.is_none() {
        return Err(Error::new(format!("core-{tid}.img has no registers")));
    }
    let mode = thread.seccomp_mode.unwrap_or(0) as u32;
    let seccomp = extra.filters.state(tid, mode, thread.seccomp_filter)?;
    Ok(Thread { tid: tid as i32, core, thread, extra: extra.threads.get(&tid).cloned(), seccomp })
}

fn refuse_namespaces(
    ids: &TaskKobjIdsEntry,
    root: &TaskKobjIdsEntry,
) -> std::result::Result<(), String> {
    let pairs = [
        ("PID", ids.pid_ns_id, root.pid_ns_id),
        ("network", ids.net_ns_id, root.net_ns_id),
        ("IPC", ids.ipc_ns_id, root.ipc_ns_id),
        ("UTS", ids.uts_ns_id, root.uts_ns_id),
        ("mount", ids.mnt_ns_id, root.mnt_ns_id),
        ("user", ids.user_ns_id, root.user_ns_id),
        ("cgroup", ids.cgroup_ns_id, root.cgroup_ns_id),
    ];
    match pairs.iter().find(|(_, theirs, own)| theirs.is_some() && theirs != own) {
        None => Ok(()),
        Some((name, ..)) => {
            Err(format!("it was in a {name} namespace of its own, which cannot be restored yet"))
        }
    }
}
