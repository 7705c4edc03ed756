//! One run of one program: start, ready, dump, restore, resume, check, clean up.

use crate::ports::Ports;
use crate::reaper::{self, Mark};
use crate::view::{self, View};
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// No single step may take longer.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Text of a failure.
pub type Fail = String;

/// A checkpoint/restore command under test: rewake, or CRIU.
#[derive(Clone, Debug)]
pub struct Tool {
    /// What is executed.
    pub path: PathBuf,
    /// Whether it is CRIU itself, which has no `resume` and other known limits.
    pub is_criu: bool,
}

impl Tool {
    /// The binary of this path; it is CRIU if its real name, symlinks followed, is `criu`.
    pub fn new(path: PathBuf) -> Tool {
        let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        Tool {
            is_criu: real.file_name().is_some_and(|n| n.to_string_lossy().starts_with("criu")),
            path,
        }
    }

    /// The same under the name `criu`, through a symlink kept for the whole run.
    pub fn as_criu(&self) -> Result<Tool, Fail> {
        static LINK: OnceLock<Result<PathBuf, Fail>> = OnceLock::new();
        let link = LINK.get_or_init(|| {
            let dir = base(Fs::Disk).join(format!("rewake-e2e-{}-bin", std::process::id()));
            fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            let link = dir.join("criu");
            std::os::unix::fs::symlink(&self.path, &link)
                .map_err(|e| format!("{}: {e}", link.display()))?;
            Ok(link)
        });
        Ok(Tool { path: link.clone()?, is_criu: self.is_criu })
    }
}

/// Which file system a run's directory is on.
#[derive(Clone, Copy, Debug)]
pub enum Fs {
    /// `$TMPDIR` or /tmp.
    Disk,
    /// /dev/shm, a tmpfs.
    Memory,
}

/// Where run directories are made.
pub fn base(fs: Fs) -> PathBuf {
    match fs {
        Fs::Memory if Path::new("/dev/shm").is_dir() => PathBuf::from("/dev/shm"),
        _ => std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from),
    }
}

/// What a finished command left.
#[derive(Debug)]
pub struct Done {
    /// Raw wait status.
    pub status: i32,
    /// Standard output and error.
    pub text: String,
    /// Wall time.
    pub took: Duration,
}

impl Done {
    /// Whether it exited with 0.
    pub fn success(&self) -> bool {
        self.status == 0
    }
}

/// How to start a program.
#[derive(Clone, Debug)]
pub struct Start {
    /// Executable and its arguments; the run's directory is appended.
    pub argv: Vec<OsString>,
    /// Added to the environment.
    pub env: Vec<(String, String)>,
    /// Whether to append the directory as an argument.
    pub give_dir: bool,
}

impl Start {
    /// A zoo program.
    pub fn program(path: &str) -> Start {
        Start { argv: vec![path.into()], env: Vec::new(), give_dir: true }
    }
}

/// A started program in its directory.
#[derive(Debug)]
pub struct Run {
    /// The program's directory.
    pub dir: PathBuf,
    /// The root of the tree.
    pub root: i32,
    /// Since when exits of `root` count.
    pub mark: Mark,
    id: String,
    keep: bool,
    ports: Ports,
}

static RUNS: AtomicU64 = AtomicU64::new(0);

/// Why a run did not start.
#[derive(Debug)]
pub enum NotReady {
    /// The machine lacks something: why.
    Skip(String),
    /// It failed.
    Fail(Fail),
}

impl From<Fail> for NotReady {
    fn from(text: Fail) -> Self {
        NotReady::Fail(text)
    }
}

impl Run {
    /// Makes a fresh directory and starts the program in it, detached: own session, /dev/null as standard input, `log`
    /// in the directory as output. Does not wait for it.
    pub fn spawn(name: &str, start: &Start, fs: Fs) -> Result<Run, Fail> {
        let id = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        let dir = base(fs).join(format!("rewake-e2e-{id}-{name}"));
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        // Programs that drop to another user still have to write here.
        set_mode(&dir, 0o777)?;
        let log = fs::File::create(dir.join("log")).map_err(|e| format!("log: {e}"))?;
        let (out, err) = (log.try_clone(), log.try_clone());
        let (out, err) = (out.map_err(|e| e.to_string())?, err.map_err(|e| e.to_string())?);
        let (first, rest) = start.argv.split_first().ok_or("empty command")?;
        let mut command = Command::new(first);
        command.args(rest).stdin(Stdio::null()).stdout(out).stderr(err).current_dir("/");
        if start.give_dir {
            command.arg(&dir);
        }
        // A small environment, the same on every machine but for these two.
        command
            .env_clear()
            .envs(["PATH", "HOME"].iter().filter_map(|v| Some((v, std::env::var_os(v)?))));
        let ports = Ports::claim()?;
        command
            .env("ZOO_RUN", &id)
            .envs(
                ["ZOO_TABLE", "ZOO_THREADS"].iter().filter_map(|v| Some((v, std::env::var_os(v)?))),
            )
            .env("ZOO_PORTS", ports.first.to_string())
            .envs(start.env.iter().map(|(k, v)| (k, v)));
        // What whoever started the tests left open (a lock, a pipe) is not the program's.
        // SAFETY: both calls are async-signal-safe and the closure touches nothing else.
        unsafe {
            command.pre_exec(|| {
                if libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) < 0
                    || libc::setsid() < 0
                    // Under nohup(1), stopped children of a killed program would go on instead of ending.
                    || libc::signal(libc::SIGHUP, libc::SIG_DFL) == libc::SIG_ERR
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mark = reaper::mark();
        let until = Instant::now() + Duration::from_secs(2);
        let child = loop {
            match command.spawn() {
                // A trial beside this one has forked while the file was being copied: its child has it open until it executes.
                Err(e) if e.raw_os_error() == Some(libc::ETXTBSY) && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                started => break started.map_err(|e| format!("cannot start {first:?}: {e}"))?,
            }
        };
        // The child is waited for by the reaper; dropping the handle neither kills nor waits.
        Ok(Run {
            root: child.id() as i32,
            mark,
            dir,
            id,
            ports,
            keep: std::env::var_os("ZOO_KEEP").is_some(),
        })
    }

    /// Starts a zoo program and waits until it says it is ready.
    pub fn ready(name: &str, start: &Start, fs: Fs) -> Result<Run, NotReady> {
        let run = Run::spawn(name, start, fs)?;
        let until = Instant::now() + TIMEOUT;
        loop {
            if run.dir.join("ready").exists() {
                break;
            }
            if let Ok(why) = fs::read_to_string(run.dir.join("skip")) {
                return Err(NotReady::Skip(why));
            }
            if let Ok(text) = fs::read_to_string(run.dir.join("result")) {
                return Err(run.fail(format!("failed before it was ready: {text}")).into());
            }
            if let Some(status) = reaper::wait(run.root, run.mark, Duration::ZERO)
                && !run.dir.join("skip").exists()
                && !run.dir.join("result").exists()
            {
                return Err(run
                    .fail(format!("ended before it was ready: {}", reaper::describe(status)))
                    .into());
            }
            if Instant::now() > until {
                return Err(run.fail("not ready in time".into()).into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(run)
    }

    /// What marks every process of this run (the variable ZOO_RUN of its environment).
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The first of the ports that are the run's own, in its network namespace (`ZOO_PORTS`).
    pub fn ports(&self) -> u16 {
        self.ports.first
    }

    /// Directory for the n-th set of images; made if missing.
    pub fn images(&self, n: usize) -> Result<PathBuf, Fail> {
        let dir = self.dir.join(format!("img.{n}"));
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(dir)
    }

    /// Runs `dump` on the root; fails unless it exits 0.
    pub fn dump(&self, tool: &Tool, images: &Path, extra: &[&str]) -> Result<Done, Fail> {
        let done = self.try_dump(tool, self.root, images, extra)?;
        if !done.success() {
            return Err(self.fail(format!(
                "dump failed: {}\n{}{}",
                reaper::describe(done.status),
                indent("output", &done.text),
                tail("dump.log", &images.join("dump.log"))
            )));
        }
        Ok(done)
    }

    /// Runs `dump` on a process and tells how it ended.
    pub fn try_dump(
        &self,
        tool: &Tool,
        pid: i32,
        images: &Path,
        extra: &[&str],
    ) -> Result<Done, Fail> {
        let mut command = Command::new(&tool.path);
        command.args(["dump", "-t", &pid.to_string(), "-D"]).arg(images);
        command.args(["-o", "dump.log", "-v4"]).args(extra);
        execute(command, &self.dir)
    }

    /// Runs `restore`; fails unless it exits 0 and the root is there.
    pub fn restore(&mut self, tool: &Tool, images: &Path, extra: &[&str]) -> Result<Done, Fail> {
        self.restore_with(tool, images, extra, |_| {})
    }

    /// The same, with a command that was prepared.
    pub fn restore_with(
        &mut self,
        tool: &Tool,
        images: &Path,
        extra: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Done, Fail> {
        self.begin_anew();
        let done = self.try_restore_with(tool, images, extra, prepare)?;
        if !done.success() {
            return Err(self.fail(format!(
                "restore failed: {}\n{}{}",
                reaper::describe(done.status),
                indent("output", &done.text),
                tail("restore.log", &images.join("restore.log"))
            )));
        }
        if !alive(self.root) {
            let status = reaper::wait(self.root, self.mark, Duration::from_millis(200));
            return Err(self.fail(format!(
                "restore said it succeeded, but {} is gone ({})\n{}",
                self.root,
                status.map_or("status unknown".into(), reaper::describe),
                tail("restore.log", &images.join("restore.log"))
            )));
        }
        Ok(done)
    }

    /// What has ended until now is not what the program's check is about.
    pub fn begin_anew(&mut self) {
        self.mark = reaper::mark();
    }

    /// Runs `restore --new-pidns`; from now on the run's root is the namespace's init, which is a child of ours and ends
    /// as the tree's root ends. Returns the pid of that, as it is outside.
    pub fn restore_inside(
        &mut self,
        tool: &Tool,
        images: &Path,
        extra: &[&str],
    ) -> Result<i32, Fail> {
        self.mark = reaper::mark();
        let pidfile = self.dir.join("restored.pid");
        let pidfile = pidfile.to_str().ok_or("the directory's name is no text")?;
        let mut options = vec!["--new-pidns", "--pidfile", pidfile];
        options.extend(extra);
        let done = self.try_restore(tool, images, &options)?;
        let pid = fs::read_to_string(pidfile).ok().and_then(|text| text.parse().ok());
        let (true, Some(pid)) = (done.success(), pid) else {
            return Err(self.fail(format!(
                "restore --new-pidns failed: {}\n{}{}",
                reaper::describe(done.status),
                indent("output", &done.text),
                tail("restore.log", &images.join("restore.log"))
            )));
        };
        self.root = view::parent(pid).ok_or_else(|| self.fail(format!("{pid} is gone")))?;
        Ok(pid)
    }

    /// Runs `restore -d` and tells how it ended.
    pub fn try_restore(&self, tool: &Tool, images: &Path, extra: &[&str]) -> Result<Done, Fail> {
        self.try_restore_with(tool, images, extra, |_| {})
    }

    /// The same, with a command that was prepared.
    pub fn try_restore_with(
        &self,
        tool: &Tool,
        images: &Path,
        extra: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Done, Fail> {
        let mut command = Command::new(&tool.path);
        command.args(["restore", "-D"]).arg(images);
        command.args(["-d", "-o", "restore.log", "-v4"]).args(extra);
        prepare(&mut command);
        execute(command, &self.dir)
    }

    /// Lets a stopped tree go on: `rewake resume`; for CRIU, which has no such command, SIGCONT to the tasks given.
    pub fn resume(&self, tool: &Tool, stopped_by_checkpoint: &[i32]) -> Result<(), Fail> {
        if tool.is_criu {
            for &pid in stopped_by_checkpoint {
                kill(pid, libc::SIGCONT);
            }
            return Ok(());
        }
        let mut command = Command::new(&tool.path);
        command.args(["resume", &self.root.to_string()]);
        let done = execute(command, &self.dir)?;
        if !done.success() {
            return Err(self.fail(format!(
                "resume failed: {}\n{}",
                reaper::describe(done.status),
                indent("output", &done.text)
            )));
        }
        Ok(())
    }

    /// Asks the program to check itself; fails unless it passes, exits 0 and the whole tree goes away.
    pub fn check(&self, view: &View) -> Result<(), Fail> {
        fs::write(self.dir.join("check"), "").map_err(|e| format!("check: {e}"))?;
        let Some(status) = reaper::wait(self.root, self.mark, TIMEOUT) else {
            return Err(
                self.fail(format!("no result in time; {}", view::where_blocked(&view.tids())))
            );
        };
        let text = fs::read_to_string(self.dir.join("result")).unwrap_or_default();
        if text != "PASS" || status != 0 {
            return Err(self
                .fail(format!("the program's own check: {text:?}, {}", reaper::describe(status))));
        }
        self.gone(&view.pids(), "after the check")
    }

    /// Waits until every one of the processes is gone, zombies included.
    pub fn gone(&self, pids: &[i32], when: &str) -> Result<(), Fail> {
        let until = Instant::now() + TIMEOUT;
        loop {
            let left: Vec<i32> = pids.iter().copied().filter(|&p| exists(p)).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(
                    self.fail(format!("still there {when}: {}", view::where_blocked(&left)))
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the tree outright and waits until it is gone.
    pub fn kill_tree(&self, view: &View) -> Result<(), Fail> {
        // An exiting SCHED_IDLE thread may keep its id taken for long on a busy machine: let it end like any other.
        let plain = libc::sched_param { sched_priority: 0 };
        for tid in view.tids() {
            // SAFETY: integers and a local; the images are already written, so this changes nothing under test.
            unsafe { libc::sched_setscheduler(tid, libc::SCHED_OTHER, &plain) };
        }
        // All at once, so that none can react to the end of another.
        for signal in [libc::SIGSTOP, libc::SIGKILL] {
            view.pids().into_iter().for_each(|pid| kill(pid, signal));
        }
        self.gone(&view.pids(), "after SIGKILL")
    }

    /// The tree as seen from outside now.
    pub fn view(&self) -> Result<View, Fail> {
        View::take(self.root).map_err(|e| self.fail(e))
    }

    /// Fails unless the tree soon looks as in `before` (values that flicker get a moment to come back).
    pub fn same(&self, before: &View, when: &str, ignore: &[&str]) -> Result<(), Fail> {
        let until = Instant::now() + Duration::from_millis(1500);
        loop {
            let after = View::take(self.root).unwrap_or_default();
            let differences = before.diff(&after, ignore);
            if differences.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(self.fail(format!(
                    "{when} the tree looks different from outside:\n{}",
                    differences.join("\n")
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until every process of the tree is stopped (or was so before).
    pub fn all_stopped(&self, pids: &[i32], when: &str) -> Result<(), Fail> {
        let until = Instant::now() + TIMEOUT;
        loop {
            let running: Vec<i32> = pids
                .iter()
                .copied()
                .filter(|&p| {
                    view::tasks_of(p).iter().any(|&t| !matches!(view::state(t), Some('T' | 'Z')))
                })
                .collect();
            if running.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(
                    self.fail(format!("not stopped {when}: {}", view::where_blocked(&running)))
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The failure with everything that helps: the program's log and where its files are.
    pub fn fail(&self, text: Fail) -> Fail {
        let mut text = text;
        if !text.contains("\n  log:") {
            text.push('\n');
            text.push_str(&tail("log", &self.dir.join("log")));
        }
        text
    }

    /// Every process that carries this run's mark in its environment: also those the harness lost sight of.
    pub fn leftovers(&self) -> Vec<i32> {
        let wanted = format!("ZOO_RUN={}", self.id);
        let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
        proc.flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let environ =
                    fs::read(format!("/proc/{}/environ", view::living(*pid))).unwrap_or_default();
                // A root whose environment came back empty must not stand in the way of all that follows.
                let lost = *pid == self.root && environ.first() == Some(&0);
                lost || environ.split(|&b| b == 0).any(|v| v == wanted.as_bytes())
            })
            .collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for pid in self.leftovers() {
            kill(pid, libc::SIGKILL);
        }
        if !self.keep {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Runs a command to its end (killed after the timeout), standard output and error together in `Done::text`.
pub fn execute(command: Command, dir: &Path) -> Result<Done, Fail> {
    execute_for(command, dir, TIMEOUT * 3)
}

/// Like [`execute`] with a time limit of its own.
pub fn execute_for(mut command: Command, dir: &Path, limit: Duration) -> Result<Done, Fail> {
    static OUTPUTS: AtomicU64 = AtomicU64::new(0);
    let out = dir.join(format!("out.{}", OUTPUTS.fetch_add(1, Ordering::Relaxed)));
    let file = fs::File::create(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let err = file.try_clone().map_err(|e| e.to_string())?;
    command.stdin(Stdio::null()).stdout(file).stderr(err);
    let mark = reaper::mark();
    let begun = Instant::now();
    let what = format!("{:?}", command.get_program());
    let child = command.spawn().map_err(|e| format!("cannot start {what}: {e}"))?;
    let pid = child.id() as i32;
    let status = reaper::wait(pid, mark, limit);
    let took = begun.elapsed();
    let status = match status {
        Some(status) => status,
        None => {
            let blocked = view::where_blocked(&[pid]);
            kill(pid, libc::SIGKILL);
            reaper::wait(pid, mark, TIMEOUT);
            let text = fs::read_to_string(&out).unwrap_or_default();
            return Err(format!(
                "{command:?} did not end within {limit:?}: {blocked}\n{}",
                indent("output", &text)
            ));
        }
    };
    let text = String::from_utf8_lossy(&fs::read(&out).unwrap_or_default()).into_owned();
    let _ = fs::remove_file(&out);
    Ok(Done { status, text, took })
}

/// At the end: whatever failed trials left below this process, and the run's files.
pub fn sweep() {
    let me = std::process::id() as i32;
    let keep = std::env::var_os("ZOO_KEEP").is_some();
    for pid in view::descendants(me).into_iter().filter(|&p| p != me) {
        kill(pid, libc::SIGKILL);
    }
    let ours = format!("rewake-e2e-{me}-");
    for dir in [base(Fs::Disk), base(Fs::Memory)].into_iter().filter(|_| !keep) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&ours) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Sends a signal; a process that is gone is no error.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: takes integers only.
    unsafe { libc::kill(pid, signal) };
}

/// Whether the pid is in use, be it by a zombie.
pub fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Whether the process is there and no zombie: whether any thread of it is.
pub fn alive(pid: i32) -> bool {
    let is_alive = |tid| !matches!(view::state(tid), None | Some('Z' | 'X'));
    view::tasks_of(pid).into_iter().any(is_alive)
}

/// Sets a file's permission bits.
pub fn set_mode(path: &Path, mode: u32) -> Result<(), Fail> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| format!("{}: {e}", path.display()))
}

/// The end of a file, indented, for a failure's text.
pub fn tail(name: &str, path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    // Of a long log the complaints matter most: CRIU writes "Error (" and "Warn  (", rewake the same levels.
    let lines: Vec<&str> = text.lines().collect();
    let loud = lines
        .iter()
        .filter(|l| l.contains("Error") || l.contains("error"))
        .copied()
        .collect::<Vec<_>>();
    let mut shown: Vec<&str> = loud.iter().rev().take(10).rev().copied().collect();
    if !shown.is_empty() && lines.len() > 15 {
        shown.push("…");
    }
    shown.extend(lines.iter().rev().take(15).rev());
    indent(name, &shown.join("\n"))
}

fn indent(name: &str, text: &str) -> String {
    if text.trim().is_empty() {
        return format!("  {name}: (empty)\n");
    }
    let lines: Vec<String> = text.trim_end().lines().map(|l| format!("    {l}")).collect();
    format!("  {name}:\n{}\n", lines.join("\n"))
}
