//! The framing of an image file: header, messages with their lengths, payloads.
//!
//! Works on a file's bytes and borrows from them, so that nothing is allocated on the word of a length.

use std::path::{Path, PathBuf};

use crate::{
    descriptor::MessageDesc,
    error::{ImageError, Result},
    kind::{self, Header, KindInfo, Payload},
    messages::{GhostChunkEntry, ImageMessage, IpcMsg},
    wire::{self, Fault, Reason},
};

/// The messages of an image file, as bytes that were checked.
#[derive(Debug, Clone)]
pub struct RawImage<'a> {
    path: PathBuf,
    kind: &'static KindInfo,
    bytes: &'a [u8],
    pos: usize,
    index: usize,
    /// Whether the messages from here on are [`GhostChunkEntry`].
    chunks: bool,
}

/// A message of an image file.
#[derive(Debug, Clone, Copy)]
pub struct RawEntry<'a> {
    /// The message's type.
    pub desc: &'static MessageDesc,
    /// Its place among the messages of the file, from 0.
    pub index: usize,
    /// Where its first byte is in the file.
    pub offset: usize,
    /// The message; [`wire::check`] has passed it.
    pub message: &'a [u8],
    /// What follows it, see [`Payload`].
    pub payload: &'a [u8],
}

impl<'a> RawImage<'a> {
    /// A file of a known kind. `version` is the inventory's: 1 means that images start with their kind's number alone.
    /// The path is for the text of errors.
    pub fn new(
        path: &Path,
        kind: &'static KindInfo,
        version: u32,
        bytes: &'a [u8],
    ) -> Result<Self> {
        let numbers: &[u32] = match (kind.header, version) {
            (Header::Image(magic), 1) => &[magic],
            (Header::Image(magic), _) => &[kind::IMAGE_MAGIC, magic],
            (Header::Service(magic), _) => &[kind::SERVICE_MAGIC, magic],
            (Header::Inventory, _) => &[kind::INVENTORY_MAGIC],
            (Header::Unmarked, _) => &[],
        };
        let mut image = Self::at(path, kind, bytes, 0);
        for &expected in numbers {
            let found = u32::from_le_bytes(image.array("the magic number")?);
            if found != expected {
                return Err(ImageError::Magic {
                    path: path.to_owned(),
                    kind: kind.name,
                    expected,
                    found,
                });
            }
        }
        Ok(image)
    }

    /// A file whose magic number tells its kind, of whichever version.
    pub fn detect(path: &Path, bytes: &'a [u8]) -> Result<Self> {
        let word = |at| {
            bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
        };
        let (first, second) = (word(0), word(4));
        let (kind, header) = kind::by_magic(first, second)
            .ok_or_else(|| ImageError::UnknownMagic { path: path.to_owned(), first, second })?;
        Ok(Self::at(path, kind, bytes, header))
    }

    fn at(path: &Path, kind: &'static KindInfo, bytes: &'a [u8], pos: usize) -> Self {
        RawImage { path: path.to_owned(), kind, bytes, pos, index: 0, chunks: false }
    }

    /// The kind of the file.
    pub fn kind(&self) -> &'static KindInfo {
        self.kind
    }

    /// The file's name, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next message, or none at the end of the file.
    pub fn next_entry(&mut self) -> Result<Option<RawEntry<'a>>> {
        if self.pos == self.bytes.len() {
            return Ok(None);
        }
        let Some(desc) = self.next_desc() else {
            let what = Reason::Invalid("this kind of image has no messages".to_owned());
            return Err(self.fault(Fault::new(self.pos, what)));
        };
        let (offset, message) = self.frame(desc)?;
        let payload = self.payload(message, offset)?;
        let entry = RawEntry { desc, index: self.index, offset, message, payload };
        self.index += 1;
        Ok(Some(entry))
    }

    /// The error of something wrong with an entry: `fault`'s offset counts from the entry's first byte.
    pub(crate) fn entry_fault(&self, entry: &RawEntry<'_>, fault: Fault) -> ImageError {
        ImageError::malformed(&self.path, entry.index, fault.shifted(entry.offset))
    }

    fn next_desc(&self) -> Option<&'static MessageDesc> {
        if self.chunks { Some(GhostChunkEntry::desc()) } else { self.kind.message_at(self.index) }
    }

    fn fault(&self, fault: Fault) -> ImageError {
        ImageError::malformed(&self.path, self.index, fault)
    }

    /// Takes a length and a message of that length, and checks the message. Gives the message's offset, too.
    fn frame(&mut self, desc: &MessageDesc) -> Result<(usize, &'a [u8])> {
        let length = u32::from_le_bytes(self.array("a message's length")?);
        let offset = self.pos;
        let message = self.take(length.into(), "the message")?;
        wire::check(desc, message).map_err(|f| self.fault(f.shifted(offset)))?;
        Ok((offset, message))
    }

    /// Takes what follows a message.
    fn payload(&mut self, message: &[u8], offset: usize) -> Result<&'a [u8]> {
        let field = |number| wire::integer(message, number);
        let length = match self.kind.payload {
            Payload::Nothing => 0,
            // each is a 32-bit number, so the sum of two does not overflow
            Payload::Lengths(fields) => fields.iter().map(|&n| field(n)).sum(),
            Payload::Semaphores => field(2).next_multiple_of(4) * 2,
            Payload::SharedMemory if field(3) != 0 => 0,
            Payload::SharedMemory => {
                let size = field(2);
                size.checked_next_multiple_of(4).ok_or_else(|| {
                    self.fault(Fault::new(offset, Reason::Range(size)).within("size"))
                })?
            }
            Payload::Messages => return self.ipc_messages(field(3)),
            Payload::GhostContent if self.chunks => field(1),
            Payload::GhostContent if field(9) != 0 => {
                self.chunks = true;
                0
            }
            Payload::GhostContent => (self.bytes.len() - self.pos) as u64,
        };
        self.take(length, "the data after the message")
    }

    /// Takes the messages of an IPC message queue, to be read one by one with [`IpcMessages`].
    fn ipc_messages(&mut self, count: u64) -> Result<&'a [u8]> {
        let start = self.pos;
        for _ in 0..count {
            let (_, message) = self.frame(IpcMsg::desc())?;
            let size = wire::integer(message, 2);
            self.take(size.next_multiple_of(8), "the text of an IPC message")?;
        }
        Ok(&self.bytes[start..self.pos])
    }

    fn take(&mut self, length: u64, what: &'static str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.pos..];
        match usize::try_from(length).ok().and_then(|n| rest.get(..n)) {
            Some(taken) => {
                self.pos += taken.len();
                Ok(taken)
            }
            None => {
                let reason = Reason::Length { length, left: rest.len() as u64 };
                Err(self.fault(Fault::new(self.pos, reason).within(what)))
            }
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        match self.bytes[self.pos..].first_chunk::<N>() {
            Some(chunk) => {
                self.pos += N;
                Ok(*chunk)
            }
            None => Err(self.fault(Fault::new(self.pos, Reason::Truncated(what)))),
        }
    }
}

/// The messages in the payload of an [`IpcMsgEntry`](crate::messages::IpcMsgEntry), each with its text.
#[derive(Debug, Clone)]
pub struct IpcMessages<'a>(RawImage<'a>);

impl<'a> IpcMessages<'a> {
    /// Reads from the payload of `entry`, an entry of `image`.
    pub fn new(image: &RawImage<'_>, entry: &RawEntry<'a>) -> Self {
        IpcMessages(RawImage::at(&image.path, image.kind, entry.payload, 0))
    }

    /// The next message's bytes, and its text without padding.
    pub fn next_message(&mut self) -> Result<Option<(&'a [u8], &'a [u8])>> {
        if self.0.pos == self.0.bytes.len() {
            return Ok(None);
        }
        let (_, message) = self.0.frame(IpcMsg::desc())?;
        let size = wire::integer(message, 2);
        let text = self.0.take(size.next_multiple_of(8), "the text of an IPC message")?;
        self.0.index += 1;
        Ok(Some((message, &text[..size as usize])))
    }
}

/// Appends a message's length and the message.
pub(crate) fn put_frame<M: prost::Message>(buf: &mut Vec<u8>, message: &M) {
    let start = buf.len();
    buf.extend([0; 4]);
    message.encode_raw(buf);
    let length = (buf.len() - start - 4) as u32;
    buf[start..start + 4].copy_from_slice(&length.to_le_bytes());
}
