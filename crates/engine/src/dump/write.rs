//! Writing the images of a surveyed tree.

mod shared;

use super::cow::{Borrowing, Candidate};
use super::equal::Sieve;
use super::layout::{self, Format, Layout, Store};
use super::outside::Outside;
use super::survey::Surveyed;
use crate::crew::{cpus, spread};
use crate::error::{Context, Error, Result};
use crate::freeze::Life;
use crate::options::PreDumpMode;
use rewake_image::messages::{
    CoreEntry, InventoryEntry, Lsmtype, March, PluginsEntry, PstreeEntry, RewakeEntry,
    RewakeTaskEntry, TaskCoreEntry, TaskKobjIdsEntry, TimensEntry, Timespec,
};
use rewake_image::{Compression, ImageDir, ImageWriter, PageRun, PageSource, SEVERAL_STORES, kind};
use rewake_objects::Problem;
use rewake_objects::files::collect::Contents;
use rewake_objects::files::{ghost, nsfs};
use rewake_objects::memory::contents::Written;
use rewake_objects::memory::vma::status;
use rewake_objects::memory::{PAGE, future, pages};
pub use shared::copies;
use std::io::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Buffer for copying memory: large enough to make the calls few, small enough for the cache next to the processor.
const BUFFER: usize = 64 << 10;
/// Our own kernel objects have number 1.
const FIRST_OBJECT: u32 = 2;

/// Pages looked at and written.
#[derive(Debug, Default)]
pub struct Counters {
    /// Private pages looked at.
    pub scanned: AtomicU64,
    /// Private pages written.
    pub written: AtomicU64,
    /// Private pages left to the parent images.
    pub skipped: AtomicU64,
    /// Shared pages looked at.
    pub shared_scanned: AtomicU64,
    /// Shared pages written.
    pub shared_written: AtomicU64,
    /// Shared pages left to the parent images.
    pub shared_skipped: AtomicU64,
    /// Page stores of shared memory that only we can read.
    pub further: AtomicU32,
}

impl Counters {
    /// Adds shared pages.
    pub fn add(&self, Written { scanned, skipped, written, further }: Written) {
        self.further.fetch_add(further, Ordering::Relaxed);
        self.shared_scanned.fetch_add(scanned, Ordering::Relaxed);
        self.shared_skipped.fetch_add(skipped, Ordering::Relaxed);
        self.shared_written.fetch_add(written, Ordering::Relaxed);
    }
}

/// Our own namespaces' ids, as CRIU numbers them.
fn root_ids() -> TaskKobjIdsEntry {
    TaskKobjIdsEntry {
        vm_id: 1,
        files_id: 1,
        fs_id: 1,
        sighand_id: 1,
        pid_ns_id: nsfs::id("pid"),
        net_ns_id: nsfs::id("net"),
        ipc_ns_id: nsfs::id("ipc"),
        uts_ns_id: nsfs::id("uts"),
        time_ns_id: nsfs::id("time"),
        mnt_ns_id: nsfs::id("mnt"),
        user_ns_id: nsfs::id("user"),
        cgroup_ns_id: nsfs::id("cgroup"),
    }
}

/// Plans where the private pages of all tasks go.
#[must_use]
pub fn plan(surveyed: &Surveyed, format: Format) -> Layout {
    let alive = || surveyed.tasks.iter().map(|task| task.alive.as_ref().map(|a| &a.outside));
    let runs: Vec<&[pages::Run]> =
        alive().map(|outside| outside.map_or(&[][..], |outside| &outside.runs)).collect();
    let candidates: Vec<_> = alive()
        .map(|outside| outside.map(|o| Candidate { pagemap: &o.pagemap, runs: &o.runs }))
        .collect();
    let borrowed = Borrowing::find(&candidates, format);
    layout::plan(&runs, &borrowed, format, surveyed.first_pages_id(), cpus())
}

/// What one worker does at a time.
enum Job<'a> {
    /// A page store that takes a while.
    Store(&'a Store),
    /// All else of a task, by its index, and its small page stores.
    Task(usize, Vec<&'a Store>),
}

/// Page stores of this size are a job of their own.
const LARGE: u64 = 1 << 20;

/// Writes what has to be as it is now: files that are in the images, and shared memory, but for copies of it and what the images
/// `parent` have of it. `further`: as in [`rewake_objects::memory::contents::Target`].
///
/// # Errors
/// They cannot be read, or the images cannot be written; the text says which.
pub fn still(
    images: &ImageWriter,
    surveyed: &Surveyed,
    parent: Option<&ImageDir>,
    further: Option<u32>,
    counters: &Counters,
) -> Result<()> {
    write_files(images, surveyed)?;
    shared::still(images, surveyed, parent, further, counters)
}

/// How many threads write. Who writes to memory that is still to be copied has waited long enough: if the tree runs, one CPU is
/// the program's.
fn workers(runs: bool) -> usize {
    if runs { cpus().saturating_sub(1).max(1) } else { cpus() }
}

/// Writes everything else but the inventory. `runs`: the tree runs on meanwhile. With `dedup` equal pages are stored once, and the
/// layout changes.
///
/// # Errors
/// Memory cannot be read, or the images cannot be written; the text says which.
pub fn write(
    images: &ImageWriter,
    surveyed: &Surveyed,
    layout: &mut Layout,
    counters: &Counters,
    runs: bool,
    dedup: bool,
) -> Result<()> {
    write_pstree(images, surveyed)?;
    let sieve = dedup.then(Sieve::default);
    write_tasks(images, surveyed, layout, counters, runs, sieve.as_ref())?;
    let Some(sieve) = sieve else { return Ok(()) };
    layout.relocate(&sieve.into_moved());
    each(surveyed.tasks.len(), |at, _| write_pagemap(images, surveyed, at, layout))
}

fn write_tasks(
    images: &ImageWriter,
    surveyed: &Surveyed,
    layout: &Layout,
    counters: &Counters,
    runs: bool,
    sieve: Option<&Sieve>,
) -> Result<()> {
    let (mut large, small): (Vec<&Store>, Vec<&Store>) =
        layout.stores.iter().partition(|store| store.bytes() >= LARGE);
    // What takes long comes first, so that nobody is left with it in the end.
    large.sort_by_key(|store| std::cmp::Reverse(store.bytes()));
    let mut jobs: Vec<Job<'_>> = large.into_iter().map(Job::Store).collect();
    let mut of_tasks: Vec<Vec<&Store>> = vec![Vec::new(); surveyed.tasks.len()];
    for store in small {
        of_tasks[store.task].push(store);
    }
    jobs.extend(of_tasks.into_iter().enumerate().map(|(at, stores)| Job::Task(at, stores)));
    each_by(workers(runs), jobs.len(), |at, buffer| match &jobs[at] {
        Job::Store(store) => write_store(images, surveyed, store, counters, buffer, sieve),
        Job::Task(at, stores) => {
            write_task(images, surveyed, *at, counters)?;
            if sieve.is_none() {
                write_pagemap(images, surveyed, *at, layout)?;
            }
            let mut stores = stores.iter();
            stores
                .try_for_each(|store| write_store(images, surveyed, store, counters, buffer, sieve))
        }
    })
}

/// Does `job` for each number below `count`. Tasks are independent: as many at a time as there are CPUs.
pub fn each(count: usize, job: impl Fn(usize, &mut Vec<u8>) -> Result<()> + Sync) -> Result<()> {
    each_by(if count > 1 { cpus() } else { 1 }, count, job)
}

/// As [`each`], by so many threads.
fn each_by(
    workers: usize,
    count: usize,
    job: impl Fn(usize, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let workers = workers.min(count).max(1);
    let work = || -> Result<()> {
        let mut buffer = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return Ok(());
            }
            job(at, &mut buffer)?;
        }
    };
    if workers == 1 {
        return work();
    }
    std::thread::scope(|scope| {
        // Without further threads it takes longer, that is all.
        let begin = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..workers).filter_map(begin).collect();
        let mut result = work();
        for other in others {
            let other = other
                .join()
                .unwrap_or_else(|_| Err(Error::new("a thread that writes images died")));
            result = result.and(other);
        }
        result
    })
}

fn write_pstree(images: &ImageWriter, surveyed: &Surveyed) -> Result<()> {
    let in_tree = |pid: i32| surveyed.tasks.iter().any(|t| t.pid == pid);
    let entries: Vec<PstreeEntry> = surveyed
        .tasks
        .iter()
        .enumerate()
        .map(|(i, task)| PstreeEntry {
            pid: task.pid as u32,
            ppid: if i == 0 || !in_tree(task.ppid) { 0 } else { task.ppid as u32 },
            pgid: task.pgid as u32,
            sid: task.sid as u32,
            threads: match &task.alive {
                Some(alive) => alive.inside.cores.iter().map(|(tid, _)| *tid as u32).collect(),
                None => vec![task.pid as u32],
            },
        })
        .collect();
    images.write_all(kind::PSTREE, (), &entries)?;
    images.write_one(kind::SECCOMP, (), surveyed.filters.entry())?;
    let clocks = surveyed.tasks.iter().find_map(|t| t.alive.as_ref()).map(|a| a.inside.clocks);
    if let Some([monotonic, boottime]) = clocks {
        let time = |(tv_sec, tv_nsec): (u64, u64)| Timespec { tv_sec, tv_nsec };
        let entry = TimensEntry { monotonic: time(monotonic), boottime: time(boottime) };
        images.write_one(kind::TIMENS, 0u32, &entry)?;
    }
    Ok(())
}

fn write_files(images: &ImageWriter, surveyed: &Surveyed) -> Result<()> {
    let files = &surveyed.files;
    let root = surveyed.tasks.first().map_or((0, &b""[..]), |t| (t.pid, t.comm.as_slice()));
    images.write_all(kind::FILES, (), &files.entries)?;
    images.write_all(kind::REMAP_FPATH, (), &files.remaps)?;
    images.write_all(kind::FILE_LOCKS, (), &files.locks.entries)?;
    images.write_all(kind::TTY_INFO, (), &files.ttys)?;
    images.write_all(kind::TTY_DATA, (), &files.tty_data)?;
    for (kind, data) in [(kind::PIPES_DATA, &files.pipe_data), (kind::FIFO_DATA, &files.fifo_data)]
    {
        let mut stream = images.stream(kind, ());
        for (entry, bytes) in data {
            stream.push(entry)?;
            stream.payload(bytes)?;
        }
        stream.finish()?;
    }
    let mut stream = images.stream(kind::BPFMAP_DATA, ());
    for (entry, bytes) in &files.bpf_data {
        stream.push(entry)?;
        stream.payload(bytes)?;
    }
    stream.finish()?;
    rewake_objects::sockets::write(images, &files.sockets)?;
    let of_root = |p: Problem| Error::of(root.0, root.1, p);
    let mut segments = Vec::new();
    for contents in &files.contents {
        match contents {
            Contents::Ghost { id, entry, file, size } => {
                ghost::write(images, *id, entry, file, *size).map_err(of_root)?;
            }
            // Its name is made already.
            Contents::Link { .. } => {}
            Contents::Shared(segment) => segments.push(segment.entry.clone()),
        }
    }
    images.write_all(kind::MEMFD_INODE, (), &segments)?;
    if !files.sysv.is_empty() {
        let ns = root_ids().ipc_ns_id.unwrap_or_default();
        files.sysv.write(images, ns).map_err(of_root)?;
    }
    let mut extra: Vec<RewakeEntry> =
        vec![RewakeEntry { manifest: Some(true), ..RewakeEntry::default() }];
    for task in &surveyed.tasks {
        let Some(alive) = &task.alive else { continue };
        let attributes = &alive.inside.attributes;
        let entry = RewakeTaskEntry {
            pid: task.pid as u32,
            coredump_filter: alive.outside.values.coredump_filter,
            tsc: Some(attributes.tsc).filter(|t| *t == 2),
            mdwe: Some(attributes.mdwe).filter(|m| *m != 0),
            io_flusher: attributes.io_flusher.then_some(true),
            autogroup_nice: alive.outside.values.autogroup_nice,
            personality: Some(attributes.personality),
            lock_on_fault: alive.outside.mappings_that(|v| v.lock_on_fault),
            lock_future: Some(alive.inside.future.lock).filter(|lock| *lock != 0),
            memory_merge: alive.inside.future.merge.then_some(true),
            thp_except_advised: future::thp_except_advised(attributes.thp_disable).then_some(true),
            sealed: alive.outside.mappings_that(|v| v.sealed),
            policy: alive.inside.policy.clone(),
            policies: alive.inside.policies.clone(),
        };
        extra.push(RewakeEntry { task: Some(entry), ..RewakeEntry::default() });
        extra.extend(
            alive.inside.extra.iter().map(|thread| RewakeEntry {
                thread: Some(thread.clone()),
                ..RewakeEntry::default()
            }),
        );
    }
    extra.extend(
        files
            .extra
            .values()
            .map(|f| RewakeEntry { file: Some(f.clone()), ..RewakeEntry::default() }),
    );
    let packets = files.sockets.packets_extra();
    extra
        .extend(packets.map(|p| RewakeEntry { packet: Some(p.clone()), ..RewakeEntry::default() }));
    let segments = files.sysv.extra();
    extra.extend(segments.map(|s| RewakeEntry { segment: Some(s), ..RewakeEntry::default() }));
    images.write_all(kind::REWAKE, (), &extra)?;
    Ok(())
}

fn write_task(
    images: &ImageWriter,
    surveyed: &Surveyed,
    at: usize,
    counters: &Counters,
) -> Result<()> {
    let task = &surveyed.tasks[at];
    let pid = task.pid as u32;
    let Some(alive) = &task.alive else {
        let Life::Zombie(exit) = task.life else { return Ok(()) };
        let tc = TaskCoreEntry {
            task_state: 2,
            exit_code: exit as u32,
            comm: task.comm.clone(),
            ..TaskCoreEntry::default()
        };
        let core = CoreEntry { mtype: March::X8664 as i32, tc: Some(tc), ..CoreEntry::default() };
        images.write_one(kind::CORE, pid, &core)?;
        return Ok(());
    };
    let owners = surveyed.sharing.owners(at);
    let ids = TaskKobjIdsEntry {
        vm_id: FIRST_OBJECT + owners.vm,
        files_id: FIRST_OBJECT + owners.files,
        fs_id: FIRST_OBJECT + owners.fs,
        sighand_id: FIRST_OBJECT + owners.sighand,
        ..root_ids()
    };
    images.write_one(kind::IDS, pid, &ids)?;
    write_cores(images, &alive.inside.cores)?;
    // What several have is in the images once, under the name of the first.
    if let Some(fs) = &alive.files.fs {
        images.write_one(kind::FS, pid, fs)?;
    }
    if alive.outside.owns.files {
        images.write_all(kind::FDINFO, ids.files_id, &alive.files.fds)?;
    }
    let Some(mm) = &alive.files.mm else { return Ok(()) };
    images.write_one(kind::MM, pid, mm)?;
    let outside = &alive.outside;
    let scanned: u64 = outside.vmas.iter().map(|v| (v.entry.end - v.entry.start) / PAGE).sum();
    let skipped: u64 = outside.runs.iter().filter(|run| run.parent).map(pages::Run::pages).sum();
    counters.scanned.fetch_add(scanned, Ordering::Relaxed);
    counters.skipped.fetch_add(skipped, Ordering::Relaxed);
    Ok(())
}

/// Writes where the pages of a task are, if it owns any.
fn write_pagemap(
    images: &ImageWriter,
    surveyed: &Surveyed,
    at: usize,
    layout: &Layout,
) -> Result<()> {
    let task = &surveyed.tasks[at];
    if task.alive.as_ref().is_none_or(|alive| alive.files.mm.is_none()) {
        return Ok(());
    }
    Ok(images.write_pagemap(task.pid as u32, layout.stores[at].id, &layout.maps[at])?)
}

/// Copies the pages of one store.
fn write_store(
    images: &ImageWriter,
    surveyed: &Surveyed,
    store: &Store,
    counters: &Counters,
    buffer: &mut Vec<u8>,
    sieve: Option<&Sieve>,
) -> Result<()> {
    let task = &surveyed.tasks[store.task];
    let Some(alive) = &task.alive else { return Ok(()) };
    let memory = Memory { pid: task.pid, comm: &task.comm, outside: &alive.outside, runs: false };
    let mut pages = images.page_stream(store.id)?;
    let bytes = store.bytes();
    buffer.resize(BUFFER.min(bytes as usize).max(PAGE as usize), 0);
    let failed = pages::CopyError::Write;
    let lost = |e: pages::CopyError| {
        // A tree that stands still loses nothing.
        let still = matches!(e, pages::CopyError::Lost { .. });
        Err::<(), _>(e).of(task.pid, &task.comm).map_err(|e| Error { still, ..e })
    };
    // The rings of asynchronous I/O are each in one place.
    let sieve = sieve.filter(|_| alive.outside.aio.is_empty());
    let written = if let Some(sieve) = sieve {
        let mut sifted = sieve.begin(store.id, pages).map_err(failed).of(task.pid, &task.comm)?;
        write_pages(&memory, &store.runs, &mut sifted, buffer).or_else(lost)?;
        sifted.finish().map_err(failed).of(task.pid, &task.comm)?
    } else {
        write_pages(&memory, &store.runs, &mut pages, buffer).or_else(lost)?;
        pages.finish().map_err(failed).of(task.pid, &task.comm)?;
        bytes / PAGE
    };
    counters.written.fetch_add(written, Ordering::Relaxed);
    Ok(())
}

/// The private memory of a task.
#[derive(Debug, Clone, Copy)]
pub struct Memory<'a> {
    /// Its pid.
    pub pid: i32,
    /// Its command.
    pub comm: &'a [u8],
    /// Its memory, and which pages of it.
    pub outside: &'a Outside,
    /// The task runs: what is gone meanwhile is written as zeros.
    pub runs: bool,
}

/// Writes a task's pagemap and pages.
///
/// # Errors
/// Memory cannot be read, or the images cannot be written.
pub fn write_memory(
    images: &ImageWriter,
    memory: &Memory<'_>,
    pages_id: u32,
    counters: &Counters,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let Memory { pid, comm, outside, .. } = *memory;
    let runs: Vec<PageRun> = outside
        .runs
        .iter()
        .map(|run| PageRun {
            vaddr: run.start,
            nr_pages: run.pages(),
            source: match (run.parent, run.lazy) {
                (true, _) => PageSource::Parent,
                (false, true) => PageSource::StoredLazy,
                (false, false) => PageSource::Stored,
            },
            place: None,
        })
        .collect();
    images.write_pagemap(pid as u32, pages_id, &runs)?;
    let mut pages = images.page_stream(pages_id)?;
    let stored = |run: &&PageRun| run.source.is_stored();
    let written: u64 = runs.iter().filter(stored).map(|r| r.nr_pages).sum();
    let skipped: u64 = runs.iter().map(|r| r.nr_pages).sum::<u64>() - written;
    buffer.resize(BUFFER.min((written * PAGE) as usize).max(PAGE as usize), 0);
    let here: Vec<pages::Run> = outside.runs.iter().filter(|r| !r.parent).copied().collect();
    write_pages(memory, &here, &mut pages, buffer).of(pid, comm)?;
    pages.finish().map_err(pages::CopyError::Write).of(pid, comm)?;
    let scanned: u64 = outside.vmas.iter().map(|v| (v.entry.end - v.entry.start) / PAGE).sum();
    counters.scanned.fetch_add(scanned, Ordering::Relaxed);
    counters.written.fetch_add(written, Ordering::Relaxed);
    counters.skipped.fetch_add(skipped, Ordering::Relaxed);
    Ok(())
}

/// Writes a file for each thread; for many, as many at a time as there are CPUs.
fn write_cores(images: &ImageWriter, cores: &[(i32, CoreEntry)]) -> Result<()> {
    /// Files that are worth a thread of our own.
    const ENOUGH: usize = 64;
    spread(cores, ENOUGH, |cores| {
        cores
            .iter()
            .try_for_each(|(tid, core)| Ok(images.write_one(kind::CORE, *tid as u32, core)?))
    })
    .map(drop)
}

/// Copies the pages; those of the vdso as they were before the agent's entry was put there.
fn write_pages(
    memory: &Memory<'_>,
    runs: &[pages::Run],
    to: &mut impl Write,
    buffer: &mut [u8],
) -> std::result::Result<(), pages::CopyError> {
    let outside = memory.outside;
    let vdso = outside
        .vmas
        .iter()
        .find(|v| v.entry.status & status::VDSO != 0)
        .map_or(0..0, |v| v.entry.start..v.entry.end);
    let is_vdso = |run: &pages::Run| vdso.contains(&run.start);
    let mut rest = runs;
    while !rest.is_empty() {
        let plain = rest.iter().position(is_vdso).unwrap_or(rest.len());
        let source = pages::Source {
            pid: outside.tid,
            memory: &outside.memory,
            gone_is_zero: memory.runs,
            shield: outside.shield.as_deref(),
        };
        pages::copy(&source, &rest[..plain], to, buffer)?;
        rest = &rest[plain..];
        if let [run, after @ ..] = rest {
            let offset = (run.start - vdso.start) as usize;
            let len = (run.end - run.start) as usize;
            match outside.vdso.get(offset..offset + len) {
                Some(bytes) => to.write_all(bytes).map_err(pages::CopyError::Write)?,
                None => {
                    return Err(pages::CopyError::Read {
                        address: run.start,
                        errno: rewake_sys::Errno::FAULT,
                    });
                }
            }
            rest = after;
        }
    }
    Ok(())
}

/// The machine's uptime in microseconds: processes that start later have not been seen by this dump.
#[must_use]
pub fn uptime() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

/// The inventory of a pre-dump.
#[must_use]
pub fn pre_dump_inventory(mode: PreDumpMode) -> InventoryEntry {
    InventoryEntry {
        img_version: 0,
        dump_uptime: Some(uptime()),
        pre_dump_mode: Some(match mode {
            PreDumpMode::Splice => 1,
            PreDumpMode::Read => 2,
        }),
        plugins_entry: Some(PluginsEntry::default()),
        ..InventoryEntry::default()
    }
}

/// The inventory, which is written last.
#[must_use]
pub fn inventory(
    own_format: bool,
    compression: Option<Compression>,
    tcp_close: bool,
    lock_method: u32,
    run_id: String,
) -> InventoryEntry {
    InventoryEntry {
        img_version: match compression {
            Some(compression) => compression.version(),
            None if own_format => SEVERAL_STORES,
            None => 2,
        },
        fdinfo_per_id: Some(true),
        root_ids: Some(root_ids()),
        ns_per_id: Some(true),
        root_cg_set: Some(1),
        lsmtype: Some(Lsmtype::NoLsm as i32),
        tcp_close: tcp_close.then_some(true),
        network_lock_method: Some(lock_method),
        plugins_entry: Some(PluginsEntry::default()),
        dump_criu_run_id: Some(run_id.into_bytes()),
        ..InventoryEntry::default()
    }
}
