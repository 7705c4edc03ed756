//! Memory that the tree shares with a process outside: a dump and a check say so, and only then.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Tool, execute};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;

/// All trials about memory that is shared with the outside.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("strangers::{name}"), move || finish(body(&tool))));
    };
    add("are_named", are_named);
    add("are_named_running", are_named_running);
    add("inside_only", |tool| nobody(tool, "shared_inside"));
    add("sealed", |tool| nobody(tool, "shared_sealed"));
    add("memory_shared", |tool| nobody(tool, "memory_shared"));
    all
}

fn start(name: &str) -> Result<Run, NotReady> {
    let program = by_name(name)?;
    Run::ready(program.name, &program.start(), Fs::Memory)
}

/// What a check of the tree says, which must not find anything in the way.
fn checked(run: &Run, tool: &Tool) -> Result<String, Fail> {
    let mut command = Command::new(&tool.path);
    command.args(["check", "-t", &run.root.to_string()]);
    let done = execute(command, &run.dir)?;
    match done.success() && done.text.contains("can be checkpointed") {
        true => Ok(done.text),
        false => Err(run.fail(format!("check: {}", done.text))),
    }
}

fn log(images: &Path) -> String {
    fs::read_to_string(images.join("dump.log")).unwrap_or_default()
}

/// The lines that name a process outside.
fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.contains("outside the tree")).collect()
}

/// Fails unless a text names root and keeper once for each piece of memory.
fn judge(run: &Run, text: &str) -> Result<(), Fail> {
    let keeper = fs::read_to_string(run.dir.join("keeper")).unwrap_or_default();
    let begin = format!("process {} (shared_outside): mapping 0x", run.root);
    let with = format!("process {} (shared_outside) outside the tree", keeper.trim());
    let lines = lines(text);
    for what in ["(shared anonymous memory)", "(memfd shared outside)", "deleted soon)"] {
        let told = lines
            .iter()
            .filter(|line| line.contains(&begin) && line.contains(&with) && line.contains(what));
        if told.count() != 1 {
            return Err(run.fail(format!("{what} is not told once:\n{text}")));
        }
    }
    match lines.len() {
        3 => Ok(()),
        _ => Err(run.fail(format!("more than three things are told:\n{text}"))),
    }
}

fn are_named(tool: &Tool) -> Result<(), NotReady> {
    named(tool, &[])
}

fn are_named_running(tool: &Tool) -> Result<(), NotReady> {
    named(tool, &["--leave-running"])
}

fn named(tool: &Tool, options: &[&str]) -> Result<(), NotReady> {
    let mut run = start("shared_outside")?;
    judge(&run, &checked(&run, tool)?)?;
    let images = run.images(1)?;
    let before = run.view()?;
    run.dump(tool, &images, options)?;
    judge(&run, &log(&images))?;
    if options.is_empty() {
        run.gone(&before.pids(), "after the dump")?;
        run.restore(tool, &images, &[])?;
        // It shares with nobody now.
        let text = checked(&run, tool)?;
        if !lines(&text).is_empty() {
            return Err(run.fail(format!("after a restore: {text}")).into());
        }
    }
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// A tree that shares memory with nobody outside.
fn nobody(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let mut run = start(name)?;
    let images = run.images(1)?;
    let before = run.view()?;
    let mut text = checked(&run, tool)?;
    run.dump(tool, &images, &[])?;
    text += &log(&images);
    if !lines(&text).is_empty() {
        return Err(run.fail(format!("somebody is named: {text}")).into());
    }
    run.gone(&before.pids(), "after the dump")?;
    run.restore(tool, &images, &[])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}
