//! Which pages of a memory area are stored, and where: `pagemap-PID.img`, `pagemap-shmem-ID.img`.

use super::declare::messages;

/// Values of [`PagemapEntry::flags`].
pub mod pagemap_flags {
    /// The pages are in the parent checkpoint.
    pub const PARENT: u32 = 1;
    /// The pages may be filled in when first touched (userfaultfd(2)).
    pub const LAZY: u32 = 2;
    /// The pages are in the pages file.
    pub const PRESENT: u32 = 4;
}

messages! {
    /// The first message of a pagemap.
    message PagemapHead "pagemap_head" {
        /// `N` of the `pages-N.img` that holds the pages.
        required uint32 pages_id = 1;
    }

    /// A run of pages, as on disk; [`crate::pagemap`] has the checked form.
    message PagemapEntry "pagemap_entry" {
        /// Address of the first page; in a shared memory segment, its offset.
        required uint64 vaddr = 1 [hex];
        /// Old 32-bit count; written as 0 since CRIU 4.2.
        required uint32 compat_nr_pages = 2;
        /// Old form of the flag `PARENT`; not written.
        optional bool in_parent = 3;
        /// [`pagemap_flags`]; absent in old images, which mean `PRESENT`, or `PARENT` with `in_parent`.
        optional uint32 flags = 4 [flags = "pmap.flags"];
        /// Where absent, `compat_nr_pages` counts.
        optional uint64 nr_pages = 5;
        /// `N` of another `pages-N.img` than the head's, with `store_page`. Not CRIU's: see `img_version` 1000.
        optional uint32 store = 1000;
        /// Where in `store` the first page is, counted in pages.
        optional uint64 store_page = 1001;
    }
}
