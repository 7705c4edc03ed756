//! Contexts of asynchronous I/O: io_setup(2), linux/aio_abi.h.
//!
//! A context is known by the address of its ring, which mremap(2) may change. The kernel keeps a tail of its own, which a new
//! context can only be brought to by requests; what they leave in the ring is then overwritten.

use super::vma::status;
use super::{PAGE, TASK_SIZE};
use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{AioRingEntry, MmEntry, VmaEntry};
use rewake_image::{PageStore, StoredPages};
use rewake_inject::ring::{Data, Results, Script};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The head of a ring, as the kernel shows it to the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Events the ring has room for.
    pub room: u32,
    /// The next event to be taken.
    pub head: u32,
    /// Where the kernel puts the next one.
    pub tail: u32,
}

/// Bytes of `struct aio_ring` before its events, and bytes of an event.
const HEADER: usize = 32;
const EVENT: u64 = 32;
/// `AIO_RING_MAGIC`.
const MAGIC: u32 = 0xa10a_10a1;

impl Header {
    /// Reads one.
    fn parse(bytes: &[u8; HEADER]) -> Option<Header> {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let header = Header { room: word(4), head: word(8), tail: word(12) };
        let sound = header.head < header.room && header.tail < header.room;
        (word(16) == MAGIC && sound).then_some(header)
    }

    /// Events that wait to be taken.
    fn waiting(self) -> u32 {
        match self.tail.checked_sub(self.head) {
            Some(waiting) => waiting,
            None => self.room - self.head + self.tail,
        }
    }
}

/// A context of a living task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// Its address, and its id.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What it looked like.
    pub header: Header,
}

fn object(address: u64) -> String {
    format!("asynchronous I/O context {address:#x}")
}

/// Surveys the context behind a mapping; `memory` is `/proc/PID/mem`.
///
/// # Errors
/// What is there is no ring.
pub fn survey(vma: &VmaEntry, memory: &File) -> Result<Ring, Problem> {
    let (address, len) = (vma.start, vma.end - vma.start);
    let mut bytes = [0; HEADER];
    memory
        .read_exact_at(&mut bytes, address)
        .map_err(|e| Problem::new(object(address), format!("its ring cannot be read: {e}")))?;
    match Header::parse(&bytes) {
        Some(header) if fits(header.room, len) => Ok(Ring { address, len, header }),
        _ => Err(Problem::new(object(address), "the program has overwritten the head of its ring")),
    }
}

/// Has a ring of `len` bytes room for so many events, and no more?
fn fits(room: u32, len: u64) -> bool {
    len >= HEADER as u64 && u64::from(room) == (len - HEADER as u64) / EVENT
}

impl Ring {
    /// The image's entry.
    #[must_use]
    pub fn entry(&self) -> AioRingEntry {
        AioRingEntry { id: self.address, nr_req: requests(self.len), ring_len: self.len as u32 }
    }

    /// Have requests ended since it was looked at? `memory` is `/proc/PID/mem`. Looks anew.
    pub fn has_moved(&mut self, memory: &File) -> bool {
        let mut bytes = [0; HEADER];
        match memory.read_exact_at(&mut bytes, self.address).map(|()| Header::parse(&bytes)) {
            Ok(Some(now)) => std::mem::replace(&mut self.header, now).tail != now.tail,
            _ => true,
        }
    }

    /// The problem of one whose requests are still in flight.
    #[must_use]
    pub fn busy(&self) -> Problem {
        Problem::new(object(self.address), "requests of it were in flight all the time")
            .remedy("try again when it does less, or with a longer --timeout")
    }
}

/// Asks a task whether these are its own: after a fork(2) the child has the parent's mapping, and no context. Returns where
/// the answers are.
pub fn ask(script: &mut Script, rings: &[Ring]) -> std::ops::Range<usize> {
    let first = script.ops.len();
    for ring in rings {
        // Not one event, and no waiting.
        script.push(Op::new(libc::SYS_io_getevents, &[ring.address, 0, 0, 0, 0]));
    }
    first..script.ops.len()
}

/// Reads the answers: those that are none of the task's.
pub fn read(results: &Results, asked: std::ops::Range<usize>, rings: &[Ring]) -> Vec<Problem> {
    let foreign = asked.zip(rings).filter(|(at, _)| results.value(*at).is_err());
    foreign
        .map(|(_, ring)| {
            Problem::new(
                object(ring.address),
                "the ring is mapped, but the context is not this process's: it came from the parent with fork(2)",
            )
            .remedy("unmap it, or have the parent set MADV_DONTFORK on it")
        })
        .collect()
}

/// What to ask io_setup(2) for to get a ring of `len` bytes: it doubles the number and adds two.
fn requests(len: u64) -> u32 {
    let room = (len.saturating_sub(HEADER as u64) / EVENT) as u32;
    (room.saturating_sub(2) / 2).max(1)
}

/// A context of the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Its address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What to ask io_setup(2) for.
    pub requests: u32,
    /// What the ring looked like.
    pub header: Header,
    /// Which pages file has the ring.
    pub store: PageStore,
    /// And where, in bytes.
    pub offset: u64,
}

/// Finds the contexts of a task in its images; `read` gives bytes of a pages file.
///
/// # Errors
/// The images do not agree with themselves.
pub fn find(
    mm: &MmEntry,
    pages: Option<&StoredPages>,
    read: impl Fn(PageStore, &mut [u8], u64) -> io::Result<()>,
) -> Result<Vec<Saved>, Problem> {
    let rings = mm.vmas.iter().filter(|v| v.status & status::AIORING != 0);
    rings
        .map(|vma| {
            let (address, len) = (vma.start, vma.end.saturating_sub(vma.start));
            let bad =
                |reason: &str| Problem::new(format!("{} of the image", object(address)), reason);
            let entry = mm.aios.iter().find(|e| e.id == address);
            let entry = entry.ok_or_else(|| bad("nothing says how large it was"))?;
            if u64::from(entry.ring_len) != len || len % PAGE != 0 || vma.end > TASK_SIZE {
                return Err(bad("its size is not that of its mapping"));
            }
            let runs = pages.map_or(&[][..], |pages| pages.runs.as_slice());
            let run = runs.iter().find(|run| run.vaddr <= address && run.end() >= vma.end);
            let run = run.ok_or_else(|| bad("its ring is not among the pages"))?;
            let offset = run.offset + (address - run.vaddr);
            let mut bytes = [0; HEADER];
            read(run.store, &mut bytes, offset)
                .map_err(|e| bad(&format!("its ring cannot be read: {e}")))?;
            let header = Header::parse(&bytes).filter(|header| fits(header.room, len));
            let header = header.ok_or_else(|| bad("its ring has no sound head"))?;
            let (requests, store) = (entry.nr_req, run.store);
            Ok(Saved { address, len, requests, header, store, offset })
        })
        .collect()
}

/// Requests that are made at once while a tail is brought to its place: the kernel gives them out in portions, one for each
/// CPU, so few are certain to be had.
const AT_ONCE: u32 = 32;

/// Makes the contexts anew, at their addresses, with what waits in them. Call it before anything else is mapped: the kernel
/// chooses where a ring is first. `pages` tells the descriptor of a pages file.
///
/// # Errors
/// There is no such descriptor.
pub fn restore(
    steps: &mut Steps,
    rings: &[Saved],
    pages: &dyn Fn(PageStore) -> Option<i32>,
) -> Result<(), Problem> {
    for ring in rings {
        let fd = pages(ring.store)
            .ok_or_else(|| Problem::new(object(ring.address), "its pages file is not at hand"))?;
        make(steps, ring);
        let requests = Requests::new(steps, fd);
        let waiting = ring.header.waiting();
        // What was taken already is taken again; what waits stays, and counts as such for the kernel.
        let most = (ring.header.room / 8).clamp(1, AT_ONCE);
        let mut at = 0;
        while at < ring.header.tail {
            let kept = waiting.min(ring.header.room / 2).min(ring.header.tail);
            let taken = ring.header.tail - kept;
            let count =
                if at < taken { most.min(taken - at) } else { most.min(ring.header.tail - at) };
            requests.submit(steps, ring, count);
            if at < taken {
                requests.take(steps, ring, count);
            }
            at += count;
        }
        // The context's number and the ring's size, its first two words, are the kernel's.
        const KERNELS: u64 = 8;
        let iov = steps.words(&[ring.address + KERNELS, ring.len - KERNELS]);
        let args = [fd as u64, iov.address, 1, ring.offset + KERNELS, 0];
        let read = Op::new(libc::SYS_preadv, &args);
        steps.must_be(Label::Aio(ring.address), (ring.len - KERNELS) as i64, read);
    }
    Ok(())
}

fn make(steps: &mut Steps, ring: &Saved) {
    const MREMAP_FIXED_MAYMOVE: u64 = 3;
    let label = Label::Aio(ring.address);
    let (address, len) = (ring.address, ring.len);
    // So that the kernel puts it elsewhere: a mapping cannot be moved onto itself.
    let nothing = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let reserve = Op::new(libc::SYS_mmap, &[address, len, 0, nothing, u64::MAX, 0]);
    steps.must_be(label, address as i64, reserve);
    let id = steps.words(&[0]);
    steps.must(label, Op::new(libc::SYS_io_setup, &[u64::from(ring.requests), id.address]));
    let args = [0, len, len, MREMAP_FIXED_MAYMOVE, address];
    let place = Op::new(libc::SYS_mremap, &args).first_from(id.address);
    steps.must_be(label, address as i64, place);
}

/// Requests that end at once: reads of no bytes.
struct Requests {
    /// Addresses of the request, so many times.
    list: Data,
    /// For the events.
    events: Data,
}

impl Requests {
    fn new(steps: &mut Steps, fd: i32) -> Requests {
        // struct iocb: data; key, flags; opcode (IOCB_CMD_PREAD), priority, descriptor; buffer; bytes; offset; reserved; flags
        let request = steps.words(&[0, 0, u64::from(fd as u32) << 32, 0, 0, 0, 0, 0]);
        let list = steps.words(&[request.address; AT_ONCE as usize]);
        Requests { list, events: steps.script.space(AT_ONCE as usize * EVENT as usize) }
    }

    fn submit(&self, steps: &mut Steps, ring: &Saved, count: u32) {
        let args = [ring.address, u64::from(count), self.list.address];
        let submit = Op::new(libc::SYS_io_submit, &args);
        steps.must_be(Label::Aio(ring.address), i64::from(count), submit);
    }

    fn take(&self, steps: &mut Steps, ring: &Saved, count: u32) {
        let number = u64::from(count);
        let args = [ring.address, number, number, self.events.address, 0];
        let take = Op::new(libc::SYS_io_getevents, &args);
        steps.must_be(Label::Aio(ring.address), i64::from(count), take);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: [u32; 8]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn heads_are_looked_at_closely() {
        let header = Header::parse(&bytes([0, 127, 3, 1, MAGIC, 1, 0, 32]));
        assert_eq!(header, Some(Header { room: 127, head: 3, tail: 1 }));
        assert_eq!(header.map(Header::waiting), Some(125));
        assert_eq!(Header::parse(&bytes([0, 127, 3, 127, MAGIC, 1, 0, 32])), None);
        assert_eq!(Header::parse(&bytes([0, 127, 3, 1, 1, 1, 0, 32])), None);
    }

    #[test]
    fn so_many_requests_give_such_a_ring() {
        for pages in 1..100u64 {
            let len = pages * PAGE;
            let room = (len - HEADER as u64) / EVENT;
            assert!(fits(room as u32, len));
            // io_setup(2) doubles what it is asked for, adds two events and rounds up to pages.
            let asked = u64::from(requests(len)) * 2 + 2;
            let gets = (HEADER as u64 + asked * EVENT).div_ceil(PAGE);
            assert_eq!(gets, pages);
        }
    }
}
