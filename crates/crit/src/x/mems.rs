//! The mappings of each process.

use std::io::Write;

use rewake_image::{
    kind,
    messages::{VmaEntry, vma_status as status},
};

use crate::error::Error;

use super::{
    dir::Dir,
    files::Files,
    vma::{self, ShortIds},
    write_name,
};

pub(super) fn show(dir: &Dir, out: &mut impl Write) -> Result<(), Error> {
    let files = Files::read(dir)?;
    let mut short = ShortIds::default();
    for process in dir.processes()? {
        let Some(mm) = dir.one(kind::MM, process.pid)? else { continue };
        writeln!(out, "{}", process.pid)?;
        write!(out, "\t{:<36}    ", "exe")?;
        write_name(out, files.path(mm.exe_file_id))?;
        writeln!(out)?;
        for vma in &mm.vmas {
            let name = vma::name(vma, &files, &mut short);
            write!(
                out,
                "\t{:<36}{}",
                format!("{:08x}-{:08x}", vma.start, vma.end),
                protection(vma)
            )?;
            if !name.is_empty() {
                write!(out, " ")?;
                write_name(out, &name)?;
            }
            writeln!(out, "{}", if vma.status & status::REGULAR == 0 { " *" } else { "" })?;
        }
    }
    Ok(())
}

/// `PROT_*` of mmap(2) as in /proc/PID/maps.
fn protection(vma: &VmaEntry) -> String {
    [(1, 'r'), (2, 'w'), (4, 'x')]
        .map(|(bit, letter)| if vma.prot & bit != 0 { letter } else { '-' })
        .into_iter()
        .collect()
}
