//! From words to decisions: the option table, the `getopt_long` rules, the configuration files, and the per-command result.
//!
//! `argv` and each configuration file become a list of [`Given`] occurrences ([`parse`], [`config`]), all looked up in one
//! [`table`]; [`resolve`] turns the whole list into what a command needs and refuses, by name, what is not built.

pub mod config;
pub mod help;
pub mod parse;
pub mod resolve;
pub mod table;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;

use table::Opt;

/// Where an option was written, so that an error can say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Argv,
    /// In a configuration file.
    Config {
        /// The file.
        file: Rc<PathBuf>,
        /// Line, counted from 1.
        line: usize,
    },
}

impl fmt::Display for Origin {
    /// The prefix of an error text: nothing for the command line, `FILE:LINE: ` for a file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Argv => Ok(()),
            Origin::Config { file, line } => write!(f, "{}:{line}: ", file.display()),
        }
    }
}

/// One occurrence of an option.
#[derive(Debug, Clone)]
pub struct Given {
    /// The option.
    pub opt: &'static Opt,
    /// Its argument, if it was given one.
    pub value: Option<OsString>,
    /// It was given in its `--no-` form.
    pub negated: bool,
    /// Where.
    pub origin: Origin,
}

impl Given {
    /// The option as it was written, for error texts: `--no-shell-job`.
    pub fn name(&self) -> String {
        format!("--{}{}", if self.negated { "no-" } else { "" }, self.opt.long)
    }
}

/// An argument error: where, what, and whether the usage text helps.
#[derive(Debug, thiserror::Error)]
#[error("{origin}{kind}")]
pub struct ArgError {
    /// Where it was written.
    pub origin: Origin,
    /// What is wrong.
    pub kind: Kind,
}

/// What is wrong with the arguments.
#[derive(Debug, thiserror::Error)]
pub enum Kind {
    /// No option of that name.
    #[error("unknown option '{0}'")]
    Unknown(String),
    /// An abbreviation that fits several options.
    #[error("option '{name}' is ambiguous; it could be {}", .candidates.join(", "))]
    Ambiguous {
        /// As written.
        name: String,
        /// Every option it abbreviates.
        candidates: Vec<String>,
    },
    /// An argument is missing.
    #[error("option '{0}' needs an argument")]
    NeedsValue(String),
    /// An argument where none belongs.
    #[error("option '{0}' takes no argument")]
    TakesNoValue(String),
    /// The argument makes no sense.
    #[error("bad argument '{value}' of {option}: expected {want}")]
    BadValue {
        /// The option.
        option: String,
        /// What was given.
        value: String,
        /// What it could have been.
        want: &'static str,
    },
    /// The argument of `--replace-address` is no rule.
    #[error("bad argument of --replace-address: {0}")]
    BadRule(String),
    /// A known option whose feature is not built.
    #[error("{0} is not supported yet")]
    NotYet(String),
    /// An option that cannot be used with this command, or not in this place.
    #[error("{option} {why}")]
    Misplaced {
        /// The option.
        option: String,
        /// Why.
        why: &'static str,
    },
    /// Something a command needs is missing, or is there once too often.
    #[error("{0}")]
    Usage(String),
    /// No such command.
    #[error("unknown command '{0}'")]
    UnknownCommand(String),
    /// A configuration line is not of the form `NAME [VALUE]`.
    #[error("syntax error: {0}")]
    Syntax(&'static str),
    /// A configuration file could not be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

impl Kind {
    /// On the command line.
    pub fn argv(self) -> ArgError {
        self.at(&Origin::Argv)
    }

    /// At `origin`.
    pub fn at(self, origin: &Origin) -> ArgError {
        ArgError { origin: origin.clone(), kind: self }
    }

    /// Whether the usage text belongs under the error: the syntax was wrong, not the wish.
    pub fn wants_usage(&self) -> bool {
        matches!(
            self,
            Kind::Unknown(_)
                | Kind::Ambiguous { .. }
                | Kind::NeedsValue(_)
                | Kind::TakesNoValue(_)
                | Kind::Usage(_)
                | Kind::UnknownCommand(_)
        )
    }
}
