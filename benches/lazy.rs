//! A lazy restore (`restore --lazy-pages`) of a process of 1 GiB: when it runs, and when all its memory is there, beside an eager
//! restore of the same images.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cycle::{self, Scratch, Tool};
use crate::report::spread;
use crate::{case, machine, subject, tree};

/// When the process is to run, in milliseconds.
const RUNS: f64 = 20.0;
/// How much later than after an eager restore all memory may be there.
const LATER: f64 = 1.3;

/// Measures; the text tells whether the targets are met.
pub fn measure(tool: &Tool, base: &Path, runs: usize) -> Result<String, String> {
    let case = case::find("heap1g").ok_or("no such case")?;
    let scratch = Scratch::new(base)?;
    let dir = &scratch.0;
    let images = dir.join("images");
    let images = images.to_str().ok_or("the directory's name is not text")?;
    let (child, memory) = cycle::start(case, &dir.join("files"))?;
    let root = i32::try_from(child.id()).map_err(|e| e.to_string())?;
    drop(child);
    let dumped = tree::look(root, memory).and_then(|before| {
        tool.time(&["dump", "-t", &root.to_string(), "-D", images], dir)?;
        before.wait_gone()
    });
    if let Err(text) = dumped {
        tree::kill(&[root]);
        tree::reap();
        return Err(text);
    }
    let (mut eager, mut up, mut there) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..crate::WARM_UP + runs {
        let counted = |times: &mut Vec<Duration>, took| {
            if n >= crate::WARM_UP {
                times.push(took);
            }
        };
        machine::warm(2 << 30)?;
        let took = tool.time(&["restore", "-d", "-D", images], dir)?;
        counted(&mut eager, took);
        end(root)?;
        machine::warm(2 << 30)?;
        let started = Instant::now();
        let took = tool.time(&["restore", "-d", "--lazy-pages", "-D", images], dir)?;
        counted(&mut up, took);
        let took = all_there(root, started);
        end(root)?;
        counted(&mut there, took?);
    }
    let mut out = String::new();
    let verdict = |good: bool| if good { "pass" } else { "MISS" };
    let median = |times: &[Duration]| spread(times).1;
    let limit = median(&eager) * LATER;
    let lines = [
        ("lazy", "runs", &up, Some(RUNS)),
        ("", "all there", &there, Some(limit)),
        ("", "eager", &eager, None),
    ];
    for (name, what, times, target) in lines {
        let (min, median, max) = spread(times);
        let target_text = target.map_or_else(String::new, |t| format!("{t:.0}"));
        let times = format!("{min:.1} / {median:.1} / {max:.1}");
        let _ = write!(out, "{name:<10} {what:<10} {target_text:>5} {times:>27}");
        let judged = target.map(|t| format!("   {} {}", tool.name, verdict(median <= t)));
        let _ = writeln!(out, "{}", judged.unwrap_or_default());
    }
    Ok(out)
}

/// Waits until the process holds all of its memory; how long that took from `started`.
fn all_there(pid: i32, started: Instant) -> Result<Duration, String> {
    let path = format!("/proc/{pid}/statm");
    let wanted = subject::HEAP / 4096;
    while started.elapsed() < Duration::from_secs(60) {
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let resident = text.split(' ').nth(1).and_then(|n| n.parse::<usize>().ok());
        if resident.is_some_and(|pages| pages >= wanted) {
            return Ok(started.elapsed());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err("its memory does not come".to_owned())
}

/// Ends the process; its pid is free then.
fn end(pid: i32) -> Result<(), String> {
    tree::kill(&[pid]);
    let until = Instant::now() + Duration::from_secs(20);
    while Path::new(&format!("/proc/{pid}")).exists() {
        tree::reap();
        if Instant::now() > until {
            return Err(format!("{pid} does not end"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
