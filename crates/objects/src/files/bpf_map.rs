//! BPF maps (bpf(2)): hashes and arrays, with what is in them, their names, and frozen ones. Other kinds, and programs, are
//! refused. Type information (BTF) is not kept.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{BpfmapDataEntry, BpfmapFileEntry, FdTypes, FileEntry};
use rewake_sys::bpf::{self, MapInfo};
use rustix::fd::{AsFd, OwnedFd};

/// `BPF_MAP_TYPE_HASH` and `BPF_MAP_TYPE_ARRAY`.
const KINDS: [u32; 2] = [1, 2];
/// `BPF_F_NUMA_NODE`: nobody tells which node it was.
const NUMA_NODE: u32 = 1 << 2;

/// Surveys a map.
///
/// # Errors
/// It is of another kind, or cannot be read.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let failed = |e: rewake_sys::SyscallError| view.problem(e.to_string());
    let text = (view.fdinfo)()?;
    let told = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let told = told.bpf_map.ok_or_else(|| view.problem("fdinfo does not tell how it was made"))?;
    let info = bpf::map_info(view.as_fd()).map_err(failed)?;
    if !KINDS.contains(&info.kind) || info.ifindex != 0 {
        return Err(view
            .problem(format!(
                "BPF maps of this kind (type {}) cannot be saved, only hashes and arrays",
                info.kind
            ))
            .remedy("close it for the time of the dump, or pin it and open it again"));
    }
    if info.btf_id != 0 {
        log::warn!("process {}: {}: its type information is not saved", view.pid, view.object());
    }
    let id = collector.new_id();
    // Several descriptions may be of one map.
    if !collector.bpf_data.iter().any(|(data, _)| data.map_id == info.id) {
        let readable = bpf::map_by_id(info.id, bpf::RDONLY).map_err(failed)?;
        let (keys, values) = bpf::map_read(readable.as_fd(), &info).map_err(failed)?;
        let too_large = |_| view.problem("it holds more than the image format has a place for");
        let data = BpfmapDataEntry {
            map_id: info.id,
            keys_bytes: u32::try_from(keys.len()).map_err(too_large)?,
            values_bytes: u32::try_from(values.len()).map_err(too_large)?,
            count: (keys.len() / (info.key_size as usize).max(1)) as u32,
        };
        collector.bpf_data.push((data, [keys, values].concat()));
    }
    let name = info.name.split(|b| *b == 0).next().unwrap_or_default().to_vec();
    let entry = BpfmapFileEntry {
        id,
        flags: view.flags,
        pos: 0,
        fown: view.owner()?,
        map_type: info.kind,
        key_size: info.key_size,
        value_size: info.value_size,
        map_id: info.id,
        max_entries: info.max_entries,
        map_flags: info.flags,
        memlock: told.memlock.unwrap_or(0),
        frozen: told.frozen.unwrap_or(false),
        map_name: name,
        ifindex: 0,
        mnt_id: None,
        map_extra: Some(info.extra),
    };
    collector.push(FileEntry {
        r#type: FdTypes::Bpfmap as i32,
        id,
        bpf: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Bpfmap))
}

/// Opens a map of the image: makes it if no other description has.
///
/// # Errors
/// The kernel refuses what the image asks for.
pub fn open(opener: &mut Opener<'_>, entry: &BpfmapFileEntry) -> Result<OwnedFd, Problem> {
    let object = || format!("BPF map {}", crate::problem::text(&entry.map_name));
    let failed = |e: rewake_sys::SyscallError| Problem::new(object(), e.to_string());
    if !KINDS.contains(&entry.map_type) {
        let why = format!("maps of type {} cannot be restored", entry.map_type);
        return Err(Problem::new(object(), why));
    }
    if !opener.bpf_maps.contains_key(&entry.map_id) {
        let map = make(opener, entry).map_err(failed)?;
        opener.bpf_maps.insert(entry.map_id, map);
    }
    let map = &opener.bpf_maps[&entry.map_id];
    let id = bpf::map_info(map.as_fd()).map_err(failed)?.id;
    let access = match entry.flags as i32 & libc::O_ACCMODE {
        libc::O_RDONLY => bpf::RDONLY,
        libc::O_WRONLY => bpf::WRONLY,
        _ => 0,
    };
    bpf::map_by_id(id, access).map_err(failed)
}

fn make(opener: &Opener<'_>, entry: &BpfmapFileEntry) -> rewake_sys::call::Result<OwnedFd> {
    let mut name = [0; 16];
    let length = entry.map_name.len().min(name.len() - 1);
    name[..length].copy_from_slice(&entry.map_name[..length]);
    let info = MapInfo {
        kind: entry.map_type,
        key_size: entry.key_size,
        value_size: entry.value_size,
        max_entries: entry.max_entries,
        flags: entry.map_flags & !NUMA_NODE,
        name,
        extra: entry.map_extra.unwrap_or(0),
        ..MapInfo::default()
    };
    let map = bpf::map_create(&info)?;
    if let Some((data, bytes)) = opener.bpf_data.get(&entry.map_id) {
        let (keys, values) = bytes.split_at((data.keys_bytes as usize).min(bytes.len()));
        bpf::map_write(map.as_fd(), &info, data.count, keys, values)?;
    }
    if entry.frozen {
        bpf::map_freeze(map.as_fd())?;
    }
    Ok(map)
}
