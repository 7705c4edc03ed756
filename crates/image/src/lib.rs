//! wip
#![forbid(unsafe_code)]
pub mod descriptor;
pub mod messages;
