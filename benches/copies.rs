//! Many copies of one tree (`restore --copies N`): what each after the first takes, and what they hold together.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::case::{self, Case};
use crate::cycle::{self, Scratch, Tool};
use crate::report::spread;
use crate::{machine, subject, tree};

/// How many copies are made.
const COPIES: usize = 20;
/// What each further copy of a small server may take, in milliseconds.
const TARGET: f64 = 5.0;
/// What each further copy may hold of its own, beside what it writes: page tables are not counted, its stack is.
const OWN: u64 = 1 << 20;

/// A subject whose copies are made.
struct Kind {
    what: &'static str,
    case: &'static str,
    /// What each copy writes when it is told to.
    writes: u64,
    warm_gib: usize,
}

const KINDS: &[Kind] = &[
    Kind { what: "one sleeping process", case: "tiny", writes: 0, warm_gib: 0 },
    Kind {
        what: "one of 1 GiB, of which each copy writes 16 MiB",
        case: "heap1g",
        writes: subject::WRITTEN as u64,
        warm_gib: 4,
    },
];

/// Measures all kinds; the text tells whether the targets are met.
pub fn measure(tool: &Tool, base: &Path, runs: usize) -> Result<String, String> {
    let mut out = String::new();
    for (n, kind) in KINDS.iter().enumerate() {
        let case = case::find(kind.case).ok_or("no such case")?;
        let name = if n == 0 { "copies" } else { "" };
        // A gibibyte is read anew for each restore.
        let runs = if kind.warm_gib == 0 { runs } else { runs.min(5) };
        let figures = of_kind(kind, case, tool, base, runs)?;
        let (min, median, max) = spread(&figures.each);
        let verdict = |good: bool| if good { "pass" } else { "MISS" };
        let target = if kind.writes == 0 { format!("{TARGET:.0}") } else { String::new() };
        let times = format!("{min:.2} / {median:.2} / {max:.2}");
        let _ = write!(out, "{name:<10} {:<8} {target:>7} {times:>27}", "each");
        if kind.writes == 0 {
            let _ = write!(out, "   {} {}", tool.name, verdict(median <= TARGET));
        }
        let _ = writeln!(out, "\n{:<10} (each copy after the first; {})", "", kind.what);
        let held = [("at rest", figures.rest, 0), ("written", figures.written, kind.writes)];
        for (when, together, written) in held.into_iter().take(1 + usize::from(kind.writes != 0)) {
            let limit = figures.one + COPIES as u64 * (OWN + written);
            let _ = writeln!(
                out,
                "{:<10} {COPIES} copies {when}: {} kB together, one {} kB, limit {} kB   {} {}",
                "",
                together >> 10,
                figures.one >> 10,
                limit >> 10,
                tool.name,
                verdict(together <= limit)
            );
        }
    }
    Ok(out)
}

/// What was measured.
struct Figures {
    /// What each copy after the first took.
    each: Vec<Duration>,
    /// What one alone holds, in bytes.
    one: u64,
    /// What all hold together before any has written.
    rest: u64,
    /// And afterwards.
    written: u64,
}

fn of_kind(
    kind: &Kind,
    case: &Case,
    tool: &Tool,
    base: &Path,
    runs: usize,
) -> Result<Figures, String> {
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
    let restore = |count: usize| -> Result<(Duration, Vec<i32>), String> {
        machine::warm(kind.warm_gib << 30)?;
        let count = count.to_string();
        let took = tool.time(&["restore", "-d", "-D", images, "--copies", &count], dir)?;
        let text = fs::read_to_string(dir.join("output")).map_err(|e| format!("output: {e}"))?;
        Ok((took, text.lines().filter_map(|line| line.parse().ok()).collect()))
    };
    let mut figures = Figures { each: Vec::new(), one: 0, rest: 0, written: 0 };
    for n in 0..crate::WARM_UP + runs {
        let (alone, pids) = restore(1)?;
        let one = memory_of(&pids);
        end(&pids)?;
        let (all, pids) = restore(COPIES)?;
        if pids.len() != COPIES {
            end(&pids)?;
            return Err(format!("{} copies instead of {COPIES}", pids.len()));
        }
        let rest = memory_of(&pids);
        let written = if kind.writes == 0 { rest } else { write_all(&pids, rest) };
        end(&pids)?;
        if n >= crate::WARM_UP {
            figures.each.push(all.saturating_sub(alone) / (COPIES - 1) as u32);
            figures.one = figures.one.max(one);
            figures.rest = figures.rest.max(rest);
            figures.written = figures.written.max(written);
        }
    }
    Ok(figures)
}

/// Has all copies write, and waits until they have: what they hold together then.
fn write_all(pids: &[i32], rest: u64) -> u64 {
    for pid in pids {
        // SAFETY: kill takes numbers; these processes were restored for us and handle the signal.
        unsafe { libc::kill(*pid, libc::SIGUSR1) };
    }
    let until = Instant::now() + Duration::from_secs(10);
    let wanted = rest + (pids.len() * subject::WRITTEN) as u64;
    loop {
        let now = memory_of(pids);
        // Not yet, or it is not copy-on-write at all: then the limit tells.
        if now >= wanted || Instant::now() > until {
            return now;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What the processes hold together, in bytes; what they share is counted once (`Pss`).
fn memory_of(pids: &[i32]) -> u64 {
    let of = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    pids.iter().filter_map(of).sum::<u64>() << 10
}

/// Ends copies: with its root each namespace ends.
fn end(pids: &[i32]) -> Result<(), String> {
    tree::kill(pids);
    let until = Instant::now() + Duration::from_secs(20);
    while pids.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
        tree::reap();
        if Instant::now() > until {
            return Err("copies do not end".to_owned());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    tree::reap();
    Ok(())
}
