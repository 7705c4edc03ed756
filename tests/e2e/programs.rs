//! The zoo: every program, and what is special about testing it.

use crate::harness::{Fail, Run, Start, Tool};

/// One zoo program as a test subject.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name: the file in tests/zoo/src/bin, and the first part of its trials' names.
    pub name: &'static str,
    /// The built executable.
    pub path: &'static str,
    /// Environment it is started with.
    pub env: &'static [(&'static str, &'static str)],
    /// Options added to every dump.
    pub dump_options: &'static [&'static str],
    /// Options added to every restore.
    pub restore_options: &'static [&'static str],
    /// Facts of the outside view (parts of their names) that this program itself keeps changing.
    pub ignore: &'static [&'static str],
    /// Why CRIU cannot pass: trials that need CRIU are ignored with this reason.
    pub unless_criu: Option<&'static str>,
    /// As `unless_criu` for single flavours.
    pub unless_criu_in: &'static [(&'static str, &'static str)],
    /// Facts CRIU does not bring back for this program.
    pub criu_loses: &'static [&'static str],
    /// Flavours that make no sense for it.
    pub without: &'static [&'static str],
}

/// What CRIU brings back differently for every program: it continues the monotonic clock in a new time namespace, and
/// does not know io priorities, the coredump filter and the timer slack.
const CRIU_LOSES: &[&str] = &["ns/time", "ioprio", "coredump_filter", "timerslack_ns"];

impl Program {
    const fn new(name: &'static str, path: &'static str) -> Program {
        Program {
            name,
            path,
            env: &[],
            dump_options: &[],
            restore_options: &[],
            ignore: &[],
            unless_criu: None,
            unless_criu_in: &[],
            criu_loses: &[],
            without: &[],
        }
    }

    const fn unless_criu(mut self, reason: &'static str) -> Program {
        self.unless_criu = Some(reason);
        self
    }

    const fn unless_criu_in(mut self, flavours: &'static [(&'static str, &'static str)]) -> Program {
        self.unless_criu_in = flavours;
        self
    }

    const fn criu_loses(mut self, facts: &'static [&'static str]) -> Program {
        self.criu_loses = facts;
        self
    }

    const fn env(mut self, env: &'static [(&'static str, &'static str)]) -> Program {
        self.env = env;
        self
    }

    const fn options(mut self, dump: &'static [&'static str], restore: &'static [&'static str]) -> Program {
        self.dump_options = dump;
        self.restore_options = restore;
        self
    }

    const fn ignore(mut self, facts: &'static [&'static str]) -> Program {
        self.ignore = facts;
        self
    }

    const fn without(mut self, flavours: &'static [&'static str]) -> Program {
        self.without = flavours;
        self
    }

    /// How it is started.
    pub fn start(&self) -> Start {
        let mut start = Start::program(self.path);
        start.env = self.env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        start
    }

    /// Why a trial of this flavour cannot pass if CRIU takes part.
    pub fn criu_reason(&self, flavour: &str) -> Option<&'static str> {
        let here = self.unless_criu_in.iter().find(|(f, _)| *f == flavour).map(|(_, why)| *why);
        self.unless_criu.or(here)
    }

    /// Facts that may differ after a restore in which `tool` took part.
    pub fn ignored(&self, tool: &Tool) -> Vec<&'static str> {
        let mut all = self.ignore.to_vec();
        if tool.is_criu {
            all.extend(CRIU_LOSES);
            all.extend(self.criu_loses);
        }
        all
    }

    /// Judges the EINTRs the program noted (`DIR/eintr`, a system call's name each line): a dump it survives must not
    /// be felt at all; a restore only where the rest of a relative timeout is nowhere to be had.
    pub fn judge_eintr(&self, run: &Run, tool: &Tool, restored: bool) -> Result<(), Fail> {
        if tool.is_criu {
            return Ok(());
        }
        let noted = std::fs::read_to_string(run.dir.join("eintr")).unwrap_or_default();
        let excused = ["poll", "futex_timed"];
        let bad: Vec<&str> = noted.lines().filter(|l| !(restored && excused.contains(l))).collect();
        if bad.is_empty() { Ok(()) } else { Err(run.fail(format!("system calls felt the checkpoint (EINTR): {bad:?}"))) }
    }
}

macro_rules! program {
    ($name:ident) => {
        Program::new(stringify!($name), env!(concat!("CARGO_BIN_EXE_", stringify!($name))))
    };
}

/// Every program of the zoo.
pub fn all() -> Vec<Program> {
    vec![
        program!(counter),
        program!(threads),
        program!(tree),
        program!(files_regular),
        program!(pipes),
    ]
}
