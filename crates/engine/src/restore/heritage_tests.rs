//! The plan is carried out on paper, for trees whose processes forked, wrote, gave back and mapped at random.

use super::super::lineage::Member;
use super::super::read::Alive;
use super::super::sharing::Part;
use super::*;
use rewake_image::messages::MmEntry;
use rewake_objects::task::sharing::Objects;

const BASE: u64 = 0x10_0000;
const STORE: PageStore = PageStore { depth: 0, pages_id: 1 };

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Pages by number, and which page of the store each is.
type Pages = BTreeMap<u64, u64>;

/// A process as it was: bounds of its mapping in pages, its pages, and the pids.
#[derive(Debug, Clone)]
struct Process {
    parent: usize,
    bounds: (u64, u64),
    readonly: bool,
    /// Pages that are locked: a mapping of their own, which is not handed down.
    locked: (u64, u64),
    pages: Pages,
}

/// Nothing is shared with others.
fn objects(index: usize) -> Objects {
    let n = index as u32;
    Objects { vm: n, files: n, fs: n, sighand: n }
}

fn task(index: usize, process: &Process) -> Task {
    let (first, past) = process.bounds;
    let locked = (process.locked.0.clamp(first, past), process.locked.1.clamp(first, past));
    let vma = |(first, past): (u64, u64), flags: i32| VmaEntry {
        start: BASE + first * PAGE,
        end: BASE + past * PAGE,
        prot: if process.readonly { 1 } else { 3 },
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags) as u32,
        status: status::REGULAR | status::ANON_PRIVATE,
        ..VmaEntry::default()
    };
    let mut vmas =
        vec![vma((first, locked.0), 0), vma(locked, libc::MAP_LOCKED), vma((locked.1, past), 0)];
    vmas.retain(|vma| vma.start < vma.end);
    if locked.0 == locked.1 {
        vmas = vec![vma(process.bounds, 0)];
    }
    let runs = process.pages.iter().map(|(page, stored)| StoredRun {
        vaddr: BASE + page * PAGE,
        nr_pages: 1,
        store: STORE,
        offset: stored * PAGE,
        lazy: false,
    });
    let alive = Alive {
        threads: Vec::new(),
        mm: MmEntry { vmas, ..MmEntry::default() },
        later: None,
        pages: Some(StoredPages { runs: runs.collect() }),
        aio: Vec::new(),
        fs: Default::default(),
        fds: Vec::new(),
        extra: None,
        objects: objects(index),
    };
    Task {
        pid: 100 + index as i32,
        ppid: if index == 0 { 0 } else { 100 + process.parent as i32 },
        pgid: 100,
        sid: 100,
        comm: Vec::new(),
        tc: Default::default(),
        alive: Some(alive),
        part: Part { memory: index, table: index, ..Part::default() },
    }
}

/// What a process has at a page: of the store, and the how manieth page written at all.
type Memory = BTreeMap<u64, (u64, u64)>;

fn write(memory: &mut Memory, runs: &[StoredRun], written: &mut u64) {
    for run in runs {
        for n in 0..run.nr_pages {
            *written += 1;
            let page = (run.vaddr - BASE) / PAGE + n;
            memory.insert(page, (run.offset / PAGE + n, *written));
        }
    }
}

fn forget(memory: &mut Memory, range: &Range<u64>) {
    memory.retain(|page, _| !range.contains(&(BASE + page * PAGE)));
}

/// Carries the plan out; checks that every task has what it had, and returns how many pages were written.
fn carry_out(processes: &[Process]) -> u64 {
    let tasks: Vec<Task> = processes.iter().enumerate().map(|(i, p)| task(i, p)).collect();
    let members: Vec<Member> = tasks
        .iter()
        .enumerate()
        .map(|(i, t)| Member {
            pid: t.pid,
            ppid: t.ppid,
            pgid: t.pgid,
            sid: t.sid,
            zombie: false,
            objects: objects(i),
        })
        .collect();
    let lineage = Lineage::plan(&members, false, false).unwrap();
    let heritage = plan(&tasks, &lineage, &|_| true);
    let mut written = 0;
    let mut memories: Vec<Memory> = vec![Memory::new(); lineage.nodes.len()];
    let mut mapped: Vec<Vec<Range<u64>>> = vec![Vec::new(); lineage.nodes.len()];
    for (at, node) in lineage.nodes.iter().enumerate() {
        for child in node.early.iter().chain(&node.late) {
            for act in heritage.before(at, *child) {
                match act {
                    Act::Unmap(range) => {
                        forget(&mut memories[at], range);
                        mapped[at].retain(|known| known != range);
                    }
                    Act::Map(vma) => mapped[at].push(vma.start..vma.end),
                    Act::Write(runs) => {
                        let inside = |run: &StoredRun| {
                            mapped[at].iter().any(|m| m.start <= run.vaddr && run.end() <= m.end)
                        };
                        assert!(
                            runs.iter().all(inside),
                            "pages are written where nothing is mapped"
                        );
                        write(&mut memories[at], runs, &mut written);
                    }
                }
            }
            memories[*child] = memories[at].clone();
            mapped[*child] = mapped[at].clone();
        }
        let Role::Task(index) = node.role else { continue };
        let alive = tasks[index].alive.as_ref().unwrap();
        let mut memory = std::mem::take(&mut memories[at]);
        match heritage.of(index) {
            Some(inherited) => {
                for range in inherited.foreign.iter().chain(&inherited.surplus) {
                    forget(&mut memory, range);
                }
                write(&mut memory, &inherited.missing.runs, &mut written);
            }
            None => {
                assert!(mapped[at].is_empty(), "nobody gives back what was handed down");
                write(&mut memory, &alive.pages.as_ref().unwrap().runs, &mut written);
            }
        }
        let has: Pages = memory.iter().map(|(page, (stored, _))| (*page, *stored)).collect();
        assert_eq!(has, processes[index].pages, "process {index} of {processes:?}");
    }
    written
}

/// A tree whose processes forked and wrote in turns; the parent of the last ones may be any.
fn random(rng: &mut Rng, locks: bool) -> Vec<Process> {
    let mut next = 0;
    let mut fresh = || {
        next += 1;
        next
    };
    let pages = (0..20).map(|page| (page, fresh())).collect();
    let mut all =
        vec![Process { parent: 0, bounds: (0, 24), readonly: false, locked: (0, 0), pages }];
    while all.len() < 8 {
        for _ in 0..rng.below(6) {
            let at = rng.below(all.len() as u64) as usize;
            let process = &mut all[at];
            let page = rng.below(24);
            match rng.below(8) {
                0 => drop(process.pages.remove(&page)),
                1 => {
                    process.bounds.1 = 20 + rng.below(8);
                    let past = process.bounds.1;
                    process.pages.retain(|page, _| *page < past);
                }
                2 => process.readonly = !process.readonly,
                3 if locks => process.locked = (page, page + rng.below(6)),
                _ if page < process.bounds.1 => drop(process.pages.insert(page, fresh())),
                _ => {}
            }
        }
        let parent = rng.below(all.len() as u64) as usize;
        // Locks are not inherited.
        let child = Process { parent, locked: (0, 0), ..all[parent].clone() };
        all.push(child);
    }
    all
}

#[test]
fn every_task_has_what_it_had() {
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (mut written, mut distinct) = (0, 0);
    for _ in 0..300 {
        let processes = random(&mut rng, false);
        written += carry_out(&processes);
        let pages: BTreeSet<(u64, u64)> =
            processes.iter().flat_map(|p| p.pages.iter().map(|(a, b)| (*a, *b))).collect();
        distinct += pages.len() as u64;
    }
    // Children are born in the order of their pids, as they were: each page is made once.
    assert_eq!(written, distinct);
}

#[test]
fn what_is_not_handed_down_is_filled_all_the_same() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    for _ in 0..300 {
        carry_out(&random(&mut rng, true));
    }
}

#[test]
fn what_siblings_share_the_parent_need_not_have() {
    let shared: Pages = (0..10).map(|page| (page, 100 + page)).collect();
    let own: Pages = (0..10).map(|page| (page, 200 + page)).collect();
    let process = |pages: &Pages| Process {
        parent: 0,
        bounds: (0, 10),
        readonly: false,
        locked: (0, 0),
        pages: pages.clone(),
    };
    assert_eq!(carry_out(&[process(&own), process(&shared), process(&shared)]), 20);
    // Without anything in common nothing is handed down.
    assert_eq!(carry_out(&[process(&own), process(&shared)]), 20);
}
