//! Files of a directory, by descriptor: few system calls, and no surprise by what a name may stand for.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    buffer::spare_capacity,
    fs::{self, FileType, Mode, OFlags},
    io::Errno,
};

use crate::error::{ImageError, Result};

/// An open directory, with the path for the text of errors.
#[derive(Debug)]
pub(crate) struct Dir {
    pub path: PathBuf,
    pub fd: OwnedFd,
}

impl Dir {
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(path, flags, Mode::empty())
            .map_err(|e| ImageError::io("open the images directory", path, e))?;
        Ok(Dir { path: path.to_owned(), fd })
    }

    /// Opens a regular file for reading, and gives its size; none if there is no such file.
    pub fn open_regular(&self, name: &str) -> Result<Option<(OwnedFd, u64)>> {
        let path = || self.path.join(name);
        // not to hang on a FIFO of that name
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(ImageError::io("open", &path(), e)),
        };
        let stat = fs::fstat(&fd).map_err(|e| ImageError::io("examine", &path(), e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(ImageError::NotRegular(path()));
        }
        Ok(Some((fd, stat.st_size.cast_unsigned())))
    }

    /// The size of a regular file; none if there is no such file.
    pub fn size_of_regular(&self, name: &str) -> Result<Option<u64>> {
        match fs::statat(&self.fd, name, fs::AtFlags::empty()) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => {
                Err(ImageError::NotRegular(self.path.join(name)))
            }
            Ok(stat) => Ok(Some(stat.st_size.cast_unsigned())),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(ImageError::io("examine", &self.path.join(name), e)),
        }
    }

    /// Reads a file of `size` bytes; fewer if it has become shorter.
    pub fn read(&self, name: &str, fd: &OwnedFd, size: u64) -> Result<Vec<u8>> {
        let fail = |e: std::io::Error| ImageError::io("read", &self.path.join(name), e);
        let mut bytes = Vec::new();
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(size).map_err(|_| fail(std::io::ErrorKind::OutOfMemory.into()))?;
        while bytes.len() < size {
            match rustix::io::read(fd, spare_capacity(&mut bytes)) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(fail(e.into())),
            }
        }
        Ok(bytes)
    }

    /// Creates a file that must not exist yet.
    pub fn create(&self, name: &str) -> Result<OwnedFd> {
        // readable as well: whoever stores pages may want to map them
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o644))
            .map_err(|e| ImageError::write("create", &self.path, name, e))
    }

    /// Writes all of `bytes` to an open file.
    pub fn write(&self, name: &str, fd: impl AsFd, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(&fd, bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::INTR) => {}
                Err(e) => return Err(ImageError::write("write", &self.path, name, e)),
            }
        }
        Ok(())
    }

    /// Removes a file; that it is not there is fine.
    pub fn remove(&self, name: &str) -> Result<()> {
        match fs::unlinkat(&self.fd, name, fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(ImageError::io("remove", &self.path.join(name), e)),
        }
    }

    /// The names in the directory that are text; no image's name is not.
    pub fn names(&self) -> Result<Vec<String>> {
        let fail = |e| ImageError::io("list", &self.path, e);
        let mut names = Vec::new();
        for entry in fs::Dir::read_from(&self.fd).map_err(fail)? {
            if let Ok(name) = entry.map_err(fail)?.file_name().to_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }
}
