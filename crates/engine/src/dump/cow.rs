//! Pages that tasks share copy-on-write: those of forked processes that neither side has written since.
//!
//! `/proc/PID/pagemap` tells which frame of memory a page is in. Only pages at the same address are compared: fork(2) shares
//! no others. A frame says nothing if the page moves to another one meanwhile (compaction, swap) and the frame goes to another
//! task; so all tasks are asked twice, one after the other, and what has changed in between is not taken for shared.

use super::layout::Format;
use crate::crew::spread;
use crate::error::Result;
use rewake_objects::memory::PAGE;
use rewake_objects::memory::pages::Run;
use rewake_proc::pagemap::{Entry, FILE_OR_SHARED, MMAP_EXCLUSIVE, PFN, SWAPPED, entries};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// So many pages are compared at a time.
const WINDOW: u64 = 4096;
const WINDOW_BYTES: u64 = WINDOW * PAGE;

/// A range whose pages are those that another task has at the same addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Borrowed {
    /// First byte.
    pub start: u64,
    /// Past the last byte.
    pub end: u64,
    /// Index of the task, which borrows them from nobody.
    pub owner: usize,
}

/// What each task borrows from others: ascending, without overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Borrowing(Vec<Vec<Borrowed>>);

/// A task whose pages are compared.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its `/proc/PID/pagemap`.
    pub pagemap: &'a File,
    /// Its pages.
    pub runs: &'a [Run],
}

impl Borrowing {
    /// By task.
    pub fn new(borrowed: Vec<Vec<Borrowed>>) -> Borrowing {
        Borrowing(borrowed)
    }

    /// What a task borrows.
    pub fn of(&self, task: usize) -> &[Borrowed] {
        self.0.get(task).map_or(&[], Vec::as_slice)
    }

    /// How many bytes need not be stored.
    pub fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(|b| b.end - b.start).sum()
    }

    /// Compares tasks that stand still, the owners first. `format` says how much is worth looking for.
    pub fn find(tasks: &[Option<Candidate<'_>>], format: Format) -> Borrowing {
        let windows = windows(tasks);
        let most: u64 = windows.iter().flat_map(|(_, tasks)| tasks).map(|(_, bytes)| bytes).sum();
        if format == Format::Criu || format == Format::Auto && most < super::layout::WORTH_SHARING {
            return Borrowing::default();
        }
        /// Windows, and members of windows, that are worth a thread of our own.
        const ENOUGH: usize = 4;
        const MANY: usize = 128;
        let members: usize = windows.iter().map(|(_, members)| members.len()).sum();
        let enough = if members >= MANY { 1 } else { ENOUGH };
        let look = |windows: &[Window]| {
            let mut found: Vec<Vec<Borrowed>> = vec![Vec::new(); tasks.len()];
            let mut room = Room::new();
            for (window, members) in windows {
                compare(tasks, *window, members, &mut room, &mut found)?;
            }
            Ok(found)
        };
        match spread(&windows, enough, look) {
            Ok(parts) => {
                let mut all: Vec<Vec<Borrowed>> = vec![Vec::new(); tasks.len()];
                for part in parts {
                    all.iter_mut().zip(part).for_each(|(all, part)| all.extend(part));
                }
                Borrowing::new(all)
            }
            // Each task is then saved by itself.
            Err(e) => {
                log::warn!("what processes share copy-on-write is not noticed: {e}");
                Borrowing::default()
            }
        }
    }
}

/// A window by its number, and the tasks that have pages in it, with their bytes.
type Window = (u64, Vec<(usize, u64)>);

/// The windows in which several tasks have pages that may be shared.
fn windows(tasks: &[Option<Candidate<'_>>]) -> Vec<Window> {
    let mut all: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
    for (task, candidate) in tasks.iter().enumerate() {
        for run in candidate.iter().flat_map(|candidate| candidate.runs).filter(may_be_shared) {
            for window in run.start / WINDOW_BYTES..run.end.div_ceil(WINDOW_BYTES) {
                let start = run.start.max(window * WINDOW_BYTES);
                let bytes = run.end.min((window + 1) * WINDOW_BYTES) - start;
                let members = all.entry(window).or_default();
                match members.last_mut() {
                    Some(last) if last.0 == task => last.1 += bytes,
                    _ => members.push((task, bytes)),
                }
            }
        }
    }
    all.into_iter().filter(|(_, members)| members.len() > 1).collect()
}

/// May pages of it have several users? Of a mapping of which `smaps` says that none has, nothing is asked.
fn may_be_shared(run: &&Run) -> bool {
    !run.readable
}

/// What tells pages of different tasks apart; 0 for what is nobody else's.
fn key(word: Entry) -> u64 {
    if word.has(SWAPPED) {
        return word.0 & (PFN | SWAPPED);
    }
    match word.pfn() {
        Some(frame) if !word.has(MMAP_EXCLUSIVE) && !word.has(FILE_OR_SHARED) => frame,
        _ => 0,
    }
}

/// A page of a window, by its number there, and its key, which is not 0.
type Keyed = (u32, u64);

/// Reads what a task has in a window: those of its pages that are to be saved and may be somebody else's too. `words` is room
/// for the text.
fn keys(
    candidate: &Candidate<'_>,
    window: u64,
    words: &mut Vec<u8>,
    keys: &mut Vec<Keyed>,
) -> std::io::Result<()> {
    /// Pages without a run between two are read beside, to save a call.
    const BESIDE: u64 = 128 * PAGE;
    keys.clear();
    let (start, end) = (window * WINDOW_BYTES, (window + 1) * WINDOW_BYTES);
    let first = candidate.runs.partition_point(|run| run.end <= start);
    let here = candidate.runs[first..].iter().take_while(|run| run.start < end);
    let parts = here.filter(may_be_shared).map(|run| (run.start.max(start), run.end.min(end)));
    // What `words` has.
    let mut read = 0..0;
    let mut parts = parts.peekable();
    while let Some((from, to)) = parts.next() {
        if to > read.end {
            let mut until = to;
            let mut ahead = parts.clone();
            while let Some((_, to)) = ahead.next_if(|(from, _)| *from < until + BESIDE) {
                until = to;
            }
            words.resize(((until - from) / PAGE * 8) as usize, 0);
            candidate.pagemap.read_exact_at(words, from / PAGE * 8)?;
            read = from..until;
        }
        let at = |address: u64| ((address - read.start) / PAGE * 8) as usize;
        let page = ((from - start) / PAGE) as u32;
        let here = (page..).zip(entries(&words[at(from)..at(to)]).map(key));
        keys.extend(here.filter(|(_, key)| *key != 0));
    }
    Ok(())
}

/// Who was the first to have which page in a window, by page and key.
#[derive(Debug)]
struct Owners {
    /// For each page the first of its nodes, counted from 1.
    heads: Vec<u32>,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    key: u64,
    owner: usize,
    /// The page's next one.
    next: u32,
}

impl Owners {
    fn new() -> Owners {
        Owners { heads: vec![0; WINDOW as usize], nodes: Vec::new() }
    }

    fn clear(&mut self) {
        self.heads.fill(0);
        self.nodes.clear();
    }

    /// The owner of a page with this key: `task`, if it is the first to have it.
    fn of(&mut self, (page, key): Keyed, task: usize) -> usize {
        let head = &mut self.heads[page as usize];
        let mut at = *head;
        while let Some(node) = self.nodes.get((at as usize).wrapping_sub(1)) {
            if node.key == key {
                return node.owner;
            }
            at = node.next;
        }
        self.nodes.push(Node { key, owner: task, next: *head });
        *head = self.nodes.len() as u32;
        task
    }
}

/// What comparing needs room for.
#[derive(Debug)]
struct Room {
    words: Vec<u8>,
    again: Vec<Keyed>,
    owners: Owners,
}

impl Room {
    fn new() -> Room {
        Room { words: Vec::new(), again: Vec::new(), owners: Owners::new() }
    }
}

fn compare(
    tasks: &[Option<Candidate<'_>>],
    window: u64,
    members: &[(usize, u64)],
    room: &mut Room,
    found: &mut [Vec<Borrowed>],
) -> Result<()> {
    let Room { words, again, owners } = room;
    let candidates = members.iter().filter_map(|(task, _)| Some((*task, tasks[*task].as_ref()?)));
    let mut read = |candidate: &Candidate<'_>, into: &mut Vec<Keyed>| {
        keys(candidate, window, words, into)
            .map_err(|e| crate::error::Error::new(format!("reading a pagemap: {e}")))
    };
    let mut first: Vec<(usize, Vec<Keyed>)> = Vec::with_capacity(members.len());
    for (task, candidate) in candidates.clone() {
        let mut once = Vec::new();
        read(candidate, &mut once)?;
        first.push((task, once));
    }
    for ((_, once), (_, candidate)) in first.iter_mut().zip(candidates) {
        if once.is_empty() {
            continue;
        }
        read(candidate, again)?;
        // Both ascend by page.
        let mut rest = again.iter().peekable();
        once.retain(|was| {
            while rest.next_if(|is| is.0 < was.0).is_some() {}
            rest.next_if_eq(&was).is_some()
        });
    }
    owners.clear();
    gather(window * WINDOW_BYTES, &first, owners, found);
    Ok(())
}

/// Finds equal keys of the same page; `start` is the address of the first.
fn gather(
    start: u64,
    keys: &[(usize, Vec<Keyed>)],
    owners: &mut Owners,
    found: &mut [Vec<Borrowed>],
) {
    for (task, keys) in keys {
        for keyed in keys {
            let owner = owners.of(*keyed, *task);
            if owner == *task {
                continue;
            }
            let at = start + u64::from(keyed.0) * PAGE;
            match found[*task].last_mut() {
                Some(last) if last.end == at && last.owner == owner => last.end += PAGE,
                _ => found[*task].push(Borrowed { start: at, end: at + PAGE, owner }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with the words of a pagemap, for pages from 0 on.
    fn pagemap(words: &[u64]) -> File {
        let file = rustix::fs::memfd_create("pagemap", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.expect("a memfd"));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        file.write_all_at(&bytes, 0).expect("it has room");
        file
    }

    fn run(start: u64, pages: u64) -> Run {
        let start = start * PAGE;
        Run { start, end: start + pages * PAGE, lazy: true, readable: false, parent: false }
    }

    const THERE: u64 = 1 << 63;

    #[test]
    fn equal_frames_at_equal_addresses() {
        let parent = [1, 2, 3, 9, 5, 6].map(|frame| THERE | frame);
        let mut child = [1, 2, 7, 3, 8, 6].map(|frame| THERE | frame);
        // Only the parent is asked for this one.
        child[4] = 0;
        let exclusive = |mut words: [u64; 6], at: usize| {
            words[at] |= MMAP_EXCLUSIVE;
            words
        };
        // Whatever the frame, an exclusive page is nobody else's.
        let other = exclusive([1, 4, 7, 4, 4, 6].map(|frame| THERE | frame), 5);
        let files = [pagemap(&parent), pagemap(&child), pagemap(&other)];
        let runs = [vec![run(0, 6)], vec![run(0, 4), run(5, 1)], vec![run(0, 6)]];
        let tasks: Vec<_> = files
            .iter()
            .zip(&runs)
            .map(|(pagemap, runs)| Some(Candidate { pagemap, runs }))
            .collect();
        let found = Borrowing::find(&tasks, Format::Rewake);
        let of = |task| {
            let pages = found.of(task).iter().map(|b| (b.start / PAGE, b.end / PAGE, b.owner));
            pages.collect::<Vec<_>>()
        };
        assert_eq!(of(0), []);
        assert_eq!(of(1), [(0, 2, 0), (5, 6, 0)]);
        assert_eq!(of(2), [(0, 1, 0), (2, 3, 1)]);
        assert_eq!(found.bytes(), 5 * PAGE);
        // Little is not looked for.
        assert_eq!(Borrowing::find(&tasks, Format::Auto), Borrowing::default());
    }

    #[test]
    fn what_spans_windows_is_found_whole() {
        let words: Vec<u64> = (1..=3 * WINDOW).map(|frame| THERE | frame).collect();
        let files = [pagemap(&words), pagemap(&words)];
        let runs = [vec![run(10, 2 * WINDOW)], vec![run(0, 3 * WINDOW)]];
        let tasks: Vec<_> = files
            .iter()
            .zip(&runs)
            .map(|(pagemap, runs)| Some(Candidate { pagemap, runs }))
            .collect();
        let found = Borrowing::find(&tasks, Format::Auto);
        assert_eq!(found.bytes(), 2 * WINDOW_BYTES);
        assert!(found.of(1).iter().all(|b| b.owner == 0));
    }
}
