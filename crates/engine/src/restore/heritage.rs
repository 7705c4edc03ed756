//! Pages that several tasks share copy-on-write come to them as they once did: a process has them when it clones the others.
//!
//! The clones of a restore are those of the [`Lineage`], so whoever is above all tasks that share a page has it first, at its
//! place, and hands it down; a page that is another one for later children is written again before these are cloned. In the end
//! each task unmaps what is not its own and fills what it has for itself. Mappings are handed down whole, as fork(2) does,
//! so that a task has as many as it had.
//!
//! Who shares its address space with another process (`CLONE_VM`) passes on what it has, and makes nothing for others: those
//! would be born of an address space that two processes change at the same time.
//!
//! Pure: works on images and lineage only. Where it cannot be done (mappings that differ too much between the tasks, the
//! place of the stubs' vdso) a task fills its own copy: nothing is lost but the sharing.

use super::lineage::{Lineage, Role};
use super::read::Task;
use rewake_image::messages::VmaEntry;
use rewake_image::{PageStore, StoredPages, StoredRun};
use rewake_objects::memory::PAGE;
use rewake_objects::memory::inherit::{Inheritance, is_heritable, protection};
use rewake_objects::memory::vma::status;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::rc::Rc;

/// What a process does before it clones another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Gives back what nobody below it has.
    Unmap(Range<u64>),
    /// Makes a mapping that is handed down.
    Map(VmaEntry),
    /// Writes pages that are handed down.
    Write(Vec<StoredRun>),
}

/// The plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Heritage {
    /// By the node that clones and the one that is cloned.
    acts: HashMap<(usize, usize), Vec<Act>>,
    /// By task.
    tasks: HashMap<usize, Inheritance>,
}

impl Heritage {
    /// What a node does before it clones another.
    pub fn before(&self, node: usize, child: usize) -> &[Act] {
        self.acts.get(&(node, child)).map_or(&[], Vec::as_slice)
    }

    /// What a task has from the node that clones it.
    pub fn of(&self, task: usize) -> Option<&Inheritance> {
        self.tasks.get(&task)
    }

    /// The page stores and the file ids that processes need before they clone others.
    pub fn needs(&self) -> (Vec<PageStore>, Vec<u32>) {
        let (mut stores, mut files) = (BTreeSet::new(), BTreeSet::new());
        for act in self.acts.values().flatten() {
            match act {
                Act::Write(runs) => stores.extend(runs.iter().map(|run| run.store)),
                Act::Map(vma) if vma.status & status::FILE_PRIVATE != 0 => {
                    files.extend(u32::try_from(vma.shmid));
                }
                Act::Map(_) | Act::Unmap(_) => {}
            }
        }
        (stores.into_iter().collect(), files.into_iter().collect())
    }
}

/// What mappings must have in common to be one that is handed down: what they are, how they are mapped, advice, file, and
/// where the file would begin.
type Sort = (u32, u32, u64, u64, u64);

fn sort(vma: &VmaEntry) -> Sort {
    let kind = vma.status & (status::ANON_PRIVATE | status::FILE_PRIVATE);
    let file = vma.status & status::FILE_PRIVATE != 0;
    let (id, base) = if file { (vma.shmid, vma.start.wrapping_sub(vma.pgoff)) } else { (0, 0) };
    (kind, vma.flags, vma.madv.unwrap_or(0), id, base)
}

/// A mapping that is handed down.
#[derive(Debug)]
struct Area {
    vma: VmaEntry,
    sort: Sort,
    /// How much of it is shared.
    shared: u64,
}

/// Pages that several tasks have at the same addresses.
#[derive(Debug, Clone)]
struct Piece {
    run: StoredRun,
    sort: Sort,
    tasks: Rc<Vec<usize>>,
}

/// Plans what is handed down. `may` says of a mapping whether it can be: for reasons that are not in the images.
pub fn plan(tasks: &[Task], lineage: &Lineage, may: &dyn Fn(&VmaEntry) -> bool) -> Heritage {
    // One alone has nothing in common with anybody.
    if tasks.iter().filter(|task| task.alive.is_some()).count() < 2 {
        return Heritage::default();
    }
    let is_eligible = |vma: &VmaEntry| is_heritable(vma) && may(vma);
    let mut pieces = pieces(tasks, &is_eligible);
    if pieces.is_empty() {
        return Heritage::default();
    }
    let areas = areas(tasks, &pieces, &is_eligible);
    pieces.retain(|piece| area_of(&areas, piece.run.vaddr, piece.sort).is_some());
    let mut planner = Planner::new(tasks, lineage, areas, &is_eligible);
    planner.assign(pieces);
    planner.plan()
}

/// The area of that sort with this address.
fn area_of(areas: &[Area], address: u64, sort: Sort) -> Option<usize> {
    let at = areas.partition_point(|area| area.vma.end <= address);
    areas.get(at).filter(|a| a.vma.start <= address && a.sort == sort).map(|_| at)
}

/// A run of pages in one mapping of one task.
#[derive(Debug, Clone, Copy)]
struct Part {
    run: StoredRun,
    sort: Sort,
    task: usize,
}

impl Part {
    /// Pages at the same address in the same place of the same store are the same.
    fn diagonal(&self) -> (PageStore, u64, Sort) {
        (self.run.store, self.run.offset.wrapping_sub(self.run.vaddr), self.sort)
    }
}

/// Finds what several tasks have.
fn pieces(tasks: &[Task], is_eligible: &dyn Fn(&VmaEntry) -> bool) -> Vec<Piece> {
    let mut parts: Vec<Part> = Vec::new();
    for (index, task) in tasks.iter().enumerate() {
        let Some(alive) = task.alive.as_ref().filter(|_| task.part.memory == index) else {
            continue;
        };
        let runs = alive.pages.as_ref().map_or(&[][..], |pages| pages.runs.as_slice());
        let mut next = 0;
        for vma in alive.mm.vmas.iter().filter(|vma| is_eligible(vma)) {
            while runs.get(next).is_some_and(|run| run.end() <= vma.start) {
                next += 1;
            }
            let sort = sort(vma);
            for run in runs[next..].iter().take_while(|run| run.vaddr < vma.end) {
                if let Some(run) = clip(run, vma.start, vma.end) {
                    parts.push(Part { run, sort, task: index });
                }
            }
        }
    }
    parts.sort_unstable_by_key(|part| (part.diagonal(), part.run.vaddr, part.task));
    let mut pieces = Vec::new();
    for group in parts.chunk_by(|a, b| a.diagonal() == b.diagonal()) {
        sweep(group, &mut pieces);
    }
    pieces
}

/// Walks along runs of the same diagonal, by address, and notes where several tasks have pages.
fn sweep(parts: &[Part], pieces: &mut Vec<Piece>) {
    let mut active: Vec<Part> = Vec::new();
    let mut next = 0;
    let mut at = 0;
    let mut last: Option<Rc<Vec<usize>>> = None;
    while next < parts.len() || !active.is_empty() {
        if active.is_empty() {
            at = parts[next].run.vaddr;
        }
        while parts.get(next).is_some_and(|part| part.run.vaddr <= at) {
            active.push(parts[next]);
            next += 1;
        }
        let ends = active.iter().map(|part| part.run.end());
        let end = ends.chain(parts.get(next).map(|part| part.run.vaddr)).min().unwrap_or(at);
        let mut tasks: Vec<usize> = active.iter().map(|part| part.task).collect();
        tasks.sort_unstable();
        tasks.dedup();
        if tasks.len() > 1
            && end > at
            && let Some(run) = clip(&active[0].run, at, end)
        {
            let tasks = match &last {
                Some(last) if **last == tasks => last.clone(),
                _ => Rc::new(tasks),
            };
            last = Some(tasks.clone());
            pieces.push(Piece { run, sort: active[0].sort, tasks });
        }
        at = end;
        active.retain(|part| part.run.end() > at);
    }
}

/// The part of a run inside a range.
fn clip(run: &StoredRun, start: u64, end: u64) -> Option<StoredRun> {
    let (from, to) = (run.vaddr.max(start), run.end().min(end));
    (from < to).then(|| StoredRun {
        vaddr: from,
        nr_pages: (to - from) / PAGE,
        offset: run.offset + (from - run.vaddr),
        ..*run
    })
}

/// The mappings that are handed down: of each sort, what the tasks' mappings cover together, where that is shared at all. Of
/// two that overlap, the one in which more is shared.
fn areas(tasks: &[Task], pieces: &[Piece], is_eligible: &dyn Fn(&VmaEntry) -> bool) -> Vec<Area> {
    let own = tasks.iter().enumerate().filter(|(at, task)| task.part.memory == *at);
    let vmas = own.filter_map(|(_, task)| task.alive.as_ref()).flat_map(|a| &a.mm.vmas);
    let mut all: Vec<(Sort, &VmaEntry)> =
        vmas.filter(|vma| is_eligible(vma)).map(|vma| (sort(vma), vma)).collect();
    all.sort_by_key(|(sort, vma)| (*sort, vma.start));
    let mut areas: Vec<Area> = Vec::new();
    for (sort, vma) in all {
        match areas.last_mut() {
            Some(last) if last.sort == sort && vma.start < last.vma.end => {
                last.vma.end = last.vma.end.max(vma.end);
            }
            _ => areas.push(Area { vma: vma.clone(), sort, shared: 0 }),
        }
    }
    // Ascending by sort and address: of each sort they do not overlap.
    for piece in pieces {
        let key = (piece.sort, piece.run.vaddr);
        let at = areas.partition_point(|area| (area.sort, area.vma.end - 1) < key);
        if let Some(area) = areas.get_mut(at) {
            area.shared += piece.run.bytes();
        }
    }
    areas.retain(|area| area.shared > 0);
    areas.sort_by_key(|area| std::cmp::Reverse(area.shared));
    let mut taken: BTreeMap<u64, u64> = BTreeMap::new();
    areas.retain(|area| {
        let (start, end) = (area.vma.start, area.vma.end);
        let before = taken.range(..end).next_back();
        let free = before.is_none_or(|(_, taken_end)| *taken_end <= start);
        if free {
            taken.insert(start, end);
        }
        free
    });
    areas.sort_by_key(|area| area.vma.start);
    areas
}

/// What a process has at some moment.
#[derive(Debug, Clone, Default)]
struct State {
    /// Areas that are mapped.
    areas: BTreeSet<usize>,
    /// Pages in them, by address.
    pages: BTreeMap<u64, StoredRun>,
}

impl State {
    /// Takes a range out.
    fn remove(&mut self, start: u64, end: u64) {
        let first = self.pages.range(..start).next_back().filter(|(_, run)| run.end() > start);
        let from = first.map_or(start, |(vaddr, _)| *vaddr);
        let hit: Vec<u64> = self.pages.range(from..end).map(|(vaddr, _)| *vaddr).collect();
        for vaddr in hit {
            let Some(run) = self.pages.remove(&vaddr) else { continue };
            for part in [clip(&run, 0, start), clip(&run, end, u64::MAX)].into_iter().flatten() {
                self.pages.insert(part.vaddr, part);
            }
        }
    }

    /// The parts of a run that are not there, or are other pages.
    fn lacks(&self, run: &StoredRun) -> Vec<StoredRun> {
        let mut lacking = Vec::new();
        let mut at = run.vaddr;
        let before = self.pages.range(..at).next_back().map_or(at, |(vaddr, _)| *vaddr);
        for known in self.pages.range(before..run.end()).map(|(_, known)| known) {
            let same = known.store == run.store
                && known.offset.wrapping_sub(known.vaddr) == run.offset.wrapping_sub(run.vaddr);
            if !same || known.end() <= at {
                continue;
            }
            lacking.extend(clip(run, at, known.vaddr));
            at = at.max(known.end());
        }
        lacking.extend(clip(run, at, run.end()));
        lacking
    }

    fn set(&mut self, run: StoredRun) {
        self.remove(run.vaddr, run.end());
        self.pages.insert(run.vaddr, run);
    }
}

struct Planner<'a> {
    tasks: &'a [Task],
    lineage: &'a Lineage,
    areas: Vec<Area>,
    is_eligible: &'a dyn Fn(&VmaEntry) -> bool,
    /// By node: the node that clones it, and how many are above it.
    above: Vec<(Option<usize>, usize)>,
    node_of: HashMap<usize, usize>,
    /// By node: does it share its address space with another?
    together: Vec<bool>,
    /// What a node, the first, has to have when it clones another, the second.
    wanted: HashMap<(usize, usize), Vec<StoredRun>>,
    /// Areas that a node or any below it has pages in.
    useful: Vec<BTreeSet<usize>>,
}

impl<'a> Planner<'a> {
    fn new(
        tasks: &'a [Task],
        lineage: &'a Lineage,
        areas: Vec<Area>,
        is_eligible: &'a dyn Fn(&VmaEntry) -> bool,
    ) -> Planner<'a> {
        let mut above: Vec<(Option<usize>, usize)> = Vec::with_capacity(lineage.nodes.len());
        let mut node_of = HashMap::new();
        for (at, node) in lineage.nodes.iter().enumerate() {
            // Cloners come before those they clone.
            let depth = node.cloner.and_then(|c| above.get(c)).map_or(0, |(_, depth)| depth + 1);
            above.push((node.cloner, depth));
            if let Role::Task(task) = node.role {
                node_of.insert(task, at);
            }
        }
        let mut together = vec![false; lineage.nodes.len()];
        for (at, node) in lineage.nodes.iter().enumerate() {
            if node.share & libc::CLONE_VM as u64 != 0 {
                together[at] = true;
                node.cloner.and_then(|by| together.get_mut(by)).into_iter().for_each(|t| *t = true);
            }
        }
        let useful = vec![BTreeSet::new(); lineage.nodes.len()];
        let wanted = HashMap::new();
        Planner { tasks, lineage, areas, is_eligible, above, node_of, together, wanted, useful }
    }

    /// The lowest node that is above all of `nodes`, or one of them.
    fn common(&self, nodes: &[usize]) -> Option<usize> {
        let (first, rest) = nodes.split_first()?;
        let mut common = *first;
        for node in rest {
            let mut other = *node;
            while common != other {
                let deeper = if self.above[common].1 >= self.above[other].1 {
                    &mut common
                } else {
                    &mut other
                };
                *deeper = self.above[*deeper].0?;
            }
        }
        Some(common)
    }

    /// Says of each piece who has it first, and when.
    fn assign(&mut self, pieces: Vec<Piece>) {
        type Known = (Rc<Vec<usize>>, usize, Vec<usize>);
        let mut known: Option<Known> = None;
        for piece in pieces {
            let Some(area) = area_of(&self.areas, piece.run.vaddr, piece.sort) else { continue };
            if known.as_ref().is_none_or(|(tasks, ..)| !Rc::ptr_eq(tasks, &piece.tasks)) {
                let nodes: Vec<usize> =
                    piece.tasks.iter().filter_map(|t| self.node_of.get(t).copied()).collect();
                let Some(holder) = self.common(&nodes) else { continue };
                let mut branches = BTreeSet::new();
                for node in nodes {
                    let mut at = node;
                    while at != holder {
                        let Some(above) = self.above[at].0 else { break };
                        if above == holder {
                            branches.insert(at);
                        }
                        at = above;
                    }
                }
                known = Some((piece.tasks.clone(), holder, branches.into_iter().collect()));
            }
            let Some((tasks, holder, branches)) = &known else { continue };
            for branch in branches {
                self.wanted.entry((*holder, *branch)).or_default().push(piece.run);
            }
            for task in tasks.iter() {
                let mut at = self.node_of.get(task).copied();
                while let Some(node) = at.filter(|node| self.useful[*node].insert(area)) {
                    at = self.above[node].0;
                }
            }
        }
    }

    fn plan(self) -> Heritage {
        let mut heritage = Heritage::default();
        let mut states: Vec<Option<Rc<State>>> = vec![None; self.lineage.nodes.len()];
        for (at, node) in self.lineage.nodes.iter().enumerate() {
            let mut state = states[at].take().unwrap_or_default();
            let mut acts = Vec::new();
            let unwanted: Vec<usize> = state.areas.difference(&self.useful[at]).copied().collect();
            // Who clones nobody gives back everything at once, later.
            if !(node.early.is_empty() && node.late.is_empty() || self.together[at]) {
                for area in unwanted {
                    let state = Rc::make_mut(&mut state);
                    let vma = &self.areas[area].vma;
                    state.areas.remove(&area);
                    state.remove(vma.start, vma.end);
                    acts.push(Act::Unmap(vma.start..vma.end));
                }
            }
            for child in node.early.iter().chain(&node.late) {
                if !self.together[at] {
                    self.hand_down(at, *child, &mut state, &mut acts);
                }
                if !acts.is_empty() {
                    heritage.acts.insert((at, *child), std::mem::take(&mut acts));
                }
                states[*child] = Some(state.clone());
            }
            if let Role::Task(task) = node.role
                && let Some(inherited) = self.inherited(task, &state)
            {
                heritage.tasks.insert(task, inherited);
            }
        }
        heritage
    }

    /// What a node does so that a child has what it should have.
    fn hand_down(&self, node: usize, child: usize, state: &mut Rc<State>, acts: &mut Vec<Act>) {
        let Some(wanted) = self.wanted.get(&(node, child)) else { return };
        let mut writes: Vec<StoredRun> = Vec::new();
        for run in wanted {
            for lacking in state.lacks(run) {
                let state = Rc::make_mut(state);
                let at = self.areas.partition_point(|area| area.vma.end <= lacking.vaddr);
                if state.areas.insert(at) {
                    acts.push(Act::Map(self.areas[at].vma.clone()));
                }
                state.set(lacking);
                writes.push(lacking);
            }
        }
        if !writes.is_empty() {
            // In the order of the files, so that one read serves many.
            writes.sort_unstable_by_key(|run| (run.store, run.offset));
            acts.push(Act::Write(writes));
        }
    }

    /// What a task has in the end, and what it must do about it. None if it has nothing.
    fn inherited(&self, task: usize, state: &State) -> Option<Inheritance> {
        let alive = self.tasks[task].alive.as_ref()?;
        if state.areas.is_empty() || self.tasks[task].part.memory != task {
            return None;
        }
        let mut inherited = Inheritance::default();
        // Which of its mappings it has, and what else there is.
        let mut own: Vec<(u64, u64)> = Vec::new();
        for vma in alive.mm.vmas.iter().filter(|vma| (self.is_eligible)(vma)) {
            let Some(at) = area_of(&self.areas, vma.start, sort(vma)) else { continue };
            if state.areas.contains(&at) {
                inherited.vmas.insert(vma.start, protection(&self.areas[at].vma));
                own.push((vma.start, vma.end));
            }
        }
        for area in &state.areas {
            let area = &self.areas[*area].vma;
            let mut at = area.start;
            let first = own.partition_point(|(_, end)| *end <= area.start);
            for (start, end) in own[first..].iter().take_while(|(start, _)| *start < area.end) {
                if at < *start {
                    inherited.foreign.push(at..*start);
                }
                at = *end;
            }
            if at < area.end {
                inherited.foreign.push(at..area.end);
            }
        }
        let runs = alive.pages.as_ref().map_or(&[][..], |pages| pages.runs.as_slice());
        inherited.missing = StoredPages { runs: missing(state, runs, &own) };
        inherited.surplus = surplus(state, runs, &own);
        Some(inherited)
    }
}

/// Pages that a process should have in its mappings, and does not have. What is handed down at the address of a mapping that
/// is not (a locked one of a task whose siblings have it unlocked) is given back with the mapping it is in.
fn missing(state: &State, runs: &[StoredRun], own: &[(u64, u64)]) -> Vec<StoredRun> {
    let mut missing = Vec::new();
    for run in runs {
        let mut at = run.vaddr;
        let first = own.partition_point(|(_, end)| *end <= run.vaddr);
        for (start, end) in own[first..].iter().take_while(|(start, _)| *start < run.end()) {
            missing.extend(clip(run, at, *start));
            missing.extend(clip(run, *start, *end).iter().flat_map(|part| state.lacks(part)));
            at = *end;
        }
        missing.extend(clip(run, at, run.end()));
    }
    missing
}

/// Pages that a process has in its own mappings, and should not have.
fn surplus(state: &State, runs: &[StoredRun], own: &[(u64, u64)]) -> Vec<Range<u64>> {
    let mut surplus: Vec<Range<u64>> = Vec::new();
    let mut push = |start: u64, end: u64| match surplus.last_mut() {
        _ if start >= end => {}
        Some(last) if last.end == start => last.end = end,
        _ => surplus.push(start..end),
    };
    for (start, end) in own {
        let before = state.pages.range(..*start).next_back().map_or(*start, |(vaddr, _)| *vaddr);
        for page in state.pages.range(before..*end).filter_map(|(_, run)| clip(run, *start, *end)) {
            let first = runs.partition_point(|run| run.end() <= page.vaddr);
            let mut at = page.vaddr;
            for run in runs[first..].iter().take_while(|run| run.vaddr < page.end()) {
                push(at, run.vaddr);
                at = at.max(run.end());
            }
            push(at, page.end());
        }
    }
    surplus
}

#[cfg(test)]
#[path = "heritage_tests.rs"]
mod tests;
