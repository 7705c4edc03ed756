//! Opening the file descriptions of an image: each once, in the controller.

use super::{
    bpf_map, epoll, eventfd, external, fanotify, fifo, ghost, inotify, io_uring, link_remap, nsfs,
    passing, pidfd, pipe, regular, signalfd, timerfd, tty, watched,
};
use crate::Problem;
use crate::pids::Pids;
use crate::problem::text;
use crate::sockets;
use rewake_image::addresses::{self, Outcome, Rule};
use rewake_image::messages::{
    BpfmapDataEntry, FdTypes, FileEntry, FownEntry, MemfdInodeEntry, PipeDataEntry,
    RemapFilePathEntry, RemapType, RewakeFileEntry, TtyInfoEntry,
};
use rewake_image::{ImageDir, kind};
use rewake_sys::{Errno, file};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What of the restore options concerns descriptors.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `--skip-file-rwx-check`.
    pub skip_mode_check: bool,
    /// `--file-validation buildid`.
    pub build_ids: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--tcp-close`.
    pub tcp_close: bool,
    /// `--ext-unix-sk`: connect unix sockets to the addresses of their peers outside the tree.
    pub external_unix: bool,
    /// `--inherit-fd fd[N]:KEY`: our descriptors, by the keys of what they are put in the place of.
    pub inherited: external::Inherited,
}

/// The descriptions of an image and those that are open already.
#[derive(Debug)]
pub struct Opener<'a> {
    /// The options.
    pub options: Options,
    /// How the ids of the images are to be understood once tasks exist.
    pub pids: Pids,
    /// The root directory of the tree's own mount namespace, if it gets one: paths are looked up from there.
    pub root: Option<OwnedFd>,
    /// The images.
    pub images: &'a ImageDir,
    pub(crate) files: HashMap<u32, FileEntry>,
    /// Connections as they were before their addresses were replaced: so the network lock knows them.
    pub(crate) locked: Vec<FileEntry>,
    opened: HashMap<u32, OwnedFd>,
    /// Files opened once more, for writing.
    writable: HashMap<u32, OwnedFd>,
    remaps: HashMap<u32, RemapFilePathEntry>,
    ghosts: HashMap<u32, ghost::Raised>,
    /// Files that were given another name (`--link-remap`), by the file id of that.
    linked: HashMap<u32, ghost::Raised>,
    /// Their names, which are to go when the tree is back.
    links: Vec<PathBuf>,
    /// Names that files without one have for the moment.
    passing: passing::Names,
    pub(super) pipe_data: HashMap<u32, (PipeDataEntry, Vec<u8>)>,
    pub(super) pipes: HashMap<u32, pipe::Ends>,
    pub(super) fifo_data: HashMap<u32, (PipeDataEntry, Vec<u8>)>,
    /// FIFOs that are filled, held open for both reading and writing.
    pub(super) fifos: HashMap<u32, OwnedFd>,
    /// `bpfmap-data.img` by map id.
    pub(super) bpf_data: HashMap<u32, (BpfmapDataEntry, Vec<u8>)>,
    /// BPF maps made so far, by their id in the images.
    pub(super) bpf_maps: HashMap<u32, OwnedFd>,
    /// Files that cannot be sent to the tasks while these are built, by id: io_uring instances, which the kernel lets nobody
    /// send, and files of `/proc` that are not there before the tasks are. They are given our pidfd in their place, and
    /// fetch them by that.
    pub fetched: HashMap<u32, OwnedFd>,
    /// Set where not all files can be open at a time.
    pub(super) portions: Option<super::portions::Portions>,
    /// Files of `/proc` that are still to be opened, and whether that is to be done now.
    late: (Vec<u32>, bool),
    /// `tty-info.img` by id.
    pub(super) ttys: HashMap<u32, TtyInfoEntry>,
    /// `tty-data.img`, joined, by id.
    pub(super) tty_data: HashMap<u32, Vec<u8>>,
    /// Terminals in whose place our own was put.
    pub(super) inherited: Vec<TtyInfoEntry>,
    /// Terminals of the caller's (`--inherit-fd`), by the id of those in whose place they were put.
    pub(super) given_terminals: Vec<(u32, OwnedFd)>,
    /// Pseudoterminals whose both sides are the tree's, by their number in the images.
    pub(super) ptys: HashMap<u32, super::pty::Pair>,
    /// The sessions whose leaders are restored.
    pub sessions: HashSet<i32>,
    /// `/dev/tty` as the tasks of a session opened it, by file id.
    pub controlling: HashMap<u32, OwnedFd>,
    /// References to dead processes, by `PidfdEntry::ino`.
    pub(super) dead: HashMap<u32, OwnedFd>,
    /// Epoll instances that are in flight and still have to be told what to watch.
    pub(super) flying_epolls: Vec<u32>,
    /// Our own extra state by file id.
    pub extra: HashMap<u32, RewakeFileEntry>,
    /// Shared memory of the images, by `MemfdInodeEntry::inode_id`.
    pub(crate) memfd_inodes: HashMap<u64, MemfdInodeEntry>,
    /// Shared memory made so far, by `MemfdInodeEntry::inode_id`.
    pub segments: HashMap<u64, OwnedFd>,
    /// Those whose original description a descriptor has got.
    pub(crate) memfds_given: std::collections::HashSet<u64>,
    /// Seals that are still to be put on, by the same id.
    pub seals: Vec<(u64, u32)>,
    /// What sockets need until the tasks go on.
    pub sockets: crate::sockets::Restore,
}

impl<'a> Opener<'a> {
    /// Reads what the images say of files; opens nothing.
    ///
    /// # Errors
    /// An image is damaged.
    pub fn new(
        images: &'a ImageDir,
        options: Options,
        extra: HashMap<u32, RewakeFileEntry>,
    ) -> Result<Opener<'a>, rewake_image::ImageError> {
        let files = images.read_all(kind::FILES, ())?.into_iter().map(|f| (f.id, f)).collect();
        let remaps = images.read_all(kind::REMAP_FPATH, ())?;
        let pipe_data = images.read_with_payload(kind::PIPES_DATA, ())?;
        let fifo_data = images.read_with_payload(kind::FIFO_DATA, ())?;
        let bpf_data = images.read_with_payload(kind::BPFMAP_DATA, ())?;
        let memfd_inodes = images.read_all(kind::MEMFD_INODE, ())?;
        let ttys = images.read_all(kind::TTY_INFO, ())?;
        let mut tty_data: HashMap<u32, Vec<u8>> = HashMap::new();
        for entry in images.read_all(kind::TTY_DATA, ())? {
            tty_data.entry(entry.tty_id).or_default().extend(entry.data);
        }
        Ok(Opener {
            options,
            pids: Pids::Same,
            root: None,
            images,
            files,
            locked: Vec::new(),
            opened: HashMap::new(),
            writable: HashMap::new(),
            remaps: remaps.into_iter().map(|r| (r.orig_id, r)).collect(),
            ghosts: HashMap::new(),
            linked: HashMap::new(),
            links: Vec::new(),
            passing: passing::Names::default(),
            pipe_data: pipe_data.into_iter().map(|(e, data)| (e.pipe_id, (e, data))).collect(),
            pipes: HashMap::new(),
            fifo_data: fifo_data.into_iter().map(|(e, data)| (e.pipe_id, (e, data))).collect(),
            fifos: HashMap::new(),
            bpf_data: bpf_data.into_iter().map(|(e, data)| (e.map_id, (e, data))).collect(),
            bpf_maps: HashMap::new(),
            fetched: HashMap::new(),
            portions: None,
            late: (Vec::new(), false),
            ttys: ttys.into_iter().map(|t| (t.id, t)).collect(),
            tty_data,
            inherited: Vec::new(),
            given_terminals: Vec::new(),
            ptys: HashMap::new(),
            sessions: HashSet::new(),
            controlling: HashMap::new(),
            dead: HashMap::new(),
            flying_epolls: Vec::new(),
            extra,
            memfd_inodes: memfd_inodes.into_iter().map(|i| (i.inode_id, i)).collect(),
            segments: HashMap::new(),
            memfds_given: std::collections::HashSet::new(),
            seals: Vec::new(),
            sockets: crate::sockets::Restore::default(),
        })
    }

    /// Gives our descriptor table room for all files at once; best before there are threads.
    pub fn make_room(&self) {
        if let Err(e) = rewake_sys::descriptors::make_room(self.files.len()) {
            log::debug!("room for {} descriptors: {e}", self.files.len());
        }
    }

    /// Gives the internet sockets of the images other addresses; nothing may be open yet.
    pub fn replace_addresses(&mut self, rules: &[Rule]) -> Outcome {
        let connected = |f: &&FileEntry| f.isk.as_ref().is_some_and(|s| s.dst_port != 0);
        self.locked = self.files.values().filter(connected).cloned().collect();
        let mut outcome = addresses::rewrite(self.files.values_mut(), rules);
        addresses::rewrite_extra(self.extra.values_mut(), rules, &mut outcome);
        outcome
    }

    /// Checks what the images say of sockets, before any process exists.
    ///
    /// # Errors
    /// They are damaged or ask for something impossible.
    pub fn check(&mut self) -> Result<(), Problem> {
        external::check(self)?;
        sockets::check_unix(self)
    }

    /// Makes what has to be there before any process is.
    ///
    /// # Errors
    /// An address is in use.
    pub fn prepare(&mut self) -> Result<(), Problem> {
        super::pty::prepare(self)?;
        sockets::prepare_unix(self)
    }

    /// Have the images unix sockets?
    #[must_use]
    pub fn has_unix_sockets(&self) -> bool {
        self.files.values().any(|file| file.usk.is_some())
    }

    /// Closes everything; what was made in file systems is left, until that is dropped or kept.
    #[must_use]
    pub fn into_made(self) -> Made {
        Made { sockets: self.sockets.into_made(), links: self.links }
    }

    /// Protocols (`IPPROTO_*`) and addresses that one socket alone can have: those that listen, and bound datagram sockets,
    /// unless they share (`SO_REUSEPORT`, `SO_REUSEADDR` of datagrams).
    #[must_use]
    pub fn exclusive_addresses(&self) -> HashSet<(u32, SocketAddr)> {
        self.files
            .values()
            .filter_map(|f| f.isk.as_deref())
            .filter_map(sockets::inet::exclusive_address)
            .collect()
    }

    /// Is this file one that others can open too: an ordinary one, by its name?
    #[must_use]
    pub fn is_ordinary(&self, id: u32) -> bool {
        let own = |f: &FileEntry| f.reg.is_some() && !external::replaces(self, f);
        self.files.get(&id).is_some_and(own) && !self.remaps.contains_key(&id)
    }

    /// Path and status flags of file `id`, if it is an ordinary one.
    #[must_use]
    pub fn ordinary(&self, id: u32) -> Option<(Vec<u8>, u32)> {
        let reg = self.files.get(&id).filter(|_| self.is_ordinary(id))?.reg.as_deref()?;
        Some((regular::absolute(&reg.name), reg.flags))
    }

    /// The entry of file `id`.
    ///
    /// # Errors
    /// The images have no such file.
    pub fn entry(&self, id: u32) -> Result<&FileEntry, Problem> {
        self.files
            .get(&id)
            .ok_or_else(|| Problem::new(format!("file id {id}"), "files.img has no such entry"))
    }

    /// The description of file `id`, opened if it is not yet.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub fn open(&mut self, id: u32) -> Result<BorrowedFd<'_>, Problem> {
        // Those that wait at a listening socket, too.
        let waiting = self.extra.get(&id).is_some_and(|extra| !extra.accept_queue.is_empty());
        if waiting || self.entry(id)?.isk.as_deref().is_some_and(sockets::inet::is_connection) {
            let connections = sockets::open_connections(self)?;
            self.opened.extend(connections);
        }
        let members = sockets::reuseport::with(self, id);
        for member in &members {
            self.open_one(*member)?;
        }
        sockets::reuseport::attach(self, &members)?;
        self.open_one(id)?;
        Ok(self.opened[&id].as_fd())
    }

    /// Opens file `id` if it is not yet, whatever comes with it.
    fn open_one(&mut self, id: u32) -> Result<(), Problem> {
        if !self.opened.contains_key(&id) {
            if self.portions.as_ref().is_some_and(|p| p.is_closed(id)) {
                return Err(Problem::new(
                    format!("file id {id}"),
                    "it is needed once more, but was closed because this command may not have all files open",
                )
                .remedy("raise the limit of open files of this command (ulimit -Hn)"));
            }
            let entry = self.entry(id)?.clone();
            let opened = match external::other(self, &entry) {
                Ok(Some(fd)) => Ok(fd),
                Ok(None) => open_kind(self, &entry),
                Err(e) => Err(e),
            };
            let fd = opened.map_err(|problem| self.explain(problem))?;
            if self.late.0.contains(&id) {
                self.opened.insert(id, fd);
                return Ok(());
            }
            apply_common(&entry, fd.as_fd())?;
            if let Some(hint) = self.extra.get(&id).and_then(|extra| extra.write_hint) {
                file::set_write_hint(fd.as_fd(), hint).map_err(|e| {
                    let what = format!("its write hint {hint} cannot be set (F_SET_RW_HINT): {e}");
                    Problem::new(format!("file id {id}"), what)
                        .remedy("have rewake own the file, or run it with CAP_FOWNER")
                })?;
            }
            if let Some(params) = self.extra.get(&id).and_then(|extra| extra.epoll_params) {
                file::set_epoll_polling(fd.as_fd(), params).map_err(|e| {
                    let what =
                        format!("how it polls network devices cannot be set (EPIOCSPARAMS): {e}");
                    Problem::new(format!("epoll instance {id}"), what)
                        .remedy("it needs Linux 6.9 or later, and much of it CAP_NET_ADMIN")
                })?;
            }
            if let Some(fifo) = &entry.fifo {
                // Flags and owner are in the entry of its path.
                apply_common(self.entry(fifo.regf_id.unwrap_or(id))?, fd.as_fd())?;
            }
            self.opened.insert(id, fd);
        }
        Ok(())
    }

    /// Did file `id` have no name that leads to it, at the dump?
    pub(super) fn is_remapped(&self, id: u32) -> bool {
        self.remaps.contains_key(&id)
    }

    /// Closes file `id`.
    pub(super) fn close(&mut self, id: u32) {
        self.opened.remove(&id);
        self.writable.remove(&id);
    }

    /// Has file `id` be opened when the tasks are whole ([`Opener::open_late`]), if that may help: what tasks are given in
    /// its place.
    pub(super) fn put_off(&mut self, id: u32, path: &[u8]) -> Result<Option<OwnedFd>, Problem> {
        if !regular::is_of_task(path) {
            return Ok(None);
        }
        self.put_off_always(id, path)
    }

    /// Has file `id` be opened when the tasks are whole: what tasks are given in its place; none if that is now.
    pub(super) fn put_off_always(
        &mut self,
        id: u32,
        path: &[u8],
    ) -> Result<Option<OwnedFd>, Problem> {
        if self.late.1 {
            return Ok(None);
        }
        let fd = placeholder().map_err(|e| Problem::new(text(path), e.to_string()))?;
        self.late.0.push(id);
        Ok(Some(fd))
    }

    /// Opens the files of `/proc` that were not there before the tasks were whole.
    ///
    /// # Errors
    /// They are not there now.
    pub fn open_late(&mut self) -> Result<(), Problem> {
        self.late.1 = true;
        for id in std::mem::take(&mut self.late.0) {
            self.opened.remove(&id);
            let fd = self.open(id)?.try_clone_to_owned();
            let fd = fd.map_err(|e| Problem::new(format!("file id {id}"), e.to_string()))?;
            self.fetched.insert(id, fd);
        }
        Ok(())
    }

    /// Is file `id` one that tasks fetch, so that nobody can have it in flight?
    pub(crate) fn is_put_off(&self, id: u32) -> bool {
        self.late.0.contains(&id)
    }

    /// Arms the timers among the open files: call it as late as possible, for it starts them.
    ///
    /// # Errors
    /// The images have an impossible time.
    pub fn arm_timers(&self) -> Result<(), Problem> {
        for (id, fd) in &self.opened {
            if let Some(timer) = self.entry(*id)?.tfd.as_deref() {
                timerfd::arm(timer, fd.as_fd())?;
            }
        }
        Ok(())
    }

    /// Opens a path as the restored tree would: in its own mount namespace, if it gets one.
    ///
    /// # Errors
    /// As `openat2(2)`.
    pub(super) fn open_path(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        match &self.root {
            None => rustix::fs::open(path, flags, Mode::empty()),
            Some(root) => {
                // openat2 is strict where open ignores what O_PATH has no use for.
                let of_path = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let flags = if flags.contains(OFlags::PATH) { flags & of_path } else { flags };
                rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
            }
        }
    }

    /// Makes sure that file `id` is open for writing too, be it as another description: mappings need the file only.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub fn open_writable(&mut self, id: u32) -> Result<(), Problem> {
        use std::os::fd::AsRawFd;
        let fd = self.open(id)?;
        let failed = |e: &dyn std::fmt::Display| {
            Problem::new(format!("file id {id}"), format!("cannot be opened for writing: {e}"))
        };
        let access = file::flags(fd).map_err(|e| failed(&e))? & libc::O_ACCMODE as u32;
        if access != libc::O_RDWR as u32 && !self.writable.contains_key(&id) {
            let fd = self.opened(id)?.as_raw_fd();
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
            let own = format!("/proc/self/fd/{fd}");
            let again =
                rustix::fs::open(own, flags, rustix::fs::Mode::empty()).map_err(|e| failed(&e))?;
            self.writable.insert(id, again);
        }
        Ok(())
    }

    /// File `id`, which is open for writing already.
    ///
    /// # Errors
    /// It is not open.
    pub fn opened_writable(&self, id: u32) -> Result<BorrowedFd<'_>, Problem> {
        match self.writable.get(&id) {
            Some(fd) => Ok(fd.as_fd()),
            None => self.opened(id),
        }
    }

    /// The description of file `id`, which is open already.
    ///
    /// # Errors
    /// It is not open.
    pub fn opened(&self, id: u32) -> Result<BorrowedFd<'_>, Problem> {
        self.opened
            .get(&id)
            .map(AsFd::as_fd)
            .ok_or_else(|| Problem::new(format!("file id {id}"), "it is not open"))
    }

    /// Memfds and shared anonymous memory of the images.
    pub(crate) fn memfds(&self) -> impl Iterator<Item = &rewake_image::messages::MemfdFileEntry> {
        self.files.values().filter_map(|file| file.memfd.as_deref())
    }

    /// What has to wait until all tasks exist: owners of descriptions, seals. Call it before credentials change.
    ///
    /// # Errors
    /// The kernel refuses a seal or an owner.
    pub fn settle(&mut self) -> Result<(), Problem> {
        epoll::restore_in_flight(self)?;
        // The other ends must not seem to be open: what watches a pipe now shall see its hangup.
        self.pipes.clear();
        self.fifos.clear();
        // Nobody needs their names any more, and who watches them shall not see how these are taken away.
        // Files first: what ends the last use of a name that one was made without (`O_TMPFILE`) takes watches (inotify(7))
        // off a file that has no other name left.
        self.ghosts.clear();
        self.linked.clear();
        self.passing.end()?;
        crate::memory::shared::seal(self)?;
        for (entry, fd) in self.all_opened() {
            // A FIFO's is in the entry of its path.
            let path = entry.fifo.as_ref().and_then(|f| self.files.get(&f.regf_id.unwrap_or(f.id)));
            if let Some(owner) = owner_of(path.unwrap_or(entry)) {
                let failed = |e: &dyn std::fmt::Display| {
                    Problem::new(
                        format!("file id {}", entry.id),
                        format!("its owner {} cannot be set: {e}", owner.pid),
                    )
                };
                let (kind, pid) = (owner.pid_type as i32, owner.pid as i32);
                let pid = match kind {
                    file::OWNER_GROUP => self.pids.outer_group(pid),
                    _ => self.pids.outer(pid),
                };
                let pid = pid.ok_or_else(|| failed(&"there is no such task"))?;
                let uids = (owner.uid, owner.euid);
                file::set_owner_as(fd, kind, pid, uids).map_err(|e| failed(&e))?;
            }
        }
        Ok(())
    }

    /// Sets going what ticks or talks: timers, connections, the terminal. Call it just before the tasks go on.
    ///
    /// # Errors
    /// A timer cannot be armed, or a connection refuses to go on.
    pub fn set_going(&mut self, is_restored: impl Fn(i32) -> bool) -> Result<(), Problem> {
        for (entry, fd) in self.all_opened() {
            if let Some(timer) = &entry.tfd {
                timerfd::arm(timer, fd)?;
            }
            if entry.ify.is_some() || entry.ffy.is_some() {
                watched::forget_events(fd);
            }
        }
        tty::finish(self, is_restored)?;
        super::pty::finish(self)?;
        sockets::settle_unix(self)?;
        sockets::set_going(self)
    }

    fn all_opened(&self) -> impl Iterator<Item = (&FileEntry, BorrowedFd<'_>)> {
        self.opened.iter().filter_map(|(id, fd)| Some((self.files.get(id)?, fd.as_fd())))
    }

    /// If regular file `id` was one without its name: makes it again, if it was deleted, and gives it a name, `path` if that
    /// is free, which it has until everything is open.
    ///
    /// # Errors
    /// It cannot be made, or the images tell of a remapping that is not supported.
    pub fn place_ghost(&mut self, id: u32, path: &[u8]) -> Result<Option<Placed>, Problem> {
        let Some(remap) = self.remaps.get(&id) else { return Ok(None) };
        let path = Path::new(OsStr::from_bytes(path));
        // Images of old marked ghosts by the top bit.
        let (is_ghost, number) = match remap.remap_type {
            None => (remap.remap_id & 1 << 31 != 0, remap.remap_id & !(1 << 31)),
            Some(t) => (t == RemapType::Ghost as i32, remap.remap_id),
        };
        if !is_ghost {
            let linked = remap.remap_type == Some(RemapType::Linked as i32)
                || remap.remap_type.is_none() && number != 0;
            if !linked {
                return Err(Problem::new(
                    text(path.as_os_str().as_bytes()),
                    "files of processes that were dead at the dump (/proc/PID/…) cannot be restored yet",
                ));
            }
            let path = self.place_linked(number, path)?;
            return Ok(Some(Placed { path, made: false }));
        }
        if !self.ghosts.contains_key(&number) {
            let image = self
                .images
                .read_ghost(u64::from(number))
                .map_err(|e| Problem::new(text(path.as_os_str().as_bytes()), e.to_string()))?;
            self.ghosts.insert(number, ghost::raise(&image, path, &mut self.passing)?);
        }
        let Some(ghost) = self.ghosts.get_mut(&number) else { return Ok(None) };
        let path = ghost.name(path, &mut self.passing)?;
        Ok(Some(Placed { path, made: true }))
    }

    /// Gives the file that is kept under the name of regular file `number` the name `path` for the moment.
    fn place_linked(&mut self, number: u32, path: &Path) -> Result<PathBuf, Problem> {
        if !self.linked.contains_key(&number) {
            let entry = self.entry(number)?.reg.as_deref();
            let entry = entry.ok_or_else(|| {
                Problem::new(format!("file id {number}"), "it is no regular file with a path")
            })?;
            let link = PathBuf::from(std::ffi::OsString::from_vec(regular::absolute(&entry.name)));
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::open(&link, flags, Mode::empty()).map_err(|e| {
                let reason = format!(
                    "a file was kept under the name {} for the time it is not open, which cannot be opened: {e}",
                    link.display()
                );
                Problem::new(text(path.as_os_str().as_bytes()), reason)
                    .remedy("bring the file back; each restore takes such names away when it is done")
            })?;
            self.linked.insert(number, ghost::Raised::linked(file));
            if link_remap::is_ours(&link) {
                self.links.push(link);
            }
        }
        match self.linked.get_mut(&number) {
            Some(file) => file.name(path, &mut self.passing),
            None => Ok(path.to_owned()),
        }
    }
}

/// What tasks are given in the place of a file that they will fetch: our pidfd.
///
/// # Errors
/// There is none.
pub(super) fn placeholder() -> Result<OwnedFd, Errno> {
    let own = rustix::process::getpid();
    rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty())
}

/// A file that had no name, and where it can be opened for the moment.
#[derive(Debug)]
pub struct Placed {
    /// The name.
    pub path: PathBuf,
    /// Was it made anew?
    pub made: bool,
}

/// What a restore has made in file systems; dropping it removes that.
#[derive(Debug)]
pub struct Made {
    sockets: sockets::Made,
    /// Names that a dump has made.
    links: Vec<PathBuf>,
}

impl Made {
    /// Lets it stay: the restore has succeeded. What a dump has made for the restore goes.
    pub fn keep(self) {
        self.sockets.keep();
        link_remap::remove(&self.links);
    }
}

/// The registry of kinds: who opens this entry?
fn open_kind(opener: &mut Opener<'_>, entry: &FileEntry) -> Result<OwnedFd, Problem> {
    let kind = FdTypes::try_from(entry.r#type).unwrap_or(FdTypes::Und);
    let absent =
        || Problem::new(format!("file id {}", entry.id), format!("its {kind:?} entry is missing"));
    match kind {
        FdTypes::Reg => regular::open(opener, entry.reg.as_deref().ok_or_else(absent)?),
        FdTypes::Pipe => pipe::open(opener, entry.pipe.as_deref().ok_or_else(absent)?),
        FdTypes::Memfd => {
            crate::memory::shared::open(opener, entry.memfd.as_deref().ok_or_else(absent)?)
        }
        FdTypes::Eventfd => {
            let semaphore = opener.extra.get(&entry.id).and_then(|e| e.semaphore).unwrap_or(false);
            eventfd::open(entry.efd.as_deref().ok_or_else(absent)?, semaphore)
        }
        FdTypes::Fifo => fifo::open(opener, entry.fifo.as_deref().ok_or_else(absent)?),
        FdTypes::Eventpoll => epoll::open(opener, entry.epfd.as_deref().ok_or_else(absent)?),
        FdTypes::Signalfd => signalfd::open(entry.sgfd.as_deref().ok_or_else(absent)?),
        FdTypes::Timerfd => timerfd::open(entry.tfd.as_deref().ok_or_else(absent)?),
        FdTypes::Ns => nsfs::open(opener, entry.nsf.as_deref().ok_or_else(absent)?),
        FdTypes::Pidfd => pidfd::open(opener, entry.pidfd.as_deref().ok_or_else(absent)?),
        FdTypes::Inotify => inotify::open(opener, entry.ify.as_deref().ok_or_else(absent)?),
        FdTypes::Bpfmap => bpf_map::open(opener, entry.bpf.as_deref().ok_or_else(absent)?),
        FdTypes::Fanotify => fanotify::open(opener, entry.ffy.as_deref().ok_or_else(absent)?),
        FdTypes::Tty => tty::open(opener, entry.tty.as_deref().ok_or_else(absent)?),
        FdTypes::Ext if opener.extra.get(&entry.id).is_some_and(|e| e.ring.is_some()) => {
            io_uring::open::open(opener, entry.id)
        }
        FdTypes::Inetsk
        | FdTypes::Unixsk
        | FdTypes::Netlinksk
        | FdTypes::Packetsk
        | FdTypes::Ext => sockets::open(opener, entry),
        kind => Err(Problem::new(
            format!("file id {}", entry.id),
            format!("descriptors of kind {kind:?} cannot be restored yet"),
        )),
    }
}

/// Flags and owner as the entry has them: what does not come with opening.
pub(crate) fn apply_common(entry: &FileEntry, fd: BorrowedFd<'_>) -> Result<(), Problem> {
    let Some((flags, owner)) = common(entry) else { return Ok(()) };
    let failed = |e: rewake_sys::SyscallError| {
        Problem::new(format!("file id {}", entry.id), format!("attributes cannot be set: {e}"))
    };
    let settable =
        (libc::O_APPEND | libc::O_ASYNC | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME)
            as u32;
    if flags & libc::O_PATH as u32 != 0 {
        return Ok(());
    }
    let now = file::flags(fd).map_err(failed)?;
    if now & settable != flags & settable {
        file::set_flags(fd, flags & settable).map_err(failed)?;
    }
    if owner.signum != 0 {
        file::set_signal(fd, owner.signum as i32).map_err(failed)?;
    }
    Ok(())
}

/// Status flags and owner of any entry.
fn common(entry: &FileEntry) -> Option<(u32, &FownEntry)> {
    if let Some(e) = &entry.reg {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.pipe {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.efd {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.memfd {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.isk {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.usk {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.nlsk {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.psk {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.epfd {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.sgfd {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.tfd {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.tty {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.ify {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.bpf {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.ffy {
        return Some((e.flags, &e.fown));
    }
    if let Some(e) = &entry.pidfd {
        return Some((e.flags, &e.fown));
    }
    None
}

/// The owner of a description as the entry has it, for the task that restores it once all tasks exist.
#[must_use]
pub fn owner_of(entry: &FileEntry) -> Option<&FownEntry> {
    common(entry).map(|(_, owner)| owner).filter(|o| o.pid != 0)
}
