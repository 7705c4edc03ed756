//! Ghost files: the content of files that have no name any more.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use crate::{
    error::{ImageError, Result},
    messages::{GhostChunkEntry, GhostFileEntry, ImageMessage},
    wire::{self, Fault, Reason},
};

/// A ghost file, both layouts alike: its image, and where in the image its content is.
#[derive(Debug)]
pub struct Ghost {
    /// Owner, mode, times and such.
    pub entry: GhostFileEntry,
    /// The stretches of content, as the image has them; what is in none is a hole.
    pub chunks: Vec<GhostChunk>,
    /// The image file, to read or copy the content from.
    pub file: File,
}

/// A stretch of a ghost file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GhostChunk {
    /// Its place in the ghost file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its place in the image file, in bytes.
    pub image_offset: u64,
}

impl Ghost {
    /// Reads an image file of `size` bytes that starts with `header` bytes of magic numbers (which are not looked at).
    pub(crate) fn read(path: &Path, file: File, size: u64, header: u64) -> Result<Self> {
        let (entry, chunks) = scan(path, size, header, |at, buf| file.read_exact_at(buf, at))?;
        Ok(Ghost { entry, chunks, file })
    }
}

/// Finds the stretches of content without reading them. `read_at` reads from the image at an offset.
pub fn scan(
    path: &Path,
    size: u64,
    header: u64,
    read_at: impl Fn(u64, &mut [u8]) -> io::Result<()>,
) -> Result<(GhostFileEntry, Vec<GhostChunk>)> {
    let mut scan = Scan { path, size, pos: header, index: 0, read_at };
    let entry: GhostFileEntry = scan.message()?;
    let mut chunks = Vec::new();
    if entry.chunks != Some(true) {
        if scan.pos < size {
            chunks.push(GhostChunk { offset: 0, length: size - scan.pos, image_offset: scan.pos });
        }
        return Ok((entry, chunks));
    }
    while scan.pos < size {
        let start = scan.pos;
        let chunk: GhostChunkEntry = scan.message()?;
        let left = size - scan.pos;
        let fault = if chunk.len > left {
            Some(Fault::new(0, Reason::Length { length: chunk.len, left }).within("len"))
        } else if chunk
            .off
            .checked_add(chunk.len)
            .is_none_or(|end| end > entry.size.unwrap_or(i64::MAX as u64))
        {
            Some(Fault::new(0, Reason::Range(chunk.off)).within("off"))
        } else {
            None
        };
        if let Some(mut fault) = fault {
            fault.offset = start + 4;
            return Err(ImageError::malformed(path, scan.index - 1, fault));
        }
        chunks.push(GhostChunk { offset: chunk.off, length: chunk.len, image_offset: scan.pos });
        scan.pos += chunk.len;
    }
    Ok((entry, chunks))
}

struct Scan<'p, R> {
    path: &'p Path,
    size: u64,
    pos: u64,
    index: usize,
    read_at: R,
}

impl<R: Fn(u64, &mut [u8]) -> io::Result<()>> Scan<'_, R> {
    fn message<M: ImageMessage>(&mut self) -> Result<M> {
        let mut length = [0; 4];
        self.read(&mut length, "a message's length")?;
        let length = u64::from(u32::from_le_bytes(length));
        let left = self.size - self.pos;
        if length > left {
            return Err(self.fault(Reason::Length { length, left }));
        }
        let start = self.pos;
        let mut message = vec![0; length as usize];
        self.read(&mut message, "the message")?;
        let message = wire::decode(&message).map_err(|mut fault| {
            fault.offset += start;
            ImageError::malformed(self.path, self.index, fault)
        })?;
        self.index += 1;
        Ok(message)
    }

    fn read(&mut self, buf: &mut [u8], what: &'static str) -> Result<()> {
        if buf.len() as u64 > self.size.saturating_sub(self.pos) {
            return Err(self.fault(Reason::Truncated(what)));
        }
        (self.read_at)(self.pos, buf).map_err(|e| ImageError::io("read", self.path, e))?;
        self.pos += buf.len() as u64;
        Ok(())
    }

    fn fault(&self, reason: Reason) -> ImageError {
        let fault = Fault { offset: self.pos, field: String::new(), reason };
        ImageError::malformed(self.path, self.index, fault)
    }
}
