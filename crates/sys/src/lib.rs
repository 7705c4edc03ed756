//! Safe wrappers of the system calls that rustix lacks: one module a group of calls, thin, typed, with owned
//! descriptors. Every raw call goes through [`call::syscall`].
#![allow(unsafe_code, reason = "this crate is the fence around raw system calls")]

pub mod bpf;
pub mod call;
pub mod cpu;
pub mod descriptors;
pub mod file;
pub mod futex;
pub mod io_uring;
pub mod kcmp;
pub mod mapped;
pub mod memory;
pub mod message;
pub mod notify;
pub mod pagemap;
pub mod probe;
pub mod ptrace;
pub mod sched;
pub mod shm;
pub mod signal;
pub mod sockets;
pub mod task;
pub mod tcp;
pub mod tty;
pub mod userfaultfd;
pub mod wait;

pub use call::{Errno, SyscallError};
