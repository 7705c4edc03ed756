//! The agent: the only foreign code that ever runs inside a target.
//!
//! It executes system calls and decides nothing. [`layout`] describes the ring, the memory that the controller and
//! the agent share; [`arch`] holds the machine code, about a kilobyte that needs no stack, no FPU and no relocation.
//!
//! Two pieces of code exist:
//! * the **executor** ([`arch::executor`]), which takes batches of operations from a ring and reports;
//! * the **bootstrap** ([`arch::Bootstrap`]), which is written into a live process to be dumped: it maps a ring, enters
//!   the executor, and, when the controller is gone or done, puts the process back exactly as it was.
#![no_std]
#![allow(unsafe_code, reason = "machine code is exported through linker symbols")]

pub mod arch;
pub mod layout;
