//! Zombies whose wait status says that they have left a core file (`WCOREDUMP`): it does so only of those that have left one.
//!
//! So such a zombie leaves one again, of 4 KiB, the least that the kernel makes, where nobody finds it: in a file system in memory
//! that is mounted nowhere and is the working directory of nobody else. It is gone when the zombie is dead. The name of a core file
//! must lead there: where the system wants them elsewhere, or gives them to a program, none is made and the flag is lost.

use super::build::op;
use super::read::Task;
use rewake_objects::pids::Pids;
use rewake_objects::problem::text;
use rewake_objects::steps::{Label, Steps};
use rewake_proc::read::ProcDir;
use std::time::{Duration, Instant};

/// `WCOREFLAG`, beside the signal.
const FLAG: u32 = 0x80;
/// The least size a core file may be limited to: a page.
const LEAST: u64 = 4096;

/// Did this zombie leave a core file?
fn has_flag(task: &Task) -> bool {
    let status = task.tc.exit_code;
    task.alive.is_none() && status & 0x7f != 0 && status & FLAG != 0
}

/// Does a core file's name lead to the working directory of who leaves it?
fn is_beside(pattern: &str) -> bool {
    // Of what replaces `%` the kernel makes slashes something else.
    let pattern = pattern.trim_end_matches('\n');
    !pattern.is_empty() && !pattern.starts_with(['|', '@']) && !pattern.contains('/')
}

/// What is to be done before a zombie gets the signal it died of; a limit for its core file is set in any case.
pub(super) fn prepare(steps: &mut Steps, task: &Task) {
    const RLIMIT_CORE: u64 = 4;
    let label = Label::Text("ending a zombie");
    let pattern = || std::fs::read_to_string("/proc/sys/kernel/core_pattern").ok();
    let limit = if has_flag(task) && pattern().is_some_and(|p| is_beside(&p)) {
        nowhere(steps);
        LEAST
    } else {
        0
    };
    let limit = steps.words(&[limit, limit]);
    steps.may(label, op(libc::SYS_prlimit64, &[0, RLIMIT_CORE, limit.address, 0]));
}

/// Goes to a directory of its own, where files may be made.
fn nowhere(steps: &mut Steps) {
    const CREATE: u64 = 6;
    const PR_SET_DUMPABLE: u64 = 4;
    let label = Label::Text("making a place for a core file");
    // If there is no such place, it is to stay where nobody can make a file.
    let proc = steps.data(b"/proc/self\0");
    steps.must(label, op(libc::SYS_chdir, &[proc.address]));
    let kind = steps.data(b"tmpfs\0");
    let context = steps.may(label, op(libc::SYS_fsopen, &[kind.address, 0])) as u32;
    let create = op(libc::SYS_fsconfig, &[0, CREATE, 0, 0, 0]);
    steps.may(label, create.arg_result(0, context, 0));
    let mount = op(libc::SYS_fsmount, &[0, 0, 0]).arg_result(0, context, 0);
    let mount = steps.may(label, mount) as u32;
    steps.may(label, op(libc::SYS_fchdir, &[0]).arg_result(0, mount, 0));
    steps.may(label, op(libc::SYS_prctl, &[PR_SET_DUMPABLE, 1, 0, 0, 0]));
}

/// The zombies among tasks that exist whose wait status has lost the flag, in words.
pub(super) fn lost(tasks: &[Task], pids: &Pids) -> Vec<String> {
    let until = Instant::now() + Duration::from_secs(1);
    let lost = |task: &&Task| has_flag(task) && status_of(task, pids, until) & FLAG == 0;
    let in_words = |task: &Task| {
        format!(
            "process {} ({}), a zombie: its wait status does not tell any more that it left a core file",
            task.pid,
            text(&task.comm)
        )
    };
    tasks.iter().filter(lost).map(in_words).collect()
}

/// The wait status of a zombie that has been told to die.
fn status_of(task: &Task, pids: &Pids, until: Instant) -> u32 {
    loop {
        let dir = pids.outer(task.pid).and_then(|pid| ProcDir::open(pid).ok());
        match dir.and_then(|dir| dir.stat(&mut Vec::new()).ok()) {
            Some(stat) if stat.state.is_dead() => return stat.exit_code as u32,
            Some(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            _ => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_beside;

    #[test]
    fn only_plain_names_are_beside() {
        for pattern in ["core\n", "core.%p", "%e-%t\n", "core"] {
            assert!(is_beside(pattern), "{pattern:?}");
        }
        let elsewhere =
            ["\n", "", "/var/core", "|/usr/lib/apport %p", "@/run/coredump.socket", "cores/%p"];
        for pattern in elsewhere {
            assert!(!is_beside(pattern), "{pattern:?}");
        }
    }
}
