//! Files without a name: `remap-fpath.img`, `ghost-file-HEX.img`.

use super::declare::{enums, messages};

enums! {
    /// How a file without a valid path is found again.
    enum RemapType "remap_type" {
        Linked "LINKED" = 0;
        Ghost "GHOST" = 1;
        Procfs "PROCFS" = 2;
    }
}

messages! {
    /// How to find a file whose path does not lead to it.
    message RemapFilePathEntry "remap_file_path_entry" {
        /// REG id being remapped.
        required uint32 orig_id = 1;
        /// LINKED: REG id of the link_remap file; GHOST: N (hex) of ghost-file-N; PROCFS: pid of dead process.
        required uint32 remap_id = 2;
        /// Absent (old): bit 31 of remap_id = ghost.
        optional enum RemapType remap_type = 3;
    }

    /// A deleted file; its content follows the message.
    message GhostFileEntry "ghost_file_entry" {
        required uint32 uid = 1;
        required uint32 gid = 2;
        /// st_mode.
        required uint32 mode = 3;
        /// Device (kernel encoding).
        optional uint32 dev = 4 [dev];
        /// Inode number.
        optional uint64 ino = 5;
        /// For device nodes.
        optional uint32 rdev = 6 [odev];
        optional message Timeval atim = 7;
        optional message Timeval mtim = 8;
        /// True: chunk records follow instead of raw bytes.
        optional bool chunks = 9;
        /// With chunks.
        optional uint64 size = 10;
        /// For symlinks.
        optional string symlnk_target = 11;
    }

    /// A stretch of a sparse ghost file; its bytes follow the message.
    message GhostChunkEntry "ghost_chunk_entry" {
        /// Payload bytes following.
        required uint64 len = 1;
        /// File offset.
        required uint64 off = 2;
    }

    /// A time: `struct timeval`.
    message Timeval "timeval" {
        /// Seconds.
        required uint64 tv_sec = 1;
        /// Microseconds.
        required uint64 tv_usec = 2;
    }
}
