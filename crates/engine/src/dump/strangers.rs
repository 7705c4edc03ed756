//! Memory that the tree shares with processes outside of it: shared anonymous memory that was inherited, memfds and deleted files that
//! were passed on. A restored tree has a copy of its own, which it shares with nobody else; whoever saves it is told so.
//!
//! Everything here is done by a thread of its own, beside the survey and the writing, for as long as the tree stands still.

use super::survey::TaskSurvey;
use rewake_objects::files::collect::{Collector, Contents};
use rewake_objects::iterators::sharers;
use rewake_objects::memory::shared;
use rewake_objects::memory::vma::{Backing, Vma};
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::SealFlags;
use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

/// So many pieces of memory are told of one by one.
const TOLD: usize = 10;

/// Device and inode of a mapped file.
type Key = ((u32, u32), u64);

/// A piece of memory of the tree.
#[derive(Debug)]
struct Segment {
    file: OwnedFd,
    key: Key,
    /// How often the tree has it mapped.
    mapped: usize,
    /// The first mapping of it that is shared.
    first: Place,
}

/// A mapping.
#[derive(Debug, Clone)]
struct Place {
    pid: i32,
    comm: String,
    start: u64,
    end: u64,
    what: String,
}

/// What is looked for.
#[derive(Debug)]
struct Task {
    segments: Vec<Segment>,
    /// The processes of the tree.
    tree: HashSet<i32>,
}

/// A search that goes on.
#[derive(Debug, Default)]
pub(super) struct Search {
    tell: Option<Sender<Task>>,
    thread: Option<JoinHandle<Vec<String>>>,
    found: Vec<String>,
}

/// Can a mapping be of memory that others outside share, and lose it by a checkpoint?
fn may_be_shared(vma: &Vma) -> bool {
    let by_nature = match &vma.backing {
        Backing::SharedAnon | Backing::Memfd(_) => true,
        Backing::File { deleted, .. } => *deleted,
        _ => false,
    };
    by_nature && vma.entry.flags & libc::MAP_SHARED as u32 != 0
}

impl Search {
    /// Begins one, if any of the tree's mappings make it necessary: what takes longest needs nothing of the survey.
    pub(super) fn begin<'a>(mut vmas: impl Iterator<Item = &'a Vma>) -> Search {
        if !vmas.any(may_be_shared) {
            return Search::default();
        }
        let (tell, task): (Sender<Task>, Receiver<Task>) = channel();
        let search = move || {
            let begun = Instant::now();
            sharers::prepare();
            let ready = begun.elapsed();
            let Ok(task) = task.recv() else { return Vec::new() };
            let begun = Instant::now();
            let warnings = task.warnings();
            let (pieces, took) = (task.segments.len(), begun.elapsed());
            log::debug!(
                "who shares {pieces} pieces of memory: ready in {ready:?}, told in {took:?}"
            );
            warnings
        };
        match Builder::new().name("strangers".into()).spawn(search) {
            Ok(thread) => Search { tell: Some(tell), thread: Some(thread), found: Vec::new() },
            Err(e) => {
                log::debug!("no thread looks for those who share memory: {e}");
                Search::default()
            }
        }
    }

    /// The tree is surveyed.
    pub(super) fn go_on(&mut self, tasks: &[TaskSurvey], files: &Collector) {
        let Some(tell) = self.tell.take() else { return };
        let segments = segments(tasks, files);
        let tree = tasks.iter().map(|task| task.pid).collect();
        // If the thread is gone, so is the reason to tell it.
        let _ = tell.send(Task { segments, tree });
    }

    /// Waits for the end: the tree is about to run.
    pub(super) fn finish(&mut self) {
        self.tell = None;
        if let Some(thread) = self.thread.take() {
            let begun = Instant::now();
            self.found = thread.join().unwrap_or_default();
            log::debug!("waited for that for {:?}", begun.elapsed());
        }
    }

    /// What is to be said.
    pub(super) fn warnings(mut self) -> Vec<String> {
        self.finish();
        self.found
    }
}

/// The pieces of memory that others may share, with all mappings that the tree has of them.
fn segments(tasks: &[TaskSurvey], files: &Collector) -> Vec<Segment> {
    let mut mapped: HashMap<Key, (usize, Option<Place>)> = HashMap::new();
    for task in tasks {
        let Some(outside) = task.alive.as_ref().map(|alive| &alive.outside) else { continue };
        if !outside.owns.vm {
            continue;
        }
        for vma in outside.vmas.iter().filter(|vma| vma.inode != 0) {
            let (count, first) = mapped.entry((vma.device, vma.inode)).or_default();
            *count += 1;
            if first.is_none() && may_be_shared(vma) {
                *first = Some(Place {
                    pid: task.pid,
                    comm: text(&task.comm),
                    start: vma.entry.start,
                    end: vma.entry.end,
                    what: match &vma.backing {
                        Backing::Memfd(name) => format!("memfd {}", text(name)),
                        Backing::File { path, .. } => format!("the deleted file {}", text(path)),
                        _ => "shared anonymous memory".to_owned(),
                    },
                });
            }
        }
    }
    // What nobody can change any more is as good when it is another one.
    let is_sealed = |segment: &shared::Segment| segment.entry.seals & SealFlags::WRITE.bits() != 0;
    let mut segments = Vec::new();
    for contents in &files.contents {
        let file = match contents {
            Contents::Shared(segment) if !is_sealed(segment) => &segment.file,
            Contents::Ghost { file, .. } => file,
            _ => continue,
        };
        let Ok(stat) = rustix::fs::fstat(file) else { continue };
        let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        let key = (device, stat.st_ino);
        if let Some((mapped, Some(first))) = mapped.get(&key)
            && let Ok(file) = file.try_clone()
        {
            segments.push(Segment { file, key, mapped: *mapped, first: first.clone() });
        }
    }
    segments
}

impl Task {
    fn warnings(&self) -> Vec<String> {
        if self.segments.is_empty() {
            return Vec::new();
        }
        let files: Vec<(BorrowedFd<'_>, usize)> =
            self.segments.iter().map(|segment| (segment.file.as_fd(), segment.mapped)).collect();
        let sharers = match sharers::of(&files) {
            Ok(sharers) => sharers,
            Err(e) => {
                log::debug!("who else has memory of the tree mapped is not noticed: {e}");
                return Vec::new();
            }
        };
        let mut others = Others::default();
        let (mut warnings, mut more) = (Vec::new(), 0);
        for (segment, pids) in self.segments.iter().zip(sharers) {
            if warnings.len() == TOLD {
                more += usize::from(pids.iter().any(|pid| self.is_outside(*pid)));
                continue;
            }
            let pids: Vec<i32> = pids.into_iter().filter(|pid| self.is_outside(*pid)).collect();
            let mut named = pids.iter().filter_map(|pid| others.share(*pid, segment.key));
            let named: Vec<(i32, String)> = named.by_ref().take(2).collect();
            // That those who are not named have it, too, is only counted.
            let unnamed = if named.len() < 2 { 0 } else { pids.len() - named.len() };
            warnings.extend(warning(&segment.first, &named, unnamed));
        }
        if more > 0 {
            warnings.push(format!(
                "processes outside the tree have {more} more pieces of its memory mapped"
            ));
        }
        warnings
    }

    fn is_outside(&self, pid: i32) -> bool {
        !self.tree.contains(&pid) && pid != std::process::id() as i32
    }
}

/// What processes outside have mapped, as they are looked at.
#[derive(Debug, Default)]
struct Others(HashMap<i32, Option<(String, HashSet<Key>)>>);

impl Others {
    /// Has a process a shared mapping of a file? Then it and its name.
    fn share(&mut self, pid: i32, key: Key) -> Option<(i32, String)> {
        let (comm, keys) = self.0.entry(pid).or_insert_with(|| shared_by(pid)).as_ref()?;
        keys.contains(&key).then(|| (pid, comm.clone()))
    }
}

/// The name of a process, and what it shares.
fn shared_by(pid: i32) -> Option<(String, HashSet<Key>)> {
    let mut buffer = Vec::new();
    let dir = ProcDir::open(pid).ok()?;
    let comm = text(&dir.stat(&mut buffer).ok()?.comm);
    let maps = dir.read("maps", &mut buffer).ok()?;
    let maps = rewake_proc::maps::parse(maps).filter_map(Result::ok).filter(|map| map.shared);
    Some((comm, maps.map(|map| ((map.dev_major, map.dev_minor), map.ino)).collect()))
}

/// What is said of memory that `named` and so many others have, too.
fn warning(first: &Place, named: &[(i32, String)], unnamed: usize) -> Option<String> {
    let Place { pid, comm, start, end, what } = first;
    let ((other, its), more) = named.split_first()?;
    let (others, verb) = match more {
        [] => (String::new(), "has"),
        [(other, its)] if unnamed == 0 => (format!(" and process {other} ({its})"), "have"),
        more => (format!(" and {} other processes", more.len() + unnamed), "have"),
    };
    Some(format!(
        "process {pid} ({comm}): mapping {start:#x}-{end:#x} ({what}): process {other} ({its}){others} outside the tree {verb} it mapped, too: a restored tree has a copy of its own, which it does not share with them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_outside_are_named() {
        let first = Place {
            pid: 7,
            comm: "worker".into(),
            start: 0x1000,
            end: 0x3000,
            what: "memfd x".into(),
        };
        let some = |n: i32| (0..n).map(|n| (n, "x".to_owned())).collect::<Vec<_>>();
        assert_eq!(warning(&first, &[], 0), None);
        let one = warning(&first, &some(1), 0).unwrap();
        let begin = "process 7 (worker): mapping 0x1000-0x3000 (memfd x): process 0 (x)";
        assert!(one.starts_with(&format!("{begin} outside the tree has it")), "{one}");
        let two = warning(&first, &some(2), 0).unwrap();
        assert!(two.starts_with(&format!("{begin} and process 1 (x) outside")), "{two}");
        let many = warning(&first, &some(2), 3).unwrap();
        assert!(many.starts_with(&format!("{begin} and 4 other processes outside")), "{many}");
    }
}
