//! Help and usage texts, written from the table.

use std::fmt::Write as _;

use super::table::{Arg, COMMANDS, Command, Group, OPTIONS, Opt};

/// Version of CRIU whose command line, images and protocol this program speaks. Tools that parse it want this form.
pub const CRIU_VERSION: &str = "4.2";
/// This program's own version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Column at which the explanations of options begin, and of commands.
const OPTION_COLUMN: usize = 36;
const COMMAND_COLUMN: usize = 30;
const NOT_YET: &str = " [not supported yet]";

/// The output of `--version`.
pub fn version() -> String {
    format!("Version: {CRIU_VERSION}\nrewake {VERSION}\n")
}

/// The short text under an error.
pub fn usage(program: &str) -> String {
    let mut out = format!("usage: {program} COMMAND [OPTION...]\n");
    for (name, command, operands, _) in &COMMANDS {
        if built(*command) {
            let _ = writeln!(out, "       {program} {name} {operands}");
        }
    }
    let _ = writeln!(out, "Try '{program} --help' for everything.");
    out.replace(" \n", "\n")
}

/// The long text of `--help`.
pub fn help(program: &str) -> String {
    let mut out = format!(
        "{program} saves a running process tree to image files and brings it back.\n\
         It speaks CRIU's command line and image format (version {CRIU_VERSION}).\n\n\
         Usage: {program} COMMAND [OPTION...]\n\nCommands:\n"
    );
    for (name, command, operands, purpose) in &COMMANDS {
        if matches!(command, Command::Removed(_)) {
            continue;
        }
        let left = format!("  {name} {operands}");
        let mark = if built(*command) { "" } else { NOT_YET };
        entry(&mut out, &left, COMMAND_COLUMN, purpose, mark);
    }
    out.push_str(
        "\nOptions may stand before or after the command, and long ones may be cut short as long as they are\n\
         unique. Those written --[no-]NAME have a --no-NAME form; the last one given wins.\n",
    );
    for (group, title) in Group::ALL {
        let _ = writeln!(out, "\n{title}:");
        for opt in OPTIONS.iter().filter(|opt| opt.group == group) {
            let mark = if hidden_status(opt) { "" } else { NOT_YET };
            entry(&mut out, &left(opt), OPTION_COLUMN, opt.help, mark);
        }
    }
    let _ = write!(
        out,
        "\nConfiguration files (one option a line, without dashes; # begins a comment), in this order:\n\
         \x20 /etc/criu/default.conf, $HOME/.criu/default.conf, $CRIU_CONFIG_FILE, --config FILE\n\
         \n\
         Exit status: 0 done; 1 not done (a dump that fails leaves the tree running as it was); 255 a post-dump\n\
         script failed (the images are complete, the tree runs on).\n\
         \n\
         Examples:\n\
         \x20 {program} check -t 1234                 can process 1234 be saved?\n\
         \x20 {program} dump -t 1234 -D /ckpt -j      save it from a terminal\n\
         \x20 {program} restore -D /ckpt -j           bring it back there and wait for it\n"
    );
    out
}

fn built(command: Command) -> bool {
    !matches!(command, Command::NotBuilt(_) | Command::Removed(_))
}

/// Options that get no mark: built ones, and `--ms`, which will not come back.
fn hidden_status(opt: &Opt) -> bool {
    !opt.nowhere_built() || opt.long == "ms"
}

/// The left column of an option: `  -t, --tree PID`.
fn left(opt: &Opt) -> String {
    let mut text = match opt.short {
        Some(letter) => format!("  -{}, ", char::from(letter)),
        None => "      ".to_owned(),
    };
    text.push_str(if opt.negatable { "--[no-]" } else { "--" });
    text.push_str(opt.long);
    let _ = match opt.arg {
        Arg::None => Ok(()),
        Arg::Required(name) => write!(text, " {name}"),
        Arg::Optional(name) => write!(text, "[={name}]"),
    };
    text
}

/// One line of two columns; a left side that is too long gets a line of its own.
fn entry(out: &mut String, left: &str, column: usize, right: &str, mark: &str) {
    if left.len() + 2 > column {
        let _ = writeln!(out, "{left}\n{:column$}{right}{mark}", "");
    } else {
        let _ = writeln!(out, "{left:column$}{right}{mark}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_names_every_option_once() {
        let text = help("criu");
        for opt in &OPTIONS {
            let shown = format!("{}{}", if opt.negatable { "--[no-]" } else { "--" }, opt.long);
            let lines = text.lines().filter(|line| {
                line.split([' ', '=', '[', ',']).any(|word| word == opt.long || word == shown)
                    || line.split(' ').any(|word| word.split("[=").next() == Some(&shown))
            });
            assert!(lines.count() >= 1, "{shown}");
        }
        assert!(text.lines().all(|line| line.len() <= 132), "lines fit a wide terminal");
    }

    #[test]
    fn what_is_not_built_is_marked() {
        let text = help("rewake");
        let line = |name: &str| {
            text.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned()
        };
        assert!(line("--[no-]page-server").contains("not supported yet"));
        assert!(!line("--tree PID").contains("not supported yet"));
        assert!(line("  page-server").contains("not supported yet"));
    }

    #[test]
    fn version_is_parsable() {
        assert!(version().starts_with("Version: 4.2\n"));
    }
}
