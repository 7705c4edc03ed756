//! Tracking of memory between commands: the userfaultfds of a tree's processes, which the [`keeper`] holds meanwhile.

pub mod keeper;

use crate::error::{Error, Result};
use crate::freeze::Task;
use rewake_image::{ImageDir, OpenOptions};
use rewake_inject::live::Live;
use rewake_objects::memory::tracking::{FEATURES, FLAGS, Tracking};
use rewake_objects::problem::text;
use rewake_sys::userfaultfd::Userfaultfd;
use rustix::fd::OwnedFd;
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A process whose memory is tracked.
#[derive(Debug)]
pub struct Tracked {
    /// Its pid.
    pub pid: i32,
    /// When it started, in clock ticks: another process with this pid started later.
    pub start: u64,
    /// Its userfaultfd.
    pub uffd: Userfaultfd,
    /// A pidfd of it.
    pub pidfd: OwnedFd,
}

/// Which images tracking began with: device and inode of their inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Images {
    device: u64,
    inode: u64,
}

impl Images {
    /// Those of a directory.
    ///
    /// # Errors
    /// There are none.
    pub fn of(dir: &Path) -> std::io::Result<Images> {
        let inventory = dir.join(rewake_image::kind::INVENTORY.file_name(())).metadata()?;
        Ok(Images { device: inventory.dev(), inode: inventory.ino() })
    }
}

/// What is known of a tree's memory from the command before, and what this one is to do.
#[derive(Debug, Default)]
pub struct Tracks {
    tasks: HashMap<i32, Tracked>,
    /// What the parent images have of each address space.
    stored: HashMap<i32, Vec<(u64, u64)>>,
    /// Where the parent images are, if there are any.
    pub parent: Option<PathBuf>,
    /// The parent images and theirs, with which shared memory is compared.
    pub images: Option<ImageDir>,
    /// Track from now on.
    pub protect: bool,
    /// Processes that can be tracked no longer.
    dropped: Mutex<HashSet<i32>>,
    /// Why the memory of these cannot be tracked.
    untrackable: Mutex<HashMap<i32, String>>,
    /// The protection may have been renewed already, by an attempt that failed.
    spoiled: AtomicBool,
    /// Things worth knowing.
    pub warnings: Vec<String>,
}

impl Tracks {
    /// Takes over what is tracked since the images in `parent` (relative to `images`) were made.
    ///
    /// # Errors
    /// There are no images.
    pub fn take(images: &Path, parent: Option<&Path>, protect: bool) -> Result<Tracks> {
        // Images there will be replaced, and nothing can be told of them any more.
        keeper::end(images);
        let mut tracks = Tracks { protect, ..Tracks::default() };
        let Some(given) = parent else { return Ok(tracks) };
        let parent = images.join(given);
        let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
        if same(images, &parent) == Some(true) {
            return Err(Error::new(format!("{} cannot be its own parent", images.display()))
                .hint("give the directory of the dump before with --prev-images-dir"));
        }
        let options = OpenOptions { pre_dump: true, ..OpenOptions::default() };
        let dir = ImageDir::open_with(&parent, options).map_err(|e| {
            Error::new(format!("--prev-images-dir: {e}"))
                .hint("it is relative to the images directory; give one that holds images")
        })?;
        let dir = dir.with_parents().map_err(|e| {
            Error::new(format!("--prev-images-dir: {e}"))
                .hint("images need all of their parents, or cannot be restored; dump without --prev-images-dir, which saves everything")
        })?;
        match keeper::take(&parent) {
            Ok((of, tasks)) if Images::of(&parent).ok() == Some(of) => tracks.tasks = tasks,
            Ok(_) => tracks.warnings.push(format!(
                "the images in {} are not those that memory was tracked since: all of it is saved",
                parent.display()
            )),
            Err(e) => tracks.warnings.push(format!(
                "memory was not tracked since the images in {} were made ({e}): all of it is saved",
                parent.display()
            )),
        }
        for pid in tracks.tasks.keys() {
            let Some(map) = dir.read_pagemap(*pid as u32)? else { continue };
            let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(map.entries.len());
            for run in &map.entries {
                match ranges.last_mut() {
                    Some(last) if last.1 == run.vaddr => last.1 = run.end(),
                    _ => ranges.push((run.vaddr, run.end())),
                }
            }
            tracks.stored.insert(*pid, ranges);
        }
        tracks.parent = Some(given.to_owned());
        // The tree stands still while it is compared.
        dir.prefetch_shmem();
        tracks.images = Some(dir);
        Ok(tracks)
    }

    /// Begins a survey: from here on the protection is renewed, if that is what is to be done. Returns whether what was
    /// tracked until now counts.
    pub fn begin(&self) -> bool {
        !self.spoiled.swap(self.protect, Ordering::SeqCst)
    }

    /// The process as it is tracked already.
    fn known(&self, task: &Task) -> Option<&Tracked> {
        let tracked = self.tasks.get(&task.pid())?;
        let same = tracked.start == task.stat.starttime && !self.dropped().contains(&task.pid());
        same.then_some(tracked)
    }

    fn dropped(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This process is tracked no longer.
    pub fn forget(&self, task: &Task) {
        self.dropped().insert(task.pid());
    }

    /// The memory of this process cannot be tracked, which matters if that of others is or was to be.
    pub fn cannot(&self, task: &Task, why: &str) {
        if self.protect || self.parent.is_some() {
            let mut untrackable = self.untrackable.lock().unwrap_or_else(PoisonError::into_inner);
            untrackable.insert(task.pid(), why.to_owned());
        }
    }

    /// Is a userfaultfd to be made in this process? `watched`: some of its mappings are registered with one.
    pub fn wants(&self, task: &Task, watched: bool) -> bool {
        // Without any, it executes another program than the one that was tracked.
        self.protect && (self.known(task).is_none() || !watched)
    }

    /// How a task's memory is to be looked at. `new` is the userfaultfd that was made in it now; `counts` what
    /// [`Tracks::begin`] said.
    pub fn of<'a>(
        &'a self,
        task: &Task,
        new: Option<&'a Userfaultfd>,
        counts: bool,
    ) -> Tracking<'a> {
        let known = self.known(task);
        let since = known
            .filter(|_| new.is_none() && counts)
            .and_then(|t| self.stored.get(&t.pid))
            .map(Vec::as_slice);
        Tracking { with: new.or(known.map(|t| &t.uffd)), since, protect: self.protect }
    }

    /// Is or was memory tracked, but not that of this task? Says why.
    pub fn warning_of(&self, task: &Task, watched: bool) -> Option<String> {
        let untrackable = self.untrackable.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = untrackable.get(&task.pid()) {
            let (pid, comm) = (task.pid(), text(task.comm()));
            return Some(format!(
                "process {pid} ({comm}): its memory cannot be tracked ({why}): all of it is saved every time"
            ));
        }
        if self.tasks.is_empty() {
            return None;
        }
        let why = match self.tasks.get(&task.pid()) {
            None => "is new",
            Some(tracked) if tracked.start != task.stat.starttime => "is new under an old pid",
            Some(_) if !watched => "executes another program now",
            Some(_) => return None,
        };
        let (pid, comm) = (task.pid(), text(task.comm()));
        Some(format!("process {pid} ({comm}) {why}: all of its memory is saved"))
    }

    /// All that is tracked from now on: `new`, and of what was known that which lives (`alive`: pids and start times) and
    /// was not made anew.
    pub fn all<'a>(&'a self, new: &'a [Tracked], alive: &[(i32, u64)]) -> Vec<&'a Tracked> {
        let lives =
            |t: &&Tracked| alive.contains(&(t.pid, t.start)) && !new.iter().any(|n| n.pid == t.pid);
        self.tasks.values().filter(lives).chain(new).collect()
    }

    /// After a failure that changed nothing: memory is tracked as before, since the parent images were made.
    pub fn put_back(&self, images: &Path) {
        let Some(parent) = self.parent.as_ref().filter(|_| !self.protect && !self.tasks.is_empty())
        else {
            return;
        };
        let parent = images.join(parent);
        let tasks: Vec<&Tracked> = self.tasks.values().collect();
        if let Err(e) = keeper::begin(&parent, &tasks).and_then(|keeper| keeper.stay(&parent)) {
            log::warn!("{e}");
        }
    }
}

/// Makes a userfaultfd in a process that has an agent inside.
///
/// # Errors
/// Why there is none.
pub fn make(agent: &Live) -> std::result::Result<Userfaultfd, String> {
    let fd =
        agent.bring("userfaultfd", libc::SYS_userfaultfd, &[FLAGS]).map_err(|e| e.to_string())?;
    let uffd = Userfaultfd::from_fd(fd);
    uffd.enable(FEATURES).map_err(|e| {
        format!("{e}; the kernel has no asynchronous write protection (Linux 6.7 and later do)")
    })?;
    Ok(uffd)
}
