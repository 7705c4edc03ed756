//! BPF maps and programs.

use super::whole;

/// A BPF map, as bpf(2) `BPF_MAP_CREATE` made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfMap {
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub map_flags: u32,
    /// `map_extra` (since Linux 5.16).
    pub map_extra: Option<u64>,
    /// Bytes charged.
    pub memlock: Option<u64>,
    /// Id of the map in the kernel.
    pub map_id: Option<u32>,
    /// `BPF_MAP_FREEZE` was done.
    pub frozen: Option<bool>,
}

/// A BPF program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfProg {
    /// `BPF_PROG_TYPE_*`.
    pub prog_type: u32,
    /// Is it compiled?
    pub jited: Option<bool>,
    /// Hash of its instructions.
    pub tag: Option<u64>,
    /// Bytes charged.
    pub memlock: Option<u64>,
    /// Id of the program in the kernel.
    pub prog_id: Option<u32>,
}

#[derive(Default)]
pub(super) struct BpfParts {
    map_type: Option<u32>,
    key_size: Option<u32>,
    value_size: Option<u32>,
    max_entries: Option<u32>,
    map_flags: Option<u32>,
    map_extra: Option<u64>,
    memlock: Option<u64>,
    map_id: Option<u32>,
    frozen: Option<bool>,
    prog_type: Option<u32>,
    jited: Option<bool>,
    tag: Option<u64>,
    prog_id: Option<u32>,
}

impl BpfParts {
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<bool, &'static str> {
        // The type comes first; without it, a line as `memlock` is some other driver's.
        let begun = self.map_type.is_some() || self.prog_type.is_some();
        match key {
            b"map_type" => self.map_type = Some(whole(value, |s| s.dec()).ok_or("map_type")?),
            b"prog_type" => self.prog_type = Some(whole(value, |s| s.dec()).ok_or("prog_type")?),
            _ if !begun => return Ok(false),
            b"key_size" => self.key_size = Some(whole(value, |s| s.dec()).ok_or("key_size")?),
            b"value_size" => self.value_size = Some(whole(value, |s| s.dec()).ok_or("value_size")?),
            b"max_entries" => {
                self.max_entries = Some(whole(value, |s| s.dec()).ok_or("max_entries")?)
            }
            b"map_flags" => self.map_flags = Some(whole(value, |s| s.hex0x()).ok_or("map_flags")?),
            b"map_extra" => self.map_extra = Some(whole(value, |s| s.hex0x()).ok_or("map_extra")?),
            b"memlock" => self.memlock = Some(whole(value, |s| s.dec()).ok_or("memlock")?),
            b"map_id" => self.map_id = Some(whole(value, |s| s.dec()).ok_or("map_id")?),
            b"frozen" => self.frozen = Some(whole(value, |s| s.dec::<u32>()).ok_or("frozen")? != 0),
            b"prog_jited" => {
                self.jited = Some(whole(value, |s| s.dec::<u32>()).ok_or("prog_jited")? != 0)
            }
            b"prog_tag" => self.tag = Some(whole(value, |s| s.hex()).ok_or("prog_tag")?),
            b"prog_id" => self.prog_id = Some(whole(value, |s| s.dec()).ok_or("prog_id")?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Result<(Option<BpfMap>, Option<BpfProg>), &'static str> {
        let map = match self.map_type {
            None => None,
            Some(map_type) => Some(BpfMap {
                map_type,
                key_size: self.key_size.ok_or("key_size")?,
                value_size: self.value_size.ok_or("value_size")?,
                max_entries: self.max_entries.ok_or("max_entries")?,
                map_flags: self.map_flags.ok_or("map_flags")?,
                map_extra: self.map_extra,
                memlock: self.memlock,
                map_id: self.map_id,
                frozen: self.frozen,
            }),
        };
        let (jited, tag, prog_id) = (self.jited, self.tag, self.prog_id);
        let prog = self.prog_type.map(|prog_type| BpfProg {
            prog_type,
            jited,
            tag,
            memlock: self.memlock,
            prog_id,
        });
        Ok((map, prog))
    }
}
