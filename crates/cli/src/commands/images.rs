//! `images replace-address`: the sockets of a checkpoint get other addresses, on disk. Needs no privileges.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use rewake_engine::host;
use rewake_image::addresses::{self, Change, Rule};

use crate::args::{ArgError, Kind};
use crate::console;

/// Runs the subcommand that the operands (without `images`) name; 0 or 1.
///
/// # Errors
/// The operands are not those of a subcommand.
pub fn run(operands: &[OsString]) -> Result<ExitCode, ArgError> {
    let usage = |text: &str| Kind::Usage(text.into()).argv();
    let [word, operands @ ..] = operands else {
        return Err(usage("images needs a subcommand: replace-address"));
    };
    if word != "replace-address" {
        let text = format!("images has no subcommand '{}'; it has replace-address", word.display());
        return Err(usage(&text));
    }
    let [dir, texts @ ..] = operands else {
        return Err(usage("images replace-address needs a directory and OLD=NEW"));
    };
    if texts.is_empty() {
        return Err(usage("images replace-address needs OLD=NEW"));
    }
    let rule = |text: &OsString| {
        Rule::parse(&text.to_string_lossy()).map_err(|e| Kind::BadRule(e.to_string()).argv())
    };
    let rules = texts.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    Ok(replace(Path::new(dir), &rules))
}

fn replace(dir: &Path, rules: &[Rule]) -> ExitCode {
    let outcome = match addresses::edit(dir, rules) {
        Ok(outcome) => outcome,
        Err(error) => {
            console::error(&format!("cannot replace addresses: {error}"));
            return ExitCode::FAILURE;
        }
    };
    for change in &outcome.changes {
        console::stdout(&format!("{}\n", describe(change)));
    }
    for (rule, _) in rules.iter().zip(&outcome.matches).filter(|(_, matches)| **matches == 0) {
        console::warning(&format!("{rule}: no socket of the images matches it"));
    }
    let mut noted = Vec::new();
    for change in &outcome.changes {
        let ip = change.local.1.ip();
        if change.local.0.ip() != ip && !noted.contains(&ip) && !host::is_local(ip) {
            console::warning(&format!(
                "{ip} is not an address of this host; where it is restored it must be"
            ));
            noted.push(ip);
        }
        if let Some(advice) = change.advice() {
            console::warning(&advice);
        }
    }
    ExitCode::SUCCESS
}

/// `TCP socket 10.0.0.1:80: now 10.0.0.2:80`.
fn describe(change: &Change) -> String {
    let peer = change.peer.map_or(String::new(), |(_, now)| format!(" to {now}"));
    format!("{}: now {}{peer}", change.object(), change.local.1)
}
