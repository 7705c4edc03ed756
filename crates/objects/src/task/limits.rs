//! Resource limits, `prlimit(2)`: asked and set by the task itself, which needs no `CAP_SYS_RESOURCE` for its own.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{RlimitEntry, TaskRlimitsEntry};
use rewake_inject::ring::{Data, Results, Script};

/// Number of limits.
pub const COUNT: usize = 16;

/// Adds the questions.
pub fn ask(script: &mut Script) -> Data {
    let data = script.space(COUNT * 16);
    for which in 0..COUNT as u64 {
        script.push(Op::new(libc::SYS_prlimit64, &[0, which, 0, data.address + which * 16]));
    }
    data
}

/// Reads the answers.
#[must_use]
pub fn read(results: &Results, asked: Data) -> TaskRlimitsEntry {
    let rlimits = (0..COUNT)
        .map(|i| RlimitEntry {
            cur: results.u64(asked, i * 16),
            max: results.u64(asked, i * 16 + 8),
        })
        .collect();
    TaskRlimitsEntry { rlimits }
}

/// Sets the limits. A hard limit above what the task inherits needs `CAP_SYS_RESOURCE`; where that is missing the
/// limit is lowered to `inherited` (soft and hard, in `RLIMIT_*` order) and a warning says so.
#[must_use]
pub fn restore(
    steps: &mut Steps,
    limits: &TaskRlimitsEntry,
    inherited: &[(u64, u64)],
    may_raise: bool,
) -> Vec<String> {
    let mut warnings = Vec::new();
    for (i, limit) in limits.rlimits.iter().enumerate().take(COUNT) {
        let (mut cur, mut max) = (limit.cur, limit.max);
        let (had_cur, had_max) = inherited.get(i).copied().unwrap_or((u64::MAX, u64::MAX));
        if max > had_max && !may_raise {
            warnings.push(format!(
                "resource limit {} is lowered from {max} to {had_max}: raising it needs CAP_SYS_RESOURCE",
                NAMES[i]
            ));
            max = had_max;
            cur = cur.min(max);
        }
        if (cur, max) == (had_cur, had_max) {
            continue;
        }
        let value = steps.words(&[cur, max]);
        steps.must(
            Label::Limit(i as u32),
            Op::new(libc::SYS_prlimit64, &[0, i as u64, value.address, 0]),
        );
    }
    warnings
}

/// Names of the limits by number.
pub const NAMES: [&str; COUNT] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];
