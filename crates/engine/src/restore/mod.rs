//! A restore: read and check all images, plan, create empty processes, build them, let them go.
//!
//! * [`read`]: images → checked values; nothing exists yet.
//! * [`lineage`], [`build`]: values → scripts; pure.
//! * this module and [`finish`]: the scripts are executed, all tasks at the same time.
//!
//! On any failure every process created so far is killed ([`Created`]).

mod addresses;
mod arena;
mod build;
mod copies;
mod environment;
mod finish;
pub(crate) mod lineage;
mod namespaces;
mod page_check;
mod read;
mod template;

use crate::error::{Context, Error, Result};
use crate::options::{Action, FinalState, Hooks, Pid, RestoreOptions, TcpPolicy};
use crate::own::AddressSpace;
use crate::report::RestoreReport;
use arena::Space;
use build::{Environment, Handed, NodePlan, TaskPlan};
use lineage::{Lineage, Member, Role};
use namespaces::Namespaces;
use page_check::PageCheck;
use read::{Alive, Checkpoint, Task};
use rewake_image::{ImageDir, OpenOptions, kind};
use rewake_inject::ring::{Ring, Script};
use rewake_inject::stub::{Arena, Kind};
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::Problem;
use rewake_objects::files::epoll;
use rewake_objects::files::open::{self, Opener};
use rewake_objects::memory::vdso;
use rewake_objects::memory::vma::status;
use rewake_objects::pids::Pids;
use rewake_objects::problem::text;
use rewake_objects::steps::{Expect, Label, Steps};
use rewake_sys::task::CloneArgs;
use rewake_sys::wait;
use rewake_sys::{Errno, signal};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A batch of the restore may take as long as reading all memory takes; this is for agents that hang.
const PATIENCE: Duration = Duration::from_secs(600);
/// Address space for the arena: as much as any tree could want, of which only what is used exists.
const ARENA_SPACE: u64 = 1 << 34;

/// Brings a tree back from images. With neither `detached` nor `sibling` the caller waits for `report.root`.
///
/// # Errors
/// Anything that stops the restore; nothing is left behind then.
pub fn restore(options: &RestoreOptions, hooks: &mut dyn Hooks) -> Result<RestoreReport> {
    refuse_unsupported(options)?;
    // A connection can live once.
    let close = options.tcp.close || options.copies.is_some();
    let tcp = TcpPolicy { close, ..options.tcp };
    let options = &RestoreOptions { tcp, ..options.clone() };
    let give_up = Instant::now() + Duration::from_secs(1);
    loop {
        match attempt(options, hooks) {
            // A task that has just died keeps its pid for some milliseconds after it is gone from /proc.
            Err(e) if e.transient && Instant::now() < give_up => {
                log::debug!("{e}; trying again");
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

fn attempt(options: &RestoreOptions, hooks: &mut dyn Hooks) -> Result<RestoreReport> {
    let start = Instant::now();
    let how = OpenOptions { verify: options.verify, ..OpenOptions::default() };
    let images = ImageDir::open_with(&options.images_dir, how)?;
    let per_task = ["core-", "ids-", "mm-", "fs-", "fdinfo-", "pagemap-"];
    images.check_complete(|name| per_task.iter().any(|p| name.starts_with(p)))?;
    let checkpoint = read::read(&images, options)?;
    let pages = PageCheck::new(&images)?;
    log::info!("images read in {:?}", start.elapsed());
    let pid = options.new_pidns || options.copies.is_some();
    let namespaces = Namespaces { pid, net: options.copy_netns };
    let members = members(&checkpoint);
    // A root that was an init is one again.
    let init = namespaces.pid && members.first().is_some_and(|root| root.pid != 1);
    let lineage = Lineage::plan(&members, options.shell_job, init)?;
    let opener_options = open::Options {
        skip_mode_check: options.skip_file_rwx_check,
        shell_job: options.shell_job,
        tcp_established: options.tcp.established,
        tcp_close: options.tcp.close,
        external_unix: options.external_unix,
        inherited_sockets: options.inherited_sockets.clone(),
    };
    let mut opener = Opener::new(&images, opener_options.clone(), checkpoint.file_extra.clone())?;
    let rules = addresses::rules(&options.addresses, 0)?;
    let notes = addresses::replace(&mut opener, &rules, options)?;
    opener.check()?;

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
    let tasks =
        checkpoint.tasks.iter().filter_map(|t| Some((t.pid, t.alive.as_ref()?.fds.as_slice())));
    let epolls = epoll::assign(&opener, tasks).map_err(|p| Error::new(p.to_string()))?;
    env.arena = (base, base + ARENA_SPACE);
    let same_vdso = |alive: &Alive| same_vdso(&images, alive, &own);
    let copies = options.copies.filter(|n| *n > 1);
    let holdings = copies.map(|_| {
        let free = env.arena.1 + arena::GAP..hole.end - arena::GAP;
        let is_plain = |id: u32| opener.is_ordinary(id);
        template::holdings(&checkpoint.tasks, &is_plain, &same_vdso, &env, free)
    });
    let holdings = holdings.transpose()?;
    let mut space = Space::new(base);
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
    let template = holdings
        .as_ref()
        .map(|h| template::plan(&checkpoint.tasks, &h.tasks, &env, &mut space, &same_vdso, first));
    let template = template.transpose()?;
    let arena_len = space.len();
    log::info!(
        "planned in {:?}: {} nodes, arena of {arena_len} bytes",
        start.elapsed(),
        plans.len()
    );

    hooks.run(Action::PreRestore, None).map_err(Error::new)?;
    // What is made in a network of its own is made once that exists.
    let prepared = template.is_none() && !namespaces.net;
    if prepared {
        opener.prepare()?;
    }
    let Some(arena) = Arena::create(base, arena_len).map_err(|e| Error::new(e.to_string()))? else {
        return Err(Error::new(format!("the address range at {base:#x} was taken meanwhile")));
    };
    let mut created = Created::default();
    let mut run = Run {
        options,
        images: &images,
        checkpoint: &checkpoint,
        lineage: &lineage,
        plans: &plans,
        arena: &arena,
        own: &own,
        env: &env,
        specials: holdings.as_ref().map(|h| h.specials.clone()),
        prepared,
        pids: Pids::Same,
        start,
    };
    let _subreaper = Subreaper::become_one();
    let mut report = match (&template, copies) {
        (Some(template), Some(number)) => {
            let files = copies::Files { images: &images, options: opener_options, first: opener };
            run.copies(template, number, files, pages, hooks, &mut created)?
        }
        _ => run.alone(opener, pages, hooks, &mut created)?,
    };
    created.keep();
    report.warnings.splice(0..0, notes);
    Ok(report)
}

fn refuse_unsupported(options: &RestoreOptions) -> Result<()> {
    let later = [(options.file_locks, "--file-locks"), (options.link_remap, "--link-remap")];
    match later.iter().find(|(given, _)| *given) {
        Some((_, name)) => Err(Error::new(format!("{name} is not supported yet"))),
        None => Ok(()),
    }
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
        })
        .collect()
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

/// Is the vdso of the images the one this kernel has?
fn same_vdso(images: &ImageDir, alive: &Alive, own: &AddressSpace) -> Result<bool> {
    Ok(match dumped_vdso(images, alive)? {
        None => true,
        Some((_, bytes)) => bytes == own.vdso,
    })
}

/// Address and contents of the vdso in the images; empty contents if they are not there.
fn dumped_vdso(images: &ImageDir, alive: &Alive) -> Result<Option<(u64, Vec<u8>)>> {
    let Some(vma) = alive.mm.vmas.iter().find(|v| v.status & status::VDSO != 0) else {
        return Ok(None);
    };
    // The kernel's is two pages; what claims to be much larger is none.
    const LARGEST: u64 = 1 << 20;
    let len = (vma.end - vma.start).min(LARGEST) as usize;
    let runs = alive.pagemap.iter().flat_map(rewake_image::Pagemap::with_offsets);
    for (run, offset) in runs {
        if let Some(offset) = offset.filter(|_| run.vaddr <= vma.start && vma.end <= run.end()) {
            let pages_id = alive.pagemap.as_ref().map_or(0, |p| p.pages_id);
            let name = kind::PAGES.file_name(pages_id);
            let mut bytes = vec![0; len];
            images
                .open_raw(&name)?
                .read_exact_at(&mut bytes, offset + (vma.start - run.vaddr))
                .map_err(|e| Error::new(format!("{name}: {e}")))?;
            return Ok(Some((vma.start, bytes)));
        }
    }
    Ok(Some((vma.start, Vec::new())))
}

/// The processes created so far: killed when this is dropped, unless they are kept.
#[derive(Debug, Default)]
struct Created {
    pids: Vec<i32>,
    /// The first process of each tree.
    roots: Vec<i32>,
    sibling: bool,
}

impl Created {
    /// Notes a process of the tree. Of a PID namespace only the first counts: the others die with it.
    fn note(&mut self, pid: Option<i32>, pids: &Pids) {
        if matches!(pids, Pids::Same) {
            self.pids.extend(pid);
        }
    }

    fn keep(mut self) {
        self.pids.clear();
        self.roots.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if self.roots.is_empty() && self.pids.is_empty() {
            return;
        }
        // The roots first: what they have not told us of dies with them.
        for pid in self.roots.iter().chain(&self.pids) {
            let _ = signal::kill(*pid, libc::SIGKILL);
        }
        // Orphans come to us, for we are a subreaper meanwhile.
        let give_up = Instant::now() + Duration::from_secs(10);
        while Instant::now() < give_up {
            match wait::try_wait_any() {
                Ok(Some(_)) => {}
                Ok(None) => std::thread::sleep(Duration::from_micros(200)),
                Err(_) => break,
            }
        }
        if self.sibling {
            log::debug!("the roots {:?} were siblings and are reaped by our parent", self.roots);
        }
    }
}

/// A pidfile, removed again when this is dropped, unless it is kept.
#[derive(Debug, Default)]
struct PidFile(Option<PathBuf>);

impl PidFile {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("pidfile {} stays behind: {e}", path.display());
        }
    }
}

struct Run<'a> {
    options: &'a RestoreOptions,
    images: &'a ImageDir,
    checkpoint: &'a Checkpoint,
    lineage: &'a Lineage,
    plans: &'a [NodePlan],
    arena: &'a Arena,
    own: &'a AddressSpace,
    env: &'a Environment,
    /// Where a template has vvar and vdso.
    specials: Option<Range<u64>>,
    /// What has to be made before any process is, is made.
    prepared: bool,
    /// How the ids of the images are to be understood; known once the first process exists.
    pids: Pids,
    start: Instant,
}

/// Makes us a subreaper for as long as it lives.
struct Subreaper(bool);

impl Subreaper {
    fn become_one() -> Subreaper {
        let was = rustix::process::child_subreaper().is_ok_and(|p| p.is_some());
        let _ = rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1));
        Subreaper(was)
    }
}

impl Drop for Subreaper {
    fn drop(&mut self) {
        if !self.0 {
            let _ = rustix::process::set_child_subreaper(None);
        }
    }
}

/// A tree that is ready to go on.
struct Standing<'a> {
    root: Pid,
    ready: finish::Ready<'a>,
    forked: Duration,
    pidfile: PidFile,
}

impl<'a> Run<'a> {
    fn task(&self, plan: &TaskPlan) -> &Task {
        &self.checkpoint.tasks[plan.index]
    }

    /// The id, here, of a task of the images.
    fn outer(&self, pid: Pid) -> Result<Pid> {
        self.pids.outer(pid).ok_or_else(|| Error::new(format!("process {pid} vanished")))
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
        let standing =
            self.bring_up(first, &rings, &mut opener, pages, hooks, created, &mut warnings)?;
        let report = self.release(vec![standing], hooks, warnings)?;
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
    ) -> Result<Standing<'a>> {
        let planned = self.plans.iter().filter_map(|p| p.task.as_ref());
        warnings.extend(planned.flat_map(|t| t.warnings.clone()));
        if self.env.namespaces.pid {
            self.pids = Pids::inside(first)
                .map_err(|e| Error::new(format!("the PID namespace of process {first}: {e}")))?;
        }
        hooks.run(Action::SetupNamespaces, Some(first)).map_err(Error::new)?;
        self.wait_births(rings, created)?;
        let root = self.outer(self.checkpoint.tasks[0].pid)?;
        self.look_from_inside(first, opener)?;
        let forked = self.start.elapsed();
        log::info!("tree created after {forked:?}");
        hooks.run(Action::PostSetupNamespaces, Some(root)).map_err(Error::new)?;

        let checking = pages.map(PageCheck::start);
        let network = self.env.namespaces.net.then(|| namespaces::Network::enter(first));
        let network = network.transpose()?;
        if !self.prepared {
            opener.prepare()?;
        }
        self.build(rings, opener, warnings)?;
        drop(network);
        if let Some(checking) = checking {
            checking.finish()?;
        }
        opener.settle().map_err(|p| Error::new(p.to_string()))?;
        self.foreign_vdsos()?;
        self.proc_values(warnings);
        log::info!("built after {:?}", self.start.elapsed());
        hooks.run(Action::PostRestore, Some(root)).map_err(Error::new)?;
        let pidfile = match self.options.copies {
            None => self.write_pidfile(&root.to_string())?,
            Some(_) => PidFile::default(),
        };
        hooks.run(Action::NetworkUnlock, Some(root)).map_err(Error::new)?;

        let has_init = self.lineage.root() != 0;
        let init = if has_init { Some(finish::seize_init(first)?) } else { None };
        let seized = finish::seize(self.checkpoint, &self.pids)?;
        self.finish(rings, warnings)?;
        let gadgets = self.gadgets()?;
        let last = finish::Final {
            arena: (self.arena.base(), self.arena.len()),
            gadgets: &gadgets,
            check_cpu: self.options.check_cpu,
        };
        let init = init.map(|init| self.init_ready(init)).transpose()?;
        let ready = finish::make_ready(seized, &last)?.with_init(init);
        log::info!("ready after {:?}", self.start.elapsed());
        hooks.run(Action::PreResume, Some(root)).map_err(Error::new)?;
        let is_restored = |group: i32| self.checkpoint.tasks.iter().any(|t| t.pgid == group);
        opener.set_going(is_restored)?;
        Ok(Standing { root, ready, forked, pidfile })
    }

    /// Lets all trees go on.
    fn release(
        &self,
        trees: Vec<Standing<'_>>,
        hooks: &mut dyn Hooks,
        mut warnings: Vec<String>,
    ) -> Result<RestoreReport> {
        let roots: Vec<Pid> = trees.iter().map(|t| t.root).collect();
        let forking_time = trees.first().map_or(Duration::ZERO, |t| t.forked);
        let (ready, pidfiles): (Vec<_>, Vec<_>) =
            trees.into_iter().map(|t| (t.ready, t.pidfile)).unzip();
        finish::release(ready, self.options.final_state == FinalState::Stopped)?;
        pidfiles.into_iter().for_each(PidFile::keep);
        for root in &roots {
            if let Err(e) = hooks.run(Action::PostResume, Some(*root)) {
                warnings.push(e);
            }
        }
        let alive = || self.checkpoint.tasks.iter().filter_map(|t| t.alive.as_ref());
        let all = roots.len();
        Ok(RestoreReport {
            root: roots.first().copied().unwrap_or(0),
            roots,
            forking_time,
            restore_time: self.start.elapsed(),
            pages_restored: alive()
                .filter_map(|a| a.pagemap.as_ref())
                .map(|p| p.stored_bytes() / rewake_objects::memory::PAGE)
                .sum(),
            tasks: self.checkpoint.tasks.len() * all,
            threads: alive().map(|a| a.threads.len()).sum::<usize>() * all,
            warnings,
            ..RestoreReport::default()
        })
    }

    /// Puts the first script of every node and thread into its ring.
    fn load(&self) -> Result<Vec<Ring>> {
        let failed = |e: rewake_inject::Error| Error::new(e.to_string());
        let mut rings = Vec::with_capacity(self.plans.len());
        for plan in self.plans {
            let ring = self.arena.ring(plan.at, plan.len, plan.data, Kind::Process);
            ring.load(&plan.birth.script).map_err(failed)?;
            rings.push(ring);
            let Some(task) = &plan.task else { continue };
            for thread in &task.threads {
                let script = &thread.steps.script;
                let len = Ring::size_for(script.ops.len(), script.data_len());
                let ring = self.arena.ring(thread.at, len, script.data_len(), Kind::Thread);
                ring.load(script).map_err(failed)?;
            }
        }
        Ok(rings)
    }

    fn clone_root(&self, rings: &[Ring], created: &mut Created) -> Result<Pid> {
        let pid = self.lineage.nodes[0].pid.unwrap_or(0);
        let tids = [pid];
        let sibling = self.options.sibling;
        let args = CloneArgs {
            flags: self.env.namespaces.flags()
                | if sibling { libc::CLONE_PARENT as u64 } else { 0 },
            exit_signal: if sibling { 0 } else { libc::SIGCHLD as u64 },
            set_tid: tids.as_ptr() as u64,
            set_tid_size: 1,
            ..CloneArgs::default()
        };
        let root = self.clone_stub(&args, &rings[0], pid)?;
        created.roots.push(root);
        created.sibling = sibling;
        Ok(root)
    }

    /// Clones a stub of our own, in a time namespace if a clock would go backwards.
    fn clone_stub(&self, args: &CloneArgs, ring: &Ring, pid: Pid) -> Result<Pid> {
        let before = self.clocks_go_on()?;
        let result = self.arena.clone_root(args, ring);
        if let Some(before) = before {
            rewake_sys::task::enter_time_namespace(before.as_fd())
                .map_err(|e| Error::new(format!("returning to the time namespace: {e}")))?;
        }
        result.map_err(|e| clone_error(pid, e.errno))
    }

    /// From now on ids are those of the tree's PID namespace, and paths those of its mount namespace, if it has them.
    fn look_from_inside(&self, first: Pid, opener: &mut Opener<'_>) -> Result<()> {
        opener.pids = self.pids.clone();
        if self.env.namespaces.pid {
            use rustix::fs::{Mode, OFlags};
            let root = format!("/proc/{first}/root");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(&root, flags, Mode::empty())
                .map_err(|e| Error::new(format!("{root}: {e}")))?;
            opener.root = Some(root);
        }
        Ok(())
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

    /// If a clock of the images is ahead of ours (after a reboot, on another machine): a time namespace in which it is
    /// not, so that it never goes backwards for the program.
    fn clocks_go_on(&self) -> Result<Option<OwnedFd>> {
        use rustix::time::{ClockId, clock_gettime};
        let Some(then) = &self.checkpoint.clocks else { return Ok(None) };
        let nanoseconds = |sec: i64, nsec: i64| i128::from(sec) * 1_000_000_000 + i128::from(nsec);
        let offset = |then: &rewake_image::messages::Timespec, clock: ClockId| {
            let now = clock_gettime(clock);
            let ahead = nanoseconds(then.tv_sec as i64, then.tv_nsec as i64)
                - nanoseconds(now.tv_sec, now.tv_nsec);
            let ahead = ahead.max(0);
            ((ahead / 1_000_000_000) as i64, (ahead % 1_000_000_000) as i64)
        };
        let monotonic = offset(&then.monotonic, ClockId::Monotonic);
        let boottime = offset(&then.boottime, ClockId::Boottime);
        if monotonic == (0, 0) && boottime == (0, 0) {
            return Ok(None);
        }
        rewake_sys::task::new_time_namespace(monotonic, boottime).map(Some).map_err(|e| {
            Error::new(format!("a time namespace in which the clocks go on cannot be made: {e}"))
        })
    }

    /// Waits until every node is born, cloners before those they clone.
    fn wait_births(&self, rings: &[Ring], created: &mut Created) -> Result<()> {
        let transient: Vec<usize> = (0..self.plans.len())
            .filter(|i| match self.lineage.nodes[*i].role {
                Role::Leader | Role::Orphaner => true,
                Role::Task(t) => self.checkpoint.tasks[t].alive.is_none(),
                Role::Group | Role::Init => false,
            })
            .collect();
        for (i, plan) in self.plans.iter().enumerate() {
            let node = &self.lineage.nodes[i];
            if transient.contains(&i) {
                created.note(node.pid, &self.pids);
                continue;
            }
            let (pid, comm) = self.name(i);
            rings[i]
                .wait(1, |waited| {
                    // A helper reports only if it could not do what it was made for.
                    let stuck = transient.iter().any(|t| rings[*t].is_done(1));
                    if stuck || waited > PATIENCE {
                        return Err(rewake_inject::Error::Timeout {
                            pid,
                            seconds: waited.as_secs(),
                        });
                    }
                    self.still_there(pid)
                })
                .or_else(|e| self.helper_error(rings, &transient).and(Err(e).of(pid, &comm)))?;
            self.check(
                &plan.birth,
                &rings[i].results(&plan.birth.script),
                pid,
                &comm,
                &mut Vec::new(),
            )?;
            created.note(node.pid, &self.pids);
        }
        Ok(())
    }

    /// Tells why a helper could not do its work, if one could not.
    fn helper_error(&self, rings: &[Ring], transient: &[usize]) -> Result<()> {
        for i in transient.iter().filter(|t| rings[**t].is_done(1)) {
            let (pid, comm) = self.name(*i);
            let birth = &self.plans[*i].birth;
            self.check(birth, &rings[*i].results(&birth.script), pid, &comm, &mut Vec::new())?;
        }
        Ok(())
    }

    fn name(&self, node: usize) -> (Pid, Vec<u8>) {
        match self.lineage.nodes[node].role {
            Role::Task(i) => (self.checkpoint.tasks[i].pid, self.checkpoint.tasks[i].comm.clone()),
            Role::Init => (1, namespaces::INIT.to_vec()),
            _ => (self.lineage.nodes[node].pid.unwrap_or(0), b"helper".to_vec()),
        }
    }

    /// Is the stub alive? A dead one would never answer.
    fn still_there(&self, pid: Pid) -> rewake_inject::Result<()> {
        let gone = |how: &str| Err(rewake_inject::Error::Gone { tid: pid, how: how.into() });
        let Some(outer) = self.pids.outer(pid) else { return gone("it vanished") };
        match rewake_proc::read::ProcDir::open(outer).and_then(|d| d.stat(&mut Vec::new())) {
            Ok(stat) if stat.state == rewake_proc::stat::TaskState::Zombie => {
                gone(&format!("wait status {:#x}", stat.exit_code))
            }
            Ok(_) => Ok(()),
            Err(_) => gone("it vanished"),
        }
    }

    /// Compares what a script's operations resulted in with what they should have.
    fn check(
        &self,
        steps: &Steps,
        results: &rewake_inject::ring::Results,
        pid: Pid,
        comm: &[u8],
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let name = || format!("process {pid} ({})", text(comm));
        for (i, (label, expect)) in steps.labels.iter().enumerate() {
            match (expect, results.value(i)) {
                (Expect::Any, _) | (Expect::Success | Expect::Wish, Ok(_)) => {}
                (Expect::Value(wanted), Ok(value)) if *wanted == value => {}
                (Expect::Value(wanted), Ok(value)) => {
                    let what = match label {
                        Label::Fill(..) => {
                            format!(
                                "only {value} of {wanted} bytes could be read: the pages file is too short"
                            )
                        }
                        _ => format!("{value:#x} instead of {wanted:#x}"),
                    };
                    return Err(Error::new(format!("{}: {label}: {what}", name())));
                }
                (Expect::Wish, Err(errno)) => {
                    warnings.push(format!("{}: {label}: {errno}", name()))
                }
                (Expect::Success | Expect::Value(_), Err(errno)) => {
                    return Err(match label {
                        Label::Clone(child) => clone_error(*child, errno),
                        Label::Vma(..) if errno == Errno::NOMEM => {
                            Error::new(format!("{}: {label}: out of memory", name()))
                        }
                        _ => Error::new(format!("{}: {label}: {errno}", name())),
                    });
                }
            }
        }
        Ok(())
    }

    /// Hands descriptors over and has every task build itself, all at the same time.
    fn build(
        &self,
        rings: &[Ring],
        opener: &mut Opener<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let mut running = Vec::new();
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(task) = &plan.task else { continue };
            self.hand_over(ring, plan, task, opener)?;
            let number = ring.load(&task.build.script).map_err(|e| Error::new(e.to_string()))?;
            ring.ring().map_err(|e| Error::new(e.to_string()))?;
            running.push((ring, task, number));
        }
        for (ring, plan, number) in running {
            let task = self.task(plan);
            self.wait(ring, number, task)?;
            let results = ring.results(&plan.build.script);
            self.check_threads(plan, task, warnings)?;
            self.check(&plan.build, &results, task.pid, &task.comm, warnings)?;
        }
        Ok(())
    }

    fn check_threads(
        &self,
        plan: &TaskPlan,
        task: &Task,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        for thread in &plan.threads {
            let script = &thread.steps.script;
            let len = Ring::size_for(script.ops.len(), script.data_len());
            // Looking at a ring does not change it; only its header would be written by `Arena::ring`.
            let ring = self.arena.look(thread.at, len, script.data_len());
            if ring.is_done(1) {
                let results = ring.results(script);
                self.check(&thread.steps, &results, thread.tid, &task.comm, warnings)?;
            }
        }
        Ok(())
    }

    fn wait(&self, ring: &Ring, number: u32, task: &Task) -> Result<()> {
        ring.wait(number, |waited| {
            if waited > PATIENCE {
                return Err(rewake_inject::Error::Timeout {
                    pid: task.pid,
                    seconds: waited.as_secs(),
                });
            }
            self.still_there(task.pid)
        })
        .of(task.pid, &task.comm)
    }

    /// Sends a task everything it is handed, as its scripts expect it.
    fn hand_over(
        &self,
        ring: &Ring,
        plan: &NodePlan,
        task_plan: &TaskPlan,
        opener: &mut Opener<'_>,
    ) -> Result<()> {
        let task = self.task(task_plan);
        let results = ring.results(&plan.birth.script);
        let numbers = [results.u32(task_plan.socket, 0), results.u32(task_plan.socket, 4)];
        let outer = self.outer(task.pid)?;
        hand_over(outer, numbers, &task_plan.messages, self.images, opener)
            .map_err(|p| Error::of(task.pid, &task.comm, p))
    }

    /// Where a task came from a kernel with another vdso: its old one is made to lead to ours.
    fn foreign_vdsos(&self) -> Result<()> {
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let Some((address, dumped)) = dumped_vdso(self.images, alive)? else { continue };
            if dumped == self.own.vdso || dumped.is_empty() {
                continue;
            }
            let of = |p| Error::of(task.pid, &task.comm, p);
            let own_address = self.moved_vdso();
            let patches = vdso::proxy(&dumped, address, &self.own.vdso, own_address).map_err(of)?;
            for info in alive.threads.iter().filter_map(|t| t.core.thread_info.as_ref()) {
                vdso::may_continue(&dumped, address, &patches, info.gpregs.ip).map_err(of)?;
            }
            let memory = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(format!("/proc/{}/mem", self.outer(task.pid)?))
                .of(task.pid, &task.comm)?;
            vdso::write(&memory, &patches).map_err(of)?;
        }
        Ok(())
    }

    /// Where our vdso is in a task that keeps the one it came with.
    fn moved_vdso(&self) -> u64 {
        let span = self.own.specials.span().map_or(0, |s| s.start);
        let own = self.own.specials.vdso.as_ref().map_or(0, |v| v.start);
        self.env.hop + (own - span)
    }

    /// Values that are set through `/proc`, before credentials change who owns it.
    fn proc_values(&self, warnings: &mut Vec<String>) {
        let own_oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let own_filter = std::fs::read_to_string("/proc/self/coredump_filter").unwrap_or_default();
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let Some(outer) = self.pids.outer(task.pid) else { continue };
            let mut set = |name: &str, value: String| {
                if let Err(e) = std::fs::write(format!("/proc/{outer}/{name}"), &value) {
                    warnings.push(format!(
                        "process {} ({}): {name} cannot be set to {value}: {e}",
                        task.pid,
                        text(&task.comm)
                    ));
                }
            };
            if let Some(adj) = task.tc.oom_score_adj
                && own_oom.trim() != adj.to_string()
            {
                set("oom_score_adj", adj.to_string());
            }
            if let Some(filter) = alive.extra.as_ref().and_then(|e| e.coredump_filter)
                && u32::from_str_radix(own_filter.trim(), 16) != Ok(filter)
            {
                set("coredump_filter", format!("{filter:#x}"));
            }
            if let Some(uid) = task.tc.loginuid.filter(|uid| *uid != u32::MAX) {
                let now = std::fs::read_to_string(format!("/proc/{outer}/loginuid"));
                if now.is_ok_and(|now| now.trim() != uid.to_string()) {
                    set("loginuid", uid.to_string());
                }
            }
        }
    }

    fn write_pidfile(&self, text: &str) -> Result<PidFile> {
        let Some(path) = &self.options.pidfile else { return Ok(PidFile::default()) };
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| {
                let written = PidFile(Some(path.clone()));
                file.write_all(text.as_bytes()).map(|()| written)
            })
            .map_err(|e| Error::new(format!("pidfile {}: {e}", path.display())))
    }

    /// Ends group helpers, then runs the last script of every task.
    fn finish(&self, rings: &[Ring], warnings: &mut Vec<String>) -> Result<()> {
        for (i, ring) in rings.iter().enumerate() {
            if self.lineage.nodes[i].role == Role::Group {
                let mut script = Script::new(ring.data_base());
                script.push(rewake_agent::layout::Op::new(libc::SYS_exit_group, &[0]));
                ring.load(&script)
                    .and_then(|_| ring.ring())
                    .map_err(|e| Error::new(e.to_string()))?;
            }
        }
        let mut running = Vec::new();
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(task) = &plan.task else { continue };
            let number = ring.load(&task.finish.script).map_err(|e| Error::new(e.to_string()))?;
            ring.ring().map_err(|e| Error::new(e.to_string()))?;
            running.push((ring, task, number));
        }
        self.finish_init(rings)?;
        for (ring, plan, number) in running {
            let task = self.task(plan);
            self.wait(ring, number, task)?;
            let results = ring.results(&plan.finish.script);
            self.check(&plan.finish, &results, task.pid, &task.comm, warnings)?;
        }
        Ok(())
    }

    /// Runs the last script of an init.
    fn finish_init(&self, rings: &[Ring]) -> Result<()> {
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(steps) = &plan.init else { continue };
            let number = ring
                .load(&steps.script)
                .and_then(|number| ring.ring().map(|()| number))
                .and_then(|number| ring.wait(number, |_| self.still_there(1)).map(|()| number));
            number.of(1, namespaces::INIT)?;
            let results = ring.results(&steps.script);
            self.check(steps, &results, 1, namespaces::INIT, &mut Vec::new())?;
        }
        Ok(())
    }

    /// Where each task has a `syscall` instruction: in the vdso, wherever that was moved.
    fn gadgets(&self) -> Result<HashMap<i32, u64>> {
        let offset = finish::gadget(&self.own.vdso)?;
        let mut gadgets = HashMap::new();
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let vdso = alive.mm.vmas.iter().find(|v| v.status & status::VDSO != 0);
            let at = match vdso {
                Some(vdso) if same_vdso(self.images, alive, self.own)? => vdso.start,
                _ => self.moved_vdso(),
            };
            gadgets.insert(task.pid, at + offset);
        }
        Ok(gadgets)
    }
}

/// Sends messages of descriptors to the stub with the pid `outer`, whose agent's socket pair got `numbers`.
fn hand_over(
    outer: Pid,
    numbers: [u32; 2],
    messages: &[Vec<Handed>],
    images: &ImageDir,
    opener: &mut Opener<'_>,
) -> std::result::Result<(), Problem> {
    let failed = |reason: String| Problem::new("the agent's socket", reason);
    if numbers != [0, 1] {
        return Err(failed(format!("the first descriptors are {numbers:?}")));
    }
    let raw = rustix::process::Pid::from_raw(outer);
    let raw = raw.ok_or_else(|| failed(format!("{outer} is no process id")))?;
    let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        .map_err(|e| failed(format!("pidfd_open: {e}")))?;
    let none = rustix::process::PidfdGetfdFlags::empty();
    let socket = rustix::process::pidfd_getfd(&pidfd, 1, none)
        .map_err(|e| failed(format!("pidfd_getfd: {e}")))?;
    messages.iter().try_for_each(|message| send(&socket, message, images, opener))
}

/// Sends one message of descriptors.
fn send(
    socket: &OwnedFd,
    message: &[Handed],
    images: &ImageDir,
    opener: &mut Opener<'_>,
) -> std::result::Result<(), Problem> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let failed = |reason: String| Problem::new("handing descriptors over", reason);
    let mut pages = HashMap::new();
    for handed in message {
        match *handed {
            Handed::File(id) => drop(opener.open(id)?),
            Handed::Writable(id) => opener.open_writable(id)?,
            Handed::Pages(id) => {
                let file = images.open_raw(&kind::PAGES.file_name(id));
                pages.insert(id, file.map_err(|e| Problem::new("pages", e.to_string()))?);
            }
        }
    }
    let mut fds = Vec::with_capacity(message.len());
    for handed in message {
        fds.push(match *handed {
            Handed::File(id) => opener.opened(id)?,
            Handed::Writable(id) => opener.opened_writable(id)?,
            Handed::Pages(id) => pages[&id].as_fd(),
        });
    }
    let mut room = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(254))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(failed("too many of them in one message".into()));
    }
    let byte = [std::io::IoSlice::new(b"!")];
    sendmsg(socket, &byte, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
        .map(drop)
        .map_err(|e| failed(e.to_string()))
}

/// A pid that is taken is told with who has it.
fn clone_error(pid: Pid, errno: Errno) -> Error {
    if errno == Errno::EXIST {
        let dir = rewake_proc::read::ProcDir::open(pid);
        let holder = dir.and_then(|d| d.stat(&mut Vec::new())).map_or_else(
            |_| "as a thread, session or process group of others".to_owned(),
            |stat| {
                let dead = if stat.state == rewake_proc::stat::TaskState::Zombie {
                    ", which is dead and waits to be reaped"
                } else {
                    ""
                };
                format!("by process {pid} ({}){dead}", text(&stat.comm))
            },
        );
        let nobody = rewake_proc::read::ProcDir::open(pid).is_err();
        let mut error = Error::new(format!("pid {pid} of the images is taken, {holder}"))
            .hint("end that process, or use --new-pidns");
        error.transient = nobody;
        return error;
    }
    let error = Error::new(format!("creating process {pid}: {errno}"));
    if errno == Errno::PERM {
        return error.hint("choosing pids needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN");
    }
    error
}
