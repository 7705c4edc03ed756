//! The rings of io_uring instances are mapped where the program knows them.
//!
//! The kernel lets nobody choose the address of such a mapping, nor move it: it takes the highest hole that is large enough.
//! So all holes of the address space are filled for a moment but the one that is wanted.

use super::Run;
use super::build::TaskPlan;
use super::read::Task;
use crate::error::{Context, Error, Result};
use rewake_agent::layout::Op;
use rewake_image::messages::{FdinfoEntry, VmaEntry};
use rewake_inject::ring::Ring;
use rewake_objects::files::io_uring::open::{Work, work};
use rewake_objects::files::open::Opener;
use rewake_objects::memory::TASK_SIZE;
use rewake_objects::memory::vma::status;
use rewake_objects::steps::{Label, Steps};
use std::ops::Range;
use std::os::fd::AsRawFd;

/// A system call on the way, and what it must result in.
type Call = (Label, Option<i64>, Op);

impl Run<'_> {
    /// Has all tasks that have rings fetch and map them; other files that they could not be sent, too.
    pub(super) fn map_rings(&self, rings: &[Ring], opener: &mut Opener<'_>) -> Result<()> {
        opener.open_late()?;
        if opener.fetched.is_empty() {
            return Ok(());
        }
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(task_plan) = &plan.task else { continue };
            let task = self.task(task_plan);
            let Some(alive) = &task.alive else { continue };
            // Those that share a table, or memory, come in the order in which they were built.
            let fetched = task.part.table != task_plan.index;
            let mapped = task.part.memory != task_plan.index;
            let fetch: Vec<Call> = alive
                .fds
                .iter()
                .filter(|_| !fetched)
                .filter_map(|fd| Some((fd, opener.fetched.get(&fd.id)?)))
                .flat_map(|(fd, ours)| fetch(fd, ours.as_raw_fd()))
                .collect();
            for part in fetch.chunks(FETCH) {
                self.execute(ring, task, part)?;
            }
            let wanted: Vec<(&VmaEntry, u32)> = alive
                .mm
                .vmas
                .iter()
                .filter(|v| !mapped && v.status & status::EXT_PLUGIN != 0)
                .map(|v| {
                    let number = alive.fds.iter().find(|f| u64::from(f.id) == v.shmid);
                    let why = || format!("mapping {:#x}: its descriptor is not there", v.start);
                    number.map(|f| (v, f.fd)).ok_or_else(why)
                })
                .collect::<std::result::Result<_, String>>()
                .of(task.pid, &task.comm)?;
            if !wanted.is_empty() {
                let taken = self.address_space(task)?;
                self.execute(ring, task, &calls(&wanted, &taken))?;
            }
        }
        work(opener).try_for_each(|work| self.work(rings, &work))
    }

    /// Has a thread do what only it can do for an instance.
    fn work(&self, rings: &[Ring], work: &Work<'_>) -> Result<()> {
        let missing = || {
            Error::new(format!(
                "io_uring instance {}: thread {} is not there, or without a descriptor of it",
                work.id, work.tid
            ))
        };
        let plans = rings.iter().zip(self.plans).filter_map(|(r, p)| Some((r, p.task.as_ref()?)));
        let has_it = |plan: &TaskPlan| {
            plan.threads.iter().any(|thread| thread.tid == work.tid)
                || self.task(plan).pid == work.tid
        };
        let mut found = plans.filter(|(_, plan)| has_it(plan));
        let (leader, plan) = found.next().ok_or_else(missing)?;
        let task = self.task(plan);
        let fds = task.alive.iter().flat_map(|alive| &alive.fds);
        let number = fds.into_iter().find(|fd| fd.id == work.id).ok_or_else(missing)?.fd;
        let thread = plan.threads.iter().find(|thread| thread.tid == work.tid);
        let thread = thread.map(|thread| self.thread_ring(thread));
        let ring = thread.as_ref().unwrap_or(leader);
        work.execute(number, |steps| self.run_steps(ring, task, &steps(ring.data_base())))
    }

    /// Has an agent execute a script.
    fn run_steps(&self, ring: &Ring, task: &Task, steps: &Steps) -> Result<()> {
        let number = ring
            .load(&steps.script)
            .and_then(|number| ring.ring().map(|()| number))
            .of(task.pid, &task.comm)?;
        self.wait(ring, number, task)?;
        let results = ring.results(&steps.script);
        self.check(steps, &results, task.pid, &task.comm, &mut Vec::new())
    }

    /// Every mapping of a task as it is now.
    fn address_space(&self, task: &Task) -> Result<Vec<Range<u64>>> {
        let path = format!("/proc/{}/maps", self.outer(task.pid)?);
        let text = std::fs::read(&path).map_err(|e| Error::new(format!("{path}: {e}")))?;
        rewake_proc::maps::parse(&text)
            .map(|map| map.map(|m| m.start..m.end))
            .collect::<std::result::Result<_, _>>()
            .of(task.pid, &task.comm)
    }

    /// Has a task make calls, as many at a time as its ring has room for.
    fn execute(&self, ring: &Ring, task: &Task, calls: &[Call]) -> Result<()> {
        for part in calls.chunks(ring.capacity().max(1)) {
            let mut steps = Steps::new(ring.data_base());
            for (label, wanted, op) in part {
                match wanted {
                    Some(value) => steps.must_be(*label, *value, *op),
                    None => steps.must(*label, *op),
                };
            }
            self.run_steps(ring, task, &steps)?;
        }
        Ok(())
    }
}

/// Calls by which one descriptor is fetched: a later one needs the result of the first.
const FETCH: usize = 3;

/// Fetches a file, which is descriptor `ours` of the controller, by the pidfd that is in its place.
fn fetch(fd: &FdinfoEntry, ours: i32) -> [Call; FETCH] {
    let label = Label::Descriptor(fd.fd);
    let cloexec = if fd.flags & 1 != 0 { libc::O_CLOEXEC as u64 } else { 0 };
    let number = u64::from(fd.fd);
    let get = Op::new(libc::SYS_pidfd_getfd, &[number, ours as u64, 0]);
    let dup = Op::new(libc::SYS_dup3, &[0, number, cloexec]).arg_result(0, 0, 0);
    let close = Op::new(libc::SYS_close, &[0]).arg_result(0, 0, 0);
    [(label, None, get), (label, None, dup), (label, None, close)]
}

/// The lowest address that may be mapped: `vm.mmap_min_addr` at its usual most.
const LOWEST: u64 = 1 << 16;

/// Fills all holes, opens one after the other for its ring, and empties the rest again.
fn calls(wanted: &[(&VmaEntry, u32)], taken: &[Range<u64>]) -> Vec<Call> {
    let filling = Label::Text("filling a hole in the address space");
    let nothing = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64
        | libc::MAP_FIXED_NOREPLACE as u64;
    let holes = holes(taken);
    let mut calls: Vec<Call> = Vec::new();
    for hole in &holes {
        let args = [hole.start, hole.end - hole.start, 0, nothing, u64::MAX, 0];
        calls.push((filling, Some(hole.start as i64), Op::new(libc::SYS_mmap, &args)));
    }
    for (vma, fd) in wanted {
        let (label, len) = (Label::Vma(vma.start, vma.end), vma.end - vma.start);
        calls.push((label, None, Op::new(libc::SYS_munmap, &[vma.start, len])));
        let shared = (libc::MAP_SHARED | libc::MAP_POPULATE) as u64;
        let args = [0, len, u64::from(vma.prot), shared, u64::from(*fd), vma.pgoff];
        calls.push((label, Some(vma.start as i64), Op::new(libc::SYS_mmap, &args)));
        if vma.madv.unwrap_or(0) & 1 << libc::MADV_DONTFORK != 0 {
            let args = [vma.start, len, libc::MADV_DONTFORK as u64];
            calls.push((label, None, Op::new(libc::SYS_madvise, &args)));
        }
    }
    let mut places: Vec<Range<u64>> = wanted.iter().map(|(v, _)| v.start..v.end).collect();
    places.sort_unstable_by_key(|p| p.start);
    for hole in &holes {
        let mut from = hole.start;
        let inside = places.iter().filter(|p| p.start >= hole.start && p.end <= hole.end);
        for place in inside.chain([&(hole.end..hole.end)]) {
            if from < place.start {
                let args = [from, place.start - from];
                calls.push((filling, None, Op::new(libc::SYS_munmap, &args)));
            }
            from = place.end;
        }
    }
    calls
}

/// What is between the mappings.
fn holes(taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes = Vec::new();
    let mut from = LOWEST;
    for range in taken.iter().filter(|r| r.start < TASK_SIZE).chain([&(TASK_SIZE..TASK_SIZE)]) {
        if from < range.start {
            holes.push(from..range.start);
        }
        from = from.max(range.end);
    }
    holes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_what_is_left() {
        let taken = [0x20000..0x30000, 0x30000..0x40000, 0x50000..TASK_SIZE];
        assert_eq!(holes(&taken), [0x10000..0x20000, 0x40000..0x50000]);
        let vma = VmaEntry { start: 0x12000, end: 0x13000, ..VmaEntry::default() };
        let emptied: Vec<u64> = calls(&[(&vma, 3)], &taken)
            .iter()
            .filter(|(label, _, op)| {
                *label == Label::Text("filling a hole in the address space")
                    && op.nr == libc::SYS_munmap as u32
            })
            .map(|(_, _, op)| op.args[0])
            .collect();
        assert_eq!(emptied, [0x10000, 0x13000, 0x40000]);
    }
}
