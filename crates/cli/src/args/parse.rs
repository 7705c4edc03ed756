//! The rules of `getopt_long(3)`: options and operands in any order, `--opt=arg` and `--opt arg`, clusters of letters,
//! optional arguments only attached, unique abbreviations, `--` ends the options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::table::{Arg, OPTIONS, Opt};
use super::{ArgError, Given, Kind, Origin};

/// The command line, taken apart.
#[derive(Debug, Default)]
pub struct Words {
    /// The options, in their order.
    pub given: Vec<Given>,
    /// Everything else: the command and its operands.
    pub operands: Vec<OsString>,
}

/// Takes the arguments (without `argv[0]`) apart.
///
/// # Errors
/// An option that does not exist, is ambiguous, lacks its argument or has one too many.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Words, ArgError> {
    let mut out = Words::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            out.operands.extend(args);
            break;
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            out.given.push(long_option(long, &mut args)?);
        } else if bytes.starts_with(b"-verbosity=") {
            // One dash too few, which CRIU lets pass and tools that drive it have come to write.
            out.given.push(long_option(&bytes[1..], &mut args)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            letters(&bytes[1..], &mut args, &mut out.given)?;
        } else {
            out.operands.push(arg);
        }
    }
    Ok(out)
}

/// `NAME` or `NAME=VALUE`, without the dashes.
fn long_option(text: &[u8], rest: &mut impl Iterator<Item = OsString>) -> Result<Given, ArgError> {
    let (name, attached) = split_value(text);
    let (opt, negated) = find_long(name).map_err(|e| e.argv(true))?;
    let shown = format!("--{}{}", if negated { "no-" } else { "" }, opt.long);
    let value = match (opt.arg, attached) {
        (Arg::None, Some(_)) => return Err(Kind::TakesNoValue(shown).argv()),
        (Arg::Required(_), None) => {
            Some(rest.next().ok_or_else(|| Kind::NeedsValue(shown).argv())?)
        }
        (_, attached) => attached.map(|v| OsString::from_vec(v.to_vec())),
    };
    Ok(Given { opt, value, negated, origin: Origin::Argv })
}

/// Splits `NAME=VALUE`.
pub fn split_value(text: &[u8]) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|b| *b == b'=') {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

/// A cluster of letters: `-dvvvv`, `-t17`, `-o-`.
fn letters(
    mut cluster: &[u8],
    rest: &mut impl Iterator<Item = OsString>,
    given: &mut Vec<Given>,
) -> Result<(), ArgError> {
    while let Some((letter, after)) = cluster.split_first() {
        let shown = || format!("-{}", char::from(*letter));
        let opt = OPTIONS
            .iter()
            .find(|opt| opt.short == Some(*letter))
            .ok_or_else(|| Kind::Unknown(shown()).argv())?;
        let attached =
            (!after.is_empty() && opt.arg != Arg::None).then(|| OsString::from_vec(after.to_vec()));
        let value = match (opt.arg, attached) {
            (Arg::Required(_), None) => {
                Some(rest.next().ok_or_else(|| Kind::NeedsValue(shown()).argv())?)
            }
            (_, attached) => attached,
        };
        given.push(Given { opt, value, negated: false, origin: Origin::Argv });
        cluster = if opt.arg == Arg::None { after } else { &[] };
    }
    Ok(())
}

/// Why a long name finds no option.
#[derive(Debug)]
pub enum NotFound {
    /// Nothing of that name.
    Unknown(String),
    /// Several begin so.
    Ambiguous(String, Vec<String>),
}

impl NotFound {
    /// The error, with dashes as on a command line or without as in a file.
    pub fn kind(self, dashes: bool) -> Kind {
        let dress = |name: String| if dashes { format!("--{name}") } else { name };
        match self {
            NotFound::Unknown(name) => Kind::Unknown(dress(name)),
            NotFound::Ambiguous(name, candidates) => Kind::Ambiguous {
                name: dress(name),
                candidates: candidates.into_iter().map(dress).collect(),
            },
        }
    }

    fn argv(self, dashes: bool) -> ArgError {
        self.kind(dashes).argv()
    }
}

/// Finds an option by its long name, its `--no-` form, or a unique abbreviation of either.
///
/// # Errors
/// No option, or more than one, begins so.
pub fn find_long(name: &[u8]) -> Result<(&'static Opt, bool), NotFound> {
    let shown = || OsStr::from_bytes(name).to_string_lossy().into_owned();
    if name.is_empty() {
        return Err(NotFound::Unknown(String::new()));
    }
    let mut found = Vec::new();
    for opt in &OPTIONS {
        let positive = opt.long.as_bytes();
        if positive == name {
            return Ok((opt, false));
        }
        if positive.starts_with(name) {
            found.push((opt, false));
        }
        if opt.negatable {
            // `--n` and `--no` abbreviate every negation; `--no-X…` the one of X.
            match name.strip_prefix(b"no-") {
                Some(stem) if stem == positive => return Ok((opt, true)),
                Some(stem) if positive.starts_with(stem) => found.push((opt, true)),
                None if b"no-".starts_with(name) => found.push((opt, true)),
                _ => {}
            }
        }
    }
    match found[..] {
        [] => Err(NotFound::Unknown(shown())),
        [one] => Ok(one),
        _ => Err(NotFound::Ambiguous(
            shown(),
            found
                .iter()
                .map(|(opt, negated)| format!("{}{}", if *negated { "no-" } else { "" }, opt.long))
                .collect(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Words, String> {
        parse(args.iter().map(OsString::from)).map_err(|e| e.to_string())
    }

    fn shown(args: &[&str]) -> Vec<String> {
        let words = run(args).expect("parses");
        let mut out: Vec<String> = words
            .given
            .iter()
            .map(|g| match &g.value {
                Some(v) => format!("{}={}", g.name(), v.to_string_lossy()),
                None => g.name(),
            })
            .collect();
        out.extend(words.operands.iter().map(|w| w.to_string_lossy().into_owned()));
        out
    }

    #[test]
    fn order_does_not_matter() {
        let want = ["--tree=17", "--images-dir=/x", "dump"];
        assert_eq!(shown(&["dump", "-t", "17", "-D", "/x"]), want);
        assert_eq!(shown(&["-t17", "dump", "-D/x"]), want);
        assert_eq!(shown(&["--tree=17", "--images-dir", "/x", "dump"]), want);
    }

    #[test]
    fn clusters() {
        assert_eq!(
            shown(&["-jdv4", "restore"]),
            ["--shell-job", "--restore-detached", "--verbosity=4", "restore"]
        );
        assert_eq!(shown(&["-vvvv"]), ["--verbosity=vvv"]);
        assert_eq!(shown(&["-verbosity=0", "check"]), ["--verbosity=0", "check"]);
        assert_eq!(shown(&["-do", "-", "x"]), ["--restore-detached", "--log-file=-", "x"]);
        assert_eq!(shown(&["-t", "-5"]), ["--tree=-5"], "an argument may begin with a dash");
    }

    #[test]
    fn optional_arguments_only_attached() {
        assert_eq!(shown(&["--verbosity", "4"]), ["--verbosity", "4"]);
        assert_eq!(shown(&["--verbosity=4"]), ["--verbosity=4"]);
        assert_eq!(shown(&["-v", "4"]), ["--verbosity", "4"]);
        assert_eq!(shown(&["--manage-cgroups=ignore"]), ["--manage-cgroups=ignore"]);
        assert_eq!(shown(&["--cpu-cap="]), ["--cpu-cap="]);
    }

    #[test]
    fn abbreviations() {
        assert_eq!(shown(&["--leave-r"]), ["--leave-running"]);
        assert_eq!(shown(&["--im=/x"]), ["--images-dir=/x"]);
        assert_eq!(shown(&["--im", "/x"]), ["--images-dir=/x"]);
        assert_eq!(shown(&["--no-sh"]), ["--no-shell-job"]);
        assert_eq!(shown(&["--no-def"]), ["--no-default-config"]);
        assert_eq!(shown(&["--tls"]), ["--tls"], "an exact name wins over longer ones");
        let e = run(&["--leave"]).expect_err("two");
        assert!(e.contains("ambiguous") && e.contains("--leave-stopped, --leave-running"), "{e}");
        let e = run(&["--no-de"]).expect_err("two");
        assert!(e.contains("--no-default-config") && e.contains("--no-deprecated"), "{e}");
        assert!(run(&["--n"]).expect_err("many").contains("ambiguous"));
        assert!(run(&["--no-"]).expect_err("many").contains("ambiguous"));
    }

    #[test]
    fn negations_only_of_switches() {
        assert_eq!(shown(&["--no-tcp-close"]), ["--no-tcp-close"]);
        for bad in
            ["--no-leave-running", "--no-tree", "--no-feature", "--no-exec-cmd", "--no-no-tls"]
        {
            assert!(run(&[bad]).expect_err(bad).contains("unknown option"), "{bad}");
        }
    }

    #[test]
    fn errors() {
        assert_eq!(run(&["--bogus"]).expect_err("x"), "unknown option '--bogus'");
        assert_eq!(run(&["-Z"]).expect_err("x"), "unknown option '-Z'");
        assert_eq!(run(&["-jZ"]).expect_err("x"), "unknown option '-Z'");
        assert_eq!(run(&["--tree"]).expect_err("x"), "option '--tree' needs an argument");
        assert_eq!(run(&["-t"]).expect_err("x"), "option '-t' needs an argument");
        assert_eq!(
            run(&["--leave-running=1"]).expect_err("x"),
            "option '--leave-running' takes no argument"
        );
        assert_eq!(run(&["--no-tls=1"]).expect_err("x"), "option '--no-tls' takes no argument");
        assert!(run(&["--=x"]).is_err());
    }

    #[test]
    fn dashes() {
        assert_eq!(shown(&["--", "--tree", "-x"]), ["--tree", "-x"]);
        assert_eq!(shown(&["-", "dump"]), ["-", "dump"]);
        let words = parse([OsString::from_vec(b"-D/\xff".to_vec())]).expect("any bytes");
        assert_eq!(words.given[0].value.as_deref(), Some(OsStr::from_bytes(b"/\xff")));
        assert!(parse([OsString::from_vec(b"--\xff".to_vec())]).is_err());
        assert!(parse([OsString::from_vec(b"-\xff".to_vec())]).is_err());
    }
}
