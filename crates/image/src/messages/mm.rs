//! The address space of a process: `mm-PID.img`.

use super::declare::messages;

/// Bits of [`VmaEntry::status`].
pub mod vma_status {
    /// An ordinary area, whose content is in the images.
    pub const REGULAR: u32 = 1 << 0;
    /// The stack. CRIU no longer sets it.
    pub const STACK: u32 = 1 << 1;
    /// `[vsyscall]`, or `[vectors]` on Arm; its content is never stored.
    pub const VSYSCALL: u32 = 1 << 2;
    /// `[vdso]`; all of it is stored.
    pub const VDSO: u32 = 1 << 3;
    /// `[heap]`.
    pub const HEAP: u32 = 1 << 5;
    /// A private mapping of a file.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// A shared mapping of a file.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared anonymous memory, known by inode number.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// System V shared memory.
    pub const SYSVIPC: u32 = 1 << 10;
    /// The ring of a packet socket.
    pub const SOCKET: u32 = 1 << 11;
    /// `[vvar]` and `[vvar_vclock]`, as one area.
    pub const VVAR: u32 = 1 << 12;
    /// The ring of an asynchronous I/O context. It stands alone.
    pub const AIORING: u32 = 1 << 13;
    /// A mapping of a memfd; comes with a file bit.
    pub const MEMFD: u32 = 1 << 14;
    /// A shadow stack.
    pub const SHSTK: u32 = 1 << 15;
    /// Not an area but a range with guards: madvise(2), `MADV_GUARD_INSTALL`. It stands alone, and after all areas.
    pub const GUARD: u32 = 1 << 16;
    /// `[uprobes]`.
    pub const UPROBES: u32 = 1 << 17;
    /// A device's memory that a plugin handles.
    pub const EXT_PLUGIN: u32 = 1 << 27;
    /// Bits that only have a meaning while CRIU runs, and must not be in an image.
    pub const RUN_TIME_ONLY: u32 = 0xf << 28;
}

messages! {
    /// An address space.
    message MmEntry "mm_entry" {
        required uint64 mm_start_code = 1 [hex];
        required uint64 mm_end_code = 2 [hex];
        required uint64 mm_start_data = 3 [hex];
        required uint64 mm_end_data = 4 [hex];
        required uint64 mm_start_stack = 5 [hex];
        required uint64 mm_start_brk = 6 [hex];
        required uint64 mm_brk = 7 [hex];
        required uint64 mm_arg_start = 8 [hex];
        required uint64 mm_arg_end = 9 [hex];
        required uint64 mm_env_start = 10 [hex];
        required uint64 mm_env_end = 11 [hex];
        /// The program: id of a [`RegFileEntry`](super::RegFileEntry).
        required uint32 exe_file_id = 12;
        /// /proc/PID/auxv, word by word.
        repeated uint64 mm_saved_auxv = 13;
        /// Ascending by address; then the pseudo-areas of [`vma_status::GUARD`].
        repeated message VmaEntry vmas = 14;
        /// prctl(2), `PR_GET_DUMPABLE`.
        optional int32 dumpable = 15;
        /// In the order of their mappings.
        repeated message AioRingEntry aios = 16;
        /// prctl(2), `PR_GET_THP_DISABLE`.
        optional bool thp_disabled = 17;
    }

    /// A memory mapping (VMA).
    message VmaEntry "vma_entry" {
        required uint64 start = 1 [hex];
        /// The first address after it.
        required uint64 end = 2 [hex];
        /// Offset in the file or segment, in bytes.
        required uint64 pgoff = 3;
        /// What is mapped. A file, memfd or socket: its id in `files.img`. System V shared memory: the IPC id. Other
        /// shared memory: its inode number. Otherwise 0.
        required uint64 shmid = 4;
        required uint32 prot = 5 [flags = "mmap.prot"];
        /// `MAP_*`
        required uint32 flags = 6 [flags = "mmap.flags"];
        /// [`vma_status`]
        required uint32 status = 7 [flags = "mmap.status"];
        /// Always -1.
        required sint64 fd = 8;
        /// Advice given: madvise(2), a bit `1 << MADV_*` for each. Absent if none.
        optional uint64 madv = 9 [hex];
        /// How the mapped file was opened: `O_RDONLY`, `O_WRONLY` or `O_RDWR`. Absent if there is no file.
        optional uint32 fdflags = 10 [hex];
    }

    /// An asynchronous I/O context: io_setup(2).
    message AioRingEntry "aio_ring_entry" {
        /// The address of the ring, which is also the context's id.
        required uint64 id = 1;
        /// What to pass to io_setup(2).
        required uint32 nr_req = 2;
        /// Size of the mapping in bytes.
        required uint32 ring_len = 3;
    }
}
