//! vdsos: of the images, of this kernel, and how the one leads to the other.

use super::read::Alive;
use super::{Run, finish};
use crate::error::{Context, Error, Result};
use crate::own::AddressSpace;
use rewake_image::{ImageDir, PageStore, kind};
use rewake_objects::memory::vdso;
use rewake_objects::memory::vma::status;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// The vdsos of the images. What is in one place of the page stores is looked at once: forked processes have one.
#[derive(Debug)]
pub(super) struct Vdsos<'a> {
    images: &'a ImageDir,
    own: &'a AddressSpace,
    /// Is it this kernel's?
    known: Mutex<BTreeMap<Vec<Part>, bool>>,
}

/// A part of a vdso: where it is stored, from where to where it goes.
type Part = (PageStore, u64, usize, usize);

/// A vdso: its address, its length, and its parts; none if the images have not all of it.
type Dumped = (u64, usize, Vec<Part>);

impl<'a> Vdsos<'a> {
    /// Nothing is read yet.
    pub(super) fn new(images: &'a ImageDir, own: &'a AddressSpace) -> Vdsos<'a> {
        Vdsos { images, own, known: Mutex::default() }
    }

    /// Is the vdso of a task the one this kernel has? So it is if it has none.
    pub(super) fn is_own(&self, alive: &Alive) -> Result<bool> {
        dumped(alive).map_or(Ok(true), |dumped| self.is_ours(&dumped))
    }

    /// Address and contents of a task's vdso that is not this kernel's, if the images have it.
    fn foreign(&self, alive: &Alive) -> Result<Option<(u64, Vec<u8>)>> {
        let Some(dumped) = dumped(alive) else { return Ok(None) };
        if dumped.2.is_empty() || self.is_ours(&dumped)? {
            return Ok(None);
        }
        Ok(Some((dumped.0, self.read(&dumped)?)))
    }

    fn is_ours(&self, dumped: &Dumped) -> Result<bool> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(is_ours) = known.get(&dumped.2) {
            return Ok(*is_ours);
        }
        let is_ours = !dumped.2.is_empty() && self.read(dumped)? == self.own.vdso;
        known.insert(dumped.2.clone(), is_ours);
        Ok(is_ours)
    }

    fn read(&self, (_, len, parts): &Dumped) -> Result<Vec<u8>> {
        let mut bytes = vec![0; *len];
        for (store, offset, from, to) in parts {
            let name = kind::PAGES.file_name(store.pages_id);
            self.images
                .open_store(*store)?
                .read_exact_at(&mut bytes[*from..*to], *offset)
                .map_err(|e| Error::new(format!("{name}: {e}")))?;
        }
        Ok(bytes)
    }
}

/// Where the vdso of a task is in the images.
fn dumped(alive: &Alive) -> Option<Dumped> {
    let vma = alive.mm.vmas.iter().find(|v| v.status & status::VDSO != 0)?;
    // The kernel's is two pages; what claims to be much larger is none.
    const LARGEST: u64 = 1 << 20;
    let len = (vma.end - vma.start).min(LARGEST) as usize;
    let mut parts: Vec<Part> = Vec::new();
    // Its pages may be in several checkpoints of a chain.
    for run in alive.pages.iter().flat_map(|pages| &pages.runs) {
        let (start, end) = (run.vaddr.max(vma.start), run.end().min(vma.start + len as u64));
        if start < end {
            let at = |address: u64| (address - vma.start) as usize;
            parts.push((run.store, run.offset + (start - run.vaddr), at(start), at(end)));
        }
    }
    if parts.iter().map(|(.., from, to)| to - from).sum::<usize>() != len {
        parts.clear();
    }
    Some((vma.start, len, parts))
}

impl Run<'_> {
    /// Where a task came from a kernel with another vdso: its old one is made to lead to ours.
    pub(super) fn foreign_vdsos(&self) -> Result<()> {
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let Some((address, dumped)) = self.vdsos.foreign(alive)? else { continue };
            let of = |p| Error::of(task.pid, &task.comm, p);
            let own_address = self.moved_vdso();
            let patches = vdso::proxy(&dumped, address, &self.own.vdso, own_address).map_err(of)?;
            for info in alive.threads.iter().filter_map(|t| t.core.thread_info.as_ref()) {
                vdso::may_continue(&dumped, address, &patches, info.gpregs.ip).map_err(of)?;
            }
            let memory = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(format!("/proc/{}/mem", self.outer(task.pid)?))
                .of(task.pid, &task.comm)?;
            vdso::write(&memory, &patches).map_err(of)?;
        }
        Ok(())
    }

    /// Where our vdso is in a task that keeps the one it came with.
    pub(super) fn moved_vdso(&self) -> u64 {
        let span = self.own.specials.span().map_or(0, |s| s.start);
        let own = self.own.specials.vdso.as_ref().map_or(0, |v| v.start);
        self.env.hop + (own - span)
    }

    /// Where each task has a `syscall` instruction: in the vdso, wherever that was moved.
    pub(super) fn gadgets(&self) -> Result<HashMap<i32, u64>> {
        let offset = finish::gadget(&self.own.vdso)?;
        let mut gadgets = HashMap::new();
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let vdso = alive.mm.vmas.iter().find(|v| v.status & status::VDSO != 0);
            let at = match vdso {
                Some(vdso) if self.vdsos.is_own(alive)? => vdso.start,
                _ => self.moved_vdso(),
            };
            gadgets.insert(task.pid, at + offset);
        }
        Ok(gadgets)
    }
}
