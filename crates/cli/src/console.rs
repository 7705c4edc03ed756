//! Words for people: short lines on standard error, results on standard output.
//!
//! Nothing here panics when the other end of a pipe is gone (SIGPIPE is ignored by the Rust runtime, as CRIU does it too).

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::OnceLock;

static PROGRAM: OnceLock<&'static str> = OnceLock::new();

/// Sets the name in front of messages.
pub fn set_program(name: &'static str) {
    let _ = PROGRAM.set(name);
}

fn program() -> &'static str {
    PROGRAM.get().copied().unwrap_or("rewake")
}

/// `rewake: TEXT` on standard error.
pub fn error(text: &str) {
    stderr(&format!("{}: {}\n", program(), printable(text)));
}

/// `rewake: warning: TEXT` on standard error.
pub fn warning(text: &str) {
    error(&format!("warning: {text}"));
}

/// A line that belongs to the message before it.
pub fn detail(text: &str) {
    stderr(&format!("  {}\n", printable(text)));
}

/// `hint: TEXT` on standard error: the way out.
pub fn hint(text: &str) {
    stderr(&format!("hint: {}\n", printable(text)));
}

/// Text on standard error, as it is.
pub fn stderr(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Text on standard output; failure if it could not be written.
pub fn stdout(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The text with control characters escaped: names of processes and files come from strangers, and must not move the
/// cursor of a terminal or forge lines of a log.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("fd 7 (ünï)"), "fd 7 (ünï)");
        assert_eq!(printable("a\x1b[2Jb\nc\td"), "a\\u{1b}[2Jb\\nc\td");
    }
}
