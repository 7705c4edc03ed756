//! Images with compressed page stores.

use crate::flavours::{finish, started};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use std::fs;

/// Programs with memory of every kind that has pages in page stores.
const PROGRAMS: [&str; 5] = ["memory_private", "memory_shared", "sysv_shm", "memfd", "prefork"];

/// All trials about compressed images; with CRIU, it must refuse them.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    for method in ["lz4", "zstd"] {
        for program in PROGRAMS {
            let tool = tool.clone();
            let body = move || finish(there_and_back(&tool, program, method));
            all.push(trial(format!("compressed::{method}::{program}"), body));
        }
    }
    let body = {
        let tool = tool.clone();
        move || finish(damaged(&tool))
    };
    all.push(trial("compressed::damaged".into(), body));
    if let Some(criu) = criu {
        let (tool, criu) = (tool.clone(), criu.clone());
        all.push(trial("compressed::to_criu".into(), move || finish(refused(&tool, &criu))));
    }
    all
}

fn there_and_back(tool: &Tool, name: &str, method: &str) -> Result<(), NotReady> {
    let program = by_name(name)?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let compress = format!("--compress={method}");
    let options = crate::flavours::with(program.dump_options, &compress);
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

/// A store that is cut off is told before any process exists, with or without checksums.
fn damaged(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("memory_private")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--compress"])?;
    run.gone(&before.pids(), "after the dump")?;
    let path = images.join("pages-1.img");
    let good = fs::read(&path).map_err(|e| format!("pages-1.img: {e}"))?;
    for (options, wanted) in [(&[][..], "bytes, and had"), (&["--no-verify"][..], "page store")] {
        fs::write(&path, &good[..good.len() / 2]).map_err(|e| e.to_string())?;
        let done = run.try_restore(tool, &images, options)?;
        if done.success() || !done.text.contains(wanted) || !run.leftovers().is_empty() {
            let left = run.leftovers();
            return Err(run.fail(format!("{options:?}: {} {left:?}", done.text)).into());
        }
    }
    fs::write(&path, &good).map_err(|e| e.to_string())?;
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}

fn refused(tool: &Tool, criu: &Tool) -> Result<(), NotReady> {
    let program = by_name("memory_private")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--compress"])?;
    run.gone(&before.pids(), "after the dump")?;
    if run.try_restore(criu, &images, &[])?.success() {
        return Err(run.fail("CRIU takes them".into()).into());
    }
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}
