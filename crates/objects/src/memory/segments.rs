//! Shared memory of tasks that run on, as a pre-dump saves it: contents alone, whatever they are just then. The dump that
//! comes later compares them with what there is by then, so that nothing depends on them but how much that has to write.

use super::contents::{self, Source, Target, Written};
use super::hugetlb;
use super::vma::{Backing, Vma};
use crate::Problem;
use crate::problem::text;
use rewake_proc::read::ProcDir;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use std::collections::HashSet;
use std::os::fd::AsRawFd;

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The kernel's name for a segment: is it one of System V, device, inode. Those of System V have their id as their inode.
type Key = (bool, u64, u64);

/// A segment.
#[derive(Debug)]
struct Found {
    object: String,
    /// The memory as a file.
    file: OwnedFd,
    size: u64,
    /// Number of its pagemap, as a dump numbers it.
    number: u32,
    sysv: bool,
}

impl Found {
    fn source(&self) -> Source<'_> {
        Source {
            object: self.object.clone(),
            file: self.file.as_fd(),
            size: self.size,
            shmid: u64::from(self.number),
            tail: &[],
            huge: hugetlb::of_file(&self.file),
        }
    }
}

/// Segments of a tree.
#[derive(Debug, Default)]
pub struct Segments {
    found: Vec<Found>,
    known: HashSet<Key>,
}

impl Segments {
    /// How many there are: each may have a page store.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Are there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Adds what is behind the mapping `vma` of the task of `dir`, if it is shared memory and still there.
    pub fn mapping(&mut self, dir: &ProcDir, vma: &Vma) {
        let (object, sysv) = match &vma.backing {
            Backing::SharedAnon => ("shared memory".to_owned(), false),
            Backing::Memfd(name) => (format!("memfd {}", text(name)), false),
            Backing::SysV(id) => (format!("System V shared memory segment {id}"), true),
            Backing::None | Backing::File { .. } | Backing::Ring | Backing::Socket => return,
        };
        let key = (sysv, rustix::fs::makedev(vma.device.0, vma.device.1), vma.inode);
        if !self.known.contains(&key) {
            let link = format!("map_files/{:x}-{:x}", vma.entry.start, vma.entry.end);
            self.add(dir, &link, Some(key), object);
        }
    }

    /// Adds descriptor `number` of the task of `dir`, if it is a memfd and still there. `buffer` is for reading its name.
    pub fn descriptor(&mut self, dir: &ProcDir, number: i32, buffer: &mut Vec<u8>) {
        let link = format!("fd/{number}");
        let name = dir.link(&link, buffer).ok().and_then(|name| name.strip_prefix(b"/memfd:"));
        if let Some(object) = name.map(|name| format!("memfd {}", text(name))) {
            self.add(dir, &link, None, object);
        }
    }

    /// Adds what a link leads to, unless that is nothing of the kind, or another one than was wanted: the task runs.
    fn add(&mut self, dir: &ProcDir, link: &str, wanted: Option<Key>, object: String) {
        // Not to open what it leads to before it is known.
        let Ok(there) = dir.open_file(link, OFlags::PATH) else { return };
        let (Ok(stat), Ok(fs)) = (rustix::fs::fstat(&there), rustix::fs::fstatfs(&there)) else {
            return;
        };
        let huge = hugetlb::of_file(&there).is_some();
        let is_memory = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && (huge || fs.f_type == TMPFS_MAGIC);
        let sysv = wanted.is_some_and(|wanted| wanted.0);
        let key = (sysv, stat.st_dev, stat.st_ino);
        if !is_memory || wanted.is_some_and(|wanted| wanted != key) || self.known.contains(&key) {
            return;
        }
        let path = format!("/proc/self/fd/{}", there.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => {
                self.known.insert(key);
                let (size, number) = (stat.st_size as u64, stat.st_ino as u32);
                self.found.push(Found { object, file, size, number, sysv });
            }
            // The dump will say so.
            Err(e) => log::debug!("{object}: {e}"),
        }
    }

    /// Writes pagemaps and pages.
    ///
    /// # Errors
    /// A segment or the parent images cannot be read, or the images cannot be written.
    pub fn write(&mut self, target: &Target<'_>) -> Result<Written, Problem> {
        let sysv = self.found.iter().filter(|f| f.sysv).map(|f| f.number).collect();
        let others = self.found.iter_mut().filter(|f| !f.sysv);
        contents::number_apart(&sysv, others.map(|f| &mut f.number));
        let sources: Vec<Source<'_>> = self.found.iter().map(Found::source).collect();
        contents::write(&sources, target)
    }
}
