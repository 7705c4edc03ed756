//! Collecting the file descriptions of a tree: each once, whoever holds it.

use super::{
    bpf_map, epoll, eventfd, fanotify, fifo, inotify, io_uring, nsfs, pidfd, pipe, regular,
    signalfd, timerfd, tty,
};
use crate::Problem;
use crate::iterators::files::File as Told;
use crate::problem::text;
use rewake_image::messages::{
    BpfmapDataEntry, ExtFileEntry, FdTypes, FileEntry, FownEntry, GhostFileEntry, PipeDataEntry,
    RemapFilePathEntry, RewakeFileEntry,
};
use rewake_sys::file::Owner;
use rewake_sys::{file, kcmp};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::Stat;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};

/// What of the dump options concerns descriptors.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--ghost-limit` in bytes of allocated blocks.
    pub ghost_limit: u64,
    /// `--link-remap`.
    pub link_remap: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--file-validation buildid`.
    pub build_ids: bool,
    /// `--evasive-devices`.
    pub evasive_devices: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--tcp-close`.
    pub tcp_close: bool,
    /// `--skip-in-flight`.
    pub skip_in_flight: bool,
    /// The tree dies when it is saved.
    pub dies: bool,
    /// `--ext-unix-sk` and `--external unix[INODE]`.
    pub outside: crate::sockets::unix::Outside,
    /// `--external file[…]` and `tty[…]`.
    pub external: super::external::Outside,
    /// `--force-irmap`, `--irmap-scan-path`.
    pub scan: super::watched::Scan,
}

/// One descriptor of one task, seen from the controller.
pub struct View<'a> {
    /// Task that holds it.
    pub pid: i32,
    /// A living thread of that, by which the kernel finds its descriptors.
    pub tid: i32,
    /// Its number there.
    pub number: i32,
    /// The description itself, held by the controller too.
    pub fd: OwnedFd,
    /// `/proc/PID/fd/N` link text.
    pub link: Vec<u8>,
    /// fstat(2).
    pub stat: Stat,
    /// Status flags and access mode (`F_GETFL`).
    pub flags: u32,
    /// Reads `/proc/PID/fdinfo/N`, for kinds that need it.
    pub fdinfo: &'a dyn Fn() -> Result<Vec<u8>, Problem>,
    /// All descriptor numbers of the task, ascending.
    pub numbers: &'a [i32],
    /// What the kernel has told of it already.
    pub told: Option<&'a Told>,
}

impl View<'_> {
    /// The description.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// How error texts call it.
    #[must_use]
    pub fn object(&self) -> String {
        if self.pid == std::process::id() as i32 {
            return format!("a descriptor in flight ({})", text(&self.link));
        }
        format!("fd {} ({})", self.number, text(&self.link))
    }

    /// A problem with this descriptor.
    pub fn problem(&self, reason: impl Into<String>) -> Problem {
        Problem::new(self.object(), reason)
    }

    /// Owner and signal for asynchronous I/O, in the image's form.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn owner(&self) -> Result<FownEntry, Problem> {
        if self.flags & libc::O_PATH as u32 != 0 {
            return Ok(FownEntry::default());
        }
        if self.told.is_some_and(|told| !told.may_be_owned)
            && let Some(nobody) = nobody()
        {
            return Ok(nobody);
        }
        owner_of(self.as_fd()).map_err(|e| self.problem(e.to_string()))
    }
}

/// Owner and signal of a description, in the image's form.
fn owner_of(fd: BorrowedFd<'_>) -> rewake_sys::call::Result<FownEntry> {
    let Owner { kind, pid, signal, uids } = file::owner(fd)?;
    Ok(FownEntry {
        uid: uids.0,
        euid: uids.1,
        signum: signal as u32,
        pid_type: kind as u32,
        pid: pid as u32,
    })
}

/// What the kernel says of a description that nobody owns.
pub(super) fn nobody() -> Option<FownEntry> {
    static NOBODY: std::sync::OnceLock<Option<FownEntry>> = std::sync::OnceLock::new();
    let ask = || {
        let (end, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok()?;
        owner_of(end.as_fd()).ok()
    };
    NOBODY.get_or_init(ask).clone()
}

/// Contents that are written with the images, after the survey.
#[derive(Debug)]
pub enum Contents {
    /// A deleted file.
    Ghost {
        /// Number in the file name.
        id: u64,
        /// What is written first.
        entry: GhostFileEntry,
        /// The file.
        file: OwnedFd,
        /// Its size in bytes.
        size: u64,
    },
    /// A file that is given one more name (`--link-remap`).
    Link {
        /// The file.
        file: OwnedFd,
        /// The name.
        path: std::path::PathBuf,
    },
    /// A memfd or shared anonymous memory.
    Shared(crate::memory::shared::Segment),
}

/// Device, inode, flags, and what else tells descriptions apart ([`eventfd::object_number`]).
pub(super) type Key = (u64, u64, u32, Option<i32>);

#[derive(Debug)]
pub(super) struct Known {
    pub(super) tid: i32,
    pub(super) number: i32,
    pub(super) id: u32,
    pub(super) kind: FdTypes,
}

/// A descriptor of which nothing need be asked again where another task has it too, under the same number.
#[derive(Debug, Clone, Copy)]
struct Heirloom {
    tid: i32,
    id: u32,
    kind: FdTypes,
}

/// Everything about the tree's files, gathered task by task.
#[derive(Debug)]
pub struct Collector {
    /// The options.
    pub options: Options,
    /// `files.img`.
    pub entries: Vec<FileEntry>,
    /// `remap-fpath.img`.
    pub remaps: Vec<RemapFilePathEntry>,
    /// `pipes-data.img`.
    pub pipe_data: Vec<(PipeDataEntry, Vec<u8>)>,
    /// `fifo-data.img`.
    pub fifo_data: Vec<(PipeDataEntry, Vec<u8>)>,
    /// `bpfmap-data.img`: all keys, then all values.
    pub bpf_data: Vec<(BpfmapDataEntry, Vec<u8>)>,
    /// Our own extra state, by file id.
    pub extra: BTreeMap<u32, RewakeFileEntry>,
    /// What is written besides.
    pub contents: Vec<Contents>,
    /// Regular files by path and flags, for mappings, exe, cwd and root.
    pub(super) by_path: HashMap<(Vec<u8>, u32, u64), u32>,
    /// Ghost ids by device and inode.
    pub(super) ghosts: HashMap<(u64, u64), u64>,
    /// File ids of the other names of files whose own is gone, by device and inode.
    pub(super) links: HashMap<(u64, u64), u32>,
    /// Pipes whose contents are taken.
    pub(super) pipes: std::collections::HashSet<u64>,
    /// Pipe ids of FIFOs whose contents are taken, by device and inode.
    pub(super) fifos: HashMap<(u64, u64), u32>,
    /// The processes of the tree, for what refers to them; filled before the first descriptor is collected.
    pub pids: std::collections::HashSet<i32>,
    /// Its threads, likewise.
    pub threads: std::collections::HashSet<i32>,
    /// Shared memory segments by device and inode.
    pub segments: HashMap<(u64, u64), crate::memory::shared::SegmentId>,
    /// System V shared memory segments.
    pub sysv: crate::memory::sysv::Survey,
    /// `tty-info.img`, gathered by the terminal module.
    pub ttys: Vec<rewake_image::messages::TtyInfoEntry>,
    /// `tty-data.img`: what waits in pseudoterminals.
    pub tty_data: Vec<rewake_image::messages::TtyDataEntry>,
    /// What of pseudoterminals is inside the tree.
    pub(super) ptys: super::pty::Survey,
    /// File locks.
    pub locks: super::locks::Survey,
    /// What is known of sockets besides their entries.
    pub sockets: crate::sockets::Survey,
    /// Sets of descriptors of the same kind of file, ordered by kcmp(2).
    pub(super) known: HashMap<Key, Vec<Known>>,
    /// File ids and kinds by what the kernel has told ([`Told::description`]).
    pub(super) described: HashMap<u64, (u32, FdTypes)>,
    /// The last descriptor of each number that could be inherited.
    heirlooms: HashMap<i32, Heirloom>,
    /// Copies what is in pipes.
    pub(super) copier: pipe::Copier,
    next_id: u32,
    /// How long may still be waited for timers that are due.
    pub(super) timer_patience: std::time::Duration,
    /// Watches of deleted files.
    pub(super) orphans: Vec<inotify::Orphan>,
    /// Descriptors in flight that are held by nobody else.
    pub(super) in_flight: Vec<OwnedFd>,
    /// io_uring instances of which it is still to be found what is registered with them.
    pub(super) rings: Vec<io_uring::registered::Pending>,
    /// The task that has the socket in which the descriptor at hand is in flight.
    pub(super) carrier: Option<i32>,
}

impl Collector {
    /// An empty collection.
    #[must_use]
    pub fn new(options: Options) -> Collector {
        Collector {
            options,
            entries: Vec::new(),
            remaps: Vec::new(),
            pipe_data: Vec::new(),
            fifo_data: Vec::new(),
            bpf_data: Vec::new(),
            extra: BTreeMap::new(),
            contents: Vec::new(),
            by_path: HashMap::new(),
            ghosts: HashMap::new(),
            links: HashMap::new(),
            pipes: std::collections::HashSet::new(),
            fifos: HashMap::new(),
            pids: std::collections::HashSet::new(),
            threads: std::collections::HashSet::new(),
            segments: HashMap::new(),
            sysv: crate::memory::sysv::Survey::default(),
            ttys: Vec::new(),
            tty_data: Vec::new(),
            ptys: super::pty::Survey::default(),
            locks: super::locks::Survey::default(),
            sockets: crate::sockets::Survey::default(),
            known: HashMap::new(),
            described: HashMap::new(),
            heirlooms: HashMap::new(),
            copier: pipe::Copier::default(),
            next_id: 1,
            timer_patience: timerfd::PATIENCE,
            orphans: Vec::new(),
            in_flight: Vec::new(),
            rings: Vec::new(),
            carrier: None,
        }
    }

    /// The task of the tree that `view` is seen from: it has the descriptor, or the socket in which it is in flight.
    #[must_use]
    pub fn holder(&self, view: &View<'_>) -> i32 {
        self.carrier.unwrap_or(view.pid)
    }

    /// A living thread of that task.
    pub(crate) fn looking(&self, view: &View<'_>) -> i32 {
        self.carrier.unwrap_or(view.tid)
    }

    /// Thread, number there and file id of the descriptors collected so far whose file has this inode number.
    pub(super) fn holders_of(&self, inode: u64) -> impl Iterator<Item = (i32, i32, u32)> {
        let same = move |((_, ino, ..), _): &(&Key, &Vec<Known>)| *ino == inode;
        let known = self.known.iter().filter(same).flat_map(|(_, known)| known);
        known.map(|known| (known.tid, known.number, known.id))
    }

    /// The file id of a description of this file, if one was collected.
    pub(super) fn file_of(&self, dev: u64, ino: u64) -> Option<u32> {
        let same = |((d, i, ..), _): &(&Key, &Vec<Known>)| (*d, *i) == (dev, ino);
        let mut known = self.known.iter().filter(same).flat_map(|(_, known)| known);
        known.find(|k| k.kind == FdTypes::Reg).map(|k| k.id)
    }

    /// The file id of the io_uring instance with this inode number.
    #[must_use]
    pub fn ring_of(&self, inode: u64) -> Option<u32> {
        let mut found = self.holders_of(inode).map(|(.., id)| id);
        found.next().filter(|id| self.extra.get(id).is_some_and(|e| e.ring.is_some()))
    }

    /// The file id of the packet socket with this inode number, if its rings are these many bytes together.
    #[must_use]
    pub fn ringed_socket_of(&self, inode: u64, bytes: u64) -> Option<u32> {
        let id = self.holders_of(inode).map(|(.., id)| id).next()?;
        let entry = self.entries.iter().find(|file| file.id == id)?.psk.as_ref()?;
        let rings = [entry.rx_ring.as_ref(), entry.tx_ring.as_ref()].into_iter().flatten();
        let size: u64 = rings.map(|r| u64::from(r.block_size) * u64::from(r.block_nr)).sum();
        (size == bytes).then_some(id)
    }

    /// A file id that nobody has.
    pub fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// As [`Collector::descriptor`], if the task has the descriptor from another one (fork(2)): one question instead of a dozen.
    pub fn inherited(&self, tid: i32, number: i32) -> Option<(u32, FdTypes)> {
        let known = self.heirlooms.get(&number)?;
        let same = kcmp::compare_files(known.tid, number, tid, number).ok()?;
        (same == Ordering::Equal).then_some((known.id, known.kind))
    }

    /// Collects one descriptor: its file id and type. A description that is known already is not surveyed again.
    ///
    /// # Errors
    /// Why it cannot be saved.
    pub fn descriptor(&mut self, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
        // First: surveying a file may open it once more, which a lease does not survive.
        let locks = super::locks::of(self, view)?;
        let number = match view.told {
            _ if view.link != eventfd::LINK => None,
            Some(told) => Some(told.event.2).filter(|id| *id >= 0),
            None => eventfd::object_number(&(view.fdinfo)()?),
        };
        let key = (view.stat.st_dev, view.stat.st_ino, view.flags, number);
        // Taken out so that survey functions may use the collector.
        let mut known = self.known.remove(&key).unwrap_or_default();
        let result = self.look_up(view, &mut known);
        self.known.insert(key, known);
        let (id, kind) = result?;
        if !locks.is_empty() {
            super::locks::note(self, view, id, locks)?;
        } else if self.pids.len() > 1 && self.locks.is_free(view) {
            self.heirlooms.insert(view.number, Heirloom { tid: view.tid, id, kind });
        }
        Ok((id, kind))
    }

    fn look_up(
        &mut self,
        view: &View<'_>,
        known: &mut Vec<Known>,
    ) -> Result<(u32, FdTypes), Problem> {
        let description = view.told.map(|told| told.description);
        if let Some(known) = description.and_then(|d| self.described.get(&d)) {
            return Ok(*known);
        }
        let mut failure = None;
        let found = known.binary_search_by(|k| {
            kcmp::compare_files(k.tid, k.number, view.tid, view.number).unwrap_or_else(|e| {
                failure = Some(e);
                Ordering::Equal
            })
        });
        if let Some(e) = failure {
            return Err(view.problem(format!("cannot be compared with other descriptors: {e}")));
        }
        let (id, kind) = match found {
            Ok(at) => (known[at].id, known[at].kind),
            Err(at) => {
                let (id, kind) = survey_kind(self, view)?;
                self.note_write_hint(view, id);
                known.insert(at, Known { tid: view.tid, number: view.number, id, kind });
                (id, kind)
            }
        };
        self.described.extend(description.map(|description| (description, (id, kind))));
        Ok((id, kind))
    }

    /// Notes how long the data of a file live, if anything is known of that. It is the file's, not the description's.
    fn note_write_hint(&mut self, view: &View<'_>, id: u32) {
        let kind = view.stat.st_mode & libc::S_IFMT;
        if matches!(kind, libc::S_IFREG | libc::S_IFBLK)
            && view.flags & libc::O_PATH as u32 == 0
            && let Ok(hint @ 1..) = file::write_hint(view.as_fd())
        {
            self.extra_of(id).write_hint = Some(hint);
        }
    }

    /// Our own extra state of file `id`, to be filled in.
    pub fn extra_of(&mut self, id: u32) -> &mut RewakeFileEntry {
        self.extra.entry(id).or_insert_with(|| RewakeFileEntry { id, ..RewakeFileEntry::default() })
    }

    /// Adds a file of a kind that CRIU does not know: in `files.img` it is one of a plugin, of which `rewake.img` has the rest.
    ///
    /// # Errors
    /// Its owner cannot be told.
    pub fn push_foreign(&mut self, id: u32, view: &View<'_>) -> Result<FdTypes, Problem> {
        self.push(FileEntry {
            r#type: FdTypes::Ext as i32,
            id,
            ext: Some(Box::new(ExtFileEntry { id, fown: view.owner()? })),
            ..FileEntry::default()
        });
        Ok(FdTypes::Ext)
    }

    /// Adds an entry to `files.img`.
    pub fn push(&mut self, entry: FileEntry) {
        self.entries.push(entry);
    }
}

/// The registry of kinds: who saves this descriptor?
fn survey_kind(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    const KIND: u32 = libc::S_IFMT;
    if let Some(name) = view.link.strip_prefix(b"anon_inode:") {
        return match name {
            b"[eventfd]" => eventfd::survey(collector, view),
            b"[eventpoll]" => epoll::survey(collector, view),
            b"[signalfd]" => signalfd::survey(collector, view),
            b"[timerfd]" => timerfd::survey(collector, view),
            b"[pidfd]" => pidfd::survey(collector, view),
            b"[io_uring]" => io_uring::survey(collector, view),
            b"bpf-map" => bpf_map::survey(collector, view),
            b"[fanotify]" => fanotify::survey(collector, view),
            b"inotify" => inotify::survey(collector, view),
            _ => Err(anonymous(view, name)),
        };
    }
    if let Some(name) = nsfs::kind(&view.link) {
        return nsfs::survey(collector, view, name);
    }
    if view.flags & libc::O_PATH as u32 != 0 && view.link.starts_with(b"/") {
        // Only a name, whatever it leads to.
        return regular::survey(collector, view);
    }
    match view.stat.st_mode & KIND {
        libc::S_IFIFO if view.link.starts_with(b"/") => fifo::survey(collector, view),
        libc::S_IFIFO => pipe::survey(collector, view),
        libc::S_IFREG if view.link.starts_with(b"/memfd:") => {
            let name = &view.link[b"/memfd:".len()..];
            let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
            crate::memory::shared::survey_descriptor(collector, view, name)
        }
        libc::S_IFREG if view.link.starts_with(b"/secretmem") && is_on(view, SECRETMEM_MAGIC) => {
            Err(anonymous(view, b"[secretmem]"))
        }
        libc::S_IFREG if view.stat.st_size == MESSAGE_QUEUE_SIZE && is_on(view, MQUEUE_MAGIC) => {
            Err(anonymous(view, b"[mqueue]"))
        }
        // A block device is its path and a position, whatever is on it.
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFBLK => regular::survey(collector, view),
        libc::S_IFCHR if regular::is_plain_device(view.stat.st_rdev) => {
            regular::survey(collector, view)
        }
        libc::S_IFSOCK => crate::sockets::survey(collector, view),
        libc::S_IFCHR if tty::is_terminal(view.stat.st_rdev) => tty::survey(collector, view),
        libc::S_IFCHR => Err(character_device(view)),
        _ => Err(view.problem("descriptors of this kind cannot be saved yet")),
    }
}

/// File systems of objects that look like files (linux/magic.h).
const MQUEUE_MAGIC: i64 = 0x1980_0202;
const SECRETMEM_MAGIC: i64 = 0x5345_434d;
/// What stat(2) says of every queue of mq_overview(7).
const MESSAGE_QUEUE_SIZE: i64 = 80;

fn is_on(view: &View<'_>, magic: i64) -> bool {
    rustix::fs::fstatfs(&view.fd).is_ok_and(|fs| fs.f_type == magic)
}

/// Why an object that has only a descriptor (`anon_inode:`) of kind `name` cannot be saved.
fn anonymous(view: &View<'_>, name: &[u8]) -> Problem {
    let (kind, remedy) = match name {
        b"[userfaultfd]" => ("userfaultfds", "close it for the time of the dump"),
        b"[perf_event]" => {
            ("performance counters (perf_event_open)", "stop the profiler for the time of the dump")
        }
        b"bpf-prog" => {
            ("BPF programs", "close it for the time of the dump, or pin it and open it again")
        }
        b"bpf_link" | b"bpf-link" => {
            ("BPF links", "close it for the time of the dump, or pin it and open it again")
        }
        b"bpf_iter" | b"btf" | b"bpf-token" => ("BPF objects", "close it for the time of the dump"),
        b"seccomp notify" => ("seccomp listeners", "close it for the time of the dump"),
        b"[landlock-ruleset]" => ("Landlock rulesets", "apply and close it before the dump"),
        name if name.starts_with(b"kvm") => {
            ("virtual machines (KVM)", "use the virtual machine monitor's own snapshots")
        }
        b"[mqueue]" => ("POSIX message queues (mq_open)", "close it for the time of the dump"),
        b"[secretmem]" => {
            ("secret memory (memfd_secret)", "it cannot be read by anybody but the program itself")
        }
        name if name.starts_with(b"dmabuf") || name.starts_with(b"sync_file") => {
            ("buffers shared with devices (dma-buf)", "close the device for the time of the dump")
        }
        b"[fscontext]" => ("mounts in the making", "close it for the time of the dump"),
        _ => ("descriptors of this kind", "close it for the time of the dump"),
    };
    view.problem(format!("{kind} cannot be saved yet")).remedy(remedy)
}

/// Why a character device cannot be saved.
fn character_device(view: &View<'_>) -> Problem {
    let (major, minor) =
        (rustix::fs::major(view.stat.st_rdev), rustix::fs::minor(view.stat.st_rdev));
    let kind = match (major, minor) {
        (10, 200) => "tun/tap devices".to_owned(),
        (10, 229) => "FUSE connections".to_owned(),
        (10, 232) => "virtual machines (KVM)".to_owned(),
        (195 | 226, _) => "graphics devices".to_owned(),
        (116, _) => "sound devices".to_owned(),
        (13, _) => "input devices".to_owned(),
        _ => format!("character devices of this kind ({major}:{minor})"),
    };
    view.problem(format!("{kind} cannot be saved yet")).remedy("close it for the time of the dump")
}
