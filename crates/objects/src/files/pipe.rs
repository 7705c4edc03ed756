//! Pipes: pipe(7). Contents are copied with tee(2), which takes nothing out.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;

/// Surveys one end of a pipe.
///
/// # Errors
/// It is a FIFO or in packet mode, or its contents cannot be read.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    if !view.link.starts_with(b"pipe:[") {
        return Err(view.problem("FIFOs (named pipes) cannot be saved yet"));
    }
    if view.flags & libc::O_DIRECT as u32 != 0 {
        return Err(view.problem("pipes in packet mode (O_DIRECT) cannot be saved yet"));
    }
    let id = collector.new_id();
    let pipe_id = view.stat.st_ino as u32;
    let entry = PipeEntry { id, pipe_id, flags: view.flags, fown: view.owner()? };
    collector.push(FileEntry {
        r#type: FdTypes::Pipe as i32,
        id,
        pipe: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    // Contents can only be copied from a read end; if the tree holds none, they are lost to it anyway unless an
    // outsider reads them, so any end will do: /proc reopens it for reading.
    if collector.pipes.insert(view.stat.st_ino) {
        let (data, size) = contents(view)?;
        let entry = PipeDataEntry { pipe_id, bytes: data.len() as u32, size: Some(size) };
        collector.pipe_data.push((entry, data));
    }
    Ok((id, FdTypes::Pipe))
}

/// Copies what is in the pipe of `view` and tells its capacity in bytes.
///
/// # Errors
/// Not everything can be copied.
pub(super) fn contents(view: &View<'_>) -> Result<(Vec<u8>, u32), Problem> {
    let failed = |e: rustix::io::Errno| view.problem(format!("its contents cannot be read: {e}"));
    let size = rustix::pipe::fcntl_getpipe_size(view.as_fd()).map_err(failed)?;
    let waiting = rustix::io::ioctl_fionread(view.as_fd()).map_err(failed)?;
    if waiting == 0 {
        return Ok((Vec::new(), size as u32));
    }
    let own = format!("/proc/self/fd/{}", view.as_fd().as_raw_fd());
    let reader =
        rustix::fs::open(own, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
    let (copy_out, copy_in) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
    // One slot a buffer of the source, however little is in it.
    rustix::pipe::fcntl_setpipe_size(&copy_in, size).map_err(failed)?;
    let got = rustix::pipe::tee(&reader, &copy_in, size, rustix::pipe::SpliceFlags::NONBLOCK)
        .map_err(failed)?;
    if got as u64 != waiting {
        return Err(view.problem(format!("only {got} of its {waiting} bytes can be copied")));
    }
    let mut data = vec![0; got];
    let mut filled = 0;
    while filled < got {
        filled += rustix::io::read(&copy_out, &mut data[filled..]).map_err(failed)?;
    }
    Ok((data, size as u32))
}

/// Both ends of a restored pipe, for everyone who holds one.
#[derive(Debug)]
pub struct Ends {
    /// The read end, and whether a description of the image got it.
    read: (OwnedFd, bool),
    /// The write end, likewise.
    write: (OwnedFd, bool),
}

/// Opens one end of a pipe of the image; the first one makes the pipe and fills it.
///
/// # Errors
/// The pipe cannot be made as large as it was, or not be filled.
pub fn open(opener: &mut Opener<'_>, pipe: &PipeEntry) -> Result<OwnedFd, Problem> {
    let object = format!("pipe:[{}]", pipe.pipe_id);
    let failed = |what: &str, e: rustix::io::Errno| {
        Problem::new(object.clone(), format!("cannot be {what}: {e}"))
    };
    if !opener.pipes.contains_key(&pipe.pipe_id) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| failed("made", e))?;
        if let Some((data, contents)) = opener.pipe_data.get(&pipe.pipe_id) {
            let default =
                rustix::pipe::fcntl_getpipe_size(&write).map_err(|e| failed("made", e))?;
            if let Some(size) = data.size.map(|s| s as usize).filter(|s| *s != default) {
                rustix::pipe::fcntl_setpipe_size(&write, size)
                    .map_err(|e| failed(&format!("given its capacity of {size} bytes"), e))?;
            }
            rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK).map_err(|e| failed("filled", e))?;
            let mut rest = contents.as_slice();
            while !rest.is_empty() {
                let done = rustix::io::write(&write, rest).map_err(|e| failed("filled", e))?;
                rest = &rest[done..];
            }
        }
        opener.pipes.insert(pipe.pipe_id, Ends { read: (read, false), write: (write, false) });
    }
    let Some(ends) = opener.pipes.get_mut(&pipe.pipe_id) else {
        return Err(Problem::new(object, "was not made"));
    };
    let access = OFlags::from_bits_retain(pipe.flags) & OFlags::RWMODE;
    let (end, used) = if access == OFlags::RDONLY { &mut ends.read } else { &mut ends.write };
    if !std::mem::replace(used, true) && access != OFlags::RDWR {
        let own = end.try_clone().map_err(|e| Problem::new(object.clone(), e.to_string()))?;
        // Filling it may have left O_NONBLOCK on; the flags of the image are set by the caller.
        return Ok(own);
    }
    // A further description of the same end.
    let own = format!("/proc/self/fd/{}", end.as_fd().as_raw_fd());
    rustix::fs::open(own, access | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed("opened", e))
}
