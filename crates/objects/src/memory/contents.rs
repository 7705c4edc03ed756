//! Contents of memory that is a file to the kernel: `pagemap-shmem-N.img`.
//!
//! Who has written to such memory nothing tells: it may have been a process that is gone, write(2), a mapping made since. So
//! where there are parent images, each page is compared with what these hold, byte by byte, and left to them if it is the
//! same. It does not matter then whether they are of the same segment, or were copied while it was written to.

use super::PAGE;
use crate::Problem;
use rewake_image::{
    ImageDir, ImageWriter, PageRun, PageSource, PageStore, StorePage, StoredPages, StoredRun,
    together,
};
use rustix::fd::BorrowedFd;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a worker compares at a time, unless pages are larger.
const PIECE: u64 = 1 << 20;
/// Buffer for reading: large enough to make the calls few, small enough for the cache next to the processor.
const BUFFER: usize = 64 << 10;
/// What a worker's part must become smaller by, in bytes, to have several page stores for a source.
const WORTH: u64 = 32 << 20;
/// Page stores are no smaller than this where a source has several.
const SLICE: u64 = 16 << 20;
/// Page stores of the parents that a worker keeps open.
const OPEN: usize = 16;

/// Memory to be written.
#[derive(Debug)]
pub struct Source<'a> {
    /// What error texts call it.
    pub object: String,
    /// The memory as a file, of a description that is ours alone.
    pub file: BorrowedFd<'a>,
    /// Its size in bytes.
    pub size: u64,
    /// Number of its pagemap.
    pub shmid: u64,
    /// What mappings have beyond the size, in the last page; zeros where this ends.
    pub tail: &'a [u8],
    /// Its page size, if it is a file of hugetlbfs: that tells no holes, and pages of zeros are taken for such.
    pub huge: Option<u64>,
}

/// Where and how to write.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The images.
    pub images: &'a ImageWriter,
    /// Those that pages may be left to.
    pub parent: Option<&'a ImageDir>,
    /// The first page store that may be made; each source may have one.
    pub pages_id: u32,
    /// If a large source may have several page stores, which only we can read: the number of the first of those.
    pub further: Option<u32>,
    /// So many threads.
    pub workers: usize,
    /// Somebody may write to the memory meanwhile, or cut it off: what is gone is written as zeros.
    pub runs: bool,
}

/// Pages written and looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages of the segments.
    pub scanned: u64,
    /// Pages left to the parent.
    pub skipped: u64,
    /// Pages with data that were written.
    pub written: u64,
    /// Page stores from [`Target::further`] on: only we can read them.
    pub further: u32,
}

/// Gives each segment a number of its own for its pagemap: those of System V segments stay, `numbers` of others make way.
pub fn number_apart<'n>(sysv: &HashSet<u32>, numbers: impl Iterator<Item = &'n mut u32>) {
    let mut numbers: Vec<&mut u32> = numbers.collect();
    let mut taken: HashSet<u32> = numbers.iter().map(|n| **n).chain(sysv.iter().copied()).collect();
    let mut given = sysv.clone();
    let mut free = (1..u32::MAX).rev();
    for number in &mut numbers {
        if !given.insert(**number)
            && let Some(other) = free.find(|n| taken.insert(*n))
        {
            **number = other;
            given.insert(other);
        }
    }
}

/// Writes the pages that hold data and are not in the parent, and where all are. Holes are left out, also those where the parent
/// has data: what the youngest pagemap does not name is zeros.
///
/// # Errors
/// Reading the memory or the parent, or writing the images fails.
pub fn write(sources: &[Source<'_>], target: &Target<'_>) -> Result<Written, Problem> {
    let begin = |source| Segment::survey(source, target);
    let segments = sources.iter().map(begin).collect::<Result<Vec<_>, _>>()?;
    let runs = compare(&segments, target)?;
    let (maps, mut parts) = divide(&runs, target);
    // What takes long comes first, so that nobody is left with it in the end.
    parts.sort_by_key(|part| std::cmp::Reverse(part.bytes()));
    each(parts.len(), target.workers, |n, buffers| {
        let part = &parts[n];
        segments[part.segment].store(part, target, &mut buffers.own)
    })?;
    for ((segment, map), pages_id) in segments.iter().zip(&maps).zip(target.pages_id..) {
        let (source, images) = (segment.source, target.images);
        images
            .write_pagemap_shmem(source.shmid, pages_id, map)
            .map_err(|e| Problem::new(&*source.object, e.to_string()))?;
    }
    let mut all = Written::default();
    for (segment, runs) in segments.iter().zip(&runs) {
        let named: u64 = runs.iter().map(|run| run.nr_pages).sum();
        let written = stored(runs);
        all.scanned += segment.source.size.div_ceil(PAGE);
        all.written += written;
        all.skipped += named - written;
    }
    all.further = (parts.len() - maps.iter().filter(|map| !map.is_empty()).count()) as u32;
    Ok(all)
}

/// How many pages are not left to the parent.
fn stored(runs: &[PageRun]) -> u64 {
    runs.iter().filter(|run| run.source.is_stored()).map(|run| run.nr_pages).sum()
}

/// A page store that is to be written.
struct Part {
    segment: usize,
    /// Number of the page store.
    pages_id: u32,
    /// What it holds: from, to.
    ranges: Vec<(u64, u64)>,
}

impl Part {
    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(from, to)| to - from).sum()
    }
}

/// Plans the page stores of segments, and makes pagemaps of their runs.
fn divide(runs: &[Vec<PageRun>], target: &Target<'_>) -> (Vec<Vec<PageRun>>, Vec<Part>) {
    let bytes: Vec<u64> = runs.iter().map(|runs| stored(runs) * PAGE).collect();
    let (total, most) = (bytes.iter().sum::<u64>(), bytes.iter().max().copied().unwrap_or(0));
    let workers = target.workers.max(1) as u64;
    let pays = target.further.is_some() && most >= (total / workers).saturating_add(WORTH);
    // Smaller than each worker's part: who is done early takes another one.
    let slice =
        if pays { total.div_ceil(2 * workers).next_multiple_of(PAGE).max(SLICE) } else { u64::MAX };
    let mut further = target.further.unwrap_or(0)..;
    let mut parts = Vec::with_capacity(runs.len());
    let divide = |(segment, (runs, pages_id)): (usize, (&Vec<PageRun>, u32))| {
        let mut map = Vec::with_capacity(runs.len());
        let mut part = Part { segment, pages_id, ranges: Vec::new() };
        let mut filled = 0;
        for run in runs {
            let mut at = run.vaddr;
            while at < run.end() {
                let mut end = run.end();
                if run.source.is_stored() {
                    if filled == slice
                        && let Some(pages_id) = further.next()
                    {
                        let next = Part { segment, pages_id, ranges: Vec::new() };
                        parts.push(std::mem::replace(&mut part, next));
                        filled = 0;
                    }
                    end = at + (end - at).min(slice - filled);
                    part.ranges.push((at, end));
                }
                let named = run.source.is_stored() && part.pages_id != pages_id;
                let store = StorePage { store: part.pages_id, page: filled / PAGE };
                let (nr_pages, place) = ((end - at) / PAGE, named.then_some(store));
                map.push(PageRun { vaddr: at, nr_pages, source: run.source, place });
                if run.source.is_stored() {
                    filled += end - at;
                }
                at = end;
            }
        }
        // One that is empty belongs to pages of the parent.
        if !map.is_empty() {
            parts.push(part);
        }
        map
    };
    let maps = runs.iter().zip(target.pages_id..).enumerate().map(divide).collect();
    (maps, parts)
}

/// What a worker reads into.
struct Buffers {
    own: Vec<u8>,
    parents: Vec<u8>,
    /// Page stores of the parents.
    files: HashMap<PageStore, File>,
}

/// Does `job` for each number below `count`, by so many threads.
fn each(
    count: usize,
    workers: usize,
    job: impl Fn(usize, &mut Buffers) -> Result<(), Problem> + Sync,
) -> Result<(), Problem> {
    let next = AtomicUsize::new(0);
    together(workers.min(count), || {
        let (own, parents) = (vec![0; BUFFER], vec![0; BUFFER]);
        let mut buffers = Buffers { own, parents, files: HashMap::new() };
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return Ok(());
            }
            job(at, &mut buffers)?;
        }
    })
}

/// A source, where it has data, and what the parents have of it.
struct Segment<'a> {
    source: &'a Source<'a>,
    /// From, to, in whole pages, ascending.
    data: Vec<(u64, u64)>,
    known: StoredPages,
}

/// Finds the pages of all segments that are to be in their pagemaps.
fn compare(segments: &[Segment<'_>], target: &Target<'_>) -> Result<Vec<Vec<PageRun>>, Problem> {
    let mut runs = vec![Vec::new(); segments.len()];
    let mut pieces = Vec::new();
    for (at, segment) in segments.iter().enumerate() {
        if segment.known.runs.is_empty() && segment.source.huge.is_none() {
            let all = segment.data.iter();
            all.for_each(|(from, to)| push(&mut runs[at], *from, *to, PageSource::Stored));
            continue;
        }
        let step = PIECE.max(segment.source.huge.unwrap_or(0));
        for &(from, to) in &segment.data {
            let mut from = from;
            while from < to {
                let end = (from / step + 1).saturating_mul(step).min(to);
                pieces.push((at, from, end));
                from = end;
            }
        }
    }
    let found = Mutex::new(Vec::with_capacity(pieces.len()));
    each(pieces.len(), target.workers, |n, buffers| {
        let (at, from, to) = pieces[n];
        let mut runs = Vec::new();
        segments[at].compare(from, to, target, buffers, &mut runs)?;
        found.lock().unwrap_or_else(PoisonError::into_inner).push((n, runs));
        Ok(())
    })?;
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_unstable_by_key(|(n, _)| *n);
    for (n, of_piece) in found {
        let runs = &mut runs[pieces[n].0];
        of_piece.iter().for_each(|run| push(runs, run.vaddr, run.end(), run.source));
    }
    Ok(runs)
}

/// Adds pages; neighbours with the same source are one run.
fn push(runs: &mut Vec<PageRun>, from: u64, to: u64, source: PageSource) {
    let nr_pages = (to - from) / PAGE;
    match runs.last_mut() {
        Some(last) if last.end() == from && last.source == source => last.nr_pages += nr_pages,
        _ => runs.push(PageRun { vaddr: from, nr_pages, source, place: None }),
    }
}

impl<'a> Segment<'a> {
    /// Finds where there is data.
    fn survey(source: &'a Source<'a>, target: &Target<'_>) -> Result<Segment<'a>, Problem> {
        let failed = |e: rustix::io::Errno| Problem::new(&*source.object, e.to_string());
        let known = match target.parent {
            Some(parent) => parent.stored_pages_shmem(source.shmid).map_err(of_parent(source))?,
            None => None,
        };
        let mut data: Vec<(u64, u64)> = Vec::new();
        let whole = source.size.next_multiple_of(PAGE);
        let mut at = 0;
        if source.huge.is_some() && whole > 0 {
            data.push((0, whole));
            at = whole;
        }
        while at < source.size {
            let start = match rustix::fs::seek(source.file, rustix::fs::SeekFrom::Data(at)) {
                Ok(start) if start < source.size => start,
                // Nothing but a hole is left.
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(failed(e)),
            };
            let end = match rustix::fs::seek(source.file, rustix::fs::SeekFrom::Hole(start)) {
                Ok(end) => end,
                // It has just been cut off.
                Err(rustix::io::Errno::NXIO) if target.runs => break,
                Err(e) => return Err(failed(e)),
            };
            let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(whole));
            match data.last_mut() {
                Some(before) if before.1 >= first => before.1 = last,
                _ => data.push((first, last)),
            }
            // A page at least, whatever another one does to the file.
            at = last.max(first + PAGE);
        }
        Ok(Segment { source, data, known: known.unwrap_or_default() })
    }

    /// Reads memory from `at` on.
    fn read(&self, at: u64, buffer: &mut [u8], target: &Target<'_>) -> Result<(), Problem> {
        let Source { file, size, tail, .. } = *self.source;
        let inside = (size.saturating_sub(at) as usize).min(buffer.len());
        let mut done = 0;
        while done < inside {
            match rustix::io::pread(file, &mut buffer[done..inside], at + done as u64) {
                Ok(0) if target.runs => break,
                Ok(0) => {
                    let text = "it was cut off while it was being saved";
                    return Err(Problem::new(&*self.source.object, text));
                }
                Ok(got) => done += got,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Problem::new(&*self.source.object, e.to_string())),
            }
        }
        buffer[done..].fill(0);
        let rest = &mut buffer[inside..];
        let known = rest.len().min(tail.len());
        rest[..known].copy_from_slice(&tail[..known]);
        Ok(())
    }

    /// Finds the pages from `from` to `to` that are to be in the pagemap.
    fn compare(
        &self,
        from: u64,
        to: u64,
        target: &Target<'_>,
        buffers: &mut Buffers,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Problem> {
        let Some(page) = self.source.huge else {
            return self.compare_data(from, to, target, buffers, runs);
        };
        let mut at = from;
        while at < to {
            let end = (at + page).min(to);
            if !self.is_zero(at, end, target, buffers)? {
                self.compare_data(at, end, target, buffers, runs)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Are there only zeros?
    fn is_zero(
        &self,
        from: u64,
        to: u64,
        target: &Target<'_>,
        buffers: &mut Buffers,
    ) -> Result<bool, Problem> {
        let mut at = from;
        while at < to {
            let part = ((to - at) as usize).min(BUFFER);
            self.read(at, &mut buffers.own[..part], target)?;
            if buffers.own[..part].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += part as u64;
        }
        Ok(true)
    }

    /// As [`Segment::compare`], where all is data.
    fn compare_data(
        &self,
        from: u64,
        to: u64,
        target: &Target<'_>,
        buffers: &mut Buffers,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Problem> {
        let known = &self.known.runs;
        let mut at = from;
        let mut next = known.partition_point(|run| end_of(run) <= from);
        while at < to {
            match known.get(next) {
                Some(run) if run.vaddr <= at => {
                    let end = end_of(run).min(to);
                    self.compare_run(run, (at, end), target, buffers, runs)?;
                    at = end;
                    next += 1;
                }
                other => {
                    let end = other.map_or(to, |run| run.vaddr.min(to));
                    push(runs, at, end, PageSource::Stored);
                    at = end;
                }
            }
        }
        Ok(())
    }

    /// The same of pages that a parent has.
    fn compare_run(
        &self,
        run: &StoredRun,
        (from, to): (u64, u64),
        target: &Target<'_>,
        buffers: &mut Buffers,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Problem> {
        let Some(parent) = target.parent else { return Ok(()) };
        let Buffers { own, parents, files } = buffers;
        if !files.contains_key(&run.store) {
            if files.len() == OPEN {
                files.clear();
            }
            let file = parent.open_store(run.store).map_err(of_parent(self.source))?;
            files.insert(run.store, file);
        }
        let file = &files[&run.store];
        let mut at = from;
        while at < to {
            let part = ((to - at) as usize).min(BUFFER);
            let (own, parents) = (&mut own[..part], &mut parents[..part]);
            self.read(at, own, target)?;
            file.read_exact_at(parents, run.offset + (at - run.vaddr)).map_err(|e| {
                let path = parent.store_path(run.store);
                let what = match e.kind() {
                    ErrorKind::UnexpectedEof => "it ends before a page that it should hold".into(),
                    _ => e.to_string(),
                };
                of_parent(self.source)(format!("{}: {what}", path.display()))
            })?;
            if own == parents {
                push(runs, at, at + part as u64, PageSource::Parent);
            } else {
                let pages = own.chunks(PAGE as usize).zip(parents.chunks(PAGE as usize));
                for ((own, theirs), at) in pages.zip((at..).step_by(PAGE as usize)) {
                    let same = own == theirs;
                    let source = if same { PageSource::Parent } else { PageSource::Stored };
                    push(runs, at, at + PAGE, source);
                }
            }
            at += part as u64;
        }
        Ok(())
    }

    /// Writes a page store.
    fn store(&self, part: &Part, target: &Target<'_>, buffer: &mut [u8]) -> Result<(), Problem> {
        let object = &*self.source.object;
        let failed = |e: Error| Problem::new(object, e.to_string());
        let begun = target.images.page_stream(part.pages_id);
        let mut pages = begun.map_err(|e| Problem::new(object, e.to_string()))?;
        for &(from, to) in &part.ranges {
            let mut at = from;
            while at < to {
                let len = ((to - at) as usize).min(BUFFER);
                self.read(at, &mut buffer[..len], target)?;
                pages.write_all(&buffer[..len]).map_err(failed)?;
                at += len as u64;
            }
        }
        pages.finish().map_err(failed)
    }
}

/// The end of a run, which images may have at the very end of the address space.
fn end_of(run: &StoredRun) -> u64 {
    run.vaddr.saturating_add(run.bytes())
}

/// What is wrong with the parent images, and what helps.
fn of_parent<E: std::fmt::Display>(source: &Source<'_>) -> impl Fn(E) -> Problem {
    let object = source.object.clone();
    move |e| {
        Problem::new(&*object, format!("it cannot be compared with the parent images: {e}"))
            .remedy("dump without --prev-images-dir, which saves everything")
    }
}

#[cfg(test)]
mod tests;
