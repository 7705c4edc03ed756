//! A dump: freeze, survey, refuse or write, final state.
//!
//! The survey writes nothing and yields plain values ([`Surveyed`]); obstacles are gathered, not stumbled upon, so that
//! a refusal names them all and `check -t` can print them.

mod aio;
pub(crate) mod coming;
mod cow;
mod equal;
mod files;
mod finish;
mod inside;
mod late;
pub(crate) mod layout;
mod leader;
mod live;
mod mappings;
mod outside;
mod pre;
mod probes;
mod sharing;
mod strangers;
mod survey;
mod thread;
mod wave;
mod write;

pub use pre::pre_dump;
pub use survey::{Checked, check_tree};

use crate::error::{Error, Result};
use crate::freeze::{Life, Tree};
use crate::options::{Action, DumpOptions, FinalState, Hooks};
use crate::report::DumpReport;
use crate::track::Tracks;
use finish::{Finished, Running, finish_images, not_tracked, remove_stale_locks};
use live::{Live, Plan};
use rewake_image::ImageWriter;
use rewake_inject::guard::Guard;
use rewake_objects::Passing;
use rewake_objects::sockets::lock::{Lock, Method};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use survey::{Surveyed, freeze_and_survey};

/// Saves the tree of `options.root` to images.
///
/// # Errors
/// Anything that stops the dump; the tree then runs on as before.
pub fn dump(options: &DumpOptions, hooks: &mut dyn Hooks) -> Result<DumpReport> {
    refuse_ourselves(options.root)?;
    let images = create(options)?;
    let dies = options.final_state == FinalState::Dead;
    let mut tracks =
        Tracks::take(&options.images_dir, options.parent.as_deref(), options.track_mem && !dies)?;
    let warnings = std::mem::take(&mut tracks.warnings);
    let tracks = Arc::new(tracks);
    let mut report = prepare_and_dump(options, hooks, images, &tracks)
        .inspect_err(|_| tracks.put_back(&options.images_dir))
        .map_err(Error::with_limit)?;
    report.warnings.splice(..0, warnings);
    Ok(report)
}

fn deadline(options: &DumpOptions) -> Option<Instant> {
    options.timeout.map(|t| Instant::now() + t)
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
    let (since, give_up) = (Instant::now(), deadline(options));
    let mut images = Some(images);
    loop {
        let images = match images.take() {
            Some(images) => images,
            None => create(options)?,
        };
        match attempt(options, hooks, images, tracks) {
            // Only when all memory is there it is known whether it is much.
            Err(e) if e.coming => coming::wait(e, since, give_up)?,
            done => return done,
        }
    }
}

fn create(options: &DumpOptions) -> Result<ImageWriter> {
    let mut images = ImageWriter::create(&options.images_dir)?;
    images.compress(options.compression);
    Ok(images)
}

/// Dumps the tree, in the way that suits it.
fn attempt(
    options: &DumpOptions,
    hooks: &mut dyn Hooks,
    images: ImageWriter,
    tracks: &Arc<Tracks>,
) -> Result<DumpReport> {
    let (images, why) = match Live::begin(options, hooks.listens())? {
        Plan::Small => return try_dump(options, hooks, images, tracks, None),
        Plan::Stop(why) => (images, why),
        Plan::Live(live) => match try_dump(options, hooks, images, tracks, Some(live)) {
            Err(e) if e.still => (create(options)?, e.message),
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
    /// What passes is waited for so long, where no time is given.
    const PATIENCE: Duration = Duration::from_secs(10);
    let give_up = Instant::now() + options.timeout.unwrap_or(PATIENCE);
    let mut rest = Duration::from_millis(5);
    let dies = options.final_state == FinalState::Dead;
    let mut tries = 0;
    loop {
        let begun = Instant::now();
        let (tree, mut surveyed, frozen) = freeze_and_survey(options, !dies, tracks, live)?;
        if coming::is_all(&surveyed.obstacles) {
            return Err(coming::error(surveyed.obstacles));
        }
        // The tree runs on meanwhile: requests in flight end only then.
        let passes = !surveyed.obstacles.is_empty()
            && surveyed.obstacles.iter().all(|obstacle| obstacle.passing == Passing::Requests);
        if passes && Instant::now() + rest < give_up {
            log::debug!("{}; waiting for that to pass", surveyed.obstacles[0]);
            drop(surveyed);
            drop(tree);
            std::thread::sleep(rest);
            rest = (rest * 2).min(Duration::from_millis(200));
            continue;
        }
        surveyed.obstacles = coming::explain(surveyed.obstacles, None);
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
    let running = live.as_deref().map(|live| Running { live, release: &mut release });
    let result = finish_images(images, options, hooks, surveyed, tracks, running);
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

/// Sees to it that all of the tree dies, should we die while we kill it.
fn kill_guard(tree: &Tree) -> std::result::Result<Option<Guard>, String> {
    let living = tree.tasks.iter().filter(|t| !matches!(t.life, Life::Zombie(_)));
    let pids: Vec<i32> = living.map(|t| t.pid()).collect();
    match pids.len() {
        0 | 1 => Ok(None),
        _ => Guard::post(&pids).map(Some).map_err(|e| e.to_string()),
    }
}
