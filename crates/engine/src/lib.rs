//! The engine: freeze, survey, plan, execute, roll back. It prints nothing; it returns reports and errors.
#![forbid(unsafe_code)]

pub mod features;
mod options;
mod report;

pub use options::{
    Action, DumpOptions, FinalState, Hooks, NoHooks, Pid, RestoreOptions, TcpPolicy,
};
pub use report::{DumpReport, Obstacle, RestoreReport};

/// Why an operation failed, with the way out.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What failed: process, object and reason.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
    /// Obstacles found by the survey, when the dump was refused because of them.
    pub obstacles: Vec<Obstacle>,
}

/// Saves the tree of `options.root` to images.
///
/// # Errors
/// Anything that stops the dump; the tree then runs on as before.
pub fn dump(_options: &DumpOptions, _hooks: &mut dyn Hooks) -> Result<DumpReport, Error> {
    unimplemented!()
}

/// Surveys the tree of `options.root` and returns what would stand in the way of a dump.
///
/// # Errors
/// The survey itself could not be made (no such process, no permission…).
pub fn check_tree(_options: &DumpOptions) -> Result<Vec<Obstacle>, Error> {
    unimplemented!()
}

/// Brings a tree back from images. With neither `detached` nor `sibling` the caller waits for `report.root`.
///
/// # Errors
/// Anything that stops the restore; nothing is left behind then.
pub fn restore(_options: &RestoreOptions, _hooks: &mut dyn Hooks) -> Result<RestoreReport, Error> {
    unimplemented!()
}

/// Lets a tree that a checkpoint left Stopped run on. Returns how many tasks were woken.
///
/// # Errors
/// No such process, or the tree is not stopped.
pub fn resume(_root: Pid) -> Result<usize, Error> {
    unimplemented!()
}
