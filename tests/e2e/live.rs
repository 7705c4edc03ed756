//! Dumps of trees that run on: their memory is of one instant, and nobody notices what it takes; also when the command is killed.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Tool, execute};
use crate::kills::{dump_command, killed_after, seed};
use crate::programs::by_name;
use crate::{trial, trial_alone};
use libtest_mimic::Trial;
use std::fs;
use std::time::{Duration, Instant};
use zoo::Rng;

/// All trials about dumps of trees that run on.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut add = |name: &str, alone: bool, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        let name = format!("live::{name}");
        let body = move || finish(body(&tool));
        all.push(if alone { trial_alone(name, body) } else { trial(name, body) });
    };
    add("one_instant", false, |tool| one_instant(tool, "live"));
    add("one_instant_churn", false, |tool| one_instant(tool, "live_churn"));
    add("max_pause", false, max_pause);
    add("full_disk", false, full_disk);
    add("killed", true, killed);
    add("leader_ends", false, leader_ends);
    all
}

fn start(name: &str) -> Result<Run, NotReady> {
    let program = by_name(name)?;
    Run::ready(program.name, &program.start(), Fs::Memory)
}

/// Is any memory of the tree registered with a userfaultfd?
fn unregistered(run: &Run, when: &str) -> Result<(), Fail> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let pids = run.view()?.pids();
        let registered = pids.iter().any(|pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
            let mut flags = text.lines().filter(|line| line.starts_with("VmFlags:"));
            flags.any(|line| line.split(' ').any(|word| word == "uw"))
        });
        if !registered {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(run.fail(format!("{when} memory is still registered")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What was saved of a program that writes all the time must be of one instant; each time what was restored is saved again.
fn one_instant(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let mut run = start(name)?;
    let mut lived = 0;
    for n in 0..4 {
        let images = run.images(n)?;
        run.dump(tool, &images, &["--leave-running"])?;
        let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        let copied = log.contains("copies of shared memory compared");
        lived += usize::from(
            copied && log.contains("and runs on") && !log.contains("stood still while"),
        );
        unregistered(&run, "after a dump")?;
        let view = run.view()?;
        run.kill_tree(&view)?;
        for pid in run.leftovers() {
            crate::harness::kill(pid, libc::SIGKILL);
        }
        run.restore(tool, &images, &[])?;
        std::thread::sleep(Duration::from_millis(100));
    }
    if name == "live" && lived == 0 {
        return Err(run.fail("it always stood still while its memory was copied".into()).into());
    }
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// What cannot be in time is refused, and the tree runs on.
fn max_pause(tool: &Tool) -> Result<(), NotReady> {
    let run = start("live")?;
    let images = run.images(0)?;
    let options = ["--leave-running", "--max-pause", "1"];
    let done = run.try_dump(tool, run.root, &images, &options)?;
    let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
    if done.success() || !log.contains("would have to stand still for") {
        return Err(run.fail(format!("--max-pause 1: {}\n{log}", done.text)).into());
    }
    if images.join("inventory.img").exists() {
        return Err(run.fail("there are images all the same".into()).into());
    }
    unregistered(&run, "after a refusal")?;
    run.dump(tool, &images, &["--leave-running", "--max-pause", "60000"])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// A dump that fails when the tree runs on already leaves it alone, and no images.
fn full_disk(tool: &Tool) -> Result<(), NotReady> {
    let run = start("live")?;
    let images = run.images(0)?;
    let mut command = std::process::Command::new("sh");
    // Files of at most a mebibyte, whoever writes them; SIGXFSZ ignored, it is an error like any other.
    command.args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$@\"", "sh"]);
    let dump = dump_command(&run, tool, &images, &["--leave-running"]);
    command.arg(dump.get_program()).args(dump.get_args());
    let done = execute(command, &run.dir)?;
    if done.success() || images.join("inventory.img").exists() {
        return Err(run.fail(format!("saved in spite of the limit: {}", done.text)).into());
    }
    unregistered(&run, "after a dump that failed")?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// The first thread ends, at some instant of a dump, and the others go on: it is saved as what it is then.
fn leader_ends(tool: &Tool) -> Result<(), NotReady> {
    let mut rng = Rng(seed());
    for _ in 0..20 {
        let mut run = start("leader_ends")?;
        let images = run.images(0)?;
        let delay = Duration::from_micros(rng.next() % 8000);
        let end = run.dir.join("end");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                fs::write(&end, "")
            });
            run.dump(tool, &images, &[])
        })?;
        let _ = fs::write(&end, "");
        run.restore(tool, &images, &[])?;
        run.dump(tool, &run.images(1)?, &["--leave-running"])?;
        let view = run.view()?;
        run.check(&view)?;
    }
    Ok(())
}

/// Killed at any instant, a dump leaves a tree that runs on, and nothing registered.
fn killed(tool: &Tool) -> Result<(), NotReady> {
    let run = start("live")?;
    let time = run.dump(tool, &run.images(1000)?, &["--leave-running"])?.took;
    let kills = std::env::var("ZOO_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(200u64) / 4;
    let mut rng = Rng(seed());
    let mut killed = 0;
    for _ in 0..kills.max(1) {
        let delay = Duration::from_micros(rng.next() % (time.as_micros() as u64 + 2000));
        let command = dump_command(&run, tool, &run.images(0)?, &["--leave-running"]);
        if killed_after(command, delay)? {
            killed += 1;
            unregistered(&run, "after a dump was killed")?;
        }
    }
    if killed == 0 {
        return Err(run.fail("no dump was killed".into()).into());
    }
    // What is left of them stands in nobody's way.
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-running"])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}
