//! The engine: freeze, survey, plan, execute, roll back. It prints nothing; it returns reports and errors.
#![forbid(unsafe_code)]

mod dump;
mod error;
pub mod features;
mod freeze;
mod options;
mod report;
mod resume;

pub use dump::{check_tree, dump};
pub use error::Error;
pub use options::{
    Action, DumpOptions, FinalState, Hooks, NoHooks, Pid, RestoreOptions, TcpPolicy,
};
pub use report::{DumpReport, Obstacle, RestoreReport};
pub use resume::resume;

/// Brings a tree back from images. With neither `detached` nor `sibling` the caller waits for `report.root`.
///
/// # Errors
/// Anything that stops the restore; nothing is left behind then.
pub fn restore(_options: &RestoreOptions, _hooks: &mut dyn Hooks) -> Result<RestoreReport, Error> {
    unimplemented!()
}
