//! The log in CRIU's form, and the choice between it and words for people.
//!
//! A line is `(SS.UUUUUU) Error (module/file.rs:LINE): text`: the time since the log was opened from verbosity 3 on, `Error`
//! and `Warn ` with the place, no word for the lower levels. Each line is one `write(2)` of at most 8 KiB, so that several
//! processes can share a file opened with `O_APPEND`.
//!
//! Without `-o` the log goes to standard error. At the default verbosity that is a terminal with a person in front of it,
//! who gets words instead of lines (see [`Form::Words`]).

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::args::resolve::LogTo;
use crate::console;

/// Longest line, with its newline.
const LINE: usize = 8192;
/// From this verbosity on lines carry the time, and standard error gets lines instead of words.
const WITH_TIME: u32 = 3;

/// Why a command ends in failure.
#[derive(Debug, Default)]
pub struct Failure {
    /// What failed: process, object, reason.
    pub message: String,
    /// More of the same, a line each.
    pub details: Vec<String>,
    /// The way out.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure with a way out.
    pub fn new(message: impl Into<String>, hint: &str) -> Self {
        Failure { message: message.into(), details: Vec::new(), hint: Some(hint.to_owned()) }
    }
}

/// What the lines on standard error look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Lines of a log.
    Lines,
    /// `rewake: …` for a person: warnings at once, errors only if the final message does not say them.
    Words,
}

#[derive(Debug)]
enum Sink {
    File(File, PathBuf),
    Stdout,
    Stderr(Form),
}

/// The logger behind the `log` macros.
#[derive(Debug)]
struct Logger {
    sink: Sink,
    verbosity: u32,
    start: Instant,
    /// `--log-pid`: a file per restored task, opened with its first line.
    per_task: Option<Mutex<HashMap<i64, File>>>,
    /// Texts of the errors so far: none is said twice.
    errors: Mutex<Vec<String>>,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Opens the log and installs the logger.
///
/// # Errors
/// The file cannot be created.
pub fn init(to: &LogTo, verbosity: u32, log_pid: bool) -> io::Result<()> {
    let sink = match to {
        LogTo::File(path) => Sink::File(create(path)?, path.clone()),
        LogTo::Stdout => Sink::Stdout,
        LogTo::Stderr if verbosity >= WITH_TIME => Sink::Stderr(Form::Lines),
        LogTo::Stderr => Sink::Stderr(Form::Words),
    };
    let logger = LOGGER.get_or_init(|| Logger {
        sink,
        verbosity,
        start: Instant::now(),
        per_task: log_pid.then(Mutex::default),
        errors: Mutex::default(),
    });
    // Fails only if there is a logger already, which is then this one.
    let _ = log::set_logger(logger);
    log::set_max_level(match verbosity {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    Ok(())
}

/// Creates or empties a log file that only its owner may read, in append mode.
fn create(path: &Path) -> io::Result<File> {
    // O_TRUNC and O_APPEND together are fine for open(2) but not for `OpenOptions`.
    const O_TRUNC: i32 = libc::O_TRUNC;
    OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(O_TRUNC).open(path)
}

/// The descriptor action scripts write to.
///
/// # Errors
/// It cannot be duplicated.
pub fn script_output() -> io::Result<OwnedFd> {
    match LOGGER.get().map(|logger| &logger.sink) {
        Some(Sink::File(file, _)) => file.as_fd().try_clone_to_owned(),
        Some(Sink::Stdout) => io::stdout().as_fd().try_clone_to_owned(),
        _ => io::stderr().as_fd().try_clone_to_owned(),
    }
}

/// Reports the failure that ends the command: as `Error` lines in the log, and in words, with the way out, on standard
/// error. What the log has already is not repeated.
#[track_caller]
pub fn failure(failure: &Failure) {
    let place = Location::caller();
    let Some(logger) = LOGGER.get() else {
        words(failure);
        return;
    };
    let said = logger.errors().clone();
    let texts = || std::iter::once(&failure.message).chain(&failure.details);
    match &logger.sink {
        Sink::Stderr(Form::Words) => {
            for earlier in &said {
                if !texts()
                    .any(|text| text.contains(earlier.as_str()) || earlier.contains(text.as_str()))
                {
                    console::error(earlier);
                }
            }
            logger.errors().clear();
            words(failure);
            return;
        }
        _ => {
            for text in texts().filter(|text| !said.contains(text)) {
                line_at(place, Level::Error, text);
            }
        }
    }
    match &logger.sink {
        Sink::Stderr(_) => {
            if let Some(hint) = &failure.hint {
                console::hint(hint);
            }
        }
        _ => words(failure),
    }
}

/// A failure in words.
fn words(failure: &Failure) {
    console::error(&failure.message);
    failure.details.iter().for_each(|text| console::detail(text));
    if let Some(hint) = &failure.hint {
        console::hint(hint);
    }
}

/// A line that others look for in a log and that says nothing new to a person.
#[track_caller]
pub fn milestone(level: Level, text: &str) {
    if !matches!(LOGGER.get(), Some(Logger { sink: Sink::Stderr(Form::Words), .. })) {
        line_at(Location::caller(), level, text);
    }
}

/// Logs `text` as if by a macro at `place`.
fn line_at(place: &Location<'_>, level: Level, text: &str) {
    if level <= log::max_level() {
        log::logger().log(
            &Record::builder()
                .level(level)
                .file(Some(place.file()))
                .line(Some(place.line()))
                .args(format_args!("{text}"))
                .build(),
        );
    }
}

/// Says the errors that did not end the command, if a person has not seen them yet.
pub fn finish() {
    if let Some(logger @ Logger { sink: Sink::Stderr(Form::Words), .. }) = LOGGER.get() {
        for text in std::mem::take(&mut *logger.errors()) {
            console::error(&text);
        }
    }
}

impl Logger {
    fn errors(&self) -> MutexGuard<'_, Vec<String>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the line to the file of task `pid`; `false` if there is none.
    fn to_task(&self, pid: i64, line: &[u8]) -> bool {
        let (Some(files), Sink::File(_, main)) = (&self.per_task, &self.sink) else { return false };
        let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
        if let std::collections::hash_map::Entry::Vacant(slot) = files.entry(pid) {
            let mut name = main.clone().into_os_string();
            name.push(format!(".{pid}"));
            match create(Path::new(&name)) {
                Ok(file) => slot.insert(file),
                Err(_) => return false,
            };
        }
        files.get(&pid).is_some_and(|mut file| file.write_all(line).is_ok())
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if record.level() == Level::Error {
            self.errors().push(record.args().to_string());
        }
        if let Sink::Stderr(Form::Words) = self.sink {
            if record.level() == Level::Warn {
                console::warning(&record.args().to_string());
            }
            return;
        }
        let elapsed = (self.verbosity >= WITH_TIME).then(|| self.start.elapsed());
        let pid = record.key_values().get(log::kv::Key::from("pid")).and_then(|v| v.to_i64());
        if let Some(pid) = pid
            && self.per_task.is_some()
            && self.to_task(pid, &line(elapsed, None, record))
        {
            return;
        }
        let line = line(elapsed, pid, record);
        // There is nobody to tell if the log cannot be written.
        let _ = match &self.sink {
            Sink::File(file, _) => (&*file).write_all(&line),
            Sink::Stdout => console_raw(&io::stdout(), &line),
            Sink::Stderr(_) => console_raw(&io::stderr(), &line),
        };
    }

    fn flush(&self) {}
}

/// One `write(2)` past the buffer of the standard stream.
fn console_raw(stream: &impl AsFd, line: &[u8]) -> io::Result<()> {
    rustix::io::write(stream, line).map(|_| ()).map_err(io::Error::from)
}

/// One line, newline included.
fn line(elapsed: Option<Duration>, pid: Option<i64>, record: &Record<'_>) -> Vec<u8> {
    let mut out = String::with_capacity(160);
    if let Some(elapsed) = elapsed {
        out.push_str(&stamp(elapsed));
    }
    let place = || (short_path(record.file().unwrap_or("?")), record.line().unwrap_or(0));
    // Writing to a String does not fail.
    let _ = match pid {
        Some(pid) => write!(out, "{pid:6}: "),
        None => Ok(()),
    };
    let _ = match record.level() {
        Level::Error => write!(out, "Error ({}:{}): ", place().0, place().1),
        Level::Warn => write!(out, "Warn  ({}:{}): ", place().0, place().1),
        _ => Ok(()),
    };
    let text = record.args().to_string();
    out.push_str(&console::printable(&text));
    if out.len() >= LINE {
        let end = (0..LINE).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(end);
    }
    out.push('\n');
    out.into_bytes()
}

/// `(SS.UUUUUU) `: always 12 characters, at the cost of the last digits from 100 s on.
fn stamp(elapsed: Duration) -> String {
    let full = format!("({:02}.{:06}", elapsed.as_secs(), elapsed.subsec_micros());
    format!("{full:.10}) ")
}

/// `crates/engine/src/dump/freeze.rs` as `engine/dump/freeze.rs`.
fn short_path(file: &str) -> String {
    let inside = file.rfind("crates/").map_or(file, |at| &file[at + "crates/".len()..]);
    inside.replacen("/src/", "/", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_twelve_wide() {
        for (micros, want) in [
            (12_345, "(00.012345) "),
            (9_999_999, "(09.999999) "),
            (99_000_001, "(99.000001) "),
            (123_456_789, "(123.45678) "),
            (12_345_678_901, "(12345.678) "),
        ] {
            let stamp = stamp(Duration::from_micros(micros));
            assert_eq!(stamp, want);
            assert_eq!(stamp.len(), 12);
        }
    }

    fn text(level: Level, args: std::fmt::Arguments<'_>, pid: Option<i64>) -> String {
        let record = Record::builder()
            .level(level)
            .args(args)
            .file(Some("crates/engine/src/dump/freeze.rs"))
            .line(Some(7))
            .build();
        String::from_utf8(line(Some(Duration::from_micros(1)), pid, &record)).unwrap()
    }

    #[test]
    fn lines() {
        let one = format_args!("fd 7\nlost");
        assert_eq!(
            text(Level::Error, one, None),
            "(00.000001) Error (engine/dump/freeze.rs:7): fd 7\\nlost\n"
        );
        assert_eq!(
            text(Level::Warn, one, None),
            "(00.000001) Warn  (engine/dump/freeze.rs:7): fd 7\\nlost\n"
        );
        assert_eq!(text(Level::Info, one, Some(42)), "(00.000001)     42: fd 7\\nlost\n");
    }

    #[test]
    fn long_lines_are_cut_at_8_kib() {
        let long = "ü".repeat(9000);
        let line = text(Level::Info, format_args!("{long}"), None);
        assert!(
            line.len() <= LINE && line.len() > LINE - 4 && line.ends_with("ü\n"),
            "{}",
            line.len()
        );
    }

    #[test]
    fn each_task_gets_its_file() {
        let dir = std::env::temp_dir().join(format!("rewake-logging-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let main = dir.join("restore.log");
        let logger = Logger {
            sink: Sink::File(create(&main).unwrap(), main.clone()),
            verbosity: 2,
            start: Instant::now(),
            per_task: Some(Mutex::default()),
            errors: Mutex::default(),
        };
        log::set_max_level(LevelFilter::Warn);
        for (pid, args) in
            [(Some(7), format_args!("a")), (None, format_args!("b")), (Some(7), format_args!("c"))]
        {
            let pairs = pid.map(|pid: i64| [("pid", pid)]);
            let mut record = Record::builder();
            record.level(Level::Warn).args(args).file(Some("x.rs")).line(Some(1));
            match &pairs {
                Some(pairs) => logger.log(&record.key_values(pairs).build()),
                None => logger.log(&record.build()),
            }
        }
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!(read("restore.log"), "Warn  (x.rs:1): b\n");
        assert_eq!(read("restore.log.7"), "Warn  (x.rs:1): a\nWarn  (x.rs:1): c\n");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
