//! The descriptors of each process, and its directories.

use std::{fmt::Display, io::Write};

use rewake_image::kind;

use crate::error::Error;

use super::{dir::Dir, files::Files, write_name};

pub(super) fn show(dir: &Dir, out: &mut impl Write) -> Result<(), Error> {
    let files = Files::read(dir)?;
    for process in dir.processes()? {
        let Some(ids) = dir.one(kind::IDS, process.pid)? else { continue };
        writeln!(out, "{}", process.pid)?;
        for fd in dir.list(kind::FDINFO, ids.files_id)?.unwrap_or_default() {
            line(out, &fd.fd, &files.name(fd.r#type, fd.id))?;
        }
        if let Some(fs) = dir.one(kind::FS, process.pid)? {
            line(out, &"cwd", files.path(fs.cwd_id))?;
            line(out, &"root", files.path(fs.root_id))?;
        }
    }
    Ok(())
}

fn line(out: &mut impl Write, what: &dyn Display, name: &[u8]) -> Result<(), Error> {
    write!(out, "\t{what:>7}: ")?;
    write_name(out, name)?;
    Ok(writeln!(out)?)
}
