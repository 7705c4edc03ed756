//! Parsers of `/proc`: pure functions from bytes to values.
//!
//! Every parser takes the text of one file and returns what it says or a [`ParseError`] that names the file, the
//! field, the line and the offending text. None opens anything, so each is tested against texts of other kernels
//! and fed with arbitrary bytes. Reading is separate, in [`read`].
//!
//! Conventions:
//! - sizes and offsets are in bytes (the kernel's "kB" lines are multiplied out), times in the file's own unit;
//! - names and paths are bytes, never `str`: the kernel does not promise UTF-8;
//! - a field that a kernel ≥ 6.1, a kernel thread or a zombie may lack is an `Option`;
//! - a line or code that is not known is kept or skipped, never an error: kernels add them in every release.
#![forbid(unsafe_code)]

mod error;
mod scan;

pub mod auxv;
pub mod btf;
pub mod cgroup;
pub mod children;
pub mod fdinfo;
pub mod idmap;
pub mod limits;
pub mod link;
pub mod locks;
pub mod maps;
pub mod mountinfo;
pub mod net;
pub mod pagemap;
pub mod read;
pub mod single;
pub mod smaps;
pub mod stat;
pub mod status;
pub mod syscall;
pub mod sysvipc;
pub mod timens;
pub mod timers;
pub mod vmflags;

pub use error::{Fault, ParseError};
