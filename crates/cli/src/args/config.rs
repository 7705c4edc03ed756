//! Configuration files: one option a line, applied before the command line.
//!
//! Order: `/etc/criu/default.conf`, `$HOME/.criu/default.conf`, `$CRIU_CONFIG_FILE`, `--config`. The last two words on the
//! command line that concern them, `--config` and `--no-default-config`, leave out the first two. A file that does not
//! exist is skipped, and so are the first two if they may not be read.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::parse::{find_long, split_value};
use super::table::{self, Arg};
use super::{ArgError, Given, Kind, Origin};

/// Where the default files are; tests point them elsewhere.
#[derive(Debug)]
pub struct Places {
    /// The machine's file.
    pub global: PathBuf,
    /// `$HOME`.
    pub home: Option<OsString>,
    /// `$CRIU_CONFIG_FILE`.
    pub env: Option<OsString>,
}

impl Places {
    /// The real ones.
    pub fn from_env() -> Self {
        Places {
            global: PathBuf::from("/etc/criu/default.conf"),
            home: std::env::var_os("HOME"),
            env: std::env::var_os("CRIU_CONFIG_FILE"),
        }
    }
}

/// Reads every file that applies, in order, and puts the command line's options last.
/// Also returns a remark on each that is skipped, unless it is one of the default files and does not exist.
///
/// # Errors
/// A file that cannot be read, a line that cannot be understood (with file and line).
pub fn with_files(
    argv: Vec<Given>,
    places: &Places,
) -> Result<(Vec<Given>, Vec<String>), ArgError> {
    let asked: Vec<PathBuf> = argv
        .iter()
        .filter(|given| given.opt.long == "config")
        .filter_map(|given| given.value.clone().map(PathBuf::from))
        .collect();
    let defaults =
        asked.is_empty() && !argv.iter().any(|given| given.opt.long == "no-default-config");

    let mut all = Vec::new();
    let mut skipped = Vec::new();
    let skip = |file: &Path, why: &str| format!("configuration file {} {why}", file.display());
    if defaults {
        let home = places.home.as_ref().filter(|home| !home.is_empty());
        let home = home.map(|home| Path::new(home).join(".criu/default.conf"));
        for file in std::iter::once(&places.global).chain(&home) {
            match read(file, &mut all) {
                // A user in the environment of another, as under sudo, is no reason to do nothing.
                Err(Unread::Failed(e)) if e.kind() == io::ErrorKind::PermissionDenied => {
                    skipped.push(skip(file, "may not be read and is skipped"));
                }
                Err(Unread::Absent) | Ok(()) => {}
                Err(e) => return Err(e.of(file)),
            }
        }
    }
    let named = places.env.iter().filter(|file| !file.is_empty()).map(PathBuf::from).chain(asked);
    for file in named {
        match read(&file, &mut all) {
            Err(Unread::Absent) => skipped.push(skip(&file, "does not exist")),
            read => read.map_err(|e| e.of(&file))?,
        }
    }
    all.extend(argv);
    Ok((all, skipped))
}

/// Why a file did not count.
enum Unread {
    /// It does not exist.
    Absent,
    /// It could not be read.
    Failed(io::Error),
    /// It could not be understood.
    Bad(ArgError),
}

impl Unread {
    fn of(self, path: &Path) -> ArgError {
        let source = match self {
            Unread::Bad(error) => return error,
            Unread::Failed(source) => source,
            Unread::Absent => io::ErrorKind::NotFound.into(),
        };
        Kind::Unreadable { path: path.display().to_string(), source }.argv()
    }
}

/// Reads one file.
fn read(path: &Path, into: &mut Vec<Given>) -> Result<(), Unread> {
    match std::fs::read(path) {
        Ok(bytes) => parse(&bytes, &Rc::new(path.to_owned()), into).map_err(Unread::Bad),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(Unread::Absent)
        }
        Err(e) => Err(Unread::Failed(e)),
    }
}

/// Parses the text of a file.
///
/// # Errors
/// See [`with_files`].
pub fn parse(text: &[u8], file: &Rc<PathBuf>, into: &mut Vec<Given>) -> Result<(), ArgError> {
    for (index, line) in text.split(|b| *b == b'\n').enumerate() {
        let origin = Origin::Config { file: Rc::clone(file), line: index + 1 };
        match option(line, &origin) {
            Ok(Some(given)) => into.push(given),
            Ok(None) => {}
            Err(kind) => return Err(kind.at(&origin)),
        }
    }
    Ok(())
}

/// One line as an option.
fn option(line: &[u8], origin: &Origin) -> Result<Option<Given>, Kind> {
    let Some((word, value)) = split_line(line).map_err(Kind::Syntax)? else { return Ok(None) };
    let (name, attached) = split_value(word);
    let value = match (attached, value) {
        (Some(_), Some(_)) => return Err(Kind::Syntax("more than one value")),
        (attached, value) => attached.map(<[u8]>::to_vec).or(value),
    };
    let (opt, negated) = find_long(name).map_err(|e| {
        let is_command = std::str::from_utf8(name).is_ok_and(|name| table::command(name).is_some());
        if is_command { Kind::Syntax("commands are not allowed here") } else { e.kind(false) }
    })?;
    let given =
        Given { opt, value: value.map(OsString::from_vec), negated, origin: origin.clone() };
    if matches!(opt.long, "config" | "no-default-config" | "help" | "version") {
        return Err(Kind::Misplaced {
            option: given.name(),
            why: "can only be used on the command line",
        });
    }
    match (opt.arg, &given.value) {
        (Arg::None, Some(_)) => Err(Kind::TakesNoValue(given.name())),
        (Arg::Required(_), None) => Err(Kind::NeedsValue(given.name())),
        _ => Ok(Some(given)),
    }
}

/// The first word of a line, and the value after it.
type Line<'a> = (&'a [u8], Option<Vec<u8>>);

/// Splits a line into its first word and its value: `NAME`, `NAME VALUE`, `NAME "VALUE"`, each with a comment after it.
fn split_line(line: &[u8]) -> Result<Option<Line<'_>>, &'static str> {
    let blank = |b: &u8| *b == b' ' || *b == b'\t';
    let trim = |text: &mut &[u8]| {
        let start = text.iter().position(|b| !blank(b)).unwrap_or(text.len());
        *text = &text[start..];
    };
    let ends = |text: &[u8]| text.is_empty() || text[0] == b'#';
    let word = |text: &[u8]| text.iter().position(|b| blank(b) || *b == b'#').unwrap_or(text.len());

    let mut rest = line;
    trim(&mut rest);
    if ends(rest) {
        return Ok(None);
    }
    let (name, after) = rest.split_at(word(rest));
    rest = after;
    trim(&mut rest);
    if ends(rest) {
        return Ok(Some((name, None)));
    }
    let value = if let Some(quoted) = rest.strip_prefix(b"\"") {
        let (value, after) = unquote(quoted)?;
        rest = after;
        value
    } else {
        let (value, after) = rest.split_at(word(rest));
        rest = after;
        value.to_vec()
    };
    trim(&mut rest);
    if ends(rest) { Ok(Some((name, Some(value)))) } else { Err("more text after the value") }
}

/// Reads up to the closing quote; `\"` is a quote, any other backslash is itself.
fn unquote(text: &[u8]) -> Result<(Vec<u8>, &[u8]), &'static str> {
    let mut value = Vec::new();
    let mut rest = text;
    loop {
        match rest {
            [b'"', after @ ..] => return Ok((value, after)),
            [b'\\', b'"', after @ ..] => {
                value.push(b'"');
                rest = after;
            }
            [byte, after @ ..] => {
                value.push(*byte);
                rest = after;
            }
            [] => return Err("a quoted value does not end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str) -> Result<Vec<String>, String> {
        let mut given = Vec::new();
        parse(text.as_bytes(), &Rc::new(PathBuf::from("f.conf")), &mut given)
            .map_err(|e| e.to_string())?;
        Ok(given
            .iter()
            .map(|g| match &g.value {
                Some(v) => format!("{}={}", g.name(), v.to_string_lossy()),
                None => g.name(),
            })
            .collect())
    }

    fn one(text: &str) -> String {
        run(text).expect("parses").remove(0)
    }

    #[test]
    fn lines() {
        assert_eq!(
            run("# all of this\n\n \t\n tcp-established\nno-shell-job # why not\nwork-dir\t /x/y")
                .unwrap(),
            ["--tcp-established", "--no-shell-job", "--work-dir=/x/y"]
        );
        assert_eq!(one("work-dir /x#y"), "--work-dir=/x");
        assert_eq!(one("work-dir \"/x#y z\" # c"), "--work-dir=/x#y z");
        assert_eq!(one(r#"work-dir "a\"b\n\\c""#), r#"--work-dir=a"b\n\\c"#);
        assert_eq!(one("work-dir \"\""), "--work-dir=");
        assert_eq!(one("verbosity 4"), "--verbosity=4");
        assert_eq!(one("verbosity=4"), "--verbosity=4");
        assert_eq!(one("verbosity"), "--verbosity");
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, want) in [
            ("shell-job\nwork-dir \"", "f.conf:2: syntax error: a quoted value does not end"),
            ("work-dir \"x\" y", "f.conf:1: syntax error: more text after the value"),
            ("work-dir x y", "f.conf:1: syntax error: more text after the value"),
            ("\n\nbogus", "f.conf:3: unknown option 'bogus'"),
            ("dump", "f.conf:1: syntax error: commands are not allowed here"),
            ("-t 5", "f.conf:1: unknown option '-t'"),
            ("--tree 5", "f.conf:1: unknown option '--tree'"),
            ("tree", "f.conf:1: option '--tree' needs an argument"),
            ("shell-job yes", "f.conf:1: option '--shell-job' takes no argument"),
            ("config x", "f.conf:1: --config can only be used on the command line"),
        ] {
            assert_eq!(run(text).expect_err(text), want);
        }
    }

    #[test]
    fn order_and_suppression() {
        let dir = std::env::temp_dir().join(format!("rewake-config-{}", std::process::id()));
        std::fs::create_dir_all(dir.join(".criu")).unwrap();
        let put = |name: &str, text: &str| {
            std::fs::write(dir.join(name), text).unwrap();
            dir.join(name)
        };
        let places = Places {
            global: put("global", "timeout 1"),
            home: Some(dir.clone().into()),
            env: Some(put("env", "timeout 3").into()),
        };
        put(".criu/default.conf", "timeout 2");
        let asked = put("asked", "timeout 4");
        let argv = |args: &[&str]| {
            super::super::parse::parse(args.iter().map(OsString::from)).unwrap().given
        };
        let values = |given: Vec<Given>| -> Vec<String> {
            let timeouts = given.iter().filter(|g| g.opt.long == "timeout");
            timeouts.map(|g| g.value.clone().unwrap().into_string().unwrap()).collect()
        };

        let (all, skipped) = with_files(argv(&["--timeout", "5"]), &places).unwrap();
        assert_eq!(values(all), ["1", "2", "3", "5"]);
        assert!(skipped.is_empty());
        let config = format!("--config={}", asked.display());
        let (all, _) = with_files(argv(&[&config, "--timeout=5"]), &places).unwrap();
        assert_eq!(values(all), ["3", "4", "5"]);
        let (all, _) = with_files(argv(&["--no-default-config"]), &places).unwrap();
        assert_eq!(values(all), ["3"]);
        let (all, skipped) = with_files(argv(&["--config=/nonexistent/c"]), &places).unwrap();
        assert_eq!(values(all), ["3"]);
        assert_eq!(skipped, ["configuration file /nonexistent/c does not exist"]);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
