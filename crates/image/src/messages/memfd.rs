//! Files in memory: `memfd.img`.

use super::{FownEntry, declare::messages};

messages! {
    /// An open memfd.
    message MemfdFileEntry "memfd_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        required uint64 pos = 3;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 4;
        /// memfd.img inode_id.
        required uint32 inode_id = 5;
    }

    /// A memfd_create(2) file. Shared anonymous memory is one too, named `/dev/zero`.
    message MemfdInodeEntry "memfd_inode_entry" {
        /// Memfd name without prefix; shared anonymous memory appears as `/dev/zero`.
        required string name = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
        required uint64 size = 4;
        /// N of pagemap-shmem-N.img (original shmem inode).
        required uint32 shmid = 5;
        /// SEAL1 SHRINK2 GROW4 WRITE8 FUTURE_WRITE16. Exactly 1 = created without ALLOW_SEALING.
        required uint32 seals = 6 [flags = "seals.flags"];
        /// 1,2,.. in file.
        required uint64 inode_id = 7;
        /// MFD_HUGETLB4 | size bits.
        optional uint32 hugetlb_flag = 8;
        /// st_mode.
        optional uint32 mode = 9;
    }
}
