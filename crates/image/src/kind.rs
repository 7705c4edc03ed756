//! The kinds of image files: names, magic numbers, and what is in them.
//!
//! A kind is found by file name. The magic number is then only verified: two kinds may share one.

use std::{fmt, marker::PhantomData};

use crate::{
    descriptor::{DescFn, MessageDesc},
    ghost::Ghost,
    messages::*,
    pagemap::Pagemap,
};

/// What `inventory.img` starts with; it has no second number.
pub const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// What all other images of version 1.1 start with; their own number follows.
pub const IMAGE_MAGIC: u32 = 0x5456_4319;
/// What files about a run, not of a checkpoint, start with; their own number follows.
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

/// A kind of image file that holds messages of type `M`, or what `M` describes.
pub struct Kind<M> {
    info: &'static KindInfo,
    content: PhantomData<fn() -> M>,
}

/// What there is to know about a kind of image file.
#[derive(Debug)]
pub struct KindInfo {
    /// crit's name for it, `magic` in its JSON.
    pub name: &'static str,
    /// The file name, with `%d` or `%x` where the id belongs.
    pub pattern: &'static str,
    /// The numbers it starts with.
    pub header: Header,
    /// The type of the messages; none for a raw file.
    pub message: Option<DescFn>,
    /// The type of the first message, where it is another than that of the rest.
    pub head: Option<DescFn>,
    /// How many messages there are, not counting such a first one.
    pub count: Count,
    /// What follows each message.
    pub payload: Payload,
}

/// The numbers an image file starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// [`INVENTORY_MAGIC`] alone.
    Inventory,
    /// [`IMAGE_MAGIC`] and this one (version 1: this one alone).
    Image(u32),
    /// [`SERVICE_MAGIC`] and this one.
    Service(u32),
    /// None: the file is data from its first byte.
    Unmarked,
}

/// How many messages a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Exactly one.
    One,
    /// Any number.
    Many,
}

/// What follows a message in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// Nothing.
    Nothing,
    /// As many bytes as the fields of these numbers say in sum.
    Lengths(&'static [u32]),
    /// `nsems` 16-bit numbers, padded with zeros to a multiple of eight bytes.
    Semaphores,
    /// `qnum` times: an [`IpcMsg`] in a frame, its text, zeros up to a multiple of eight bytes.
    Messages,
    /// `size` bytes, rounded up to a multiple of four, unless `in_pagemaps` is set.
    SharedMemory,
    /// The content of a ghost file up to the end of the file, either as it is or as [`GhostChunkEntry`] messages, each
    /// followed by its bytes.
    GhostContent,
}

/// The content of a file without messages.
#[derive(Debug)]
pub enum Raw {}

/// The number in a file's name; made from an integer, or from `()` for a kind whose name has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(Option<u64>);

macro_rules! kinds {
    ($($name:ident $($crit:literal)?: $content:ident = $header:expr, $pattern:literal, $count:ident $(, $payload:ident $(($fields:expr))?)?;)*) => {
        $(
            #[doc = concat!("`", $pattern, "`")]
            pub const $name: Kind<$content> = Kind {
                info: {
                    use {Count::*, Header::*, Payload::*};
                    const NAMES: &[&str] = &[$($crit,)? stringify!($name)];
                    const PAYLOAD: &[Payload] = &[$($payload $(($fields))?,)? Nothing];
                    &KindInfo {
                        name: NAMES[0],
                        pattern: $pattern,
                        header: $header,
                        message: <$content as Content>::MESSAGE,
                        head: <$content as Content>::HEAD,
                        count: $count,
                        payload: PAYLOAD[0],
                    }
                },
                content: PhantomData,
            };
        )*

        /// All kinds. Where two share a file name or a magic number, the one that stands for both comes first.
        pub fn all() -> &'static [&'static KindInfo] {
            static ALL: &[&KindInfo] = &[$($name.info),*];
            ALL
        }
    };
}

kinds! {
    INVENTORY: InventoryEntry = Inventory, "inventory.img", One;
    FDINFO: FdinfoEntry = Image(0x5621_3732), "fdinfo-%d.img", Many;
    PAGEMAP: Pagemap = Image(0x5608_4025), "pagemap-%d.img", Many;
    SHMEM_PAGEMAP: Pagemap = Image(0x5608_4025), "pagemap-shmem-%d.img", Many;
    CORE: CoreEntry = Image(0x5505_3847), "core-%d.img", One;
    IDS: TaskKobjIdsEntry = Image(0x5443_2030), "ids-%d.img", One;
    MM: MmEntry = Image(0x5749_2820), "mm-%d.img", One;
    PIPES_DATA: PipeDataEntry = Image(0x5645_3709), "pipes-data.img", Many, Lengths(&[2]);
    FIFO_DATA: PipeDataEntry = Image(0x5933_3054), "fifo-data.img", Many, Lengths(&[2]);
    PSTREE: PstreeEntry = Image(0x5027_3030), "pstree.img", Many;
    SK_QUEUES: SkPacketEntry = Image(0x5626_4026), "sk-queues.img", Many, Lengths(&[2]);
    UTSNS: UtsnsEntry = Image(0x5447_3203), "utsns-%d.img", One;
    IPC_VAR: IpcVarEntry = Image(0x5311_5007), "ipcns-var-%d.img", One;
    IPCNS_SHM: IpcShmEntry = Image(0x4628_3044), "ipcns-shm-%d.img", Many, SharedMemory;
    IPCNS_MSG: IpcMsgEntry = Image(0x5545_3737), "ipcns-msg-%d.img", Many, Messages;
    IPCNS_SEM: IpcSemEntry = Image(0x5957_3019), "ipcns-sem-%d.img", Many, Semaphores;
    FS: FsEntry = Image(0x5140_3912), "fs-%d.img", One;
    REMAP_FPATH: RemapFilePathEntry = Image(0x5913_3954), "remap-fpath.img", Many;
    GHOST_FILE: Ghost = Image(0x5258_3605), "ghost-file-%x.img", One, GhostContent;
    MEMFD_INODE: MemfdInodeEntry = Image(0x4845_3499), "memfd.img", Many;
    TCP_STREAM: TcpStreamEntry = Image(0x5146_5506), "tcp-stream-%x.img", One, Lengths(&[1, 3]);
    MNTS: MntEntry = Image(0x5556_3928), "mountpoints-%d.img", Many;
    NETDEV: NetDeviceEntry = Image(0x5737_3951), "netdev-%d.img", Many;
    NETNS: NetnsEntry = Image(0x5593_3752), "netns-%d.img", One;
    IFADDR: Raw = Unmarked, "ifaddr-%d.img", Many;
    ROUTE: Raw = Unmarked, "route-%d.img", Many;
    ROUTE6: Raw = Unmarked, "route6-%d.img", Many;
    RULE: Raw = Unmarked, "rule-%d.img", Many;
    IPTABLES: Raw = Unmarked, "iptables-%d.img", Many;
    IP6TABLES: Raw = Unmarked, "ip6tables-%d.img", Many;
    NFTABLES: Raw = Unmarked, "nftables-%d.img", Many;
    TMPFS_DEV: Raw = Unmarked, "tmpfs-dev-%d.tar.gz.img", Many;
    AUTOFS: AutofsEntry = Image(0x4935_3943), "autofs-%d.img", One;
    BINFMT_MISC: BinfmtMiscEntry = Image(0x6734_3323), "binfmt-misc.img", Many;
    TTY_INFO: TtyInfoEntry = Image(0x5945_3036), "tty-info.img", Many;
    TTY_DATA: TtyDataEntry = Image(0x5941_3026), "tty-data.img", Many;
    FILE_LOCKS: FileLockEntry = Image(0x5432_3616), "filelocks.img", Many;
    PAGES: Raw = Unmarked, "pages-%d.img", Many;
    CGROUP: CgroupEntry = Image(0x5938_3330), "cgroup.img", One;
    CPUINFO: CpuinfoEntry = Image(0x6140_4013), "cpuinfo.img", One;
    SECCOMP: SeccompEntry = Image(0x6441_3049), "seccomp.img", One;
    USERNS: UsernsEntry = Image(0x5547_4906), "userns-%d.img", One;
    NETNF_CT: Raw = Unmarked, "netns-ct-%d.img", Many;
    NETNF_EXP: Raw = Unmarked, "netns-exp-%d.img", Many;
    FILES: FileEntry = Image(0x5630_3138), "files.img", Many;
    TIMENS: TimensEntry = Image(0x4311_4433), "timens-%d.img", One;
    PIDNS: PidnsEntry = Image(0x6115_7326), "pidns-%d.img", One;
    BPFMAP_DATA: BpfmapDataEntry = Image(0x6432_4033), "bpfmap-data.img", Many, Lengths(&[2, 3]);
    APPARMOR: ApparmorEntry = Image(0x5942_3047), "apparmor.img", One;
    REWAKE: RewakeEntry = Image(0x5257_4b31), "rewake.img", Many;
    STATS_DUMP "STATS": StatsEntry = Service(0x5709_3306), "stats-dump", One;
    STATS_RESTORE "STATS": StatsEntry = Service(0x5709_3306), "stats-restore", One;
    IRMAP_CACHE: IrmapCacheEntry = Service(0x5700_4059), "irmap-cache", Many;

    // What only old versions of CRIU wrote.
    REG_FILES: RegFileEntry = Image(0x5036_3636), "reg-files.img", Many;
    EXT_FILES: ExtFileEntry = Image(0x5925_5641), "ext-files.img", Many;
    NS_FILES: NsFileEntry = Image(0x6139_4011), "ns-files.img", Many;
    EVENTFD_FILE: EventfdFileEntry = Image(0x4452_3722), "eventfd.img", Many;
    EVENTPOLL_FILE: EventpollFileEntry = Image(0x4502_3858), "eventpoll.img", Many;
    EVENTPOLL_TFD: EventpollTfdEntry = Image(0x4443_3746), "eventpoll-tfd.img", Many;
    SIGNALFD: SignalfdEntry = Image(0x5732_3820), "signalfd.img", Many;
    INOTIFY_FILE: InotifyFileEntry = Image(0x4842_4431), "inotify.img", Many;
    INOTIFY_WD: InotifyWdEntry = Image(0x5456_2009), "inotify-wd.img", Many;
    FANOTIFY_FILE: FanotifyFileEntry = Image(0x5509_6122), "fanotify.img", Many;
    FANOTIFY_MARK: FanotifyMarkEntry = Image(0x5650_6035), "fanotify-mark.img", Many;
    VMAS: VmaEntry = Image(0x5412_3737), "vmas-%d.img", Many;
    PIPES: PipeEntry = Image(0x5651_3555), "pipes.img", Many;
    FIFO: FifoEntry = Image(0x5836_4939), "fifo.img", Many;
    SIGACT: SaEntry = Image(0x5534_4201), "sigacts-%d.img", Many;
    UNIXSK: UnixSkEntry = Image(0x5437_3943), "unixsk.img", Many;
    INETSK: InetSkEntry = Image(0x5644_3851), "inetsk.img", Many;
    PACKETSK: PacketSockEntry = Image(0x6045_4618), "packetsk.img", Many;
    NETLINK_SK: NetlinkSkEntry = Image(0x5800_5614), "netlinksk.img", Many;
    ITIMERS: ItimerEntry = Image(0x5746_4056), "itimers-%d.img", Many;
    POSIX_TIMERS: PosixTimerEntry = Image(0x5260_3957), "posix-timers-%d.img", Many;
    CREDS: CredsEntry = Image(0x5402_3547), "creds-%d.img", One;
    TMPFS_IMG: Raw = Unmarked, "tmpfs-%d.tar.gz.img", Many;
    BINFMT_MISC_OLD: BinfmtMiscEntry = Image(0x6734_3323), "binfmt-misc-%d.img", Many;
    TTY_FILES: TtyFileEntry = Image(0x5943_3025), "tty.img", Many;
    RLIMIT: RlimitEntry = Image(0x5711_3925), "rlimit-%d.img", Many;
    SIGNAL: SiginfoEntry = Image(0x5925_5647), "signal-s-%d.img", Many;
    PSIGNAL: SiginfoEntry = Image(0x5925_5647), "signal-p-%d.img", Many;
    TUNFILE: TunfileEntry = Image(0x5714_3751), "tunfile.img", Many;
    TIMERFD: TimerfdEntry = Image(0x5049_3712), "timerfd.img", Many;
    BPFMAP_FILE: BpfmapFileEntry = Image(0x5750_6142), "bpfmap-file.img", Many;
    PIDFD: PidfdEntry = Image(0x5443_5556), "pidfd.img", Many;
    PAGES_OLD: Raw = Image(0x5608_4025), "pages-%d.img", Many;
    SHM_PAGES_OLD: Raw = Image(0x5608_4025), "pages-shmem-%d.img", Many;
}

/// What a kind's files hold.
trait Content {
    const MESSAGE: Option<DescFn>;
    const HEAD: Option<DescFn> = None;
}

impl<M: ImageMessage> Content for M {
    const MESSAGE: Option<DescFn> = Some(M::desc);
}

impl Content for Raw {
    const MESSAGE: Option<DescFn> = None;
}

impl Content for Pagemap {
    const MESSAGE: Option<DescFn> = Some(PagemapEntry::desc);
    const HEAD: Option<DescFn> = Some(PagemapHead::desc);
}

impl Content for Ghost {
    const MESSAGE: Option<DescFn> = Some(GhostFileEntry::desc);
}

/// The kind of the file with this name, and the id in the name.
pub fn by_file_name(name: &str) -> Option<(&'static KindInfo, Id)> {
    all().iter().find_map(|info| info.match_name(name).map(|id| (*info, id)))
}

/// The kind that crit calls so.
pub fn by_name(name: &str) -> Option<&'static KindInfo> {
    all().iter().find(|info| info.name == name).copied()
}

/// The kind of a file that starts with these two numbers, and how many bytes they take: in version 1 the kind's own number
/// comes first.
pub fn by_magic(first: u32, second: u32) -> Option<(&'static KindInfo, usize)> {
    let (wanted, length) = match first {
        INVENTORY_MAGIC => (Header::Inventory, 4),
        IMAGE_MAGIC => (Header::Image(second), 8),
        SERVICE_MAGIC => (Header::Service(second), 8),
        _ => (Header::Image(first), 4),
    };
    all().iter().find(|info| info.header == wanted).map(|info| (*info, length))
}

impl KindInfo {
    /// The name of the file with this id.
    pub fn file_name(&self, id: Id) -> String {
        let (prefix, hex, suffix) = self.split_pattern();
        debug_assert_eq!(
            id.0.is_some(),
            hex.is_some(),
            "{}: the name has an id or has none",
            self.pattern
        );
        let number = id.0.unwrap_or(0);
        match hex {
            None => prefix.to_owned(),
            Some(false) => format!("{prefix}{number}{suffix}"),
            Some(true) => format!("{prefix}{number:x}{suffix}"),
        }
    }

    /// The type of the message at `index` of the file.
    pub fn message_at(&self, index: usize) -> Option<&'static MessageDesc> {
        let first = if index == 0 { self.head } else { None };
        first.or(self.message).map(|desc| desc())
    }

    /// The numbers a new file starts with.
    pub(crate) fn header_bytes(&self) -> Vec<u8> {
        let numbers: &[u32] = match self.header {
            Header::Inventory => &[INVENTORY_MAGIC],
            Header::Image(magic) => &[IMAGE_MAGIC, magic],
            Header::Service(magic) => &[SERVICE_MAGIC, magic],
            Header::Unmarked => &[],
        };
        numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    /// Is this the name of a file of this kind?
    pub fn names(&self, name: &str) -> bool {
        self.match_name(name).is_some()
    }

    fn match_name(&self, name: &str) -> Option<Id> {
        let (prefix, hex, suffix) = self.split_pattern();
        let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        let id = match hex {
            None => return digits.is_empty().then_some(Id(None)),
            Some(hex) => Id(Some(u64::from_str_radix(digits, if hex { 16 } else { 10 }).ok()?)),
        };
        // refuses what a number may look like but is never written, such as `+1` and `007`
        (self.file_name(id) == name).then_some(id)
    }

    /// What is before the id, whether the id is hexadecimal (if there is one), and what is after it.
    fn split_pattern(&self) -> (&'static str, Option<bool>, &'static str) {
        match self.pattern.split_once('%') {
            Some((prefix, rest)) => (prefix, Some(rest.starts_with('x')), &rest[1..]),
            None => (self.pattern, None, ""),
        }
    }
}

impl<M> Kind<M> {
    /// The kind without its type.
    pub const fn info(self) -> &'static KindInfo {
        self.info
    }

    /// The name of the file with this id.
    pub fn file_name(self, id: impl Into<Id>) -> String {
        self.info.file_name(id.into())
    }
}

impl<M> Clone for Kind<M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Kind<M> {}

impl<M> fmt::Debug for Kind<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info.name)
    }
}

impl Id {
    /// The number, if there is one.
    pub fn number(self) -> Option<u64> {
        self.0
    }
}

impl From<()> for Id {
    fn from((): ()) -> Self {
        Id(None)
    }
}

impl From<u64> for Id {
    fn from(id: u64) -> Self {
        Id(Some(id))
    }
}

impl From<u32> for Id {
    fn from(id: u32) -> Self {
        Id(Some(id.into()))
    }
}

/// For process ids, which the kernel's interfaces give as `i32`.
impl From<i32> for Id {
    fn from(id: i32) -> Self {
        Id(Some(id.cast_unsigned().into()))
    }
}
