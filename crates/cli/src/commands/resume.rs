//! `resume`: let a tree that a checkpoint left stopped run on.

use std::process::ExitCode;

use rewake_engine::Pid;

use crate::{console, logging};

/// Wakes every task of the tree that the checkpoint stopped; 0 or 1.
pub fn run(root: Pid) -> ExitCode {
    let name = super::process(root);
    match rewake_engine::resume(root) {
        Ok(tasks) => {
            let plural = if tasks == 1 { "task" } else { "tasks" };
            log::info!("{name}: {tasks} {plural} resumed");
            console::stdout(&format!("{}: {tasks} {plural} resumed\n", console::printable(&name)))
        }
        Err(error) => {
            logging::failure(&super::failed(&format!("resume {name}"), error));
            ExitCode::FAILURE
        }
    }
}
