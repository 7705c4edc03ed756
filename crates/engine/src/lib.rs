//! The engine: freeze, survey, plan, execute, roll back. It prints nothing; it returns reports and errors.
#![forbid(unsafe_code)]

mod crew;
mod dump;
mod error;
pub mod features;
mod freeze;
mod options;
mod own;
mod report;
mod restore;
mod resume;
mod unlock;

pub use dump::{check_tree, dump};
pub use error::Error;
pub use options::{
    Action, DumpOptions, FinalState, Hooks, LockMethod, NoHooks, OutsideUnix, Pid, RestoreOptions,
    TcpPolicy,
};
pub use report::{DumpReport, Obstacle, RestoreReport};
pub use restore::restore;
pub use resume::resume;
pub use rewake_objects::sockets::host;
pub use unlock::{Locks, unlock};
