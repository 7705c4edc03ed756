//! Memory that processes share by inode: shared anonymous memory (`MAP_SHARED | MAP_ANONYMOUS`) and memfds
//! (memfd_create(2)), mapped or held as descriptors.
//!
//! As in CRIU, both are memfd entries of the image; shared anonymous memory has the name `/dev/zero`. A restore makes real
//! shared anonymous memory again.

use super::contents;
use super::{PAGE, hugetlb};
use crate::Problem;
use crate::files::collect::{Collector, Contents};
use crate::files::open::Opener;
use crate::problem::text;
use rewake_image::ImageDir;
use rewake_image::messages::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry};
use rewake_sys::memory::SharedMapping;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Name of shared anonymous memory in the image.
pub const ANONYMOUS: &[u8] = b"/dev/zero";
/// The same of huge pages.
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage";

/// A segment whose contents are still to be written.
#[derive(Debug)]
pub struct Segment {
    /// The image's entry.
    pub entry: MemfdInodeEntry,
    /// The memory, as a file.
    pub file: OwnedFd,
    /// It is a copy, which stays as it is.
    pub kept: bool,
}

/// What the collector knows of a segment.
#[derive(Debug, Clone)]
pub struct SegmentId {
    /// `MemfdInodeEntry::inode_id`.
    pub inode_id: u64,
    /// File ids for mappings, by access mode (0 read only, 2 read and write).
    by_access: [Option<u32>; 3],
}

/// Registers the segment behind `file`, called `name`, and returns its inode id.
///
/// # Errors
/// It cannot be examined.
fn segment(
    collector: &mut Collector,
    file: BorrowedFd<'_>,
    name: &[u8],
) -> Result<(u64, u64), Problem> {
    let failed = |e: rustix::io::Errno| Problem::new(text(name), e.to_string());
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    let key = (stat.st_dev, stat.st_ino);
    if !collector.segments.contains_key(&key) {
        let seals = match rustix::fs::fcntl_get_seals(file) {
            Ok(seals) => seals,
            // Not a file that can be sealed.
            Err(rustix::io::Errno::INVAL) => SealFlags::SEAL,
            Err(e) => return Err(failed(e)),
        };
        let inode_id = collector.segments.len() as u64 + 1;
        let huge = hugetlb::of_file(file);
        let name = if huge.is_some() && name == ANONYMOUS { HUGE_ANONYMOUS } else { name };
        let entry = MemfdInodeEntry {
            name: name.to_vec(),
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            shmid: stat.st_ino as u32,
            seals: seals.bits(),
            inode_id,
            hugetlb_flag: huge.map(|size| libc::MFD_HUGETLB | hugetlb::bits(size)),
            mode: Some(stat.st_mode),
        };
        // A description of our own, readable whatever theirs is.
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = rustix::fs::open(own, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
        collector.contents.push(Contents::Shared(Segment { entry, file, kept: false }));
        collector.segments.insert(key, SegmentId { inode_id, by_access: [None; 3] });
    }
    Ok(key)
}

fn push(collector: &mut Collector, inode_id: u64, flags: u32, pos: u64, fown: FownEntry) -> u32 {
    let id = collector.new_id();
    let entry = MemfdFileEntry { id, flags, pos, fown, inode_id: inode_id as u32 };
    collector.push(FileEntry {
        r#type: FdTypes::Memfd as i32,
        id,
        memfd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    id
}

/// The file id for a mapping of shared memory. `link` is its `/proc/PID/map_files` entry, `name` the memfd's name or
/// [`ANONYMOUS`].
///
/// # Errors
/// It cannot be opened or examined.
pub fn mapping(
    collector: &mut Collector,
    link: &str,
    name: &[u8],
    writable: bool,
) -> Result<u32, Problem> {
    let failed = |e: rustix::io::Errno| Problem::new(text(name), format!("{link}: {e}"));
    let file =
        rustix::fs::open(link, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let key = segment(collector, file.as_fd(), name)?;
    let access = if writable { 2u32 } else { 0 };
    let known = collector.segments[&key].clone();
    if let Some(id) = known.by_access[access as usize] {
        return Ok(id);
    }
    let id = push(collector, known.inode_id, access, 0, FownEntry::default());
    if let Some(known) = collector.segments.get_mut(&key) {
        known.by_access[access as usize] = Some(id);
    }
    Ok(id)
}

/// Surveys a memfd held as a descriptor. `name` is without the `/memfd:` prefix and the ` (deleted)` suffix.
///
/// # Errors
/// It cannot be examined.
pub fn survey_descriptor(
    collector: &mut Collector,
    view: &crate::files::collect::View<'_>,
    name: &[u8],
) -> Result<(u32, FdTypes), Problem> {
    let key = segment(collector, view.as_fd(), name)?;
    let pos = match rustix::fs::tell(view.as_fd()) {
        Ok(pos) => pos,
        // O_PATH
        Err(rustix::io::Errno::BADF) => 0,
        Err(e) => return Err(view.problem(format!("its position cannot be read: {e}"))),
    };
    let inode_id = collector.segments[&key].inode_id;
    let flags = view.flags & !(libc::O_CLOEXEC as u32);
    let id = push(collector, inode_id, flags, pos, view.owner()?);
    Ok((id, FdTypes::Memfd))
}

impl Segment {
    /// What of it is to be written to `pagemap-shmem-N` and its pages.
    #[must_use]
    pub fn source(&self) -> contents::Source<'_> {
        contents::Source {
            object: format!("shared memory {}", text(&self.entry.name)),
            file: self.file.as_fd(),
            size: self.entry.size,
            shmid: u64::from(self.entry.shmid),
            tail: &[],
            huge: hugetlb::of_file(&self.file),
        }
    }
}

/// Makes a segment again and fills it.
fn raise(images: &ImageDir, entry: &MemfdInodeEntry) -> Result<OwnedFd, Problem> {
    let object = || format!("shared memory {}", text(&entry.name));
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Problem::new(object(), format!("cannot be {what}: {e}"))
    };
    let huge = match entry.hugetlb_flag.filter(|f| *f != 0) {
        Some(flag) => Some(
            hugetlb::size(flag)
                .filter(|size| entry.size.is_multiple_of(*size))
                .ok_or_else(|| Problem::new(object(), "its size is not one of huge pages"))?,
        ),
        None => None,
    };
    let anonymous = entry.name == if huge.is_some() { HUGE_ANONYMOUS } else { ANONYMOUS };
    let made = if anonymous {
        let flags = huge.map_or(0, |size| libc::MAP_HUGETLB as u32 | hugetlb::bits(size));
        rewake_sys::memory::shared_anonymous(entry.size as usize, flags).ok()
    } else {
        None
    };
    let file = if let Some(file) = made {
        file
    } else {
        let mut flags = MemfdFlags::CLOEXEC;
        if entry.seals & SealFlags::SEAL.bits() == 0 || entry.seals != SealFlags::SEAL.bits() {
            flags |= MemfdFlags::ALLOW_SEALING;
        }
        if let Some(size) = huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(hugetlb::bits(size));
        }
        let file = rustix::fs::memfd_create(entry.name.as_slice(), flags)
            .map_err(|e| failed("made", &e))?;
        rustix::fs::ftruncate(&file, entry.size).map_err(|e| failed("sized", &e))?;
        let owner = (rustix::fs::Uid::from_raw(entry.uid), rustix::fs::Gid::from_raw(entry.gid));
        rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))
            .map_err(|e| failed("given to its owner", &e))?;
        if let Some(mode) = entry.mode {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))
                .map_err(|e| failed("given its mode", &e))?;
        }
        file
    };
    let shmid = u64::from(entry.shmid);
    let Some(stored) = images.stored_pages_shmem(shmid).map_err(|e| failed("filled", &e))? else {
        return Ok(file);
    };
    let mut files = HashMap::new();
    for store in stored.stores() {
        files.insert(store, images.open_store(store).map_err(|e| failed("filled", &e))?);
    }
    if huge.is_some() {
        // hugetlbfs has no write(2).
        let memory =
            SharedMapping::new(&file, entry.size as usize).map_err(|e| failed("mapped", &e))?;
        for run in &stored.runs {
            memory
                .fill_all(&files[&run.store], run.offset, run.vaddr, run.bytes())
                .map_err(|e| failed("filled", &e))?;
        }
        return Ok(file);
    }
    let target = File::from(file);
    let mut buffer = vec![0u8; 1 << 20];
    for run in &stored.runs {
        let (pages, offset) = (&files[&run.store], run.offset);
        let size = entry.size.next_multiple_of(PAGE);
        if run.end() > size {
            return Err(Problem::new(
                object(),
                format!("the image has pages beyond its size {size}"),
            ));
        }
        let mut done = 0;
        while done < run.bytes() {
            let len = ((run.bytes() - done) as usize).min(buffer.len());
            pages
                .read_exact_at(&mut buffer[..len], offset + done)
                .map_err(|e| failed("filled", &e))?;
            // Not beyond the segment's own size, which a write would extend.
            let inside = (entry.size.saturating_sub(run.vaddr + done) as usize).min(len);
            target
                .write_all_at(&buffer[..inside], run.vaddr + done)
                .map_err(|e| failed("filled", &e))?;
            done += len as u64;
        }
    }
    Ok(target.into())
}

/// Opens a memfd (or shared anonymous memory) of the image.
///
/// # Errors
/// It cannot be made or filled.
pub fn open(opener: &mut Opener<'_>, entry: &MemfdFileEntry) -> Result<OwnedFd, Problem> {
    let inode_id = u64::from(entry.inode_id);
    let object = || format!("memfd {}", entry.id);
    if !opener.segments.contains_key(&inode_id) {
        let inode =
            opener.memfd_inodes.get(&inode_id).cloned().ok_or_else(|| {
                Problem::new(object(), format!("memfd.img has no inode {inode_id}"))
            })?;
        match crate::files::external::memfd(opener, &inode.name)? {
            // Content and seals are the caller's.
            Some(file) => {
                opener.segments.insert(inode_id, file);
            }
            None => {
                let file = raise(opener.images, &inode)?;
                // Such memory has no mapping that could ever be made writable. CRIU's images ask for them by descriptors
                // that may write, though, which makes them so, unless the seal is there before them.
                let at_once = SealFlags::from_bits_retain(inode.seals) & SealFlags::WRITE;
                if !at_once.is_empty() {
                    rustix::fs::fcntl_add_seals(&file, at_once)
                        .map_err(|e| Problem::new(object(), format!("sealing: {e}")))?;
                }
                opener.segments.insert(inode_id, file);
                opener.seals.push((inode_id, inode.seals));
            }
        }
    }
    let base = &opener.segments[&inode_id];
    let failed = |e: rustix::io::Errno| Problem::new(object(), e.to_string());
    let own = format!("/proc/self/fd/{}", base.as_raw_fd());
    let access = OFlags::from_bits_retain(entry.flags) & OFlags::RWMODE;
    // The description that memfd_create(2) made does not count as a writer: as long as nobody opened the file anew, it can
    // be executed. So mappings (whose entries have no further flags) and the first descriptor that may write get that one.
    let mapping = entry.flags == OFlags::RDWR.bits();
    let original = access == OFlags::RDWR && (mapping || opener.memfds_given.insert(inode_id));
    let fd = if original {
        rustix::io::fcntl_dupfd_cloexec(base, 0).map_err(failed)?
    } else {
        rustix::fs::open(own, access | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?
    };
    if entry.pos != 0 {
        rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(entry.pos)).map_err(failed)?;
    }
    Ok(fd)
}

/// Adds the huge pages that the segments of the images need.
///
/// # Errors
/// An image is damaged.
pub fn add_needs(opener: &Opener<'_>, needs: &mut hugetlb::Needs) -> Result<(), Problem> {
    let failed = |e: rewake_image::ImageError| Problem::new("shared memory", e.to_string());
    let files: Vec<&MemfdFileEntry> = opener.memfds().collect();
    if files.is_empty() {
        return Ok(());
    }
    for inode in opener.memfd_inodes.values() {
        if inode.hugetlb_flag.is_none_or(|flag| flag == 0) {
            continue;
        }
        let of_it = files.iter().filter(|f| u64::from(f.inode_id) == inode.inode_id);
        let ids: Vec<u32> = of_it.map(|f| f.id).collect();
        let shmid = u64::from(inode.shmid);
        let stored = opener.images.stored_pages_shmem(shmid).map_err(failed)?;
        let bytes = stored.map_or(0, |pages| pages.runs.iter().map(|run| run.bytes()).sum());
        needs.add_segment(inode, &ids, bytes);
    }
    Ok(())
}

/// Puts the seals on, once everything is mapped.
///
/// # Errors
/// The kernel refuses a seal.
pub fn seal(opener: &Opener<'_>) -> Result<(), Problem> {
    for (inode_id, seals) in &opener.seals {
        let wanted = SealFlags::from_bits_retain(*seals);
        let file = &opener.segments[inode_id];
        let has = rustix::fs::fcntl_get_seals(file).unwrap_or(wanted);
        if !has.contains(wanted) && !has.contains(SealFlags::SEAL) {
            rustix::fs::fcntl_add_seals(file, wanted).map_err(|e| {
                Problem::new(format!("memfd inode {inode_id}"), format!("sealing: {e}"))
            })?;
        }
    }
    Ok(())
}
