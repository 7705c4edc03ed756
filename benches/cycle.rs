//! One run: a fresh subject, a dump, a restore, and the comparison of the two.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rewake_image::kind::STATS_DUMP;

use crate::case::Case;
use crate::tree::{self, Snapshot};
use crate::{machine, subject, watchdog};

/// A command that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command under test.
#[derive(Debug)]
pub struct Tool {
    /// What its column is called.
    pub name: &'static str,
    /// What is executed.
    pub path: PathBuf,
}

/// The times of one run.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// The dump command, from its start to its exit.
    pub dump: Duration,
    /// How long the subject stood still, as `stats-dump` says.
    pub frozen: Duration,
    /// The restore command, from its start to its exit.
    pub restore: Duration,
    /// What the checkpoint took beside time, if the case looks at that.
    pub memory: Option<Memory>,
}

/// Sizes in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// All images.
    pub images: u64,
    /// The tree's memory before the dump, each page divided by the number of its users.
    pub before: u64,
    /// The same after the restore.
    pub after: u64,
}

impl Tool {
    /// A command of that path.
    pub fn new(name: &'static str, path: &Path) -> Tool {
        Tool { name, path: path.to_owned() }
    }

    /// Whether it is a script, whose interpreter then is part of every figure.
    pub fn is_script(&self) -> bool {
        let mut start = [0; 2];
        fs::File::open(&self.path).and_then(|mut f| f.read_exact(&mut start)).is_ok()
            && start == *b"#!"
    }

    /// Runs a command to its end. The time is the wall time from before the spawn to after the wait.
    pub fn time(&self, args: &[&str], dir: &Path) -> Result<Duration, String> {
        let mut command = Command::new(&self.path);
        command.args(args).current_dir(dir).stdin(Stdio::null());
        // To a file and not a pipe: a restored tree may keep it open.
        let out = fs::File::create(dir.join("output")).map_err(|e| format!("output: {e}"))?;
        command.stdout(out.try_clone().map_err(|e| e.to_string())?).stderr(out);
        let start = Instant::now();
        let status = command
            .spawn()
            .and_then(|mut child| {
                let _limit = watchdog::limit(&child, PATIENCE);
                child.wait()
            })
            .map_err(|e| format!("{}: {e}", self.path.display()))?;
        let took = start.elapsed();
        if took >= PATIENCE {
            return Err(format!("{args:?}: did not end within {PATIENCE:?} and was killed"));
        }
        if status.success() {
            return Ok(took);
        }
        let last = |name: &str| {
            let text = fs::read(dir.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(5)..].join("\n  ")
        };
        Err(format!("{args:?}: {status}\n  {}\n  {}", last("output"), last("log")))
    }
}

/// A directory that goes when it is let go.
#[derive(Debug)]
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// `images` and `files` in a new directory in `base`.
    pub fn new(base: &Path) -> Result<Scratch, String> {
        let path = base.join(format!("rewake-bench.{}", std::process::id()));
        fs::create_dir_all(path.join("images"))
            .and_then(|()| fs::create_dir_all(path.join("files")))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("rewake-bench: cannot remove {}: {e}", self.0.display());
        }
    }
}

/// Starts a subject and waits until it is ready. Gives its pid, and its memory if it named some.
pub fn start(case: &Case, files: &Path) -> Result<(Child, Option<(u64, u64)>), String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(exe);
    command.args(["subject", case.name]).arg(files).current_dir("/");
    command.stdin(null()?).stdout(Stdio::piped()).stderr(null()?);
    // SAFETY: setsid is async-signal-safe and the closure touches nothing else.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn().map_err(|e| format!("cannot start the subject: {e}"))?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line).map_err(|e| format!("subject: {e}"))?;
    }
    let mut words = line.split_ascii_whitespace();
    if words.next() != Some("ready") {
        let _ = child.kill();
        let _ = child.wait();
        return Err(format!(
            "the subject did not get ready; try `rewake-bench subject {}`",
            case.name
        ));
    }
    let memory =
        words.next().and_then(|a| a.parse().ok()).zip(words.next().and_then(|l| l.parse().ok()));
    // Until the last thread sleeps.
    std::thread::sleep(Duration::from_millis(30));
    Ok((child, memory))
}

fn null() -> Result<fs::File, String> {
    let opened = fs::File::options().read(true).write(true).open("/dev/null");
    opened.map_err(|e| format!("/dev/null: {e}"))
}

/// One run of a case with a tool.
pub fn run(case: &Case, tool: &Tool, base: &Path) -> Result<Times, String> {
    let scratch = Scratch::new(base)?;
    let (child, memory) = start(case, &scratch.0.join("files"))?;
    let root = i32::try_from(child.id()).map_err(|e| e.to_string())?;
    // Waited for in `reap`: the restored root has the same pid, and is this process's child as well.
    drop(child);
    let before = match tree::look(root, memory) {
        Ok(before) => before,
        Err(text) => {
            tree::kill(&[root]);
            tree::reap();
            return Err(text);
        }
    };
    let times = checkpoint(case, tool, &scratch.0, &before, memory);
    before.kill();
    before.wait_gone()?;
    times
}

fn checkpoint(
    case: &Case,
    tool: &Tool,
    dir: &Path,
    before: &Snapshot,
    memory: Option<(u64, u64)>,
) -> Result<Times, String> {
    let root = before.pids[0];
    let images = dir.join("images");
    let images = images.to_str().ok_or("the directory's name is not text")?;
    let log = dir.join("log");
    let log = log.to_str().ok_or("the directory's name is not text")?;
    machine::warm(case.warm_gib << 30)?;
    let pss = || case.memory.as_ref().map(|_| before.pss()).transpose();
    let pss_before = pss()?;
    let root_text = root.to_string();
    let dump = [&["dump", "-t", &root_text, "-D", images, "-o", log], case.options].concat();
    let dump = tool.time(&dump, dir)?;
    before.wait_gone()?;
    let frozen = frozen(Path::new(images))?;
    let size = size(Path::new(images))?;
    machine::warm(case.warm_gib << 30)?;
    let restore = [&["restore", "-d", "-D", images, "-o", log], case.options].concat();
    let restore = tool.time(&restore, dir)?;
    before.same(&tree::look(root, memory)?)?;
    let memory = pss_before.zip(pss()?);
    let memory = memory.map(|(before, after)| Memory { images: size, before, after });
    Ok(Times { dump, frozen, restore, memory })
}

/// Bytes of all files in a directory.
fn size(dir: &Path) -> Result<u64, String> {
    let sum = || -> std::io::Result<u64> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
    };
    sum().map_err(|e| format!("{}: {e}", dir.display()))
}

fn frozen(images: &Path) -> Result<Duration, String> {
    let stats = rewake_image::read_file(&images.join("stats-dump"), STATS_DUMP)
        .map_err(|e| e.to_string())?;
    let stats = stats.first().and_then(|entry| entry.dump.as_ref()).ok_or("stats-dump is empty")?;
    Ok(Duration::from_micros(stats.frozen_time.into()))
}

/// Bytes of the subject of `heap1g`.
pub const HEAP: usize = subject::HEAP;
