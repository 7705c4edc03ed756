//! What the commands do beside saving and restoring: which scripts are called when, what their failure means, and what is
//! said to whoever names the wrong process.

use crate::flavours::{finish, started};
use crate::harness::{
    Done, Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, execute, kill, set_mode,
};
use crate::programs::by_name;
use crate::real::{find, start, wait_for};
use crate::refusals::refused;
use crate::{trial, view};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// All trials about commands.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("commands::{name}"), move || finish(body(&tool))));
    };
    add("thread_named", thread_named);
    add("caller_named", caller_named);
    add("late_parent", late_parent);
    add("scripts", scripts);
    add("scripts_fail", scripts_fail);
    add("exec_cmd", exec_cmd);
    all
}

fn run_command(run: &Run, tool: &Tool, args: &[&str]) -> Result<Done, Fail> {
    let mut command = Command::new(&tool.path);
    command.args(args);
    execute(command, &run.dir)
}

/// A thread's number is no tree: which process it belongs to is said, by every command that takes a pid.
fn thread_named(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU aborts".into()));
    }
    let (run, before) = started(&by_name("threads")?, Fs::Disk)?;
    let images = run.images(1)?;
    let tid = view::tasks_of(run.root).into_iter().find(|&t| t != run.root);
    let tid = tid.ok_or_else(|| run.fail("it has no second thread".into()))?.to_string();
    let root = run.root.to_string();
    let images_dir = images.to_string_lossy().into_owned();
    let dump = ["dump", "-t", &tid, "-D", &images_dir];
    for command in [&dump[..], &["check", "-t", &tid], &["resume", &tid]] {
        let done = run_command(&run, tool, command)?;
        refused(&run, tool, &done, &images.join("none"), &[&tid, "thread", &root])?;
        run.same(&before, &format!("after {}", command[0]), &[])?;
    }
    run.check(&before)?;
    Ok(())
}

/// Neither the command nor who waits for it can be saved.
fn caller_named(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = started(&by_name("sleepers")?, Fs::Disk)?;
    let images = run.images(1)?;
    for pid in [std::process::id() as i32, 1] {
        let done = run.try_dump(tool, pid, &images, &[])?;
        let words = [&pid.to_string()[..], "started it"];
        // Whoever is not below process 1 of its PID namespace may have another reason.
        let words = if pid == 1 { &words[..1] } else { &words[..] };
        refused(&run, tool, &done, &images.join("dump.log"), words)?;
    }
    run.check(&before)?;
    Ok(())
}

/// Starts a child in a session of its own and never waits for it.
const LATE: &str = r#"
setsid sleep 1000 </dev/null >/dev/null 2>&1 &
echo $! > "$1/pid"
exec sleep 1000
"#;

/// A pid whose dead holder is not reaped yet is waited for, and not for ever.
fn late_parent(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU does not wait".into()));
    }
    let (sh, _) = (find("sh")?, find("setsid")?);
    let start = start(&[&sh, Path::new("-c"), Path::new(LATE), Path::new("late")]);
    let run = Run::spawn("late_parent", &start, Fs::Disk)?;
    let pid = wait_for(&run, "pid", |text| text.ends_with('\n'))?;
    let pid: i32 = pid.trim().parse().map_err(|e| run.fail(format!("pid: {e}")))?;
    // Until it is the other program, in the session of its own.
    let until = Instant::now() + TIMEOUT;
    while fs::read(format!("/proc/{pid}/comm")).unwrap_or_default() != b"sleep\n" {
        if Instant::now() > until {
            return Err(run.fail("setsid sleep did not start".into()).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let images = run.images(1)?;
    let done = run.try_dump(tool, pid, &images, &[])?;
    if !done.success() {
        return Err(run.fail(format!("dump failed: {}", done.text)).into());
    }
    let done = run.try_restore(tool, &images, &[])?;
    let parent = run.root.to_string();
    let words = [&pid.to_string()[..], "reaped by", &parent];
    refused(&run, tool, &done, &images.join("restore.log"), &words)?;
    // The parent's end leaves it to us, who reap at once.
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            kill(run.root, libc::SIGKILL);
        });
        run.try_restore(tool, &images, &[])
    })?;
    if !done.success() || !alive(pid) {
        return Err(run.fail(format!("restore failed: {}", done.text)).into());
    }
    Ok(())
}

/// A script that notes when it is called, and for whom; it fails where it is told to.
/// What the restoring process becomes is the parent of the tree; descriptors that it is told to close are closed.
fn exec_cmd(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name("sleepers")?, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let said = run.dir.join("said");
    let script = format!(
        "grep '^PPid' /proc/{}/status; echo $$; test -e /proc/self/fd/7 || echo closed",
        run.root
    );
    let restore = |run: &mut Run, close: &str, program: &str| {
        run.begin_anew();
        let mut command = Command::new("/bin/sh");
        let line = "\"$0\" restore -D \"$1\" --close $2 --exec-cmd -- \"$3\" -c \"$4\" 7</dev/null >\"$5\"";
        command.args(["-c", line]).arg(&tool.path).arg(&images);
        command.args([close, program, &script]).arg(&said);
        execute(command, &run.dir)
    };
    // Without the descriptor nothing is restored, without the command everything is.
    let done = restore(&mut run, "8", "/bin/sh")?;
    if !tool.is_criu {
        refused(&run, tool, &done, &images.join("none"), &["--close 8"])?;
        run.gone(&before.pids(), "after --close of what is not open")?;
    }
    let done = restore(&mut run, "7", "/bin/sh")?;
    let text = fs::read_to_string(&said).unwrap_or_default();
    let lines: Vec<&str> = text.split_whitespace().collect();
    match lines[..] {
        ["PPid:", parent, shell, "closed"] if parent == shell && done.success() => {}
        _ => return Err(run.fail(format!("it became: {text}; {}", done.text)).into()),
    }
    // The tree is there even if the command is not.
    run.dump(tool, &run.images(2)?, &[])?;
    run.gone(&before.pids(), "after the second dump")?;
    let done = restore(&mut run, "7", "/no/such/program")?;
    refused(&run, tool, &done, &images.join("none"), &["/no/such/program"])?;
    run.check(&before)?;
    Ok(())
}

fn script(run: &Run) -> Result<PathBuf, Fail> {
    let path = run.dir.join("script");
    let text = "#!/bin/sh\n\
        dir=$(dirname \"$0\")\n\
        echo \"$CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID-none}\" >> \"$dir/called\"\n\
        [ \"$CRTOOLS_SCRIPT_ACTION\" != \"$(cat \"$dir/fail\" 2>/dev/null)\" ]\n";
    fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    set_mode(&path, 0o755)?;
    Ok(path)
}

fn called(run: &Run) -> String {
    let path = run.dir.join("called");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(path);
    text.lines().collect::<Vec<_>>().join(", ")
}

fn scripts(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name("sleepers")?, Fs::Disk)?;
    let script = script(&run)?;
    let options = ["--action-script", &script.to_string_lossy()];
    let images = run.images(1)?;
    let root = run.root;
    run.dump(tool, &images, &options)?;
    run.gone(&before.pids(), "after the dump")?;
    let dumped = called(&run);
    if dumped != format!("pre-dump {root}, post-dump {root}") {
        return Err(run.fail(format!("the dump called: {dumped}")).into());
    }
    // A tree without namespaces of its own has none to be set up, and no network to be unlocked.
    run.restore(tool, &images, &options)?;
    let restored = called(&run);
    let wanted =
        format!("pre-restore none, post-restore {root}, pre-resume {root}, post-resume {root}");
    if restored != wanted {
        return Err(run.fail(format!("the restore called: {restored}")).into());
    }
    run.check(&before)?;
    if tool.is_criu {
        return Ok(());
    }
    // With a PID namespace of its own: the scripts are told of its init, then of the tree.
    let (mut run, before) = started(&by_name("sleepers")?, Fs::Disk)?;
    let script = self::script(&run)?;
    let options = ["--action-script", &script.to_string_lossy()];
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let pid = run.restore_inside(tool, &images, &options)?;
    let (init, restored) = (run.root, called(&run));
    let wanted = format!(
        "pre-restore none, setup-namespaces {init}, post-setup-namespaces {pid}, post-restore {pid}, \
         pre-resume {pid}, post-resume {pid}"
    );
    if restored != wanted {
        return Err(run.fail(format!("the restore --new-pidns called: {restored}")).into());
    }
    kill(init, libc::SIGKILL);
    run.gone(&[init, pid], "after SIGKILL to the init")?;
    Ok(())
}

/// What a script's failure means: the dump is off, the images are there but the tree runs on, the restore is off, or
/// nothing.
fn scripts_fail(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name("sleepers")?, Fs::Disk)?;
    let script = script(&run)?;
    let options = ["--action-script", &script.to_string_lossy()];
    let fail_at = |run: &Run, name: &str| {
        fs::write(run.dir.join("fail"), name).map_err(|e| format!("fail: {e}"))
    };
    let images = run.images(1)?;
    for (name, code, complete) in [("pre-dump", 1, false), ("post-dump", 255, true)] {
        fail_at(&run, name)?;
        let done = run.try_dump(tool, run.root, &images, &options)?;
        let there = images.join("inventory.img").exists();
        if done.status != code << 8 || there != complete {
            return Err(run
                .fail(format!("{name}: status {:#x}, images {there}: {}", done.status, done.text))
                .into());
        }
        run.same(&before, &format!("after {name} failed"), &[])?;
    }
    fail_at(&run, "network-lock")?;
    let images = run.images(2)?;
    run.dump(tool, &images, &options)?;
    run.gone(&before.pids(), "after the dump")?;
    for name in ["pre-restore", "post-restore"] {
        fail_at(&run, name)?;
        let done = run.try_restore(tool, &images, &options)?;
        refused(&run, tool, &done, &images.join("restore.log"), &["script", name])?;
        run.gone(&before.pids(), &format!("after {name} failed"))?;
    }
    // Too late to stop anything.
    for name in ["pre-resume", "post-resume"] {
        fail_at(&run, name)?;
        run.restore(tool, &images, &options)?;
        let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
        if !tool.is_criu && !log.contains(name) {
            return Err(run.fail(format!("{name} failed, and nobody says so")).into());
        }
        if name == "pre-resume" {
            run.kill_tree(&before)?;
        }
    }
    run.check(&before)?;
    Ok(())
}
