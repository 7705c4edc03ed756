//! FIFOs: fifo(7). An open FIFO is two entries: the name and flags (as a regular file's) and the pipe behind it.

use super::collect::{Collector, View};
use super::open::Opener;
use super::{pipe, regular};
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, RegFileEntry};
use rustix::fd::OwnedFd;

/// Surveys one end of a FIFO.
///
/// # Errors
/// Its contents cannot be read, or its name is gone though it has others.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let id = collector.new_id();
    let (regf_id, _) = regular::survey(collector, view)?;
    let inode = (view.stat.st_dev, view.stat.st_ino);
    let known = collector.fifos.get(&inode).copied();
    let pipe_id = known.unwrap_or_else(|| {
        // The inode number by custom, but FIFOs of two file systems may have the same.
        let free = |id: &u32| collector.fifos.values().all(|used| used != id);
        let pipe_id = [view.stat.st_ino as u32].into_iter().chain((0..u32::MAX).rev()).find(free);
        pipe_id.unwrap_or_default()
    });
    collector.push(FileEntry {
        r#type: FdTypes::Fifo as i32,
        id,
        fifo: Some(Box::new(FifoEntry { id, pipe_id, regf_id: Some(regf_id) })),
        ..FileEntry::default()
    });
    if known.is_none() {
        let pipe::Held { data, size, reads } = pipe::contents(&mut collector.copier, view)?;
        if reads.len() > 1 {
            return Err(view
                .problem("packets (O_DIRECT) wait in it, which cannot be saved yet")
                .remedy("try again once they are read"));
        }
        let entry = PipeDataEntry { pipe_id, bytes: data.len() as u32, size: Some(size) };
        collector.fifo_data.push((entry, data));
        collector.fifos.insert(inode, pipe_id);
    }
    Ok((id, FdTypes::Fifo))
}

/// The entry with path and flags of a FIFO.
///
/// # Errors
/// The images have none.
pub fn path_entry<'e>(
    opener: &'e Opener<'_>,
    fifo: &FifoEntry,
) -> Result<&'e RegFileEntry, Problem> {
    let id = fifo.regf_id.unwrap_or(fifo.id);
    opener.entry(id)?.reg.as_deref().ok_or_else(|| {
        Problem::new(
            format!("file id {}", fifo.id),
            format!("file id {id}, its path, is no regular file"),
        )
    })
}

/// Opens one end of a FIFO of the image; the first one fills it.
///
/// # Errors
/// It is gone, or cannot be filled.
pub fn open(opener: &mut Opener<'_>, fifo: &FifoEntry) -> Result<OwnedFd, Problem> {
    let reg = path_entry(opener, fifo)?.clone();
    if !opener.fifos.contains_key(&fifo.pipe_id) {
        // Held for reading and writing until all is open: the ends can then be opened in any order without waiting for
        // each other, and the contents stay.
        let both = keep(opener, &reg)?;
        if let Some((data, contents)) = opener.fifo_data.get(&fifo.pipe_id) {
            fill(&both, &reg.name, data, contents)?;
        }
        opener.fifos.insert(fifo.pipe_id, both);
    }
    regular::open(opener, &reg)
}

fn keep(opener: &mut Opener<'_>, reg: &RegFileEntry) -> Result<OwnedFd, Problem> {
    let both = RegFileEntry { flags: (libc::O_RDWR | libc::O_NONBLOCK) as u32, ..reg.clone() };
    // Were it a regular file by now, the check of its mode might be off (--skip-file-rwx-check).
    let path = regular::open(opener, &RegFileEntry { flags: libc::O_PATH as u32, ..reg.clone() })?;
    let stat =
        rustix::fs::fstat(&path).map_err(|e| Problem::new(text(&reg.name), e.to_string()))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return Err(Problem::new(
            text(&reg.name),
            "it was a FIFO (named pipe) at the dump and is none now",
        )
        .remedy("make it again: mkfifo"));
    }
    regular::open(opener, &both)
}

fn fill(both: &OwnedFd, name: &[u8], data: &PipeDataEntry, contents: &[u8]) -> Result<(), Problem> {
    let failed = |what: &str, e: rustix::io::Errno| {
        Problem::new(text(name), format!("the FIFO cannot be {what}: {e}"))
    };
    let now = rustix::io::ioctl_fionread(both).map_err(|e| failed("examined", e))?;
    if now != 0 {
        // Somebody outside the tree kept it open, and with it what was in it at the dump or came since.
        if now != contents.len() as u64 {
            log::warn!("the FIFO {} holds {now} bytes already; nothing is added", text(name));
        }
        return Ok(());
    }
    let size = rustix::pipe::fcntl_getpipe_size(both).map_err(|e| failed("examined", e))?;
    if let Some(wanted) = data.size.map(|s| s as usize).filter(|s| *s != size) {
        rustix::pipe::fcntl_setpipe_size(both, wanted)
            .map_err(|e| failed(&format!("given its capacity of {wanted} bytes"), e))?;
    }
    let mut rest = contents;
    while !rest.is_empty() {
        let done = rustix::io::write(both, rest).map_err(|e| failed("filled", e))?;
        rest = &rest[done..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn filled_once() {
        let path = std::env::temp_dir().join(format!("rewake-fifo-{}", std::process::id()));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let both = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let data = PipeDataEntry { size: Some(8192), ..PipeDataEntry::default() };
        for _ in 0..2 {
            fill(&both, b"fifo", &data, b"contents").unwrap();
            assert_eq!(rustix::io::ioctl_fionread(&both).unwrap(), 8);
        }
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&both).unwrap(), 8192);
    }
}
