//! `dump`: save a tree.

use std::process::ExitCode;

use log::Level;

use crate::args::resolve::DumpJob;
use crate::hooks::Scripts;
use crate::logging::{self, Failure};
use crate::startup::Place;
use crate::{console, stats};

/// Exit code after a post-dump script failed: the images are complete and the tree runs on.
const POST_DUMP_FAILED: u8 = 255;

/// Saves the tree; 0, 1 or 255.
pub fn run(mut job: DumpJob, place: &Place) -> ExitCode {
    job.options.images_dir.clone_from(&place.images_dir);
    job.options.work_dir.clone_from(&place.work_dir);
    let mut scripts = Scripts::new(job.scripts, &place.images_dir);
    let report = match rewake_engine::dump(&job.options, &mut scripts) {
        Ok(report) => report,
        Err(error) => {
            let what = format!("dump {}", super::process(job.options.root));
            logging::failure(&super::failed(&what, error));
            logging::milestone(Level::Error, "Dumping FAILED.");
            return ExitCode::FAILURE;
        }
    };
    for warning in &report.warnings {
        log::warn!("{warning}");
    }
    if let Some(text) = &report.post_dump_failed {
        logging::failure(&Failure::new(
            text.clone(),
            "the images are complete, and the tree runs on as before",
        ));
        logging::milestone(Level::Error, "Dumping FAILED.");
        return ExitCode::from(POST_DUMP_FAILED);
    }
    if let Err(error) = stats::write_dump(&report, &place.work_dir) {
        log::warn!("cannot write stats-dump: {error}");
    }
    if job.display_stats {
        console::stdout(&stats::show_dump(&report));
    }
    log::info!(
        "{} tasks, {} threads, {} pages saved",
        report.tasks,
        report.threads,
        report.pages_written
    );
    logging::milestone(Level::Info, "Dumping finished successfully");
    ExitCode::SUCCESS
}
