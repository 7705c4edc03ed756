//! Pipes: pipe(7). Contents are copied with tee(2), which takes nothing out.
//!
//! In packet mode (`O_DIRECT`) a read ends where a write did. The image has no place for that: lengths of packets are our
//! own extra state of the file id by which the contents were found.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, FownEntry, PipeDataEntry, PipeEntry};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;

/// Surveys one end of a pipe.
///
/// # Errors
/// It is a FIFO, or its contents cannot be read.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    if !view.link.starts_with(b"pipe:[") {
        return Err(view.problem("FIFOs (named pipes) cannot be saved yet"));
    }
    let pipe_id = view.stat.st_ino as u32;
    let id = add(collector, pipe_id, view.flags, view.owner()?);
    // Contents can only be copied from a read end; if the tree holds none, they are lost to it anyway unless an
    // outsider reads them, so any end will do: /proc reopens it for reading.
    if collector.pipes.insert(view.stat.st_ino) {
        let Held { data, size, reads } = contents(&mut collector.copier, view)?;
        let entry = PipeDataEntry { pipe_id, bytes: data.len() as u32, size: Some(size) };
        collector.pipe_data.push((entry, data));
        // Whether what one read takes is a packet can only be told from the mode.
        if reads.len() > 1 || !reads.is_empty() && view.flags & libc::O_DIRECT as u32 != 0 {
            collector.extra_of(id).packets = reads;
        }
    }
    Ok((id, FdTypes::Pipe))
}

/// Adds an end of a pipe.
pub(super) fn add(collector: &mut Collector, pipe_id: u32, flags: u32, fown: FownEntry) -> u32 {
    let id = collector.new_id();
    let entry = PipeEntry { id, pipe_id, flags, fown };
    collector.push(FileEntry {
        r#type: FdTypes::Pipe as i32,
        id,
        pipe: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    id
}

/// What is in a pipe.
#[derive(Debug)]
pub(super) struct Held {
    pub data: Vec<u8>,
    /// Capacity in bytes.
    pub size: u32,
    /// How many bytes each read takes: all at once, but for packets.
    pub reads: Vec<u32>,
}

/// Copies what is in the pipe of `view`.
///
/// # Errors
/// Not everything can be copied.
pub(super) fn contents(copier: &mut Copier, view: &View<'_>) -> Result<Held, Problem> {
    copier
        .copy(view.as_fd(), view.flags)
        .map_err(|e| view.problem(format!("its contents cannot be read: {e}")))
}

/// A pipe into which the contents of others are copied, made with the first of them.
#[derive(Debug, Default)]
pub(super) struct Copier(Option<Empty>);

/// A pipe with nothing in it.
#[derive(Debug)]
struct Empty {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

impl Copier {
    /// Copies what is in the pipe `fd`, which was opened with `flags`.
    ///
    /// # Errors
    /// Not everything can be copied.
    fn copy(&mut self, fd: BorrowedFd<'_>, flags: u32) -> Result<Held, String> {
        let failed = |e: rustix::io::Errno| e.to_string();
        let size = rustix::pipe::fcntl_getpipe_size(fd).map_err(failed)?;
        let waiting = rustix::io::ioctl_fionread(fd).map_err(failed)?;
        if waiting == 0 {
            return Ok(Held { data: Vec::new(), size: size as u32, reads: Vec::new() });
        }
        let access = OFlags::from_bits_retain(flags) & OFlags::RWMODE;
        let reader = match access {
            OFlags::RDONLY | OFlags::RDWR => None,
            _ => {
                let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
                Some(rustix::fs::open(own, how, Mode::empty()).map_err(failed)?)
            }
        };
        let reader = reader.as_ref().map_or(fd, OwnedFd::as_fd);
        // Taken out: after a failure something may be left in it.
        let copy = match self.0.take().filter(|copy| copy.size >= size) {
            Some(copy) => copy,
            None => Empty::with_size(size).map_err(failed)?,
        };
        let got = rustix::pipe::tee(reader, &copy.write, size, rustix::pipe::SpliceFlags::NONBLOCK)
            .map_err(failed)?;
        if got as u64 != waiting {
            return Err(format!("only {got} of its {waiting} bytes can be copied"));
        }
        let mut data = vec![0; got];
        let mut filled = 0;
        let mut reads = Vec::new();
        while filled < got {
            let taken = rustix::io::read(&copy.read, &mut data[filled..]).map_err(failed)?;
            reads.push(taken as u32);
            filled += taken;
        }
        self.0 = Some(copy);
        Ok(Held { data, size: size as u32, reads })
    }
}

impl Empty {
    fn with_size(size: usize) -> rustix::io::Result<Empty> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // One slot a buffer of the source, however little is in it.
        if rustix::pipe::fcntl_getpipe_size(&write)? < size {
            rustix::pipe::fcntl_setpipe_size(&write, size)?;
        }
        Ok(Empty { read, write, size })
    }
}

/// The lengths of the packets in a pipe of the image; empty if there are none.
fn packets<'o>(opener: &'o Opener<'_>, pipe_id: u32) -> &'o [u32] {
    let of_pipe = |id: &u32| {
        let file = opener.files.get(id);
        file.and_then(|f| f.pipe.as_ref()).is_some_and(|p| p.pipe_id == pipe_id)
    };
    let mut extra = opener.extra.iter().filter(|(_, extra)| !extra.packets.is_empty());
    extra.find(|(id, _)| of_pipe(id)).map_or(&[], |(_, extra)| &extra.packets)
}

/// Puts `contents` into a pipe: as packets of these lengths, what is left over as a stream. `O_NONBLOCK` stays on, so
/// that a pipe that is too small is an error.
fn fill(write: &OwnedFd, contents: &[u8], packets: &[u32]) -> rustix::io::Result<()> {
    let mut rest = contents;
    if !packets.is_empty() {
        rustix::fs::fcntl_setfl(write, OFlags::NONBLOCK | OFlags::DIRECT)?;
    }
    for length in packets {
        let Some((packet, after)) = rest.split_at_checked(*length as usize) else { break };
        // Larger ones than a page cannot have been.
        let done = rustix::io::write(write, packet)?;
        if done != packet.len() {
            return Err(rustix::io::Errno::AGAIN);
        }
        rest = after;
    }
    rustix::fs::fcntl_setfl(write, OFlags::NONBLOCK)?;
    while !rest.is_empty() {
        let done = rustix::io::write(write, rest)?;
        rest = &rest[done..];
    }
    Ok(())
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
            fill(&write, contents, packets(opener, pipe.pipe_id))
                .map_err(|e| failed("filled", e))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_sys::file;

    #[test]
    fn one_pipe_serves_to_copy_several() {
        let flags = rustix::pipe::PipeFlags::CLOEXEC;
        let mut copier = Copier::default();
        // The second needs more room than the first, the third less.
        for (size, text) in [(8192, "first"), (65536, "second"), (4096, "third")] {
            let (read, write) = rustix::pipe::pipe_with(flags).unwrap();
            rustix::pipe::fcntl_setpipe_size(&write, size).unwrap();
            rustix::io::write(&write, text.as_bytes()).unwrap();
            for end in [&read, &write] {
                let flags = file::flags(end.as_fd()).unwrap();
                let held = copier.copy(end.as_fd(), flags).unwrap();
                assert_eq!((held.data.as_slice(), held.size as usize), (text.as_bytes(), size));
                assert_eq!(held.reads, [text.len() as u32]);
            }
            let mut left = [0; 16];
            assert_eq!(rustix::io::read(&read, &mut left), Ok(text.len()));
        }
    }
}
