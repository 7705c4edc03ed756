//! wip
#![forbid(unsafe_code)]
pub mod python_json;
pub mod text;
