//! From a survey to complete images: the network lock, the queues of connections, the files, the commit.

use super::live::Live;
use super::survey::Surveyed;
use super::{aio, late, write};
use crate::error::{Error, Result};
use crate::freeze::Tree;
use crate::options::{Action, DumpOptions, FinalState, Format, Hooks};
use crate::report::DumpReport;
use crate::track::{Tracks, keeper};
use rewake_image::ImageWriter;
use rewake_objects::files::collect::Collector;
use rewake_objects::files::link_remap::Links;
use rewake_objects::memory::sysv;
use rewake_objects::sockets::lock::{self, Lock, Method};
use std::time::Instant;

/// What remains to be looked after when the images are complete.
pub(super) struct Finished {
    pub(super) report: DumpReport,
    pub(super) written_at: Instant,
    /// Dropping it unlocks the network.
    pub(super) lock: Option<Lock>,
    pub(super) sockets: rewake_objects::sockets::Survey,
}

/// A tree that runs on while it is saved.
pub(super) struct Running<'a> {
    /// Keeps its memory as it was.
    pub(super) live: &'a Live,
    /// Lets it go.
    pub(super) release: &'a mut dyn FnMut() -> Result<()>,
}

/// Refuses, or writes and commits the images. If the tree is `running`, it is let go as soon as nothing but memory is left to be
/// written that is kept.
pub(super) fn finish_images(
    images: ImageWriter,
    options: &DumpOptions,
    hooks: &mut dyn Hooks,
    mut surveyed: Surveyed,
    tracks: &Tracks,
    running: Option<Running<'_>>,
) -> Result<Finished> {
    if !surveyed.obstacles.is_empty() {
        return Err(Error::refused(surveyed.obstacles));
    }
    let run_id = run_id()?;
    // What cannot be put back is taken when there is as little as can be that may still fail.
    let takes = surveyed.files.has_unix_waiting();
    let mut lock = match takes {
        true => None,
        false => lock_and_read(&mut surveyed, options, &run_id)?,
    };
    aio::wait(&mut surveyed, options.timeout)?;
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
    if takes {
        // What is in flight there may be shared memory, whose page stores come first.
        surveyed.segments += late::ROOM;
    }
    let mut layout = write::plan(&surveyed, format);
    let runs = running.is_some();
    if takes {
        write::write(&images, &surveyed, &mut layout, &counters, false, options.dedup)?;
        late::take(&mut surveyed)?;
        lock = lock_and_read(&mut surveyed, options, &run_id)?;
    }
    let links = Links::make(&surveyed.files.contents).map_err(|p| Error::new(p.to_string()))?;
    sysv::number_apart(&mut surveyed.files);
    let after = layout.stores.iter().map(|store| store.id + 1).max();
    let further = after.filter(|_| format != Format::Criu);
    if let Some(running) = &running {
        running.live.keep_shared(&mut surveyed.files)?;
    }
    write::still(&images, &surveyed, tracks.images.as_ref(), further, &counters)?;
    let mut copies = None;
    if let Some(running) = running {
        surveyed.strangers.finish();
        (running.release)()?;
        lock = None;
        // Nobody's connection is kept open by our descriptors of it.
        let new = Collector::new(surveyed.files.options.clone());
        let Collector { contents, sysv, .. } = std::mem::replace(&mut surveyed.files, new);
        copies = Some((contents, sysv));
    }
    if !takes {
        write::write(&images, &surveyed, &mut layout, &counters, runs, options.dedup)?;
    }
    // Nobody waits for these.
    if let Some((contents, sysv)) = copies {
        write::copies(&images, &surveyed, (&contents, &sysv), further, &counters)?;
    }
    aio::check(&mut surveyed)?;
    let written_at = Instant::now();
    let mut report = DumpReport {
        pages_scanned: counters.scanned.into_inner(),
        pages_skipped_parent: counters.skipped.into_inner(),
        pages_written: counters.written.into_inner(),
        shpages_scanned: counters.shared_scanned.into_inner(),
        shpages_skipped_parent: counters.shared_skipped.into_inner(),
        shpages_written: counters.shared_written.into_inner(),
        tasks: surveyed.tasks.len(),
        threads: surveyed.threads(),
        warnings: std::mem::take(&mut surveyed.strangers).warnings(),
        ..DumpReport::default()
    };
    let method = match &lock {
        Some(lock) if options.final_state != FinalState::Running => {
            lock.method(&surveyed.files.sockets)
        }
        _ => Method::Skip,
    };
    let mut inventory = write::inventory(
        layout.own_format || counters.further.into_inner() > 0,
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
pub(super) fn not_tracked(tree: &Tree, surveyed: &Surveyed, tracks: &Tracks) -> Vec<String> {
    let alive = surveyed.tasks.iter().map(|t| t.alive.as_ref());
    tree.tasks
        .iter()
        .zip(alive)
        .filter_map(|(task, alive)| tracks.warning_of(task, alive?.outside.is_watched()))
        .collect()
}

/// Removes the locks of dumps that were killed. A frozen tree would look like a stopped one, so this comes first.
pub(super) fn remove_stale_locks() {
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
pub(super) fn lock_and_read(
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
pub(super) fn run_id() -> Result<String> {
    let mut b = [0u8; 16];
    rustix::rand::getrandom(&mut b, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::new(format!("no random numbers: {e}")))?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|x| format!("{x:02x}")).collect();
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
}
