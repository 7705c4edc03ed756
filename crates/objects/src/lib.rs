//! One module a kind of kernel object: how it is surveyed and how it is restored, side by side.
//!
//! A survey yields the messages of the image format; a restore turns them into operations of a
//! [`Script`](rewake_inject::ring::Script) (what a task must do itself) or into descriptors (what the controller opens
//! once and hands over).
//!
//! To add a kind of descriptor: one module in [`files`] or [`sockets`], one line in its registry, one zoo program.
#![forbid(unsafe_code)]

pub mod files;
pub mod iterators;
pub mod memory;
pub mod pids;
pub mod problem;
pub mod sockets;
pub mod steps;
pub mod task;

pub use problem::{Obstacle, Passing, Problem};
