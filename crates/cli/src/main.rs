//! The command `rewake`, and its personalities `criu` (the same commands) and `crit` (the image tool), chosen by the name
//! it is run as. Order of the start: options and configuration files, capabilities, directories, log, work.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod console;
mod demo;
mod hooks;
mod logging;
mod startup;
mod stats;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use args::resolve::{self, Job};
use args::table::Command;
use args::{ArgError, config, help, parse};

fn main() -> ExitCode {
    let mut argv = std::env::args_os();
    let name = argv.next().unwrap_or_default();
    let rest: Vec<OsString> = argv.collect();
    let base = Path::new(&name).file_name().unwrap_or_default();
    if base == "crit" {
        return rewake_crit::main(rest);
    }
    // `rewake crit …` hands everything on unread: the image tool has options of its own.
    if rest.first().is_some_and(|word| word == "crit") {
        return rewake_crit::main(rest.into_iter().skip(1));
    }
    // The program runs itself so, to hold on to what is tracked between two commands.
    if rest.first().is_some_and(|word| word == "keeper") {
        return rewake_engine::keeper();
    }
    // Likewise, to bring the memory of a lazy restore, and to see that whoever does so lives.
    if rest.first().is_some_and(|word| word == "pager") {
        return rewake_engine::pager(&rest[1..]);
    }
    if rest.first().is_some_and(|word| word == "guard") {
        return rewake_engine::guard();
    }
    let program = if base == OsStr::new("criu") { "criu" } else { "rewake" };
    console::set_program(program);
    run(program, rest).unwrap_or_else(|error| refuse(program, &error))
}

/// Says what is wrong with the arguments.
fn refuse(program: &str, error: &ArgError) -> ExitCode {
    console::error(&error.to_string());
    if error.kind.wants_usage() {
        console::stderr(&help::usage(program));
    }
    ExitCode::FAILURE
}

fn run(program: &str, argv: Vec<OsString>) -> Result<ExitCode, ArgError> {
    let words = parse::parse(argv)?;
    for given in &words.given {
        match given.opt.long {
            "help" => return Ok(console::stdout(&help::help(program))),
            "version" => return Ok(console::stdout(&help::version())),
            _ => {}
        }
    }
    let command = resolve::command(&words.operands, &words.given)?;
    match command {
        Command::NotBuilt(name) => {
            console::error(&format!("{name} is not supported yet"));
            return Ok(ExitCode::FAILURE);
        }
        Command::Removed(name) => {
            console::error(&format!("{name} is deprecated and was removed"));
            if name == "show" {
                console::hint("images are shown by 'crit show FILE'");
            }
            return Ok(ExitCode::from(255));
        }
        Command::Demo => return Ok(demo::run()),
        Command::Images => return commands::images::run(&words.operands[1..]),
        Command::Crit => return Ok(rewake_crit::main(words.operands.into_iter().skip(1))),
        _ => {}
    }

    let (given, skipped) = config::with_files(words.given, &config::Places::from_env())?;
    let (mut common, job) = resolve::job(command, &words.operands, &given)?;
    startup::close(&common.close)?;
    startup::environment(&mut common.notes, skipped)?;
    if let Job::Restore(job) = &job {
        startup::inherited(&job.options.inherited)?;
    }

    let place = match startup::start(&common) {
        Ok(place) => place,
        Err(failure) => {
            logging::failure(&failure);
            return Ok(ExitCode::FAILURE);
        }
    };
    let code = match job {
        Job::Dump(job) => commands::dump::run(*job, &place),
        Job::PreDump(job) => commands::pre_dump::run(*job, &place),
        Job::Dedup => commands::dedup::run(&place),
        Job::LazyPages(job) => commands::lazy_pages::run(job, &place),
        Job::Restore(job) => commands::restore::run(*job, &place),
        Job::Check(job) => commands::check::kernel(&job),
        Job::CheckTree(job) => commands::check::tree(*job, &place),
        Job::Resume(pid) => commands::resume::run(pid),
        Job::Unlock(locks) => commands::unlock::run(&locks),
    };
    logging::finish();
    Ok(code)
}
