//! A job of an interactive shell on a terminal: `--shell-job`.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Start, TIMEOUT, Tool, alive, tail};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The trial.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let tool = tool.clone();
    vec![trial("shell_job::bash".into(), move || finish(shell_job(&tool)))]
}

/// A terminal whose other end the test holds, and what came out of it so far.
struct Terminal {
    master: File,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    /// Opens a terminal and runs an interactive bash on it, leader of its own session.
    fn with_bash(run: &Run) -> Result<Terminal, Fail> {
        let (mut master, mut slave) = (0, 0);
        let none = std::ptr::null_mut();
        // SAFETY: two out-parameters; no name, no settings, no size.
        if unsafe {
            libc::openpty(&mut master, &mut slave, none, std::ptr::null(), std::ptr::null())
        } != 0
        {
            return Err(format!("openpty: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the two are ours and open; the files own them from here.
        let (master, slave) = unsafe {
            libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
            libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
            (File::from_raw_fd(master), File::from_raw_fd(slave))
        };
        let copy = || slave.try_clone().map_err(|e| e.to_string());
        let mut bash = Command::new("bash");
        bash.args(["--norc", "--noprofile", "-i"]).stdin(copy()?).stdout(copy()?).stderr(copy()?);
        bash.env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("PS1", "zoo$ ");
        bash.env("ZOO_RUN", run.id()).env("TERM", "dumb").current_dir("/");
        // SAFETY: both calls are async-signal-safe; standard input is the terminal.
        unsafe {
            bash.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        bash.spawn().map_err(|e| format!("bash: {e}"))?;
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut from, into) = (master.try_clone().map_err(|e| e.to_string())?, shown.clone());
        std::thread::spawn(move || {
            let mut buf = [0u8; 4096];
            while let Ok(n) = from.read(&mut buf) {
                into.lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .push_str(&String::from_utf8_lossy(&buf[..n]));
                if n == 0 {
                    break;
                }
            }
        });
        Ok(Terminal { master, shown })
    }

    fn type_in(&mut self, line: &str) -> Result<(), Fail> {
        self.master.write_all(format!("{line}\n").as_bytes()).map_err(|e| format!("typing: {e}"))
    }

    fn text(&self) -> String {
        self.shown.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Waits until something holds; the failure shows the screen.
    fn until(&self, what: &str, holds: impl Fn(&str) -> bool) -> Result<(), Fail> {
        let until = Instant::now() + TIMEOUT;
        while !holds(&self.text()) {
            if Instant::now() > until {
                return Err(format!(
                    "waited in vain until {what}; the terminal shows:\n{}",
                    self.text()
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn shell_job(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("shell_job")?;
    // The run's own process is only there to have a directory and an end.
    let keeper =
        Start { argv: vec!["sleep".into(), "1000".into()], env: Vec::new(), give_dir: false };
    let run = Run::spawn("shell_job", &keeper, Fs::Disk)?;
    let mut terminal = Terminal::with_bash(&run)?;
    terminal.until("there is a prompt", |t| t.contains("zoo$ "))?;
    terminal.type_in(&format!("{} {}", program.path, run.dir.display()))?;
    let ready = run.dir.join("ready");
    terminal.until("the job is ready", |_| ready.exists())?;
    let pid: i32 = std::fs::read_to_string(&ready)
        .unwrap_or_default()
        .parse()
        .map_err(|e| format!("ready: {e}"))?;
    for n in 1..=2 {
        let images = run.images(n)?;
        // Without the option it is refused: the terminal and the session are the shell's.
        if n == 1 {
            let done = run.try_dump(tool, pid, &images, &[])?;
            if done.success() || !alive(pid) {
                return Err("a job of a shell was dumped without --shell-job".to_string().into());
            }
        }
        let done = run.try_dump(tool, pid, &images, &["--shell-job"])?;
        if !done.success() {
            return Err(format!(
                "dump failed: {}\n{}",
                done.text,
                tail("dump.log", &images.join("dump.log"))
            )
            .into());
        }
        run.gone(&[pid], "after dump")?;
        let prompts = terminal.text().matches("zoo$ ").count();
        terminal.type_in("")?;
        terminal
            .until("the shell has its terminal back", |t| t.matches("zoo$ ").count() > prompts)?;
        let (bin, dir) = (tool.path.display(), images.display());
        terminal.type_in(&format!("{bin} restore -D {dir} --shell-job -o restore.log -v4"))?;
        let log = images.join("restore.log");
        terminal
            .until("the job is back", |_| alive(pid))
            .map_err(|e| format!("{e}\n{}", tail("log", &log)))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    std::fs::write(run.dir.join("check"), "").map_err(|e| e.to_string())?;
    terminal.until("the job asks", |t| t.contains("who types?"))?;
    terminal.type_in("somebody")?;
    let result = run.dir.join("result");
    terminal.until("there is a result", |_| result.exists())?;
    let text = std::fs::read_to_string(&result).unwrap_or_default();
    run.gone(&[pid], "after the check")?;
    if text == "PASS" {
        Ok(())
    } else {
        Err(format!("{text}; the terminal shows:\n{}", terminal.text()).into())
    }
}
