//! Which page goes to which page store, and in which order: from runs of pages to a plan, without any system call.
//!
//! In CRIU's format each task has one page store. Two threads that write to one file wait for each other, so a task that is
//! much larger than the others keeps one CPU busy and the rest idle. Our own format ([`SEVERAL_STORES`]) divides it among
//! several stores, and has a page that tasks share copy-on-write once.

use super::cow::Borrowing;
use rewake_image::{PageRun, PageSource, StorePage};
use rewake_objects::memory::PAGE;
use rewake_objects::memory::pages::Run;
use std::collections::HashMap;

/// What several stores must save each CPU for the images to be in our own format, in bytes (some ten milliseconds).
const WORTH: u64 = 32 << 20;
/// What each run takes besides its bytes, likewise in bytes: its mapping has to be found, and a short one is read slowly.
const RUN: u64 = 8 << 10;
/// What sharing must save in all, in bytes.
pub const WORTH_SHARING: u64 = 4 << 20;
/// Stores are no smaller than this where a task is divided.
const SLICE: u64 = 16 << 20;

/// Whose images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// CRIU's, unless much is saved by our own.
    #[default]
    Auto,
    /// CRIU's.
    Criu,
    /// Ours, if anything at all is saved by it.
    Rewake,
}

/// A page store that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// `N` of its `pages-N.img`.
    pub id: u32,
    /// Index of the task whose pages these are.
    pub task: usize,
    /// The pages, in the order of the file.
    pub runs: Vec<Run>,
}

impl Store {
    /// How many bytes it will have.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// The plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The pagemap of each task.
    pub maps: Vec<Vec<PageRun>>,
    /// All stores. The first ones are those of the tasks, in their order.
    pub stores: Vec<Store>,
    /// Can only we read it?
    pub own_format: bool,
}

/// A part of a store as it was planned: so many pages from `page` on are at `place`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// The first page.
    pub page: u64,
    /// How many.
    pub pages: u64,
    /// Where the first of them is.
    pub place: StorePage,
}

impl Moved {
    /// Is the page after these at `place`?
    pub fn follows(&self, place: StorePage) -> bool {
        let StorePage { store, page } = self.place;
        place == StorePage { store, page: page + self.pages }
    }
}

impl Layout {
    /// Changes the pagemaps to where the pages are, by store; what is not named is as planned.
    pub fn relocate(&mut self, moved: &HashMap<u32, Vec<Moved>>) {
        for (map, store) in self.maps.iter_mut().zip(&self.stores) {
            let own = store.id;
            // Pages of runs without a place: as planned, and as they are.
            let (mut planned, mut next) = (0, 0);
            let mut new = Vec::with_capacity(map.len());
            for run in map.iter().copied() {
                if !run.source.is_stored() {
                    push(&mut new, run);
                    continue;
                }
                let from = run.place.unwrap_or(StorePage { store: own, page: planned });
                if run.place.is_none() {
                    planned += run.nr_pages;
                }
                let first = StorePage { store: from.store, page: 0 };
                let same = [Moved { page: 0, pages: u64::MAX, place: first }];
                let parts = moved.get(&from.store).map_or(&same[..], Vec::as_slice);
                let first = parts.partition_point(|part| part.page + part.pages <= from.page);
                let (mut at, end) = (from.page, from.page + run.nr_pages);
                for part in parts[first..].iter().take_while(|part| part.page < end) {
                    let nr_pages = end.min(part.page + part.pages) - at;
                    let page = part.place.page + (at - part.page);
                    let place = StorePage { page, ..part.place };
                    let follows = place == StorePage { store: own, page: next };
                    if follows {
                        next += nr_pages;
                    }
                    let vaddr = run.vaddr + (at - from.page) * PAGE;
                    let place = (!follows).then_some(place);
                    push(&mut new, PageRun { vaddr, nr_pages, place, ..run });
                    at += nr_pages;
                }
            }
            self.own_format |= new.iter().any(|run| run.place.is_some());
            *map = new;
        }
    }
}

/// Plans the stores of tasks that have pages in `runs`, numbered from `first_id` on, to be written by so many `workers`.
pub fn plan(
    runs: &[&[Run]],
    sharing: &Borrowing,
    format: Format,
    first_id: u32,
    workers: usize,
) -> Layout {
    let sharing_pays = match format {
        Format::Auto => sharing.bytes() >= WORTH_SHARING,
        Format::Criu => false,
        Format::Rewake => sharing.bytes() > 0,
    };
    let none = Borrowing::default();
    let sharing = if sharing_pays { sharing } else { &none };
    let owned: Vec<Vec<Run>> =
        runs.iter().enumerate().map(|(task, runs)| stored(runs, sharing.of(task))).collect();
    let costs: Vec<u64> = owned.iter().map(|runs| cost(runs)).collect();
    let total: u64 = costs.iter().sum();
    let slice = match format {
        Format::Criu => u64::MAX,
        _ if longest(&costs, workers) < total / workers.max(1) as u64 + WORTH => u64::MAX,
        // Smaller than each worker's part: who is done early takes another one.
        _ => (total / (2 * workers as u64)).max(SLICE),
    };
    let mut stores: Vec<Store> = Vec::with_capacity(runs.len());
    let mut further: Vec<Store> = Vec::new();
    for (task, owned) in owned.into_iter().enumerate() {
        let mut parts = cut(owned, slice).into_iter();
        let own = parts.next().unwrap_or_default();
        stores.push(Store { id: first_id + task as u32, task, runs: own });
        for runs in parts {
            let id = first_id + (costs.len() + further.len()) as u32;
            further.push(Store { id, task, runs });
        }
    }
    let own_format = sharing_pays || !further.is_empty();
    stores.append(&mut further);
    let places = Places::new(&stores, runs.len());
    let maps = runs.iter().enumerate().map(|(task, runs)| {
        let own = first_id + task as u32;
        let mut next = 0;
        let mut map = Vec::with_capacity(runs.len());
        for (run, owner) in borrowed(runs, sharing.of(task)) {
            if run.parent {
                let (vaddr, nr_pages) = (run.start, run.pages());
                push(
                    &mut map,
                    PageRun { vaddr, nr_pages, source: PageSource::Parent, place: None },
                );
                continue;
            }
            places.find(owner.unwrap_or(task), &run, |vaddr, nr_pages, place| {
                // What comes next in the task's own store needs no place, as CRIU has it.
                let follows = place == StorePage { store: own, page: next };
                if follows {
                    next += nr_pages;
                }
                let source = if run.lazy { PageSource::StoredLazy } else { PageSource::Stored };
                let place = (!follows).then_some(place);
                push(&mut map, PageRun { vaddr, nr_pages, source, place });
            });
        }
        map
    });
    Layout { maps: maps.collect(), stores, own_format }
}

/// Appends a run, or makes the last one longer.
fn push(map: &mut Vec<PageRun>, run: PageRun) {
    if let Some(last) = map.last_mut()
        && last.end() == run.vaddr
        && last.source == run.source
    {
        let follows = match (last.place, run.place) {
            (None, None) => true,
            (Some(a), Some(b)) => (a.store, a.page + last.nr_pages) == (b.store, b.page),
            _ => false,
        };
        if follows {
            last.nr_pages += run.nr_pages;
            return;
        }
    }
    map.push(run);
}

/// What it takes to write the runs, as if it were so many bytes in one run.
fn cost(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.end - run.start + RUN).sum()
}

/// What the busiest of `workers` has to write if each task is written by one: the largest task goes to whoever has least.
fn longest(costs: &[u64], workers: usize) -> u64 {
    let mut costs = costs.to_vec();
    costs.sort_unstable_by(|a, b| b.cmp(a));
    let mut loads = vec![0u64; workers.max(1)];
    for cost in costs {
        if let Some(least) = loads.iter_mut().min() {
            *least += cost;
        }
    }
    loads.into_iter().max().unwrap_or(0)
}

/// Cuts runs into parts that cost as much as `slice`, or a page more.
fn cut(runs: Vec<Run>, slice: u64) -> Vec<Vec<Run>> {
    if slice == u64::MAX {
        return vec![runs];
    }
    let mut parts = vec![Vec::new()];
    let mut room = slice;
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            if room == 0 {
                parts.push(Vec::new());
                room = slice;
            }
            let end = run.end.min(at + room.saturating_sub(RUN).max(PAGE).next_multiple_of(PAGE));
            if let Some(part) = parts.last_mut() {
                part.push(Run { start: at, end, ..run });
            }
            room = room.saturating_sub(end - at + RUN);
            at = end;
        }
    }
    parts
}

/// The runs cut along what is borrowed from others: each piece with the owner, if that is another task.
fn borrowed<'a>(
    runs: &'a [Run],
    shared: &'a [super::cow::Borrowed],
) -> impl Iterator<Item = (Run, Option<usize>)> + 'a {
    let mut next = 0;
    let mut at = None;
    let mut all = runs.iter().peekable();
    std::iter::from_fn(move || {
        let run = **all.peek()?;
        let start = at.unwrap_or(run.start);
        while shared.get(next).is_some_and(|s| s.end <= start) {
            next += 1;
        }
        let (end, owner) = match shared.get(next) {
            Some(s) if s.start <= start => (s.end.min(run.end), Some(s.owner)),
            Some(s) => (s.start.min(run.end), None),
            None => (run.end, None),
        };
        at = (end < run.end).then_some(end);
        if at.is_none() {
            all.next();
        }
        Some((Run { start, end, ..run }, owner))
    })
}

/// The runs that are stored for the task itself: neither borrowed nor left to the parent images.
fn stored(runs: &[Run], shared: &[super::cow::Borrowed]) -> Vec<Run> {
    let own = borrowed(runs, shared).filter(|(run, owner)| owner.is_none() && !run.parent);
    own.map(|(run, _)| run).collect()
}

/// Where the pages of each task are stored.
struct Places(Vec<Vec<(u64, u64, StorePage)>>);

impl Places {
    fn new(stores: &[Store], tasks: usize) -> Places {
        let mut places: Vec<Vec<(u64, u64, StorePage)>> = vec![Vec::new(); tasks];
        // The parts of a task come in the order of its addresses.
        for store in stores {
            let mut page = 0;
            for run in &store.runs {
                places[store.task].push((run.start, run.end, StorePage { store: store.id, page }));
                page += run.pages();
            }
        }
        Places(places)
    }

    /// Calls `found` with each part of a run of the task: address, pages, place. Every page is stored.
    fn find(&self, task: usize, run: &Run, mut found: impl FnMut(u64, u64, StorePage)) {
        let places = self.0.get(task).map_or(&[][..], Vec::as_slice);
        let mut i = places.partition_point(|(_, end, _)| *end <= run.start);
        let mut at = run.start;
        while at < run.end {
            let Some(&(start, end, place)) = places.get(i).filter(|p| p.0 <= at) else { return };
            let to = end.min(run.end);
            let page = place.page + (at - start) / PAGE;
            found(at, (to - at) / PAGE, StorePage { page, ..place });
            at = to;
            i += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cow::Borrowed;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(start: u64, len: u64) -> Run {
        Run { start, end: start + len, lazy: true, readable: true, parent: false }
    }

    /// Address, pages, and place if it is named: store and page.
    type Place = (u64, u64, Option<(u32, u64)>);

    fn places(layout: &Layout, task: usize) -> Vec<Place> {
        let map = layout.maps[task].iter();
        map.map(|r| (r.vaddr, r.nr_pages, r.place.map(|p| (p.store, p.page)))).collect()
    }

    #[test]
    fn small_trees_are_as_criu_has_them() {
        let (a, b) = ([run(0x1000, 0x3000), run(0x8000, 0x1000)], [run(0x1000, 0x1000)]);
        let layout = plan(&[&a, &[], &b], &Borrowing::default(), Format::Auto, 5, 2);
        assert!(!layout.own_format);
        assert_eq!(layout.stores.iter().map(|s| s.id).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!(places(&layout, 0), [(0x1000, 3, None), (0x8000, 1, None)]);
        assert_eq!(places(&layout, 2), [(0x1000, 1, None)]);
    }

    #[test]
    fn what_the_parent_images_have_is_not_stored() {
        let runs =
            [run(0, 0x2000), Run { parent: true, ..run(0x2000, 0x3000) }, run(0x5000, 0x1000)];
        let layout = plan(&[&runs], &Borrowing::default(), Format::Criu, 1, 2);
        let sources: Vec<_> = layout.maps[0].iter().map(|r| (r.nr_pages, r.source)).collect();
        let lazy = PageSource::StoredLazy;
        assert_eq!(sources, [(2, lazy), (3, PageSource::Parent), (1, lazy)]);
        assert!(layout.maps[0].iter().all(|r| r.place.is_none()));
        assert_eq!(layout.stores[0].bytes(), 0x3000);
    }

    #[test]
    fn a_large_task_is_divided_and_nothing_is_lost() {
        let (big, small) = ([run(0, 300 * MIB), run(400 * MIB, 100 * MIB)], [run(0, MIB)]);
        for (format, workers, divided) in [
            (Format::Auto, 2, true),
            (Format::Rewake, 2, true),
            (Format::Auto, 1, false),
            (Format::Criu, 2, false),
        ] {
            let layout = plan(&[&big, &small], &Borrowing::default(), format, 1, workers);
            assert_eq!(layout.own_format, divided, "{format:?} {workers}");
            let stored: u64 = layout.stores.iter().map(Store::bytes).sum();
            assert_eq!(stored, 401 * MIB);
            // Every page is where its store has it.
            for (task, runs) in [&big[..], &small].into_iter().enumerate() {
                let mut next = 0;
                let mut mapped = 0;
                for entry in &layout.maps[task] {
                    let own = StorePage { store: 1 + task as u32, page: next };
                    let place = entry.place.unwrap_or(own);
                    if entry.place.is_none() {
                        next += entry.nr_pages;
                    }
                    let store = layout.stores.iter().find(|s| s.id == place.store).unwrap();
                    assert_eq!(store.task, task);
                    let mut page = 0;
                    let at = store.runs.iter().find_map(|r| {
                        let here = place.page.checked_sub(page).filter(|p| *p < r.pages());
                        page += r.pages();
                        here.map(|p| r.start + p * PAGE)
                    });
                    assert_eq!(at, Some(entry.vaddr));
                    mapped += entry.bytes();
                }
                assert_eq!(mapped, runs.iter().map(Run::pages).sum::<u64>() * PAGE);
            }
        }
    }

    #[test]
    fn what_has_moved_is_found() {
        let (a, b) = ([run(0, 5 * PAGE), run(8 * PAGE, PAGE)], [run(0, 3 * PAGE)]);
        let plan = || plan(&[&a, &b], &Borrowing::default(), Format::Auto, 1, 2);
        let moved = |page, pages, store, to| {
            let place = StorePage { store, page: to };
            Moved { page, pages, place }
        };
        let mut same = plan();
        same.relocate(&[(1, vec![moved(0, 6, 1, 0)])].into());
        assert_eq!(same, plan());
        // The second page of the first is like its first, and the second of the other like its fourth.
        let mut layout = plan();
        let first = vec![moved(0, 1, 1, 0), moved(1, 1, 1, 0), moved(2, 4, 1, 1)];
        let second = vec![moved(0, 1, 2, 0), moved(1, 1, 1, 2), moved(2, 1, 2, 1)];
        layout.relocate(&[(1, first), (2, second)].into());
        assert!(layout.own_format);
        assert_eq!(
            places(&layout, 0),
            [(0, 1, None), (PAGE, 1, Some((1, 0))), (2 * PAGE, 3, None), (8 * PAGE, 1, None)]
        );
        assert_eq!(
            places(&layout, 1),
            [(0, 1, None), (PAGE, 1, Some((1, 2))), (2 * PAGE, 1, None)]
        );
    }

    #[test]
    fn two_equal_tasks_need_no_division() {
        let runs = [run(0, 500 * MIB)];
        let layout = plan(&[&runs, &runs], &Borrowing::default(), Format::Auto, 1, 2);
        assert!(!layout.own_format);
    }

    #[test]
    fn what_is_shared_is_stored_once() {
        let parent = [run(0, 8 * MIB)];
        let child = [run(0, 4 * MIB), run(4 * MIB, 4 * MIB), run(16 * MIB, 0x2000)];
        let shared = Borrowed { start: MIB, end: 7 * MIB, owner: 0 };
        let sharing = Borrowing::new(vec![vec![], vec![shared]]);
        let layout = plan(&[&parent, &child], &sharing, Format::Auto, 1, 1);
        assert!(layout.own_format);
        assert_eq!(places(&layout, 0), [(0, 2048, None)]);
        assert_eq!(
            places(&layout, 1),
            [
                (0, 256, None),
                (MIB, 1536, Some((1, 256))),
                (7 * MIB, 256, None),
                (16 * MIB, 2, None)
            ]
        );
        assert_eq!(layout.stores[1].bytes(), 2 * MIB + 0x2000);
        let plain = plan(&[&parent, &child], &sharing, Format::Criu, 1, 1);
        assert!(!plain.own_format && plain.stores[1].bytes() == 8 * MIB + 0x2000);
        // Little is not worth a format of our own, unless that is asked for.
        let little = Borrowing::new(vec![vec![], vec![Borrowed { end: 2 * MIB, ..shared }]]);
        assert!(!plan(&[&parent, &child], &little, Format::Auto, 1, 1).own_format);
        assert!(plan(&[&parent, &child], &little, Format::Rewake, 1, 1).own_format);
    }

    #[test]
    fn what_is_scattered_takes_longer_than_its_bytes() {
        let scattered: Vec<Run> = (0..10_000).map(|n| run(n * 2 * PAGE, PAGE)).collect();
        let dense = [run(0, 10_000 * PAGE)];
        let stores =
            |runs: &[Run], format| plan(&[runs], &Borrowing::default(), format, 1, 2).stores.len();
        assert_eq!(stores(&dense, Format::Auto), 1);
        assert_eq!(stores(&scattered, Format::Auto), 4);
        assert_eq!(stores(&scattered, Format::Criu), 1);
        let layout = plan(&[&scattered], &Borrowing::default(), Format::Auto, 1, 2);
        let written: u64 = layout.stores.iter().map(Store::bytes).sum();
        assert_eq!(written, 10_000 * PAGE);
        assert!(layout.stores.iter().all(|store| store.bytes() < 11 * MIB));
    }
}
