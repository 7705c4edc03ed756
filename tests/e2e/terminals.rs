//! Terminal multiplexers with what runs in them.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Start, Tool, execute, set_mode};
use crate::real::{Scripts, find};
use crate::{trial, view};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The trials.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let (one, other) = (tool.clone(), tool.clone());
    vec![
        trial("terminals::tmux".into(), move || finish(tmux(&one))),
        trial("terminals::screen".into(), move || finish(screen(&other))),
    ]
}

fn until(run: &Run, what: &str, mut holds: impl FnMut() -> bool) -> Result<(), Fail> {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        if Instant::now() > end {
            return Err(run.fail(format!("waited in vain until {what}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// GNU screen with a shell that has a job in the foreground.
fn screen(tool: &Tool) -> Result<(), NotReady> {
    let (screen, bash) = (find("screen")?, find("bash")?);
    let scripts = Scripts::new("screen")?;
    // Nobody else may use the directory of its sockets.
    let sockets = scripts.0.join("sockets");
    fs::create_dir_all(&sockets).map_err(|e| e.to_string())?;
    set_mode(&sockets, 0o700)?;
    let start = Start {
        argv: [
            screen.as_os_str(),
            "-D".as_ref(),
            "-m".as_ref(),
            "-S".as_ref(),
            "zoo".as_ref(),
            "-c".as_ref(),
            "/dev/null".as_ref(),
            bash.as_os_str(),
            "--norc".as_ref(),
            "--noprofile".as_ref(),
        ]
        .map(|s| s.to_owned())
        .to_vec(),
        env: vec![
            ("TERM".into(), "xterm".into()),
            ("SCREENDIR".into(), sockets.to_string_lossy().into_owned()),
        ],
        give_dir: false,
    };
    let mut run = Run::spawn("screen", &start, Fs::Disk)?;
    let (id, dir) = (run.id().to_owned(), run.dir.clone());
    let client = |arguments: &[&str]| -> bool {
        let mut command = Command::new(&screen);
        command.args(["-S", "zoo", "-p", "0", "-X"]).args(arguments);
        command.env("ZOO_RUN", &id).env("SCREENDIR", &sockets).env("TERM", "xterm");
        execute(command, &dir).is_ok_and(|done| done.success())
    };
    let holds = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let (first, out) = (run.dir.join("first"), run.dir.join("out"));
    let line = format!("x=41; echo $$ > {}\n", first.display());
    until(&run, "screen takes what is typed", || {
        client(&["stuff", &line]) && !holds(&first).is_empty()
    })?;
    client(&["stuff", "sleep 1000\n"]);
    let root = run.root;
    until(&run, "the job runs", || view::descendants(root).len() >= 3)?;
    for n in 1..=3 {
        let images = run.images(n)?;
        let pids = view::descendants(root);
        run.dump(tool, &images, &[])?;
        run.gone(&pids, &format!("after dump {n}"))?;
        run.restore(tool, &images, &[])?;
    }
    // The key goes to the group in the foreground, which is the job.
    until(&run, "screen takes a key", || client(&["stuff", "\u{3}"]))?;
    until(&run, "the job is over", || view::descendants(root).len() == 2)?;
    let line = format!("echo $((x+1)) $(tty) > {}\n", out.display());
    client(&["stuff", &line]);
    until(&run, "the shell goes on", || holds(&out).starts_with("42 /dev/pts/"))?;
    client(&["quit"]);
    Ok(())
}

/// A server with a shell in one window and vim in another.
fn tmux(tool: &Tool) -> Result<(), NotReady> {
    let (tmux, bash, vim) = (find("tmux")?, find("bash")?, find("vim")?);
    let socket = format!("rewake-e2e-{}", std::process::id());
    let start = Start {
        argv: [
            tmux.as_os_str(),
            "-D".as_ref(),
            "-f/dev/null".as_ref(),
            "-L".as_ref(),
            socket.as_ref(),
        ]
        .map(|s| s.to_owned())
        .to_vec(),
        env: vec![("TERM".into(), "xterm".into())],
        give_dir: false,
    };
    let mut run = Run::spawn("tmux", &start, Fs::Disk)?;
    let (id, dir) = (run.id().to_owned(), run.dir.clone());
    let client = |arguments: &[&str]| -> Result<String, Fail> {
        let mut command = Command::new(&tmux);
        command.args(["-N", "-f/dev/null", "-L", &socket]).args(arguments).env("ZOO_RUN", &id);
        let done = execute(command, &dir)?;
        match done.success() {
            true => Ok(done.text),
            false => Err(format!("tmux {arguments:?}: {}", done.text)),
        }
    };
    let shell = format!("{} --norc --noprofile", bash.display());
    until(&run, "the server listens", || {
        client(&["new-session", "-d", "-s", "zoo", "-x", "80", "-y", "24", &shell]).is_ok()
    })?;
    let text = run.dir.join("text");
    let editor = format!("{} -u NONE {}", vim.display(), text.display());
    client(&["new-window", "-d", "-t", "zoo:1", &editor])?;
    let shows = |window: &str, wanted: &str| {
        let target = format!("zoo:{window}");
        client(&["capture-pane", "-p", "-t", &target]).is_ok_and(|screen| screen.contains(wanted))
    };
    client(&["send-keys", "-t", "zoo:0", "x=41; PS1='zoo$ '", "Enter"])?;
    until(&run, "there is a prompt", || shows("0", "\nzoo$"))?;
    client(&["send-keys", "-t", "zoo:0", "sleep 1000", "Enter"])?;
    client(&["send-keys", "-t", "zoo:1", "ione line", "Enter", "another"])?;
    until(&run, "vim shows what was typed", || shows("1", "another"))?;
    let running = |run: &Run| view::descendants(run.root).len();
    until(&run, "the job runs", || running(&run) >= 4)?;
    let root = run.root;
    for n in 1..=3 {
        let images = run.images(n)?;
        let pids = view::descendants(root);
        run.dump(tool, &images, &[])?;
        run.gone(&pids, &format!("after dump {n}"))?;
        run.restore(tool, &images, &[])?;
    }
    // The key goes to the group in the foreground, which is the job.
    client(&["send-keys", "-t", "zoo:0", "C-c"])?;
    let out = run.dir.join("out");
    let line = format!("echo $((x+1)) $(tty) > {}", out.display());
    client(&["send-keys", "-t", "zoo:0", &line, "Enter"])?;
    client(&["send-keys", "-t", "zoo:1", " end", "Escape", ":wq", "Enter"])?;
    let holds = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    until(&run, "the shell goes on", || holds(&out).starts_with("42 /dev/pts/"))?;
    until(&run, "vim writes", || holds(&text) == "one line\nanother end\n")?;
    client(&["kill-server"])?;
    Ok(())
}
