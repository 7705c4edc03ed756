//! `demo`: checkpoint and restore of a small program, from start to end.

use std::process::ExitCode;

/// Runs the demonstration.
pub fn run() -> ExitCode {
    crate::console::error("demo: not built yet");
    ExitCode::FAILURE
}
