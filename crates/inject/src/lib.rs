//! Puts an agent into a process, runs batches of system calls there, takes it out without a trace.
//!
//! * [`tracee`]: ptrace stops as types.
//! * [`map`]: memory shared with an agent.
//! * [`ring`]: scripts of operations and how an agent executes them.
//! * [`live`]: an agent in a live process (dump); [`visit`]: its other threads are asked.
//! * `bring`: descriptors that only the process itself can make.
//! * [`tell`]: how foreign code reports with one stop; [`interrupted`]: where a stopped thread goes on.
//! * [`guard`]: makes the end or the release of many processes one step.
//! * [`witness`]: whom a task may look at unless a security module forbids it.
//! * [`stub`]: agents in empty processes that become restored ones (restore).
#![allow(unsafe_code, reason = "shared memory and raw clone; each block says why it is sound")]

mod bring;
pub mod enter;
pub mod guard;
pub mod interrupted;
pub mod live;
pub mod map;
pub mod ring;
pub mod stub;
pub mod tell;
pub mod tracee;
pub mod visit;
pub mod witness;

mod error;
pub use error::Error;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;
