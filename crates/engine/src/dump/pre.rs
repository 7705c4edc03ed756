//! A pre-dump: memory alone, copied while the tree runs. What is written meanwhile is noticed, and saved by the next one.

use super::coming;
use super::inside;
use super::live::Before;
use super::outside::Outside;
use super::survey::patiently;
use super::wave::{Own, look_at, suspend_seccomp, track, waves};
use super::write::{self, Counters, Memory};
use super::{deadline, mappings, refuse_ourselves};
use crate::crew::cpus;
use crate::error::{Error, Result};
use crate::freeze::{Held, Shard, Task, Tree};
use crate::options::DumpOptions;
use crate::report::DumpReport;
use crate::track::{Tracked, Tracks, keeper};
use rewake_image::ImageWriter;
use rewake_objects::memory::contents::{Target, Written};
use rewake_objects::memory::segments::Segments;
use std::sync::Arc;
use std::time::Instant;

/// A task, its memory as it looks from outside, and how it is tracked from now on.
struct Seen {
    task: Arc<Task>,
    outside: Outside,
    tracked: Option<Tracked>,
}

/// Saves the memory of the tree of `options.root`, which runs on, and keeps track of it from then on.
///
/// # Errors
/// Anything that stops it; the tree runs on as before, and is not tracked.
pub fn pre_dump(options: &DumpOptions) -> Result<DumpReport> {
    refuse_ourselves(options.root)?;
    let images = ImageWriter::create(&options.images_dir)?;
    let mut tracks = Tracks::take(&options.images_dir, options.parent.as_deref(), true)?;
    let mut warnings = std::mem::take(&mut tracks.warnings);
    let tracks = Arc::new(tracks);
    // What that takes is not to be waited for while the tree stands still.
    mappings::get_ready();
    let (since, give_up) = (Instant::now(), deadline(options));
    let mut start = since;
    let (mut tree, seen, frozen) = loop {
        match patiently(options, |tree| survey(tree, &tracks)) {
            Err(e) if e.coming => coming::wait(e, since, give_up)?,
            done => break done?,
        }
        start = Instant::now();
    };
    tree.release();
    let released = Instant::now();
    log::info!("{} tasks were stopped for {:?}", tree.tasks.len(), released - start);

    let warning_of = |s: &Seen| tracks.warning_of(&s.task, s.outside.is_watched());
    warnings.extend(seen.iter().filter_map(warning_of));
    if let Some(parent) = &tracks.parent {
        images.link_parent(parent)?;
    }
    let counters = Counters::default();
    write::each(seen.len(), |at, buffer| {
        let Seen { task, outside, .. } = &seen[at];
        let memory = Memory { pid: task.pid(), comm: task.comm(), outside, runs: true };
        write::write_memory(&images, &memory, at as u32 + 1, &counters, buffer)
    })?;
    let written = shared_memory(&images, &seen, &tracks)?;
    let alive: Vec<_> = seen.iter().map(|s| (s.task.pid(), s.task.stat.starttime)).collect();
    let (threads, tasks) = (seen.iter().map(|s| s.task.tids.len()).sum(), seen.len());
    let new: Vec<Tracked> = seen.into_iter().filter_map(|s| s.tracked).collect();
    let keeper = keeper::begin(&options.images_dir, &tracks.all(&new, &alive))?;
    images.commit(&write::pre_dump_inventory(options.pre_dump_mode))?;
    if let Err(e) = keeper.stay(&options.images_dir) {
        warnings.push(e.to_string());
    }
    if options.auto_dedup {
        warnings.extend(crate::dedup::after_dump(&options.images_dir));
    }
    Ok(DumpReport {
        freezing_time: frozen - start,
        frozen_time: released - start,
        memdump_time: released - frozen,
        memwrite_time: released.elapsed(),
        pages_scanned: counters.scanned.into_inner(),
        pages_skipped_parent: counters.skipped.into_inner(),
        pages_written: counters.written.into_inner(),
        shpages_scanned: written.scanned,
        shpages_skipped_parent: written.skipped,
        shpages_written: written.written,
        tasks,
        threads,
        warnings,
        ..DumpReport::default()
    })
}

/// Saves the shared memory of tasks that run on, as far as it is still there.
fn shared_memory(images: &ImageWriter, seen: &[Seen], tracks: &Tracks) -> Result<Written> {
    let mut segments = Segments::default();
    let mut buffer = Vec::new();
    for Seen { task, outside, .. } in seen {
        outside.vmas.iter().for_each(|vma| segments.mapping(&task.dir, vma));
        outside.fds.iter().for_each(|fd| segments.descriptor(&task.dir, *fd, &mut buffer));
    }
    let (parent, pages_id) = (tracks.images.as_ref(), seen.len() as u32 + 1);
    let target = Target { images, parent, pages_id, further: None, workers: cpus(), runs: true };
    segments.write(&target).map_err(|problem| Error::new(problem.to_string()))
}

/// Looks at the memory of a frozen tree, and tracks it from here on.
fn survey(tree: &mut Tree, tracks: &Arc<Tracks>) -> Result<Vec<Seen>> {
    let own = Arc::new(Own::new(tree, tracks.clone(), None)?);
    let pids: Arc<[i32]> = tree.tasks.iter().map(|task| task.pid()).collect();
    let seen = tree.each(|_| {
        let (own, pids) = (own.clone(), pids.clone());
        move |shard: &mut Shard| {
            let Shard { held, pin } = shard;
            let mut seen = Vec::with_capacity(held.len());
            for wave in waves(held, &own.sharing) {
                survey_wave(wave, &own, &pids, &mut seen)?;
            }
            pin.release();
            Ok::<_, Error>(seen)
        }
    })?;
    Ok(seen.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn survey_wave(mut held: &mut [Held], own: &Own, pids: &[i32], seen: &mut Vec<Seen>) -> Result<()> {
    // Memory that several have is its owner's.
    let is_guest = |held: &Held| !own.sharing.owns(held.task.pid()).vm;
    while let Some(first) = held.first() {
        if is_guest(first) {
            held = held.split_at_mut(1).1;
            continue;
        }
        // Those that need no agent, or are to have one under no filter, together; as in a dump.
        let mut visible = Vec::new();
        let mut alone = false;
        while let Some(next) = held.get(visible.len()).filter(|next| !is_guest(next)) {
            let looked = look_at(&next.task, own, Before::Unseen)?;
            let coming = coming::of(&next.task, &looked.outside.problems, pids);
            if !coming.is_empty() {
                return Err(coming::error(coming));
            }
            let wants = own.tracks.wants(&next.task, looked.outside.is_watched());
            let filtered = wants
                && suspend_seccomp(&next.task, looked.outside.status.seccomp.unwrap_or(0) != 0)?;
            if (filtered || !wants) && !visible.is_empty() {
                break;
            }
            visible.push((looked, wants));
            if filtered || !wants {
                alone = true;
                break;
            }
        }
        let (now, later) = held.split_at_mut(visible.len());
        let (mut visible, wants): (Vec<_>, Vec<_>) = visible.into_iter().unzip();
        let enters = !alone || wants.first() == Some(&true);
        if enters {
            inside::enter(now, &visible)?;
        }
        let uffds: Vec<_> =
            now.iter().zip(&visible).map(|(h, v)| track(h, &v.outside, own)).collect();
        now.iter_mut().for_each(Held::cure);
        for ((held, mut visible), uffd) in now.iter().zip(visible.drain(..)).zip(uffds) {
            let tracking = own.tracks.of(&held.task, uffd.as_ref(), own.counts);
            visible.outside.survey_pages(&held.task, tracking)?;
            let tracked = uffd.map(|uffd| Tracked {
                pid: held.task.pid(),
                start: held.task.stat.starttime,
                uffd,
                pidfd: visible.pidfd,
            });
            seen.push(Seen { task: held.task.clone(), outside: visible.outside, tracked });
        }
        held = later;
    }
    Ok(())
}
