//! Action scripts: programs of the user that run at each stage of a dump or restore.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rewake_engine::{Action, Hooks, Pid};
use rustix::fs::{Mode, OFlags};

use crate::logging;

/// The scripts of `--action-script`.
#[derive(Debug)]
pub struct Scripts {
    scripts: Vec<PathBuf>,
    images_dir: PathBuf,
}

impl Scripts {
    /// Scripts in the order they were given.
    pub fn new(scripts: Vec<PathBuf>, images_dir: &Path) -> Self {
        Scripts { scripts, images_dir: images_dir.to_owned() }
    }

    /// Runs one script and waits for it.
    fn run_one(&self, script: &Path, action: Action, root: Option<Pid>) -> Result<(), String> {
        let fail = |text: String| format!("action script {} at {}: {text}", script.display(), action.name());
        // Opened anew each time: a dump may have put a finished directory in the place of the one it began with.
        let images = rustix::fs::open(
            &self.images_dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| fail(format!("cannot open {}: {e}", self.images_dir.display())))?;
        let output = || logging::script_output().map_err(|e| fail(format!("cannot share the log: {e}")));
        let mut command = Command::new(script);
        command
            .env("CRTOOLS_SCRIPT_ACTION", action.name())
            .env(
                "CRTOOLS_IMAGE_DIR",
                format!("/proc/{}/fd/{}", std::process::id(), images.as_raw_fd()),
            )
            .stdout(output()?)
            .stderr(output()?);
        match root {
            Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
            None => command.env_remove("CRTOOLS_INIT_PID"),
        };
        rewake_sys::probe::bare_descriptors(&mut command);
        log::debug!("running action script {} for {}", script.display(), action.name());
        let status = command.status().map_err(|e| fail(format!("cannot run it: {e}")))?;
        if status.success() { Ok(()) } else { Err(fail(status.to_string())) }
    }
}

impl Hooks for Scripts {
    fn run(&mut self, action: Action, root: Option<Pid>) -> Result<(), String> {
        // The last one added runs first.
        self.scripts.iter().rev().try_for_each(|script| self.run_one(script, action, root))
    }
}
