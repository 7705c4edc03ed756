//! End-to-end tests: the built `rewake` binary over the programs of tests/zoo.
//!
//! ```text
//! cargo test -p zoo --test e2e                        everything
//! cargo test -p zoo --test e2e -- counter             trials whose name contains "counter"
//! cargo test -p zoo --test e2e -- counter::dead       one flavour of one program: plain (no checkpoint), dead, running,
//!                                                     running_restored, stopped, stopped_restored, as_criu, new_pidns
//! cargo test -p zoo --test e2e -- plain               the programs alone: no binary under test needed, it must pass
//! cargo test -p zoo --test e2e -- refusals            also: commands, files, kill, steps, real, shell_job, tcp, copies,
//!                                                     chains, predumps, live, address_spaces_by_chance, hostile
//! cargo test -p zoo --test e2e -- --list
//! ```
//! Environment:
//! - `REWAKE_BIN=path`: the binary under test; without it `rewake` beside the zoo programs (target/<profile>/rewake:
//!   build it first, `cargo build`). If the path leads to a file named `criu`, CRIU itself is tested: that is how
//!   harness and programs are validated, and what CRIU is known not to manage is ignored with the reason.
//! - `CRIU=path`: also runs the trials `*::to_criu` (rewake dumps, CRIU restores) and `*::from_criu`.
//! - `ZOO_NO_EXCUSES=1`: runs also what CRIU is known not to manage (to see that it still fails, and how).
//! - `ZOO_KEEP=1`: keeps the directories of runs ($TMPDIR or /tmp, and /dev/shm: rewake-e2e-*).
//! - `ZOO_TABLE=n`: every program's table of descriptors has room for so many; dumps look at those with 512 another way.
//! - `ZOO_THREADS=n`: every program has so many further threads, which do nothing; dumps look at 100 and more another way.
//! - `ZOO_KILLS=n`: how many times the `kill` trials kill the dumping command (default 200).
//! - `ZOO_STEPS=n`: the `steps` trials stop the command at every n-th of its system calls only (default: at every one).
//! - `TMPDIR`: where the run directories on disk go.
//!
//! A trial that needs what the machine lacks is ignored at run time and says so: `SKIP: why`, counted at the end.
//! Programs and protocol: tests/zoo/src/lib.rs. Table of programs: programs.rs. To see what a program does by hand:
//! `mkdir /tmp/d; setsid target/debug/counter /tmp/d </dev/null >/tmp/d/log 2>&1 &`, dump and restore the pid in
//! /tmp/d/ready, then `touch /tmp/d/check` and read /tmp/d/result.
#![allow(
    unsafe_code,
    reason = "a harness for processes: kill, kcmp, prctl; nothing here is shipped"
)]

mod address_spaces;
mod chains;
mod commands;
mod compressed;
mod copies;
mod cross;
mod dedup;
mod files;
mod flavours;
mod harness;
mod hostile;
mod hosts;
mod kills;
mod lazy;
mod live;
mod netns;
mod outside;
mod pools;
mod ports;
mod predumps;
mod predumps_shared;
mod probes;
mod programs;
mod real;
mod real_files;
mod reaper;
mod refusals;
mod scarce;
mod servers;
mod shell_job;
mod sockets;
mod steps;
mod strangers;
mod tcp;
mod terminals;
mod tracer;
mod unix;
mod uprobes;
mod vdso;
mod view;

use flavours::Flavour;
use harness::Tool;
use libtest_mimic::{Arguments, Completion, Trial};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, RwLock};

/// Held for reading by ordinary trials and for writing by those that must be alone on the machine.
static ALONE: RwLock<()> = RwLock::new(());

/// Reasons of the trials skipped while running.
static SKIPS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes a skip and makes the trial's completion of it.
pub fn skip(why: impl Into<String>) -> Completion {
    let why = why.into();
    SKIPS.lock().unwrap_or_else(|e| e.into_inner()).push(why.clone());
    Completion::ignored_with(format!("SKIP: {why}"))
}

/// A trial that may run beside others.
pub fn trial(name: String, body: impl FnOnce() -> flavours::Outcome + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        let _beside = ALONE.read().unwrap_or_else(|e| e.into_inner());
        body()
    })
}

/// A trial during which nothing else runs.
pub fn trial_alone(
    name: String,
    body: impl FnOnce() -> flavours::Outcome + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let _alone = ALONE.write().unwrap_or_else(|e| e.into_inner());
        body()
    })
}

/// Whether trials that CRIU cannot pass are run with it all the same.
pub fn no_excuses() -> bool {
    std::env::var_os("ZOO_NO_EXCUSES").is_some()
}

fn under_test() -> Tool {
    let path = std::env::var_os("REWAKE_BIN").map(PathBuf::from).unwrap_or_else(|| {
        // The zoo programs lie in target/<profile>.
        Path::new(env!("CARGO_BIN_EXE_counter")).parent().unwrap_or(Path::new(".")).join("rewake")
    });
    Tool::new(path)
}

fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for program in programs::all() {
        for &(flavour, word) in Flavour::ALL {
            let (p, t) = (program.clone(), tool.clone());
            let reason = if tool.is_criu { program.criu_reason(word) } else { None };
            let reason = reason.or(program.reason(word));
            trials.push(trial(format!("{}::{word}", program.name), move || match reason {
                Some(why) => Ok(skip(why.to_owned())),
                None => flavours::run(&p, &t, flavour),
            }));
        }
        let Some(criu) = criu else { continue };
        for (word, from, to) in [("to_criu", tool, criu), ("from_criu", criu, tool)] {
            let (p, from, to) = (program.clone(), from.clone(), to.clone());
            // What keeps CRIU from a dump does not keep it from a restore.
            let dump = program.criu_reason("from_criu");
            let dead =
                program.criu_reason("dead").filter(|_| word == "from_criu" || dump.is_none());
            let reason = program.criu_reason(word).or(dead);
            trials.push(trial(format!("{}::{word}", program.name), move || match reason {
                Some(why) => Ok(skip(format!("CRIU cannot: {why}"))),
                None => cross::run(&p, &from, &to),
            }));
        }
    }
    trials.extend(refusals::trials(tool));
    trials.extend(address_spaces::trials(tool));
    trials.extend(hostile::trials(tool));
    trials.extend(files::trials(tool));
    trials.extend(commands::trials(tool));
    trials.extend(kills::trials(tool));
    trials.extend(steps::trials(tool));
    trials.extend(real::trials(tool));
    trials.extend(servers::trials(tool));
    trials.extend(shell_job::trials(tool));
    trials.extend(terminals::trials(tool));
    trials.extend(tcp::trials(tool));
    trials.extend(sockets::trials(tool));
    trials.extend(unix::trials(tool));
    trials.extend(uprobes::trials(tool));
    trials.extend(outside::trials(tool));
    trials.extend(vdso::trials(tool));
    trials.extend(copies::trials(tool));
    trials.extend(chains::trials(tool, criu));
    trials.extend(predumps::trials(tool, criu));
    trials.extend(predumps_shared::trials(tool, criu));
    trials.extend(live::trials(tool));
    trials.extend(lazy::trials(tool, criu));
    trials.extend(strangers::trials(tool));
    trials.extend(compressed::trials(tool, criu));
    trials.extend(dedup::trials(tool, criu));
    trials.extend(scarce::trials(tool));
    trials
}

fn main() {
    let given: Vec<_> = std::env::args_os().skip(1).collect();
    if given.first().is_some_and(|first| first == tracer::ROLE) {
        std::process::exit(tracer::main(&given[1..]));
    }
    let mut args = Arguments::from_args();
    // Two at a time: the machines this runs on are small, and timing is part of what is checked.
    args.test_threads.get_or_insert(2);
    let tool = under_test();
    let criu = std::env::var_os("CRIU").map(|p| Tool { path: p.into(), is_criu: true });
    if !args.list {
        for path in std::iter::once(&tool.path).chain(criu.as_ref().map(|c| &c.path)) {
            if !path.is_file() {
                eprintln!(
                    "{}: no such binary; build it (cargo build) or set REWAKE_BIN",
                    path.display()
                );
                std::process::exit(1);
            }
        }
        println!("testing {}", tool.path.display());
        if let Err(e) = reaper::start() {
            eprintln!("cannot run: {e}");
            std::process::exit(1);
        }
    }
    let conclusion = libtest_mimic::run(&args, trials(&tool, criu.as_ref()));
    if !args.list {
        harness::sweep();
        summary();
    }
    conclusion.exit();
}

/// The skips by reason, with their number.
fn summary() {
    let skips = SKIPS.lock().unwrap_or_else(|e| e.into_inner());
    let mut by_reason = std::collections::BTreeMap::<&str, usize>::new();
    for why in skips.iter() {
        *by_reason.entry(why).or_default() += 1;
    }
    println!("{} skipped", skips.len());
    for (why, n) in by_reason {
        println!("  {n} x SKIP: {why}");
    }
}
