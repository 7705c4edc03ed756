//! BPF maps.

use super::{FownEntry, declare::messages};

messages! {
    /// A BPF map: bpf(2).
    message BpfmapFileEntry "bpfmap_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        required uint64 pos = 3;
        required message FownEntry fown = 4;
        /// `BPF_MAP_TYPE_HASH` (1) or `BPF_MAP_TYPE_ARRAY` (2).
        required uint32 map_type = 5;
        required uint32 key_size = 6;
        required uint32 value_size = 7;
        required uint32 map_id = 8;
        required uint32 max_entries = 9;
        required uint32 map_flags = 10;
        required uint64 memlock = 11;
        required bool frozen = 12 [default = "false"];
        required string map_name = 13;
        required uint32 ifindex = 14 [default = "0"];
        /// Not used.
        optional sint32 mnt_id = 15 [default = "-1"];
        optional uint64 map_extra = 16;
    }

    /// The content of a BPF map; all keys, then all values, follow the message.
    message BpfmapDataEntry "bpfmap_data_entry" {
        required uint32 map_id = 1;
        /// Bytes of all keys.
        required uint32 keys_bytes = 2;
        /// Bytes of all values.
        required uint32 values_bytes = 3;
        /// How many pairs there are.
        required uint32 count = 4;
    }
}
