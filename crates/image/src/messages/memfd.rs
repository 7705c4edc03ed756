//! Files in memory: `memfd.img`.

use super::{FownEntry, declare::messages};

messages! {
    /// An open memfd.
    message MemfdFileEntry "memfd_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        required uint64 pos = 3;
        required message FownEntry fown = 4;
        /// Of the [`MemfdInodeEntry`].
        required uint32 inode_id = 5;
    }

    /// A memfd_create(2) file. Shared anonymous memory is one too, named `/dev/zero`.
    message MemfdInodeEntry "memfd_inode_entry" {
        /// As given to memfd_create(2).
        required string name = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
        required uint64 size = 4;
        /// `N` of `pagemap-shmem-N.img`.
        required uint32 shmid = 5;
        /// `F_SEAL_*`. `F_SEAL_SEAL` alone: created without `MFD_ALLOW_SEALING`.
        required uint32 seals = 6 [flags = "seals.flags"];
        /// Counts from 1.
        required uint64 inode_id = 7;
        /// `MFD_HUGETLB` and `MFD_HUGE_*`
        optional uint32 hugetlb_flag = 8;
        optional uint32 mode = 9;
    }
}
