//! SIGKILL of the command at random instants. Of a dump: the target goes on as if nothing had been. Of a restore: there
//! is a complete tree or none. `ZOO_KILLS` is the number of kills of a dump (default 200); the others do a quarter.

use crate::flavours::{finish, started};
use crate::harness::{Fail, Fs, NotReady, Run, Tool, alive, exists, kill};
use crate::programs::{Program, by_name};
use crate::reaper;
use crate::view::{self, View};
use crate::{no_excuses, skip, trial_alone};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use zoo::Rng;

/// All trials that kill.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &'static str,
                   body: fn(&Tool, &str) -> Result<(), NotReady>,
                   program: &'static str| {
        let tool = tool.clone();
        all.push(trial_alone(format!("kill::{name}::{program}"), move || {
            if tool.is_criu && !no_excuses() {
                return Ok(skip("CRIU cannot: killed in a dump it leaves its code in the target"));
            }
            finish(body(&tool, program))
        }));
    };
    add("dump_running", dump_running, "counter");
    add("dump_running", dump_running, "sleepers");
    add("dump_running", dump_running, "tree");
    add("dump_running", dump_running, "shared_mm");
    add("dump_running", dump_running, "leader_gone");
    add("dump_dead", dump_dead, "counter");
    add("restore", restore, "counter");
    add("restore", restore, "tree");
    add("restore", restore, "shared_mm");
    all
}

fn kills() -> u64 {
    std::env::var("ZOO_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(200)
}

/// A seed that is told, so that a failing run can be looked at again.
pub fn seed() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| d.as_nanos() as u64)
}

/// Starts the command, kills it after the delay unless it ends before; tells whether it was killed.
pub fn killed_after(mut command: Command, delay: Duration) -> Result<bool, Fail> {
    let mark = reaper::mark();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child =
        command.spawn().map_err(|e| format!("cannot start {:?}: {e}", command.get_program()))?;
    let pid = child.id() as i32;
    // Sleeping is too coarse for instants a few microseconds apart.
    let until = Instant::now() + delay;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    kill(pid, libc::SIGKILL);
    let status = reaper::wait(pid, mark, crate::harness::TIMEOUT)
        .ok_or("the killed command does not end")?;
    Ok(libc::WIFSIGNALED(status))
}

pub fn dump_command(run: &Run, tool: &Tool, images: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(&tool.path);
    command
        .args(["dump", "-t", &run.root.to_string(), "-D"])
        .arg(images)
        .args(["-o", "dump.log", "-v4"]);
    command.args(options);
    command
}

/// How long a whole dump takes: the instants are spread over it and a little more.
fn dump_time(run: &Run, tool: &Tool) -> Result<Duration, Fail> {
    let mut times = Vec::new();
    for n in 0..3 {
        times.push(run.dump(tool, &run.images(1000 + n)?, &["--leave-running"])?.took);
    }
    times.sort();
    Ok(times[1])
}

/// Asks the counter for its numbers by SIGUSR1: still computing, no error, the signal was handled.
struct Pulse {
    asked: u64,
    rounds: u64,
}

impl Pulse {
    fn take(&mut self, run: &Run) -> Result<(), Fail> {
        self.asked += 1;
        kill(run.root, libc::SIGUSR1);
        let until = Instant::now() + crate::harness::TIMEOUT;
        loop {
            let text = fs::read_to_string(run.dir.join("status")).unwrap_or_default();
            let numbers: Vec<u64> =
                text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            if let [rounds, errors, signals] = numbers[..]
                && signals >= self.asked
            {
                if errors != 0 || signals != self.asked || rounds <= self.rounds {
                    return Err(run.fail(format!(
                        "{errors} errors of computation, {signals} signals handled of {} sent, {rounds} rounds after {}",
                        self.asked, self.rounds
                    )));
                }
                self.rounds = rounds;
                return Ok(());
            }
            if Instant::now() > until {
                let at = view::where_blocked(&[run.root]);
                return Err(
                    run.fail(format!("signal {} is not answered: {text:?}; {at}", self.asked))
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn dump_running(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let program = by_name(name)?;
    let (run, before) = started(&program, Fs::Memory)?;
    let whole = dump_time(&run, tool)?;
    let mut pulse = Pulse { asked: 0, rounds: 0 };
    let seed = seed();
    let mut rng = Rng(seed);
    let images = run.images(1)?;
    let mut in_flight = 0;
    for n in 0..kills() {
        let delay = Duration::from_nanos(rng.next() % (whole.as_nanos() as u64 * 12 / 10));
        in_flight +=
            killed_after(dump_command(&run, tool, &images, &["--leave-running"]), delay)? as u64;
        let when = format!("kill {n} (seed {seed}), after {delay:?} of {whole:?},");
        run.same(&before, &when, &[]).map_err(|e| unharmed_or(&run, e, &when))?;
        if name == "counter" && n % 10 == 9 {
            pulse.take(&run).map_err(|e| format!("{when} {e}"))?;
        }
        if n % 20 == 19 {
            clear(&images);
            // Nothing is in the way of a later dump either.
            run.dump(tool, &images, &["--leave-running"])
                .map_err(|e| format!("{when} then: {e}"))?;
            clear(&images);
        }
    }
    if in_flight < kills() / 3 {
        return Err(run
            .fail(format!("only {in_flight} of {} kills met a dump in flight", kills()))
            .into());
    }
    // It can still be dumped and restored as if nothing had been.
    run.dump(tool, &run.images(2)?, &["--leave-running"])?;
    run.check(&before)?;
    judge_eintr_of_killed(&run, tool, kills() / 16)?;
    println!(
        "kill::dump_running::{name}: {in_flight} of {} kills met the dump, which takes {whole:?}",
        kills()
    );
    Ok(())
}

/// A thread in one of the few system calls that the kernel itself does not restart sees `EINTR` if the controller is
/// killed in the microseconds between stopping it and mending that. Nothing else, and no more often than that explains.
pub fn judge_eintr_of_killed(run: &Run, tool: &Tool, excuses: u64) -> Result<(), Fail> {
    if tool.is_criu {
        return Ok(());
    }
    let noted = fs::read_to_string(run.dir.join("eintr")).unwrap_or_default();
    let (excused, bad): (Vec<&str>, Vec<&str>) = noted
        .split(['\n', ' '])
        .filter(|l| !l.is_empty())
        .partition(|l| l.starts_with("sigtimedwait") || l.starts_with("epoll"));
    println!("{} interrupted calls that the kernel does not restart", excused.len());
    if !bad.is_empty() || excused.len() as u64 > excuses {
        return Err(run.fail(format!(
            "system calls felt the killed checkpoints (EINTR): {bad:?}, and {} that the kernel does not restart",
            excused.len()
        )));
    }
    Ok(())
}

fn unharmed_or(run: &Run, text: Fail, when: &str) -> Fail {
    if alive(run.root) { text } else { run.fail(format!("{when} the target is gone")) }
}

fn clear(images: &Path) {
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
    }
}

/// With the default final state the target is unharmed, or it is gone and the images are complete.
fn dump_dead(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let program = by_name(name)?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let whole = dump_time(&run, tool)?;
    let seed = seed();
    let mut rng = Rng(seed);
    let mut died = 0;
    for n in 0..kills() / 4 {
        let images = run.images(10 + n as usize)?;
        let delay = Duration::from_nanos(rng.next() % (whole.as_nanos() as u64 * 12 / 10));
        killed_after(dump_command(&run, tool, &images, &[]), delay)?;
        let when = format!("kill {n} (seed {seed}), after {delay:?} of {whole:?},");
        // Give a target that was just killed the time to go.
        std::thread::sleep(Duration::from_millis(20));
        if !alive(run.root) {
            died += 1;
            run.gone(&before.pids(), &when)?;
            run.restore(tool, &images, program.restore_options)
                .map_err(|e| format!("{when} the target died and {e}"))?;
        }
        run.same(&before, &when, &program.ignored(tool))?;
        let _ = fs::remove_dir_all(&images);
    }
    run.check(&before)?;
    println!(
        "kill::dump_dead::{name}: of {} kills {died} came after the target's end",
        kills() / 4
    );
    Ok(())
}

fn restore(tool: &Tool, name: &str) -> Result<(), NotReady> {
    let program = by_name(name)?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after dump")?;
    let whole = run.restore(tool, &images, program.restore_options)?.took;
    run.kill_tree(&before)?;
    let seed = seed();
    let mut rng = Rng(seed);
    let mut complete = 0;
    for n in 0..kills() / 4 {
        let delay = Duration::from_nanos(rng.next() % (whole.as_nanos() as u64 * 12 / 10));
        let mut command = Command::new(&tool.path);
        command.args(["restore", "-D"]).arg(&images).args(["-d", "-o", "restore.log", "-v4"]);
        killed_after(command, delay)?;
        let when = format!("kill {n} (seed {seed}), after {delay:?} of {whole:?},");
        if all_or_nothing(&run, &before, &program, tool, &when)? {
            complete += 1;
            run.kill_tree(&before)?;
        }
    }
    run.restore(tool, &images, program.restore_options)?;
    run.same(&before, "after all kills and a whole restore", &program.ignored(tool))?;
    run.check(&before)?;
    println!(
        "kill::restore::{name}: of {} kills {complete} came after the restore was complete",
        kills() / 4
    );
    Ok(())
}

/// Whether there is a complete tree (true) or nothing (false); anything between that stays is a failure.
pub fn all_or_nothing(
    run: &Run,
    before: &View,
    program: &Program,
    tool: &Tool,
    when: &str,
) -> Result<bool, Fail> {
    let me = std::process::id() as i32;
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let left: Vec<i32> =
            view::descendants(me).into_iter().filter(|&p| p != me && exists(p)).collect();
        if left.is_empty() && !exists(run.root) {
            return Ok(false);
        }
        let now = View::take(run.root).unwrap_or_default();
        let differences = before.diff(&now, &program.ignored(tool));
        if differences.is_empty() && left.len() == before.pids().len() {
            return Ok(true);
        }
        if Instant::now() > until {
            return Err(run.fail(format!(
                "{when} there is neither a whole tree nor nothing: {}\n{}",
                view::where_blocked(&left),
                differences.join("\n")
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
