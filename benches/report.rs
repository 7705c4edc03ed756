//! Figures as text.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use crate::case::{self, Case};
use crate::cycle::{HEAP, Memory, Scratch, Times, Tool};
use crate::limit::Limits;
use crate::machine;
use crate::options::Options;

/// One of a tool's columns of times.
type Column = fn(&Samples) -> &[Duration];

/// The times of all runs of a tool.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    dump: Vec<Duration>,
    frozen: Vec<Duration>,
    restore: Vec<Duration>,
    memory: Vec<Memory>,
    /// write(2) of as many bytes, by a thread a processor, in the same minute.
    plain: Vec<Duration>,
}

impl Samples {
    /// Adds a run.
    pub fn add(&mut self, times: Times) {
        self.dump.push(times.dump);
        self.frozen.push(times.frozen);
        self.restore.push(times.restore);
        self.memory.extend(times.memory);
    }

    /// Adds how long the machine takes for the bytes alone.
    pub fn add_plain(&mut self, time: Duration) {
        self.plain.push(time);
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Fastest, median and slowest, in milliseconds.
pub fn spread(times: &[Duration]) -> (f64, f64, f64) {
    let mut times: Vec<f64> = times.iter().map(|t| ms(*t)).collect();
    times.sort_unstable_by(f64::total_cmp);
    let (Some(first), Some(last)) = (times.first(), times.last()) else { return (0.0, 0.0, 0.0) };
    let half = times.len() / 2;
    let median =
        if times.len() % 2 == 1 { times[half] } else { (times[half - 1] + times[half]) / 2.0 };
    (*first, median, *last)
}

/// Machine, tools, and the head of the table.
pub fn header(options: &Options, tools: &[Tool]) -> Result<String, String> {
    let scratch = Scratch::new(&options.dir)?;
    let mut out = format!("{}\n", machine::describe());
    for tool in tools {
        let age = std::fs::metadata(&tool.path).and_then(|m| m.modified()).ok();
        let age = age
            .and_then(|t| SystemTime::now().duration_since(t).ok())
            .map_or(0, |d| d.as_secs() / 60);
        let floor: Vec<Duration> =
            (0..20).filter_map(|_| tool.time(&["--version"], &scratch.0).ok()).collect();
        let _ = writeln!(
            out,
            "{}: {} (built {age} min ago{}); `--version` alone takes {:.2} ms",
            tool.name,
            tool.path.display(),
            if tool.is_script() { ", a script: its interpreter is in every figure" } else { "" },
            spread(&floor).1,
        );
    }
    let _ = writeln!(
        out,
        "{} runs each, in turns, images in {}; milliseconds: fastest / median / slowest; the target is for the median\n",
        options.runs,
        options.dir.display()
    );
    let _ = write!(out, "{:<10} {:<8} {:>7}", "case", "", "target");
    for tool in tools {
        let _ = write!(out, " {:>27}", tool.name);
    }
    let _ = writeln!(out, "{}", if tools.len() > 1 { "   times faster" } else { "" });
    Ok(out)
}

/// The lines of a case.
pub fn case(case: &Case, tools: &[Tool], samples: &[Samples]) -> String {
    let mut out = String::new();
    let rows: [(&str, Option<f64>, Column); 3] = [
        ("dump", case.dump_target, |s| &s.dump),
        ("frozen", None, |s| &s.frozen),
        ("restore", case.restore_target, |s| &s.restore),
    ];
    for (row, target, of) in rows {
        let name = if row == "dump" { case.name } else { "" };
        let target_text = target.map_or(String::new(), |t| format!("{t:.0}"));
        let _ = write!(out, "{name:<10} {row:<8} {target_text:>7}");
        let spreads: Vec<_> = samples.iter().map(|s| spread(of(s))).collect();
        for (min, median, max) in &spreads {
            let _ = write!(out, " {:>27}", format!("{min:.2} / {median:.2} / {max:.2}"));
        }
        if let [(_, ours, _), (_, theirs, _)] = spreads[..] {
            let _ = write!(out, " {:>14.1}", theirs / ours);
        }
        if let (Some(target), Some((_, median, _))) = (target, spreads.first()) {
            let verdict = if *median <= target { "pass" } else { "MISS" };
            let _ = write!(out, "   {} {verdict}", tools[0].name);
        }
        out.push('\n');
    }
    if let ("heap1g", Some((_, dump, _))) = (case.name, samples.first().map(|s| spread(&s.dump))) {
        let restore = spread(&samples[0].restore).1;
        let _ = writeln!(
            out,
            "{:<10} {} at {:.2} GB/s (dump) and {:.2} GB/s (restore)",
            "",
            tools[0].name,
            rate(dump),
            rate(restore)
        );
    }
    if let Some(targets) = &case.memory {
        for (tool, samples) in tools.iter().zip(samples) {
            out += &memory(targets, tool, samples);
        }
    }
    let _ = writeln!(out, "{:<10} ({})", "", case.what);
    out
}

/// What images and memory take, and which share of the machine's speed a tool has.
fn memory(targets: &case::Memory, tool: &Tool, samples: &Samples) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let median = |of: fn(&Memory) -> u64| {
        let mut all: Vec<u64> = samples.memory.iter().map(of).collect();
        all.sort_unstable();
        mib(all.get(all.len() / 2).copied().unwrap_or(0))
    };
    let (images, before, after) = (median(|m| m.images), median(|m| m.before), median(|m| m.after));
    let verdict = |good: bool| if good { "pass" } else { "MISS" };
    let mut out = format!("{:<10} {}: images {images:.1} MiB", "", tool.name);
    if let Some(most) = targets.images {
        let _ = write!(out, " (at most {most:.0}: {})", verdict(images <= most));
    }
    let grown = verdict(after <= before * (1.0 + targets.growth / 100.0));
    let _ = writeln!(
        out,
        "; memory of the tree {before:.1} MiB before, {after:.1} after (at most {:.0} % more: {grown})",
        targets.growth
    );
    // Each against the writing right before it, for a machine is not equally fast all the time.
    let share = |times: &[Duration]| {
        let mut all: Vec<f64> =
            samples.plain.iter().zip(times).map(|(plain, time)| ms(*plain) / ms(*time)).collect();
        all.sort_unstable_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    };
    if let Some((dump, restore)) = share(&samples.dump).zip(share(&samples.restore)) {
        let plain = spread(&samples.plain).1;
        let _ = writeln!(
            out,
            "{:<10} {}: write(2) of the bytes by a thread a processor takes {plain:.0} ms; share of its speed: dump {dump:.2}, restore {restore:.2} (at least 0.85: {}, {})",
            "",
            tool.name,
            verdict(dump >= 0.85),
            verdict(restore >= 0.85)
        );
    }
    out
}

/// GB/s of [`HEAP`] bytes in so many milliseconds.
fn rate(ms: f64) -> f64 {
    HEAP as f64 / 1e6 / ms
}

/// The lines under `heap1g`.
pub fn limits(limits: &Limits) -> String {
    let mut out = String::new();
    for (what, time) in [
        ("memcpy, touched to touched", limits.copy_warm),
        ("memcpy, touched to fresh memory", limits.copy_fresh),
        ("write(2) to a fresh file beside the images", limits.write),
        ("read(2) of it to fresh memory", limits.read),
    ] {
        let time = ms(time);
        let _ = writeln!(out, "{:<10} limit: {what}: {time:.0} ms, {:.2} GB/s", "", rate(time));
    }
    out
}
