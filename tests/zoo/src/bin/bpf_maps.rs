//! Kernel state: BPF maps: an array, a hash with a few thousand pairs, an empty one, a frozen one; a second description of
//! one of them (ZOO_PLAIN: without it).
#![allow(unsafe_code, reason = "bpf has no library function")]

use zoo::{Rng, check, ensure_eq, errno};

const HASH: u32 = 1;
const ARRAY: u32 = 2;

fn bpf(command: i32, attr: &[u64]) -> i32 {
    // SAFETY: attributes of that size; what they point to is live in the callers.
    unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), attr.len() * 8) as i32 }
}

fn create(kind: u32, value: u32, entries: u32, name: &[u8; 4]) -> Result<i32, String> {
    let word = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let name = u32::from_ne_bytes(*name);
    let attr = [word(kind, 4), word(value, entries), 0, word(0, name), 0, 0, 0, 0, 0];
    let fd = bpf(0, &attr);
    check(fd, "BPF_MAP_CREATE").map_err(|e| format!("{e}: errno {}", errno()))?;
    Ok(fd)
}

fn put(map: i32, key: u32, value: &[u8]) -> i32 {
    bpf(2, &[map as u64, (&raw const key) as u64, value.as_ptr() as u64, 0])
}

fn get(map: i32, key: u32, room: usize) -> Option<Vec<u8>> {
    let mut value = vec![0u8; room];
    let found = bpf(1, &[map as u64, (&raw const key) as u64, value.as_mut_ptr() as u64, 0]);
    (found == 0).then_some(value)
}

/// Name and id.
fn info(map: i32) -> Result<([u8; 16], u32), String> {
    let mut info = [0u64; 11];
    let attr = [map as u64 | 88 << 32, info.as_mut_ptr() as u64];
    check(bpf(15, &attr), "BPF_OBJ_GET_INFO_BY_FD")?;
    let mut name = [0; 16];
    name[..8].copy_from_slice(&info[3].to_ne_bytes());
    name[8..].copy_from_slice(&info[4].to_ne_bytes());
    Ok((name, (info[0] >> 32) as u32))
}

fn main() {
    zoo::run(|z| {
        let array = create(ARRAY, 24, 700, b"arry").unwrap_or_else(|why| z.skip(&why));
        let hash = create(HASH, 6, 5000, b"hash")?;
        let empty = create(HASH, 8, 10, b"none")?;
        let frozen = create(ARRAY, 8, 3, b"cold")?;
        let mut rng = Rng(11);
        let mut fill = |map: i32, keys: &[u32], size: usize| -> zoo::Check {
            for key in keys {
                let mut value = vec![0; size];
                rng.fill(&mut value);
                check(put(map, *key, &value), "BPF_MAP_UPDATE_ELEM")?;
            }
            Ok(())
        };
        let indices: Vec<u32> = (0..700).collect();
        let keys: Vec<u32> = (0..3000).map(|n| n * 977).collect();
        fill(array, &indices, 24)?;
        fill(hash, &keys, 6)?;
        check(put(frozen, 1, &7u64.to_ne_bytes()), "BPF_MAP_UPDATE_ELEM")?;
        check(bpf(22, &[frozen as u64]), "BPF_MAP_FREEZE")?;
        let again = if z.param("ZOO_PLAIN", 0) == 0 {
            // BPF_MAP_GET_FD_BY_ID, for reading only.
            let fd = bpf(14, &[u64::from(info(hash)?.1), 1 << 3]);
            check(fd, "BPF_MAP_GET_FD_BY_ID")?;
            Some(fd)
        } else {
            None
        };
        z.ready()?;
        z.wait_for_check();
        let mut rng = Rng(11);
        let mut compare = |map: i32, keys: &[u32], size: usize| -> zoo::Check {
            for key in keys {
                let mut value = vec![0; size];
                rng.fill(&mut value);
                ensure_eq!(get(map, *key, size), Some(value), "value of {key} in map {map}");
            }
            Ok(())
        };
        compare(array, &indices, 24)?;
        compare(hash, &keys, 6)?;
        ensure_eq!(get(hash, 5, 6), None, "a key that was never there");
        ensure_eq!(get(empty, 0, 8), None, "something in the empty map");
        check(put(empty, 3, &[1; 8]), "the empty map takes no pair")?;
        ensure_eq!(get(frozen, 1, 8), Some(7u64.to_ne_bytes().to_vec()), "in the frozen map");
        ensure_eq!((put(frozen, 1, &[0; 8]), errno()), (-1, libc::EPERM), "the frozen map");
        for (map, name) in [(array, b"arry"), (hash, b"hash"), (empty, b"none"), (frozen, b"cold")]
        {
            ensure_eq!(&info(map)?.0[..5], &[&name[..], b"\0"].concat(), "name of map {map}");
        }
        if let Some(again) = again {
            ensure_eq!(info(again)?.1, info(hash)?.1, "the map of the second description");
            ensure_eq!(put(again, 0, &[0; 6]), -1, "a description for reading only");
        }
        Ok(())
    })
}
