//! A tree beside itself: `restore --new-pidns` where its pids are taken, `--copies`, changed addresses.

use crate::flavours::{finish, inner_pid, started};
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, kill};
use crate::programs::by_name;
use crate::{reaper, trial, view};
use libtest_mimic::Trial;
use std::fs;

/// All trials about trees in namespaces of their own.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("copies::{name}"), move || finish(body(&tool))));
    };
    add("beside_the_original", beside_the_original);
    add("init_passes_signals_on", init_passes_signals_on);
    add("init_takes_all_with_it", init_takes_all_with_it);
    all
}

/// A run of `counter`, saved and left running, and its twin; `run.root` is the twin's init.
fn twin(tool: &Tool) -> Result<(Run, i32, i32), NotReady> {
    let (mut run, _) = started(&by_name("counter")?, Fs::Disk)?;
    let original = run.root;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-stopped"])?;
    let twin = run.restore_inside(tool, &images, &[])?;
    Ok((run, original, twin))
}

fn beside_the_original(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    if inner_pid(twin) != Some(original) {
        return Err(run.fail(format!("{twin} is not {original} inside")).into());
    }
    let state = view::state(original);
    if state != Some('T') {
        return Err(run.fail(format!("the original is in state {state:?}")).into());
    }
    // What /proc says of the twin inside is about itself.
    let own = format!("/proc/{twin}/root/proc/{original}/cmdline");
    if fs::read(&own).ok() != fs::read(format!("/proc/{original}/cmdline")).ok() {
        return Err(run.fail(format!("{own} is not the twin's")).into());
    }
    run.check(&run.view()?)?;
    kill(original, libc::SIGKILL);
    Ok(())
}

/// The init's exit status once it has ended.
fn ended(run: &Run) -> Result<i32, Fail> {
    reaper::wait(run.root, run.mark, TIMEOUT)
        .ok_or_else(|| run.fail(format!("the init {} did not end", run.root)))
}

fn init_passes_signals_on(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    kill(run.root, libc::SIGTERM);
    let status = ended(&run)?;
    kill(original, libc::SIGKILL);
    if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 128 + libc::SIGTERM {
        return Err(run.fail(reaper::describe(status)).into());
    }
    run.gone(&[twin], "after SIGTERM to the init")?;
    Ok(())
}

fn init_takes_all_with_it(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    kill(run.root, libc::SIGKILL);
    ended(&run)?;
    run.gone(&[twin], "after SIGKILL to the init")?;
    if !alive(original) {
        return Err(run.fail("the original is gone too".into()).into());
    }
    kill(original, libc::SIGKILL);
    Ok(())
}
