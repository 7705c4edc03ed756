//! Making instances again.
//!
//! A new instance begins at position 0, and only requests move its positions: so many empty ones (`IORING_OP_NOP`) are
//! made, of which some give no completion where there were fewer completions than requests; where there were more, others
//! send them (`IORING_REGISTER_SEND_MSG_RING`). The rings are mapped by the tasks later, for the kernel lets nobody choose
//! their addresses (`engine::restore::rings`).
//!
//! What only one thread may submit to is made disabled, and that thread enables it and makes the requests ([`Work`]). It is
//! also the tasks that register buffers, for these are their memory.

use super::FARTHEST;
use super::KEPT;
use crate::Problem;
use crate::files::open::{Opener, placeholder};
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{RewakeFileEntry, RewakeRingEntry};
use rewake_sys::io_uring::{self as ring, Memory};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{HashMap, HashSet};

/// Bytes of data, and operations, that a thread's script must have room for if it is to do [`Work`].
pub const ROOM: (usize, usize) = (2048, 256);

fn problem(id: u32, reason: impl Into<String>) -> Problem {
    Problem::new(format!("io_uring instance {id}"), reason)
}

/// Makes an instance of the image and puts it to [`Opener::fetched`]; returns what tasks are given in its place, our pidfd.
///
/// # Errors
/// The image is impossible, or the kernel lacks something.
pub fn open(opener: &mut Opener<'_>, id: u32) -> Result<OwnedFd, Problem> {
    let entry = opener.extra.get(&id).and_then(|e| e.ring.clone());
    let entry = entry.ok_or_else(|| problem(id, "its entry is missing"))?;
    let failed = |what: &str, e: rewake_sys::SyscallError| problem(id, format!("{what}: {e}"));
    check(id, &entry)?;
    let (fd, known) = ring::setup(entry.sq_entries, entry.cq_entries, flags(&entry))
        .map_err(|e| failed("it cannot be made", e))?;
    if !known {
        return Err(problem(id, "this kernel arranges its rings in another way"));
    }
    let made = Made::map(id, &entry, fd.as_fd())?;
    if !is_disabled(&entry) {
        made.advance()?;
    }
    // Whoever enables it makes requests, of which the eventfd shall not hear.
    made.rings.set_word(ring::CQ_FLAGS, ring::CQ_EVENTFD_DISABLED);
    if let Some(slots) = entry.file_slots {
        let mut files = Vec::with_capacity(entry.files.len());
        for file in &entry.files {
            opener.open(file.file)?;
            if opener.is_put_off(file.file) {
                return Err(problem(
                    id,
                    "a registered file of /proc is not there before its tasks are",
                ));
            }
        }
        for file in &entry.files {
            files.push((file.slot, opener.opened(file.file)?, file.tag.unwrap_or(0)));
        }
        ring::register_files(fd.as_fd(), slots, &files)
            .map_err(|e| failed("its files cannot be registered", e))?;
    }
    if let (Some(from), Some(to)) = (entry.files_from, entry.files_to) {
        ring::file_range(fd.as_fd(), (from, to))
            .map_err(|e| failed("its range of files cannot be set", e))?;
    }
    if let Some(eventfd) = entry.eventfd {
        let nobodys;
        let eventfd = match eventfd {
            0 => {
                nobodys = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
                    .map_err(|e| problem(id, format!("eventfd: {e}")))?;
                nobodys.as_fd()
            }
            file => opener.open(file)?,
        };
        let only_async = entry.eventfd_async == Some(true);
        ring::register_eventfd(fd.as_fd(), eventfd, only_async)
            .map_err(|e| failed("its eventfd cannot be registered", e))?;
    }
    if let [bounded, unbounded] = entry.workers[..] {
        ring::limit_workers(fd.as_fd(), [bounded, unbounded])
            .map_err(|e| failed("its workers cannot be limited", e))?;
    }
    if let Some(clock) = entry.clock {
        ring::wait_by(fd.as_fd(), clock).map_err(|e| failed("its clock cannot be set", e))?;
    }
    if entry.issuer.is_none() {
        made.fill();
    }
    let settable = entry.flags & (libc::O_NONBLOCK | libc::O_ASYNC) as u32;
    rewake_sys::file::set_flags(fd.as_fd(), settable).map_err(|e| failed("its flags", e))?;
    drop(made);
    opener.fetched.insert(id, fd);
    placeholder().map_err(|e| problem(id, format!("pidfd_open: {e}")))
}

/// Could there be such an instance?
fn check(id: u32, entry: &RewakeRingEntry) -> Result<(), Problem> {
    let (sq, cq, how) = (entry.sq_entries, entry.cq_entries, flags(entry));
    let array = entry.array.as_ref().map_or(4 * sq as usize, Vec::len);
    let slots = [entry.file_slots, entry.buffer_slots].map(|slots| slots.unwrap_or(0));
    let in_order = |used: Vec<u32>, slots: u32| {
        used.is_sorted_by(|a, b| a < b) && used.last().is_none_or(|last| *last < slots)
    };
    if !sq.is_power_of_two()
        || !cq.is_power_of_two()
        || sq > ring::MAX_ENTRIES
        || cq > 2 * ring::MAX_ENTRIES
        || entry.position.max(given(entry)) > FARTHEST
        || entry.completions.len() != ring::cqe(how) * cq as usize
        || entry.submissions.len() != ring::sqe(how) * sq as usize
        || array != 4 * sq as usize
        || how & !(KEPT | ring::SETUP_R_DISABLED) != 0
        || slots.iter().any(|slots| *slots > 1 << 16)
        || !in_order(entry.files.iter().map(|f| f.slot).collect(), slots[0])
        || !in_order(entry.buffers.iter().map(|b| b.slot).collect(), slots[1])
        || is_disabled(entry) && entry.issuer.is_none() && entry.position.max(given(entry)) > 0
    {
        return Err(problem(id, "what the images say of it is impossible"));
    }
    Ok(())
}

/// How it is made at first.
fn flags(entry: &RewakeRingEntry) -> u32 {
    let plain = if entry.array.is_some() { 0 } else { ring::SETUP_NO_SQARRAY };
    let disabled = if entry.issuer.is_some() { ring::SETUP_R_DISABLED } else { 0 };
    entry.setup.unwrap_or(plain) | disabled
}

fn is_disabled(entry: &RewakeRingEntry) -> bool {
    flags(entry) & ring::SETUP_R_DISABLED != 0
}

/// Completions given.
fn given(entry: &RewakeRingEntry) -> u32 {
    entry.given.unwrap_or(entry.position)
}

/// A new instance, mapped.
struct Made<'a> {
    id: u32,
    entry: &'a RewakeRingEntry,
    fd: BorrowedFd<'a>,
    rings: Memory,
    entries: Memory,
}

impl<'a> Made<'a> {
    fn map(id: u32, entry: &'a RewakeRingEntry, fd: BorrowedFd<'a>) -> Result<Made<'a>, Problem> {
        let failed = |e: rewake_sys::SyscallError| problem(id, e.to_string());
        let array = ring::array_at(entry.cq_entries, flags(entry));
        let array_len = if flags(entry) & ring::SETUP_NO_SQARRAY != 0 {
            0
        } else {
            4 * entry.sq_entries as usize
        };
        let rings = Memory::map(fd, array + array_len, 0).map_err(failed)?;
        let entries =
            Memory::map(fd, entry.submissions.len(), ring::OFFSET_SQES).map_err(failed)?;
        if rings.len() < array + array_len || entries.len() < entry.submissions.len() {
            return Err(problem(id, "this kernel made it smaller"));
        }
        Ok(Made { id, entry, fd, rings, entries })
    }

    /// Requests at a time.
    fn step(&self) -> u32 {
        self.entry.sq_entries.min(self.entry.cq_entries)
    }

    fn unreachable(&self) -> Problem {
        problem(
            self.id,
            format!(
                "its positions {} and {} cannot be reached",
                self.entry.position,
                given(self.entry)
            ),
        )
    }

    /// Brings it to its positions.
    fn advance(&self) -> Result<(), Problem> {
        let failed = |e: rewake_sys::SyscallError| problem(self.id, e.to_string());
        // New entries are zeros, which is IORING_OP_NOP; with an array of zeros all are the first one.
        let both = self.entry.position.min(given(self.entry));
        for end in [both, self.entry.position] {
            let mut done = self.rings.word(ring::SQ_HEAD);
            while done < end {
                let step = self.step().min(end - done);
                self.rings.set_word(ring::SQ_TAIL, done + step);
                if ring::submit(self.fd, step).map_err(failed)? != step as usize {
                    return Err(self.unreachable());
                }
                done += step;
                self.take_all();
            }
            self.be_silent();
        }
        while self.rings.word(ring::CQ_TAIL) < given(self.entry) {
            ring::send_completion(self.fd).map_err(failed)?;
            self.take_all();
        }
        self.verify()
    }

    /// Takes all completions.
    fn take_all(&self) {
        self.rings.set_word(ring::CQ_HEAD, self.rings.word(ring::CQ_TAIL));
    }

    /// From now on requests give no completions.
    fn be_silent(&self) {
        let size = ring::sqe(flags(self.entry));
        for at in 0..self.entry.sq_entries as usize {
            self.entries.write(at * size + 1, &[ring::SQE_SKIP_SUCCESS]);
        }
    }

    fn verify(&self) -> Result<(), Problem> {
        let there = [ring::SQ_HEAD, ring::CQ_TAIL].map(|at| self.rings.word(at));
        if there == [self.entry.position, given(self.entry)] {
            Ok(())
        } else {
            Err(self.unreachable())
        }
    }

    /// Puts everything into the rings that was there.
    fn fill(&self) {
        let entry = self.entry;
        self.entries.write(0, &entry.submissions);
        self.rings.write(ring::CQES, &entry.completions);
        if let Some(numbers) = &entry.array {
            self.rings.write(ring::array_at(entry.cq_entries, flags(entry)), numbers);
        }
        self.rings.set_word(ring::CQ_HEAD, entry.cq_head);
        self.rings.set_word(ring::SQ_TAIL, entry.sq_tail);
        let words = entry.words.iter().copied().chain(std::iter::repeat(0));
        for (at, word) in [ring::SQ_DROPPED, ring::CQ_FLAGS, ring::CQ_OVERFLOW].iter().zip(words) {
            self.rings.set_word(*at, word);
        }
    }
}

/// The threads that have something to do for instances, once all tasks are built.
#[must_use]
pub fn workers(extra: &HashMap<u32, RewakeFileEntry>) -> HashSet<i32> {
    let rings = extra.values().filter_map(|e| e.ring.as_ref());
    rings.filter_map(worker).collect()
}

/// The thread that has something to do for an instance.
fn worker(entry: &RewakeRingEntry) -> Option<i32> {
    let owner = entry.buffers_of.filter(|_| entry.buffer_slots.is_some());
    // A table without buffers is anybody's, but is made by those who have the instance.
    entry.issuer.or(owner).map(|tid| tid as i32)
}

/// What is to be done for an instance when it is in its tasks.
#[derive(Debug)]
pub struct Work<'a> {
    /// The file id of the instance.
    pub id: u32,
    /// Who is to do it.
    pub tid: i32,
    entry: &'a RewakeRingEntry,
    fd: BorrowedFd<'a>,
}

/// What is to be done, by instance.
pub fn work<'a>(opener: &'a Opener<'_>) -> impl Iterator<Item = Work<'a>> {
    opener.fetched.iter().filter_map(|(id, fd)| {
        let entry = opener.extra.get(id)?.ring.as_ref()?;
        Some(Work { id: *id, tid: worker(entry)?, entry, fd: fd.as_fd() })
    })
}

impl Work<'_> {
    /// Does it: `run` has the thread execute steps that begin at the data address it gives. The instance is descriptor
    /// `number` there.
    ///
    /// # Errors
    /// The image is impossible, or the kernel refuses.
    pub fn execute<E: From<Problem>>(
        &self,
        number: u32,
        mut run: impl FnMut(&dyn Fn(u64) -> Steps) -> Result<(), E>,
    ) -> Result<(), E> {
        let label = Label::Descriptor(number);
        let register = |what: u64, address: u64, count: u64| {
            Op::new(libc::SYS_io_uring_register, &[number.into(), what, address, count])
        };
        if self.entry.issuer.is_some() {
            let enable = |base: u64| {
                let mut steps = Steps::new(base);
                steps.must(label, register(ring::REGISTER_ENABLE_RINGS, 0, 0));
                steps
            };
            // One that was disabled has nobody yet who would be the only one.
            run(&enable)?;
            let made = Made::map(self.id, self.entry, self.fd)?;
            self.advance(&made, number, &mut run)?;
            made.fill();
        }
        let Some(slots) = self.entry.buffer_slots else { return Ok(()) };
        run(&|base: u64| {
            let mut steps = Steps::new(base);
            let table = steps.words(&ring::empty_table(slots));
            steps.must(label, register(ring::REGISTER_BUFFERS2, table.address, 32));
            steps
        })?;
        // An update, and two words and a tag for each buffer.
        const AT_ONCE: usize = (ROOM.0 - 32) / 24;
        let runs = self.entry.buffers.chunk_by(|a, b| a.slot + 1 == b.slot);
        for part in runs.flat_map(|run| run.chunks(AT_ONCE)) {
            run(&|base: u64| {
                let mut steps = Steps::new(base);
                let vectors: Vec<u64> =
                    part.iter().flat_map(|b| [b.address, u64::from(b.len)]).collect();
                let vectors = steps.words(&vectors);
                let tags: Vec<u64> = part.iter().map(|b| b.tag.unwrap_or(0)).collect();
                let tags = steps.words(&tags);
                let count = part.len() as u32;
                let update = ring::table_update(part[0].slot, count, vectors.address, tags.address);
                let update = steps.words(&update);
                let op = register(ring::REGISTER_BUFFERS_UPDATE, update.address, 32);
                steps.must_be(Label::Buffers(number), count.into(), op);
                steps
            })?;
        }
        Ok(())
    }

    /// Has the thread make as many requests as there have been.
    fn advance<E: From<Problem>>(
        &self,
        made: &Made<'_>,
        number: u32,
        run: &mut impl FnMut(&dyn Fn(u64) -> Steps) -> Result<(), E>,
    ) -> Result<(), E> {
        let (step, position, given) = (made.step(), self.entry.position, given(self.entry));
        let enter = |count: u32, flags: u64| {
            Op::new(libc::SYS_io_uring_enter, &[number.into(), count.into(), 0, flags])
        };
        let label = Label::Descriptor(number);
        // Room for what is around them, and for two operations each.
        let at_once = (ROOM.1 as u32 / 2 - 2) * step;
        for end in [position.min(given), position] {
            let mut done = made.rings.word(ring::SQ_HEAD);
            made.rings.set_word(ring::SQ_TAIL, end);
            while done < end {
                let until = end.min(done.saturating_add(at_once));
                run(&|base: u64| {
                    let mut steps = Steps::new(base);
                    let both = (libc::PROT_READ | libc::PROT_WRITE) as u64;
                    let args = [0, 4096, both, libc::MAP_SHARED as u64, number.into(), 0];
                    let map = steps.must(label, Op::new(libc::SYS_mmap, &args)) as u32;
                    for at in (done..until).step_by(step as usize) {
                        let count = step.min(until - at);
                        steps.must_be(label, count.into(), enter(count, 0));
                        // Takes its completions: adds to the queue's head.
                        let head = ring::CQ_HEAD as i32;
                        let add = Op::new(libc::SYS_futex, &[0, WAKE_OP, 0, 0, 0, adding(step)]);
                        let add = add.arg_result(0, map, head).arg_result(4, map, head);
                        steps.must(label, add);
                    }
                    steps.must(label, Op::new(libc::SYS_munmap, &[0, 4096]).arg_result(0, map, 0));
                    steps
                })?;
                done = until;
            }
            made.take_all();
            made.be_silent();
        }
        while made.rings.word(ring::CQ_TAIL) < given {
            ring::send_completion(self.fd).map_err(|e| problem(self.id, e.to_string()))?;
            // It may wait until the thread looks.
            const GETEVENTS: u64 = 1;
            run(&|base: u64| {
                let mut steps = Steps::new(base);
                steps.must(label, enter(0, GETEVENTS));
                steps
            })?;
            made.take_all();
        }
        Ok(made.verify()?)
    }
}

/// `FUTEX_WAKE_OP`, private.
const WAKE_OP: u64 = 5 | 128;

/// Its last argument: adds a power of two to the second word.
fn adding(step: u32) -> u64 {
    const ADD: u64 = 1;
    const POWER: u64 = 8;
    (ADD | POWER) << 28 | u64::from(step.trailing_zeros()) << 12
}
