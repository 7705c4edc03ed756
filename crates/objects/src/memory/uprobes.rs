//! Probes of user space (uprobes; Documentation/trace/uprobetracer.rst), as perf(1), bpftrace and other observers set them from
//! outside: the kernel writes a breakpoint into the code of each process that maps the probed file, and gives the process a page
//! of its own to step over it. Neither is the program's.
//!
//! Images hold the program as it is without them. A probe that is still there at the restore is set anew by the kernel, in
//! the moment in which the file is mapped; one that is not would end the program at its breakpoint.

use super::PAGE;
use super::pages::Run;
use super::vma::{Vma, status};
use crate::Problem;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// `int3`.
const BREAKPOINT: u8 = 0xcc;
/// `call`, with a distance of 32 bits.
const CALL: u8 = 0xe8;
/// Nothing in five bytes: for it the kernel puts a call of its own page (`[uprobes-trampoline]`, since Linux 6.18).
const NOTHING: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Is this a page that the kernel has put into a process for its probes? It is not saved.
#[must_use]
pub fn is_kernels(vma: &Vma) -> bool {
    vma.entry.status & status::UPROBES != 0
}

fn ranges(vmas: &[Vma]) -> impl Iterator<Item = Range<u64>> + Clone {
    vmas.iter().filter(|vma| is_kernels(vma)).map(|vma| vma.entry.start..vma.entry.end)
}

/// Takes out of `runs`, ascending, the pages of code that differ from their file by nothing but breakpoints: they come back from the
/// file. `memory` is `/proc/PID/mem`, `open` opens the file of a mapping.
///
/// # Errors
/// Memory or a file cannot be read.
pub fn leave_out(
    vmas: &[Vma],
    runs: &mut Vec<Run>,
    memory: &File,
    open: impl Fn(&Vma) -> io::Result<File>,
) -> io::Result<()> {
    let calls: Vec<Range<u64>> = ranges(vmas).collect();
    let mut out = Vec::new();
    for vma in vmas.iter().filter(|vma| vma.patched) {
        let (start, end) = (vma.entry.start, vma.entry.end);
        let first = runs.partition_point(|run| run.end <= start);
        let mut file = None;
        for run in runs[first..].iter().take_while(|run| run.start < end) {
            let file = match &mut file {
                Some(file) => file,
                None => file.insert(open(vma)?),
            };
            for at in (run.start.max(start)..run.end.min(end)).step_by(PAGE as usize) {
                let (mut here, mut there) = ([0; PAGE as usize], [0; PAGE as usize]);
                memory.read_exact_at(&mut here, at)?;
                read_up_to(file, &mut there, vma.entry.pgoff + (at - start))?;
                if is_probed_only(&here, &there, at, &calls) {
                    out.push(at);
                }
            }
        }
    }
    if !out.is_empty() {
        *runs = without(runs, &out);
    }
    Ok(())
}

/// Reads a page of a file; behind its end there are zeros.
fn read_up_to(file: &File, page: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < page.len() {
        match file.read_at(&mut page[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Does a page of code differ from that of its file by nothing but probes? `calls` are the pages that these may call.
fn is_probed_only(page: &[u8], file: &[u8], address: u64, calls: &[Range<u64>]) -> bool {
    let mut at = 0;
    while let Some(next) = page[at..].iter().zip(&file[at..]).position(|(a, b)| a != b) {
        at += next;
        // While it makes a call the kernel has a breakpoint in the place of its first byte.
        let called = || {
            let bytes =
                *page[at..].first_chunk::<5>().filter(|_| file[at..].starts_with(&NOTHING))?;
            let [CALL | BREAKPOINT, a, b, c, d] = bytes else { return None };
            let distance = i32::from_le_bytes([a, b, c, d]);
            let to = (address + at as u64 + 5).wrapping_add_signed(distance.into());
            calls.iter().any(|range| range.contains(&to)).then_some(bytes.len())
        };
        at += match (called(), page[at]) {
            (Some(len), _) => len,
            (None, BREAKPOINT) => 1,
            _ => return false,
        };
    }
    true
}

/// `runs` without the pages `out`, both ascending.
fn without(runs: &[Run], out: &[u64]) -> Vec<Run> {
    let mut left = Vec::with_capacity(runs.len() + out.len());
    let mut out = out.iter().copied().peekable();
    for run in runs {
        let mut start = run.start;
        while let Some(page) = out.next_if(|page| *page < run.end) {
            if start < page {
                left.push(Run { start, end: page, ..*run });
            }
            start = page + PAGE;
        }
        if start < run.end {
            left.push(Run { start, ..*run });
        }
    }
    left
}

/// Where a thread is: its number, instruction and stack pointers.
#[derive(Debug, Clone, Copy)]
pub struct Thread {
    /// Thread id.
    pub tid: i32,
    /// Instruction pointer.
    pub ip: u64,
    /// Stack pointer.
    pub sp: u64,
}

/// What a thread is about to do in the kernel's pages, so that it cannot be saved now.
#[derive(Debug)]
pub enum Busy {
    /// It is in one of them, which it leaves again in a moment.
    Inside(i32),
    /// It has called a function whose return is probed: it returns to such a page, and only the kernel knows where from there.
    Returns(Problem),
}

/// Looks whether threads need the kernel's pages.
///
/// # Errors
/// Memory cannot be read.
pub fn busy(
    vmas: &[Vma],
    runs: &[Run],
    memory: &File,
    threads: &[Thread],
) -> io::Result<Option<Busy>> {
    let ours = ranges(vmas);
    if ours.clone().next().is_none() {
        return Ok(None);
    }
    let is_in = |address: u64| ours.clone().any(|range| range.contains(&address));
    let mut bytes = Vec::new();
    for Thread { tid, ip, sp } in threads.iter().copied() {
        if is_in(ip) {
            return Ok(Some(Busy::Inside(tid)));
        }
        // The red zone is the thread's, too, but no return address is there.
        let Some(stack) = vmas.iter().find(|v| (v.entry.start..v.entry.end).contains(&sp)) else {
            continue;
        };
        let first = runs.partition_point(|run| run.end <= sp);
        for run in runs[first..].iter().take_while(|run| run.start < stack.entry.end) {
            let start = run.start.max(sp.next_multiple_of(8));
            let end = run.end.min(stack.entry.end);
            bytes.resize(end.saturating_sub(start) as usize, 0);
            memory.read_exact_at(&mut bytes, start)?;
            let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
            if words.into_iter().any(is_in) {
                let what = "the return of a function that it is in is probed (uprobes): only the kernel knows where it returns to";
                let problem = Problem::new(format!("thread {tid}"), what);
                let remedy = "detach whoever probes it (perf, bpftrace or another observer) for the time of the dump";
                return Ok(Some(Busy::Returns(problem.remedy(remedy))));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAMPOLINE: Range<u64> = 0x7000..0x8000;

    fn only(page: &[u8], file: &[u8]) -> bool {
        is_probed_only(page, file, 0x1000, &[TRAMPOLINE])
    }

    #[test]
    fn breakpoints_are_told_from_other_changes() {
        let file = [0x55, 0x48, 0x89, 0xe5, 0xcc, 0x0f, 0x1f, 0x44, 0x00, 0x00, 0xc3];
        assert!(only(&file, &file));
        let with = |changes: &[(usize, u8)]| {
            let mut page = file;
            changes.iter().for_each(|(at, byte)| page[*at] = *byte);
            only(&page, &file)
        };
        assert!(with(&[(0, 0xcc)]) && with(&[(0, 0xcc), (5, 0xcc), (10, 0xcc)]));
        assert!(!with(&[(0, 0xcc), (3, 0xe4)]) && !with(&[(4, 0x90)]));
        // To 0x7010, from behind 0x100a.
        let [a, b, c, d] = (0x7010i32 - 0x100a).to_le_bytes();
        let call = |first| with(&[(5, first), (6, a), (7, b), (8, c), (9, d)]);
        assert!(call(0xe8) && call(0xcc) && !call(0xe9));
        assert!(!with(&[(5, 0xe8), (6, a), (7, b), (8, c), (9, 1)]), "a call of something else");
    }

    #[test]
    fn pages_are_taken_out_of_runs() {
        let run = |start, end| Run { start, end, lazy: false, readable: true, parent: false };
        let runs = [run(0x1000, 0x4000), run(0x5000, 0x6000), run(0x8000, 0xa000)];
        let left = without(&runs, &[0x2000, 0x5000, 0x8000, 0x9000]);
        assert_eq!(left, [run(0x1000, 0x2000), run(0x3000, 0x4000)]);
        assert_eq!(without(&runs, &[]), runs);
    }
}
