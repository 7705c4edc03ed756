//! Reading `/proc` with few system calls: a directory opened once, files relative to it, one buffer for all.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, openat, readlinkat_raw, statat};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::ParseError;
use crate::stat::Stat;
use crate::status::Status;

/// Room for a text that has no size: more than any single-record file but `status` with thousands of groups has.
const FIRST_READ: usize = 16 * 1024;
/// Room kept free for each further read. Files as `maps` give at most a page at a time, however large the buffer.
const NEXT_READ: usize = 8 * 1024;

/// A file of `/proc` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The process or thread has ended and was reaped.
    #[error("process {pid} has ended: /proc/{path} is gone")]
    Gone {
        /// Process or thread id.
        pid: i32,
        /// The file asked for, below `/proc`.
        path: String,
    },
    /// The process is there but the file is not, or has nothing to say.
    #[error(
        "/proc/{path} of process {pid}: {errno}: either this kernel is built without it or the process is a zombie or \
         kernel thread, which has none"
    )]
    Absent {
        /// Process or thread id.
        pid: i32,
        /// The file asked for, below `/proc`.
        path: String,
        /// `ENOENT` or `ESRCH`.
        errno: Errno,
    },
    /// Any other failure of open, read or readlink.
    #[error("/proc/{path}: {errno}{}", hint(*.errno))]
    Io {
        /// The file asked for, below `/proc`.
        path: String,
        /// Why.
        errno: Errno,
    },
    /// The text was read but is not understood.
    #[error("process {pid}: {source}")]
    Parse {
        /// Process or thread id; 0 for a file of the whole system.
        pid: i32,
        /// What is wrong.
        source: ParseError,
    },
}

impl ReadError {
    /// Has the process ended?
    pub fn is_gone(&self) -> bool {
        matches!(self, ReadError::Gone { .. })
    }
}

/// The way out of the errors that have one.
fn hint(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS | Errno::PERM => {
            " (needs CAP_SYS_PTRACE or the same user, see ptrace(2) and proc(5) hidepid)"
        }
        Errno::MFILE => " (raise RLIMIT_NOFILE)",
        _ => "",
    }
}

/// Opens the directory of a process.
fn open_pid(
    at: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
    pid: i32,
) -> Result<ProcDir, ReadError> {
    match openat(at, name, DIRECTORY, Mode::empty()) {
        Ok(fd) => Ok(ProcDir { fd, pid, path: pid.to_string() }),
        Err(Errno::NOENT | Errno::SRCH) => Err(ReadError::Gone { pid, path: pid.to_string() }),
        Err(errno) => Err(ReadError::Io { path: pid.to_string(), errno }),
    }
}

/// Opens what is only looked up in and listed.
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A procfs mount. Its pid namespace is the one that all ids in its files are in.
#[derive(Debug)]
pub struct ProcRoot {
    fd: OwnedFd,
}

impl ProcRoot {
    /// Opens `/proc`.
    ///
    /// # Errors
    /// [`ReadError::Io`] if it cannot be opened.
    pub fn open() -> Result<ProcRoot, ReadError> {
        let fd = openat(CWD, "/proc", DIRECTORY, Mode::empty())
            .map_err(|errno| ReadError::Io { path: String::new(), errno })?;
        Ok(ProcRoot { fd })
    }

    /// Uses a directory that is already open, as the procfs of another pid namespace.
    pub fn from_fd(fd: OwnedFd) -> ProcRoot {
        ProcRoot { fd }
    }

    /// Opens the directory of a process (or, though it is not listed, of a thread).
    ///
    /// # Errors
    /// [`ReadError::Gone`] if there is none.
    pub fn pid(&self, pid: i32) -> Result<ProcDir, ReadError> {
        open_pid(self.fd.as_fd(), DecInt::new(pid), pid)
    }

    /// Reads a file of the whole system, as `locks`, into the buffer, which is cleared first.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    pub fn read<'b>(&self, name: &str, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], ReadError> {
        match slurp(self.fd.as_fd(), name, buffer, false) {
            Ok(()) => Ok(buffer),
            Err(errno) => Err(ReadError::Io { path: name.to_owned(), errno }),
        }
    }

    /// The ids of all processes, ascending.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    pub fn pids(&self) -> Result<Vec<i32>, ReadError> {
        numbers(self.fd.as_fd(), ".").map_err(|errno| ReadError::Io { path: String::new(), errno })
    }
}

/// The directory of one process or thread, opened once.
///
/// It stands for that very process: when the id is used again, reads here still say [`ReadError::Gone`].
#[derive(Debug)]
pub struct ProcDir {
    fd: OwnedFd,
    pid: i32,
    /// `PID` or `PID/task/TID`, for errors.
    path: String,
}

impl AsFd for ProcDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ProcDir {
    /// Opens `/proc/PID`.
    ///
    /// # Errors
    /// [`ReadError::Gone`] if there is no such process.
    pub fn open(pid: i32) -> Result<ProcDir, ReadError> {
        open_pid(CWD, format!("/proc/{pid}"), pid)
    }

    /// Opens the directory of the first thread of a process that lives: that of the process itself, unless its first thread has
    /// ended while others go on. Such a one has no memory and no descriptors any more, and is in no state but dead.
    ///
    /// # Errors
    /// [`ReadError::Gone`] if there is no such process.
    pub fn open_living(pid: i32) -> Result<ProcDir, ReadError> {
        let mut buffer = Vec::new();
        let dir = ProcDir::open(pid)?;
        let stat = dir.stat(&mut buffer)?;
        if !stat.state.is_dead() || stat.has_ended() {
            return Ok(dir);
        }
        let threads = dir.tids()?.into_iter().filter_map(|tid| ProcDir::open(tid).ok());
        let mut alive =
            threads.filter(|dir| dir.stat(&mut buffer).is_ok_and(|s| !s.state.is_dead()));
        Ok(alive.next().unwrap_or(dir))
    }

    /// The process or thread id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Opens `task/TID` of this process.
    ///
    /// # Errors
    /// [`ReadError::Gone`] if it has no such thread.
    pub fn task(&self, tid: i32) -> Result<ProcDir, ReadError> {
        let name = format!("task/{tid}");
        let path = format!("{}/{name}", self.path);
        match openat(&self.fd, &name, DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(ProcDir { fd, pid: tid, path }),
            Err(Errno::NOENT | Errno::SRCH) => Err(ReadError::Gone { pid: tid, path }),
            Err(errno) => Err(ReadError::Io { path, errno }),
        }
    }

    /// Opens a file below the directory, as `pagemap`, `mem` or `ns/net`.
    ///
    /// # Errors
    /// [`ReadError`], with a process that ended told from a missing file.
    pub fn open_file(&self, name: &str, flags: OFlags) -> Result<OwnedFd, ReadError> {
        openat(&self.fd, name, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| self.fault(name, errno))
    }

    /// Reads a whole file into the buffer, which is cleared first: open, reads up to an empty one, close.
    ///
    /// # Errors
    /// [`ReadError`], with a process that ended told from a missing file.
    pub fn read<'b>(&self, name: &str, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], ReadError> {
        slurp(self.fd.as_fd(), name, buffer, false).map_err(|errno| self.fault(name, errno))?;
        Ok(buffer)
    }

    /// As [`ProcDir::read`], but asks `enough` after each read whether that will do, whatever comes.
    ///
    /// # Errors
    /// As [`ProcDir::read`].
    pub fn read_until<'b>(
        &self,
        name: &str,
        buffer: &'b mut Vec<u8>,
        enough: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<&'b [u8], ReadError> {
        slurp_until(self.fd.as_fd(), name, buffer, &mut |read| enough(read))
            .map_err(|errno| self.fault(name, errno))?;
        Ok(buffer)
    }

    /// As [`ProcDir::read`], for files the kernel makes as one record (`stat`, `status`, `limits`, `cgroup`, `comm`,
    /// `auxv`, `fdinfo/N`, …): a read that leaves room in the buffer was the last, which saves the empty one.
    /// Wrong for `maps`, `smaps`, `mountinfo`, `timers` and `children`, which come in pieces.
    ///
    /// # Errors
    /// As [`ProcDir::read`].
    pub fn read_single<'b>(
        &self,
        name: &str,
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], ReadError> {
        slurp(self.fd.as_fd(), name, buffer, true).map_err(|errno| self.fault(name, errno))?;
        Ok(buffer)
    }

    /// Reads a link, as `exe` or `fd/3`, into the buffer, which is cleared first.
    ///
    /// # Errors
    /// As [`ProcDir::read`].
    pub fn link<'b>(&self, name: &str, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], ReadError> {
        buffer.clear();
        buffer.reserve(256);
        loop {
            let room = buffer.capacity();
            match readlinkat_raw(&self.fd, name, spare_capacity(buffer)) {
                // A full buffer may hold only the beginning. The kernel's own limit is a page.
                Ok(length) if length == room => {
                    buffer.clear();
                    buffer.reserve(room * 2);
                }
                Ok(_) => return Ok(buffer),
                Err(errno) => return Err(self.fault(name, errno)),
            }
        }
    }

    /// Reads and parses `stat`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn stat(&self, buffer: &mut Vec<u8>) -> Result<Stat, ReadError> {
        self.parsed(crate::stat::parse(self.read_single("stat", buffer)?))
    }

    /// Reads and parses `status`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn status(&self, buffer: &mut Vec<u8>) -> Result<Status, ReadError> {
        self.parsed(crate::status::parse(self.read_single("status", buffer)?))
    }

    /// Gives a parser's error the process it is about.
    ///
    /// # Errors
    /// [`ReadError::Parse`] if the result is one.
    pub fn parsed<T>(&self, result: Result<T, ParseError>) -> Result<T, ReadError> {
        result.map_err(|source| ReadError::Parse { pid: self.pid, source })
    }

    /// The ids of the process's threads, ascending.
    ///
    /// # Errors
    /// As [`ProcDir::read`].
    pub fn tids(&self) -> Result<Vec<i32>, ReadError> {
        numbers(self.fd.as_fd(), "task").map_err(|errno| self.fault("task", errno))
    }

    /// The descriptor numbers, ascending.
    ///
    /// # Errors
    /// As [`ProcDir::read`].
    pub fn fds(&self) -> Result<Vec<i32>, ReadError> {
        numbers(self.fd.as_fd(), "fd").map_err(|errno| self.fault("fd", errno))
    }

    /// Tells a process that ended from a file that is not there: a process has `stat` until it is reaped.
    #[cold]
    fn fault(&self, name: &str, errno: Errno) -> ReadError {
        let path = format!("{}/{name}", self.path);
        let pid = self.pid;
        match errno {
            Errno::NOENT | Errno::SRCH => match statat(&self.fd, "stat", AtFlags::empty()) {
                Err(Errno::NOENT | Errno::SRCH) => ReadError::Gone { pid, path },
                _ => ReadError::Absent { pid, path, errno },
            },
            errno => ReadError::Io { path, errno },
        }
    }
}

/// Opens, reads and closes a file; `single` stops at the first read that leaves room.
fn slurp(
    directory: BorrowedFd<'_>,
    name: &str,
    buffer: &mut Vec<u8>,
    single: bool,
) -> Result<(), Errno> {
    // One that comes at once is read to its end when there is room left.
    slurp_until(directory, name, buffer, &mut |read| single && read.len() < read.capacity())
}

/// Opens, reads and closes a file that comes in pieces, up to its end or until that is enough.
fn slurp_until(
    directory: BorrowedFd<'_>,
    name: &str,
    buffer: &mut Vec<u8>,
    enough: &mut dyn FnMut(&Vec<u8>) -> bool,
) -> Result<(), Errno> {
    buffer.clear();
    let file = openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    buffer.reserve(FIRST_READ);
    loop {
        match rustix::io::read(&file, spare_capacity(buffer)) {
            Ok(0) => return Ok(()),
            Ok(_) if enough(buffer) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        if buffer.capacity() - buffer.len() < NEXT_READ {
            // Doubles, so that a text of many megabytes is moved a few times only.
            buffer.reserve(buffer.len().max(NEXT_READ));
        }
    }
}

/// The entries of a directory whose names are numbers.
fn numbers(directory: BorrowedFd<'_>, name: &str) -> Result<Vec<i32>, Errno> {
    let listing = openat(directory, name, DIRECTORY, Mode::empty())?;
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut entries = RawDir::new(listing, buffer.spare_capacity_mut());
    let mut all = Vec::new();
    while let Some(entry) = entries.next() {
        let mut scan =
            crate::scan::Scan::new(entry.as_ref().map_err(|errno| *errno)?.file_name().to_bytes());
        if let Some(number) = scan.dec::<u64>().filter(|_| scan.is_empty()) {
            all.extend(i32::try_from(number));
        }
    }
    all.sort_unstable();
    Ok(all)
}
