//! `/proc/locks` (proc_locks(5)), and the `lock:` lines of `fdinfo`, which have the same form.

use crate::ParseError;
use crate::scan::{Scan, lines};

const FILE: &str = "locks";

/// Kind of a file lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockKind {
    /// fcntl(2) `F_SETLK`: belongs to a process's descriptor table.
    Posix,
    /// fcntl(2) `F_OFD_SETLK`: belongs to a file description.
    Ofd,
    /// flock(2): belongs to a file description.
    Flock,
    /// fcntl(2) `F_SETLEASE`.
    Lease,
    /// A delegation given by the NFS server.
    Deleg,
    /// Another word (`ACCESS`, `UNKNOWN` …).
    Other(Box<[u8]>),
}

/// What a lock allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockType {
    /// Shared (`F_RDLCK`, `LOCK_SH`).
    Read,
    /// Exclusive (`F_WRLCK`, `LOCK_EX`).
    Write,
    /// `F_UNLCK`, as a lease that is being given up.
    Unlock,
    /// Another word.
    Other(Box<[u8]>),
}

/// One lock, or one request that waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// Number in the listing; waiters have the number of the lock they wait for.
    pub id: u64,
    /// Is this a waiter (`->`)?
    pub waiting: bool,
    /// Kind.
    pub kind: LockKind,
    /// Second word: `ADVISORY`, for leases `ACTIVE`, `BREAKING` or `BREAKER`, or `*NOINODE*`.
    pub mode: Box<[u8]>,
    /// Type.
    pub lock_type: LockType,
    /// Holder in the reader's pid namespace; -1 for OFD locks, 0 if it is outside.
    pub pid: i32,
    /// Device (major, minor: `s_dev`) and inode; `None` if the file is gone.
    pub file: Option<(u32, u32, u64)>,
    /// First byte.
    pub start: u64,
    /// Last byte; `None` for the end of the file wherever it is.
    pub end: Option<u64>,
}

/// Parses the text of `/proc/locks`.
///
/// # Errors
/// If a line is malformed.
pub fn parse(text: &[u8]) -> Result<Vec<Lock>, ParseError> {
    let one = |(number, line)| {
        parse_line(line).map_err(|field| ParseError::malformed(FILE, field, number, line))
    };
    lines(text).filter(|(_, line)| !line.trim_ascii().is_empty()).map(one).collect()
}

/// Parses one line; an error is the name of the field it is in.
pub(crate) fn parse_line(line: &[u8]) -> Result<Lock, &'static str> {
    let mut scan = Scan::new(line);
    scan.blanks();
    let id = scan.dec().ok_or("id")?;
    scan.eat(b':').ok_or("id")?;
    let mut word = scan.word().ok_or("kind")?;
    let waiting = word == b"->";
    if waiting {
        word = scan.word().ok_or("kind")?;
    }
    let kind = match word {
        b"POSIX" => LockKind::Posix,
        b"OFDLCK" => LockKind::Ofd,
        b"FLOCK" => LockKind::Flock,
        b"LEASE" => LockKind::Lease,
        b"DELEG" => LockKind::Deleg,
        other => LockKind::Other(other.into()),
    };
    let mode = scan.word().ok_or("mode")?.into();
    let lock_type = match scan.word().ok_or("type")? {
        b"READ" => LockType::Read,
        b"WRITE" => LockType::Write,
        b"UNLCK" => LockType::Unlock,
        other => LockType::Other(other.into()),
    };
    scan.blanks();
    let pid = scan.sdec().ok_or("pid")?;
    let file = file(scan.word().ok_or("inode")?).ok_or("inode")?;
    scan.blanks();
    let start = scan.dec().ok_or("start")?;
    let end = match scan.word().ok_or("end")? {
        b"EOF" => None,
        number => {
            let mut number = Scan::new(number);
            let end = number.dec().ok_or("end")?;
            number.end().ok_or("end")?;
            Some(end)
        }
    };
    scan.end().ok_or("end")?;
    Ok(Lock { id, waiting, kind, mode, lock_type, pid, file, start, end })
}

/// `fe:00:10011195`, or `<none>:0` for no inode.
#[allow(clippy::option_option)] // outer: well-formed? inner: is there a file?
fn file(word: &[u8]) -> Option<Option<(u32, u32, u64)>> {
    if word == b"<none>:0" {
        return Some(None);
    }
    let mut scan = Scan::new(word);
    let major = scan.hex()?;
    scan.eat(b':')?;
    let minor = scan.hex()?;
    scan.eat(b':')?;
    let ino = scan.dec()?;
    scan.is_empty().then_some(Some((major, minor, ino)))
}
