//! vdsos: of the images, of this kernel, and how the one leads to the other.

use super::read::Alive;
use super::{Run, finish};
use crate::error::{Context, Error, Result};
use crate::own::AddressSpace;
use rewake_image::{ImageDir, kind};
use rewake_objects::memory::vdso;
use rewake_objects::memory::vma::status;
use std::collections::HashMap;
use std::os::unix::fs::FileExt;

/// Is the vdso of the images the one this kernel has?
pub(super) fn same_vdso(images: &ImageDir, alive: &Alive, own: &AddressSpace) -> Result<bool> {
    Ok(match dumped_vdso(images, alive)? {
        None => true,
        Some((_, bytes)) => bytes == own.vdso,
    })
}

/// Address and contents of the vdso in the images; empty contents if they are not there.
pub(super) fn dumped_vdso(images: &ImageDir, alive: &Alive) -> Result<Option<(u64, Vec<u8>)>> {
    let Some(vma) = alive.mm.vmas.iter().find(|v| v.status & status::VDSO != 0) else {
        return Ok(None);
    };
    // The kernel's is two pages; what claims to be much larger is none.
    const LARGEST: u64 = 1 << 20;
    let len = (vma.end - vma.start).min(LARGEST) as usize;
    let mut bytes = vec![0; len];
    let mut filled = 0;
    // Its pages may be in several checkpoints of a chain.
    for run in alive.pages.iter().flat_map(|pages| &pages.runs) {
        let (start, end) = (run.vaddr.max(vma.start), run.end().min(vma.start + len as u64));
        if start < end {
            let name = kind::PAGES.file_name(run.store.pages_id);
            let at = (start - vma.start) as usize..(end - vma.start) as usize;
            filled += at.len();
            images
                .open_store(run.store)?
                .read_exact_at(&mut bytes[at], run.offset + (start - run.vaddr))
                .map_err(|e| Error::new(format!("{name}: {e}")))?;
        }
    }
    if filled == len {
        return Ok(Some((vma.start, bytes)));
    }
    Ok(Some((vma.start, Vec::new())))
}

impl Run<'_> {
    /// Where a task came from a kernel with another vdso: its old one is made to lead to ours.
    pub(super) fn foreign_vdsos(&self) -> Result<()> {
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let Some((address, dumped)) = dumped_vdso(self.images, alive)? else { continue };
            if dumped == self.own.vdso || dumped.is_empty() {
                continue;
            }
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
                Some(vdso) if same_vdso(self.images, alive, self.own)? => vdso.start,
                _ => self.moved_vdso(),
            };
            gadgets.insert(task.pid, at + offset);
        }
        Ok(gadgets)
    }
}
