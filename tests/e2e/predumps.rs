//! Chains made by `pre-dump` of a program whose memory changes all the time and which knows what it must be; what becomes of
//! the tracking when commands, the keeper or the tree are killed.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Tool, execute, kill, tail};
use crate::kills::killed_after;
use crate::programs::by_name;
use crate::{trial, trial_alone};
use libtest_mimic::Trial;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use zoo::Rng;

/// All trials about pre-dumps; with CRIU, it restores them too.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    for rounds in [1usize, 4] {
        for (word, options) in [("", &[][..]), ("_dedup", &["--auto-dedup"][..])] {
            let mut add = |criu_word: &str, to: &Tool| {
                let (tool, to) = (tool.clone(), to.clone());
                all.push(trial(format!("predumps::{rounds}{word}{criu_word}"), move || {
                    finish(chain(&tool, &to, rounds, options))
                }));
            };
            add("", tool);
            if let Some(criu) = criu {
                add("::to_criu", criu);
            }
        }
    }
    let mut add = |name: &str, alone: bool, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        let name = format!("predumps::{name}");
        let body = move || finish(body(&tool));
        all.push(if alone { trial_alone(name, body) } else { trial(name, body) });
    };
    add("dumps_leave_running", false, leave_running);
    add("keeper_killed", false, keeper_killed);
    add("tree_killed", false, tree_killed);
    add("dedup", false, dedup);
    add("leader_gone", false, leader_gone);
    add("failed_dump", false, failed_dump);
    add("untrackable", false, untrackable);
    add("pre_dump_killed", true, pre_dump_killed);
    all
}

fn start() -> Result<Run, NotReady> {
    let program = by_name("memory_written")?;
    Run::ready(program.name, &program.start(), Fs::Memory)
}

/// A person is told at once, and every time, why memory cannot be tracked.
fn untrackable(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("aio")?;
    let run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let before = run.view()?;
    let wanted = format!(
        "process {} (aio): its memory cannot be tracked (its asynchronous I/O (io_uring, AIO) writes to memory without being noticed)",
        run.root
    );
    let says = |word: &str, n: usize| {
        let log = save(&run, tool, word, n, &[])?;
        match log.contains(&wanted) {
            true => Ok(log),
            false => Err(run.fail(format!("{word} {n} does not say {wanted:?}: {log}"))),
        }
    };
    says("pre-dump", 0)?;
    says("pre-dump", 1)?;
    let log = says("dump", 2)?;
    if !log.contains("it could not be tracked, or its keeper has ended") {
        return Err(run.fail(format!("the reason is not told: {log}")).into());
    }
    run.gone(&before.pids(), "after the dump")?;
    let mut run = run;
    let images = run.images(2)?;
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}

/// Makes the n-th images; all but the first leave pages to those before.
fn images(run: &Run, n: usize, extra: &[&str]) -> Result<(PathBuf, Vec<String>), Fail> {
    let dir = run.images(n)?;
    let mut options: Vec<String> = extra.iter().map(|o| (*o).to_owned()).collect();
    if n > 0 {
        options.extend(["--prev-images-dir".into(), format!("../img.{}", n - 1)]);
    }
    Ok((dir, options))
}

/// A command that saves the tree.
pub fn command(
    run: &Run,
    tool: &Tool,
    word: &str,
    n: usize,
    extra: &[&str],
) -> Result<Command, Fail> {
    let (dir, options) = images(run, n, extra)?;
    let mut command = Command::new(&tool.path);
    command.args([word, "-t", &run.root.to_string(), "--track-mem", "-o", "dump.log", "-v4", "-D"]);
    command.arg(dir).args(options);
    Ok(command)
}

/// Saves the tree; the log.
pub fn save(run: &Run, tool: &Tool, word: &str, n: usize, extra: &[&str]) -> Result<String, Fail> {
    let done = execute(command(run, tool, word, n, extra)?, &run.dir)?;
    let log = fs::read_to_string(run.images(n)?.join("dump.log")).unwrap_or_default();
    if done.success() {
        return Ok(log);
    }
    Err(run.fail(format!(
        "{word} {n} failed: {}\n{}",
        done.text,
        tail("dump.log", &run.images(n)?.join("dump.log"))
    )))
}

/// Pages left to the parent and stored, as the statistics have it.
fn pages(run: &Run, n: usize) -> Result<(u64, u64), Fail> {
    let path = run.images(n)?.join("stats-dump");
    let stats = rewake_image::read_file(&path, rewake_image::kind::STATS_DUMP);
    let stats = stats.map_err(|e| run.fail(e.to_string()))?;
    let dump = stats.first().and_then(|s| s.dump.as_ref()).ok_or("no statistics")?;
    Ok((dump.pages_skipped_parent, dump.pages_written))
}

/// The keepers of a run's images.
fn keepers(run: &Run) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.starts_with("rewake\0keeper\0") && line.contains(&format!("{}/", run.dir.display()))
        {
            found.push(pid);
        }
    }
    found
}

fn no_keeper(run: &Run, when: &str) -> Result<(), Fail> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let left = keepers(run);
        if left.is_empty() {
            break;
        }
        if Instant::now() > until {
            return Err(run.fail(format!("{when} there is still a keeper: {left:?}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for n in 0..10 {
        let socket = run.dir.join(format!("img.{n}/rewake-keeper.socket"));
        if fs::symlink_metadata(&socket).is_ok() && when != "after it was killed" {
            return Err(run.fail(format!("{when} there is still {}", socket.display())));
        }
    }
    Ok(())
}

/// Is any memory of the tree registered with a userfaultfd?
fn registered(run: &Run) -> Result<bool, Fail> {
    let pids = run.view()?.pids();
    Ok(pids.iter().any(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        text.lines().any(|l| l.starts_with("VmFlags:") && l.split(' ').any(|word| word == "uw"))
    }))
}

fn unregistered(run: &Run, when: &str) -> Result<(), Fail> {
    let until = Instant::now() + Duration::from_secs(20);
    while registered(run)? {
        if Instant::now() > until {
            return Err(run.fail(format!("{when} memory is still registered")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Sleeps for a while.
pub fn some_time(rng: &mut Rng) {
    std::thread::sleep(Duration::from_millis(10 + rng.next() % 120));
}

/// The last dump ends the tree; restored, it must find its memory as it was.
fn ended(
    run: &mut Run,
    tool: &Tool,
    to: &Tool,
    n: usize,
    extra: &[&str],
) -> Result<String, NotReady> {
    let log = save(run, tool, "dump", n, extra)?;
    no_keeper(run, "after the last dump")?;
    let dir = run.images(n)?;
    run.restore(to, &dir, &[])?;
    std::thread::sleep(Duration::from_millis(50));
    let view = run.view()?;
    run.check(&view)?;
    Ok(log)
}

fn chain(tool: &Tool, to: &Tool, rounds: usize, options: &[&str]) -> Result<(), NotReady> {
    let mut run = start()?;
    let mut rng = Rng(rounds as u64);
    for n in 0..rounds {
        let options = if n == 0 { &[] } else { options };
        save(&run, tool, "pre-dump", n, options)?;
        if keepers(&run).len() != 1 {
            return Err(run.fail(format!("keepers: {:?}", keepers(&run))).into());
        }
        some_time(&mut rng);
    }
    ended(&mut run, tool, to, rounds, options)?;
    let (left, stored) = pages(&run, rounds)?;
    if left < 200 {
        return Err(run
            .fail(format!("only {left} pages were left to the parent, {stored} stored"))
            .into());
    }
    Ok(())
}

fn leave_running(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start()?;
    let mut rng = Rng(5);
    for n in 0..4 {
        let word = if n % 2 == 0 { "dump" } else { "pre-dump" };
        let options: &[&str] = if n % 2 == 0 { &["--leave-running"] } else { &[] };
        save(&run, tool, word, n, options)?;
        some_time(&mut rng);
    }
    ended(&mut run, tool, tool, 4, &[])?;
    Ok(())
}

fn keeper_killed(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start()?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let keeper = keepers(&run);
    keeper.iter().for_each(|&pid| kill(pid, libc::SIGKILL));
    no_keeper(&run, "after it was killed")?;
    unregistered(&run, "after the keeper was killed")?;
    let log = ended(&mut run, tool, tool, 1, &[])?;
    let (left, _) = pages(&run, 1)?;
    if left != 0 || !log.contains("nobody kept track of it") {
        return Err(run.fail(format!("{left} pages were left to the parent: {log}")).into());
    }
    Ok(())
}

fn tree_killed(tool: &Tool) -> Result<(), NotReady> {
    let run = start()?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let view = run.view()?;
    run.kill_tree(&view)?;
    // Processes that the program made since are its root's children, and go on without it.
    for pid in run.leftovers() {
        kill(pid, libc::SIGKILL);
    }
    no_keeper(&run, "after the end of the tree")?;
    Ok(())
}

/// The memory of a process whose first thread has ended is tracked like any other.
fn leader_gone(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("leader_gone")?;
    let mut run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    for n in 0..2 {
        save(&run, tool, "pre-dump", n, &[])?;
    }
    ended(&mut run, tool, tool, 2, &[])?;
    let (left, stored) = pages(&run, 2)?;
    if left < 200 {
        let text = format!("only {left} pages were left to the parent, {stored} stored");
        return Err(run.fail(text).into());
    }
    Ok(())
}

/// The command `dedup`, after the fact.
fn dedup(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start()?;
    let mut rng = Rng(6);
    for n in 0..3 {
        save(&run, tool, "pre-dump", n, &[])?;
        some_time(&mut rng);
    }
    save(&run, tool, "dump", 3, &[])?;
    let blocks = |n: usize| -> Result<u64, Fail> {
        use std::os::unix::fs::MetadataExt;
        let dir = fs::read_dir(run.images(n)?).map_err(|e| e.to_string())?;
        Ok(dir.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.blocks()).sum())
    };
    let before = (0..3).map(blocks).sum::<Result<u64, _>>()?;
    let mut dedup = Command::new(&tool.path);
    dedup.arg("dedup").arg("-D").arg(run.images(3)?);
    let done = execute(dedup, &run.dir)?;
    let after = (0..3).map(blocks).sum::<Result<u64, _>>()?;
    if !done.success() || after >= before {
        return Err(run.fail(format!("{before} blocks, then {after}: {}", done.text)).into());
    }
    let dir = run.images(3)?;
    run.restore(tool, &dir, &[])?;
    std::thread::sleep(Duration::from_millis(50));
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// A dump that fails leaves everything as it was, tracking too.
fn failed_dump(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start()?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let script = run.dir.join("refuse.sh");
    let text = "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != pre-dump ]\n";
    fs::write(&script, text).map_err(|e| e.to_string())?;
    crate::harness::set_mode(&script, 0o755)?;
    let path = script.to_string_lossy().into_owned();
    let mut failing = command(&run, tool, "dump", 1, &["--action-script", &path])?;
    failing.stdin(std::process::Stdio::null());
    if execute(failing, &run.dir)?.success() {
        return Err(run.fail("a dump whose script fails succeeds".into()).into());
    }
    if keepers(&run).len() != 1 {
        return Err(run
            .fail("nobody keeps track of memory after a dump that failed".into())
            .into());
    }
    ended(&mut run, tool, tool, 1, &[])?;
    if pages(&run, 1)?.0 < 200 {
        return Err(run.fail("nothing was left to the parent".into()).into());
    }
    Ok(())
}

/// Killed at any instant, a pre-dump leaves a tree that runs on, and nothing registered; the chain goes on all the same.
fn pre_dump_killed(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start()?;
    let time = {
        let started = Instant::now();
        save(&run, tool, "pre-dump", 0, &[])?;
        started.elapsed()
    };
    let kills = std::env::var("ZOO_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(200u64) / 4;
    let mut rng = Rng(crate::kills::seed());
    let mut killed = 0;
    for _ in 0..kills.max(1) {
        let delay = Duration::from_micros(rng.next() % (time.as_micros() as u64 + 2000));
        if killed_after(command(&run, tool, "pre-dump", 1, &[])?, delay)? {
            killed += 1;
            no_keeper_of(&run, 1)?;
            if keepers(&run).is_empty() {
                unregistered(&run, "after a pre-dump was killed")?;
            }
            // Where it stood before.
            save(&run, tool, "pre-dump", 0, &[])?;
        }
    }
    if killed == 0 {
        return Err(run.fail("no pre-dump was killed".into()).into());
    }
    save(&run, tool, "pre-dump", 0, &[])?;
    some_time(&mut rng);
    ended(&mut run, tool, tool, 1, &[])?;
    Ok(())
}

/// A keeper whose images were never completed ends.
fn no_keeper_of(run: &Run, n: usize) -> Result<(), Fail> {
    let dir = run.images(n)?;
    if dir.join("inventory.img").exists() {
        // It was killed when all was done.
        return Ok(());
    }
    let until = Instant::now() + Duration::from_secs(20);
    let its = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy())
    };
    while keepers(run).iter().any(its) {
        if Instant::now() > until {
            return Err(run.fail("a keeper outlives its command".into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
