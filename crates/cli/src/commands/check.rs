//! `check`: what this kernel can do, and what stands in the way of a dump of a tree.

use std::fmt::Write as _;
use std::process::ExitCode;

use rewake_engine::Checked;
use rewake_engine::features::{self, Category, Feature, Verdict};

use crate::args::resolve::{CheckJob, DumpJob};
use crate::startup::Place;
use crate::{console, logging};

/// `check -t PID`: every obstacle on a line of its own; 0 if there is none.
pub fn tree(mut job: DumpJob, place: &Place) -> ExitCode {
    job.options.images_dir.clone_from(&place.images_dir);
    job.options.work_dir.clone_from(&place.work_dir);
    let name = super::process(job.options.root);
    let Checked { obstacles, warnings } = match rewake_engine::check_tree(&job.options) {
        Ok(checked) => checked,
        Err(error) => {
            logging::failure(&super::failed(&format!("check {name}"), error));
            return ExitCode::FAILURE;
        }
    };
    for warning in &warnings {
        log::warn!("{warning}");
    }
    if obstacles.is_empty() {
        return console::stdout(&format!("{}: can be checkpointed\n", console::printable(&name)));
    }
    let mut out = String::new();
    for obstacle in &obstacles {
        let _ = writeln!(out, "{}", console::printable(&obstacle.to_string()));
    }
    console::stdout(&out);
    ExitCode::FAILURE
}

/// `check` and `check --feature NAME`.
pub fn kernel(job: &CheckJob) -> ExitCode {
    if job.features.is_empty() { categories(job) } else { named(&job.features) }
}

/// Each named feature: `NAME is supported`, or why not.
fn named(names: &[String]) -> ExitCode {
    let mut all = ExitCode::SUCCESS;
    for name in names {
        let Some(feature) = features::find(name) else {
            console::error(&format!("unknown feature '{name}'"));
            let known: Vec<&str> = features::FEATURES.iter().map(|feature| feature.name).collect();
            console::hint(&format!("the features are: {}", known.join(" ")));
            all = ExitCode::FAILURE;
            continue;
        };
        let text = match probe(feature) {
            Verdict::Present => format!("{name} is supported\n"),
            Verdict::Missing(why) => {
                all = ExitCode::FAILURE;
                format!("{name} is not supported: {}\n", console::printable(&why))
            }
        };
        if console::stdout(&text) != ExitCode::SUCCESS {
            all = ExitCode::FAILURE;
        }
    }
    all
}

/// All features of the categories asked for, and a verdict.
fn categories(job: &CheckJob) -> ExitCode {
    let asked = |category: Category| match category {
        Category::Needed => true,
        Category::Extra => job.extra,
        Category::Experimental => job.experimental,
    };
    let mut out = String::new();
    let (mut fatal, mut partial) = (false, false);
    for feature in features::FEATURES.iter().filter(|feature| asked(feature.category)) {
        if let Verdict::Missing(why) = probe(feature) {
            let _ = writeln!(
                out,
                "{} is missing ({}): {}",
                feature.name,
                feature.purpose,
                console::printable(&why)
            );
            match feature.category {
                Category::Needed => fatal = true,
                _ => partial = true,
            }
        }
    }
    out.push_str(match (fatal, partial) {
        (true, _) => "Does not look good.\n",
        (false, true) => {
            "Looks good but some kernel features are missing\n\
             which, depending on your process tree, may cause\n\
             dump or restore failure.\n"
        }
        (false, false) => "Looks good.\n",
    });
    let written = console::stdout(&out);
    if fatal || partial { ExitCode::FAILURE } else { written }
}

/// Tries one feature and leaves a line in the log.
fn probe(feature: &Feature) -> Verdict {
    let verdict = feature.probe();
    match &verdict {
        Verdict::Present => log::debug!("feature {}: present", feature.name),
        Verdict::Missing(why) => log::info!("feature {}: missing: {why}", feature.name),
    }
    verdict
}
