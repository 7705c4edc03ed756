//! The engine: freeze, survey, plan, execute, roll back. It prints nothing; it returns reports and errors.
#![forbid(unsafe_code)]

mod crew;
mod dedup;
mod dump;
mod error;
pub mod features;
mod freeze;
mod lazy;
mod options;
mod own;
mod peer;
mod report;
mod restore;
mod resume;
mod seize;
mod servant;
mod stopped;
mod track;
mod unlock;

pub use dedup::dedup;
pub use dump::{Checked, check_tree, dump, pre_dump};
pub use error::Error;
pub use lazy::guard::main as guard;
pub use lazy::{PagerOptions, PagerReport, lazy_pages, pager};
pub use options::{
    Action, Compression, DumpOptions, External, FinalState, Format, Hooks, Inherited, Label,
    LockMethod, NoHooks, OutsideUnix, Pid, PreDumpMode, RestoreOptions, Scan, TcpPolicy,
};
pub use report::{DumpReport, Obstacle, Passing, RestoreReport};
pub use restore::restore;
pub use resume::resume;
pub use rewake_objects::sockets::host;
pub use track::keeper::main as keeper;
pub use unlock::{Locks, unlock};
