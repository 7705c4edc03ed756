//! The ways to checkpoint a program: each leads to its own check passing.

use crate::harness::{Fail, Fs, NotReady, Run, Start, Tool};
use crate::netns::Net;
use crate::pools::{HugePages, Hugetlbfs};
use crate::programs::Program;
use crate::view::View;
use libtest_mimic::{Completion, Failed};

/// The outcome of a trial.
pub type Outcome = Result<Completion, Failed>;

/// What a flavour does with a started program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// No checkpoint at all: the program itself is sound.
    Plain,
    /// Dump ends the tree, restore brings it back; three times in a row.
    Dead,
    /// `--leave-running`: the survivor is unharmed, however often.
    Running,
    /// The survivor is killed later and restored from the images it went on beside.
    RunningRestored,
    /// `--leave-stopped` on the dump's side, then resume.
    Stopped,
    /// `--leave-stopped` on either side: restored stopped, then resume.
    StoppedRestored,
    /// As `Dead`, once, under the name `criu`.
    AsCriu,
    /// As `Dead`, once, into a PID namespace of its own: other numbers outside, the same inside.
    NewPidns,
    /// As `Dead`, with memory that comes when it is touched, looked at when all of it is there; then checked while it comes.
    Lazy,
}

impl Flavour {
    /// All of them, with the word that names the trial.
    pub const ALL: &[(Flavour, &str)] = &[
        (Flavour::Plain, "plain"),
        (Flavour::Dead, "dead"),
        (Flavour::Running, "running"),
        (Flavour::RunningRestored, "running_restored"),
        (Flavour::Stopped, "stopped"),
        (Flavour::StoppedRestored, "stopped_restored"),
        (Flavour::AsCriu, "as_criu"),
        (Flavour::NewPidns, "new_pidns"),
        (Flavour::Lazy, "lazy"),
    ];
}

/// Runs one program in one flavour.
pub fn run(program: &Program, tool: &Tool, flavour: Flavour) -> Outcome {
    let done = in_its_net(program, || attempt(program, tool, flavour));
    finish(if program.later { unless_later(done) } else { done })
}

/// Runs the body in a network namespace of its own, if the program asks for one.
pub fn in_its_net(
    program: &Program,
    body: impl FnOnce() -> Result<(), NotReady> + Send,
) -> Result<(), NotReady> {
    let _pages =
        (program.huge_pages > 0).then(|| HugePages::add(program.huge_pages)).transpose()?;
    // One trial at a time: all have it at the same place.
    static MOUNT: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _mounted = if program.hugetlbfs {
        let alone = MOUNT.lock().unwrap_or_else(|e| e.into_inner());
        Some((Hugetlbfs::mount()?, alone))
    } else {
        None
    };
    if !program.private_net {
        return body();
    }
    let net = Net::new().map_err(|e| NotReady::Skip(format!("no network namespace: {e}")))?;
    net.within(|| {
        // ICMP echo sockets for everybody.
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
            .map_err(|e| NotReady::Fail(format!("ping_group_range: {e}")))?;
        body()
    })
    .map_err(NotReady::Fail)?
}

fn attempt(program: &Program, tool: &Tool, flavour: Flavour) -> Result<(), NotReady> {
    match flavour {
        Flavour::Plain => plain(program),
        Flavour::Dead => dead(program, tool, 3),
        Flavour::AsCriu => {
            tool.as_criu().map_err(NotReady::Fail).and_then(|t| dead(program, &t, 1))
        }
        Flavour::NewPidns => new_pidns(program, tool),
        Flavour::Lazy => lazy(program, tool),
        Flavour::Running => survivor(program, tool),
        Flavour::RunningRestored => from_survivor(program, tool),
        Flavour::Stopped => stopped(program, tool),
        Flavour::StoppedRestored => restored_stopped(program, tool),
    }
}

/// Makes a skip of a refusal that says the kind of object is not there yet.
pub fn unless_later(done: Result<(), NotReady>) -> Result<(), NotReady> {
    match done {
        Err(NotReady::Fail(text))
            if (text.contains("rewake: cannot") || text.contains("criu: cannot"))
                && text.contains(" yet") =>
        {
            let line = text.lines().find(|l| l.contains(" yet")).unwrap_or_default();
            // Without what differs each time (process, number, path): one line for each kind.
            Err(NotReady::Skip(line.rsplit("): ").next().unwrap_or(line).trim().to_string()))
        }
        other => other,
    }
}

/// Turns a run's outcome into a trial's.
pub fn finish(done: Result<(), NotReady>) -> Outcome {
    match done {
        Ok(()) => Ok(Completion::Completed),
        Err(NotReady::Skip(why)) => Ok(crate::skip(why)),
        Err(NotReady::Fail(text)) => Err(text.into()),
    }
}

/// Starts a program and looks at its tree once it has settled.
pub fn started(program: &Program, fs: Fs) -> Result<(Run, View), NotReady> {
    settled_start(program, &program.start(), fs)
}

/// The same with a start that was prepared.
pub fn settled_start(program: &Program, start: &Start, fs: Fs) -> Result<(Run, View), NotReady> {
    let run = Run::ready(program.name, start, fs)?;
    program.ask(&run)?;
    let before = settled(&run)?;
    Ok((run, before))
}

/// Looks until two looks in a row agree: some programs still move for an instant after they are ready.
fn settled(run: &Run) -> Result<View, Fail> {
    let mut last = run.view()?;
    for _ in 0..50 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let view = run.view()?;
        if last.diff(&view, &[]).is_empty() {
            break;
        }
        last = view;
    }
    Ok(last)
}

fn plain(program: &Program) -> Result<(), NotReady> {
    let (run, before) = started(program, Fs::Memory)?;
    run.same(&before, "without any checkpoint", &[])?;
    program.ask(&run)?;
    run.check(&before)?;
    let noted = std::fs::read_to_string(run.dir.join("eintr")).unwrap_or_default();
    if noted.is_empty() {
        Ok(())
    } else {
        Err(run.fail(format!("EINTR without a checkpoint: {noted}")).into())
    }
}

fn dead(program: &Program, tool: &Tool, cycles: usize) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Disk)?;
    for cycle in 1..=cycles {
        let images = run.images(cycle)?;
        run.dump(tool, &images, program.dump_options)?;
        run.gone(&before.pids(), &format!("after dump {cycle}"))?;
        run.restore(tool, &images, program.restore_options)?;
        run.same(&before, &format!("after restore {cycle}"), &program.ignored(tool))?;
    }
    program.ask(&run)?;
    run.check(&before)?;
    program.judge_eintr(&run, tool, true)?;
    Ok(())
}

fn survivor(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = started(program, Fs::Memory)?;
    for n in 1..=program.running_dumps {
        run.dump(tool, &run.images(n)?, &with(program.dump_options, "--leave-running"))?;
        run.same(
            &before,
            &format!("after dump {n} with --leave-running"),
            &program.disturbed(tool),
        )?;
    }
    program.ask(&run)?;
    run.check(&before)?;
    program.judge_eintr(&run, tool, false)?;
    Ok(())
}

fn from_survivor(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &with(program.dump_options, "--leave-running"))?;
    run.kill_tree(&before)?;
    run.restore(tool, &images, program.restore_options)?;
    run.same(&before, "after restore from a --leave-running dump", &program.ignored(tool))?;
    program.ask(&run)?;
    run.check(&before)?;
    Ok(())
}

fn stopped(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = started(program, Fs::Memory)?;
    run.dump(tool, &run.images(1)?, &with(program.dump_options, "--leave-stopped"))?;
    run.all_stopped(&before.pids(), "after dump with --leave-stopped")?;
    run.resume(tool, &before.running_pids())?;
    run.same(&before, "after dump with --leave-stopped and resume", &program.disturbed(tool))?;
    program.ask(&run)?;
    run.check(&before)?;
    Ok(())
}

fn restored_stopped(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &with(program.dump_options, "--leave-stopped"))?;
    run.all_stopped(&before.pids(), "after dump with --leave-stopped")?;
    run.kill_tree(&before)?;
    run.restore(tool, &images, &with(program.restore_options, "--leave-stopped"))?;
    run.all_stopped(&before.pids(), "after restore with --leave-stopped")?;
    run.resume(tool, &before.running_pids())?;
    run.same(&before, "after restore with --leave-stopped and resume", &program.ignored(tool))?;
    program.ask(&run)?;
    run.check(&before)?;
    Ok(())
}

fn new_pidns(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU has no --new-pidns".into()));
    }
    if let Some(why) = program.needs_its_pids {
        return Err(NotReady::Skip(why.into()));
    }
    let (mut run, before) = started(program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after the dump")?;
    let inside = run.root;
    let root = run.restore_inside(tool, &images, program.restore_options)?;
    if inner_pid(root) != Some(inside) {
        return Err(run.fail(format!("{root} is not {inside} inside")).into());
    }
    // The init ends as the root ends, when everybody else is gone.
    let tree = run.view()?;
    program.ask(&run)?;
    run.check(&tree)?;
    Ok(())
}

fn lazy(program: &Program, tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU needs a daemon for --lazy-pages".into()));
    }
    let (mut run, before) = started(program, Fs::Memory)?;
    for cycle in 1..=2 {
        let images = run.images(cycle)?;
        run.dump(tool, &images, program.dump_options)?;
        run.gone(&before.pids(), &format!("after dump {cycle}"))?;
        run.restore(tool, &images, &with(program.restore_options, "--lazy-pages"))?;
        if cycle == 1 {
            crate::lazy::all_there(&run, &images)?;
            let ignored = program.ignored(tool);
            run.same(&before, "after a lazy restore", &ignored)?;
        }
    }
    program.ask(&run)?;
    run.check(&before)?;
    crate::lazy::all_there(&run, &run.images(2)?)?;
    Ok(())
}

/// The pid of a process in its own PID namespace.
pub fn inner_pid(pid: i32) -> Option<i32> {
    // Not as UTF-8: a task's name is any bytes.
    let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let line = status.lines().find(|l| l.starts_with("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

/// The program's own options and one more.
pub fn with<'a>(options: &[&'a str], more: &'a str) -> Vec<&'a str> {
    let mut all = options.to_vec();
    all.push(more);
    all
}
