//! Contents of memory that is a file to the kernel: `pagemap-shmem-N.img`.

use super::PAGE;
use crate::Problem;
use rewake_image::{ImageWriter, PageRun, PageSource, PageStream};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Memory to be written.
#[derive(Debug)]
pub struct Source<'a> {
    /// What error texts call it.
    pub object: &'a str,
    /// The memory as a file.
    pub file: &'a File,
    /// Its size in bytes.
    pub size: u64,
    /// Number of its pagemap.
    pub shmid: u64,
    /// What mappings have beyond the size, in the last page; zeros where this ends.
    pub tail: &'a [u8],
    /// Its page size, if it is a file of hugetlbfs: that tells no holes, and pages of zeros are taken for such.
    pub huge: Option<u64>,
}

/// Pages written and looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages of the segment.
    pub scanned: u64,
    /// Pages with data.
    pub written: u64,
}

/// Writes the pages that hold data, and where they are. Holes are left out.
///
/// # Errors
/// Reading the memory or writing the image fails.
pub fn write(images: &ImageWriter, source: &Source<'_>, pages_id: u32) -> Result<Written, Problem> {
    let Source { object, file, size, shmid, tail, huge } = *source;
    let failed = |e: std::io::Error| Problem::new(object, e.to_string());
    let mut runs = Vec::new();
    let mut pages: Option<PageStream<'_>> = None;
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(failed(e.into())),
        };
        let end = match huge {
            Some(page)
                if is_zero(file, start, page.min(size - start), &mut buffer).map_err(failed)? =>
            {
                at = start + page;
                continue;
            }
            Some(page) => size.min(start + page),
            None => rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))
                .map_err(|e| failed(e.into()))?,
        };
        let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        let to = match &mut pages {
            Some(pages) => pages,
            none => none.insert(
                images.page_stream(pages_id).map_err(|e| Problem::new(object, e.to_string()))?,
            ),
        };
        let mut from = first;
        while from < last {
            let len = ((last - from) as usize).min(buffer.len());
            let inside = (size.saturating_sub(from) as usize).min(len);
            file.read_exact_at(&mut buffer[..inside], from).map_err(failed)?;
            let rest = &mut buffer[inside..len];
            let known = rest.len().min(tail.len());
            rest[..known].copy_from_slice(&tail[..known]);
            rest[known..].fill(0);
            std::io::Write::write_all(to, &buffer[..len]).map_err(failed)?;
            from += len as u64;
        }
        match runs.last_mut() {
            Some(PageRun { vaddr, nr_pages, .. }) if *vaddr + *nr_pages * PAGE == first => {
                *nr_pages += (last - first) / PAGE;
            }
            _ => runs.push(PageRun {
                vaddr: first,
                nr_pages: (last - first) / PAGE,
                source: PageSource::Stored,
                place: None,
            }),
        }
        at = last;
    }
    if let Some(pages) = pages {
        pages.finish().map_err(failed)?;
    }
    images
        .write_pagemap_shmem(shmid, pages_id, &runs)
        .map_err(|e| Problem::new(object, e.to_string()))?;
    Ok(Written { scanned: size.div_ceil(PAGE), written: runs.iter().map(|r| r.nr_pages).sum() })
}

/// Are there only zeros in `len` bytes from `at` on?
fn is_zero(file: &File, at: u64, len: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
    let mut done = 0;
    while done < len {
        let part = ((len - done) as usize).min(buffer.len());
        file.read_exact_at(&mut buffer[..part], at + done)?;
        if buffer[..part].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        done += part as u64;
    }
    Ok(true)
}
