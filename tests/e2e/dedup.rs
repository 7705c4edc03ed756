//! Images in which pages of equal content are stored once.

use crate::flavours::{finish, started, with};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;

/// Programs with memory of every kind that has pages in page stores.
const PROGRAMS: [&str; 6] =
    ["memory_equal", "memory_private", "memory_dense", "memory_shared", "prefork", "aio"];

/// All trials about such images; with CRIU, it must refuse them.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    for program in PROGRAMS {
        let tool = tool.clone();
        let body = move || finish(there_and_back(&tool, program));
        all.push(trial(format!("dedup::{program}"), body));
    }
    let less = {
        let tool = tool.clone();
        move || finish(takes_less(&tool))
    };
    all.push(trial("dedup::takes_less".into(), less));
    if let Some(criu) = criu {
        let (tool, criu) = (tool.clone(), criu.clone());
        all.push(trial("dedup::to_criu".into(), move || finish(refused(&tool, &criu))));
    }
    all
}

/// Dead, and running, which saves large memory while it is written to.
fn there_and_back(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let program = by_name(name)?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let options = with(program.dump_options, "--dedup");
    let running = with(&options, "--leave-running");
    let images = run.images(0)?;
    run.dump(tool, &images, &running)?;
    for cycle in 1..=2 {
        let images = run.images(cycle)?;
        run.dump(tool, &images, &options)?;
        run.gone(&before.pids(), &format!("after dump {cycle}"))?;
        run.restore(tool, &images, program.restore_options)?;
        run.same(&before, &format!("after restore {cycle}"), &program.ignored(tool))?;
    }
    run.check(&before)?;
    Ok(())
}

fn pages(images: &Path) -> Result<u64, String> {
    let entries = fs::read_dir(images).map_err(|e| e.to_string())?.flatten();
    let stores = entries.filter(|e| e.file_name().to_string_lossy().starts_with("pages-"));
    Ok(stores.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum())
}

/// Of 8 MiB of which three quarters are alike, these are stored once.
fn takes_less(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("memory_equal")?;
    let (run, before) = started(&program, Fs::Memory)?;
    let (plain, images) = (run.images(1)?, run.images(2)?);
    run.dump(tool, &plain, &["--leave-running"])?;
    run.dump(tool, &images, &["--leave-running", "--dedup"])?;
    let (without, with) = (pages(&plain)?, pages(&images)?);
    if with + (5 << 20) > without {
        return Err(run.fail(format!("{with} bytes of pages, {without} without --dedup")).into());
    }
    run.check(&before)?;
    Ok(())
}

/// CRIU refuses such images by their version.
fn refused(tool: &Tool, criu: &Tool) -> Result<(), NotReady> {
    let program = by_name("memory_equal")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--dedup"])?;
    run.gone(&before.pids(), "after the dump")?;
    let done = run.try_restore(criu, &images, &[])?;
    if done.success() || !run.leftovers().is_empty() {
        return Err(run.fail(format!("CRIU took them: {}", done.text)).into());
    }
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}
