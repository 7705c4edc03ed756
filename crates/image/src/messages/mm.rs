//! The address space of a process: `mm-PID.img`.

use super::declare::messages;

messages! {
    /// An address space.
    message MmEntry "mm_entry" {
        /// prctl(PR_SET_MM) values.
        required uint64 mm_start_code = 1 [hex];
        required uint64 mm_end_code = 2 [hex];
        required uint64 mm_start_data = 3 [hex];
        required uint64 mm_end_data = 4 [hex];
        required uint64 mm_start_stack = 5 [hex];
        required uint64 mm_start_brk = 6 [hex];
        /// Current break.
        required uint64 mm_brk = 7 [hex];
        required uint64 mm_arg_start = 8 [hex];
        required uint64 mm_arg_end = 9 [hex];
        required uint64 mm_env_start = 10 [hex];
        required uint64 mm_env_end = 11 [hex];
        /// REG id of /proc/pid/exe.
        required uint32 exe_file_id = 12;
        /// Raw auxv as u64 list (id,value pairs), length = bytes read/8; a terminating pair of zeros may follow.
        repeated uint64 mm_saved_auxv = 13;
        /// Ascending by address; fake GUARD entries at the end.
        repeated message VmaEntry vmas = 14;
        /// PR_GET_DUMPABLE.
        optional int32 dumpable = 15;
        /// AIO contexts, in order of AIORING vmas.
        repeated message AioRingEntry aios = 16;
        /// PR_GET_THP_DISABLE.
        optional bool thp_disabled = 17;
    }

    /// A memory mapping (VMA).
    message VmaEntry "vma_entry" {
        /// Page aligned.
        required uint64 start = 1 [hex];
        /// Exclusive.
        required uint64 end = 2 [hex];
        /// Byte offset in file/segment (not pages).
        required uint64 pgoff = 3;
        /// File mapping: file id (REG or MEMFD) ; anon shared (old/fallback) : inode of shmem; SysV: inode = ipc shm
        /// id; socket map: socket file id; else 0.
        required uint64 shmid = 4;
        /// PROT_*.
        required uint32 prot = 5 [flags = "mmap.prot"];
        /// MAP_SHARED1 PRIVATE2 DROPPABLE8 ANONYMOUS0x20 GROWSDOWN0x100 LOCKED0x2000 NORESERVE0x4000 HUGETLB0x40000 +
        /// huge size bits 26-31.
        required uint32 flags = 6 [flags = "mmap.flags"];
        /// [`VmaStatus`](crate::vma::status) bits.
        required uint32 status = 7 [flags = "mmap.status"];
        /// -1 (zigzag, encodes as 1).
        required sint64 fd = 8;
        /// Bit (1<<MADV_x): RANDOM1 SEQUENTIAL2 DONTFORK10 MERGEABLE12 HUGEPAGE14 NOHUGEPAGE15 DONTDUMP16
        /// WIPEONFORK18; absent if 0.
        optional uint64 madv = 9 [hex];
        /// Open mode of file behind mapping (0/1/2), from map_files link permissions; absent if no link.
        optional uint32 fdflags = 10 [hex];
    }

    /// An asynchronous I/O context: io_setup(2).
    message AioRingEntry "aio_ring_entry" {
        /// Ring address (= aio context id = vma start).
        required uint64 id = 1;
        /// Value to pass to io_setup.
        required uint32 nr_req = 2;
        /// Bytes of ring mapping.
        required uint32 ring_len = 3;
    }
}
