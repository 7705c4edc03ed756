//! `unlock`: remove network locks.

use std::process::ExitCode;

use rewake_engine::Locks;

use crate::{console, logging};

/// Removes the locks and says which, and which are kept and why; 0 or 1.
pub fn run(locks: &Locks) -> ExitCode {
    match rewake_engine::unlock(locks) {
        Ok(found) => {
            let mut text = String::new();
            for lock in &found.removed {
                log::info!("removed: {lock}");
                text.push_str(&format!("removed: {}\n", console::printable(lock)));
            }
            for lock in &found.kept {
                log::info!("kept: {lock}");
                text.push_str(&format!("kept: {}\n", console::printable(lock)));
            }
            if text.is_empty() {
                text.push_str("there is no network lock\n");
            }
            console::stdout(&text)
        }
        Err(error) => {
            logging::failure(&super::failed("remove network locks", error));
            ExitCode::FAILURE
        }
    }
}
