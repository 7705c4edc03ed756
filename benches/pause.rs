//! A dump of a process that runs on (`dump --leave-running`) and writes to random pages of all its memory all the time: the
//! longest time it could not, as it measures itself.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::case::Case;
use crate::cycle::{self, Scratch, Tool};
use crate::report::spread;
use crate::{machine, tree};

/// The subjects, their MiB, and what they may have to wait, in milliseconds.
pub const SUBJECTS: [(&str, usize, f64); 2] = [("pause256", 256, 8.0), ("pause1g", 1024, 15.0)];
/// The file in which the subject tells of its longest gap, in nanoseconds.
pub const FILE: &str = "gap";

/// Measures all tools; the text tells whether the targets are met.
pub fn measure(tools: &[Tool], options: &crate::Options) -> Result<String, String> {
    let mut out = String::new();
    for (name, mib, target) in SUBJECTS {
        let case = Case {
            name,
            what: "",
            dump_target: None,
            restore_target: None,
            warm_gib: 0,
            options: &[],
            memory: None,
        };
        let mut waits = vec![Vec::new(); tools.len() + 1];
        for n in 0..crate::WARM_UP + options.runs.min(9) {
            for (which, tool) in tools.iter().enumerate() {
                let (idle, gap) = once(&case, tool, mib, options)?;
                if n >= crate::WARM_UP {
                    waits[which].push(gap);
                    waits[tools.len()].push(idle);
                }
            }
        }
        for (which, times) in waits.iter().enumerate() {
            let (min, median, max) = spread(times);
            let times = format!("{min:.1} / {median:.1} / {max:.1}");
            let what = tools.get(which).map_or("no dump", |tool| tool.name);
            let name = if which == 0 { name } else { "" };
            let _ = write!(out, "{name:<10} {what:<10} {target:>5.0} {times:>27}");
            let verdict = if median <= target { "pass" } else { "MISS" };
            let judged = if which == 0 { format!("   rewake {verdict}") } else { String::new() };
            let _ = writeln!(out, "{judged}");
        }
    }
    Ok(out)
}

/// The longest gap of a fresh subject in some time without a dump, and in one.
fn once(
    case: &Case,
    tool: &Tool,
    mib: usize,
    options: &crate::Options,
) -> Result<(Duration, Duration), String> {
    let scratch = Scratch::new(&options.dir)?;
    let dir = &scratch.0;
    let images = dir.join("images");
    let images = images.to_str().ok_or("the directory's name is not text")?;
    machine::warm((2 * mib) << 20)?;
    let (child, _) = cycle::start(case, &dir.join("files"))?;
    let root = i32::try_from(child.id()).map_err(|e| e.to_string())?;
    drop(child);
    let gap = fs::File::options().read(true).write(true).open(dir.join("files").join(FILE));
    let measured = gap.map_err(|e| format!("{FILE}: {e}")).and_then(|gap| {
        let reset = || gap.write_all_at(&[0; 8], 0).map_err(|e| e.to_string());
        let read = || {
            let mut word = [0; 8];
            gap.read_exact_at(&mut word, 0).map_err(|e| e.to_string())?;
            Ok::<_, String>(Duration::from_nanos(u64::from_ne_bytes(word)))
        };
        reset()?;
        std::thread::sleep(Duration::from_millis(300));
        let idle = read()?;
        reset()?;
        tool.time(&["dump", "-t", &root.to_string(), "--leave-running", "-D", images], dir)?;
        // What it waits for now ends as soon as it writes.
        std::thread::sleep(Duration::from_millis(20));
        Ok((idle, read()?))
    });
    tree::kill(&[root]);
    tree::reap();
    measured
}
