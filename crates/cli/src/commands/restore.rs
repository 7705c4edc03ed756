//! `restore`: bring a tree back, and wait for it unless told otherwise.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use log::Level;
use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};

use crate::args::resolve::RestoreJob;
use crate::hooks::Scripts;
use crate::logging::{self, Failure};
use crate::startup::Place;
use crate::{console, stats};

/// Restores the tree; 0 or 1. The exit status of the restored root is not passed on.
pub fn run(mut job: RestoreJob, place: &Place) -> ExitCode {
    job.options.images_dir.clone_from(&place.images_dir);
    job.options.work_dir.clone_from(&place.work_dir);
    if let Some(pidfile) = &mut job.options.pidfile {
        *pidfile = place.work_dir.join(&*pidfile);
        // The engine creates it with O_EXCL; said before any work is done it costs nothing.
        if pidfile.symlink_metadata().is_ok() {
            let text = format!("cannot restore: the pidfile {} exists already", pidfile.display());
            logging::failure(&Failure::new(text, "remove it, or name another one with --pidfile"));
            logging::milestone(Level::Error, "Restoring FAILED.");
            return ExitCode::FAILURE;
        }
    }
    let mut scripts = Scripts::new(job.scripts, &place.images_dir);
    let report = match rewake_engine::restore(&job.options, &mut scripts) {
        Ok(report) => report,
        Err(error) => {
            logging::failure(&super::failed("restore", error));
            logging::milestone(Level::Error, "Restoring FAILED.");
            return ExitCode::FAILURE;
        }
    };
    for warning in &report.warnings {
        log::warn!("{warning}");
    }
    if let Err(error) = stats::write_restore(&report, &place.work_dir) {
        log::warn!("cannot write stats-restore: {error}");
    }
    if job.options.copies.is_some() {
        let roots: String = report.roots.iter().map(|root| format!("{root}\n")).collect();
        console::stdout(&roots);
    }
    if job.display_stats {
        console::stdout(&stats::show_restore(&report));
    }
    log::info!(
        "{} tasks, {} threads, {} pages restored",
        report.tasks,
        report.threads,
        report.pages_restored
    );
    logging::milestone(Level::Info, "Restore finished successfully. Tasks resumed.");
    if let Some(command) = &job.command {
        return become_command(command);
    }
    if !job.options.detached {
        wait_for_children();
    }
    ExitCode::SUCCESS
}

/// Becomes the command of `--exec-cmd`, whose children the restored processes then are. Returns only if it cannot.
fn become_command(command: &[OsString]) -> ExitCode {
    let Some((program, arguments)) = command.split_first() else { return ExitCode::SUCCESS };
    logging::finish();
    let error = Command::new(program).args(arguments).exec();
    let text = format!("the tree is restored, but {} cannot be run: {error}", program.display());
    logging::failure(&Failure::new(text, "the restored processes run on without a parent"));
    ExitCode::FAILURE
}

/// Waits until no child is left (`wait4(2)` says `ECHILD`).
fn wait_for_children() {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
