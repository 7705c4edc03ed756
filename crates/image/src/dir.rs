//! Reading a checkpoint.

use std::{
    collections::HashMap,
    fs::File,
    num::NonZeroU64,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::{
    chain::{self, PageStore, StoredPages},
    compress::{self, Compression},
    error::{ImageError, Result},
    file::Dir,
    ghost::Ghost,
    kind::{self, Id, Kind, KindInfo, Raw},
    manifest::{self, Manifest},
    messages::{ImageMessage, InventoryEntry, IpcMsg, IpcMsgEntry},
    pagemap::{Pagemap, SEVERAL_STORES},
    raw::{IpcMessages, RawEntry, RawImage},
    raw_check::{Raw as RawFile, RawCheck},
    wire,
};

/// A directory that holds a complete checkpoint.
#[derive(Debug)]
pub struct ImageDir {
    dir: Dir,
    inventory: InventoryEntry,
    manifest: Option<Manifest>,
    /// Parents, the nearest first; see [`ImageDir::with_parents`].
    parents: Vec<ImageDir>,
    /// Page stores that were decompressed.
    expanded: Mutex<HashMap<String, File>>,
}

/// How to open a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// Compare what is read with the manifest, if there is one. Off for images that were edited on purpose.
    pub verify: bool,
    /// Accept a pre-dump: memory alone, to be the parent of a checkpoint.
    pub pre_dump: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { verify: true, pre_dump: false }
    }
}

impl ImageDir {
    /// Opens a checkpoint: reads its inventory and, if there is one, its manifest.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// Opens a checkpoint with other than the usual options.
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let dir = Dir::open(path.as_ref())?;
        let manifest = if options.verify { read_manifest(&dir)? } else { None };
        let mut images = ImageDir {
            dir,
            manifest,
            inventory: InventoryEntry::default(),
            parents: Vec::new(),
            expanded: Mutex::default(),
        };
        let inventory = images.read_opt(kind::INVENTORY, ())?;
        images.inventory =
            inventory.ok_or_else(|| ImageError::NoCheckpoint(images.dir.path.clone()))?;
        match images.inventory.img_version {
            1 | 2 | SEVERAL_STORES => Ok(images),
            version if Compression::of_version(version).is_some() => Ok(images),
            0 if options.pre_dump => Ok(images),
            0 if images.inventory.pre_dump_mode.is_some() => {
                Err(ImageError::PreDump(images.dir.path))
            }
            version => Err(ImageError::Version {
                path: images.path_of(&kind::INVENTORY.file_name(())),
                version,
            }),
        }
    }

    /// The checkpoint this one leaves unchanged pages to, through the symbolic link `parent`.
    pub fn parent(&self) -> Result<Option<Self>> {
        let path = self.dir.path.join("parent");
        match path.symlink_metadata() {
            Ok(_) => {
                let options = OpenOptions { verify: self.manifest.is_some(), pre_dump: true };
                Self::open_with(path, options).map(Some)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ImageError::io("examine", &path, e)),
        }
    }

    /// Opens the checkpoints that this one leaves pages to, all the way back.
    ///
    /// # Errors
    /// One of them is no checkpoint or pre-dump, or they go round in a circle.
    pub fn with_parents(mut self) -> Result<Self> {
        self.parents = chain::ancestors(&self)?;
        Ok(self)
    }

    /// This directory and its parents.
    fn chain(&self) -> Vec<&ImageDir> {
        std::iter::once(self).chain(&self.parents).collect()
    }

    /// Where the pages of a process are, here or in the parents. Call [`ImageDir::with_parents`] before.
    ///
    /// # Errors
    /// A parent lacks pages that are left to it.
    pub fn stored_pages(&self, pid: impl Into<Id>) -> Result<Option<StoredPages>> {
        chain::resolve(&self.chain(), kind::PAGEMAP, pid.into())
    }

    /// Where the pages of a shared memory segment are, as [`ImageDir::stored_pages`].
    ///
    /// # Errors
    /// A parent lacks pages that are left to it.
    pub fn stored_pages_shmem(&self, id: impl Into<Id>) -> Result<Option<StoredPages>> {
        chain::resolve(&self.chain(), kind::SHMEM_PAGEMAP, id.into())
    }

    /// Opens a pages file, here or of a parent.
    ///
    /// # Errors
    /// It is missing or has not its size.
    pub fn open_store(&self, store: PageStore) -> Result<File> {
        chain::open(&self.chain(), store)
    }

    /// Has the kernel read the stored pages of all shared memory, here or in the parents, from the disk; nobody waits for it.
    /// What cannot be read is told whoever reads it.
    pub fn prefetch_shmem(&self) {
        let mut wanted: HashMap<PageStore, (u64, u64)> = HashMap::new();
        for name in self.dir.names().unwrap_or_default() {
            let Some((kind, id)) = kind::by_file_name(&name) else { continue };
            if kind.name != kind::SHMEM_PAGEMAP.info().name {
                continue;
            }
            let Ok(Some(pages)) = self.stored_pages_shmem(id) else { continue };
            for run in &pages.runs {
                let (start, end) = (run.offset, run.offset.saturating_add(run.bytes()));
                let range = wanted.entry(run.store).or_insert((start, end));
                *range = (range.0.min(start), range.1.max(end));
            }
        }
        for (store, (start, end)) in wanted {
            let Ok(file) = self.open_store(store) else { continue };
            let len = NonZeroU64::new(end - start);
            let _ = rustix::fs::fadvise(file, start, len, rustix::fs::Advice::WillNeed);
        }
    }

    /// Where a pages file is, here or of a parent.
    pub fn store_path(&self, store: PageStore) -> PathBuf {
        let chain = self.chain();
        let dir = chain.get(store.depth as usize).map_or(&self.dir.path, |dir| &dir.dir.path);
        dir.join(kind::PAGES.file_name(store.pages_id))
    }

    /// Opens a pages file of this directory, decompressed; once it is, others share the descriptor's description.
    pub(crate) fn open_pages(&self, name: &str) -> Result<File> {
        let Some(compression) = Compression::of_version(self.inventory.img_version) else {
            return self.open_raw(name);
        };
        let mut expanded = self.expanded.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match expanded.get(name) {
            Some(file) => file,
            None => {
                let (file, size) =
                    self.open_file(name)?.ok_or_else(|| ImageError::Missing(self.path_of(name)))?;
                let workers = std::thread::available_parallelism().map_or(1, usize::from);
                let path = self.path_of(name);
                let memory = compress::expand(&path, &file.into(), size, compression, workers)?;
                expanded.entry(name.to_owned()).or_insert(memory)
            }
        };
        file.try_clone().map_err(|e| ImageError::io("open", &self.path_of(name), e))
    }

    /// The directory, as it was given.
    pub fn path(&self) -> &Path {
        &self.dir.path
    }

    /// Is there a manifest that what is read is compared with?
    pub fn has_manifest(&self) -> bool {
        self.manifest.is_some()
    }

    /// The inventory.
    pub fn inventory(&self) -> &InventoryEntry {
        &self.inventory
    }

    /// Reads the message of a file that must be there and hold one.
    pub fn read_one<M: ImageMessage>(&self, kind: Kind<M>, id: impl Into<Id>) -> Result<M> {
        let id = id.into();
        self.read_opt(kind, id)?
            .ok_or_else(|| ImageError::Missing(self.path_of(&kind.file_name(id))))
    }

    /// Reads the message of a file that, if it is there, must hold one.
    pub fn read_opt<M: ImageMessage>(&self, kind: Kind<M>, id: impl Into<Id>) -> Result<Option<M>> {
        let id = id.into();
        let mut found = None;
        let exists = self.each_entry(kind.info(), id, |image, entry| {
            if found.is_some() {
                return Err(ImageError::Count { path: image.path().to_owned(), found: "several" });
            }
            found = Some(decode(image, entry)?);
            Ok(())
        })?;
        match found {
            None if exists => {
                let path = self.path_of(&kind.file_name(id));
                Err(ImageError::Count { path, found: "no" })
            }
            found => Ok(found),
        }
    }

    /// Reads all messages of a file; none if there is no such file, which is how the format says that there are none.
    pub fn read_all<M: ImageMessage>(&self, kind: Kind<M>, id: impl Into<Id>) -> Result<Vec<M>> {
        let mut messages = Vec::new();
        self.each_entry(kind.info(), id.into(), |image, entry| {
            messages.push(decode(image, entry)?);
            Ok(())
        })?;
        Ok(messages)
    }

    /// Reads all messages of a file, each with what follows it (see [`kind::Payload`]), padding included.
    pub fn read_with_payload<M: ImageMessage>(
        &self,
        kind: Kind<M>,
        id: impl Into<Id>,
    ) -> Result<Vec<(M, Vec<u8>)>> {
        let mut messages = Vec::new();
        self.each_entry(kind.info(), id.into(), |image, entry| {
            messages.push((decode(image, entry)?, entry.payload.to_vec()));
            Ok(())
        })?;
        Ok(messages)
    }

    /// Reads the message queues of an IPC namespace, each with its messages and their texts.
    #[allow(clippy::type_complexity)] // a list of queues with a list of messages each is just that
    pub fn read_ipc_queues(&self, ns: u32) -> Result<Vec<(IpcMsgEntry, Vec<(IpcMsg, Vec<u8>)>)>> {
        let mut queues = Vec::new();
        self.each_entry(kind::IPCNS_MSG.info(), ns.into(), |image, entry| {
            let mut queue = Vec::new();
            let mut messages = IpcMessages::new(image, entry);
            while let Some((message, text)) = messages.next_message()? {
                let message =
                    wire::decode_checked(message).map_err(|f| image.entry_fault(entry, f))?;
                queue.push((message, text.to_vec()));
            }
            queues.push((decode(image, entry)?, queue));
            Ok(())
        })?;
        Ok(queues)
    }

    /// Reads the pagemap of a process.
    pub fn read_pagemap(&self, pid: impl Into<Id>) -> Result<Option<Pagemap>> {
        self.pagemap(kind::PAGEMAP, pid.into())
    }

    /// Reads the pagemap of a shared memory segment.
    pub fn read_pagemap_shmem(&self, id: impl Into<Id>) -> Result<Option<Pagemap>> {
        self.pagemap(kind::SHMEM_PAGEMAP, id.into())
    }

    pub(crate) fn pagemap(&self, kind: Kind<Pagemap>, id: Id) -> Result<Option<Pagemap>> {
        let name = kind.file_name(id);
        let Some(bytes) = self.load(&name)? else { return Ok(None) };
        let mut image = self.image(&name, kind.info(), &bytes)?;
        match Pagemap::parse(&mut image)? {
            Some(pagemap) => Ok(Some(pagemap)),
            None => Err(ImageError::Count { path: self.path_of(&name), found: "no" }),
        }
    }

    /// Opens a ghost file. Its content is left in the file.
    pub fn read_ghost(&self, id: impl Into<Id>) -> Result<Ghost> {
        let name = kind::GHOST_FILE.file_name(id);
        let path = self.path_of(&name);
        let (fd, size) = self.open_file(&name)?.ok_or_else(|| ImageError::Missing(path.clone()))?;
        let file = File::from(fd);
        if self.manifest.is_some() {
            let mut hasher = crc32fast::Hasher::new();
            let mut buf = vec![0; size.min(1 << 20) as usize];
            let mut at = 0;
            while at < size {
                let part = &mut buf[..(size - at).min(1 << 20) as usize];
                file.read_exact_at(part, at).map_err(|e| ImageError::io("read", &path, e))?;
                hasher.update(part);
                at += part.len() as u64;
            }
            self.verify_crc(&name, hasher.finalize())?;
        }
        let mut start = vec![0; size.min(8) as usize];
        file.read_exact_at(&mut start, 0).map_err(|e| ImageError::io("read", &path, e))?;
        // a look at the magic numbers alone
        self.image(&name, kind::GHOST_FILE.info(), &start)?;
        let header = if self.inventory.img_version == 1 { 4 } else { 8 };
        Ghost::read(&path, file, size, header)
    }

    /// Compares the sizes of the files with the manifest's, but for those that `read_anyway` names: reading does the
    /// same and more. To be called before anything is made of the images.
    pub fn check_complete(&self, read_anyway: impl Fn(&str) -> bool) -> Result<()> {
        let Some(manifest) = &self.manifest else { return Ok(()) };
        let names = manifest.names().filter(|name| !read_anyway(name));
        names.into_iter().try_for_each(|name| {
            let size = self.dir.size_of_regular(name)?;
            self.check_size(name, size)
        })
    }

    /// What of files without messages is still to be compared with the manifests, this one and those of parents: their
    /// contents.
    pub fn raw_check(&self) -> Result<RawCheck> {
        let mut files = Vec::new();
        let mut dirs = self.chain().into_iter().zip(0u32..);
        dirs.try_for_each(|(dir, depth)| dir.raw_files(depth, &mut files))?;
        Ok(RawCheck::new(files))
    }

    fn raw_files(&self, depth: u32, files: &mut Vec<RawFile>) -> Result<()> {
        let plain = Compression::of_version(self.inventory.img_version).is_none();
        for name in self.manifest.iter().flat_map(Manifest::names) {
            if !kind::PAGES.info().names(name) {
                continue;
            }
            let Some(crc) = self.manifest.as_ref().and_then(|m| m.get(name)?.crc) else { continue };
            if let Some((fd, size)) = self.open_file(name)? {
                let id = name.strip_prefix("pages-").and_then(|rest| rest.strip_suffix(".img"));
                let pages_id = id.and_then(|id| id.parse().ok()).filter(|_| plain);
                let store = pages_id.map(|pages_id| PageStore { depth, pages_id });
                let (path, file, crc) = (self.path_of(name), fd.into(), Some(crc));
                files.push(RawFile { path, file, size, crc, store, wanted: None });
            }
        }
        Ok(())
    }

    /// Opens a file without messages. Its size is compared with the manifest's.
    pub fn open_raw(&self, name: &str) -> Result<File> {
        match self.open_file(name)? {
            Some((fd, _)) => Ok(fd.into()),
            None => Err(ImageError::Missing(self.path_of(name))),
        }
    }

    /// Reads a file without messages that need not be there.
    pub fn read_raw(&self, kind: Kind<Raw>, id: impl Into<Id>) -> Result<Option<Vec<u8>>> {
        self.load(&kind.file_name(id))
    }

    /// Calls `f` with each entry of a file. Says whether there is a file.
    fn each_entry(
        &self,
        kind: &'static KindInfo,
        id: Id,
        mut f: impl FnMut(&RawImage<'_>, &RawEntry<'_>) -> Result<()>,
    ) -> Result<bool> {
        let name = kind.file_name(id);
        let Some(bytes) = self.load(&name)? else { return Ok(false) };
        let mut image = self.image(&name, kind, &bytes)?;
        while let Some(entry) = image.next_entry()? {
            f(&image, &entry)?;
        }
        Ok(true)
    }

    fn image<'a>(
        &self,
        name: &str,
        kind: &'static KindInfo,
        bytes: &'a [u8],
    ) -> Result<RawImage<'a>> {
        RawImage::new(&self.path_of(name), kind, self.inventory.img_version, bytes)
    }

    pub(crate) fn load(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some((fd, size)) = self.open_file(name)? else { return Ok(None) };
        let bytes = self.dir.read(name, &fd, size)?;
        if self.manifest.is_some() {
            self.verify_crc(name, crc32fast::hash(&bytes))?;
        }
        Ok(Some(bytes))
    }

    fn open_file(&self, name: &str) -> Result<Option<(OwnedFd, u64)>> {
        let opened = self.dir.open_regular(name)?;
        self.check_size(name, opened.as_ref().map(|(_, size)| *size))?;
        Ok(opened)
    }

    /// Compares the size of a file, if there is one, with the manifest's.
    fn check_size(&self, name: &str, size: Option<u64>) -> Result<()> {
        let Some(sum) = self.manifest.as_ref().and_then(|m| m.get(name)) else { return Ok(()) };
        match size {
            None => Err(self.damaged(name, "it is gone".to_owned())),
            Some(size) if size != sum.size => {
                Err(self.damaged(name, format!("it has {size} bytes, and had {}", sum.size)))
            }
            Some(_) => Ok(()),
        }
    }

    fn verify_crc(&self, name: &str, found: u32) -> Result<()> {
        match self.manifest.as_ref().and_then(|m| m.get(name)?.crc) {
            Some(crc) if crc != found => Err(self.damaged(name, "its checksum differs".to_owned())),
            _ => Ok(()),
        }
    }

    fn damaged(&self, name: &str, what: String) -> ImageError {
        ImageError::Damaged { path: self.path_of(name), what }
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.dir.path.join(name)
    }
}

/// Reads the messages of a single file outside a checkpoint, such as `stats-dump`, of whichever image version.
pub fn read_file<M: ImageMessage>(path: &Path, kind: Kind<M>) -> Result<Vec<M>> {
    let bytes = std::fs::read(path).map_err(|e| ImageError::io("read", path, e))?;
    let mut image = RawImage::new(path, kind.info(), 2, &bytes)?;
    let mut messages = Vec::new();
    while let Some(entry) = image.next_entry()? {
        messages.push(decode(&image, &entry)?);
    }
    Ok(messages)
}

fn decode<M: ImageMessage>(image: &RawImage<'_>, entry: &RawEntry<'_>) -> Result<M> {
    wire::decode_checked(entry.message).map_err(|fault| image.entry_fault(entry, fault))
}

fn read_manifest(dir: &Dir) -> Result<Option<Manifest>> {
    let Some((fd, size)) = dir.open_regular(manifest::FILE_NAME)? else { return Ok(None) };
    let bytes = dir.read(manifest::FILE_NAME, &fd, size)?;
    let text = str::from_utf8(&bytes).map_err(|e| e.to_string());
    match text.and_then(Manifest::parse) {
        Ok(manifest) => Ok(Some(manifest)),
        Err(what) => Err(ImageError::Damaged { path: dir.path.join(manifest::FILE_NAME), what }),
    }
}
