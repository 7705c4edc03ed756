//! `dedup`: free older images of what younger ones have.

use std::process::ExitCode;

use crate::console;
use crate::logging;
use crate::startup::Place;

/// Punches pages out of the parents; 0 or 1.
pub fn run(place: &Place) -> ExitCode {
    match rewake_engine::dedup(&place.images_dir) {
        Ok(freed) => console::stdout(&format!("{} KiB freed\n", freed / 1024)),
        Err(error) => {
            let what = format!("free the parents of {}", place.images_dir.display());
            logging::failure(&super::failed(&what, error));
            ExitCode::FAILURE
        }
    }
}
