//! What can be wrong with an image.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::wire::Fault;

/// The result of this crate's operations.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Why images could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A system call on a file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The disk, or the user's quota on it, is full.
    #[error("no space left for {file} in {}: free some, or choose another images directory", dir.display())]
    NoSpace {
        /// The file that did not fit.
        file: String,
        /// The directory it was written to.
        dir: PathBuf,
    },
    /// A file that a checkpoint cannot do without is not there.
    #[error("{} is missing", .0.display())]
    Missing(PathBuf),
    /// The directory has no inventory.
    #[error(
        "{} holds no complete checkpoint: it has no inventory.img, which is written last",
        .0.display()
    )]
    NoCheckpoint(PathBuf),
    /// A directory, device or such bears an image's name.
    #[error("{} is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// A file name that cannot be one of an image.
    #[error(
        "`{0}` cannot name an image file: it has a slash, a space or an unprintable character, or is reserved"
    )]
    BadName(String),
    /// The file does not start as its kind of image does.
    #[error("{}: starts with {found:#010x} instead of {expected:#010x}, so this is not a {kind} image", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// The kind of image its name stands for.
        kind: &'static str,
        /// The number that belongs there.
        expected: u32,
        /// The number that is there.
        found: u32,
    },
    /// The file's first bytes belong to no kind of image.
    #[error("{}: starts with {first:#010x} {second:#010x}, which no image does", path.display())]
    UnknownMagic {
        /// The file.
        path: PathBuf,
        /// The first four bytes.
        first: u32,
        /// The next four.
        second: u32,
    },
    /// The inventory says a version that this code does not know.
    #[error("{}: image version {version} is not supported (1 and 2 are)", path.display())]
    Version {
        /// The inventory file.
        path: PathBuf,
        /// `img_version`
        version: u32,
    },
    /// The directory holds the memory of a running process, but not the process.
    #[error("{} is a pre-dump, which holds memory only; the checkpoint is in the directory of the final dump", .0.display())]
    PreDump(PathBuf),
    /// The bytes at one place are not what belongs there.
    #[error("{}: entry {entry}, {fault}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which message of the file, counted from 0.
        entry: usize,
        /// What is wrong, and at which byte of the file.
        fault: Fault,
    },
    /// A file of one message has none, or more.
    #[error("{}: holds {found} messages where one belongs", path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// "no" or "several".
        found: &'static str,
    },
    /// The file is not as it was when the checkpoint was made.
    #[error(
        "{} was damaged or changed since the dump: {what} (if it was edited on purpose, read the images unverified)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it differs from the manifest.
        what: String,
    },
    /// Somebody else writes to the directory.
    #[error("{} is in use: another dump is writing to it", .0.display())]
    Busy(PathBuf),
    /// A [`Stream`](crate::Stream) was dropped half-written.
    #[error("{} was not written to its end", .0.display())]
    Unfinished(PathBuf),
}

impl ImageError {
    /// Wraps a failed system call.
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        ImageError::Io { action, path: path.to_owned(), source: source.into() }
    }

    /// Wraps a failed system call that writes `file` in `dir`.
    pub(crate) fn write(action: &'static str, dir: &Path, file: &str, errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT => {
                ImageError::NoSpace { file: file.to_owned(), dir: dir.to_owned() }
            }
            _ => Self::io(action, &dir.join(file), errno),
        }
    }

    /// A message with something wrong in it; the fault's offset counts from the start of the file.
    pub(crate) fn malformed(path: &Path, entry: usize, fault: Fault) -> Self {
        ImageError::Malformed { path: path.to_owned(), entry, fault }
    }
}
