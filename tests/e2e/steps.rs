//! The command killed at every one of its system calls in turn, and each of them made to fail in turn. Of a dump: the
//! target goes on as if nothing had been, or (without `--leave-running`) its images are whole. Of a restore: there is a
//! complete tree or nothing, and who fails says so with exit status 1.
//!
//! `ZOO_STEPS=n` tries every n-th step only. By default that is every one of the small subject, and of the large ones a
//! different selection each time.

use crate::flavours::{finish, started, with};
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, execute};
use crate::kills::{all_or_nothing, judge_eintr_of_killed, seed};
use crate::programs::{Program, by_name};
use crate::tracer::{self, At, End};
use crate::view::View;
use crate::{no_excuses, skip, trial_alone};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;

/// All trials of single steps.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    type Body = fn(&Tool, &Program, At) -> Result<(), NotReady>;
    let mut all = Vec::new();
    let mut add = |name: &'static str, body: Body, at: At, program: &'static str| {
        let tool = tool.clone();
        all.push(trial_alone(format!("steps::{name}::{program}"), move || {
            if tool.is_criu && !no_excuses() {
                return Ok(skip("CRIU cannot: killed in a dump it leaves its code in the target"));
            }
            finish(by_name(program).map_err(NotReady::Fail).and_then(|p| body(&tool, &p, at)))
        }));
    };
    let fail = At::Fail(libc::ENOMEM);
    for program in ["counter", "sleepers", "tree", "nofile_full", "timerslack", "shared_mm"] {
        add("killed_dump", dump_running, At::Kill, program);
    }
    for program in ["counter", "tree", "shared_mm"] {
        add("killed_restore", restore, At::Kill, program);
        add("failed_dump", dump_dead, fail, program);
        add("failed_restore", restore, fail, program);
    }
    add("killed_restore", restore, At::Kill, "sessions");
    add("failed_restore", restore, fail, "sessions");
    for program in ["files_deleted", "epoll"] {
        add("failed_dump", dump_dead, fail, program);
        add("failed_restore", restore, fail, program);
    }
    all
}

/// Every how many steps one is tried.
fn stride(program: &Program) -> u64 {
    let usual = if program.name == "counter" { 1 } else { 41 };
    std::env::var("ZOO_STEPS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual).max(1)
}

/// Walks over the steps of what `command` makes until it completes, and has `judge` look after each at what it left.
/// Returns how many there were.
fn walk(
    program: &Program,
    run: &mut Run,
    at: At,
    log: &str,
    command: impl Fn(&Run) -> Command,
    mut judge: impl FnMut(&mut Run, End, &str) -> Result<(), Fail>,
) -> Result<u64, Fail> {
    let stride = stride(program);
    let mut n = 1 + seed() % stride;
    // How many calls there are differs from run to run: looking for a change of another process takes some.
    let mut unreached = 0;
    while unreached < 3 {
        let log = run.dir.join(log);
        let _ = fs::remove_file(&log);
        let done = execute(tracer::command(at, n, &command(run))?, &run.dir)?;
        let end = tracer::end(done.status)?;
        let logged = fs::read_to_string(&log).unwrap_or_default();
        let when = format!("{at:?} at step {n}: {end:?} {}\n{logged}", done.text);
        match end {
            End::Unreached(0) => unreached += 1,
            End::Unreached(_) => return Err(run.fail(format!("{when} without a cause"))),
            End::Exited(0) => {}
            End::Exited(1) if logged.contains("Error (") || done.text.contains("rewake: ") => {}
            End::Exited(1) => return Err(run.fail(format!("{when} nothing says why"))),
            End::Exited(_) => return Err(run.fail(format!("{when} is no orderly end"))),
            End::Killed => {}
        }
        judge(run, end, &when)?;
        n += stride;
    }
    Ok(n)
}

fn dump_command(run: &Run, tool: &Tool, images: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(&tool.path);
    command.args(["dump", "-t", &run.root.to_string(), "-v1", "-o"]).arg(run.dir.join("dump.log"));
    command.arg("-D").arg(images).args(options);
    command
}

fn dump_running(tool: &Tool, program: &Program, at: At) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Memory)?;
    let images = run.images(1)?;
    let options = with(program.dump_options, "--leave-running");
    let steps = walk(
        program,
        &mut run,
        at,
        "dump.log",
        |run| dump_command(run, tool, &images, &options),
        |run, _, when| run.same(&before, when, &[]),
    )?;
    run.dump(tool, &run.images(2)?, &options)?;
    run.check(&before)?;
    // How often is no question here: steps are counted inside the very instants in which it can happen.
    judge_eintr_of_killed(&run, tool, u64::MAX)?;
    println!("steps::dump_running::{}: {steps} steps", program.name);
    Ok(())
}

/// With the default final state the target is unharmed, or it is gone and the images are whole.
fn dump_dead(tool: &Tool, program: &Program, at: At) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Memory)?;
    let images = run.images(1)?;
    let ignored = program.ignored(tool);
    let steps = walk(
        program,
        &mut run,
        at,
        "dump.log",
        |run| dump_command(run, tool, &images, program.dump_options),
        |run, end, when| {
            let dumped = matches!(end, End::Exited(0) | End::Unreached(0));
            // A target that was just killed needs the time to go.
            std::thread::sleep(std::time::Duration::from_millis(10));
            if dumped || !alive(run.root) {
                run.gone(&before.pids(), when)?;
                run.restore(tool, &images, program.restore_options)
                    .map_err(|e| format!("{when} the target is gone and {e}"))?;
            }
            run.same(&before, when, &ignored)
        },
    )?;
    run.check(&before)?;
    println!("steps::dump_dead::{}: {steps} steps", program.name);
    Ok(())
}

fn restore(tool: &Tool, program: &Program, at: At) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after dump")?;
    let files = listing(&run.dir)?;
    let steps = walk(
        program,
        &mut run,
        at,
        "restore.log",
        |run| {
            let mut command = Command::new(&tool.path);
            command.args(["restore", "-d", "-v1", "-o"]).arg(run.dir.join("restore.log"));
            command.arg("--pidfile").arg(run.dir.join("pidfile"));
            command.arg("-D").arg(&images).args(program.restore_options);
            command
        },
        |run, end, when| {
            let whole = all_or_nothing(run, &before, program, tool, when)?;
            match (end, whole) {
                (End::Exited(0) | End::Unreached(0), false) => {
                    return Err(run.fail(format!("{when}: success, but there is no tree")));
                }
                (End::Exited(_), true) if end != End::Exited(0) => {
                    return Err(run.fail(format!("{when}: failure, but there is a tree")));
                }
                _ => {}
            }
            if whole {
                kill_restored(run, &before)?;
            }
            // A restore that was killed, or whose tree came back, leaves it.
            if whole || end == End::Killed {
                let _ = fs::remove_file(run.dir.join("pidfile"));
            }
            if matches!(end, End::Exited(1)) && listing(&run.dir)? != files {
                return Err(run.fail(format!(
                    "{when}: files are left: {:?}, where there were {files:?}",
                    listing(&run.dir)?
                )));
            }
            Ok(())
        },
    )?;
    run.restore(tool, &images, program.restore_options)?;
    run.same(&before, "after all steps and a whole restore", &program.ignored(tool))?;
    run.check(&before)?;
    println!("steps::restore::{}: {steps} steps", program.name);
    Ok(())
}

fn kill_restored(run: &Run, before: &View) -> Result<(), Fail> {
    run.kill_tree(before)?;
    run.gone(&before.pids(), &format!("{TIMEOUT:?} after SIGKILL"))
}

/// What is in the program's directory but for the logs and outputs of the harness.
fn listing(dir: &Path) -> Result<Vec<String>, Fail> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map_err(|e| e.to_string())?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| !n.ends_with(".log") && !n.starts_with("out."))
        .collect();
    names.sort();
    Ok(names)
}
