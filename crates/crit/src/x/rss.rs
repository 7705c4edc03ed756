//! The stored pages of each process, run by run, beside the mappings they lie in.

use std::io::Write;

use rewake_image::{
    kind,
    messages::{PagemapEntry, VmaEntry},
};

use crate::error::Error;

use super::{dir::Dir, files::Files, vma, write_name};

const PAGE_SIZE: u64 = 4096;

pub(super) fn show(dir: &Dir, out: &mut impl Write) -> Result<(), Error> {
    let files = Files::read(dir)?;
    for process in dir.processes()? {
        let Some(mm) = dir.one(kind::MM, process.pid)? else { continue };
        let name = kind::PAGEMAP.file_name(process.pid);
        let Some(runs) = dir.entries::<PagemapEntry>(kind::PAGEMAP.info(), &name)? else {
            continue;
        };
        writeln!(out, "{}", process.pid)?;
        let mut table = Table { vmas: &mm.vmas, files: &files, at: 0, shown: None };
        for run in &runs {
            table.row(out, run)?;
        }
    }
    Ok(())
}

/// Walks pagemap and mappings in step: both go up.
struct Table<'a> {
    vmas: &'a [VmaEntry],
    files: &'a Files,
    /// The first mapping that the next run can lie in.
    at: usize,
    /// The last mapping that was shown in full; shown once more, it is a `~`.
    shown: Option<usize>,
}

impl Table<'_> {
    fn row(&mut self, out: &mut impl Write, run: &PagemapEntry) -> Result<(), Error> {
        let pages = run.nr_pages.unwrap_or(run.compat_nr_pages.into());
        let end = run.vaddr.saturating_add(pages.saturating_mul(PAGE_SIZE));
        while self.vmas.get(self.at).is_some_and(|vma| vma.end <= run.vaddr) {
            self.at += 1;
        }
        write!(out, "\t{:<23}", format!("{:x} / {:<8}", run.vaddr, pages))?;
        while let Some(vma) = self.vmas.get(self.at).filter(|vma| vma.start < end) {
            if self.shown.replace(self.at) == Some(self.at) {
                write!(out, " ~")?;
            } else {
                write!(
                    out,
                    " {:08x} / {:<8}",
                    vma.start,
                    vma.end.saturating_sub(vma.start) / PAGE_SIZE
                )?;
                if vma::is_file(vma) {
                    write!(out, " ")?;
                    write_name(out, self.files.path(vma.shmid))?;
                }
            }
            write!(out, "\n\t{:23}", "")?;
            self.at += 1;
        }
        // The next run may go on in the mapping that this one ended in.
        self.at = self.at.saturating_sub(1);
        Ok(writeln!(out)?)
    }
}
