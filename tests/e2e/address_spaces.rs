//! A property is tried: address spaces as chance makes them, of processes forked at random moments, come back the same in every
//! byte, flag and sharing relation. Each run tries some seeds that nobody has tried before, and says which.

use crate::flavours::{finish, settled_start};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::by_name;
use crate::{kills, trial};
use libtest_mimic::Trial;
use std::time::{Duration, Instant};

/// So long seeds are tried, at least [`AT_LEAST`] of them.
const LONG: Duration = Duration::from_secs(8);
const AT_LEAST: u32 = 2;

/// All trials of this kind.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    for (name, options) in [("dead", &[][..]), ("rewake_format", &["--format", "rewake"][..])] {
        if tool.is_criu && !options.is_empty() {
            continue;
        }
        let tool = tool.clone();
        all.push(trial(format!("address_spaces_by_chance::{name}"), move || {
            finish(by_chance(&tool, options))
        }));
    }
    all
}

fn by_chance(tool: &Tool, options: &[&str]) -> Result<(), NotReady> {
    let since = Instant::now();
    let first = std::env::var("ZOO_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut n = 0;
    while n < AT_LEAST || first.is_none() && since.elapsed() < LONG {
        let seed = first.unwrap_or_else(|| kills::seed() % 1_000_000_007);
        once(tool, seed, options).map_err(|e| match e {
            NotReady::Fail(text) => NotReady::Fail(format!("ZOO_SEED={seed}: {text}")),
            skip => skip,
        })?;
        n += 1;
    }
    Ok(())
}

fn once(tool: &Tool, seed: u64, options: &[&str]) -> Result<(), NotReady> {
    let mut program = by_name("address_spaces_of_seed")?;
    let mut start = program.start();
    start.env.push(("ZOO_SEED".into(), seed.to_string()));
    if tool.is_criu {
        start.env.push(("ZOO_PLAIN".into(), "1".into()));
    }
    program.name = "address_spaces";
    let (mut run, before) = settled_start(&program, &start, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, options)?;
    run.gone(&before.pids(), "after the dump")?;
    run.restore(tool, &images, &[])?;
    run.same(&before, "after the restore", &program.ignored(tool))?;
    run.check(&before)?;
    Ok(())
}
