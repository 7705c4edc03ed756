//! Mappings (VMAs): `/proc/PID/smaps` and mmap(2), madvise(2), mlock2(2).

use super::hugetlb;
use crate::Problem;
use crate::problem::{Passing, text};
use rewake_image::messages::VmaEntry;
use rewake_proc::maps::{Map, MapName};
use rewake_proc::smaps::{self, Want};
use rewake_proc::vmflags::VmFlags;

/// `VmaEntry::status` bits.
pub use rewake_image::messages::vma_status as status;

/// What lies behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// Nothing, or the kernel itself.
    None,
    /// A file: where to find it, by which `map_files` entry to open it if its name is gone.
    File {
        /// Path as the kernel tells it, without " (deleted)".
        path: Vec<u8>,
        /// Did the kernel say that the name is gone?
        deleted: bool,
    },
    /// Shared anonymous memory (mmap with `MAP_SHARED | MAP_ANONYMOUS`).
    SharedAnon,
    /// The rings of an io_uring instance.
    Ring,
    /// The rings of a packet socket.
    Socket,
    /// A memfd, by name (escaped as in `maps`).
    Memfd(Vec<u8>),
    /// A System V shared memory segment, by id.
    SysV(u32),
}

/// A surveyed mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// The image's entry; `shmid` is filled in when file ids are given out.
    pub entry: VmaEntry,
    /// What lies behind it.
    pub backing: Backing,
    /// Device and inode of the file, as in `maps`.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Can the pages be read with process_vm_readv(2), and may they? It pins them, and for that the kernel gives the process
    /// copies of those that it shares with others copy-on-write.
    pub readable: bool,
    /// `MLOCK_ONFAULT`.
    pub lock_on_fault: bool,
    /// mseal(2).
    pub sealed: bool,
    /// May guard ranges lie in it?
    pub may_have_guards: bool,
    /// Is it registered with a userfaultfd for write protection, and nothing else? See [`super::tracking`].
    pub watched: bool,
    /// Is it code that the program itself never had the permission to change? If it has pages of its own, others made them: the
    /// kernel, for probes (see [`super::uprobes`]), or a debugger.
    pub patched: bool,
    /// May it have anonymous pages? Without a reverse map of such pages it has none, where the kernel tells of that.
    pub may_have_pages: bool,
}

/// Why a mapping that is registered with a userfaultfd is refused.
#[must_use]
pub fn registered(object: String) -> Problem {
    let mut problem =
        Problem::new(object, "it is registered with a userfaultfd, which cannot be saved")
            .remedy("let the program, or whoever handles its page faults, unregister it for the time of the dump; after a lazy restore, wait until all memory is there");
    problem.passing = Passing::Memory;
    problem
}

/// `MAP_DROPPABLE` (since Linux 6.11), in the place of `MAP_PRIVATE`: the kernel may throw the pages away.
pub const MAP_DROPPABLE: u32 = 8;

const MADV: &[(VmFlags, u32)] = &[
    (VmFlags::RAND_READ, 1),
    (VmFlags::SEQ_READ, 2),
    (VmFlags::DONTCOPY, 10),
    (VmFlags::MERGEABLE, 12),
    (VmFlags::HUGEPAGE, 14),
    (VmFlags::NOHUGEPAGE, 15),
    (VmFlags::DONTDUMP, 16),
    (VmFlags::WIPEONFORK, 18),
];

/// Parses the text of `/proc/PID/smaps` into mappings; what cannot be saved is reported and left out.
///
/// # Errors
/// The text is not what the kernel writes.
pub fn survey(
    smaps_text: &[u8],
    problems: &mut Vec<Problem>,
) -> Result<Vec<Vma>, rewake_proc::ParseError> {
    let mut vmas: Vec<Vma> = Vec::with_capacity(smaps_text.len() / 700 + 8);
    for item in smaps::parse(smaps_text, Want { shared: true, ..Want::FLAGS }) {
        let area = item?;
        match classify(&area.map, area.flags) {
            Ok(mut vma) => {
                vma.readable &= !may_share_pages(&vma.entry, &area.values);
                push(&mut vmas, vma);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if vmas.iter().any(|v| v.entry.flags & libc::MAP_HUGETLB as u32 != 0) {
        add_page_sizes(smaps_text, &mut vmas)?;
    }
    Ok(vmas)
}

/// As [`survey`], of the text of `maps`: `flags` knows what that does not tell, if it does. Of [`Vma::readable`] it is not said
/// whether pages are shared.
///
/// # Errors
/// As there. `None` where flags are not known, or not all that is needed is told.
pub fn survey_maps(
    maps_text: &[u8],
    mut flags: impl FnMut(&Map<'_>) -> Option<VmFlags>,
    problems: &mut Vec<Problem>,
) -> Result<Option<Vec<Vma>>, rewake_proc::ParseError> {
    let mut vmas: Vec<Vma> = Vec::with_capacity(maps_text.len() / 60 + 8);
    let mut found = Vec::new();
    for item in rewake_proc::maps::parse(maps_text) {
        let map = item?;
        match flags(&map) {
            // Of which size their pages are only smaps tells.
            Some(flags) if !flags.contains(VmFlags::HUGETLB) => match classify(&map, flags) {
                Ok(vma) => push(&mut vmas, vma),
                Err(problem) => found.push(problem),
            },
            _ => return Ok(None),
        }
    }
    problems.append(&mut found);
    Ok(Some(vmas))
}

/// Adds a mapping; vvar and vvar_vclock are one in the image.
fn push(vmas: &mut Vec<Vma>, vma: Vma) {
    match vmas.last_mut() {
        Some(last)
            if vma.entry.status & status::VVAR != 0
                && last.entry.status & status::VVAR != 0
                && last.entry.end == vma.entry.start =>
        {
            last.entry.end = vma.entry.end;
        }
        _ => vmas.push(vma),
    }
}

/// May any page be shared copy-on-write? Clean pages of a file are mostly the file's own.
fn may_share_pages(entry: &VmaEntry, values: &smaps::Values) -> bool {
    let dirty = values.shared_dirty.unwrap_or(0) > 0;
    let clean = values.shared_clean.unwrap_or(0) > 0;
    has_private_pages(entry) && (dirty || clean && entry.status & status::ANON_PRIVATE != 0)
}

/// Adds to mappings with huge pages of what size they are. A look of its own, since hardly anybody has such mappings.
fn add_page_sizes(smaps_text: &[u8], vmas: &mut [Vma]) -> Result<(), rewake_proc::ParseError> {
    for item in smaps::parse(smaps_text, Want { kernel_page_size: true, ..Want::FLAGS }) {
        let area = item?;
        if area.flags.contains(VmFlags::HUGETLB)
            && let Some(size) = area.values.kernel_page_size
            && let Ok(at) = vmas.binary_search_by_key(&area.map.start, |v| v.entry.start)
        {
            vmas[at].entry.flags |= hugetlb::bits(size);
        }
    }
    Ok(())
}

fn classify(map: &Map<'_>, flags: VmFlags) -> Result<Vma, Problem> {
    use status as st;
    let describe = || {
        format!("mapping {:#x}-{:#x} {}", map.start, map.end, text(map.raw_name))
            .trim_end()
            .to_owned()
    };
    let refuse = |reason: &str| Err(Problem::new(describe(), reason));
    let mut mmap_flags = if map.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE } as u32;
    let anonymous = libc::MAP_ANONYMOUS as u32;
    let mut madv = MADV
        .iter()
        .filter(|(flag, _)| flags.contains(*flag))
        .fold(0u64, |bits, (_, advice)| bits | 1 << advice);
    let mut backing = Backing::None;
    let regular = st::REGULAR;
    let status = match map.name() {
        MapName::Vdso => {
            mmap_flags |= anonymous;
            regular | st::VDSO | st::ANON_PRIVATE
        }
        MapName::Vvar | MapName::VvarVclock => {
            mmap_flags |= anonymous;
            madv = 1 << 16;
            regular | st::VVAR | st::ANON_PRIVATE
        }
        MapName::Vsyscall => {
            mmap_flags |= anonymous;
            st::VSYSCALL | st::ANON_PRIVATE
        }
        // See `super::uprobes`.
        MapName::Uprobes | MapName::Special(b"uprobes-trampoline") => {
            mmap_flags |= anonymous;
            st::UPROBES
        }
        MapName::Aio => st::AIORING,
        _ if flags.contains(VmFlags::SHADOW_STACK) => {
            return refuse("shadow stacks are not supported yet");
        }
        _ if flags.contains(VmFlags::UFFD_MISSING) || flags.contains(VmFlags::UFFD_MINOR) => {
            return Err(registered(describe()));
        }
        _ if flags.contains(VmFlags::PFNMAP) || flags.contains(VmFlags::IO) => {
            return refuse("it maps device memory");
        }
        MapName::SysV(_) if map.shared => {
            backing = Backing::SysV(map.ino as u32);
            mmap_flags |= anonymous;
            regular | st::ANON_SHARED | st::SYSVIPC
        }
        MapName::SysV(_) => return refuse("it is private memory of a System V segment"),
        // Private if somebody mapped it anew through map_files.
        MapName::SharedAnon | MapName::AnonHugepage if map.shared => {
            backing = Backing::SharedAnon;
            regular | st::MEMFD | st::FILE_SHARED
        }
        MapName::SharedAnon => {
            backing = Backing::SharedAnon;
            regular | st::MEMFD | st::FILE_PRIVATE
        }
        MapName::Memfd(name) => {
            backing = Backing::Memfd(name.to_vec());
            regular | st::MEMFD | if map.shared { st::FILE_SHARED } else { st::FILE_PRIVATE }
        }
        // Always locked and not in core dumps, other than a deleted file of that name.
        MapName::File
            if map.raw_name == b"/secretmem (deleted)"
                && flags.contains(VmFlags::LOCKED | VmFlags::DONTDUMP) =>
        {
            return Err(Problem::new(
                describe(),
                "secret memory (memfd_secret) cannot be read by anybody but the program itself",
            )
            .remedy("unmap it for the time of the dump"));
        }
        MapName::File | MapName::SlashAnon
            if map.ino != 0 && map.raw_name.first() == Some(&b'/') =>
        {
            backing = Backing::File {
                path: map.path().unwrap_or_default().into_owned(),
                deleted: map.deleted(),
            };
            regular | if map.shared { st::FILE_SHARED } else { st::FILE_PRIVATE }
        }
        MapName::AnonShmem(_) if map.shared => {
            backing = Backing::SharedAnon;
            regular | st::FILE_SHARED | st::MEMFD
        }
        _ if map.raw_name == b"anon_inode:[io_uring]" && map.shared => {
            backing = Backing::Ring;
            regular | st::EXT_PLUGIN
        }
        _ if map.ino != 0 && map.raw_name.starts_with(b"socket:[") => {
            backing = Backing::Socket;
            regular | st::SOCKET
        }
        MapName::File if map.ino != 0 => return refuse("it maps an object that is not a file"),
        name => {
            mmap_flags |= anonymous;
            regular | st::ANON_PRIVATE | if matches!(name, MapName::Heap) { st::HEAP } else { 0 }
        }
    };
    if flags.contains(VmFlags::DROPPABLE) {
        mmap_flags = mmap_flags & !(libc::MAP_PRIVATE as u32) | MAP_DROPPABLE;
    }
    if flags.contains(VmFlags::HUGETLB) {
        mmap_flags |= libc::MAP_HUGETLB as u32;
    }
    if flags.contains(VmFlags::GROWSDOWN) {
        mmap_flags |= libc::MAP_GROWSDOWN as u32;
    }
    if flags.contains(VmFlags::LOCKED) {
        mmap_flags |= libc::MAP_LOCKED as u32;
    }
    if flags.contains(VmFlags::NORESERVE) {
        mmap_flags |= libc::MAP_NORESERVE as u32;
    }
    let prot = u32::from(map.read) | u32::from(map.write) << 1 | u32::from(map.exec) << 2;
    let is_file = backing != Backing::None;
    // A shared mapping may be made writable only if its file was opened for writing.
    let writable = map.shared && flags.contains(VmFlags::MAYWRITE);
    Ok(Vma {
        entry: VmaEntry {
            start: map.start,
            end: map.end,
            pgoff: if is_file { map.pgoff } else { 0 },
            shmid: 0,
            prot,
            flags: mmap_flags,
            status,
            fd: -1,
            madv: (madv != 0).then_some(madv),
            fdflags: is_file.then_some(if writable { 2 } else { 0 }),
        },
        backing,
        device: (map.dev_major, map.dev_minor),
        inode: map.ino,
        readable: map.read,
        lock_on_fault: flags.contains(VmFlags::LOCKONFAULT),
        // The kernel may seal its own mappings itself; those are not made by us.
        sealed: flags.contains(VmFlags::SEALED)
            && status & (st::VDSO | st::VVAR | st::VSYSCALL) == 0,
        may_have_guards: flags.contains(VmFlags::MAYBE_GUARD),
        watched: flags.contains(VmFlags::UFFD_WP),
        // Whoever makes a private mapping of a file writable is accounted for it from then on.
        patched: status & st::FILE_PRIVATE != 0
            && map.exec
            && !map.write
            && !flags.contains(VmFlags::ACCOUNT),
        may_have_pages: true,
    })
}

/// Are the pages of this mapping the task's own, to be found in its pagemap?
#[must_use]
pub fn has_private_pages(entry: &VmaEntry) -> bool {
    let private = status::ANON_PRIVATE | status::FILE_PRIVATE;
    if entry.status & status::AIORING != 0 {
        return true;
    }
    entry.status & status::REGULAR != 0
        && entry.status & private != 0
        && entry.status & status::VVAR == 0
        // Pages that may be dropped at any time are dropped by a checkpoint: they hold secrets.
        && entry.flags & MAP_DROPPABLE == 0
}
