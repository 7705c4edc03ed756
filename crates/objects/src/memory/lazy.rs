//! Memory that comes only when it is touched: which pages may, and having a task wait for them (userfaultfd(2)).

use super::{PAGE, vma};
use crate::memory::vma::status;
use crate::steps::{Label, Steps};
use rewake_agent::layout::{FLAG_STORE, Op};
use rewake_image::messages::{MmEntry, VmaEntry};
use rewake_image::{StoredPages, StoredRun};
use rewake_sys::userfaultfd::{REQUEST_API, REQUEST_REGISTER, event};
use std::ops::Range;

/// What the pager must be told of: `UFFD_FEATURE_EVENT_…`. They need `CAP_SYS_PTRACE`.
pub const FEATURES: u64 = event::FORK | event::REMAP | event::REMOVE | event::UNMAP;

/// May pages of this mapping come later?
#[must_use]
pub fn is_eligible(entry: &VmaEntry) -> bool {
    let plain = status::ANON_PRIVATE | status::REGULAR;
    let shape = status::HEAP | status::STACK;
    let never = (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32;
    entry.status & !shape == plain && vma::has_private_pages(entry) && entry.flags & never == 0
}

/// Divides the pages of an address space into those that are filled at once and those that come later; the pages at the
/// addresses `soon` do not wait.
#[must_use]
pub fn divide(mm: &MmEntry, pages: &StoredPages, soon: &[u64]) -> (StoredPages, StoredPages) {
    let mut soon: Vec<u64> = soon.iter().map(|address| address & !(PAGE - 1)).collect();
    soon.sort_unstable();
    soon.dedup();
    let mut vmas = mm.vmas.iter().filter(|v| vma::has_private_pages(v)).peekable();
    let (mut now, mut later) = (Vec::new(), Vec::new());
    for run in &pages.runs {
        let mut at = run.vaddr;
        while at < run.end() {
            while vmas.peek().is_some_and(|v| v.end <= at) {
                vmas.next();
            }
            let inside = vmas.peek().filter(|v| v.start <= at);
            let mut end = run.end().min(inside.map_or(run.end(), |v| v.end));
            let mut waits = run.lazy && inside.is_some_and(|v| is_eligible(v));
            let next = soon.partition_point(|page| *page < at);
            match soon.get(next) {
                Some(page) if waits && *page == at => {
                    (waits, end) = (false, at + PAGE);
                }
                Some(page) if waits && *page < end => end = *page,
                _ => {}
            }
            let part = StoredRun {
                vaddr: at,
                nr_pages: (end - at) / PAGE,
                offset: run.offset + (at - run.vaddr),
                ..*run
            };
            if waits {
                later.push(part)
            } else {
                now.push(part)
            }
            at = end;
        }
    }
    (StoredPages { runs: now }, StoredPages { runs: later })
}

/// The mappings that some of `pages` belong to: these have to be registered.
#[must_use]
pub fn mappings(mm: &MmEntry, pages: &StoredPages) -> Vec<Range<u64>> {
    let mut runs = pages.runs.iter().peekable();
    let mut found = Vec::new();
    for vma in mm.vmas.iter().filter(|v| is_eligible(v)) {
        while runs.peek().is_some_and(|r| r.end() <= vma.start) {
            runs.next();
        }
        if runs.peek().is_some_and(|r| r.vaddr < vma.end) {
            found.push(vma.start..vma.end);
        }
    }
    found
}

/// Bytes of a control message with one descriptor: its header, the number, padding.
const CONTROL: usize = 24;
/// Where in it the number is.
const NUMBER: usize = 16;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;

/// Has a task make a userfaultfd for `mappings`, and send it through its socket: it keeps none.
pub fn register(steps: &mut Steps, mappings: &[Range<u64>], socket: i32) {
    let label = Label::Text("having memory wait for its content (userfaultfd)");
    let mut header = [0; CONTROL];
    header[..8].copy_from_slice(&(NUMBER as u64 + 4).to_ne_bytes());
    header[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    header[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    let control = steps.data(&header);
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let mut make = Op::new(libc::SYS_userfaultfd, &[flags]);
    make.flags |= FLAG_STORE;
    make.args[5] = control.address + NUMBER as u64;
    let uffd = steps.must(label, make) as u32;
    let request = |steps: &mut Steps, label, request: usize, argument: &[u64]| {
        let argument = steps.words(argument);
        let args = [0, request as u64, argument.address];
        steps.must(label, Op::new(libc::SYS_ioctl, &args).arg_result(0, uffd, 0));
    };
    request(steps, label, REQUEST_API, &[API, FEATURES, 0]);
    for range in mappings {
        let label = Label::Vma(range.start, range.end);
        let argument = [range.start, range.end - range.start, MISSING, 0];
        request(steps, label, REQUEST_REGISTER, &argument);
    }
    let byte = steps.data(b"!");
    let piece = steps.words(&[byte.address, 1]);
    let message = steps.words(&[0, 0, piece.address, 1, control.address, CONTROL as u64, 0]);
    let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
    let send = Op::new(libc::SYS_sendmsg, &[socket as u64, message.address, flags]);
    steps.must_be(label, 1, send);
    steps.must(label, Op::new(libc::SYS_close, &[0]).arg_result(0, uffd, 0));
}

/// `UFFD_API`.
const API: u64 = 0xaa;

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_image::PageStore;

    fn vma(start: u64, end: u64, flags: i32) -> VmaEntry {
        VmaEntry {
            start: start * PAGE,
            end: end * PAGE,
            flags: (flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: status::ANON_PRIVATE | status::REGULAR,
            ..VmaEntry::default()
        }
    }

    fn run(page: u64, nr_pages: u64, offset: u64, lazy: bool) -> StoredRun {
        let store = PageStore { depth: 0, pages_id: 1 };
        StoredRun { vaddr: page * PAGE, nr_pages, store, offset: offset * PAGE, lazy }
    }

    #[test]
    fn pages_are_divided_at_mappings_and_single_pages() {
        let vmas = vec![vma(10, 20, 0), vma(20, 25, libc::MAP_LOCKED), vma(30, 40, 0)];
        let mm = MmEntry { vmas, ..MmEntry::default() };
        let runs = vec![run(12, 13, 0, true), run(30, 2, 100, false), run(35, 5, 200, true)];
        let pages = StoredPages { runs };
        let (now, later) = divide(&mm, &pages, &[15 * PAGE + 8, 15 * PAGE, 22 * PAGE, 35 * PAGE]);
        let later_wanted = [run(12, 3, 0, true), run(16, 4, 4, true), run(36, 4, 201, true)];
        assert_eq!(later.runs, later_wanted);
        let now_wanted = [
            run(15, 1, 3, true),
            run(20, 5, 8, true),
            run(30, 2, 100, false),
            run(35, 1, 200, true),
        ];
        assert_eq!(now.runs, now_wanted);
        assert_eq!(mappings(&mm, &later), [10 * PAGE..20 * PAGE, 30 * PAGE..40 * PAGE]);
    }

    #[test]
    fn a_task_keeps_no_descriptor() {
        let mut steps = Steps::new(0x1000);
        register(&mut steps, &[0..PAGE, 2 * PAGE..3 * PAGE], 5);
        let calls: Vec<i64> = steps.script.ops.iter().map(|op| i64::from(op.nr)).collect();
        let ioctl = libc::SYS_ioctl;
        let wanted =
            [libc::SYS_userfaultfd, ioctl, ioctl, ioctl, libc::SYS_sendmsg, libc::SYS_close];
        assert_eq!(calls, wanted);
    }
}
