//! Descriptors: which description each is of, and what would otherwise be asked of each one by one.

use super::asm::{Helper, Program, R0, R1, R2, R3, R6, R7, R8, R9, Size};
use super::{Members, kernel, offset, read, words};
use rewake_sys::bpf::iter::Whose;
use rewake_sys::bpf::{self, MapInfo, iter};
use rustix::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;

/// Words of a record before its link text.
const WORDS: usize = 18;
const HEAD: i32 = WORDS as i32 * 8;
/// Room for a link text: the kernel's own limit.
const LINK: i32 = 4096;
/// Where in a record what an eventfd knows is, and how much of it is read.
const EVENT: i32 = 13;
const EVENT_LEN: i32 = 32;

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    pub(super) function: u32,
    flags: i16,
    position: i16,
    inode: i16,
    path: i32,
    private: i16,
    owner: Owner,
    number: i16,
    mode: i16,
    superblock: i16,
    device: i16,
    locks: i16,
    /// Lists of locks by kind.
    lists: [i16; 3],
    /// What an eventfd knows: first member, and where in it its counter, flags and number are.
    event: (i32, [usize; 3]),
}

/// Who gets signals for a file.
#[derive(Debug, Clone, Copy)]
enum Owner {
    /// Behind a pointer, if there was ever one (since Linux 6.12).
    Pointer(i16),
    /// In the file: the owner, the signal.
    Inside(i16, i16),
}

impl Offsets {
    pub(super) fn new(function: u32, member: Members<'_>) -> Result<Offsets, String> {
        let of = |of, name| offset(member(of, name)?);
        let list = |name| of("file_lock_context", name);
        let owner = member("file", "f_owner")?;
        let owner = if owner.pointer {
            Owner::Pointer(offset(owner)?)
        } else {
            let inner = |name| Ok::<_, String>(offset(owner)? + of("fown_struct", name)?);
            Owner::Inside(inner("pid")?, inner("signum")?)
        };
        let event = [("count", 8), ("flags", 4), ("id", 4)];
        let event = event.map(|(name, len)| Ok((member("eventfd_ctx", name)?.offset, len)));
        let [count, flags, id]: [Result<(u32, u32), String>; 3] = event;
        let event = [count?, flags?, id?];
        let first = event.iter().map(|(at, _)| *at).min().unwrap_or(0);
        if event.iter().any(|(at, len)| at - first + len > EVENT_LEN as u32) {
            return Err("an eventfd is not as it was".to_owned());
        }
        Ok(Offsets {
            function,
            flags: of("file", "f_flags")?,
            position: of("file", "f_pos")?,
            inode: of("file", "f_inode")?,
            path: of("file", "f_path")?.into(),
            private: of("file", "private_data")?,
            owner,
            number: of("inode", "i_ino")?,
            mode: of("inode", "i_mode")?,
            superblock: of("inode", "i_sb")?,
            device: of("super_block", "s_dev")?,
            locks: of("inode", "i_flctx")?,
            lists: [list("flc_flock")?, list("flc_posix")?, list("flc_lease")?],
            event: (first as i32, event.map(|(at, _)| (at - first) as usize)),
        })
    }

    fn program(&self, map: &OwnedFd) -> Vec<u64> {
        let word = |n: i16| n * 8;
        let mut p = Program::default();
        p.load(Size::Double, R7, R1, 24);
        p.end_if_null(R7);
        p.load(Size::Word, R2, R1, 16);
        p.load(Size::Double, R6, R1, 0);
        p.load(Size::Double, R6, R6, 0);
        p.value_of_map(R8, map.as_raw_fd());
        p.store(R8, word(0), R2);
        p.store(R8, word(1), R7);
        p.load(Size::Word, R2, R7, self.flags);
        p.store(R8, word(2), R2);
        p.load(Size::Double, R2, R7, self.position);
        p.store(R8, word(3), R2);
        p.load(Size::Double, R9, R7, self.inode);
        p.load(Size::Double, R2, R9, self.number);
        p.store(R8, word(4), R2);
        p.load(Size::Double, R2, R9, self.superblock);
        p.load(Size::Word, R2, R2, self.device);
        p.store(R8, word(5), R2);
        p.load(Size::Half, R2, R9, self.mode);
        p.store(R8, word(6), R2);
        let (owner, signal) = match self.owner {
            Owner::Pointer(owner) => (owner, None),
            Owner::Inside(owner, signal) => (owner, Some(signal)),
        };
        p.load(Size::Double, R2, R7, owner);
        p.store(R8, word(7), R2);
        p.store_value(R8, word(8), 0);
        if let Some(signal) = signal {
            p.load(Size::Word, R2, R7, signal);
            p.store(R8, word(8), R2);
        }
        p.load(Size::Double, R2, R9, self.locks);
        p.store(R8, word(9), R2);
        p.unless_null(R2, |p| {
            for (n, list) in (10..).zip(self.lists) {
                p.copy(R1, R8);
                p.add(R1, n * 8);
                p.set(R2, 8);
                p.load(Size::Double, R3, R9, self.locks);
                p.add(R3, list.into());
                p.call(Helper::ProbeReadKernel);
            }
        });
        p.copy(R1, R8);
        p.add(R1, EVENT * 8);
        p.set(R2, EVENT_LEN);
        p.load(Size::Double, R3, R7, self.private);
        p.add(R3, self.event.0);
        p.call(Helper::ProbeReadKernel);
        p.copy(R1, R7);
        p.add(R1, self.path);
        p.copy(R2, R8);
        p.add(R2, HEAD);
        p.set(R3, LINK);
        p.call(Helper::DPath);
        p.set(R9, 0);
        p.unless_more(R0, LINK, |p| p.unless_less(R0, 1, |p| p.copy(R9, R0)));
        p.store(R8, word(WORDS as i16 - 1), R9);
        p.copy(R1, R6);
        p.copy(R2, R8);
        p.copy(R3, R9);
        p.add(R3, HEAD);
        p.call(Helper::SeqWrite);
        p.end()
    }
}

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its number.
    pub number: i32,
    /// Tells descriptions apart: of all that are open at a time, in all processes.
    pub description: u64,
    /// Status flags and access mode, as `F_GETFL` gives them.
    pub flags: u32,
    /// Position, of what has one.
    pub position: u64,
    /// Inode number, as the kernel has it in memory.
    pub inode: u64,
    /// Device of the file system, likewise.
    pub device: u64,
    /// Type and permissions, likewise.
    pub mode: u32,
    /// May somebody get signals for it? If not, certainly nobody.
    pub may_be_owned: bool,
    /// Is the file locked by whomever, or has it a lease?
    pub locked: bool,
    /// Has it a lease?
    pub leased: bool,
    /// If it is an eventfd: its counter, flags and number.
    pub event: (u64, u32, i32),
    /// What its link says; empty if it has none.
    pub link: Vec<u8>,
}

/// A program, and where it puts its records together.
struct Loaded {
    program: OwnedFd,
    _map: OwnedFd,
}

fn loaded() -> Result<Loaded, String> {
    const ARRAY: u32 = 2;
    let kernel = kernel()?;
    let info = MapInfo {
        kind: ARRAY,
        key_size: 4,
        value_size: (HEAD + LINK) as u32,
        max_entries: 1,
        ..MapInfo::default()
    };
    let map = bpf::map_create(&info).map_err(|e| e.to_string())?;
    let program = iter::load(&kernel.files.program(&map), kernel.files.function);
    Ok(Loaded { program: program.map_err(|e| e.to_string())?, _map: map })
}

/// The descriptors of a thread's process, ascending. It has to stand still.
///
/// # Errors
/// Why this kernel does not tell them, or not us.
pub fn of(tid: i32) -> Result<Vec<File>, String> {
    // One at a time: all use one place for their records.
    static LOADED: Mutex<Option<Result<Loaded, String>>> = Mutex::new(None);
    let mut slot = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let program = slot.get_or_insert_with(loaded).as_ref().map_err(Clone::clone)?;
    let offsets = &kernel()?.files;
    let mut files = Vec::new();
    read(&program.program, Whose::Thread(tid), |text| {
        parse(text, offsets, &mut files).ok_or_else(|| "a record is not whole".to_owned())
    })?;
    Ok(files)
}

/// Adds records to `files`; whether more are to come.
fn parse(text: &[u8], offsets: &Offsets, files: &mut Vec<File>) -> Option<bool> {
    let mut rest = text;
    while !rest.is_empty() {
        let (head, after) = rest.split_at_checked(HEAD as usize)?;
        let words: [u64; WORDS] = words(head);
        let (link, after) = after.split_at_checked(usize::try_from(words[WORDS - 1]).ok()?)?;
        rest = after;
        let number = i32::try_from(words[0]).ok()?;
        if files.last().is_some_and(|last| number <= last.number) {
            return Some(false);
        }
        let locks = words[9];
        let mut kinds = words[10..13].iter().zip(offsets.lists).map(|(next, list)| {
            // An empty list leads to itself.
            locks != 0 && *next != locks.wrapping_add_signed(list.into())
        });
        let leased = kinds.next_back().unwrap_or(false);
        let locked = leased || kinds.any(|any| any);
        let event = &head[EVENT as usize * 8..][..EVENT_LEN as usize];
        let part = |which: usize| &event[offsets.event.1[which]..];
        let half = |which| Some(u32::from_ne_bytes(*part(which).first_chunk()?));
        files.push(File {
            number,
            description: words[1],
            flags: words[2] as u32,
            position: words[3],
            inode: words[4],
            device: rustix::fs::makedev((words[5] >> 20) as u32, (words[5] & 0xf_ffff) as u32),
            mode: words[6] as u32,
            may_be_owned: words[7] != 0 || words[8] != 0,
            locked,
            leased,
            event: (u64::from_ne_bytes(*part(0).first_chunk()?), half(1)?, half(2)? as i32),
            link: link.strip_suffix(b"\0").unwrap_or(link).to_vec(),
        });
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_sys::file;
    use rustix::event::EventfdFlags;
    use rustix::fd::AsFd;

    /// All is as it is told elsewhere.
    #[test]
    fn the_kernel_tells_what_proc_tells() {
        let own = std::process::id() as i32;
        if let Err(e) = of(own) {
            return println!("not here: {e}");
        }
        let dir = std::env::temp_dir().join(format!("rewake-iter-{own}"));
        let plain = std::fs::File::create(&dir).unwrap();
        plain.set_len(10).unwrap();
        rustix::fs::seek(&plain, rustix::fs::SeekFrom::Start(7)).unwrap();
        let again = plain.try_clone().unwrap();
        let other = std::fs::File::open(&dir).unwrap();
        rustix::fs::flock(&other, rustix::fs::FlockOperation::LockShared).unwrap();
        std::fs::remove_file(&dir).unwrap();
        let event = rustix::event::eventfd(5, EventfdFlags::SEMAPHORE).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        file::set_owner_as(read.as_fd(), 1, own, (0, 0)).unwrap();
        let files = of(own).unwrap();
        let find = |fd: i32| files.iter().find(|f| f.number == fd).unwrap();
        for fd in [plain.as_fd(), again.as_fd(), other.as_fd(), event.as_fd(), read.as_fd()] {
            let seen = find(fd.as_raw_fd());
            let stat = rustix::fs::fstat(fd).unwrap();
            assert_eq!((seen.inode, seen.device), (stat.st_ino, stat.st_dev));
            assert_eq!(seen.flags, file::flags(fd).unwrap());
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(seen.link, link.into_os_string().into_encoded_bytes());
        }
        let plain = find(plain.as_raw_fd());
        assert_eq!((plain.position, plain.may_be_owned, plain.locked), (7, false, true));
        assert_eq!(plain.description, find(again.as_raw_fd()).description);
        assert_ne!(plain.description, find(other.as_raw_fd()).description);
        assert!(find(read.as_raw_fd()).may_be_owned);
        assert!(!find(write.as_raw_fd()).may_be_owned && !find(write.as_raw_fd()).locked);
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).unwrap();
        let told = rewake_proc::fdinfo::parse(&text).unwrap().eventfd.unwrap();
        let event = find(event.as_raw_fd()).event;
        assert_eq!((event.0, event.1 & 1, Some(event.2)), (5, 1, told.id));
    }
}
