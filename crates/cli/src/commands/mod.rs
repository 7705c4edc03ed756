//! The commands, each from its options to its exit code.

pub mod check;
pub mod dedup;
pub mod dump;
pub mod images;
pub mod lazy_pages;
pub mod pre_dump;
pub mod restore;
pub mod resume;
pub mod unlock;

use rewake_engine::{Error, Pid};

use crate::logging::Failure;

/// How many obstacles a refusal lists: who wants more than that is no reader any more.
const OBSTACLES_SHOWN: usize = 50;

/// `1234 (redis-server)`, or the number alone if there is no such process.
fn process(pid: Pid) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(comm) => format!("{pid} ({})", comm.trim_end_matches('\n')),
        Err(_) => pid.to_string(),
    }
}

/// The engine's error in the command's words: `cannot dump 1234 (redis-server): fd 7 …`.
fn failed(what: &str, error: Error) -> Failure {
    match &error.obstacles[..] {
        [] => {
            // The process is named once.
            let subject = what.split_once(' ').map_or("", |(_, subject)| subject);
            let message = error
                .message
                .strip_prefix("process ")
                .and_then(|rest| rest.strip_prefix(subject))
                .and_then(|rest| rest.strip_prefix(": "))
                .filter(|_| !subject.is_empty())
                .unwrap_or(&error.message);
            let message = match message.starts_with("cannot ") && message.contains(subject) {
                true => message.to_owned(),
                false => format!("cannot {what}: {message}"),
            };
            Failure { message, details: Vec::new(), hint: error.hint }
        }
        obstacles => {
            let things = if obstacles.len() == 1 { "thing stands" } else { "things stand" };
            let shown = obstacles.iter().take(OBSTACLES_SHOWN).map(ToString::to_string);
            let more = obstacles.len().saturating_sub(OBSTACLES_SHOWN);
            let more = (more > 0).then(|| format!("and {more} more: 'check -t' tells them all"));
            Failure {
                message: format!("cannot {what}: {} {things} in the way", obstacles.len()),
                details: shown.chain(more).collect(),
                hint: error.hint,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_engine::Obstacle;

    fn error(message: &str) -> Error {
        Error::new(message).hint("h")
    }

    #[test]
    fn the_process_is_named_once() {
        let text = |message: &str| failed("dump 7 (sh)", error(message)).message;
        assert_eq!(text("no memory"), "cannot dump 7 (sh): no memory");
        assert_eq!(text("process 7 (sh): fd 3: odd"), "cannot dump 7 (sh): fd 3: odd");
        assert_eq!(
            text("process 8 (x): fd 3: odd"),
            "cannot dump 7 (sh): process 8 (x): fd 3: odd"
        );
        assert_eq!(text("cannot freeze 7 (sh): slow"), "cannot freeze 7 (sh): slow");
        assert_eq!(failed("restore", error("bad image")).message, "cannot restore: bad image");
    }

    #[test]
    fn obstacles_are_listed() {
        let obstacle = Obstacle {
            pid: 7,
            comm: "sh".into(),
            others: Vec::new(),
            object: "fd 3".into(),
            reason: "odd".into(),
            remedy: Some("use --even".into()),
            passing: rewake_engine::Passing::No,
        };
        let mut refused = error("x");
        refused.obstacles = vec![obstacle.clone()];
        let failure = failed("dump 7 (sh)", refused);
        assert_eq!(failure.message, "cannot dump 7 (sh): 1 thing stands in the way");
        assert_eq!(failure.details, ["process 7 (sh): fd 3: odd; use --even"]);
        let mut refused = error("x");
        refused.obstacles = vec![obstacle; 1000];
        let failure = failed("dump 7 (sh)", refused);
        assert_eq!(failure.message, "cannot dump 7 (sh): 1000 things stand in the way");
        assert_eq!(failure.details.len(), OBSTACLES_SHOWN + 1);
        assert_eq!(failure.details[OBSTACLES_SHOWN], "and 950 more: 'check -t' tells them all");
    }
}
