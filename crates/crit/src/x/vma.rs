//! What a mapping is a mapping of.

use std::collections::HashMap;

use rewake_image::messages::{VmaEntry, vma_status as status};

use super::files::Files;

/// `MAP_GROWSDOWN` of mmap(2), in `vma_entry.flags`.
const MAP_GROWSDOWN: u32 = 0x100;

/// Short numbers for the ids of shared memory, which are long: in the order in which they come up, over all processes.
#[derive(Debug, Default)]
pub(super) struct ShortIds(HashMap<u64, usize>);

impl ShortIds {
    fn of(&mut self, id: u64) -> usize {
        let next = self.0.len() + 1;
        *self.0.entry(id).or_insert(next)
    }
}

/// Whether the mapping is of a file.
pub(super) fn is_file(vma: &VmaEntry) -> bool {
    vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0
}

/// The name of what is mapped; empty for private anonymous memory.
pub(super) fn name(vma: &VmaEntry, files: &Files, short: &mut ShortIds) -> Vec<u8> {
    let has = |bits| vma.status & bits != 0;
    let numbered = |what, id| format!("{what}[{id:x}]").into_bytes();
    if has(status::SYSVIPC) {
        numbered("ips", short.of(vma.shmid))
    } else if has(status::ANON_SHARED) {
        numbered("shmem", short.of(vma.shmid))
    } else if has(status::SOCKET) {
        numbered("packet", short.of(vma.shmid))
    } else if is_file(vma) {
        let mut name = files.path(vma.shmid).to_vec();
        if vma.pgoff != 0 {
            name.extend(format!(" + {:#x}", vma.pgoff).bytes());
        }
        if has(status::FILE_SHARED) {
            name.extend(b" (s)");
        }
        name
    } else if has(status::STACK) {
        b"[stack]".to_vec()
    } else if has(status::VSYSCALL) {
        b"[vsyscall]".to_vec()
    } else if has(status::VDSO) {
        b"[vdso]".to_vec()
    } else if vma.flags & MAP_GROWSDOWN != 0 {
        b"[stack?]".to_vec()
    } else {
        Vec::new()
    }
}
