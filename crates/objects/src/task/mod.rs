//! Tasks: what a process and its threads are made of, apart from memory and descriptors.

pub mod attributes;
pub mod credentials;
pub mod keyrings;
pub mod label;
pub mod landlock;
pub mod limits;
pub mod registers;
pub mod schedule;
pub mod seccomp;
pub mod sharing;
pub mod signals;
pub mod timers;
