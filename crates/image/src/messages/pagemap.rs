//! Which pages of a memory area are stored, and where: `pagemap-PID.img`, `pagemap-shmem-ID.img`.

use super::declare::messages;

messages! {
    /// The first message of a pagemap.
    message PagemapHead "pagemap_head" {
        /// N of pages-N.img that holds the data.
        required uint32 pages_id = 1;
    }

    /// A run of pages, as on disk; [`crate::pagemap`] has the checked form.
    message PagemapEntry "pagemap_entry" {
        /// Start address (shmem: offset from 0).
        required uint64 vaddr = 1 [hex];
        /// Old 32-bit count; written as 0 by 4.2.
        required uint32 compat_nr_pages = 2;
        /// Old form of flag PARENT (read only).
        optional bool in_parent = 3;
        /// PARENT1 LAZY2 PRESENT4; absent (old) = PRESENT, or PARENT if in_parent.
        optional uint32 flags = 4 [flags = "pmap.flags"];
        /// Count; if absent use compat_nr_pages.
        optional uint64 nr_pages = 5;
    }
}
