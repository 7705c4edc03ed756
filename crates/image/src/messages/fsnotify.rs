//! inotify, fanotify and file handles.

use super::{
    FownEntry,
    declare::{enums, messages},
};

enums! {
    /// What a fanotify mark is on.
    enum MarkType "mark_type" {
        Inode "INODE" = 1;
        Mount "MOUNT" = 2;
    }

    /// Sizes of [`FhEntry`].
    enum FhEntrySizes "fh_entry_sizes" {
        MinEntries "min_entries" = 16;
    }
}

messages! {
    /// An inotify(7) instance.
    message InotifyFileEntry "inotify_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 4;
        /// Watches.
        repeated message InotifyWdEntry wd = 5;
    }

    /// An inotify watch.
    message InotifyWdEntry "inotify_wd_entry" {
        /// 0 (old: inotify id).
        required uint32 id = 1;
        /// Target inode.
        required uint64 i_ino = 2;
        /// IN_* (kernel bit 0x08000000 event-on-child to be ignored).
        required uint32 mask = 3 [hex];
        required uint32 ignored_mask = 4 [hex];
        /// Kernel dev encoding major<<20|minor.
        required uint32 s_dev = 5 [dev];
        /// Watch descriptor to reproduce.
        required uint32 wd = 6;
        /// File handle / path.
        required message FhEntry f_handle = 7;
    }

    /// A fanotify(7) group.
    message FanotifyFileEntry "fanotify_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 3;
        /// fanotify_init flags.
        required uint32 faflags = 4 [hex];
        /// event_f_flags.
        required uint32 evflags = 5 [hex];
        /// Marks.
        repeated message FanotifyMarkEntry mark = 6;
    }

    /// A fanotify mark.
    message FanotifyMarkEntry "fanotify_mark_entry" {
        /// 0.
        required uint32 id = 1;
        required enum MarkType r#type = 2;
        /// FAN_MARK_*.
        required uint32 mflags = 3 [hex];
        /// FAN_*.
        required uint32 mask = 4 [hex];
        required uint32 ignored_mask = 5 [hex];
        /// Kernel encoding.
        required uint32 s_dev = 6 [dev];
        /// For INODE.
        optional message FanotifyInodeMarkEntry ie = 7;
        /// For MOUNT.
        optional message FanotifyMountMarkEntry me = 8;
    }

    /// The inode a fanotify mark is on.
    message FanotifyInodeMarkEntry "fanotify_inode_mark_entry" {
        /// Inode number.
        required uint64 i_ino = 1;
        required message FhEntry f_handle = 2;
    }

    /// The mount a fanotify mark is on.
    message FanotifyMountMarkEntry "fanotify_mount_mark_entry" {
        /// Mount.
        required uint32 mnt_id = 1;
        /// Only when mount ns not dumped.
        optional string path = 2;
    }

    /// A file handle: name_to_handle_at(2).
    message FhEntry "fh_entry" {
        /// Handle length in bytes.
        required uint32 bytes = 1;
        /// Handle type.
        required uint32 r#type = 2;
        /// Padded to 16 u64 words.
        repeated uint64 handle = 3;
        /// Resolved path, if found.
        optional string path = 4;
        /// Mount of path.
        optional uint32 mnt_id = 5;
    }

    /// A resolved inode: `irmap-cache`.
    message IrmapCacheEntry "irmap_cache_entry" {
        required uint32 dev = 1 [odev];
        /// Inode number.
        required uint64 inode = 2;
        /// Resolved path.
        required string path = 3;
    }
}
