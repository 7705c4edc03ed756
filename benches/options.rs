//! The command line.

use std::path::PathBuf;

use crate::case::{self, Case};

/// Fewest runs whose median is called a result.
const RUNS: usize = 20;

/// What `--help` prints.
pub const HELP: &str = "\
rewake-bench [--bin PATH] [--criu PATH] [--runs N] [--dir DIR] [CASE…]

  --bin PATH    the rewake under test (default: `rewake` beside this program; build it with `cargo build --release`)
  --criu PATH   a CRIU >= 4.2 to measure in turns with it
  --runs N      counted runs of each case (default 20)
  --dir DIR     where images are written (default /dev/shm)
  CASE          tiny procs200 threads500 vmas20k fds3k tcp500 tcp9k tcp10k heap1g cow30 smallvmas
                copies lazy pause (default: all of them)
";

/// What was asked for.
#[derive(Debug)]
pub struct Options {
    /// The binary under test.
    pub bin: PathBuf,
    /// CRIU, if given.
    pub criu: Option<PathBuf>,
    /// Counted runs of each case.
    pub runs: usize,
    /// Where images are written.
    pub dir: PathBuf,
    /// The cases.
    pub cases: Vec<&'static Case>,
    /// Whether many copies are measured, too.
    pub copies: bool,
    /// Whether a lazy restore is.
    pub lazy: bool,
    /// Whether what a dump costs a process that runs on is.
    pub pause: bool,
}

/// Reads the words after the program's name; `None` stands for `--help`.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options {
        bin: beside_this_program()?,
        criu: None,
        runs: RUNS,
        dir: "/dev/shm".into(),
        cases: Vec::new(),
        copies: false,
        lazy: false,
        pause: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "-h" | "--help" => return Ok(None),
            "--bin" => options.bin = value()?.into(),
            "--criu" => options.criu = Some(value()?.into()),
            "--dir" => options.dir = value()?.into(),
            "--runs" => {
                let text = value()?;
                options.runs =
                    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                        format!("--runs {text}: this takes a number of at least 1")
                    })?;
            }
            case::COPIES => options.copies = true,
            case::LAZY => options.lazy = true,
            case::PAUSE => options.pause = true,
            name => {
                options.cases.push(case::find(name).ok_or_else(|| {
                    format!("no case or option is called {name}; --help lists them")
                })?)
            }
        }
    }
    if options.cases.is_empty() && !options.copies && !options.lazy && !options.pause {
        options.cases = case::ALL.iter().collect();
        (options.copies, options.lazy, options.pause) = (true, true, true);
    }
    for path in std::iter::once(&mut options.bin).chain(options.criu.as_mut()) {
        // The commands run in another directory.
        *path = std::path::absolute(&*path).map_err(|e| format!("{}: {e}", path.display()))?;
        if !path.is_file() {
            return Err(format!(
                "{}: no such program; build rewake with `cargo build --release`, or name it with --bin",
                path.display()
            ));
        }
    }
    if !options.dir.is_dir() {
        return Err(format!(
            "{}: no such directory; choose another with --dir",
            options.dir.display()
        ));
    }
    Ok(Some(options))
}

fn beside_this_program() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|e| format!("cannot tell where I am: {e}"))?;
    Ok(exe.with_file_name("rewake"))
}
