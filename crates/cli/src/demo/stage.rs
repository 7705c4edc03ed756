//! The demonstration's directory and processes: made, watched, and removed.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, WaitOptions};

use super::{ROLE, program};

/// How far the program has got.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// The last number written.
    pub counter: u64,
    /// Answers the client has had.
    pub answers: u64,
}

impl Progress {
    /// So many numbers further, and some answers.
    pub fn plus(self, numbers: u64) -> Progress {
        Progress { counter: self.counter + numbers, answers: self.answers + numbers / 10 }
    }
}

/// The program's processes in the order parents first, each with its threads and their names.
#[derive(Debug, PartialEq, Eq)]
pub struct Tasks(Vec<(i32, BTreeMap<i32, String>)>);

impl Tasks {
    /// The root's pid.
    pub fn root(&self) -> i32 {
        self.0.first().map_or(0, |(pid, _)| *pid)
    }

    /// `1234 demo-counter (1235 server, 1236 ticker) and 1237 demo-client`
    pub fn numbers(&self) -> String {
        let process = |(pid, threads): &(i32, BTreeMap<i32, String>)| {
            let name = |(tid, name): (&i32, &String)| format!("{tid} {name}");
            let others: Vec<String> =
                threads.iter().filter(|(tid, _)| *tid != pid).map(name).collect();
            let leader = threads.get_key_value(pid).map(name).unwrap_or_default();
            if others.is_empty() { leader } else { format!("{leader} ({})", others.join(", ")) }
        };
        self.0.iter().map(process).collect::<Vec<_>>().join(" and ")
    }
}

/// What the demonstration has made. Dropped, it is all gone.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
    root: Option<i32>,
    /// Descriptors that whoever started this process left open for the programs it starts.
    handed_down: Vec<i32>,
}

impl Stage {
    /// Makes the directory, and makes this process the one that orphans below it come to.
    pub fn set() -> Result<Stage, String> {
        let handed_down = handed_down()?;
        let me = rustix::process::getpid();
        rustix::process::set_child_subreaper(Some(me))
            .map_err(|e| format!("PR_SET_CHILD_SUBREAPER: {e}"))?;
        let dir = std::env::temp_dir().join(format!("rewake-demo.{}", me.as_raw_nonzero()));
        // Fails if it exists: it is in a place where anybody may make directories.
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
        let stage = Stage { dir, root: None, handed_down };
        fs::create_dir(stage.images()).map_err(|e| format!("{}: {e}", stage.images().display()))?;
        Ok(stage)
    }

    /// How to start the demonstration without descriptors that are none of its own; empty if there are none.
    pub fn advice(&self) -> String {
        if self.handed_down.is_empty() {
            return String::new();
        }
        let close: Vec<String> = self.handed_down.iter().map(|fd| format!("{fd}>&-")).collect();
        format!(
            "the program also has descriptors that this command was started with; to leave them out, run: rewake demo {}",
            close.join(" ")
        )
    }

    /// The directory of the images.
    pub fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// Starts the program.
    pub fn start(&mut self) -> Result<(), String> {
        let errors = self.create("errors")?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(|e| format!("/dev/null: {e}"))?;
        let output = null.try_clone().map_err(|e| format!("/dev/null: {e}"))?;
        let child = self
            .this_binary()?
            .arg("demo")
            .env(ROLE, program::COUNTER)
            .env(program::DIR, &self.dir)
            .current_dir("/")
            .stdin(null)
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|e| format!("cannot start the program: {e}"))?;
        // Whoever has this pid later (the restored program) is waited for by number.
        self.root = i32::try_from(child.id()).ok();
        Ok(())
    }

    /// Runs a command on the images. Says whether it succeeded, and what it said.
    pub fn command(&self, words: &[&str]) -> Result<(bool, String), String> {
        let output = self.create("output")?;
        let errors = output.try_clone().map_err(|e| format!("output: {e}"))?;
        let status = self
            .this_binary()?
            .args(words)
            .arg("--images-dir")
            .arg(self.images())
            // Whatever this machine's configuration adds is for its own checkpoints.
            .arg("--no-default-config")
            .env_remove("CRIU_CONFIG_FILE")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .status()
            .map_err(|e| format!("cannot start {}: {e}", words.join(" ")))?;
        let text = fs::read(self.dir.join("output")).map_err(|e| format!("output: {e}"))?;
        Ok((status.success(), String::from_utf8_lossy(&text).into_owned()))
    }

    fn this_binary(&self) -> Result<Command, String> {
        let exe = std::env::current_exe().map_err(|e| format!("cannot tell what I am: {e}"))?;
        let mut command = Command::new(exe);
        command.arg0("rewake");
        Ok(command)
    }

    fn create(&self, name: &str) -> Result<File, String> {
        let path = self.dir.join(name);
        File::create(&path).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// How far the program is, after making sure that no number and no answer is missing or doubled.
    pub fn progress(&self) -> Result<Progress, String> {
        let errors = self.read("errors")?;
        if !errors.is_empty() {
            return Err(format!("the program complains\n{}", errors.trim_end()));
        }
        Ok(Progress { counter: self.count("numbers")?, answers: self.count("answers")? })
    }

    /// The last number of a file whose complete lines must start with 1, 2, 3 and so on.
    fn count(&self, name: &str) -> Result<u64, String> {
        let text = self.read(name)?;
        let mut last = 0;
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let number = line.split(' ').next().and_then(|word| word.parse::<u64>().ok());
            if number != Some(last + 1) {
                return Err(format!("{name}: {line:?} comes after {last}"));
            }
            last += 1;
        }
        Ok(last)
    }

    fn read(&self, name: &str) -> Result<String, String> {
        match fs::read_to_string(self.dir.join(name)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|e| format!("{name}: {e}")),
        }
    }

    /// Waits until the program is so far.
    pub fn reach(&self, goal: Progress, patience: Duration) -> Result<Progress, String> {
        let until = Instant::now() + patience;
        loop {
            let now = self.progress()?;
            if now.counter >= goal.counter && now.answers >= goal.answers {
                return Ok(now);
            }
            if Instant::now() > until {
                return Err(format!("the program does not go on: {now:?} after {patience:?}"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The program's tasks as /proc shows them.
    pub fn tasks(&self) -> Result<Tasks, String> {
        let mut pids = vec![self.root.ok_or("the program was not started")?];
        let mut tasks = Vec::new();
        while let Some(&pid) = pids.get(tasks.len()) {
            let mut threads = BTreeMap::new();
            for tid in numbers_in(Path::new(&format!("/proc/{pid}/task")))? {
                let read = |file: &str| {
                    let path = format!("/proc/{pid}/task/{tid}/{file}");
                    fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))
                };
                threads.insert(tid, read("comm")?.trim_end().to_owned());
                pids.extend(
                    read("children")?.split(' ').filter_map(|word| word.parse::<i32>().ok()),
                );
            }
            tasks.push((pid, threads));
        }
        Ok(Tasks(tasks))
    }

    /// Waits until none of the pids is taken, reaping what is this process's to reap.
    pub fn wait_gone(&self, tasks: &Tasks, patience: Duration) -> Result<(), String> {
        let until = Instant::now() + patience;
        loop {
            reap();
            let left = tasks.0.iter().find(|(pid, _)| Path::new(&format!("/proc/{pid}")).exists());
            match left {
                None => return Ok(()),
                Some((pid, _)) if Instant::now() > until => {
                    return Err(format!("process {pid} is still there after the dump"));
                }
                Some(_) => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Ends the program and removes the directory.
    pub fn strike(&mut self) -> Result<(), String> {
        end_descendants()?;
        self.root = None;
        fs::remove_dir_all(&self.dir)
            .map_err(|e| format!("cannot remove {}: {e}", self.dir.display()))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.dir.exists() {
            // Something failed before, and that is what is reported.
            let _ = self.strike();
        }
    }
}

/// Takes the exit status of every child that has ended. Says whether any child is left.
fn reap() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Ends all processes below this one, which are all of this demonstration's making. The children of one that ends come to
/// this process, and their turn is next.
fn end_descendants() -> Result<(), String> {
    let until = Instant::now() + Duration::from_secs(5);
    while reap() {
        if Instant::now() > until {
            return Err("a process of the demonstration does not end".into());
        }
        for tid in numbers_in(Path::new("/proc/self/task"))? {
            let children =
                fs::read_to_string(format!("/proc/self/task/{tid}/children")).unwrap_or_default();
            for pid in children.split(' ').filter_map(|word| Pid::from_raw(word.parse().ok()?)) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// Descriptors beyond the standard three that are not close-on-exec.
fn handed_down() -> Result<Vec<i32>, String> {
    let mut open = numbers_in(Path::new("/proc/self/fd"))?;
    open.retain(|fd| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok());
        *fd > 2 && flags.is_some_and(|flags| flags & OFlags::CLOEXEC.bits() == 0)
    });
    Ok(open)
}

fn numbers_in(dir: &Path) -> Result<Vec<i32>, String> {
    let names = fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let names = names.map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut numbers: Vec<i32> =
        names.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
