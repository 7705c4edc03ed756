//! A dump of a tree that runs on: it stands still only for its state, and its memory is kept as it was at that instant while
//! it writes to it ([`Shield`]). See docs/decisions/0011-live-checkpoint.md.
//!
//! [`Live::begin`] stops the tree for the time it takes to make a userfaultfd in each large process; then it runs again,
//! while its pages are protected. When it is stopped for good, little is left to be done.

mod glance;
mod server;
mod twins;

use super::coming;
use super::inside;
use super::outside::Outside;
use super::survey::patiently;
use super::wave::{Own, look_at, suspend_seccomp, waves};
use crate::error::{Context, Error, Result};
use crate::freeze::{Held, Shard, Task, Tree};
use crate::options::{DumpOptions, FinalState};
use crate::track;
pub use glance::Glance;
use rewake_inject::live::Live as Agent;
use rewake_objects::files::collect::{Collector, Contents};
use rewake_objects::memory::copies::Reserve;
use rewake_objects::memory::early::Early;
use rewake_objects::memory::shield::{FEATURES, FLAGS, Shield, ShieldError};
use rewake_objects::memory::tracking;
use rewake_objects::memory::vma::Vma;
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_sys::userfaultfd::{NEW, Userfaultfd};
use rustix::fs::OFlags;
use server::Server;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use twins::Twins;

/// Processes with less private memory than this, in bytes, are copied while they stand still: that is as quick.
const LARGE: u64 = 4 << 20;
/// How much of a tree may be copied to our own memory while it stands still, in bytes.
const AT_ONCE: u64 = 64 << 20;
/// How much of it before.
const BEFORE: u64 = 512 << 20;

/// What keeps the memory of a tree as it was.
#[derive(Debug)]
pub struct Live {
    /// By pid; of whom there is none, all is copied at once.
    shields: HashMap<i32, Large>,
    reserve: Arc<Reserve>,
    /// How much is likely to be copied while it stands still, in bytes.
    at_once: u64,
    server: Server,
    /// Processes with much shared memory.
    sharers: Vec<ProcDir>,
    twins: Mutex<Twins>,
}

/// A process whose memory is protected.
#[derive(Debug)]
struct Large {
    /// When it started: another process with its pid started later.
    start: u64,
    shield: Arc<Shield>,
    dir: ProcDir,
    glance: Mutex<Glance>,
    /// Nothing depends on the flags that were seen before the instant.
    exact: AtomicBool,
}

/// What is known of the mappings of a task before it is looked at.
#[derive(Debug, Clone, Copy)]
pub enum Before<'a> {
    /// Nothing.
    Unseen,
    /// They were seen.
    Seen(&'a Glance),
    /// They are protected, if the task is a large one.
    Protected(&'a Live),
}

impl Before<'_> {
    /// Asks what was seen of a task, if anything was.
    pub fn glance<T>(self, task: &Task, ask: impl FnOnce(&Glance) -> T) -> Option<T> {
        match self {
            Before::Unseen => None,
            Before::Seen(glance) => Some(ask(glance)),
            Before::Protected(live) => live.of(task).map(|large| ask(&large.glance())),
        }
    }

    /// The flags of the task's mappings are those of the instant, and not of before.
    pub fn set_exact(self, task: &Task) {
        if let Before::Protected(live) = self
            && let Some(large) = live.of(task)
        {
            large.exact.store(true, Ordering::SeqCst);
        }
    }

    /// Is a mapping registered with a userfaultfd of ours?
    pub fn covers(self, task: &Task, vma: &Vma) -> bool {
        let Before::Protected(live) = self else { return false };
        live.of(task).is_some_and(|large| large.shield.covers(vma.entry.start, vma.entry.end))
    }
}

/// Why a tree has to stand still while its memory is copied.
#[derive(Debug)]
pub enum Plan {
    /// It has little.
    Small,
    /// It need not.
    Live(Arc<Live>),
    /// It cannot be helped.
    Stop(String),
}

/// Does anybody expect a dump with these options to be as short as it can?
fn is_wanted(options: &DumpOptions) -> bool {
    options.final_state == FinalState::Running && options.parent.is_none() && !options.track_mem
}

impl Live {
    /// Prepares a dump of a tree that is to run on. `watched`: somebody acts when the images are complete.
    ///
    /// # Errors
    /// The tree cannot be stopped at all.
    pub fn begin(options: &DumpOptions, watched: bool) -> Result<Plan> {
        if !is_wanted(options) {
            return Ok(Plan::Small);
        }
        if watched {
            let why = "an action script may count on that when the images are complete";
            return Ok(Plan::Stop(why.to_owned()));
        }
        let Found { large, sharers, at_once } = Found::below(options.root);
        if large.is_empty() && sharers.is_empty() {
            return Ok(Plan::Small);
        }
        let reserve = Arc::new(Reserve::new(AT_ONCE));
        // What that takes to be ready is not to be waited for later.
        super::mappings::get_ready();
        let shields = match Live::protect(options, large, &reserve)? {
            Ok(shields) => shields,
            Err(why) => return Ok(Plan::Stop(why)),
        };
        let server = match Server::start(shields.values().map(|l| l.shield.clone()).collect()) {
            Ok(server) => server,
            Err(e) => return Ok(Plan::Stop(format!("no thread can serve its writes: {e}"))),
        };
        let twins = Mutex::new(Twins::new());
        let live = Live { shields, reserve, at_once, server, sharers, twins };
        match live.prepare() {
            Ok(()) => Ok(Plan::Live(Arc::new(live))),
            Err(why) => Ok(Plan::Stop(why)),
        }
    }

    /// Stops the tree for the time it takes to make userfaultfds in its large processes.
    fn protect(
        options: &DumpOptions,
        large: HashMap<i32, Glance>,
        reserve: &Arc<Reserve>,
    ) -> Result<Attached> {
        if large.is_empty() {
            return Ok(Ok(HashMap::new()));
        }
        let large = Arc::new(large);
        let attached = patiently(options, |tree| {
            let since = Instant::now();
            let attached = attach(tree, &large, reserve);
            tree.release();
            attached.map(|attached| (attached, since.elapsed()))
        });
        let (shields, stood) = match attached {
            Ok((_, (Ok(shields), stood), _)) => (shields, stood),
            Ok((_, (Err(why), _), _)) => return Ok(Err(why)),
            Err(e) => return Err(e),
        };
        log::info!("{} processes were stopped for {stood:?} to protect memory", shields.len());
        Ok(Ok(shields))
    }

    /// Protects what is not, while the tree runs.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn prepare(&self) -> std::result::Result<(), String> {
        let since = Instant::now();
        self.reserve.renew(AT_ONCE, self.at_once);
        for sharer in &self.sharers {
            self.twins().copy(sharer);
        }
        for large in self.shields.values() {
            large.shield.copy_early().map_err(|e| e.to_string())?;
        }
        for large in self.shields.values() {
            large.shield.prepare().map_err(|e| e.to_string())?;
            *large.glance() = Glance::at(&large.dir).map_err(|e| e.to_string())?;
            large.exact.store(false, Ordering::SeqCst);
        }
        log::info!("memory protected in {:?}", since.elapsed());
        Ok(())
    }

    /// The instant, for shared memory: where there is a copy, it is made what the memory is, and takes its place.
    ///
    /// # Errors
    /// [`Error::still`].
    pub fn keep_shared(&self, files: &mut Collector) -> Result<()> {
        let twins = self.twins();
        let segments = files.contents.iter_mut().filter_map(|contents| match contents {
            Contents::Shared(segment) => Some((&mut segment.file, &mut segment.kept)),
            _ => None,
        });
        let (since, mut copies, mut bytes) = (Instant::now(), 0, 0);
        for (file, kept) in segments.chain(files.sysv.files()) {
            let copy = twins.of(file).map_err(|e| lost(format!("a copy of shared memory: {e}")))?;
            if let Some((copy, differed)) = copy {
                (*file, *kept) = (copy, true);
                copies += 1;
                bytes += differed;
            }
        }
        if copies > 0 {
            let took = since.elapsed();
            log::info!(
                "{copies} copies of shared memory compared in {took:?}, {bytes} bytes differed"
            );
        }
        Ok(())
    }

    /// The copies of shared memory.
    pub fn twins(&self) -> MutexGuard<'_, Twins> {
        self.twins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, task: &Task) -> Option<&Large> {
        self.shields.get(&task.pid()).filter(|large| large.start == task.stat.starttime)
    }

    /// The instant, for a task that stands still.
    ///
    /// # Errors
    /// Its memory cannot be kept; [`Error::still`] if it can be copied while it stands still.
    pub fn survey(&self, task: &Task, outside: &mut Outside) -> Result<()> {
        if !outside.owns.vm {
            return Ok(());
        }
        let (pid, comm) = (task.pid(), task.comm());
        let still = |why: &dyn std::fmt::Display| {
            let mut error = Error::new(format!("process {pid} ({}): {why}", text(comm)));
            error.still = true;
            error
        };
        // What is copied at once is not written to meanwhile.
        if self.of(task).is_some() && tracking::has_pinned_memory(&outside.vmas) {
            return Err(still(&PINNED));
        }
        let shield = match self.of(task) {
            Some(large) => large.shield.clone(),
            None => {
                let pagemap = outside.pagemap.try_clone().of(pid, comm)?;
                let memory = outside.memory.clone();
                Arc::new(Shield::new(
                    outside.tid,
                    memory,
                    pagemap,
                    None,
                    None,
                    self.reserve.clone(),
                ))
            }
        };
        outside.runs = match shield.survey(&outside.vmas, outside.tell_shared) {
            Ok(runs) => runs,
            Err(e @ (ShieldError::TooMuch | ShieldError::Syscall(_))) => return Err(still(&e)),
            Err(e) => return Err(e).of(pid, comm),
        };
        outside.shield = Some(shield);
        Ok(())
    }

    /// The tree runs again: were the flags of its mappings what we took them for?
    ///
    /// # Errors
    /// They may have been others at the instant.
    pub fn confirm(&self) -> Result<()> {
        for large in self.shields.values().filter(|large| !large.exact.load(Ordering::SeqCst)) {
            let pid = large.dir.pid();
            let now = Glance::at(&large.dir).map_err(|e| lost(format!("process {pid}: {e}")))?;
            if !now.agrees(&large.glance()) {
                return Err(lost(format!("process {pid}: flags of its mappings changed")));
            }
        }
        Ok(())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Nobody may be left waiting when nobody serves any more.
        self.shields.values().for_each(|large| large.shield.leave());
        self.server.stop();
    }
}

/// The snapshot is lost: the tree has to stand still for another one.
fn lost(message: String) -> Error {
    let mut error = Error::new(message);
    error.still = true;
    error
}

impl Large {
    fn glance(&self) -> MutexGuard<'_, Glance> {
        self.glance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const PINNED: &str = "its asynchronous I/O (io_uring, AIO) writes to memory without being noticed";

/// What is worth an effort.
struct Found {
    /// Processes with much private memory, each at a glance.
    large: HashMap<i32, Glance>,
    /// Those with much shared memory.
    sharers: Vec<ProcDir>,
    /// How much others have, and what is copied at once of the large ones, in bytes.
    at_once: u64,
}

impl Found {
    /// Looks at the processes below `root`.
    fn below(root: i32) -> Found {
        let (mut large, mut sharers, mut at_once) = (HashMap::new(), Vec::new(), 0);
        let mut buffer = Vec::new();
        for dir in coming::below(root) {
            let pid = dir.pid();
            let (mut status, mut dir) = (dir.status(&mut buffer), dir);
            // A first thread that has ended while others go on has no memory.
            if status.as_ref().is_ok_and(|status| status.rss_anon.is_none())
                && let Ok(living) = ProcDir::open_living(pid)
            {
                (status, dir) = (living.status(&mut buffer), living);
            }
            let Ok(status) = status else { continue };
            let size = status.rss_anon.unwrap_or(0) + status.vm_swap.unwrap_or(0);
            at_once += size.min(LARGE);
            if size >= LARGE
                && let Ok(glance) = Glance::at(&dir)
            {
                large.insert(pid, glance);
            }
            if status.rss_shmem.unwrap_or(0) >= twins::LARGE {
                sharers.push(dir);
            }
        }
        Found { large, sharers, at_once }
    }
}

/// By pid, or why that cannot be.
type Attached = std::result::Result<HashMap<i32, Large>, String>;

/// Makes a userfaultfd in each large process of a frozen tree. The inner error says why that cannot be.
fn attach(
    tree: &mut Tree,
    large: &Arc<HashMap<i32, Glance>>,
    reserve: &Arc<Reserve>,
) -> Result<Attached> {
    let own = Arc::new(Own::new(tree, Arc::default(), None)?);
    let before = Arc::new(AtomicU64::new(BEFORE));
    let parts = tree.each(|_| {
        let (own, large) = (own.clone(), large.clone());
        let (reserve, before) = (reserve.clone(), before.clone());
        move |shard: &mut Shard| {
            let mut shields = HashMap::new();
            for wave in waves(&mut shard.held, &own.sharing) {
                for held in wave {
                    let pid = held.task.pid();
                    let Some(glance) = large.get(&pid).filter(|_| own.sharing.owns(pid).vm) else {
                        continue;
                    };
                    match attach_one(held, &own, glance, &reserve, &before)? {
                        Ok(one) => shields.insert(pid, one),
                        Err(why) => {
                            let comm = text(held.task.comm());
                            return Ok(Err(format!("process {pid} ({comm}): {why}")));
                        }
                    };
                }
            }
            Ok::<Attached, Error>(Ok(shields))
        }
    })?;
    let mut all = HashMap::new();
    for part in parts {
        match part? {
            Ok(shields) => all.extend(shields),
            Err(why) => return Ok(Err(why)),
        }
    }
    Ok(Ok(all))
}

fn attach_one(
    held: &mut Held,
    own: &Own,
    glance: &Glance,
    reserve: &Arc<Reserve>,
    before: &Arc<AtomicU64>,
) -> Result<std::result::Result<Large, String>> {
    let task = held.task.clone();
    let (pid, comm) = (task.pid(), task.comm());
    let visible = look_at(&task, own, Before::Seen(glance))?;
    let outside = &visible.outside;
    if tracking::has_pinned_memory(&outside.vmas) {
        return Ok(Err(PINNED.to_owned()));
    }
    if own.sharing.takes_turns(pid) {
        return Ok(Err("it shares memory or descriptors with another process".to_owned()));
    }
    suspend_seccomp(&task, outside.status.seccomp.unwrap_or(0) != 0)?;
    inside::enter(std::slice::from_mut(held), std::slice::from_ref(&visible))?;
    let made = match &held.agent {
        Some(agent) => make(agent).map(|uffd| (uffd, track::make(agent))),
        None => Err("it has no agent".to_owned()),
    };
    held.cure();
    let (uffd, other) = match made {
        Ok(made) => made,
        Err(why) => return Ok(Err(why)),
    };
    let other = other.inspect_err(|why| log::debug!("process {pid}: {why}")).ok();
    let early = other.map(|other| Early::new(other, before.clone()));
    let dir = ProcDir::open(task.tid()).of(pid, comm)?;
    let pagemap = File::from(dir.open_file("pagemap", OFlags::RDONLY).of(pid, comm)?);
    let memory = outside.memory.clone();
    let shield = Shield::new(outside.tid, memory, pagemap, Some(uffd), early, reserve.clone());
    shield.register(&outside.vmas);
    Ok(Ok(Large {
        exact: AtomicBool::new(false),
        start: task.stat.starttime,
        shield: Arc::new(shield),
        dir,
        glance: Mutex::default(),
    }))
}

/// Makes a userfaultfd in a process that has an agent inside.
fn make(agent: &Agent) -> std::result::Result<Userfaultfd, String> {
    const WHAT: &str = "userfaultfd";
    let made = agent.bring(WHAT, libc::SYS_userfaultfd, &[FLAGS]).or_else(|e| {
        // Not everyone may hold up the kernel; but those may to whom the device is given.
        let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
            return Err(e.to_string());
        };
        agent.bring_by(device.as_fd(), WHAT, NEW, FLAGS).map_err(|e| e.to_string())
    })?;
    let uffd = Userfaultfd::from_fd(made);
    uffd.enable(FEATURES).map_err(|e| format!("{e}; the kernel has no write protection"))?;
    Ok(uffd)
}
