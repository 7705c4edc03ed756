//! Writing a checkpoint, so that it appears whole or not at all.
//!
//! A directory holds a checkpoint if it has an `inventory.img`; so that file comes last, by rename. A directory that holds
//! an older checkpoint keeps it until then: the new one is written into a hidden directory within.

use std::{
    fs::File,
    marker::PhantomData,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{self, AtFlags, FlockOperation, Mode},
    io::Errno,
};

use crate::{
    compress::{Compression, Packer},
    error::{ImageError, Result},
    file::Dir,
    kind::{self, Id, Kind, KindInfo},
    manifest::{self, FileSum, is_plain_name},
    messages::{ImageMessage, InventoryEntry, PagemapHead},
    pagemap::{PageRun, Pagemap},
    raw::put_frame,
};

/// What the names of hidden files and directories start with.
pub(crate) const HIDDEN: &str = ".rewake-";
/// The link to the directory with the pages that did not change.
pub(crate) const PARENT: &str = "parent";
/// The inventory before it gets its name.
const NEW_INVENTORY: &str = ".rewake-inventory";
/// How much a [`Stream`] gathers before it writes.
const STREAM_BUFFER: usize = 256 << 10;

/// Writes a checkpoint to a directory. Without a [`commit`](ImageWriter::commit), all that was written is removed.
///
/// Many threads may write files at once; each file is written by one.
#[derive(Debug)]
pub struct ImageWriter {
    /// The images directory, locked as long as this lives.
    dir: Dir,
    /// The hidden directory that is written to, if the images directory holds an older checkpoint.
    stage: Option<Stage>,
    files: Mutex<Vec<Written>>,
    /// How page stores are compressed.
    compression: Option<Compression>,
    /// There is a link to the parent.
    linked: AtomicBool,
    /// The older checkpoint is gone, and files of this one are where its were.
    replacing: bool,
    finished: bool,
}

#[derive(Debug)]
struct Stage {
    name: String,
    dir: Dir,
    /// The files of the older checkpoint.
    old: Vec<String>,
}

#[derive(Debug)]
struct Written {
    name: String,
    sum: Sum,
}

#[derive(Debug, Clone, Copy)]
enum Sum {
    /// Someone still writes to it.
    Unfinished,
    /// Someone else wrote it; its size is to be asked for.
    Raw,
    Known(FileSum),
}

impl ImageWriter {
    /// Begins a checkpoint in an existing directory.
    ///
    /// What a killed dump left there (files without an inventory, hidden directories) is removed. Files that are no images
    /// are left alone.
    ///
    /// # Errors
    /// [`ImageError::Busy`] if another writer is at work in the directory.
    pub fn create(path: &Path) -> Result<Self> {
        let dir = Dir::open(path)?;
        // other errors: some network file systems have no locks for directories, and nobody guards against a second writer
        if let Err(Errno::WOULDBLOCK) = fs::flock(&dir.fd, FlockOperation::NonBlockingLockExclusive)
        {
            return Err(ImageError::Busy(path.to_owned()));
        }
        let (hidden, others): (Vec<_>, Vec<_>) =
            dir.names()?.into_iter().partition(|name| name.starts_with(HIDDEN));
        for name in &hidden {
            remove_leftover(&dir, name)?;
        }
        let complete = others.iter().any(|name| *name == kind::INVENTORY.file_name(()));
        let is_link = |name: &str| name == PARENT && is_link(&dir, name);
        let images: Vec<String> =
            others.into_iter().filter(|name| is_image_file(name) || is_link(name)).collect();
        let stage = if complete {
            Some(Stage::create(&dir, images)?)
        } else {
            images.iter().try_for_each(|name| dir.remove(name))?;
            None
        };
        Ok(ImageWriter {
            dir,
            stage,
            files: Mutex::default(),
            compression: None,
            linked: AtomicBool::new(false),
            replacing: false,
            finished: false,
        })
    }

    /// Compresses the page stores that are written from now on: all of them or none. The inventory must say so
    /// ([`Compression::version`]).
    pub fn compress(&mut self, compression: Option<Compression>) {
        self.compression = compression;
    }

    /// The images directory.
    pub fn path(&self) -> &Path {
        &self.dir.path
    }

    /// Names the directory that has the pages which this checkpoint leaves to its parent, relative to the images directory.
    pub fn link_parent(&self, parent: &Path) -> Result<()> {
        let target = self.target();
        fs::symlinkat(parent, &target.fd, PARENT)
            .map_err(|e| ImageError::write("create", &target.path, PARENT, e))?;
        self.linked.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a file of one message.
    pub fn write_one<M: ImageMessage>(
        &self,
        kind: Kind<M>,
        id: impl Into<Id>,
        message: &M,
    ) -> Result<()> {
        let mut buf = kind.info().header_bytes();
        buf.reserve_exact(4 + message.encoded_len());
        put_frame(&mut buf, message);
        self.write_whole(kind.file_name(id), &buf)
    }

    /// Writes a file of messages; if there are none, no file.
    pub fn write_all<'m, M: ImageMessage + 'm>(
        &self,
        kind: Kind<M>,
        id: impl Into<Id>,
        messages: impl IntoIterator<Item = &'m M>,
    ) -> Result<()> {
        let mut messages = messages.into_iter().peekable();
        if messages.peek().is_none() {
            return Ok(());
        }
        let mut buf = kind.info().header_bytes();
        for message in messages {
            put_frame(&mut buf, message);
        }
        self.write_whole(kind.file_name(id), &buf)
    }

    /// Writes the pagemap of a process, whose stored pages are in `pages-{pages_id}.img`.
    pub fn write_pagemap(&self, pid: impl Into<Id>, pages_id: u32, runs: &[PageRun]) -> Result<()> {
        self.pagemap(kind::PAGEMAP, pid.into(), pages_id, runs)
    }

    /// Writes the pagemap of a shared memory segment.
    pub fn write_pagemap_shmem(
        &self,
        id: impl Into<Id>,
        pages_id: u32,
        runs: &[PageRun],
    ) -> Result<()> {
        self.pagemap(kind::SHMEM_PAGEMAP, id.into(), pages_id, runs)
    }

    fn pagemap(&self, kind: Kind<Pagemap>, id: Id, pages_id: u32, runs: &[PageRun]) -> Result<()> {
        let mut buf = kind.info().header_bytes();
        put_frame(&mut buf, &PagemapHead { pages_id });
        for run in runs {
            put_frame(&mut buf, &run.to_message());
        }
        self.write_whole(kind.file_name(id), &buf)
    }

    /// Begins a file of messages that come one by one, with or without payloads. It is created with the first of them.
    pub fn stream<M>(&self, kind: Kind<M>, id: impl Into<Id>) -> Stream<'_, M> {
        Stream {
            writer: self,
            kind: kind.info(),
            name: kind.file_name(id),
            buf: Vec::new(),
            open: None,
            content: PhantomData,
        }
    }

    /// Writes a file without messages.
    pub fn write_raw(&self, name: &str, content: &[u8]) -> Result<()> {
        check_name(name)?;
        self.write_whole(name.to_owned(), content)
    }

    /// Creates a file without messages, for others to write to until the commit. The manifest has no checksum of it.
    pub fn create_raw(&self, name: &str) -> Result<File> {
        check_name(name)?;
        let fd = self.target().create(name)?;
        self.files().push(Written { name: name.to_owned(), sum: Sum::Raw });
        Ok(fd.into())
    }

    /// Begins a file without messages that is written from its start to its end; its checksum is made on the way.
    pub fn raw_stream(&self, name: &str) -> Result<RawStream<'_>> {
        check_name(name)?;
        let fd = self.target().create(name)?;
        let mut files = self.files();
        let index = files.len();
        files.push(Written { name: name.to_owned(), sum: Sum::Unfinished });
        let hasher = crc32fast::Hasher::new();
        Ok(RawStream { writer: self, file: fd.into(), index, size: 0, hasher })
    }

    /// Begins the page store `pages-{pages_id}.img`.
    pub fn page_stream(&self, pages_id: u32) -> Result<PageStream<'_>> {
        let stream = self.raw_stream(&kind::PAGES.file_name(pages_id))?;
        Ok(PageStream { stream, packer: self.compression.map(Packer::new) })
    }

    fn write_whole(&self, name: String, content: &[u8]) -> Result<()> {
        let target = self.target();
        let fd = target.create(&name)?;
        let result = target.write(&name, &fd, content);
        let sum = match result {
            Ok(()) => Sum::Known(FileSum {
                size: content.len() as u64,
                crc: Some(crc32fast::hash(content)),
            }),
            Err(_) => Sum::Unfinished,
        };
        self.files().push(Written { name, sum });
        result
    }

    /// Completes the checkpoint: after this, and not before, the directory holds it.
    ///
    /// # Errors
    /// The checkpoint is removed again, as by [`abort`](ImageWriter::abort). If it could not take the place of an older
    /// one because a rename failed, that is gone too.
    pub fn commit(mut self, inventory: &InventoryEntry) -> Result<()> {
        let inventory_name = kind::INVENTORY.file_name(());
        let mut inventory_image = kind::INVENTORY.info().header_bytes();
        put_frame(&mut inventory_image, inventory);

        let mut sums = self.sums()?;
        sums.push((
            inventory_name.clone(),
            FileSum {
                size: inventory_image.len() as u64,
                crc: Some(crc32fast::hash(&inventory_image)),
            },
        ));
        let manifest = manifest::format(sums.iter().map(|(name, sum)| (name.as_str(), *sum)));
        self.write_whole(manifest::FILE_NAME.to_owned(), manifest.as_bytes())?;
        self.write_whole(NEW_INVENTORY.to_owned(), &inventory_image)?;

        if let Some(stage) = &self.stage {
            // with its inventory the older checkpoint ceases to be one, so that nobody reads a mixture
            self.dir.remove(&inventory_name)?;
            self.replacing = true;
            // removed and not renamed over: for that ext4 would write the new content to the disk at once
            stage.old.iter().try_for_each(|name| self.dir.remove(name))?;
            let moved =
                sums.iter().map(|(name, _)| name.as_str()).filter(|name| *name != inventory_name);
            let link = self.linked.load(Ordering::Relaxed).then_some(PARENT);
            moved
                .chain([manifest::FILE_NAME])
                .chain(link)
                .try_for_each(|name| self.rename(name, name))?;
        }
        self.rename(NEW_INVENTORY, &inventory_name)?;
        self.finished = true;
        if let Some(stage) = &self.stage {
            // an empty directory left behind does no harm: the next dump removes it
            let _ = fs::unlinkat(&self.dir.fd, &stage.name, AtFlags::REMOVEDIR);
        }
        Ok(())
    }

    /// Removes all that was written. Dropping does the same, but does not say if it failed.
    pub fn abort(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        self.finished = true;
        let mut files = std::mem::take(&mut *self.files());
        if self.linked.load(Ordering::Relaxed) {
            files.push(Written { name: PARENT.to_owned(), sum: Sum::Unfinished });
        }
        let mut result = Ok(());
        for Written { name, .. } in &files {
            result = result.and(self.target().remove(name));
        }
        if let Some(stage) = &self.stage {
            if self.replacing {
                for Written { name, .. } in &files {
                    result = result.and(self.dir.remove(name));
                }
            }
            result = result.and(
                fs::unlinkat(&self.dir.fd, &stage.name, AtFlags::REMOVEDIR)
                    .map_err(|e| ImageError::io("remove", &stage.dir.path, e)),
            );
        }
        result
    }

    /// Name, size and checksum of all files.
    fn sums(&self) -> Result<Vec<(String, FileSum)>> {
        let target = self.target();
        let size = |name: &str| match fs::statat(&target.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(FileSum { size: stat.st_size.cast_unsigned(), crc: None }),
            Err(e) => Err(ImageError::io("examine", &target.path.join(name), e)),
        };
        let files = self.files();
        let sums = files.iter().map(|Written { name, sum }| match sum {
            Sum::Known(sum) => Ok((name.clone(), *sum)),
            Sum::Raw => Ok((name.clone(), size(name)?)),
            Sum::Unfinished => Err(ImageError::Unfinished(target.path.join(name))),
        });
        sums.collect()
    }

    /// The directory that files are written to.
    fn target(&self) -> &Dir {
        self.stage.as_ref().map_or(&self.dir, |stage| &stage.dir)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        fs::renameat(&self.target().fd, from, &self.dir.fd, to)
            .map_err(|e| ImageError::write("put in place", &self.dir.path, to, e))
    }

    fn files(&self) -> MutexGuard<'_, Vec<Written>> {
        // a list of files is whole whatever a thread that panicked was doing
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.undo();
        }
    }
}

impl Stage {
    fn create(dir: &Dir, old: Vec<String>) -> Result<Self> {
        loop {
            let name = format!("{HIDDEN}{:08x}", random()?);
            match fs::mkdirat(&dir.fd, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let path = dir.path.join(&name);
                    return Ok(Stage { dir: Dir::open(&path)?, name, old });
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(ImageError::write("create", &dir.path, &name, e)),
            }
        }
    }
}

/// A file without messages, written from its start to its end.
///
/// If it is dropped without [`finish`](RawStream::finish), the writer will not commit.
#[derive(Debug)]
pub struct RawStream<'w> {
    writer: &'w ImageWriter,
    file: File,
    /// Its place in the writer's list.
    index: usize,
    size: u64,
    hasher: crc32fast::Hasher,
}

impl std::io::Write for RawStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl RawStream<'_> {
    /// Completes the file.
    pub fn finish(self) {
        let sum = FileSum { size: self.size, crc: Some(self.hasher.finalize()) };
        self.writer.files()[self.index].sum = Sum::Known(sum);
    }
}

/// A page store that is written from its start to its end, compressed if the checkpoint's are.
///
/// If it is dropped without [`finish`](PageStream::finish), the writer will not commit.
#[derive(Debug)]
#[must_use = "a page store is complete only with `finish`"]
pub struct PageStream<'w> {
    stream: RawStream<'w>,
    packer: Option<Packer>,
}

impl std::io::Write for PageStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.packer {
            None => self.stream.write(bytes),
            Some(packer) => packer.push(bytes, &mut self.stream).map(|()| bytes.len()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

impl PageStream<'_> {
    /// The file, to read what was written.
    ///
    /// # Errors
    /// There are too many open files.
    pub fn file(&self) -> std::io::Result<File> {
        self.stream.file.try_clone()
    }

    /// Completes the file.
    ///
    /// # Errors
    /// What is left of it cannot be written.
    pub fn finish(mut self) -> std::io::Result<()> {
        if let Some(packer) = self.packer.take() {
            packer.finish(&mut self.stream)?;
        }
        self.stream.finish();
        Ok(())
    }
}

/// A file of messages that come one by one.
///
/// If it is dropped without [`finish`](Stream::finish) after something was pushed, the writer will not commit.
#[derive(Debug)]
#[must_use = "a stream writes nothing until something is pushed, and all of it only with `finish`"]
pub struct Stream<'w, M> {
    writer: &'w ImageWriter,
    kind: &'static KindInfo,
    name: String,
    buf: Vec<u8>,
    open: Option<Open>,
    content: PhantomData<fn(&M)>,
}

#[derive(Debug)]
struct Open {
    fd: OwnedFd,
    /// Its place in the writer's list.
    index: usize,
    size: u64,
    hasher: crc32fast::Hasher,
}

impl<M> Stream<'_, M> {
    /// Appends a message.
    pub fn push(&mut self, message: &M) -> Result<()>
    where
        M: ImageMessage,
    {
        self.push_other(message)
    }

    /// Appends a message of another type than the file's usual one, such as the chunks of a ghost file and the messages of
    /// an IPC queue.
    pub fn push_other(&mut self, message: &impl ImageMessage) -> Result<()> {
        self.ensure_open()?;
        put_frame(&mut self.buf, message);
        if self.buf.len() > STREAM_BUFFER { self.flush() } else { Ok(()) }
    }

    /// Appends what follows a message.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<()> {
        self.ensure_open()?;
        if self.buf.len() + bytes.len() <= STREAM_BUFFER {
            self.buf.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        self.emit(bytes)
    }

    /// Appends what follows a message, and zeros until its length is a multiple of `unit`.
    pub fn payload_padded(&mut self, bytes: &[u8], unit: usize) -> Result<()> {
        self.payload(bytes)?;
        self.payload(&vec![0; bytes.len().next_multiple_of(unit) - bytes.len()])
    }

    /// Writes what is left, and closes the file. Without anything pushed there is no file.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        if let Some(Open { index, size, hasher, .. }) = self.open.take() {
            let sum = FileSum { size, crc: Some(hasher.finalize()) };
            self.writer.files()[index].sum = Sum::Known(sum);
        }
        Ok(())
    }

    fn ensure_open(&mut self) -> Result<()> {
        if self.open.is_none() {
            let fd = self.writer.target().create(&self.name)?;
            let mut files = self.writer.files();
            let index = files.len();
            files.push(Written { name: self.name.clone(), sum: Sum::Unfinished });
            self.open = Some(Open { fd, index, size: 0, hasher: crc32fast::Hasher::new() });
            self.buf = self.kind.header_bytes();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut buf = std::mem::take(&mut self.buf);
        self.emit(&buf)?;
        buf.clear();
        self.buf = buf;
        Ok(())
    }

    fn emit(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(open) = &mut self.open {
            self.writer.target().write(&self.name, &open.fd, bytes)?;
            open.hasher.update(bytes);
            open.size += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Writes a single file outside a checkpoint, such as `stats-dump`, over one that may be there.
pub fn write_file<'m, M: ImageMessage + 'm>(
    path: &Path,
    kind: Kind<M>,
    messages: impl IntoIterator<Item = &'m M>,
) -> Result<()> {
    let mut buf = kind.info().header_bytes();
    for message in messages {
        put_frame(&mut buf, message);
    }
    std::fs::write(path, buf).map_err(|e| ImageError::io("write", path, e))
}

/// Whether a name is an image's, or the manifest's. Files about a run, such as `stats-dump`, are neither.
fn is_image_file(name: &str) -> bool {
    name == manifest::FILE_NAME || (name.ends_with(".img") && kind::by_file_name(name).is_some())
}

fn is_link(dir: &Dir, name: &str) -> bool {
    fs::statat(&dir.fd, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| fs::FileType::from_raw_mode(stat.st_mode).is_symlink())
}

fn check_name(name: &str) -> Result<()> {
    let reserved = name == manifest::FILE_NAME
        || name == kind::INVENTORY.file_name(())
        || name.starts_with(HIDDEN)
        || name == "."
        || name == "..";
    if reserved || !is_plain_name(name) {
        Err(ImageError::BadName(name.to_owned()))
    } else {
        Ok(())
    }
}

/// Removes what a killed dump left: its hidden directory or its inventory without a name.
fn remove_leftover(dir: &Dir, name: &str) -> Result<()> {
    match fs::unlinkat(&dir.fd, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(e) => return Err(ImageError::io("remove", &dir.path.join(name), e)),
    }
    let inner = Dir::open(&dir.path.join(name))?;
    inner.names()?.iter().filter(|n| *n != "." && *n != "..").try_for_each(|n| inner.remove(n))?;
    fs::unlinkat(&dir.fd, name, AtFlags::REMOVEDIR)
        .map_err(|e| ImageError::io("remove", &inner.path, e))
}

fn random() -> Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| ImageError::io("read", Path::new("/dev/urandom"), e))?;
    Ok(u32::from_ne_bytes(bytes))
}
