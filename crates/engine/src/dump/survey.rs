//! The survey of a frozen tree: all of its tasks, and what they hold together. It writes nothing.

use super::coming;
use super::files::{self, Files};
use super::inside::{Inside, Visible};
use super::live::Live;
use super::outside::Outside;
use super::sharing::{self, Sharing};
use super::strangers::Search;
use super::wave::{Own, Seen, survey_wave, waves};
use super::{deadline, late, leader, refuse_ourselves};
use crate::error::{Error, Result};
use crate::freeze::{Life, Shard, Task, Tree};
use crate::options::{DumpOptions, FinalState};
use crate::report::Obstacle;
use crate::restore::lineage::{Lineage, Member};
use crate::track::{Tracked, Tracks};
use rewake_objects::files::collect::{Collector, Contents, Options};
use rewake_objects::files::io_uring::registered::{self, Holder};
use rewake_objects::files::locks;
use rewake_objects::memory::sysv;
use rewake_objects::task::seccomp::Chains;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A living task, surveyed.
#[derive(Debug)]
pub(super) struct Alive {
    pub(super) outside: Outside,
    pub(super) inside: Inside,
    pub(super) files: Files,
}

/// A task, surveyed.
#[derive(Debug)]
pub(super) struct TaskSurvey {
    pub(super) pid: i32,
    pub(super) ppid: i32,
    pub(super) pgid: i32,
    pub(super) sid: i32,
    /// When it started, in clock ticks.
    pub(super) start: u64,
    pub(super) comm: Vec<u8>,
    pub(super) life: Life,
    /// `None` for a zombie.
    pub(super) alive: Option<Alive>,
}

/// A tree, surveyed.
#[derive(Debug)]
pub(super) struct Surveyed {
    pub(super) tasks: Vec<TaskSurvey>,
    pub(super) files: Collector,
    pub(super) filters: Chains,
    pub(super) sharing: Arc<Sharing>,
    pub(super) obstacles: Vec<Obstacle>,
    /// What is tracked only now.
    pub(super) tracked: Vec<Tracked>,
    /// Segments of shared memory take the first page stores.
    pub(super) segments: u32,
    /// Looks who outside the tree shares memory with it.
    pub(super) strangers: Search,
}

impl Surveyed {
    /// The number of the first task's page store.
    pub(super) fn first_pages_id(&self) -> u32 {
        1 + self.segments
    }

    /// How much is still to be copied while the tree stands still: without its private memory if that is kept (`live`). Shared
    /// memory, with which copies are compared then, counts as a part of what it is.
    pub(super) fn bytes_to_copy(&self, live: bool) -> u64 {
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
        /// So much faster is memory compared than written.
        const FASTER: u64 = 4;
        let shared = shared + self.files.sysv.bytes();
        if live { shared / FASTER } else { shared + private.sum::<u64>() }
    }

    pub(super) fn threads(&self) -> usize {
        self.tasks.iter().filter_map(|t| t.alive.as_ref()).map(|a| a.inside.cores.len()).sum()
    }
}

/// Freezes the tree and surveys it. With `cure` the agents are taken out again at once. If the agent of a dump that was
/// killed is still on its way out of a task, lets it go first.
pub(super) fn freeze_and_survey(
    options: &DumpOptions,
    cure: bool,
    tracks: &Arc<Tracks>,
    live: Option<&Arc<Live>>,
) -> Result<(Tree, Surveyed, Instant)> {
    patiently(options, |tree| survey(tree, options, cure, tracks, live))
}

/// Freezes the tree and does `work` with it, again if that fails for a reason that passes.
pub(super) fn patiently<T>(
    options: &DumpOptions,
    work: impl Fn(&mut Tree) -> Result<T>,
) -> Result<(Tree, T, Instant)> {
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let mut tree = match Tree::freeze(options.root, deadline(options)) {
            // What holds it up nobody can bring while the others stand still.
            Err(e) if e.coming && coming::is_own(options.root) => {
                return Err(Error::refused(e.obstacles));
            }
            frozen => frozen?,
        };
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
pub(super) fn survey(
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
        dies: options.final_state == FinalState::Dead,
        outside: options.outside_unix.clone(),
        external: options.external.clone(),
        scan: options.scan.clone(),
    });
    collector.pids = tree.tasks.iter().map(|t| t.pid()).collect();
    collector.threads = tree.tasks.iter().flat_map(|t| &t.tids).copied().collect();
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
    let mut strangers = Search::begin(seen.values().flat_map(|seen| &seen.visible.outside.vmas));
    let descriptors: usize = seen.values().map(|seen| seen.visible.outside.fds.len()).sum();
    if let Err(e) = rewake_sys::descriptors::make_room(descriptors) {
        log::debug!("room for {descriptors} descriptors: {e}");
    }
    let outsides = || seen.values().map(|seen| &seen.visible.outside);
    let told: usize = outsides().map(|outside| outside.told.len()).sum();
    let leased = outsides().flat_map(|outside| &outside.told).filter(|file| file.leased);
    let leased = leased.map(|file| file.inode).collect();
    collector.locks = locks::Survey::begin(descriptors - told, leased);
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
    late.extend(registered(&mut collector, tree, &tasks));
    obstacles.extend(late::named(late, &tasks));
    let ended = tree.tasks.iter().filter(|task| task.leader_ended.is_some());
    obstacles.extend(leader::signalled(&tasks, &ended.map(|task| task.pid()).collect::<Vec<_>>()));
    strangers.go_on(&tasks, &collector);
    let sharing = own.sharing.clone();
    let segments = collector.contents.iter().filter(|c| matches!(c, Contents::Shared(_)));
    let segments = (segments.count() + collector.sysv.len()) as u32;
    Ok(Surveyed {
        tasks,
        files: collector,
        filters,
        sharing,
        obstacles,
        tracked,
        segments,
        strangers,
    })
}

/// Finds what is registered with io_uring instances.
fn registered(
    collector: &mut Collector,
    tree: &Tree,
    tasks: &[TaskSurvey],
) -> Vec<(i32, rewake_objects::Problem)> {
    let holder = |(task, surveyed)| {
        let (task, surveyed): (&Arc<Task>, &TaskSurvey) = (task, surveyed);
        let alive = surveyed.alive.as_ref()?;
        let fds = alive.files.fds.as_slice();
        Some(Holder { pid: surveyed.pid, tid: task.tid(), tids: &task.tids, fds })
    };
    let holders: Vec<Holder<'_>> = tree.tasks.iter().zip(tasks).filter_map(holder).collect();
    registered::settle(collector, &holders)
}

/// Sessions and groups must be led from inside the tree, unless it is a shell's job.
pub(super) fn sessions(tree: &Tree, options: &DumpOptions) -> Vec<Obstacle> {
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
pub(super) fn lineage(tree: &Tree, options: &DumpOptions, sharing: &Sharing) -> Option<Obstacle> {
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

/// What a survey for its own sake has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// What would stand in the way of a dump.
    pub obstacles: Vec<Obstacle>,
    /// What a dump would warn of.
    pub warnings: Vec<String>,
}

/// Surveys the tree of `options.root` and returns what would stand in the way of a dump.
///
/// # Errors
/// The survey itself could not be made (no such process, no permission…).
pub fn check_tree(options: &DumpOptions) -> Result<Checked> {
    refuse_ourselves(options.root)?;
    let (mut tree, mut surveyed, _) = match freeze_and_survey(options, true, &Arc::default(), None)
    {
        // A thread that waits for it cannot be stopped.
        Err(e) if e.coming => {
            let obstacles = coming::explain(e.obstacles, None);
            return Ok(Checked { obstacles, warnings: Vec::new() });
        }
        done => done?,
    };
    surveyed.strangers.finish();
    tree.release();
    let obstacles = Obstacle::merged(coming::explain(surveyed.obstacles, None));
    Ok(Checked { obstacles, warnings: surveyed.strangers.warnings() })
}
