//! `/proc/PID/fdinfo/FD` (proc_pid_fdinfo(5), Documentation/filesystems/proc.rst section 3.8).
//!
//! Four lines that every file has, then `lock:` lines, then whatever the kind of file adds. The text does not name the
//! kind (an epoll without items adds nothing): take that from the descriptor's link, see [`crate::link`].

mod bpf;
mod notify;
mod simple;

pub use bpf::{BpfMap, BpfProg};
pub use notify::{FanotifyGroup, FanotifyMark, FanotifyTarget, FileHandle, InotifyWatch};
pub use simple::{EpollItem, EventFd, PidFd, TimerFd};

use crate::ParseError;
use crate::locks::Lock;
use crate::scan::{Scan, key_value, lines};

const FILE: &str = "fdinfo";

/// A device number in the kernel's internal form (`dev_t`: 20 bits of minor), as fdinfo prints `sdev`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelDev(pub u32);

impl KernelDev {
    /// Major number.
    pub const fn major(self) -> u32 {
        self.0 >> 20
    }

    /// Minor number.
    pub const fn minor(self) -> u32 {
        self.0 & 0xf_ffff
    }
}

/// What `fdinfo` says of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdInfo<'a> {
    /// File position.
    pub pos: i64,
    /// Open flags, `O_*`; `O_CLOEXEC` is the descriptor's own flag.
    pub flags: u32,
    /// Mount the file was opened through, as in `mountinfo`.
    pub mnt_id: i32,
    /// Inode number.
    pub ino: u64,
    /// Locks this task's descriptor table or this description holds on the file.
    pub locks: Vec<Lock>,
    /// eventfd(2).
    pub eventfd: Option<EventFd>,
    /// Items of an epoll(7) instance.
    pub epoll: Vec<EpollItem>,
    /// Mask of a signalfd(2): bit n-1 is signal n.
    pub signalfd: Option<u64>,
    /// timerfd_create(2).
    pub timerfd: Option<TimerFd>,
    /// Watches of an inotify(7) instance, the newest first.
    pub inotify: Vec<InotifyWatch>,
    /// fanotify(7) group.
    pub fanotify: Option<FanotifyGroup>,
    /// Its marks.
    pub fanotify_marks: Vec<FanotifyMark>,
    /// pidfd_open(2).
    pub pidfd: Option<PidFd>,
    /// Number of the pseudo-terminal whose master this is.
    pub tty_index: Option<u32>,
    /// Descriptors in flight in a unix socket's receive queue.
    pub scm_fds: Option<u32>,
    /// Interface name of a tun/tap queue.
    pub tun_iff: Option<&'a [u8]>,
    /// BPF map.
    pub bpf_map: Option<BpfMap>,
    /// BPF program.
    pub bpf_prog: Option<BpfProg>,
    /// All other lines as they stand (io_uring, userfaultfd, DRM, dma-buf, fuse …).
    pub raw: Vec<&'a [u8]>,
}

/// Parses the text of `/proc/PID/fdinfo/FD`. Unknown lines are kept in [`FdInfo::raw`].
///
/// # Errors
/// If one of the four common lines is missing (`ino` came with Linux 5.15), or a known line is malformed or only half
/// of a kind's lines is there.
pub fn parse(text: &[u8]) -> Result<FdInfo<'_>, ParseError> {
    let mut info = FdInfo {
        pos: 0,
        flags: 0,
        mnt_id: 0,
        ino: 0,
        locks: Vec::new(),
        eventfd: None,
        epoll: Vec::new(),
        signalfd: None,
        timerfd: None,
        inotify: Vec::new(),
        fanotify: None,
        fanotify_marks: Vec::new(),
        pidfd: None,
        tty_index: None,
        scm_fds: None,
        tun_iff: None,
        bpf_map: None,
        bpf_prog: None,
        raw: Vec::new(),
    };
    let mut pos = None;
    let mut flags = None;
    let mut mnt_id = None;
    let mut ino = None;
    let mut parts = Parts::default();
    for (number, line) in lines(text) {
        // The common lines come first and once; what a driver prints under the same key later is its own.
        let Some((key, value)) = key_value(line) else {
            if !line.is_empty() {
                extension(&mut info, &mut parts, line, line, b"")
                    .map_err(|field| ParseError::malformed(FILE, field, number, line))?;
            }
            continue;
        };
        let bad = |field| ParseError::malformed(FILE, field, number, line);
        match key {
            b"pos" if pos.is_none() => {
                pos = Some(whole(value, |s| s.sdec()).ok_or_else(|| bad("pos"))?)
            }
            b"flags" if flags.is_none() => {
                flags = Some(whole(value, |s| s.oct()).ok_or_else(|| bad("flags"))?)
            }
            b"mnt_id" if mnt_id.is_none() => {
                mnt_id = Some(whole(value, |s| s.sdec()).ok_or_else(|| bad("mnt_id"))?)
            }
            b"ino" if ino.is_none() => {
                ino = Some(whole(value, |s| s.dec()).ok_or_else(|| bad("ino"))?)
            }
            b"lock" => info.locks.push(crate::locks::parse_line(value).map_err(bad)?),
            _ => extension(&mut info, &mut parts, line, key, value).map_err(bad)?,
        }
    }
    let missing = |field| ParseError::missing(FILE, field, 1, text);
    info.pos = pos.ok_or_else(|| missing("pos"))?;
    info.flags = flags.ok_or_else(|| missing("flags"))?;
    info.mnt_id = mnt_id.ok_or_else(|| missing("mnt_id"))?;
    info.ino = ino.ok_or_else(|| missing("ino"))?;
    info.eventfd = parts.eventfd.finish().map_err(missing)?;
    info.timerfd = parts.timerfd.finish().map_err(missing)?;
    info.pidfd = parts.pidfd.finish();
    (info.bpf_map, info.bpf_prog) = parts.bpf.finish().map_err(missing)?;
    Ok(info)
}

/// Kinds that spread over several lines, while they are collected.
#[derive(Default)]
struct Parts {
    eventfd: simple::EventFdParts,
    timerfd: simple::TimerFdParts,
    pidfd: simple::PidFdParts,
    bpf: bpf::BpfParts,
}

/// Stores one line of a kind's own; an error is the name of the field it is in.
fn extension<'a>(
    info: &mut FdInfo<'a>,
    parts: &mut Parts,
    line: &'a [u8],
    key: &[u8],
    value: &'a [u8],
) -> Result<(), &'static str> {
    match key {
        b"tfd" => info.epoll.push(simple::epoll_item(line)?),
        b"sigmask" => info.signalfd = Some(whole(value, |s| s.hex()).ok_or("sigmask")?),
        b"tty-index" => info.tty_index = Some(whole(value, |s| s.dec()).ok_or("tty-index")?),
        b"scm_fds" => info.scm_fds = Some(whole(value, |s| s.dec()).ok_or("scm_fds")?),
        b"iff" => info.tun_iff = Some(value),
        _ => {
            if let Some(words) = line.strip_prefix(b"inotify ") {
                info.inotify.push(notify::inotify_watch(words)?);
            } else if let Some(words) = line.strip_prefix(b"fanotify ") {
                notify::fanotify_line(words, &mut info.fanotify, &mut info.fanotify_marks)?;
            } else {
                let known = parts.eventfd.take(key, value)?
                    || parts.timerfd.take(key, value)?
                    || parts.pidfd.take(key, value)?
                    || parts.bpf.take(key, value)?;
                if !known {
                    info.raw.push(line);
                }
            }
        }
    }
    Ok(())
}

/// One number that is the whole value.
fn whole<T>(value: &[u8], number: impl FnOnce(&mut Scan<'_>) -> Option<T>) -> Option<T> {
    let mut scan = Scan::new(value);
    let number = number(&mut scan)?;
    scan.is_empty().then_some(number)
}
