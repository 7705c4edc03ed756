//! A restore: read and check all images, plan, create empty processes, build them, let them go.
//!
//! * [`read`]: images → checked values; nothing exists yet.
//! * [`lineage`], [`build`]: values → scripts; pure.
//! * this module: the order of events; [`births`], [`batches`] and [`finish`]: the scripts are executed, all tasks at the same
//!   time; [`copies`]: of several trees.
//! * [`undo`]: what is taken back if anything fails.
//!
//! On any failure every process created so far is killed ([`undo::Created`]).

mod addresses;
mod arena;
mod batches;
mod births;
mod build;
mod copies;
mod core_flag;
mod environment;
mod finish;
mod heritage;
mod labels;
pub(crate) mod lineage;
mod locks;
mod namespaces;
mod page_check;
mod read;
mod rings;
pub(crate) mod room;
mod sharing;
mod start;
mod template;
mod terminal;
mod thread;
mod turns;
mod undo;
mod vdsos;

use crate::error::{Context, Error, Result};
use crate::lazy::client::Client;
use crate::options::{Action, FinalState, Hooks, Pid, RestoreOptions, TcpPolicy};
use crate::own::AddressSpace;
use crate::report::RestoreReport;
use arena::Space;
use build::{Environment, NodePlan, TaskPlan};
use finish::Tracers;
use lineage::{Lineage, Member};
use namespaces::Namespaces;
use page_check::{Checking, Filling, PageCheck};
pub(crate) use read::read_memory;
use read::{Alive, Checkpoint, Task};
use rewake_image::messages::VmaEntry;
use rewake_image::{ImageDir, OpenOptions};
use rewake_inject::ring::Ring;
use rewake_inject::stub::Arena;
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::files::open::{self, Opener};
use rewake_objects::files::{epoll, io_uring, pty};
use rewake_objects::memory::huge::HUGE;
use rewake_objects::memory::hugetlb::Needs;
use rewake_objects::memory::vma::status;
use rewake_objects::memory::{shared, sysv};
use rewake_objects::pids::Pids;
use rewake_objects::task::sharing::Objects;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use undo::{Created, PidFile, Subreaper};
use vdsos::Vdsos;

/// A batch of the restore may take as long as reading all memory takes; this is for agents that hang.
const PATIENCE: Duration = Duration::from_secs(600);
/// Address space for the arena: as much as any tree could want, of which only what is used exists.
const ARENA_SPACE: u64 = 1 << 34;

/// Brings a tree back from images. With neither `detached` nor `sibling` the caller waits for `report.root`.
///
/// # Errors
/// Anything that stops the restore; nothing is left behind then.
pub fn restore(options: &RestoreOptions, hooks: &mut dyn Hooks) -> Result<RestoreReport> {
    // A connection can live once.
    let close = options.tcp.close || options.copies.is_some();
    let tcp = TcpPolicy { close, ..options.tcp };
    let options = &RestoreOptions { tcp, ..options.clone() };
    let give_up = Instant::now() + Duration::from_secs(2);
    let mut hooks = Once { hooks, called: false };
    let mut tries = 0;
    loop {
        // A page that does not want to move is filled where it is.
        match attempt(options, &mut hooks, tries < 2) {
            // A task that has just died keeps its pid until its parent has waited for it, and some milliseconds after
            // it is gone from /proc.
            Err(e) if e.transient && Instant::now() < give_up => {
                log::debug!("{e}; trying again");
                std::thread::sleep(Duration::from_millis(5));
                tries += 1;
            }
            result => return result.map_err(Error::with_limit),
        }
    }
}

/// Hooks to which a second attempt is not told.
struct Once<'a> {
    hooks: &'a mut dyn Hooks,
    called: bool,
}

impl Hooks for Once<'_> {
    fn run(&mut self, action: Action, root: Option<Pid>) -> std::result::Result<(), String> {
        if action == Action::PreRestore && std::mem::replace(&mut self.called, true) {
            return Ok(());
        }
        self.hooks.run(action, root)
    }
}

/// Has the host the huge pages that the images need?
fn check_huge_pages(
    checkpoint: &Checkpoint,
    opener: &Opener<'_>,
    copies: Option<u32>,
) -> Result<()> {
    let mut needs = Needs::default();
    // Private ones are each copy's own, and so is shared memory.
    for (_, alive) in checkpoint.memories() {
        needs.add(&alive.mm, alive.pages.as_ref());
    }
    shared::add_needs(opener, &mut needs)?;
    sysv::add_needs(&checkpoint.segments, &mut needs)?;
    Ok(needs.check(u64::from(copies.unwrap_or(1)))?)
}

fn attempt(options: &RestoreOptions, hooks: &mut dyn Hooks, huge: bool) -> Result<RestoreReport> {
    let start = Instant::now();
    let how = OpenOptions { verify: options.verify, ..OpenOptions::default() };
    let images = ImageDir::open_with(&options.images_dir, how)?.with_parents()?;
    let per_task = ["core-", "ids-", "mm-", "fs-", "fdinfo-", "pagemap-"];
    images.check_complete(|name| per_task.iter().any(|p| name.starts_with(p)))?;
    let checkpoint = Arc::new(read::read(&images, options)?);
    // The pager checks what it reads.
    let pages = if options.lazy_pages { PageCheck::by_others() } else { PageCheck::new(&images)? };
    log::info!("images read in {:?}", start.elapsed());
    let pid = options.new_pidns || options.copies.is_some();
    let namespaces = Namespaces { pid, net: options.copy_netns };
    let members = members(&checkpoint);
    // A root that was an init is one again.
    let init = namespaces.pid && members.first().is_some_and(|root| root.pid != 1);
    let mut lineage = Lineage::plan(&members, options.shell_job, init)?;
    if namespaces.pid {
        // Where nobody was before, the kernel would give helpers numbers that members want.
        lineage.number_helpers(&used_numbers(&checkpoint));
    }
    let opener_options = open::Options {
        skip_mode_check: options.skip_file_rwx_check,
        build_ids: options.build_ids,
        shell_job: options.shell_job,
        tcp_established: options.tcp.established,
        tcp_close: options.tcp.close,
        external_unix: options.external_unix,
        inherited: options.inherited.clone(),
    };
    let mut opener = Opener::new(&images, opener_options.clone(), checkpoint.file_extra.clone())?;
    opener.make_room();
    let rules = addresses::rules(&options.addresses, 0)?;
    let notes = addresses::replace(&mut opener, &rules, options)?;
    opener.check()?;
    check_huge_pages(&checkpoint, &opener, options.copies)?;
    let stored = checkpoint.memories().filter_map(|(_, alive)| alive.pages.as_ref());
    room::check(&stored.collect::<Vec<_>>())?;
    let leads = |t: &&Task| t.sid == t.pid && t.alive.is_some();
    opener.sessions = checkpoint.tasks.iter().filter(leads).map(|t| t.pid).collect();
    pty::prepare(&mut opener)?;
    let terminals = pty::controlling(&opener);
    if options.copies.is_some() && !terminals.is_empty() {
        return Err(Error::new("copies of sessions that have a terminal cannot be made")
            .hint("restore it once, without --copies"));
    }

    let own = AddressSpace::read()?;
    let mut taken = own.maps.clone();
    for alive in checkpoint.tasks.iter().filter_map(|t| t.alive.as_ref()) {
        taken.extend(
            alive
                .mm
                .vmas
                .iter()
                .filter(|v| v.status & status::VSYSCALL == 0)
                .map(|v| v.start..v.end),
        );
    }
    let hole = arena::find_hole(taken, ARENA_SPACE)?;
    let (hop, base) = arena::place(&hole);
    let plain_root = plain_root(&checkpoint, &opener);
    let timers = checkpoint
        .tasks
        .iter()
        .any(|t| t.tc.timers.as_ref().is_some_and(|timers| !timers.posix.is_empty()));
    let mut env = environment::gather(
        &own,
        hop,
        (base, base),
        plain_root,
        timers,
        options.sibling,
        namespaces,
    )?;
    env.terminals = terminals;
    labels::check(&checkpoint, &options.label)?;
    let tables = checkpoint.tasks.iter().enumerate().filter(|(at, t)| t.part.table == *at);
    let tasks = tables.filter_map(|(_, t)| Some((t.pid, t.alive.as_ref()?.fds.as_slice())));
    let epolls = epoll::assign(&opener, tasks)?;
    env.gate = namespaces.pid && opener.has_unix_sockets();
    let several = options.copies.is_some_and(|n| n > 1);
    env.locks = locks::read(&images, &checkpoint, &opener, several)?;
    env.ring_workers = io_uring::open::workers(&opener.extra);
    env.arena = (base, base + ARENA_SPACE);
    let vdsos = Vdsos::new(&images, &own);
    let same_vdso = |alive: &Alive| vdsos.is_own(alive);
    env.segments = checkpoint.segments.iter().map(|(id, s)| (u64::from(*id), s.size())).collect();
    let copies = options.copies.filter(|n| *n > 1);
    if let (Some(id), Some(_)) = (checkpoint.segments.keys().next(), copies) {
        return Err(Error::new(format!(
            "the tree maps the System V shared memory segment {id}, of which there can be only one: no copies can be made"
        )));
    }
    let holdings = copies.map(|_| {
        let free = env.arena.1 + arena::GAP..hole.end - arena::GAP;
        let is_plain = |id: u32| opener.is_ordinary(id);
        template::holdings(&checkpoint.tasks, &is_plain, &same_vdso, &env, free)
    });
    let holdings = holdings.transpose()?;
    // Copies share more than that. On the longer way of the lineage nothing is handed down.
    let _lent = if holdings.is_none() && lineage.sequence.is_empty() {
        lend(&checkpoint, &lineage, &images, &mut opener, &mut env)?
    } else {
        Vec::new()
    };
    let mut space = Space::new(base);
    let gate = space.gate();
    if huge && holdings.is_none() && checkpoint.memories().any(|(_, alive)| has_dense_memory(alive))
    {
        let free = env.arena.1 + arena::GAP..hole.end - arena::GAP;
        env.huge = environment::huge_area(free, Some(space.address(gate)));
    }
    let plans = build::plan(
        &checkpoint.tasks,
        &lineage,
        &env,
        &mut space,
        &same_vdso,
        &epolls,
        holdings.as_ref(),
    )?;
    let first = (lineage.nodes[0].pid.unwrap_or(1), space.address(plans[0].at));
    let slack = build::default_slack(&checkpoint.tasks, &lineage.nodes[0]);
    let template = holdings.as_ref().map(|h| {
        template::plan(&checkpoint.tasks, &h.tasks, &env, &mut space, &same_vdso, first, slack)
    });
    let template = template.transpose()?;
    let arena_len = space.len();
    log::info!(
        "planned in {:?}: {} nodes, arena of {arena_len} bytes",
        start.elapsed(),
        plans.len()
    );

    hooks.run(Action::PreRestore, None).map_err(Error::new)?;
    // What is made in namespaces of its own is made once they exist.
    let prepared = !namespaces.any();
    if prepared {
        opener.prepare()?;
    }
    let Some(arena) = Arena::create(base, arena_len).map_err(|e| Error::new(e.to_string()))? else {
        return Err(Error::new(format!("the address range at {base:#x} was taken meanwhile")));
    };
    // Dropped after what is created: orphans of a tree that is taken back come to us, and are waited for.
    let _subreaper = Subreaper::become_one();
    let mut created = Created::default();
    let mut run = Run {
        options,
        images: &images,
        checkpoint: &checkpoint,
        lineage: &lineage,
        plans: &plans,
        arena: &arena,
        gate,
        own: &own,
        vdsos: &vdsos,
        env: &env,
        specials: holdings.as_ref().map(|h| h.specials.clone()),
        prepared,
        pids: Pids::Same,
        tracers: Tracers::new(checkpoint.clone()),
        start,
    };
    let bytes = checkpoint.memories().filter_map(|(_, alive)| alive.pages.as_ref());
    let bytes: u64 = bytes.map(rewake_image::StoredPages::bytes).sum();
    let report = match (&template, copies) {
        (Some(template), Some(number)) => {
            let files = copies::Files { images: &images, options: opener_options, first: opener };
            run.copies(template, number, files, pages, hooks, &mut created)
        }
        _ => run.alone(opener, pages, hooks, &mut created),
    };
    let mut report = report.map_err(|e| room::explain(e, bytes))?;
    created.keep();
    report.warnings.splice(0..0, notes);
    Ok(report)
}

/// Plans what processes have from those that clone them, and opens what they need for it: the root stub inherits it.
fn lend(
    checkpoint: &Checkpoint,
    lineage: &Lineage,
    images: &ImageDir,
    opener: &mut Opener<'_>,
    env: &mut Environment,
) -> Result<Vec<OwnedFd>> {
    let stub = env.specials.span().unwrap_or(0..0);
    let own = rustix::fs::readlink("/proc/self/exe", Vec::new()).unwrap_or_default();
    let may = |vma: &VmaEntry| {
        let clear = vma.end <= stub.start || stub.end <= vma.start;
        let Ok(id) = u32::try_from(vma.shmid) else { return false };
        let reg = opener.entry(id).ok().and_then(|entry| entry.reg.as_deref());
        // Ours must not be mapped when a task gets its executable. In a mount namespace files are opened once that exists.
        let file = || {
            opener.is_ordinary(id)
                && !env.namespaces.pid
                && reg.is_some_and(|reg| reg.name != own.as_bytes())
        };
        clear && (!build::is_file(vma) || file())
    };
    let heritage = heritage::plan(&checkpoint.tasks, lineage, &may);
    let (stores, files) = heritage.needs();
    let least = build::FIRST_LENT + stores.len() + files.len();
    // Half of the numbers there are is for all else.
    if least as u64 > env.limits.get(7).map_or(1024, |(soft, _)| *soft) / 2 {
        log::warn!(
            "pages that processes share copy-on-write are not shared again: it takes {least} open files, of {:?} that there may be",
            env.limits.get(7)
        );
        return Ok(Vec::new());
    }
    let least = least as i32;
    let keep = |fd: BorrowedFd<'_>| {
        rustix::io::fcntl_dupfd_cloexec(fd, least)
            .map_err(|e| Error::new(format!("keeping a page store or mapped file open: {e}")))
    };
    let mut lent = Vec::new();
    let mut kept = Vec::new();
    for store in stores {
        kept.push(keep(images.open_store(store)?.as_fd())?);
        lent.push(build::Handed::Pages(store));
    }
    for file in files {
        kept.push(keep(opener.open(file)?)?);
        lent.push(build::Handed::File(file));
    }
    env.lent = lent.into_iter().zip(kept.iter().map(AsRawFd::as_raw_fd)).collect();
    env.heritage = heritage;
    Ok(kept)
}

fn members(checkpoint: &Checkpoint) -> Vec<Member> {
    checkpoint
        .tasks
        .iter()
        .map(|t| Member {
            pid: t.pid,
            ppid: t.ppid,
            pgid: t.pgid,
            sid: t.sid,
            zombie: t.alive.is_none(),
            objects: t.alive.as_ref().map_or_else(Objects::default, |alive| alive.objects),
        })
        .collect()
}

/// Every number that processes, threads, groups and sessions of the images have.
fn used_numbers(checkpoint: &Checkpoint) -> std::collections::HashSet<i32> {
    let tasks = checkpoint.tasks.iter();
    let of = |t: &Task| {
        let threads = t.alive.iter().flat_map(|alive| alive.threads.iter().map(|t| t.tid));
        threads.chain([t.pid, t.pgid, t.sid]).collect::<Vec<_>>()
    };
    tasks.flat_map(of).collect()
}

/// Could any of its memory be filled in huge pages?
fn has_dense_memory(alive: &Alive) -> bool {
    let runs = alive.pages.iter().flat_map(|pages| &pages.runs);
    runs.into_iter().any(|run| run.bytes() >= HUGE)
}

/// Have all tasks the root directory `/`, as we have?
fn plain_root(checkpoint: &Checkpoint, opener: &Opener<'_>) -> bool {
    let own = rustix::fs::readlink("/proc/self/root", Vec::new());
    let own_plain = own.is_ok_and(|link| link.as_bytes() == b"/");
    own_plain
        && checkpoint.tasks.iter().filter_map(|t| t.alive.as_ref()).all(|alive| {
            opener
                .entry(alive.fs.root_id)
                .ok()
                .and_then(|e| e.reg.as_deref())
                .is_some_and(|reg| reg.name == b"/")
        })
}

struct Run<'a> {
    options: &'a RestoreOptions,
    images: &'a ImageDir,
    checkpoint: &'a Checkpoint,
    lineage: &'a Lineage,
    plans: &'a [NodePlan],
    arena: &'a Arena,
    /// Offset of the word in it at which tasks wait for their memory.
    gate: usize,
    own: &'a AddressSpace,
    vdsos: &'a Vdsos<'a>,
    env: &'a Environment,
    /// Where a template has vvar and vdso.
    specials: Option<Range<u64>>,
    /// What has to be made before any process is, is made.
    prepared: bool,
    /// How the ids of the images are to be understood; known once the first process exists.
    pids: Pids,
    tracers: Tracers,
    start: Instant,
}

/// A tree that is ready to go on.
struct Standing {
    root: Pid,
    ready: finish::Ready,
    forked: Duration,
    pidfile: PidFile,
    /// Who brings its memory.
    pager: Option<Client>,
}

impl<'a> Run<'a> {
    fn task(&self, plan: &TaskPlan) -> &Task {
        &self.checkpoint.tasks[plan.index]
    }

    /// The id, here, of a task of the images.
    fn outer(&self, pid: Pid) -> Result<Pid> {
        self.pids.outer(pid).ok_or_else(|| Error::new(format!("process {pid} vanished")))
    }

    /// What we fill of the tasks' memory.
    fn filling(&self) -> Result<Filling> {
        let mut filling = Filling::new(self.arena.gate(self.gate));
        for plan in self.plans.iter().filter_map(|plan| plan.task.as_ref()) {
            if !plan.staged.is_empty() {
                let task = self.task(plan);
                filling.add(self.outer(task.pid)?, &task.comm, &plan.staged);
            }
        }
        Ok(filling.sorted())
    }

    /// One tree, cloned by ourselves.
    fn alone(
        &mut self,
        mut opener: Opener<'_>,
        pages: PageCheck,
        hooks: &mut dyn Hooks,
        created: &mut Created,
    ) -> Result<RestoreReport> {
        let mut warnings = Vec::new();
        let rings = self.load()?;
        let first = self.clone_root(&rings, created)?;
        let pages = Some(pages);
        let mut segments = sysv::raise(self.images, &self.checkpoint.segments)?;
        let mut standing =
            self.bring_up(first, &rings, &mut opener, pages, hooks, created, &mut warnings)?;
        segments.settle()?;
        // If anything fails from here on, it must see so before we wait for what we kill, for it is a child of ours too.
        let mut pager = standing.pager.take();
        if let Some(pager) = &mut pager {
            self.tell_rest(pager)?;
            pager.ready()?;
        }
        let report = self.release(vec![standing], hooks, warnings)?;
        pager.map_or(Ok(()), |pager| pager.check())?;
        segments.keep();
        opener.into_made().keep();
        Ok(report)
    }

    /// Makes a tree ready whose first process exists. `pages` is what is still to be checked meanwhile.
    #[allow(clippy::too_many_arguments, reason = "two call sites, all of it needed")]
    fn bring_up(
        &mut self,
        first: Pid,
        rings: &[Ring],
        opener: &mut Opener<'_>,
        pages: Option<PageCheck>,
        hooks: &mut dyn Hooks,
        created: &mut Created,
        warnings: &mut Vec<String>,
    ) -> Result<Standing> {
        let planned = self.plans.iter().filter_map(|p| p.task.as_ref());
        warnings.extend(planned.flat_map(|t| t.warnings.clone()));
        if self.env.namespaces.pid {
            self.pids = Pids::inside(first)
                .map_err(|e| Error::new(format!("the PID namespace of process {first}: {e}")))?;
        }
        let namespaces = self.env.namespaces;
        if namespaces.any() {
            hooks.run(Action::SetupNamespaces, Some(first)).map_err(Error::new)?;
        }
        if self.env.gate {
            self.prepare_inside(first, opener)?;
            rings[0].open_gate();
        }
        self.wait_births(rings, created)?;
        let root = self.outer(self.checkpoint.tasks[0].pid)?;
        self.look_from_inside(first, opener)?;
        let forked = self.start.elapsed();
        log::info!("tree created after {forked:?}");
        let mut pager =
            self.options.lazy_pages.then(|| Client::connect(self.options)).transpose()?;
        if namespaces.any() {
            hooks.run(Action::PostSetupNamespaces, Some(root)).map_err(Error::new)?;
        }

        let checking = pages.map(|pages| pages.start(self.images, self.filling()?)).transpose()?;
        let network = namespaces.net.then(|| namespaces::Network::enter(first));
        let network = network.transpose()?;
        if !self.prepared && !self.env.gate {
            opener.prepare()?;
        }
        let numbers = self.socket_numbers(rings);
        self.open_controlling(rings, opener)?;
        self.build(rings, &numbers, opener, pager.as_mut(), warnings).map_err(|e| {
            // If tasks have waited for their memory in vain, there is a reason.
            checking.as_ref().and_then(Checking::failure).unwrap_or(e)
        })?;
        self.map_rings(rings, opener)?;
        drop(network);
        if let Some(checking) = checking {
            checking.finish()?;
        }
        opener.settle()?;
        self.lock_files(rings, opener)?;
        self.foreign_vdsos()?;
        self.proc_values(warnings);
        warnings.extend(core_flag::lost(&self.checkpoint.tasks, &self.pids));
        log::info!("built after {:?}", self.start.elapsed());
        hooks.run(Action::PostRestore, Some(root)).map_err(Error::new)?;
        let pidfile = match self.options.copies {
            None => self.write_pidfile(&root.to_string())?,
            Some(_) => PidFile::default(),
        };
        if namespaces.net
            && let Err(e) = hooks.run(Action::NetworkUnlock, Some(root))
        {
            warnings.push(e);
        }

        let has_init = self.lineage.root() != 0;
        let init = if has_init { Some(finish::seize_init(first)?) } else { None };
        let tree = self.tracers.seize(&self.pids)?;
        self.finish(rings, warnings)?;
        let gadgets = self.gadgets()?;
        let shared = |(at, task): &(usize, &Task)| task.part.memory != *at;
        let guests = self.checkpoint.tasks.iter().enumerate().filter(shared);
        let last = finish::Final {
            arena: (self.arena.base(), self.arena.len()),
            specials: self
                .own
                .specials
                .span()
                .map_or(0..0, |s| self.env.hop..self.env.hop + (s.end - s.start)),
            gadgets,
            guests: guests.map(|(_, task)| task.pid).collect(),
            // With copies, the rings are used again.
            asleep: self.specials.is_none(),
            check_cpu: self.options.check_cpu,
        };
        let init = init.map(|init| self.init_ready(init)).transpose()?;
        self.tracers.make_ready(last)?;
        let ready = tree.with_init(init);
        log::info!("ready after {:?}", self.start.elapsed());
        if let Err(e) = hooks.run(Action::PreResume, Some(root)) {
            warnings.push(e);
        }
        let is_restored = |group: i32| self.checkpoint.tasks.iter().any(|t| t.pgid == group);
        opener.set_going(is_restored)?;
        Ok(Standing { root, ready, forked, pidfile, pager })
    }

    /// Makes unix sockets when only the first process of the tree's namespaces exists: the ids of those who made them are
    /// still free there.
    fn prepare_inside(&self, first: Pid, opener: &mut Opener<'_>) -> Result<()> {
        opener.pids = self.pids.clone();
        let network = self.env.namespaces.net.then(|| namespaces::Network::enter(first));
        let _network = network.transpose()?;
        Ok(opener.prepare()?)
    }

    /// Lets all trees go on.
    fn release(
        &mut self,
        trees: Vec<Standing>,
        hooks: &mut dyn Hooks,
        mut warnings: Vec<String>,
    ) -> Result<RestoreReport> {
        let roots: Vec<Pid> = trees.iter().map(|t| t.root).collect();
        let forking_time = trees.first().map_or(Duration::ZERO, |t| t.forked);
        let (ready, pidfiles): (Vec<_>, Vec<_>) =
            trees.into_iter().map(|t| (t.ready, t.pidfile)).unzip();
        self.tracers.release(ready, self.options.final_state == FinalState::Stopped)?;
        pidfiles.into_iter().for_each(PidFile::keep);
        for root in &roots {
            if let Err(e) = hooks.run(Action::PostResume, Some(*root)) {
                warnings.push(e);
            }
        }
        let alive = || self.checkpoint.tasks.iter().filter_map(|t| t.alive.as_ref());
        let memories = self.checkpoint.memories();
        let all = roots.len();
        Ok(RestoreReport {
            root: roots.first().copied().unwrap_or(0),
            roots,
            forking_time,
            restore_time: self.start.elapsed(),
            pages_restored: memories
                .flat_map(|(_, a)| [a.pages.as_ref(), a.later.as_ref()])
                .flatten()
                .map(|p| p.bytes() / rewake_objects::memory::PAGE)
                .sum(),
            tasks: self.checkpoint.tasks.len() * all,
            threads: alive().map(|a| a.threads.len()).sum::<usize>() * all,
            warnings,
            ..RestoreReport::default()
        })
    }

    /// Makes the init of the tree's PID namespace ready to wait for its children.
    fn init_ready(&self, init: Running) -> Result<Stopped> {
        init.interrupt().of(init.tid(), namespaces::INIT)?;
        let own = self.own.specials.span().unwrap_or(0..0);
        let vdso = self.own.specials.vdso.as_ref().map_or(0, |v| v.start - own.start);
        let place = self.specials.as_ref().unwrap_or(&own).start;
        let gadget = place + vdso + finish::gadget(&self.own.vdso)?;
        let arena = (self.arena.base(), self.arena.len());
        let code = arena::init_place(self.env.hop);
        namespaces::init_ready(init, gadget, arena, code, self.checkpoint.tasks[0].pid)
    }
}
