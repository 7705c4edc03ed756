//! Idle io_uring(7) instances: the positions of both queues, completions that were not taken and submissions that were not
//! made yet. An instance is idle if every request that was taken has been completed by one completion.
//!
//! A new instance begins at position 0, and only requests move its positions: so many empty ones (`IORING_OP_NOP`) are
//! made. The rings are mapped by the tasks later, for the kernel lets nobody choose their addresses (`engine::restore::rings`).
//!
//! The kernel does not tell `IORING_SETUP_SUBMIT_ALL`, `COOP_TASKRUN`, `CLAMP` and what workers are limited to: these are not
//! kept. Everything else that cannot be had again is refused by name: what is in flight, registered files, buffers and
//! eventfds, polling threads, single issuers, larger entries, rings in the program's own memory.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{FdTypes, RewakeRingEntry};
use rewake_sys::io_uring::{self as ring, Manner, Memory};
use rustix::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Requests that an instance has taken at most: as many are made to get there, a million in some 60 ms.
const FARTHEST: u32 = 1 << 28;
/// What is in flight is waited for so long: what waits for the task itself never ends while that stands still.
const PATIENCE: Duration = Duration::from_millis(100);

/// What fdinfo tells.
#[derive(Debug, Default)]
struct Told {
    sq_entries: u32,
    cq_entries: u32,
    /// Requests taken and completions given, both since the beginning.
    taken: u32,
    given: u32,
    polling_thread: bool,
    files: u64,
    buffers: u64,
    /// Lines below `PollList:` and `CqOverflowList:`, and personalities.
    listed: bool,
    napi: bool,
}

fn parse(text: &[u8]) -> Option<Told> {
    let mut told = Told::default();
    let mut list = false;
    for line in text.split(|b| *b == b'\n') {
        let line = std::str::from_utf8(line).ok()?;
        if line.starts_with(' ') {
            told.listed |= list && !line.trim().is_empty();
            continue;
        }
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        list = matches!(key, "PollList" | "CqOverflowList" | "Personalities");
        let number = || match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => value.parse().ok(),
        };
        match key {
            "SqMask" => told.sq_entries = (number()? as u32).checked_add(1)?,
            "CqMask" => told.cq_entries = (number()? as u32).checked_add(1)?,
            "CachedSqHead" => told.taken = number()? as u32,
            "CachedCqTail" => told.given = number()? as u32,
            "SqThread" => told.polling_thread = value != "-1",
            "UserFiles" => told.files = number()?,
            "UserBufs" => told.buffers = number()?,
            "NAPI" => told.napi = true,
            _ => {}
        }
    }
    let possible = |n: u32, most: u32| n.is_power_of_two() && n <= most;
    (possible(told.sq_entries, ring::MAX_ENTRIES)
        && possible(told.cq_entries, 2 * ring::MAX_ENTRIES))
    .then_some(told)
}

/// Surveys an instance.
///
/// # Errors
/// It is not idle, or has something that cannot be had again.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let other = "let the program use its other I/O backend (epoll, aio), if it has one";
    let refuse = |what: &str| view.problem(format!("io_uring instances {what}")).remedy(other);
    let until = Instant::now() + PATIENCE;
    let told = loop {
        let text = (view.fdinfo)()?;
        let told = parse(&text)
            .ok_or_else(|| refuse("of which the kernel tells too little cannot be saved"))?;
        if told.polling_thread {
            return Err(refuse("with a thread that polls (IORING_SETUP_SQPOLL) cannot be saved"));
        }
        if (told.taken == told.given && !told.listed) || Instant::now() >= until {
            break told;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    match ring::manner(view.as_fd(), told.napi) {
        Manner::Plain => {}
        Manner::Disabled => {
            return Err(refuse(
                "that are disabled still (IORING_SETUP_R_DISABLED) cannot be saved",
            ));
        }
        Manner::Deferred => {
            return Err(refuse(
                "whose completions wait for their task (IORING_SETUP_DEFER_TASKRUN) cannot be saved",
            ));
        }
        Manner::SingleIssuer => {
            return Err(refuse("of one task alone (IORING_SETUP_SINGLE_ISSUER) cannot be saved"));
        }
        Manner::Polled => {
            return Err(refuse("that poll devices (IORING_SETUP_IOPOLL) cannot be saved"));
        }
        Manner::Eventfd => {
            return Err(refuse(
                "with an eventfd registered cannot be saved: the kernel does not tell which it is",
            ));
        }
        Manner::BufferRings => {
            return Err(refuse(
                "with rings of buffers (IORING_REGISTER_PBUF_RING) cannot be saved",
            ));
        }
    }
    if told.files != 0 {
        return Err(refuse(
            "with registered files cannot be saved: the kernel does not tell which they are",
        ));
    }
    if told.buffers != 0 {
        return Err(refuse("with registered buffers cannot be saved"));
    }
    if told.taken != told.given || told.listed {
        return Err(refuse(&format!(
            "with requests in flight cannot be saved ({} taken, {} completions given)",
            told.taken, told.given
        )));
    }
    if told.taken > FARTHEST {
        return Err(refuse(&format!(
            "that have taken more than {FARTHEST} requests cannot be saved"
        )));
    }
    let entry = content(view, &told)?;
    let id = collector.new_id();
    collector.extra_of(id).ring = Some(entry);
    Ok((id, collector.push_foreign(id, view)?))
}

/// Reads the queues.
fn content(view: &View<'_>, told: &Told) -> Result<RewakeRingEntry, Problem> {
    let (sq, cq) = (told.sq_entries as usize, told.cq_entries as usize);
    let map = |len: usize, offset: u64| Memory::map(view.as_fd(), len, offset);
    let own = |e: rewake_sys::SyscallError| {
        view.problem(format!("io_uring instances in the program's own memory (IORING_SETUP_NO_MMAP) cannot be saved ({e})"))
    };
    let large = || {
        view.problem(
            "io_uring instances with large entries (IORING_SETUP_SQE128, CQE32) cannot be saved",
        )
    };
    let pages = |len: usize| len.next_multiple_of(4096);
    let array = ring::array_at(told.cq_entries);
    // An array of numbers follows the completions, where there is one.
    let rings = map(array + 4 * sq, 0).map_err(own)?;
    let entries = map(sq * ring::SQE, ring::OFFSET_SQES).map_err(own)?;
    if rings.len() < array || entries.len() < sq * ring::SQE {
        return Err(view.problem("its rings are smaller than they must be"));
    }
    let has_array = rings.len() >= array + 4 * sq
        && (sq == 1 || (0..sq).any(|i| rings.word(array + 4 * i) != 0));
    // Entries of twice the size, which show if they need more pages, or by where the array is.
    let wide = ring::CQES + 2 * ring::CQE * cq + 4 * sq;
    let at = wide - 4 * sq;
    let reaches = |memory: &Memory, len: usize| memory.len() >= pages(len);
    let in_order = |memory: &Memory, at: usize| {
        memory.len() >= at + 4 * sq && (0..sq).all(|i| memory.word(at + 4 * i) == i as u32)
    };
    let is_wide = map(wide, 0).is_ok_and(|m| {
        let elsewhere = || sq > 1 && in_order(&m, at) && !in_order(&m, array);
        reaches(&m, wide) && (pages(wide) > pages(array + 4 * sq) || elsewhere())
    });
    let long = 2 * sq * ring::SQE;
    let is_long = pages(long) > pages(sq * ring::SQE)
        && map(long, ring::OFFSET_SQES).is_ok_and(|m| reaches(&m, long));
    if is_wide || is_long {
        return Err(large());
    }
    Ok(RewakeRingEntry {
        sq_entries: told.sq_entries,
        cq_entries: told.cq_entries,
        flags: view.flags,
        // One that was never used may have an array of zeros: what fills it later fills it in order.
        array: has_array.then(|| rings.bytes(array, 4 * sq)),
        position: told.taken,
        sq_tail: rings.word(ring::SQ_TAIL),
        cq_head: rings.word(ring::CQ_HEAD),
        completions: rings.bytes(ring::CQES, ring::CQE * cq),
        submissions: entries.bytes(0, ring::SQE * sq),
    })
}

/// Makes an instance of the image and puts it to [`Opener::fetched`]; returns what tasks are given in its place, our pidfd.
///
/// # Errors
/// The image is impossible, or the kernel lacks something.
pub fn open(opener: &mut Opener<'_>, id: u32) -> Result<OwnedFd, Problem> {
    let problem = |reason: String| Problem::new(format!("io_uring instance {id}"), reason);
    let entry = opener.extra.get(&id).and_then(|e| e.ring.as_ref());
    let ring = make(id, entry.ok_or_else(|| problem("its entry is missing".into()))?)?;
    opener.fetched.insert(id, ring);
    super::open::placeholder().map_err(|e| problem(format!("pidfd_open: {e}")))
}

/// Makes an instance of the image and brings it to its position.
fn make(id: u32, entry: &RewakeRingEntry) -> Result<OwnedFd, Problem> {
    let problem = |reason: String| Problem::new(format!("io_uring instance {id}"), reason);
    let failed = |e: rewake_sys::SyscallError| problem(e.to_string());
    let (sq, cq) = (entry.sq_entries, entry.cq_entries);
    let array_len = entry.array.as_ref().map_or(4 * sq as usize, Vec::len);
    if sq > ring::MAX_ENTRIES
        || cq > 2 * ring::MAX_ENTRIES
        || entry.position > FARTHEST
        || entry.completions.len() != ring::CQE * cq as usize
        || entry.submissions.len() != ring::SQE * sq as usize
        || array_len != 4 * sq as usize
    {
        return Err(problem("its sizes are impossible".into()));
    }
    let flags = if entry.array.is_some() { 0 } else { ring::SETUP_NO_SQARRAY };
    let (fd, known) = ring::setup(sq, cq, flags).map_err(failed)?;
    if !known {
        return Err(problem("this kernel arranges its rings in another way".into()));
    }
    let array = ring::array_at(cq);
    let rings = Memory::map(fd.as_fd(), array + array_len, 0).map_err(failed)?;
    let entries =
        Memory::map(fd.as_fd(), entry.submissions.len(), ring::OFFSET_SQES).map_err(failed)?;
    let array_there = if flags == 0 { array_len } else { 0 };
    if rings.len() < array + array_there || entries.len() < entry.submissions.len() {
        return Err(problem("this kernel made it smaller".into()));
    }
    // New entries are zeros, which is IORING_OP_NOP; with an array of zeros all are the first one.
    let mut done = 0u32;
    while done < entry.position {
        let step = sq.min(cq).min(entry.position - done);
        rings.set_word(ring::SQ_TAIL, done + step);
        let taken = ring::submit(fd.as_fd(), step).map_err(failed)?;
        if taken != step as usize || rings.word(ring::CQ_TAIL) != done + step {
            return Err(problem(format!("its position {} cannot be reached", entry.position)));
        }
        done += step;
        rings.set_word(ring::CQ_HEAD, done);
    }
    entries.write(0, &entry.submissions);
    rings.write(ring::CQES, &entry.completions);
    if let Some(numbers) = &entry.array {
        rings.write(array, numbers);
    }
    rings.set_word(ring::CQ_HEAD, entry.cq_head);
    rings.set_word(ring::SQ_TAIL, entry.sq_tail);
    let settable = entry.flags & (libc::O_NONBLOCK | libc::O_ASYNC) as u32;
    rewake_sys::file::set_flags(fd.as_fd(), settable).map_err(failed)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_is_understood() {
        let text = b"pos:\t0\nSqMask:\t0x7\nSqHead:\t2\nCachedSqHead:\t2\nCqMask:\t0xf\nCachedCqTail:\t2\nSQEs:\t1\n    2: opcode:NOP\nSqThread:\t-1\nUserFiles:\t0\nUserBufs:\t0\nPollList:\nCqOverflowList:\nNAPI:\tdisabled\n";
        let told = parse(text).unwrap();
        assert_eq!((told.sq_entries, told.cq_entries, told.taken, told.given), (8, 16, 2, 2));
        assert!(!told.listed && !told.polling_thread && told.napi);
        let busy = String::from_utf8_lossy(text)
            .replace("PollList:\n", "PollList:\n  op=6, task_works=0\n");
        assert!(parse(busy.as_bytes()).unwrap().listed);
        assert!(parse(b"pos:\t0\n").is_none());
    }
}
