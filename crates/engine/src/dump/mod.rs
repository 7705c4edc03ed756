//! A dump: freeze, survey, refuse or write, final state.
//!
//! The survey writes nothing and yields plain values ([`Surveyed`]); obstacles are gathered, not stumbled upon, so that
//! a refusal names them all and `check -t` can print them.

mod aio;
mod cow;
mod files;
mod inside;
pub(crate) mod layout;
mod live;
mod outside;
mod pre;
mod sharing;
mod thread;
mod write;

use crate::error::{Context, Error, Result};
use crate::freeze::{Held, Life, Shard, Task, Tree};
use crate::options::{Action, DumpOptions, FinalState, Format, Hooks};
use crate::report::{DumpReport, Obstacle};
use crate::restore::lineage::{Lineage, Member};
use crate::track::{self, Tracked, Tracks, keeper};
use files::Files;
use inside::{Inside, Visible};
use live::{Before, Live, Plan};
use outside::Outside;
use rewake_image::ImageWriter;
use rewake_inject::guard::Guard;
use rewake_inject::witness::Witness;
use rewake_objects::files::collect::{Collector, Contents, Options};
use rewake_objects::files::link_remap::Links;
use rewake_objects::files::locks;
use rewake_objects::memory::{sysv, tracking};
use rewake_objects::problem::text;
use rewake_objects::sockets::lock::{self, Lock, Method};
use rewake_objects::task::seccomp::Chains;
use rewake_sys::sched::Pin;
use rewake_sys::userfaultfd::Userfaultfd;
use sharing::Sharing;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A living task, surveyed.
#[derive(Debug)]
struct Alive {
    outside: Outside,
    inside: Inside,
    files: Files,
}

pub use pre::pre_dump;

/// A task, surveyed.
#[derive(Debug)]
struct TaskSurvey {
    pid: i32,
    ppid: i32,
    pgid: i32,
    sid: i32,
    /// When it started, in clock ticks.
    start: u64,
    comm: Vec<u8>,
    life: Life,
    /// `None` for a zombie.
    alive: Option<Alive>,
}

/// A tree, surveyed.
#[derive(Debug)]
struct Surveyed {
    tasks: Vec<TaskSurvey>,
    files: Collector,
    filters: Chains,
    sharing: Arc<Sharing>,
    obstacles: Vec<Obstacle>,
    /// What is tracked only now.
    tracked: Vec<Tracked>,
    /// Segments of shared memory take the first page stores.
    segments: u32,
}

impl Surveyed {
    /// The number of the first task's page store.
    fn first_pages_id(&self) -> u32 {
        1 + self.segments
    }

    /// How much is still to be copied while the tree stands still: without its private memory if that is kept (`live`).
    fn bytes_to_copy(&self, live: bool) -> u64 {
        let segments = self.files.contents.iter().filter_map(|contents| match contents {
            Contents::Shared(segment) => rustix::fs::fstat(&segment.file).ok(),
            _ => None,
        });
        let shared: u64 = segments.map(|stat| stat.st_blocks as u64 * 512).sum();
        let private = self
            .tasks
            .iter()
            .filter_map(|task| task.alive.as_ref())
            .map(|alive| alive.outside.runs.iter().map(|run| run.end - run.start).sum::<u64>());
        shared + self.files.sysv.bytes() + if live { 0 } else { private.sum() }
    }

    fn threads(&self) -> usize {
        self.tasks.iter().filter_map(|t| t.alive.as_ref()).map(|a| a.inside.cores.len()).sum()
    }
}

/// What tasks are compared with.
struct Own {
    namespaces: Vec<Vec<u8>>,
    vdso: Vec<u8>,
    witnesses: Witnesses,
    tracks: Arc<Tracks>,
    /// What was tracked until now counts.
    counts: bool,
    sharing: Arc<Sharing>,
    /// Keeps memory as it is at this instant.
    live: Option<Arc<Live>>,
}

impl Own {
    fn new(tree: &Tree, tracks: Arc<Tracks>, live: Option<Arc<Live>>) -> Result<Own> {
        let sharing = Arc::new(Sharing::survey(&tree.tasks)?);
        Ok(Own {
            namespaces: outside::own_namespaces(),
            vdso: crate::own::AddressSpace::read()?.vdso,
            witnesses: Witnesses::default(),
            counts: tracks.begin(),
            tracks,
            sharing,
            live,
        })
    }

    /// What is known of the mappings of tasks.
    fn before(&self) -> Before<'_> {
        self.live.as_deref().map_or(Before::Unseen, Before::Protected)
    }
}

/// Whom tasks may look at that are in no Landlock domain, by user and group id.
#[derive(Debug, Default)]
struct Witnesses(Mutex<HashMap<(u32, u32), Option<Witness>>>);

impl Witnesses {
    /// The pid of one with these ids, if there can be one.
    fn of(&self, uid: u32, gid: u32) -> Option<i32> {
        let mut called = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let witness = called.entry((uid, gid)).or_insert_with(|| {
            let witness = Witness::call(uid, gid);
            witness.inspect_err(|e| log::debug!("Landlock domains are not noticed: {e}")).ok()
        });
        witness.as_ref().map(Witness::pid)
    }
}

fn deadline(options: &DumpOptions) -> Option<Instant> {
    options.timeout.map(|t| Instant::now() + t)
}

/// Freezes the tree and surveys it. With `cure` the agents are taken out again at once. If the agent of a dump that was
/// killed is still on its way out of a task, lets it go first.
fn freeze_and_survey(
    options: &DumpOptions,
    cure: bool,
    tracks: &Arc<Tracks>,
    live: Option<&Arc<Live>>,
) -> Result<(Tree, Surveyed, Instant)> {
    patiently(options, |tree| survey(tree, options, cure, tracks, live))
}

/// Freezes the tree and does `work` with it, again if that fails for a reason that passes.
fn patiently<T>(
    options: &DumpOptions,
    work: impl Fn(&mut Tree) -> Result<T>,
) -> Result<(Tree, T, Instant)> {
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let mut tree = Tree::freeze(options.root, deadline(options))?;
        let frozen = Instant::now();
        match work(&mut tree) {
            Ok(done) => return Ok((tree, done, frozen)),
            Err(e) if e.transient && Instant::now() < give_up => log::debug!("{e}; trying again"),
            Err(e) => return Err(e),
        }
        drop(tree);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Surveys a frozen tree. With `cure` the agents are taken out again at once.
fn survey(
    tree: &mut Tree,
    options: &DumpOptions,
    cure: bool,
    tracks: &Arc<Tracks>,
    live: Option<&Arc<Live>>,
) -> Result<Surveyed> {
    let own = Arc::new(Own::new(tree, tracks.clone(), live.cloned())?);
    let mut collector = Collector::new(Options {
        ghost_limit: options.ghost_limit,
        link_remap: options.link_remap,
        file_locks: options.file_locks,
        build_ids: options.build_ids,
        evasive_devices: options.evasive_devices,
        shell_job: options.shell_job,
        tcp_established: options.tcp.established,
        tcp_close: options.tcp.close,
        skip_in_flight: options.tcp.skip_in_flight,
        outside: options.outside_unix.clone(),
        external: options.external.clone(),
        scan: options.scan.clone(),
    });
    collector.pids = tree.tasks.iter().map(|t| t.pid()).collect();
    let mut obstacles = sessions(tree, options);
    obstacles.extend(lineage(tree, options, &own.sharing));
    obstacles.extend(tree.tasks.first().and_then(|root| sharing::with_parent(root)));
    let alone = tree.is_alone();
    let seen = tree.each(|_| {
        let own = own.clone();
        move |shard: &mut Shard| {
            let Shard { held, pin } = shard;
            let mut seen = Vec::with_capacity(held.len());
            for wave in waves(held, &own.sharing) {
                let pin = alone.then_some(&mut *pin);
                let pids: Vec<i32> = wave.iter().map(|held| held.task.pid()).collect();
                seen.extend(pids.into_iter().zip(survey_wave(wave, &own, pin, cure)?));
            }
            pin.release();
            Ok::<_, Error>(seen)
        }
    })?;
    let mut seen: HashMap<i32, Seen> =
        seen.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let descriptors = seen.values().map(|seen| seen.visible.outside.fds.len()).sum();
    if let Err(e) = rewake_sys::descriptors::make_room(descriptors) {
        log::debug!("room for {descriptors} descriptors: {e}");
    }
    collector.locks = locks::Survey::begin(descriptors);
    let mut tasks: Vec<TaskSurvey> = Vec::with_capacity(tree.tasks.len());
    let mut filters = Chains::default();
    let mut tracked = Vec::new();
    for (at, task) in tree.tasks.iter().enumerate() {
        let alive = match seen.remove(&task.pid()) {
            Some(Seen { visible: Visible { mut outside, pidfd }, mut inside, uffd }) => {
                let mut problems = std::mem::take(&mut outside.problems);
                problems.append(&mut inside.problems);
                inside.number_filters(&mut filters);
                // The owner of a table comes before those it shares it with.
                let owner = own.sharing.owners(at).files as usize;
                let owner = tasks.get(owner).and_then(|t| t.alive.as_ref());
                let table = owner.map(|alive| alive.files.fds.as_slice());
                let seen = files::Seen { task, outside: &outside, inside: &inside, pidfd: &pidfd };
                let files = files::survey(&mut collector, &seen, table, &mut problems)?;
                obstacles.extend(problems.into_iter().map(|p| p.of(task.pid(), task.comm())));
                tracked.extend(uffd.map(|uffd| Tracked {
                    pid: task.pid(),
                    start: task.stat.starttime,
                    uffd,
                    pidfd,
                }));
                Some(Alive { outside, inside, files })
            }
            None => None,
        };
        tasks.push(TaskSurvey {
            pid: task.pid(),
            ppid: task.stat.ppid,
            pgid: task.stat.pgrp,
            sid: task.stat.session,
            start: task.stat.starttime,
            comm: task.comm().to_vec(),
            life: task.life,
            alive,
        });
    }
    let mut late = collector.descriptors_in_flight();
    late.extend(collector.unix_peers());
    late.extend(collector.terminal_queues());
    late.extend(collector.deleted_watches());
    late.extend(sysv::judge(&mut collector));
    for (pid, problem) in late {
        let comm = tasks.iter().find(|t| t.pid == pid).map_or(&b""[..], |t| &t.comm);
        obstacles.push(problem.of(pid, comm));
    }
    let sharing = own.sharing.clone();
    let segments = collector.contents.iter().filter(|c| matches!(c, Contents::Shared(_)));
    let segments = (segments.count() + collector.sysv.len()) as u32;
    Ok(Surveyed { tasks, files: collector, filters, sharing, obstacles, tracked, segments })
}

/// A living task, as its tracer thread saw it.
struct Seen {
    visible: Visible,
    inside: Inside,
    /// Made to track its memory from now on.
    uffd: Option<Userfaultfd>,
}

/// Divides tasks into those that are asked at the same time: while one does what its agent wants, the tracer is busy with
/// the others. One that takes turns with others is alone.
fn waves<'h>(mut held: &'h mut [Held], sharing: &Sharing) -> Vec<&'h mut [Held]> {
    const WAVE: usize = 16;
    let mut waves = Vec::new();
    while !held.is_empty() {
        let few =
            |held: &&Held| !thread::needs_help(&held.task) && !sharing.takes_turns(held.task.pid());
        let len = held.iter().take(WAVE).take_while(few).count().max(1);
        let (wave, rest) = held.split_at_mut(len);
        waves.push(wave);
        held = rest;
    }
    waves
}

/// Surveys some tasks. With `pin`, the calling thread works on the CPU where the first of them is.
fn survey_wave(
    mut held: &mut [Held],
    own: &Own,
    mut pin: Option<&mut Pin>,
    cure: bool,
) -> Result<Vec<Seen>> {
    let first = held.first().map(|held| held.task.pid());
    let turn = first.and_then(|pid| own.sharing.wait_for_turn(pid));
    let cure = cure || turn.is_some();
    let mut visible = Vec::with_capacity(held.len());
    let mut filtered = Vec::with_capacity(held.len());
    for held in &*held {
        let seen = look_at(&held.task, own, own.before())?;
        filtered.push(suspend_seccomp(&held.task, seen.outside.status.seccomp.unwrap_or(0) != 0)?);
        visible.push(seen);
    }
    let mut insides = Vec::with_capacity(held.len());
    let mut uffds = Vec::with_capacity(held.len());
    while !held.is_empty() {
        // If we are killed, an agent finds its way out under the filters of its task, which may forbid it: there it stays
        // no longer than it must.
        let done = insides.len();
        let len = filtered[done..].iter().take_while(|filtered| !**filtered).count().max(1);
        let (now, later) = held.split_at_mut(len);
        insides.append(&mut inside::survey(
            now,
            &visible[done..done + len],
            &own.witnesses,
            pin.as_deref_mut(),
        )?);
        for (held, visible) in now.iter().zip(&visible[done..]) {
            uffds.push(track(held, &visible.outside, own));
        }
        if cure || filtered[done] {
            now.iter_mut().for_each(Held::cure);
        }
        for ((held, visible), uffd) in now.iter().zip(&mut visible[done..]).zip(&uffds[done..]) {
            if let Some(live) = &own.live {
                live.survey(&held.task, &mut visible.outside)?;
                continue;
            }
            let tracking = own.tracks.of(&held.task, uffd.as_ref(), own.counts);
            visible.outside.survey_pages(&held.task, tracking)?;
        }
        held = later;
    }
    let seen = visible.into_iter().zip(insides).zip(uffds);
    Ok(seen.map(|((visible, inside), uffd)| Seen { visible, inside, uffd }).collect())
}

/// Makes a userfaultfd in a task that has an agent inside, if its memory is to be tracked and is not yet. It is no reason
/// to fail if that cannot be.
fn track(held: &Held, outside: &Outside, own: &Own) -> Option<Userfaultfd> {
    if !outside.owns.vm {
        return None;
    }
    let shared = own.sharing.takes_turns(held.task.pid());
    let pinned = tracking::has_pinned_memory(&outside.vmas);
    if pinned || shared {
        own.tracks.forget(&held.task);
    }
    if !own.tracks.wants(&held.task, outside.is_watched()) {
        return None;
    }
    let why = match &held.agent {
        _ if pinned => {
            "its asynchronous I/O (io_uring, AIO) writes to memory without being noticed".to_owned()
        }
        _ if shared => "it shares memory or descriptors with another process".to_owned(),
        Some(agent) => match track::make(agent) {
            Ok(uffd) => return Some(uffd),
            Err(e) => e,
        },
        None => "it has no agent".to_owned(),
    };
    let (pid, comm) = (held.task.pid(), text(held.task.comm()));
    log::warn!("process {pid} ({comm}): its memory is not tracked: {why}");
    None
}

/// Looks at a task from outside.
fn look_at(task: &Task, own: &Own, before: Before<'_>) -> Result<Visible> {
    let (pid, comm) = (task.pid(), task.comm());
    let owns = own.sharing.owns(pid);
    let outside = outside::survey(task, owns, &own.namespaces, &own.vdso, before)?;
    if outside.has_guest() {
        let mut error = Error::new(format!(
            "process {pid} ({}) has another dump's agent inside, or memory that looks like it",
            text(comm)
        ))
        .hint("wait for the other dump to end");
        error.transient = true;
        return Err(error);
    }
    let raw = rustix::process::Pid::from_raw(pid)
        .ok_or_else(|| Error::new(format!("{pid} is no process id")))?;
    let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        .map_err(|e| format!("pidfd_open: {e}"))
        .of(pid, comm)?;
    Ok(Visible { outside, pidfd })
}

/// Has the filters of a task's threads not apply as long as they are traced: they stand still, and what runs in them
/// meanwhile is ours. Returns whether there are any.
fn suspend_seccomp(task: &Task, leader: bool) -> Result<bool> {
    use rewake_sys::ptrace::{O_SUSPEND_SECCOMP, O_TRACESYSGOOD, set_options};
    // Each thread has a mode of its own. Looking would take longer than doing it.
    if !leader && task.tids.len() == 1 {
        return Ok(false);
    }
    let suspend = |tid: &i32| set_options(*tid, O_TRACESYSGOOD | O_SUSPEND_SECCOMP);
    let Err(e) = task.tids.iter().try_for_each(suspend) else { return Ok(leader) };
    let any = leader || thread::any_filtered(task)?;
    if !any {
        return Ok(false);
    }
    Err(Error::new(format!(
        "process {} ({}): its seccomp filters cannot be suspended: {e}",
        task.pid(),
        text(task.comm())
    ))
    .hint("run rewake with CAP_SYS_ADMIN, and outside of any seccomp filter itself"))
}

/// Sessions and groups must be led from inside the tree, unless it is a shell's job.
fn sessions(tree: &Tree, options: &DumpOptions) -> Vec<Obstacle> {
    let Some(root) = tree.tasks.first() else { return Vec::new() };
    if options.shell_job || root.stat.session == root.pid() {
        return Vec::new();
    }
    let problem = rewake_objects::Problem::new(
        format!("session {}", root.stat.session),
        "the root of the tree belongs to a session that is led from outside the tree",
    )
    .remedy("use --shell-job if it is a job of a shell, or start it with setsid");
    vec![problem.of(root.pid(), root.comm())]
}

/// Could a restore create the tree's tasks again? It makes the plan for that, and so do we, while they still exist.
fn lineage(tree: &Tree, options: &DumpOptions, sharing: &Sharing) -> Option<Obstacle> {
    let root = tree.tasks.first()?;
    let in_tree = |pid: i32| tree.tasks.iter().any(|t| t.pid() == pid);
    let members: Vec<Member> = tree
        .tasks
        .iter()
        .enumerate()
        .map(|(at, task)| Member {
            pid: task.pid(),
            ppid: if in_tree(task.stat.ppid) { task.stat.ppid } else { 0 },
            pgid: task.stat.pgrp,
            sid: task.stat.session,
            zombie: task.tids.is_empty(),
            objects: sharing.owners(at),
        })
        .collect();
    // Whose session is led from outside is told by `sessions`.
    let jobs = options.shell_job || root.stat.session != root.pid();
    let error = Lineage::plan(&members, jobs, false).err()?;
    let problem = rewake_objects::Problem::new("process tree", error.message);
    Some(problem.of(root.pid(), root.comm()))
}

/// Surveys the tree of `options.root` and returns what would stand in the way of a dump.
///
/// # Errors
/// The survey itself could not be made (no such process, no permission…).
pub fn check_tree(options: &DumpOptions) -> Result<Vec<Obstacle>> {
    refuse_ourselves(options.root)?;
    let (mut tree, surveyed, _) = freeze_and_survey(options, true, &Arc::default(), None)?;
    tree.release();
    Ok(surveyed.obstacles)
}

fn refuse_ourselves(root: i32) -> Result<()> {
    let mut pid = std::process::id() as i32;
    while pid > 0 {
        if pid == root {
            return Err(Error::new(format!("process {root} is rewake itself or started it"))
                .hint("run rewake from outside the tree that is saved"));
        }
        let parent = rewake_proc::read::ProcDir::open(pid)
            .and_then(|d| d.stat(&mut Vec::new()))
            .map_or(0, |s| s.ppid);
        pid = parent;
    }
    Ok(())
}

/// Saves the tree of `options.root` to images.
///
/// # Errors
/// Anything that stops the dump; the tree then runs on as before.
pub fn dump(options: &DumpOptions, hooks: &mut dyn Hooks) -> Result<DumpReport> {
    refuse_ourselves(options.root)?;
    let mut images = ImageWriter::create(&options.images_dir)?;
    images.compress(options.compression);
    let dies = options.final_state == FinalState::Dead;
    let mut tracks =
        Tracks::take(&options.images_dir, options.parent.as_deref(), options.track_mem && !dies)?;
    let warnings = std::mem::take(&mut tracks.warnings);
    let tracks = Arc::new(tracks);
    let mut report = prepare_and_dump(options, hooks, images, &tracks)
        .inspect_err(|_| tracks.put_back(&options.images_dir))?;
    report.warnings.splice(..0, warnings);
    Ok(report)
}

/// How much private memory is to be stored.
fn private_bytes(surveyed: &Surveyed) -> u64 {
    let alive = surveyed.tasks.iter().filter_map(|task| task.alive.as_ref());
    let runs = alive.flat_map(|alive| &alive.outside.runs).filter(|run| !run.parent);
    runs.map(|run| run.end - run.start).sum()
}

/// Adds to an error about a full disk, from wherever it comes, how much room there is and how much it takes.
fn with_room(mut error: Error, directory: &Path, bytes: u64) -> Error {
    let full = std::io::Error::from_raw_os_error(libc::ENOSPC).to_string();
    if error.message.contains(&full)
        && error.hint.is_none()
        && let Ok(fs) = rustix::fs::statvfs(directory)
    {
        error.hint = Some(format!(
            "{} has {} kB free, and the private memory of the tree alone takes {} kB",
            directory.display(),
            fs.f_bavail.saturating_mul(fs.f_frsize) >> 10,
            bytes >> 10,
        ));
    }
    error
}

fn prepare_and_dump(
    options: &DumpOptions,
    hooks: &mut dyn Hooks,
    images: ImageWriter,
    tracks: &Arc<Tracks>,
) -> Result<DumpReport> {
    hooks.run(Action::PreDump, Some(options.root)).map_err(Error::new)?;
    if options.tcp.established && options.network_lock != Method::Skip {
        remove_stale_locks();
    }
    let (images, why) = match Live::begin(options, hooks.listens())? {
        Plan::Small => return try_dump(options, hooks, images, tracks, None),
        Plan::Stop(why) => (images, why),
        Plan::Live(live) => match try_dump(options, hooks, images, tracks, Some(live)) {
            Err(e) if e.still => (ImageWriter::create(&options.images_dir)?, e.message),
            done => return done,
        },
    };
    let mut report = try_dump(options, hooks, images, tracks, None)?;
    let said = format!("the tree stood still while its memory was copied: {why}");
    report.warnings.insert(0, said);
    Ok(report)
}

/// Freezes and surveys the tree; again, as long as it would stand still for longer than it may.
fn freeze_in_time(
    options: &DumpOptions,
    tracks: &Arc<Tracks>,
    live: Option<&Arc<Live>>,
) -> Result<(Tree, Surveyed, Instant)> {
    const TRIES: u32 = 10;
    let dies = options.final_state == FinalState::Dead;
    let mut tries = 0;
    loop {
        let begun = Instant::now();
        let (tree, surveyed, frozen) = freeze_and_survey(options, !dies, tracks, live)?;
        let Some(most) = options.max_pause else { return Ok((tree, surveyed, frozen)) };
        let bytes = surveyed.bytes_to_copy(live.is_some());
        let so_far = begun.elapsed();
        let pause = so_far + Duration::from_nanos(bytes);
        if pause <= most || !surveyed.obstacles.is_empty() {
            return Ok((tree, surveyed, frozen));
        }
        drop(tree);
        tries += 1;
        log::info!("the tree would stand still for {pause:?}; it runs on");
        // What is to be copied will not become less.
        if tries == TRIES || Duration::from_nanos(bytes) > most {
            return Err(Error::new(format!(
                "the tree would have to stand still for {} ms, of which {} ms to copy {} MiB that it may write to meanwhile",
                pause.as_millis(),
                bytes / 1_000_000,
                bytes >> 20
            ))
            .hint("allow more with --max-pause, or leave it out"));
        }
        std::thread::sleep(Duration::from_millis(20));
        if let Some(live) = live {
            live.prepare().map_err(Error::new)?;
        }
    }
}

fn try_dump(
    options: &DumpOptions,
    hooks: &mut dyn Hooks,
    images: ImageWriter,
    tracks: &Arc<Tracks>,
    live: Option<Arc<Live>>,
) -> Result<DumpReport> {
    let start = Instant::now();
    let dies = options.final_state == FinalState::Dead;
    let (mut tree, surveyed, frozen) = freeze_in_time(options, tracks, live.as_ref())?;
    log::info!("{} tasks frozen in {:?}", tree.tasks.len(), frozen - start);
    let surveyed_at = Instant::now();
    log::info!("surveyed in {:?}", surveyed_at - frozen);
    let warnings = not_tracked(&tree, &surveyed, tracks);
    let bytes = private_bytes(&surveyed);
    let mut stood = None;
    let mut release = || {
        tree.cure();
        tree.release();
        stood = Some(start.elapsed());
        log::info!("the tree stood still for {:?} and runs on", start.elapsed());
        live.as_ref().map_or(Ok(()), |live| live.confirm())
    };
    let release: Option<&mut dyn FnMut() -> Result<()>> =
        if live.is_some() { Some(&mut release) } else { None };
    let result = finish_images(images, options, hooks, surveyed, tracks, release);
    let Finished { mut report, written_at, mut lock, mut sockets } = match result {
        Ok(done) => done,
        Err(e) => {
            tree.cure();
            return Err(with_room(e, &options.images_dir, bytes));
        }
    };
    report.warnings.splice(..0, warnings);
    report.memdump_time = surveyed_at - frozen;
    report.memwrite_time = written_at - surveyed_at;
    report.freezing_time = frozen - start;

    if dies && report.post_dump_failed.is_none() {
        // Connections must end without a word to their peers, whom the restored end will answer.
        let silenced = lock
            .as_mut()
            .map_or(Ok(()), |lock| lock.stay(&sockets))
            .and_then(|()| sockets.silence())
            .map_err(|problem| problem.to_string());
        match silenced.and_then(|silenced| Ok((silenced, kill_guard(&tree)?))) {
            Ok((silenced, guard)) => {
                tree.kill()?;
                drop(guard);
                silenced.keep();
                sockets.close();
                if let Some(lock) = lock {
                    lock.leave();
                }
            }
            Err(problem) => {
                tree.cure();
                return Err(Error::new(format!(
                    "the images are complete, but the tree runs on: {problem}"
                )));
            }
        }
    } else {
        let stop = options.final_state == FinalState::Stopped && report.post_dump_failed.is_none();
        tree.cure();
        if stop {
            stop_locked(&tree, lock, &sockets)?;
        }
        tree.release();
        if stop {
            let alive = tree.tasks.iter().filter(|task| !task.tids.is_empty());
            crate::resume::until_stopped(alive.map(|task| task.pid()));
        }
    }
    report.frozen_time = stood.unwrap_or_else(|| start.elapsed());
    Ok(report)
}

/// Leaves the tree stopped and its connections to peers outside locked: nobody there would answer in time.
fn stop_locked(
    tree: &Tree,
    mut lock: Option<Lock>,
    sockets: &rewake_objects::sockets::Survey,
) -> Result<()> {
    if let Some(lock) = &mut lock {
        lock.stay(sockets).map_err(|problem| {
            Error::new(format!("the images are complete, but the tree runs on: {problem}"))
        })?;
    }
    crate::resume::stop_tree(tree)?;
    if let Some(lock) = lock {
        lock.leave();
    }
    Ok(())
}

/// What remains to be looked after when the images are complete.
struct Finished {
    report: DumpReport,
    written_at: Instant,
    /// Dropping it unlocks the network.
    lock: Option<Lock>,
    sockets: rewake_objects::sockets::Survey,
}

/// Refuses, or writes and commits the images. With `release` the tree runs on as soon as nothing but its private memory is
/// left to be copied.
fn finish_images(
    images: ImageWriter,
    options: &DumpOptions,
    hooks: &mut dyn Hooks,
    mut surveyed: Surveyed,
    tracks: &Tracks,
    release: Option<&mut dyn FnMut() -> Result<()>>,
) -> Result<Finished> {
    if !surveyed.obstacles.is_empty() {
        return Err(Error::refused(surveyed.obstacles));
    }
    let run_id = run_id()?;
    let mut lock = lock_and_read(&mut surveyed, options, &run_id)?;
    aio::wait(&mut surveyed, options.timeout)?;
    let links = Links::make(&surveyed.files.contents).map_err(|p| Error::new(p.to_string()))?;
    let counters = write::Counters::default();
    if let Some(parent) = &tracks.parent {
        images.link_parent(parent)?;
    }
    // The memory of the next dump is compared with this one's, task by task.
    let chained = tracks.parent.is_some() || options.track_mem;
    let format = match (chained, options.compression) {
        (true, _) => Format::Criu,
        // It is ours anyway.
        (false, Some(_)) => Format::Rewake,
        (false, None) => options.format,
    };
    let layout = write::plan(&surveyed, format);
    write::still(&images, &surveyed, &counters)?;
    let runs = release.is_some();
    if let Some(release) = release {
        release()?;
        lock = None;
        // Nobody's connection is kept open by our descriptors of it.
        surveyed.files = Collector::new(surveyed.files.options.clone());
    }
    write::write(&images, &surveyed, &layout, &counters, runs)?;
    aio::check(&mut surveyed)?;
    let written_at = Instant::now();
    let mut report = DumpReport {
        pages_scanned: counters.scanned.into_inner(),
        pages_skipped_parent: counters.skipped.into_inner(),
        pages_written: counters.written.into_inner(),
        shpages_scanned: counters.shared_scanned.into_inner(),
        shpages_written: counters.shared_written.into_inner(),
        tasks: surveyed.tasks.len(),
        threads: surveyed.threads(),
        ..DumpReport::default()
    };
    let method = match &lock {
        Some(lock) if options.final_state != FinalState::Running => {
            lock.method(&surveyed.files.sockets)
        }
        _ => Method::Skip,
    };
    let mut inventory = write::inventory(
        layout.own_format,
        options.compression,
        options.tcp.close,
        method.number(),
        run_id,
    );
    inventory.dump_uptime = options.track_mem.then(write::uptime);
    let alive: Vec<_> = surveyed.tasks.iter().map(|t| (t.pid, t.start)).collect();
    let tracked = tracks.protect.then(|| tracks.all(&surveyed.tracked, &alive));
    let keeper = tracked.map(|all| keeper::begin(&options.images_dir, &all)).transpose()?;
    images.commit(&inventory)?;
    links.keep();
    if let Some(Err(e)) = keeper.map(|keeper| keeper.stay(&options.images_dir)) {
        report.warnings.push(e.to_string());
    }
    if options.auto_dedup {
        report.warnings.extend(crate::dedup::after_dump(&options.images_dir));
    }
    if let Err(e) = hooks.run(Action::PostDump, Some(options.root)) {
        report.post_dump_failed = Some(e);
    }
    Ok(Finished { report, written_at, lock, sockets: surveyed.files.sockets })
}

/// Says of which tasks nothing is known, though memory was tracked.
fn not_tracked(tree: &Tree, surveyed: &Surveyed, tracks: &Tracks) -> Vec<String> {
    let alive = surveyed.tasks.iter().map(|t| t.alive.as_ref());
    tree.tasks
        .iter()
        .zip(alive)
        .filter_map(|(task, alive)| tracks.warning_of(task, alive?.outside.is_watched()))
        .collect()
}

/// Removes the locks of dumps that were killed. A frozen tree would look like a stopped one, so this comes first.
fn remove_stale_locks() {
    match lock::leftovers() {
        Ok(found) if !found.removed.is_empty() => {
            log::warn!("locks of dumps that were killed are removed: {}", found.removed.join(", "));
        }
        Ok(_) => {}
        // If there is something to be locked, it is refused then.
        Err(e) => log::debug!("{e}"),
    }
}

/// Locks connections to peers outside the tree and reads the queues of all.
fn lock_and_read(
    surveyed: &mut Surveyed,
    options: &DumpOptions,
    run_id: &str,
) -> Result<Option<Lock>> {
    let files = &mut surveyed.files;
    let of_root = |p: rewake_objects::Problem| Error::new(p.to_string());
    let mut lock = None;
    let taken = rewake_objects::sockets::take_waiting(files);
    let read = taken.and_then(|()| {
        if files.sockets.is_without_connections() {
            return Ok(());
        }
        let (method, root) = (options.network_lock, options.root);
        lock = Some(Lock::take(&files.sockets, run_id, method, root)?);
        rewake_objects::sockets::read(files)
    });
    // Even if that has failed, and while they are locked.
    let back = rewake_objects::sockets::put_back_waiting(files);
    read.and(back).map_err(of_root)?;
    Ok(lock)
}

/// A random UUID in text form.
fn run_id() -> Result<String> {
    let mut b = [0u8; 16];
    rustix::rand::getrandom(&mut b, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::new(format!("no random numbers: {e}")))?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|x| format!("{x:02x}")).collect();
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
}

/// Sees to it that all of the tree dies, should we die while we kill it.
fn kill_guard(tree: &Tree) -> std::result::Result<Option<Guard>, String> {
    let living = tree.tasks.iter().filter(|t| !matches!(t.life, Life::Zombie(_)));
    let pids: Vec<i32> = living.map(|t| t.pid()).collect();
    match pids.len() {
        0 | 1 => Ok(None),
        _ => Guard::post(&pids).map(Some).map_err(|e| e.to_string()),
    }
}
