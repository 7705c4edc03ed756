//! Chains of checkpoints: a directory leaves pages that did not change to its parent, that to its own, and so on.

use crate::{
    dir::ImageDir,
    error::{ImageError, Result},
    kind::{self, Id, Kind},
    pagemap::{PAGE_SIZE, PageSource, Pagemap},
};
use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// More parents than this are a circle, or a mistake.
const LONGEST: usize = 4096;

/// A pages file of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageStore {
    /// How many parents away its directory is; 0 is the checkpoint itself.
    pub depth: u32,
    /// `N` of its `pages-N.img`.
    pub pages_id: u32,
}

/// Consecutive pages, and where in the chain they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredRun {
    /// Address of the first page (in a shared memory segment: its offset).
    pub vaddr: u64,
    /// How many pages there are; never 0.
    pub nr_pages: u64,
    /// The file.
    pub store: PageStore,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// May a lazy restore bring it later?
    pub lazy: bool,
}

impl StoredRun {
    /// The address after the last page. The end of the address space, 2⁶⁴, would be 0.
    pub fn end(&self) -> u64 {
        self.vaddr.wrapping_add(self.bytes())
    }

    /// The length in bytes.
    pub fn bytes(&self) -> u64 {
        self.nr_pages.wrapping_mul(PAGE_SIZE)
    }
}

/// All pages of an address space or a segment, wherever in the chain they are: ascending, without overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredPages {
    /// Runs of pages. A page in none of them is zero, or as in the mapped file.
    pub runs: Vec<StoredRun>,
}

impl StoredPages {
    /// The files that hold any of them.
    pub fn stores(&self) -> Vec<PageStore> {
        let mut stores: Vec<PageStore> = self.runs.iter().map(|run| run.store).collect();
        stores.sort_unstable();
        stores.dedup();
        stores
    }

    /// How many bytes they are.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(StoredRun::bytes).fold(0, u64::saturating_add)
    }
}

/// Opens the parents of `images`, the nearest first.
///
/// # Errors
/// One of them holds no images, or they go round in a circle.
pub(crate) fn ancestors(images: &ImageDir) -> Result<Vec<ImageDir>> {
    let identity = |dir: &ImageDir| {
        let stat = dir.path().metadata().map_err(|e| ImageError::io("examine", dir.path(), e))?;
        Ok((stat.dev(), stat.ino()))
    };
    let Some(first) = images.parent()? else { return Ok(Vec::new()) };
    let mut seen = vec![identity(images)?];
    let mut all = Vec::new();
    let mut next = Some(first);
    while let Some(dir) = next {
        let this = identity(&dir)?;
        if seen.contains(&this) || seen.len() > LONGEST {
            let what = "as a parent it leads back to where it started".to_owned();
            return Err(ImageError::Damaged { path: dir.path().to_owned(), what });
        }
        seen.push(this);
        next = dir.parent()?;
        all.push(dir);
    }
    Ok(all)
}

/// A part of a pagemap that is still to be found: from, to (0 for 2⁶⁴), in pages.
type Wanted = (u64, u64);

/// Finds the pages of one pagemap in the directories `chain`, the checkpoint itself first. None if it has none of that id.
pub(crate) fn resolve(
    chain: &[&ImageDir],
    kind: Kind<Pagemap>,
    id: Id,
) -> Result<Option<StoredPages>> {
    let name = kind.file_name(id);
    let mut runs = Vec::new();
    let mut wanted: Option<Vec<Wanted>> = None;
    for (depth, dir) in chain.iter().enumerate() {
        let path = || dir.path().join(&name);
        let Some(pagemap) = dir.pagemap(kind, id)? else {
            match &wanted {
                None => return Ok(None),
                Some(_) => return Err(ImageError::Missing(path())),
            }
        };
        let all = || pagemap.entries.iter().map(|run| pages(run.vaddr, run.nr_pages)).collect();
        let here = wanted.take().unwrap_or_else(all);
        let older = look(&pagemap, depth as u32, &here, &mut runs).map_err(|(page, what)| {
            ImageError::Damaged { path: path(), what: format!("page {page:#x} {what}") }
        })?;
        if older.is_empty() {
            // A single directory has them in order.
            if depth > 0 {
                runs.sort_unstable_by_key(|run: &StoredRun| run.vaddr);
            }
            return Ok(Some(StoredPages { runs }));
        }
        wanted = Some(older);
    }
    let path = chain.last().map_or_else(Default::default, |dir| dir.path().join("parent"));
    Err(ImageError::Missing(path))
}

fn pages(vaddr: u64, nr_pages: u64) -> Wanted {
    let first = vaddr / PAGE_SIZE;
    (first, first + nr_pages)
}

/// Finds `wanted` in a pagemap: what is stored there goes to `runs`; returned is what an older one must have. An error is the
/// address of a page and what is wrong with it.
fn look(
    pagemap: &Pagemap,
    depth: u32,
    wanted: &[Wanted],
    runs: &mut Vec<StoredRun>,
) -> std::result::Result<Vec<Wanted>, (u64, &'static str)> {
    let mut older: Vec<Wanted> = Vec::new();
    let mut entries = pagemap.with_places().peekable();
    for &(start, end) in wanted {
        let mut at = start;
        while at < end {
            while entries.peek().is_some_and(|(run, _)| pages(run.vaddr, run.nr_pages).1 <= at) {
                entries.next();
            }
            let Some((run, place)) = entries.peek() else {
                return Err((at * PAGE_SIZE, "is not there, but a younger image needs it"));
            };
            let (first, last) = pages(run.vaddr, run.nr_pages);
            if first > at {
                return Err((at * PAGE_SIZE, "is not there, but a younger image needs it"));
            }
            let to = last.min(end);
            match (run.source, place) {
                (_, Some(place)) => runs.push(StoredRun {
                    vaddr: at * PAGE_SIZE,
                    nr_pages: to - at,
                    store: PageStore { depth, pages_id: place.store },
                    offset: place.offset() + (at - first) * PAGE_SIZE,
                    lazy: run.source == PageSource::StoredLazy,
                }),
                (PageSource::Parent, None) => match older.last_mut() {
                    Some(last) if last.1 == at => last.1 = to,
                    _ => older.push((at, to)),
                },
                (_, None) => {
                    return Err((
                        at * PAGE_SIZE,
                        "is at the page server of a lazy dump, which is not supported yet",
                    ));
                }
            }
            at = to;
        }
    }
    Ok(older)
}

/// Opens a pages file of `chain`.
pub(crate) fn open(chain: &[&ImageDir], store: PageStore) -> Result<File> {
    let name = kind::PAGES.file_name(store.pages_id);
    match chain.get(store.depth as usize) {
        Some(dir) => dir.open_pages(&name),
        None => Err(ImageError::Missing(name.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagemap::PageRun;

    fn map(entries: &[(u64, u64, PageSource)]) -> Pagemap {
        let entries = entries.iter().map(|&(page, nr_pages, source)| PageRun {
            vaddr: page * PAGE_SIZE,
            nr_pages,
            source,
            place: None,
        });
        Pagemap { pages_id: 7, entries: entries.collect() }
    }

    #[test]
    fn pages_of_two_levels() {
        use PageSource::{Parent, Stored, StoredLazy};
        let young = map(&[(1, 2, Stored), (3, 4, Parent), (9, 1, StoredLazy), (10, 1, Parent)]);
        let mut runs = Vec::new();
        let wanted: Vec<_> = young.entries.iter().map(|r| pages(r.vaddr, r.nr_pages)).collect();
        let older = look(&young, 0, &wanted, &mut runs).unwrap();
        assert_eq!(older, [(3, 7), (10, 11)]);
        assert_eq!((runs[1].vaddr, runs[1].offset), (9 * PAGE_SIZE, 2 * PAGE_SIZE));
        // The older one has more than is wanted, and has it in other pieces.
        let old = map(&[(0, 5, Stored), (5, 30, StoredLazy)]);
        assert!(look(&old, 1, &older, &mut runs).unwrap().is_empty());
        let found: Vec<_> = runs
            .iter()
            .skip(2)
            .map(|r| (r.vaddr / PAGE_SIZE, r.nr_pages, r.store.depth, r.offset / PAGE_SIZE))
            .collect();
        assert_eq!(found, [(3, 2, 1, 3), (5, 2, 1, 5), (10, 1, 1, 10)]);
        // A page that nobody has is named.
        let gap = map(&[(3, 3, Stored), (10, 1, Stored)]);
        assert_eq!(look(&gap, 1, &older, &mut Vec::new()).unwrap_err().0, 6 * PAGE_SIZE);
        let short = map(&[(3, 4, Stored)]);
        assert_eq!(look(&short, 1, &older, &mut Vec::new()).unwrap_err().0, 10 * PAGE_SIZE);
    }
}
