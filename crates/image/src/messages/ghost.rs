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
        /// Id of the [`RegFileEntry`](super::RegFileEntry).
        required uint32 orig_id = 1;
        /// The [`RegFileEntry`](super::RegFileEntry) of a temporary link, the `HEX` of `ghost-file-HEX.img`, or the
        /// pid of a dead process.
        required uint32 remap_id = 2;
        /// Absent in old images, where bit 31 of `remap_id` means a ghost.
        optional enum RemapType remap_type = 3;
    }

    /// A deleted file; its content follows the message.
    message GhostFileEntry "ghost_file_entry" {
        required uint32 uid = 1;
        required uint32 gid = 2;
        required uint32 mode = 3;
        optional uint32 dev = 4 [dev];
        /// Inode number.
        optional uint64 ino = 5;
        /// Of a device node.
        optional uint32 rdev = 6 [odev];
        optional message Timeval atim = 7;
        optional message Timeval mtim = 8;
        /// Whether the content is in chunks.
        optional bool chunks = 9;
        /// Size, if the content is in chunks.
        optional uint64 size = 10;
        /// Of a symbolic link.
        optional string symlnk_target = 11;
    }

    /// A stretch of a sparse ghost file; its bytes follow the message.
    message GhostChunkEntry "ghost_chunk_entry" {
        /// How many bytes follow.
        required uint64 len = 1;
        /// Where they belong in the file.
        required uint64 off = 2;
    }

    /// A time: `struct timeval`.
    message Timeval "timeval" {
        /// Seconds.
        required uint64 tv_sec = 1;
        required uint64 tv_usec = 2;
    }
}
