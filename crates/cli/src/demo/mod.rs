//! `demo`: checkpoint and restore of a small program, from start to end.
//!
//! The program is this binary again (see [`program`]), and so are the commands: what is shown is what anybody could type.
//! Nothing but the demonstration's own processes is touched, and all that it made is removed at the end, however it ends.

mod program;
mod show;
mod stage;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use rewake_image::ImageDir;
use rewake_image::kind::STATS_DUMP;
use rustix::thread::CapabilitySet;

use crate::console;
use stage::{Progress, Stage, Tasks};

/// Set in the environment of the program's processes: which of them to be.
const ROLE: &str = "REWAKE_DEMO_ROLE";

/// How long anything may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far the counter must get before and after the checkpoint.
const STRETCH: u64 = 100;

/// Runs the demonstration; 0 if all of it went as it should.
pub fn run() -> ExitCode {
    if let Some(role) = std::env::var_os(ROLE) {
        return program::run(&role);
    }
    match play() {
        Ok(code) => code,
        Err(text) => {
            let mut lines = text.lines();
            console::error(&format!("demo: {}", lines.next().unwrap_or_default()));
            lines.for_each(console::detail);
            ExitCode::FAILURE
        }
    }
}

/// Says something on standard output. Nobody needs to listen: the demonstration goes on without.
fn say(text: &str) {
    console::stdout(text);
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn play() -> Result<ExitCode, String> {
    permitted()?;
    let mut stage = Stage::set()?;
    say("rewake demo: a running program goes to files, ends, and comes back\n\n");

    let (before, at) = start(&mut stage)?;
    let (dump, frozen) = checkpoint(&stage, &before)?;
    let saved = stage.progress()?;
    if saved.counter < at.counter || saved.answers < at.answers {
        return Err(format!("the program went backwards: {at:?}, then {saved:?}"));
    }
    say(&format!(
        "   Saved in {}; the program stood still for {} of them. Its processes are gone.\n   \
         The last number written is {}, the last question answered is number {}.\n\n",
        ms(dump),
        ms(frozen),
        saved.counter,
        saved.answers
    ));
    let images = ImageDir::open(stage.images()).map_err(|e| e.to_string())?;
    say(&show::checkpoint(&images).map_err(|e| e.to_string())?);

    let restore = bring_back(&stage, &before)?;
    let now = stage.reach(saved.plus(STRETCH), PATIENCE)?;
    say(&format!(
        "   Back in {}, and running:\n   \
         - the same processes and threads, by number and name: {}\n   \
         - the counter went on from {} and is at {}; no number is missing or doubled\n   \
         - the pipe brought each of them to the client, in order\n   \
         - the deleted file held the last number, and follows the counter\n   \
         - the client went on from answer {} to {} over the connection it had\n\n",
        ms(restore),
        before.numbers(),
        saved.counter,
        now.counter,
        saved.answers,
        now.answers,
    ));
    stage.strike()?;
    say(&format!(
        "Everything the demonstration made is removed. dump {}, frozen {}, restore {}\n",
        ms(dump),
        ms(frozen),
        ms(restore)
    ));
    Ok(ExitCode::SUCCESS)
}

/// Asks for the capabilities before anything is started, rather than when the first command refuses.
fn permitted() -> Result<(), String> {
    let mine = rustix::thread::capabilities(None)
        .map_err(|e| format!("cannot read my capabilities: {e}"))?
        .effective;
    if mine.intersects(CapabilitySet::CHECKPOINT_RESTORE | CapabilitySet::SYS_ADMIN)
        && rustix::process::geteuid().is_root()
    {
        return Ok(());
    }
    Err("checkpoint and restore need root with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN\n\
         nothing was started; run it with sudo, in a container with --cap-add CHECKPOINT_RESTORE \
         or --privileged"
        .into())
}

fn start(stage: &mut Stage) -> Result<(Tasks, Progress), String> {
    say(
        "1. A program: a counter and its client, with threads, a pipe, a deleted file, and TCP on 127.0.0.1\n",
    );
    stage.start()?;
    let at = stage.reach(Progress::default().plus(STRETCH), PATIENCE)?;
    let tasks = stage.tasks()?;
    say(&format!(
        "   It runs as {}. The counter is at {}, the client has {} answers.\n\n",
        tasks.numbers(),
        at.counter,
        at.answers
    ));
    Ok((tasks, at))
}

/// Dumps the program. Gives the time of the command, and how long the program stood still.
fn checkpoint(stage: &Stage, tasks: &Tasks) -> Result<(Duration, Duration), String> {
    let root = tasks.root().to_string();
    let took = command(stage, "2", &["dump", "--tree", &root, "--tcp-established"])?;
    stage.wait_gone(tasks, PATIENCE)?;
    let stats = rewake_image::read_file(&stage.images().join("stats-dump"), STATS_DUMP)
        .map_err(|e| e.to_string())?;
    let stats = stats.first().and_then(|entry| entry.dump.as_ref()).ok_or("stats-dump is empty")?;
    Ok((took, Duration::from_micros(stats.frozen_time.into())))
}

/// Restores the program and looks whether all of it is there.
fn bring_back(stage: &Stage, before: &Tasks) -> Result<Duration, String> {
    let took = command(stage, "3", &["restore", "--restore-detached", "--tcp-established"])?;
    let after = stage.tasks()?;
    if after != *before {
        return Err(format!(
            "other tasks came back than had been there: {before:?}, then {after:?}"
        ));
    }
    Ok(took)
}

/// Runs a command of this binary and shows it.
fn command(stage: &Stage, step: &str, words: &[&str]) -> Result<Duration, String> {
    let images = stage.images();
    let shown = format!("{} --images-dir {}", words.join(" "), images.display());
    say(&format!("{step}. $ rewake {shown}\n"));
    let start = Instant::now();
    let (success, output) = stage.command(words)?;
    let took = start.elapsed();
    if success {
        return Ok(took);
    }
    let mut text = format!("`rewake {shown}` failed; everything the demonstration made is removed");
    for more in [output.trim_end(), &stage.advice()] {
        if !more.is_empty() {
            text = text + "\n" + more;
        }
    }
    Err(text)
}
