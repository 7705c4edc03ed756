//! Idle io_uring(7) instances: the positions of both queues, completions that were not taken and submissions that were not
//! made yet, how they were made, and what is registered with them ([`registered`]).
//!
//! How an instance was made the kernel tells by a BPF program only ([`crate::iterators::rings`]), and likewise what is
//! registered and whether a request is in flight. Where such programs may not run, an instance is asked by calls that can do
//! nothing ([`ring::manner`]): it is idle then if every request that was taken has been completed by one completion, and
//! `IORING_SETUP_SUBMIT_ALL`, `COOP_TASKRUN` and the limits of workers are not noticed.
//!
//! [`open`] is the way back.

pub mod open;
pub mod registered;

use super::collect::{Collector, View};
use crate::Problem;
use crate::iterators::rings::{self, Instance};
use rewake_image::messages::{FdTypes, RewakeRingEntry};
use rewake_sys::io_uring::{self as ring, Manner, Memory};
use rustix::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Requests that an instance has taken at most: as many are made to get there, a million in some 60 ms.
const FARTHEST: u32 = 1 << 28;
/// What is in flight is waited for so long while the task stands still: what a device does, ends without it.
const PATIENCE: Duration = Duration::from_millis(5);

/// What is restored of `IORING_SETUP_*`: what a new instance is made with again.
const KEPT: u32 = ring::SETUP_R_DISABLED
    | ring::SETUP_SUBMIT_ALL
    | ring::SETUP_COOP_TASKRUN
    | ring::SETUP_TASKRUN_FLAG
    | ring::SETUP_SQE128
    | ring::SETUP_CQE32
    | ring::SETUP_SINGLE_ISSUER
    | ring::SETUP_DEFER_TASKRUN
    | ring::SETUP_NO_SQARRAY;
/// What only mattered when it was made: `CQSIZE`, `CLAMP`, `ATTACH_WQ` (without a thread that polls, nothing is shared).
const PAST: u32 = ring::SETUP_CQSIZE | 1 << 4 | 1 << 5;

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
    /// Names of registered files.
    names: Vec<(u32, String)>,
    /// Lines below `PollList:` and `CqOverflowList:`, and personalities.
    listed: bool,
    napi: bool,
    napi_enabled: bool,
}

fn parse(text: &[u8]) -> Option<Told> {
    let mut told = Told::default();
    let mut list = false;
    let mut files = false;
    for line in text.split(|b| *b == b'\n') {
        let line = String::from_utf8_lossy(line);
        if line.starts_with(' ') {
            told.listed |= list && !line.trim().is_empty();
            if let Some((slot, name)) = line.trim().split_once(": ").filter(|_| files) {
                told.names.extend(slot.parse().ok().map(|slot| (slot, name.to_owned())));
            }
            continue;
        }
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        files = key == "UserFiles";
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
            "NAPI" => (told.napi, told.napi_enabled) = (true, value != "disabled"),
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
    let refuse = |what: &str| refusal(view, what);
    let until = Instant::now() + PATIENCE;
    let (told, instance) = loop {
        // In this order: requests may end while an agent lets the task run, but new ones are not made.
        let instance = rings::of(view.as_fd());
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", view.fd.as_raw_fd()))
            .map_err(|e| view.problem(format!("cannot be examined: {e}")))?;
        let told = parse(&text)
            .ok_or_else(|| refuse("of which the kernel tells too little cannot be saved"))?;
        if told.polling_thread {
            return Err(refuse("with a thread that polls (IORING_SETUP_SQPOLL) cannot be saved"));
        }
        let idle = match &instance {
            Ok(instance) => instance.in_flight == 0,
            Err(_) => told.taken == told.given && !told.listed,
        };
        if idle || Instant::now() >= until {
            break (told, instance);
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let flags = match &instance {
        Ok(instance) => judge(view, &told, instance)?,
        Err(why) => {
            log::debug!("{}: asked by experiment: {why}", view.object());
            experiment(view, &told)?;
            None
        }
    };
    if told.taken.max(told.given) > FARTHEST {
        return Err(refuse(&format!(
            "that have taken more than {FARTHEST} requests cannot be saved"
        )));
    }
    let entry = content(view, &told, flags)?;
    let id = collector.new_id();
    collector.extra_of(id).ring = Some(entry);
    if let Ok(instance) = instance {
        registered::note(collector, view, id, instance, told.names);
    }
    Ok((id, collector.push_foreign(id, view)?))
}

fn refusal(view: &View<'_>, what: &str) -> Problem {
    view.problem(format!("io_uring instances {what}"))
        .remedy("let the program use its other I/O backend (epoll, aio), if it has one")
}

/// What is to be said of requests in flight.
fn in_flight(view: &View<'_>, how: &str) -> Problem {
    view.problem(format!("io_uring instances with requests in flight cannot be saved ({how})"))
        .remedy("they were waited for: give the program time to finish (--timeout), or let it use its other I/O backend")
        .passing()
}

/// Can an instance be had again of which the kernel tells all? Returns how it is to be made.
fn judge(view: &View<'_>, told: &Told, instance: &Instance) -> Result<Option<u32>, Problem> {
    const IOPOLL: u32 = 1 | 1 << 17;
    let refuse = |what: &str| Err(refusal(view, what));
    let flags = instance.flags;
    if flags & IOPOLL != 0 {
        return refuse("that poll devices (IORING_SETUP_IOPOLL) cannot be saved");
    }
    if flags & ring::SETUP_NO_MMAP != 0 {
        return refuse("in the program's own memory (IORING_SETUP_NO_MMAP) cannot be saved");
    }
    if flags & !(KEPT | PAST) != 0 {
        let what = format!("of this kind cannot be saved (IORING_SETUP flags {flags:#x})");
        return refuse(&what);
    }
    if let Some(what) = instance.beyond {
        return refuse(&format!("{what} cannot be saved"));
    }
    if told.napi_enabled {
        return refuse("that poll network devices (IORING_REGISTER_NAPI) cannot be saved");
    }
    if instance.issuer == Some(Err(())) {
        return refuse("whose only thread has ended cannot be saved (IORING_SETUP_SINGLE_ISSUER)");
    }
    if instance.in_flight != 0 {
        return Err(in_flight(view, &format!("{} of them", instance.in_flight)));
    }
    Ok(Some(flags & KEPT))
}

/// Can an instance be had again of which the kernel tells little?
fn experiment(view: &View<'_>, told: &Told) -> Result<(), Problem> {
    let refuse = |what: &str| Err(refusal(view, what));
    match ring::manner(view.as_fd(), told.napi) {
        Manner::Plain => {}
        Manner::Disabled => {
            return refuse("that are disabled still (IORING_SETUP_R_DISABLED) cannot be saved");
        }
        Manner::Deferred => {
            return refuse(
                "whose completions wait for their task (IORING_SETUP_DEFER_TASKRUN) cannot be saved",
            );
        }
        Manner::SingleIssuer => {
            return refuse("of one task alone (IORING_SETUP_SINGLE_ISSUER) cannot be saved");
        }
        Manner::Polled => {
            return refuse("that poll devices (IORING_SETUP_IOPOLL) cannot be saved");
        }
        Manner::Eventfd => {
            return refuse(
                "with an eventfd registered cannot be saved: the kernel does not tell us which it is",
            );
        }
        Manner::BufferRings => {
            return refuse("with rings of buffers (IORING_REGISTER_PBUF_RING) cannot be saved");
        }
    }
    if told.files != 0 {
        return refuse(
            "with registered files cannot be saved: the kernel does not tell us which they are",
        );
    }
    if told.buffers != 0 {
        return refuse(
            "with registered buffers cannot be saved: the kernel does not tell us which memory they are",
        );
    }
    if told.napi_enabled {
        return refuse("that poll network devices (IORING_REGISTER_NAPI) cannot be saved");
    }
    if told.taken != told.given || told.listed {
        let how = format!("{} taken, {} completions given", told.taken, told.given);
        return Err(in_flight(view, &how));
    }
    Ok(())
}

/// Reads the queues. `flags` is how it was made, where the kernel has told.
fn content(view: &View<'_>, told: &Told, flags: Option<u32>) -> Result<RewakeRingEntry, Problem> {
    let (sq, cq) = (told.sq_entries as usize, told.cq_entries as usize);
    let how = flags.unwrap_or(0);
    let own = |e: rewake_sys::SyscallError| {
        view.problem(format!("io_uring instances in the program's own memory (IORING_SETUP_NO_MMAP) cannot be saved ({e})"))
    };
    let array = ring::array_at(told.cq_entries, how);
    // An array of numbers follows the completions, where there is one.
    let rings = Memory::map(view.as_fd(), array + 4 * sq, 0).map_err(own)?;
    let size = sq * ring::sqe(how);
    let entries = Memory::map(view.as_fd(), size, ring::OFFSET_SQES).map_err(own)?;
    if rings.len() < array || entries.len() < size {
        return Err(view.problem("its rings are smaller than they must be"));
    }
    let has_array = match flags {
        Some(flags) => flags & ring::SETUP_NO_SQARRAY == 0,
        None => {
            if is_large(view, told, &rings) {
                return Err(view.problem(
                    "io_uring instances with large entries (IORING_SETUP_SQE128, CQE32) cannot be saved",
                ));
            }
            rings.len() >= array + 4 * sq
                && (sq == 1 || (0..sq).any(|i| rings.word(array + 4 * i) != 0))
        }
    };
    Ok(RewakeRingEntry {
        sq_entries: told.sq_entries,
        cq_entries: told.cq_entries,
        flags: view.flags,
        // One that was never used may have an array of zeros: what fills it later fills it in order.
        array: has_array.then(|| rings.bytes(array, 4 * sq)),
        position: told.taken,
        sq_tail: rings.word(ring::SQ_TAIL),
        cq_head: rings.word(ring::CQ_HEAD),
        completions: rings.bytes(ring::CQES, ring::cqe(how) * cq),
        submissions: entries.bytes(0, size),
        setup: flags,
        given: (told.given != told.taken).then_some(told.given),
        words: [ring::SQ_DROPPED, ring::CQ_FLAGS, ring::CQ_OVERFLOW]
            .map(|at| rings.word(at))
            .into(),
        ..RewakeRingEntry::default()
    })
}

/// Has an instance entries of twice the size? It shows if they need more pages, or by where the array is.
fn is_large(view: &View<'_>, told: &Told, rings: &Memory) -> bool {
    let (sq, cq) = (told.sq_entries as usize, told.cq_entries as usize);
    let map = |len: usize, offset: u64| Memory::map(view.as_fd(), len, offset);
    let pages = |len: usize| len.next_multiple_of(4096);
    let array = ring::array_at(told.cq_entries, 0);
    let wide = ring::CQES + 2 * ring::CQE * cq + 4 * sq;
    let at = wide - 4 * sq;
    let reaches = |memory: &Memory, len: usize| memory.len() >= pages(len);
    let in_order = |memory: &Memory, at: usize| {
        memory.len() >= at + 4 * sq && (0..sq).all(|i| memory.word(at + 4 * i) == i as u32)
    };
    let is_wide = map(wide, 0).is_ok_and(|m| {
        let elsewhere = || sq > 1 && in_order(&m, at) && !in_order(rings, array);
        reaches(&m, wide) && (pages(wide) > pages(array + 4 * sq) || elsewhere())
    });
    let long = 2 * sq * ring::SQE;
    let is_long = pages(long) > pages(sq * ring::SQE)
        && map(long, ring::OFFSET_SQES).is_ok_and(|m| reaches(&m, long));
    is_wide || is_long
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
        assert!(!told.napi_enabled && told.names.is_empty());
        let more = String::from_utf8_lossy(text)
            .replace("UserFiles:\t0\n", "UserFiles:\t2\n    0: /etc/a: b\n    1: <none>\n")
            .replace("NAPI:\tdisabled", "NAPI:\tdynamic");
        let told = parse(more.as_bytes()).unwrap();
        assert!(told.napi_enabled && !told.listed);
        assert_eq!(told.names, [(0, "/etc/a: b".to_owned()), (1, "<none>".to_owned())]);
        let busy = String::from_utf8_lossy(text)
            .replace("PollList:\n", "PollList:\n  op=6, task_works=0\n");
        assert!(parse(busy.as_bytes()).unwrap().listed);
        assert!(parse(b"pos:\t0\n").is_none());
    }
}
