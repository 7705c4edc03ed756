//! Benchmarks of whole commands: `dump` and `restore` from start to exit, beside CRIU and beside what the machine can do.
//!
//! ```text
//! cargo build --release && cargo run --release -p rewake-benches -- [--criu PATH] [--runs N] [CASE…]
//! ```
//! Each run starts a fresh subject (this binary again, as `rewake-bench subject CASE`), dumps it, waits until every pid of
//! it is free, restores it detached, compares it with what it was, and ends it. The tools take turns within every run, so
//! that a noisy minute harms all of them alike. Two runs at the start are not counted: they warm the caches.
//! Needs root, as the commands do.
#![allow(unsafe_code, reason = "subjects fork and map memory; nothing here is shipped")]

mod case;
mod copies;
mod cycle;
mod lazy;
mod limit;
mod machine;
mod options;
mod pause;
mod report;
mod subject;
mod tree;
mod watchdog;

use std::process::ExitCode;

use case::Case;
use cycle::Tool;
use options::Options;
use report::Samples;

/// Runs that are made first and not counted.
const WARM_UP: usize = 2;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "subject") {
        let name = words.nth(1).unwrap_or_default();
        let dir = words.next().unwrap_or_default();
        return subject::run(&name, dir.as_ref());
    }
    match options::parse(words) {
        Ok(Some(options)) => bench(&options),
        Ok(None) => {
            print!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Err(text) => fail(&text),
    }
}

fn fail(text: &str) -> ExitCode {
    eprintln!("rewake-bench: {text}");
    ExitCode::FAILURE
}

/// All cases asked for; a case that fails is reported and the next one is tried.
fn bench(options: &Options) -> ExitCode {
    if let Err(text) = machine::prepare() {
        return fail(&text);
    }
    watchdog::start();
    let tools = tools(options);
    match report::header(options, &tools) {
        Ok(text) => print!("{text}"),
        Err(text) => return fail(&text),
    }
    let mut ok = true;
    for case in &options.cases {
        match run(case, &tools, options) {
            Ok(samples) => print!("{}", report::case(case, &tools, &samples)),
            Err(text) => {
                ok = false;
                println!("{:<10} FAILED: {text}", case.name);
                continue;
            }
        }
        if case.name == "heap1g" {
            match limit::measure(&options.dir, options.runs.min(5)) {
                Ok(limits) => print!("{}", report::limits(&limits)),
                Err(text) => {
                    ok = false;
                    println!("{:<10} FAILED: limit: {text}", case.name);
                }
            }
        }
    }
    if options.copies {
        // CRIU has nothing like it.
        match copies::measure(&tools[0], &options.dir, options.runs) {
            Ok(text) => print!("{text}"),
            Err(text) => {
                ok = false;
                println!("{:<10} FAILED: {text}", case::COPIES);
            }
        }
    }
    if options.pause {
        match pause::measure(&tools, options) {
            Ok(text) => print!("{text}"),
            Err(text) => {
                ok = false;
                println!("{:<10} FAILED: {text}", case::PAUSE);
            }
        }
    }
    if options.lazy {
        match lazy::measure(&tools[0], &options.dir, options.runs.min(5)) {
            Ok(text) => print!("{text}"),
            Err(text) => {
                ok = false;
                println!("{:<10} FAILED: {text}", case::LAZY);
            }
        }
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tools(options: &Options) -> Vec<Tool> {
    let mut tools = vec![Tool::new("rewake", &options.bin)];
    tools.extend(options.criu.as_ref().map(|path| Tool::new("criu", path)));
    tools
}

/// One case: the tools take turns, and every other run starts with the other one.
fn run(case: &Case, tools: &[Tool], options: &Options) -> Result<Vec<Samples>, String> {
    let mut samples = vec![Samples::default(); tools.len()];
    for n in 0..WARM_UP + options.runs {
        for turn in 0..tools.len() {
            let which = (turn + n) % tools.len();
            let tool = &tools[which];
            let plain = (case.name == "heap1g").then(|| limit::write_all(&options.dir)).transpose();
            let plain = plain.map_err(|text| format!("run {n}: {text}"))?;
            let times = cycle::run(case, tool, &options.dir)
                .map_err(|text| format!("run {n}, {}: {text}", tool.name))?;
            if n >= WARM_UP {
                samples[which].add(times);
                plain.into_iter().for_each(|time| samples[which].add_plain(time));
            }
        }
    }
    Ok(samples)
}
