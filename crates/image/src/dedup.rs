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

/// Ranges of bytes of a pages file: those that younger images store too, and those that are still needed. Tasks may share
/// pages in a store.
#[derive(Debug, Default)]
struct Ranges {
    doubled: Vec<(u64, u64)>,
    needed: Vec<(u64, u64)>,
}

/// Punches out of the parents of the images in `path` what these store themselves. Returns how many bytes that freed.
///
/// # Errors
/// Images cannot be read or changed. What was punched until then is no loss.
pub fn dedup(path: &Path) -> Result<u64> {
    let options = OpenOptions { pre_dump: true, ..OpenOptions::default() };
    let young = ImageDir::open_with(path, options)?;
    let parents = chain::ancestors(&young)?;
    if parents.is_empty() {
        return Err(ImageError::Missing(path.join("parent")));
    }
    let mut freed = 0;
    for parent in &parents {
        let mut stores: BTreeMap<u32, Ranges> = BTreeMap::new();
        for name in Dir::open(parent.path())?.names()? {
            let Some((of, id)) = kind::by_file_name(&name) else { continue };
            for kind in [kind::PAGEMAP, kind::SHMEM_PAGEMAP] {
                if kind.info().name == of.name
                    && let Some(old) = parent.pagemap(kind, id)?
                {
                    divide(young.pagemap(kind, id)?.as_ref(), &old, &mut stores);
                }
            }
        }
        for (store, Ranges { doubled, needed }) in stores {
            let holes = without(doubled, needed);
            freed += punch(parent.path(), &kind::PAGES.file_name(store), &holes)?;
        }
    }
    Ok(freed)
}

/// Which pages of `old` does `young` store itself, and which not?
fn divide(young: Option<&Pagemap>, old: &Pagemap, stores: &mut BTreeMap<u32, Ranges>) {
    let own = young.map_or(&[][..], |young| &young.entries);
    let mut own = own.iter().filter(|run| run.source.is_stored()).peekable();
    for (run, place) in old.with_places() {
        let Some(place) = place else { continue };
        let ranges = stores.entry(place.store).or_default();
        let at = |address: u64| place.offset() + (address - run.vaddr);
        let mut next = run.vaddr;
        while let Some(stored) = own.peek() {
            let (start, end) = (next.max(stored.vaddr), run.end().min(stored.end()));
            if start < end {
                ranges.needed.push((at(next), at(start)));
                ranges.doubled.push((at(start), at(end)));
                next = end;
            }
            if stored.end() > run.end() {
                break;
            }
            own.next();
        }
        ranges.needed.push((at(next), at(run.end())));
    }
}

/// Ranges without those parts that others cover; in order, neighbours as one.
fn without(mut ranges: Vec<(u64, u64)>, mut others: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    others.retain(|(start, end)| start < end);
    others.sort_unstable();
    // Without overlaps, so that ends ascend too.
    others.dedup_by(|next, last| {
        let touches = next.0 <= last.1;
        if touches {
            last.1 = last.1.max(next.1);
        }
        touches
    });
    let mut left: Vec<(u64, u64)> = Vec::new();
    let mut push = |start, end| match left.last_mut() {
        Some(last) if last.1 >= start => last.1 = last.1.max(end),
        _ if start < end => left.push((start, end)),
        _ => {}
    };
    for (mut start, end) in ranges {
        let first = others.partition_point(|other| other.1 <= start);
        for other in others[first..].iter().take_while(|other| other.0 < end) {
            if other.0 > start {
                push(start, other.0);
            }
            start = start.max(other.1);
        }
        if start < end {
            push(start, end);
        }
    }
    left
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
            place: None,
        });
        Pagemap { pages_id: 1, entries: entries.collect() }
    }

    fn in_pages(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        ranges.iter().map(|r| (r.0 / PAGE_SIZE, r.1 / PAGE_SIZE)).collect()
    }

    #[test]
    fn what_both_store_is_found_in_the_older_store() {
        use PageSource::{Parent, Stored, StoredLazy};
        let young = map(&[(0, 3, Stored), (3, 2, Parent), (5, 10, StoredLazy), (30, 1, Stored)]);
        let old = map(&[(1, 5, Stored), (6, 2, Parent), (8, 1, Stored), (10, 25, StoredLazy)]);
        let mut stores = BTreeMap::new();
        divide(Some(&young), &old, &mut stores);
        let ranges = stores.remove(&1).unwrap();
        // Pages 1 and 2; 5; 8; 10 to 14; 30. In the store: 0 to 4 are 1 to 5, 5 is 8, 6 is 10.
        let holes = without(ranges.doubled, ranges.needed);
        assert_eq!(in_pages(&holes), [(0, 2), (4, 11), (26, 27)]);
    }

    #[test]
    fn a_page_that_another_task_shares_stays() {
        use PageSource::Stored;
        let old = map(&[(0, 8, Stored)]);
        let mut other = map(&[(20, 3, Stored)]);
        other.pages_id = 2;
        other.entries[0].place = Some(crate::pagemap::StorePage { store: 1, page: 4 });
        let mut stores = BTreeMap::new();
        divide(Some(&map(&[(2, 9, Stored)])), &old, &mut stores);
        divide(None, &other, &mut stores);
        let ranges = stores.remove(&1).unwrap();
        assert_eq!(in_pages(&without(ranges.doubled, ranges.needed)), [(2, 4), (7, 8)]);
    }
}
