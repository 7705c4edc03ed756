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
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        required message FownEntry fown = 4;
        repeated message InotifyWdEntry wd = 5;
    }

    /// An inotify watch.
    message InotifyWdEntry "inotify_wd_entry" {
        /// 0; in `inotify-wd.img`, the id of the inotify instance.
        required uint32 id = 1;
        required uint64 i_ino = 2;
        /// `IN_*`; `0x0800_0000` is internal to the kernel.
        required uint32 mask = 3 [hex];
        required uint32 ignored_mask = 4 [hex];
        required uint32 s_dev = 5 [dev];
        /// The watch descriptor.
        required uint32 wd = 6;
        required message FhEntry f_handle = 7;
    }

    /// A fanotify(7) group.
    message FanotifyFileEntry "fanotify_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        required message FownEntry fown = 3;
        /// As given to fanotify_init(2).
        required uint32 faflags = 4 [hex];
        /// As given to fanotify_init(2), `event_f_flags`.
        required uint32 evflags = 5 [hex];
        repeated message FanotifyMarkEntry mark = 6;
    }

    /// A fanotify mark.
    message FanotifyMarkEntry "fanotify_mark_entry" {
        required uint32 id = 1;
        required enum MarkType r#type = 2;
        required uint32 mflags = 3 [hex];
        required uint32 mask = 4 [hex];
        required uint32 ignored_mask = 5 [hex];
        required uint32 s_dev = 6 [dev];
        /// Of [`MarkType::Inode`].
        optional message FanotifyInodeMarkEntry ie = 7;
        /// Of [`MarkType::Mount`].
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
        required uint32 mnt_id = 1;
        /// Present if the mount namespace is not dumped.
        optional string path = 2;
    }

    /// A file handle: name_to_handle_at(2).
    message FhEntry "fh_entry" {
        /// Length of the handle in bytes.
        required uint32 bytes = 1;
        required uint32 r#type = 2;
        /// The handle, padded to sixteen words.
        repeated uint64 handle = 3;
        /// The path, if it was found.
        optional string path = 4;
        optional uint32 mnt_id = 5;
    }

    /// A resolved inode: `irmap-cache`.
    message IrmapCacheEntry "irmap_cache_entry" {
        required uint32 dev = 1 [odev];
        /// Inode number.
        required uint64 inode = 2;
        required string path = 3;
    }
}
