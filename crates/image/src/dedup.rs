//! Deduplication: what a checkpoint stores itself, its parents need not keep. The pages are punched out of their stores;
//! the parents alone are no checkpoints any more then.

use crate::{
    chain,
    dir::{ImageDir, OpenOptions},
    error::{ImageError, Result},
    file::Dir,
    kind,
    manifest::{self, FileSum, Manifest},
    pagemap::Pagemap,
    writer::HIDDEN,
};
use rustix::fs::{self, FallocateFlags, Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Ranges of bytes to be punched out of pages files, by number.
type Holes = BTreeMap<u32, Vec<(u64, u64)>>;

/// Punches out of the parents of the images in `path` what these store themselves. Returns how many bytes that freed.
///
/// # Errors
/// Images cannot be read or changed. What was punched until then is no loss.
pub fn dedup(path: &Path) -> Result<u64> {
    let young =
        ImageDir::open_with(path, OpenOptions { pre_dump: true, ..OpenOptions::default() })?;
    let parents = chain::ancestors(&young)?;
    if parents.is_empty() {
        return Err(ImageError::Missing(path.join("parent")));
    }
    let mut freed = 0;
    for parent in &parents {
        let mut holes = Holes::new();
        for name in Dir::open(path)?.names()? {
            let Some((of, id)) = kind::by_file_name(&name) else { continue };
            for kind in [kind::PAGEMAP, kind::SHMEM_PAGEMAP] {
                if kind.info().name != of.name {
                    continue;
                }
                let pair = (young.pagemap(kind, id)?, parent.pagemap(kind, id)?);
                if let (Some(young), Some(old)) = pair {
                    doubled(&young, &old, holes.entry(old.pages_id).or_default());
                }
            }
        }
        for (pages_id, ranges) in holes {
            freed += punch(parent.path(), &kind::PAGES.file_name(pages_id), &ranges)?;
        }
    }
    Ok(freed)
}

/// Where in the pages file of `old` are pages that `young` stores itself?
fn doubled(young: &Pagemap, old: &Pagemap, holes: &mut Vec<(u64, u64)>) {
    let mut own = young.entries.iter().filter(|run| run.source.is_stored()).peekable();
    for (run, offset) in old.with_offsets() {
        let Some(offset) = offset else { continue };
        while let Some(stored) = own.peek() {
            let (start, end) = (run.vaddr.max(stored.vaddr), run.end().min(stored.end()));
            if start < end {
                let at = offset + (start - run.vaddr);
                match holes.last_mut() {
                    Some(last) if last.1 == at => last.1 = at + (end - start),
                    _ => holes.push((at, at + (end - start))),
                }
            }
            if stored.end() > run.end() {
                break;
            }
            own.next();
        }
    }
}

/// Punches holes into a pages file, whose checksum is not told meanwhile.
fn punch(path: &Path, name: &str, ranges: &[(u64, u64)]) -> Result<u64> {
    if ranges.is_empty() {
        return Ok(0);
    }
    let dir = Dir::open(path)?;
    let fail = |what, e: std::io::Error| ImageError::io(what, &path.join(name), e);
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file =
        fs::openat(&dir.fd, name, flags, Mode::empty()).map_err(|e| fail("open", e.into()))?;
    let file = File::from(file);
    let before = file.metadata().map_err(|e| fail("examine", e))?;
    let sum = |crc| FileSum { size: before.len(), crc };
    set_sum(&dir, name, sum(None))?;
    for &(start, end) in ranges {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fs::fallocate(&file, flags, start, end - start)
            .map_err(|e| fail("punch a hole into", e.into()))?;
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < before.len() {
        let part = &mut buffer[..(before.len() - at).min(1 << 20) as usize];
        file.read_exact_at(part, at).map_err(|e| fail("read", e))?;
        hasher.update(part);
        at += part.len() as u64;
    }
    set_sum(&dir, name, sum(Some(hasher.finalize())))?;
    let after = file.metadata().map_err(|e| fail("examine", e))?;
    Ok(before.blocks().saturating_sub(after.blocks()) * 512)
}

/// Says in the manifest, if there is one, what a file is like.
fn set_sum(dir: &Dir, name: &str, sum: FileSum) -> Result<()> {
    let Some((fd, size)) = dir.open_regular(manifest::FILE_NAME)? else { return Ok(()) };
    let old = String::from_utf8_lossy(&dir.read(manifest::FILE_NAME, &fd, size)?).into_owned();
    Manifest::parse(&old)
        .map_err(|what| ImageError::Damaged { path: dir.path.join(manifest::FILE_NAME), what })?;
    let new = format!("{HIDDEN}manifest");
    dir.remove(&new)?;
    let fd = dir.create(&new)?;
    dir.write(&new, &fd, manifest::with_sum(&old, name, Some(sum)).as_bytes())?;
    fs::renameat(&dir.fd, &new, &dir.fd, manifest::FILE_NAME)
        .map_err(|e| ImageError::write("put in place", &dir.path, manifest::FILE_NAME, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagemap::{PAGE_SIZE, PageRun, PageSource};

    fn map(entries: &[(u64, u64, PageSource)]) -> Pagemap {
        let entries = entries.iter().map(|&(page, nr_pages, source)| PageRun {
            vaddr: page * PAGE_SIZE,
            nr_pages,
            source,
        });
        Pagemap { pages_id: 1, entries: entries.collect() }
    }

    #[test]
    fn what_both_store_is_found_in_the_older_store() {
        use PageSource::{Parent, Stored, StoredLazy};
        let young = map(&[(0, 3, Stored), (3, 2, Parent), (5, 10, StoredLazy), (30, 1, Stored)]);
        let old = map(&[(1, 5, Stored), (6, 2, Parent), (8, 1, Stored), (10, 25, StoredLazy)]);
        let mut holes = Vec::new();
        doubled(&young, &old, &mut holes);
        let pages: Vec<_> = holes.iter().map(|h| (h.0 / PAGE_SIZE, h.1 / PAGE_SIZE)).collect();
        // Pages 1 and 2; 5; 8; 10 to 14; 30. In the store: 0 to 4 are 1 to 5, 5 is 8, 6 is 10.
        assert_eq!(pages, [(0, 2), (4, 11), (26, 27)]);
    }
}
