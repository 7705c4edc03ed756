//! Filling private memory from page stores: as many pages as fit into each vectored read.

use super::vma;
use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{MmEntry, VmaEntry};
use rewake_image::{PageStore, StoredPages, StoredRun};

/// `IOV_MAX`.
const RUNS_A_READ: usize = 1024;
/// A read transfers at most 2 GiB less a page.
const BYTES_A_READ: u64 = 1 << 30;

/// A piece of memory that lies in one mapping: address, length, and where which pages file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where they go.
    pub address: u64,
    /// How many bytes.
    pub len: u64,
    /// The file.
    pub store: PageStore,
    /// Where they are in it.
    pub offset: u64,
}

/// Cuts the runs of the pagemap along the mappings; `place` says where a mapping is, or that it is to be left out.
pub fn pieces(
    mm: &MmEntry,
    pages: &StoredPages,
    place: impl Fn(&VmaEntry) -> Option<u64>,
) -> Result<Vec<Piece>, Problem> {
    let mut vmas = mm.vmas.iter().filter(|v| vma::has_private_pages(v)).peekable();
    let mut pieces: Vec<Piece> = Vec::new();
    for run in &pages.runs {
        let StoredRun { vaddr, store, offset, .. } = *run;
        let mut at = vaddr;
        while at < run.end() {
            while vmas.peek().is_some_and(|v| v.end <= at) {
                vmas.next();
            }
            // `validate` has seen that every page is in such a mapping.
            let Some(vma) = vmas.peek() else { break };
            let end = run.end().min(vma.end);
            if let Some(place) = place(vma) {
                let address = place + (at - vma.start);
                let offset = offset + (at - vaddr);
                match pieces.last_mut() {
                    Some(p)
                        if (p.address + p.len, p.store, p.offset + p.len)
                            == (address, store, offset) =>
                    {
                        p.len += end - at;
                    }
                    _ => pieces.push(Piece { address, len: end - at, store, offset }),
                }
            }
            at = end;
        }
    }
    Ok(pieces)
}

/// Fills memory from page stores; `pages` tells the number that a page store's descriptor has in the task.
///
/// # Errors
/// A page store was not handed over.
pub fn fill(
    steps: &mut Steps,
    pieces: &[Piece],
    pages: &dyn Fn(PageStore) -> Option<i32>,
) -> Result<(), Problem> {
    let mut batch: Vec<(u64, u64)> = Vec::new();
    let mut bytes = 0;
    let mut first = (PageStore { depth: 0, pages_id: 0 }, 0);
    let mut flush = |batch: &mut Vec<(u64, u64)>, bytes: &mut u64, (store, offset)| {
        let Some(&(start, _)) = batch.first() else { return Ok(()) };
        let fd = pages(store)
            .ok_or_else(|| Problem::new("pages file", "the image has pages but no pages file"))?;
        let end = batch.last().map_or(start, |(s, l)| s + l);
        let words: Vec<u64> = batch.iter().flat_map(|(s, l)| [*s, *l]).collect();
        let iov = steps.words(&words);
        steps.must_be(
            Label::Fill(start, end),
            *bytes as i64,
            Op::new(libc::SYS_preadv, &[fd as u64, iov.address, batch.len() as u64, offset, 0]),
        );
        batch.clear();
        *bytes = 0;
        Ok::<(), Problem>(())
    };
    for piece in pieces {
        let mut done = 0;
        while done < piece.len {
            let offset = piece.offset + done;
            // One read goes through the file without a gap.
            if batch.is_empty() || (first.0, first.1 + bytes) != (piece.store, offset) {
                flush(&mut batch, &mut bytes, first)?;
                first = (piece.store, offset);
            }
            let len = (piece.len - done).min(BYTES_A_READ - bytes);
            batch.push((piece.address + done, len));
            bytes += len;
            done += len;
            if batch.len() == RUNS_A_READ || bytes == BYTES_A_READ {
                flush(&mut batch, &mut bytes, first)?;
            }
        }
    }
    flush(&mut batch, &mut bytes, first)
}
