//! The texts of the links in `/proc/PID/fd`, `/proc/PID/ns`, `exe`, `cwd` and `root` (proc_pid_fd(5), namespaces(7)).

use crate::ParseError;
use crate::scan::Scan;

/// Kind of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NsKind {
    /// cgroup_namespaces(7).
    Cgroup,
    /// ipc_namespaces(7).
    Ipc,
    /// mount_namespaces(7).
    Mnt,
    /// network_namespaces(7).
    Net,
    /// pid_namespaces(7).
    Pid,
    /// time_namespaces(7).
    Time,
    /// user_namespaces(7).
    User,
    /// uts_namespaces(7).
    Uts,
}

impl NsKind {
    /// All kinds.
    pub const ALL: [NsKind; 8] = [
        NsKind::Cgroup,
        NsKind::Ipc,
        NsKind::Mnt,
        NsKind::Net,
        NsKind::Pid,
        NsKind::Time,
        NsKind::User,
        NsKind::Uts,
    ];

    /// Its name in `/proc/PID/ns` and in link texts.
    pub const fn name(self) -> &'static str {
        match self {
            NsKind::Cgroup => "cgroup",
            NsKind::Ipc => "ipc",
            NsKind::Mnt => "mnt",
            NsKind::Net => "net",
            NsKind::Pid => "pid",
            NsKind::Time => "time",
            NsKind::User => "user",
            NsKind::Uts => "uts",
        }
    }

    fn from_name(name: &[u8]) -> Option<NsKind> {
        NsKind::ALL.into_iter().find(|kind| kind.name().as_bytes() == name)
    }
}

/// A namespace: its kind and the inode number that names it while it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ns {
    /// Kind.
    pub kind: NsKind,
    /// Inode number in nsfs.
    pub ino: u64,
}

/// Parses the text of a link in `/proc/PID/ns`, as `pid:[4026531836]`.
///
/// # Errors
/// If it has not that form or the kind is not known.
pub fn parse_ns(text: &[u8]) -> Result<Ns, ParseError> {
    numbered(text)
        .and_then(|(name, ino)| Some(Ns { kind: NsKind::from_name(name)?, ino }))
        .ok_or_else(|| ParseError::malformed("ns", "link", 1, text))
}

/// What a descriptor's link says of its file.
///
/// The text alone can deceive: a file may be called `/memfd:x (deleted)`. A kind without `/` in front cannot be a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdLink<'a> {
    /// `socket:[N]`: inode number in sockfs.
    Socket(u64),
    /// `pipe:[N]`: inode number in pipefs (a FIFO with a name is a [`FdLink::Path`]).
    Pipe(u64),
    /// `anon_inode:[eventfd]`, `anon_inode:inotify`: the name without brackets.
    AnonInode(&'a [u8]),
    /// `pidfd:[N]`: inode number in pidfs; kernels print `anon_inode:[pidfd]` here for old programs' sake.
    PidFd(u64),
    /// `net:[N]` and its like: a namespace.
    Ns(Ns),
    /// `/memfd:NAME (deleted)`.
    Memfd(&'a [u8]),
    /// `/dmabuf:NAME`.
    DmaBuf(&'a [u8]),
    /// `/path (deleted)`: the path, exact, without the suffix.
    Deleted(&'a [u8]),
    /// `/path`, exact: links are not escaped.
    Path(&'a [u8]),
    /// A path from which the reader's root is not reached: `(unreachable)/path`, without the prefix.
    Unreachable(&'a [u8]),
    /// Anything else.
    Other(&'a [u8]),
}

/// Classifies the text of a link in `/proc/PID/fd` (or of `exe`, `cwd`, `root`). Never fails.
pub fn classify(text: &[u8]) -> FdLink<'_> {
    if text.first() == Some(&b'/') {
        return match text.strip_suffix(b" (deleted)") {
            Some(path) => match path.strip_prefix(b"/memfd:") {
                Some(name) => FdLink::Memfd(name),
                None if path.is_empty() => FdLink::Path(text),
                None => FdLink::Deleted(path),
            },
            None => match text.strip_prefix(b"/dmabuf:") {
                Some(name) => FdLink::DmaBuf(name),
                None => FdLink::Path(text),
            },
        };
    }
    if let Some(name) = text.strip_prefix(b"anon_inode:") {
        let bare = name.strip_prefix(b"[").and_then(|n| n.strip_suffix(b"]"));
        return FdLink::AnonInode(bare.unwrap_or(name));
    }
    if let Some(path) = text.strip_prefix(b"(unreachable)") {
        return FdLink::Unreachable(path);
    }
    match numbered(text) {
        Some((b"socket", ino)) => FdLink::Socket(ino),
        Some((b"pipe", ino)) => FdLink::Pipe(ino),
        Some((b"pidfd", ino)) => FdLink::PidFd(ino),
        Some((name, ino)) => {
            NsKind::from_name(name).map_or(FdLink::Other(text), |kind| FdLink::Ns(Ns { kind, ino }))
        }
        None => FdLink::Other(text),
    }
}

/// `name:[N]`.
fn numbered(text: &[u8]) -> Option<(&[u8], u64)> {
    let mut scan = Scan::new(text);
    let name = scan.until(b':')?;
    scan.eat(b'[')?;
    let number = scan.dec()?;
    scan.eat(b']')?;
    scan.is_empty().then_some((name, number))
}
