//! BPF maps and iterators: bpf(2).

pub mod iter;

use crate::call::{Errno, Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: usize = 0;
const MAP_GET_FD_BY_ID: usize = 14;
const OBJ_GET_INFO_BY_FD: usize = 15;
const MAP_FREEZE: usize = 22;
const MAP_LOOKUP_BATCH: usize = 24;
const MAP_UPDATE_BATCH: usize = 26;

/// `BPF_F_RDONLY` and `BPF_F_WRONLY`: what a descriptor of a map may do.
pub const RDONLY: u32 = 1 << 3;
/// See [`RDONLY`].
pub const WRONLY: u32 = 1 << 4;

/// A word at a time, so that everything is aligned as `union bpf_attr` is.
type Attr = [u64; 16];

fn set(attr: &mut Attr, at: usize, value: u32) {
    let word = &mut attr[at / 8];
    let shift = at % 8 * 8;
    *word = *word & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
}

fn get(attr: &Attr, at: usize) -> u32 {
    (attr[at / 8] >> (at % 8 * 8)) as u32
}

fn call(name: &'static str, command: usize, attr: &mut Attr, size: usize) -> Result<usize> {
    let args = [command, attr.as_mut_ptr() as usize, size, 0, 0, 0];
    // SAFETY: the attributes are live and larger than `size`; what they point to is kept alive by the callers below,
    // with the lengths that the map has.
    unsafe { syscall(name, libc::SYS_bpf, args) }
}

fn owned(fd: usize) -> OwnedFd {
    // SAFETY: called with what a system call just returned as a new descriptor; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// How a map was made (`struct bpf_map_info`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MapInfo {
    /// `BPF_MAP_TYPE_*`
    pub kind: u32,
    /// Number by which the kernel knows it.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Pairs it has room for.
    pub max_entries: u32,
    /// `BPF_F_*`
    pub flags: u32,
    /// Name, filled up with zeros.
    pub name: [u8; 16],
    /// Network device it is offloaded to, 0 if none.
    pub ifindex: u32,
    /// Its type information, 0 if none.
    pub btf_id: u32,
    /// Further settings.
    pub extra: u64,
}

/// Asks how a map was made.
///
/// # Errors
/// `EINVAL` if it is none.
pub fn map_info(map: BorrowedFd<'_>) -> Result<MapInfo> {
    let mut info: Attr = [0; 16];
    let mut attr: Attr = [0; 16];
    set(&mut attr, 0, map.as_raw_fd() as u32);
    set(&mut attr, 4, 88);
    attr[1] = info.as_mut_ptr() as u64;
    call("BPF_OBJ_GET_INFO_BY_FD", OBJ_GET_INFO_BY_FD, &mut attr, 16)?;
    let mut name = [0; 16];
    name[..8].copy_from_slice(&info[3].to_ne_bytes());
    name[8..].copy_from_slice(&info[4].to_ne_bytes());
    Ok(MapInfo {
        kind: get(&info, 0),
        id: get(&info, 4),
        key_size: get(&info, 8),
        value_size: get(&info, 12),
        max_entries: get(&info, 16),
        flags: get(&info, 20),
        name,
        ifindex: get(&info, 40),
        btf_id: get(&info, 64),
        extra: info[10],
    })
}

/// Makes a map; `id` and `btf_id` of `info` do not count.
///
/// # Errors
/// `EINVAL` for impossible settings, `EPERM` without `CAP_BPF`, `ENOMEM`.
pub fn map_create(info: &MapInfo) -> Result<OwnedFd> {
    let mut attr: Attr = [0; 16];
    for (at, value) in [info.kind, info.key_size, info.value_size, info.max_entries, info.flags]
        .into_iter()
        .enumerate()
    {
        set(&mut attr, at * 4, value);
    }
    for (at, word) in info.name.as_chunks::<4>().0.iter().enumerate() {
        set(&mut attr, 28 + at * 4, u32::from_ne_bytes(*word));
    }
    set(&mut attr, 44, info.ifindex);
    attr[8] = info.extra;
    call("BPF_MAP_CREATE", MAP_CREATE, &mut attr, 72).map(owned)
}

/// Another descriptor of map `id`; `flags` are 0, [`RDONLY`] or [`WRONLY`].
///
/// # Errors
/// `ENOENT` if there is none, `EPERM` without `CAP_SYS_ADMIN`.
pub fn map_by_id(id: u32, flags: u32) -> Result<OwnedFd> {
    let mut attr: Attr = [0; 16];
    set(&mut attr, 0, id);
    set(&mut attr, 8, flags);
    call("BPF_MAP_GET_FD_BY_ID", MAP_GET_FD_BY_ID, &mut attr, 12).map(owned)
}

/// Forbids programs to write to a map by system calls.
///
/// # Errors
/// `EBUSY` if it is mapped for writing.
pub fn map_freeze(map: BorrowedFd<'_>) -> Result<()> {
    let mut attr: Attr = [0; 16];
    set(&mut attr, 0, map.as_raw_fd() as u32);
    call("BPF_MAP_FREEZE", MAP_FREEZE, &mut attr, 4).map(drop)
}

/// All keys, then all values of a hash or array that nobody changes meanwhile.
///
/// # Errors
/// `EPERM` if the descriptor may not read.
pub fn map_read(map: BorrowedFd<'_>, info: &MapInfo) -> Result<(Vec<u8>, Vec<u8>)> {
    let (key, value) = (info.key_size as usize, info.value_size as usize);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut room = 1024u32;
    // Where the kernel goes on: as large as a key at least.
    let mut position = vec![0u64; key / 8 + 1];
    let mut first = true;
    loop {
        let at = (keys.len(), values.len());
        keys.resize(at.0 + room as usize * key, 0);
        values.resize(at.1 + room as usize * value, 0);
        let mut attr: Attr = [0; 16];
        attr[0] = if first { 0 } else { position.as_ptr() as u64 };
        attr[1] = position.as_mut_ptr() as u64;
        attr[2] = keys[at.0..].as_mut_ptr() as u64;
        attr[3] = values[at.1..].as_mut_ptr() as u64;
        set(&mut attr, 32, room);
        set(&mut attr, 36, map.as_raw_fd() as u32);
        let done = call("BPF_MAP_LOOKUP_BATCH", MAP_LOOKUP_BATCH, &mut attr, 56);
        let got = match &done {
            // A bucket with more than there is room for: nothing of it was read.
            Err(e) if e.errno == Errno::NOSPC => 0,
            _ => get(&attr, 32).min(room) as usize,
        };
        keys.truncate(at.0 + got * key);
        values.truncate(at.1 + got * value);
        match done {
            Ok(_) => first = false,
            Err(e) if e.errno == Errno::NOENT => return Ok((keys, values)),
            Err(e) if e.errno == Errno::NOSPC && room < info.max_entries => {
                room = room.saturating_mul(2);
            }
            Err(e) => return Err(e),
        }
    }
}

/// Writes `count` pairs into a map.
///
/// # Errors
/// `E2BIG` if there is no room, `EPERM` if it is frozen; `EINVAL` if the bytes are not `count` keys and values.
pub fn map_write(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    count: u32,
    keys: &[u8],
    values: &[u8],
) -> Result<()> {
    let sizes = |size: u32| u64::from(count) * u64::from(size);
    if keys.len() as u64 != sizes(info.key_size) || values.len() as u64 != sizes(info.value_size) {
        return Err(crate::SyscallError::new("BPF_MAP_UPDATE_BATCH", Errno::INVAL));
    }
    if count == 0 {
        return Ok(());
    }
    let mut attr: Attr = [0; 16];
    attr[2] = keys.as_ptr() as u64;
    attr[3] = values.as_ptr() as u64;
    set(&mut attr, 32, count);
    set(&mut attr, 36, map.as_raw_fd() as u32);
    call("BPF_MAP_UPDATE_BATCH", MAP_UPDATE_BATCH, &mut attr, 56).map(drop)
}
