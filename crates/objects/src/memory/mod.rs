//! Memory: mappings, their contents, and what of them tasks share.
//!
//! * [`vma`]: mappings, from `/proc/PID/smaps` to image entries and back to mmap(2).
//! * [`pages`]: which private pages hold data, and copying them out.
//! * [`tracking`]: which of them were written since an earlier look.
//! * [`lazy`]: memory that comes when it is touched.
//! * [`shield`]: private memory as it was at one instant, while the process runs on; [`early`]: what of it is copied before; [`copies`]: what is
//!   kept of it.
//! * [`aio`]: contexts of asynchronous I/O, whose rings are mapped.
//! * [`shared`]: shared anonymous memory and memfds.
//! * [`twin`]: copies of shared memory, made while its users run.
//! * [`sysv`]: System V shared memory segments.
//! * [`future`]: what is done with mappings that are yet to come (mlockall(2), merging of pages).
//! * [`hugetlb`]: huge pages that a program asks for by size.
//! * [`contents`]: what is in both of them, as a dump writes it; [`segments`]: the same of tasks that run.
//! * [`mm`]: the address space as a whole: layout (`PR_SET_MM_MAP`), vdso, and the order in which it is rebuilt.
//! * [`together`]: neighbouring mappings made as one; [`fill`]: their pages ([`huge`] ones where they are dense); [`inherit`]: those that a task has from the one that cloned it.
//! * [`vdso`]: the dumped vdso under another kernel.

pub mod aio;
pub mod contents;
pub mod copies;
pub mod early;
pub mod fill;
pub mod future;
pub mod huge;
pub mod hugetlb;
pub mod inherit;
pub mod lazy;
pub mod mm;
pub mod numa;
pub mod pages;
pub mod segments;
pub mod shared;
pub mod shield;
pub mod sysv;
pub mod together;
pub mod tracking;
pub mod twin;
pub mod uprobes;
pub mod vdso;
pub mod vma;

/// Page size of x86-64.
pub const PAGE: u64 = 4096;
/// End of user space with four-level page tables; nothing above is scanned unless a mapping lies there.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;
