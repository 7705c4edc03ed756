//! BPF maps.

use super::{FownEntry, declare::messages};

messages! {
    /// A BPF map: bpf(2).
    message BpfmapFileEntry "bpfmap_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        /// 0.
        required uint64 pos = 3;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 4;
        /// 1 hash or 2 array only.
        required uint32 map_type = 5;
        required uint32 key_size = 6;
        required uint32 value_size = 7;
        /// Key of bpfmap-data.
        required uint32 map_id = 8;
        required uint32 max_entries = 9;
        required uint32 map_flags = 10;
        required uint64 memlock = 11;
        required bool frozen = 12 [default = "false"];
        required string map_name = 13;
        required uint32 ifindex = 14 [default = "0"];
        /// Unused.
        optional sint32 mnt_id = 15 [default = "-1"];
        optional uint64 map_extra = 16;
    }

    /// The content of a BPF map; all keys, then all values, follow the message.
    message BpfmapDataEntry "bpfmap_data_entry" {
        /// Map.
        required uint32 map_id = 1;
        /// Payload part 1.
        required uint32 keys_bytes = 2;
        /// Payload part 2.
        required uint32 values_bytes = 3;
        /// Pairs.
        required uint32 count = 4;
    }
}
