//! `pre-dump`: save memory while the tree runs.

use std::process::ExitCode;

use log::Level;

use crate::args::resolve::DumpJob;
use crate::logging;
use crate::startup::Place;
use crate::{console, stats};

/// Saves the memory of the tree; 0 or 1.
pub fn run(mut job: DumpJob, place: &Place) -> ExitCode {
    job.options.images_dir.clone_from(&place.images_dir);
    job.options.work_dir.clone_from(&place.work_dir);
    let report = match rewake_engine::pre_dump(&job.options) {
        Ok(report) => report,
        Err(error) => {
            let what = format!("pre-dump {}", super::process(job.options.root));
            logging::failure(&super::failed(&what, error));
            logging::milestone(Level::Error, "Pre-dumping FAILED.");
            return ExitCode::FAILURE;
        }
    };
    for warning in &report.warnings {
        log::warn!("{warning}");
    }
    if let Err(error) = stats::write_dump(&report, &place.work_dir) {
        log::warn!("cannot write stats-dump: {error}");
    }
    if job.display_stats {
        console::stdout(&stats::show_dump(&report));
    }
    log::info!(
        "{} tasks: {} pages saved, {} as they were",
        report.tasks,
        report.pages_written,
        report.pages_skipped_parent
    );
    logging::milestone(Level::Info, "Pre-dumping finished successfully");
    ExitCode::SUCCESS
}
