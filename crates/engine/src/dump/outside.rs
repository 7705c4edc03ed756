//! What can be seen of a stopped task from outside: `/proc`.

use super::live::Before;
use super::mappings::{self, Mappings};
use super::sharing::Owns;
use crate::error::{Context, Result};
use crate::freeze::Task;
use rewake_image::messages::VmaEntry;
use rewake_objects::Problem;
use rewake_objects::iterators::{self, files::File as Told, threads::Thread};
use rewake_objects::memory::aio;
use rewake_objects::memory::pages::{self, Run};
use rewake_objects::memory::shield::Shield;
use rewake_objects::memory::tracking::{self, Tracking};
use rewake_objects::memory::vma::{Backing, Vma, status};
use rewake_objects::task::label;
use rewake_proc::read::{ProcDir, ReadError};
use rewake_proc::status::Status;
use rewake_proc::timers::PosixTimer;
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

/// A task as `/proc` tells it.
#[derive(Debug)]
pub struct Outside {
    /// The thread that `/proc` and others are asked about: the first one that lives.
    pub tid: i32,
    /// `/proc/PID/status`.
    pub status: Status,
    /// Mappings.
    pub vmas: Vec<Vma>,
    /// Do the mappings tell which pages are shared copy-on-write?
    pub tell_shared: bool,
    /// Guard ranges.
    pub guards: Vec<VmaEntry>,
    /// Contexts of asynchronous I/O.
    pub aio: Vec<aio::Ring>,
    /// Runs of private pages that hold data; see [`Outside::survey_pages`].
    pub runs: Vec<Run>,
    /// Has them as they were, if the task runs on while they are copied.
    pub shield: Option<Arc<Shield>>,
    /// Contents of the vdso, taken before the agent's entry was put into its last page.
    pub vdso: Vec<u8>,
    /// Raw auxiliary vector.
    pub auxv: Vec<u8>,
    /// Link texts of exe, cwd and root.
    pub links: Links,
    /// Descriptor numbers, ascending; of the owner of a shared table only.
    pub fds: Vec<i32>,
    /// What the kernel has told of them, likewise, or nothing.
    pub told: Vec<Told>,
    /// What the kernel has told of its threads, of all of them or none.
    pub threads: HashMap<i32, Thread>,
    /// POSIX timers.
    pub timers: Vec<PosixTimer>,
    /// `/proc/PID/mem`.
    pub memory: Arc<File>,
    /// `/proc/PID/pagemap`.
    pub pagemap: File,
    /// Small values of `/proc`.
    pub values: Values,
    /// What it does not share with a task before it.
    pub owns: Owns,
    /// What cannot be saved.
    pub problems: Vec<Problem>,
}

/// Link texts.
#[derive(Debug, Default)]
pub struct Links {
    /// `/proc/PID/exe`.
    pub exe: Vec<u8>,
    /// `/proc/PID/cwd`.
    pub cwd: Vec<u8>,
    /// `/proc/PID/root`.
    pub root: Vec<u8>,
}

/// Small values.
#[derive(Debug, Default)]
pub struct Values {
    /// `/proc/PID/loginuid`, `None` where unset or unknown.
    pub loginuid: Option<u32>,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: Option<u32>,
    /// Nice value of the session (autogroup), of its leader only, if it is not 0.
    pub autogroup_nice: Option<i32>,
}

/// With room for so many descriptors, it pays to ask the kernel for all of them. Whatever a shell begins has room for half as many,
/// be it that it has three.
const MANY_DESCRIPTORS: u64 = 512;
/// To visit so many threads takes longer than to have the kernel tell of them all.
const MANY_THREADS: usize = 50;

/// The namespaces a task must share with us so far; time namespaces may differ.
const NAMESPACES: &[&str] = &["pid", "mnt", "net", "user", "uts", "ipc", "cgroup"];

/// Reads all of it.
///
/// # Errors
/// The task is gone or `/proc` cannot be read.
pub fn survey(
    task: &Task,
    owns: Owns,
    own_namespaces: &[Vec<u8>],
    own_vdso: &[u8],
    before: Before<'_>,
) -> Result<Outside> {
    let (pid, comm) = (task.pid(), task.comm());
    let dir = &task.dir;
    let mut buffer = Vec::with_capacity(64 * 1024);
    let mut problems = Vec::new();
    let status = dir.status(&mut buffer).of(pid, comm)?;
    // For what is looked up once.
    let many = owns.files && status.fd_size >= MANY_DESCRIPTORS;
    let tid = task.tid();
    // Where no thread can be had, the other way is taken.
    let spawn = thread::Builder::new;
    let told = many.then(|| spawn().spawn(move || iterators::files::of(tid)).ok()).flatten();
    let threads = (task.tids.len() >= MANY_THREADS)
        .then(|| spawn().spawn(move || iterators::threads::of(pid)).ok())
        .flatten();
    let Mappings { mut vmas, tell_shared } =
        mappings::survey(task, status.vm_rss.unwrap_or(0), before, &mut buffer, &mut problems)?;
    for vma in vmas.iter_mut().filter(|vma| vma.watched) {
        vma.watched = !before.covers(task, vma);
    }
    let pagemap = File::from(dir.open_file("pagemap", OFlags::RDONLY).of(pid, comm)?);
    let memory = Arc::new(File::from(dir.open_file("mem", OFlags::RDWR).of(pid, comm)?));
    tracking::judge(&pagemap, &vmas, &mut problems);
    if !owns.vm {
        // The owner tells of them.
        problems.clear();
    }
    let guards = pages::guards(&pagemap, &vmas).of(pid, comm)?;
    let mut aio = Vec::new();
    for vma in vmas.iter().filter(|v| owns.vm && v.entry.status & status::AIORING != 0) {
        aio::survey(&vma.entry, &memory).map_or_else(|p| problems.push(p), |ring| aio.push(ring));
    }
    let vdso = read_vdso(&memory, &vmas, own_vdso);
    let auxv = dir.read_single("auxv", &mut buffer).of(pid, comm)?.to_vec();
    let mut link = |name: &str| dir.link(name, &mut buffer).map(<[u8]>::to_vec);
    let links = Links {
        exe: link("exe").of(pid, comm)?,
        cwd: link("cwd").of(pid, comm)?,
        root: link("root").of(pid, comm)?,
    };
    for (name, own) in NAMESPACES.iter().zip(own_namespaces) {
        let theirs = dir.link(&format!("ns/{name}"), &mut buffer).of(pid, comm)?;
        if theirs != own {
            problems.push(
                Problem::new(
                    format!("{name} namespace {}", rewake_objects::problem::text(theirs)),
                    "it is not the one that this command runs in, and namespaces cannot be saved yet",
                )
                .remedy(format!("run rewake inside: nsenter --target {pid} --all rewake …")),
            );
        }
    }
    let told = answers(told).unwrap_or_else(|e| {
        log::debug!("process {pid}: its descriptors are looked at one by one: {e}");
        Vec::new()
    });
    let threads = answers(threads).unwrap_or_else(|e| {
        log::debug!("process {pid}: its threads are visited one by one: {e}");
        Vec::new()
    });
    let threads: HashMap<i32, Thread> = threads.into_iter().map(|t| (t.tid, t)).collect();
    let all = task.tids.iter().all(|tid| threads.contains_key(tid));
    let threads = if all { threads } else { HashMap::new() };
    let fds = match told.as_slice() {
        [] if owns.files => dir.fds().of(pid, comm)?,
        told => told.iter().map(|told| told.number).collect(),
    };
    let timers = match dir.read("timers", &mut buffer) {
        Ok(text) => rewake_proc::timers::parse(text).of(pid, comm)?,
        // Kernels without CONFIG_CHECKPOINT_RESTORE; then there are no ids to restore either.
        Err(ReadError::Absent { .. }) => Vec::new(),
        Err(e) => return Err(e).of(pid, comm),
    };
    static LABEL: std::sync::OnceLock<Option<Vec<u8>>> = std::sync::OnceLock::new();
    if let Some(own) = LABEL.get_or_init(label::own)
        && let Ok(theirs) = dir.read("attr/current", &mut buffer)
    {
        problems.extend(label::judge(own, theirs));
    }
    if status.shadow_stack.is_some_and(|s| s.shstk) {
        problems.push(Problem::new("shadow stack", "x86 shadow stacks cannot be saved yet"));
    }
    let values = values(dir, task.stat.session == pid, &mut buffer).of(pid, comm)?;
    let (runs, shield) = (Vec::new(), None);
    Ok(Outside {
        tid,
        status,
        vmas,
        tell_shared,
        guards,
        aio,
        runs,
        shield,
        pagemap,
        vdso,
        auxv,
        links,
        fds,
        told,
        threads,
        timers,
        memory,
        values,
        owns,
        problems,
    })
}

/// What a thread of ours was told, if one was begun.
fn answers<T>(
    asked: Option<thread::JoinHandle<std::result::Result<Vec<T>, String>>>,
) -> std::result::Result<Vec<T>, String> {
    let Some(asked) = asked else { return Ok(Vec::new()) };
    asked.join().unwrap_or_else(|_| Err("a thread of ours broke down".to_owned()))
}

/// The task's vdso. If a killed dump left its entry in the unused end of it, that is not saved.
fn read_vdso(memory: &File, vmas: &[Vma], own: &[u8]) -> Vec<u8> {
    let Some(vma) = vmas.iter().find(|v| v.entry.status & status::VDSO != 0) else {
        return Vec::new();
    };
    let mut bytes = vec![0; (vma.entry.end - vma.entry.start) as usize];
    if memory.read_exact_at(&mut bytes, vma.entry.start).is_err() {
        return Vec::new();
    }
    let used = own.len() - own.iter().rev().take_while(|b| **b == 0).count();
    if bytes.len() == own.len() && bytes[..used] == own[..used] { own.to_vec() } else { bytes }
}

impl Outside {
    /// Start addresses of mappings of which something is true; none if another task owns the memory.
    #[must_use]
    pub fn mappings_that(&self, is: impl Fn(&Vma) -> bool) -> Vec<u64> {
        let all = self.vmas.iter().filter(|_| self.owns.vm);
        all.filter(|v| is(v)).map(|v| v.entry.start).collect()
    }

    /// Is an agent inside, of another dump? Ours comes only after this survey.
    #[must_use]
    pub fn has_guest(&self) -> bool {
        self.vmas.iter().any(|v| v.backing == Backing::Memfd(b"rewake".to_vec()))
    }

    /// Is any of its memory registered with a userfaultfd for write protection?
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.vmas.iter().any(|v| v.watched)
    }

    /// Looks which pages hold data: after everything that may still touch memory.
    ///
    /// # Errors
    /// The task is gone.
    pub fn survey_pages(&mut self, task: &Task, tracking: Tracking<'_>) -> Result<()> {
        if !self.owns.vm {
            return Ok(());
        }
        let (pid, comm) = (task.pid(), task.comm());
        self.runs = tracking::survey(&self.pagemap, &self.vmas, tracking).of(pid, comm)?;
        if !self.tell_shared {
            pages::mark_shared(&self.pagemap, &mut self.runs).of(pid, comm)?;
        }
        Ok(())
    }
}

fn values(
    dir: &ProcDir,
    leads: bool,
    buffer: &mut Vec<u8>,
) -> std::result::Result<Values, ReadError> {
    use rewake_proc::single;
    let mut values = Values::default();
    if let Some(text) = if_there(dir.read_single("loginuid", buffer))? {
        values.loginuid = single::loginuid(text).unwrap_or(None);
    }
    if let Some(text) = if_there(dir.read_single("oom_score_adj", buffer))? {
        values.oom_score_adj = single::oom_score_adj(text).unwrap_or(0);
    }
    if let Some(text) = if_there(dir.read_single("coredump_filter", buffer))? {
        values.coredump_filter = single::coredump_filter(text).ok();
    }
    if leads && let Some(text) = if_there(dir.read_single("autogroup", buffer))? {
        values.autogroup_nice = single::autogroup_nice(text).ok().filter(|nice| *nice != 0);
    }
    Ok(values)
}

/// What a kernel may be built without is no failure if it is not there.
fn if_there(
    read: std::result::Result<&[u8], ReadError>,
) -> std::result::Result<Option<&[u8]>, ReadError> {
    match read {
        Ok(text) => Ok(Some(text)),
        Err(ReadError::Absent { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Our own namespaces, in the order of the ones that are compared.
#[must_use]
pub fn own_namespaces() -> Vec<Vec<u8>> {
    NAMESPACES
        .iter()
        .map(|name| {
            rustix::fs::readlink(format!("/proc/self/ns/{name}"), Vec::new())
                .map(std::ffi::CString::into_bytes)
                .unwrap_or_default()
        })
        .collect()
}
