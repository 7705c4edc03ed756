//! The shared memory of a tree that runs on ([`Twin`]).

use crate::crew::cpus;
use crate::restore::room;
use rewake_objects::memory::twin::Twin;
use rewake_proc::maps::{self, MapName};
use rewake_proc::read::ProcDir;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;

/// Processes with less shared memory than this, in bytes, are not looked at: it is written as quickly as it is compared.
pub const LARGE: u64 = 1 << 20;
/// Copies take at most this part of the memory that can be had.
const SHARE: u64 = 4;

/// Copies by device and inode.
#[derive(Debug, Default)]
pub struct Twins {
    copies: HashMap<(u64, u64), Twin>,
    /// Segments of which there is none.
    left: Vec<(u64, u64)>,
    room: u64,
}

impl Twins {
    /// None so far.
    #[must_use]
    pub fn new() -> Twins {
        Twins { room: room::spare().unwrap_or(0) / SHARE, ..Twins::default() }
    }

    /// Copies the shared memory that a process has mapped. What cannot be copied now is left to the instant.
    pub fn copy(&mut self, dir: &ProcDir) {
        let mut buffer = Vec::new();
        let Ok(text) = dir.read("maps", &mut buffer) else { return };
        let mut last = None;
        for map in maps::parse(text).filter_map(Result::ok).filter(|map| map.shared) {
            let is_memory = matches!(
                map.name(),
                MapName::SharedAnon | MapName::AnonShmem(_) | MapName::Memfd(_) | MapName::SysV(_)
            );
            // One mapping of a segment leads to all of it.
            let segment = (map.dev_major, map.dev_minor, map.ino);
            if !is_memory || last.replace(segment) == Some(segment) {
                continue;
            }
            let link = format!("map_files/{:x}-{:x}", map.start, map.end);
            if let Err(e) = self.copy_one(dir, &link) {
                log::debug!("process {}: {link} is copied at the instant: {e}", dir.pid());
            }
        }
    }

    fn copy_one(&mut self, dir: &ProcDir, link: &str) -> io::Result<()> {
        let source = dir.open_file(link, OFlags::RDONLY).map_err(io::Error::other)?;
        let stat = rustix::fs::fstat(&source)?;
        let (key, bytes) = ((stat.st_dev, stat.st_ino), stat.st_blocks as u64 * 512);
        if bytes < LARGE || self.left.contains(&key) {
            return Ok(());
        }
        let Entry::Vacant(place) = self.copies.entry(key) else { return Ok(()) };
        if bytes > self.room {
            self.left.push(key);
            return Err(io::Error::other("there is too little memory for a copy"));
        }
        match Twin::make(source)? {
            Some(twin) => {
                self.room -= bytes;
                place.insert(twin);
            }
            None => self.left.push(key),
        }
        Ok(())
    }

    /// A copy of what is behind `file`, made what it is now, and how many bytes differed. `None` if there is no copy.
    ///
    /// # Errors
    /// It cannot be.
    pub fn of(&self, file: &impl AsFd) -> io::Result<Option<(OwnedFd, u64)>> {
        let stat = rustix::fs::fstat(file)?;
        let Some(twin) = self.copies.get(&(stat.st_dev, stat.st_ino)) else { return Ok(None) };
        let differed = twin.update(cpus())?;
        Ok(Some((twin.file()?, differed)))
    }
}
