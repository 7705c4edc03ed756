//! Pagemaps: which pages of an address space or a shared memory segment are stored, and where.

use crate::{
    error::Result,
    messages::{PagemapEntry, PagemapHead, pagemap_flags as flags},
    raw::RawImage,
    wire::{self, Fault, Reason},
};

/// The unit in which pagemaps count, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// `img_version` of an inventory with whose pagemaps CRIU would go wrong: their pages lie in several page stores, or are
/// in one for several tasks. CRIU refuses any version that it does not know.
pub const SEVERAL_STORES: u32 = 1000;

/// A checked pagemap: ascending, page-aligned runs that do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// `N` of the `pages-N.img` that holds the stored pages of runs that name no other, in the order of the runs.
    pub pages_id: u32,
    /// Runs of pages. A page in none of them is zero, or as in the mapped file.
    pub entries: Vec<PageRun>,
}

/// Consecutive pages with the same source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page (in a shared memory segment: its offset), a multiple of [`PAGE_SIZE`].
    pub vaddr: u64,
    /// How many pages there are; never 0.
    pub nr_pages: u64,
    /// Where they are.
    pub source: PageSource,
    /// Where stored pages are, if not behind those of the run before in the pagemap's own page store. Images with such a
    /// place are of version [`SEVERAL_STORES`].
    pub place: Option<StorePage>,
}

/// A page of a page store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePage {
    /// `N` of the `pages-N.img`.
    pub store: u32,
    /// Its number in the file; the first is 0.
    pub page: u64,
}

impl StorePage {
    /// Where it begins, in bytes. What [`Pagemap::parse`] gave does not overflow.
    pub fn offset(self) -> u64 {
        self.page.wrapping_mul(PAGE_SIZE)
    }
}

/// Where the content of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSource {
    /// In the pages file.
    Stored,
    /// In the pages file, and may be filled in when first touched.
    StoredLazy,
    /// At the page server of the dumping side.
    Lazy,
    /// In the parent checkpoint's pagemap of the same id.
    Parent,
}

impl PageSource {
    /// Whether the pages are in the pages file.
    pub fn is_stored(self) -> bool {
        matches!(self, PageSource::Stored | PageSource::StoredLazy)
    }

    fn flags(self) -> u32 {
        match self {
            PageSource::Stored => flags::PRESENT,
            PageSource::StoredLazy => flags::PRESENT | flags::LAZY,
            PageSource::Lazy => flags::LAZY,
            PageSource::Parent => flags::PARENT,
        }
    }

    fn from_flags(bits: u32) -> Option<Self> {
        [PageSource::Stored, PageSource::StoredLazy, PageSource::Lazy, PageSource::Parent]
            .into_iter()
            .find(|source| source.flags() == bits)
    }
}

impl PageRun {
    /// The address after the last page. The end of the address space, 2⁶⁴, would be 0.
    pub fn end(&self) -> u64 {
        self.vaddr.wrapping_add(self.bytes())
    }

    /// The length in bytes. What [`Pagemap::parse`] gave does not overflow.
    pub fn bytes(&self) -> u64 {
        self.nr_pages.wrapping_mul(PAGE_SIZE)
    }

    /// The run as it is written. `compat_nr_pages` stays 0, as CRIU since 4.2 has it.
    pub(crate) fn to_message(self) -> PagemapEntry {
        PagemapEntry {
            vaddr: self.vaddr,
            compat_nr_pages: 0,
            in_parent: None,
            flags: Some(self.source.flags()),
            nr_pages: Some(self.nr_pages),
            store: self.place.map(|place| place.store),
            store_page: self.place.map(|place| place.page),
        }
    }

    /// Reads both what CRIU writes now and what it once wrote: no flags, a 32-bit count.
    fn from_message(entry: &PagemapEntry) -> Result<Self, Fault> {
        let bits = entry.flags.unwrap_or(match entry.in_parent {
            Some(true) => flags::PARENT,
            _ => flags::PRESENT,
        });
        let source = PageSource::from_flags(bits).ok_or_else(|| {
            invalid("flags", format!("{bits:#x} is no combination of page flags"))
        })?;
        let nr_pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let place = match (entry.store, entry.store_page) {
            (None, None) => None,
            (Some(store), Some(page)) if source.is_stored() => {
                let end = page.checked_add(nr_pages).and_then(|end| end.checked_mul(PAGE_SIZE));
                if end.is_none_or(|end| end > i64::MAX as u64) {
                    let what = format!("page {page:#x} is beyond what a pages file can hold");
                    return Err(invalid("store_page", what));
                }
                Some(StorePage { store, page })
            }
            _ => return Err(invalid("store", "a place without pages, or half of one".to_owned())),
        };
        let run = PageRun { vaddr: entry.vaddr, nr_pages, source, place };
        if !run.vaddr.is_multiple_of(PAGE_SIZE) {
            return Err(invalid("vaddr", format!("{:#x} is not page-aligned", run.vaddr)));
        }
        if nr_pages == 0 {
            return Err(invalid("nr_pages", "a run of no pages".to_owned()));
        }
        let last_page = (run.vaddr / PAGE_SIZE).checked_add(nr_pages - 1);
        if last_page.is_none_or(|page| page > u64::MAX / PAGE_SIZE) {
            return Err(invalid(
                "nr_pages",
                format!("{nr_pages} pages reach beyond the address space"),
            ));
        }
        Ok(run)
    }
}

impl Pagemap {
    /// Reads and checks a pagemap file.
    pub fn parse(image: &mut RawImage<'_>) -> Result<Option<Self>> {
        let Some(entry) = image.next_entry()? else { return Ok(None) };
        let head: PagemapHead =
            wire::decode_checked(entry.message).map_err(|f| image.entry_fault(&entry, f))?;
        let mut entries: Vec<PageRun> = Vec::new();
        let mut stored = 0u64;
        while let Some(entry) = image.next_entry()? {
            let run = wire::decode_checked(entry.message)
                .and_then(|message| PageRun::from_message(&message))
                .and_then(|run| {
                    follows(entries.last(), &run)?;
                    if run.source.is_stored() && run.place.is_none() {
                        let bytes = run.nr_pages.checked_mul(PAGE_SIZE);
                        let total = bytes.and_then(|b| stored.checked_add(b));
                        stored =
                            total.filter(|total| *total <= i64::MAX as u64).ok_or_else(|| {
                                invalid(
                                    "nr_pages",
                                    "more pages than a pages file can hold".to_owned(),
                                )
                            })?;
                    }
                    Ok(run)
                })
                .map_err(|f| image.entry_fault(&entry, f))?;
            entries.push(run);
        }
        Ok(Some(Pagemap { pages_id: head.pages_id, entries }))
    }

    /// Each run with the place of its first page, if it is stored.
    pub fn with_places(&self) -> impl Iterator<Item = (PageRun, Option<StorePage>)> + '_ {
        self.entries.iter().scan(0u64, |next, run| {
            let own = StorePage { store: self.pages_id, page: *next };
            let place = run.source.is_stored().then(|| run.place.unwrap_or(own));
            if run.source.is_stored() && run.place.is_none() {
                *next += run.nr_pages;
            }
            Some((*run, place))
        })
    }

    /// How many bytes of its own pages file the runs take that name no place.
    pub fn stored_bytes(&self) -> u64 {
        let own = self.entries.iter().filter(|run| run.source.is_stored() && run.place.is_none());
        own.map(PageRun::bytes).sum()
    }

    /// Does any run name a place?
    pub fn has_places(&self) -> bool {
        self.entries.iter().any(|run| run.place.is_some())
    }
}

/// Whether `run` lies wholly above `last`.
fn follows(last: Option<&PageRun>, run: &PageRun) -> Result<(), Fault> {
    match last {
        // an end of 0 is that of the address space
        Some(last) if last.end() == 0 || run.vaddr < last.end() => Err(invalid(
            "vaddr",
            format!(
                "{:#x} is not above the run before it, which starts at {:#x}",
                run.vaddr, last.vaddr
            ),
        )),
        _ => Ok(()),
    }
}

fn invalid(field: &str, what: String) -> Fault {
    Fault::new(0, Reason::Invalid(what)).within(field)
}
