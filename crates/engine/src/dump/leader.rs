//! A process whose first thread, the leader, has ended while others go on: pthread_exit(3) in `main`.
//!
//! The kernel keeps such a leader as a zombie until the last thread ends. In the images it is a thread that is about to make the
//! same exit(2) again, with all signals blocked: that is what a restored one does as soon as it is let go, and what any other
//! program that reads these images makes of it.

use super::outside::Outside;
use super::survey::TaskSurvey;
use super::thread::{Facts, ThreadState};
use crate::freeze::Task;
use crate::report::Obstacle;
use rewake_image::messages::{
    RewakeThreadEntry, RseqEntry, SignalQueueEntry, ThreadCoreEntry, ThreadInfoX86,
};
use rewake_objects::Problem;
use rewake_objects::memory::vma::status;
use rewake_objects::problem::text;
use rewake_objects::task::{registers, seccomp, signals};
use rewake_sys::ptrace::Registers;
use std::os::unix::fs::FileExt;

/// The leader of a task, which has ended with a wait status: a thread that makes its last system call. `states` are those of the
/// living threads.
///
/// # Errors
/// There is nothing it could make that call with.
pub fn ended(
    task: &Task,
    wait_status: i32,
    facts: Facts,
    outside: &Outside,
    states: &[ThreadState],
) -> Result<ThreadState, Problem> {
    let (Some(rip), Some(first)) = (place(outside, states), states.first()) else {
        let reason = "it has ended while others go on, and no place in memory is known where it could make its exit(2) again";
        return Err(Problem::new("first thread", reason)
            .remedy("try again when one of the others waits in a system call"));
    };
    // Segments and flags are everybody's; the other registers are nobody's any more.
    let Registers { cs, eflags, ss, ds, es, fs, gs, .. } = first.regs;
    let regs = Registers {
        rip,
        rax: libc::SYS_exit as u64,
        orig_rax: u64::MAX,
        rdi: exit_code(wait_status),
        cs,
        eflags,
        ss,
        ds,
        es,
        fs,
        gs,
        ..Registers::default()
    };
    const DISABLED: u32 = libc::SS_DISABLE as u32;
    let mut state = ThreadState {
        core: ThreadCoreEntry {
            blk_sigset: Some(u64::MAX),
            signals_p: Some(SignalQueueEntry::default()),
            sas: Some(signals::alternate_stack(0, 0, DISABLED)),
            rseq_entry: first.core.rseq_entry.as_ref().map(|_| RseqEntry::default()),
            ..ThreadCoreEntry::default()
        },
        info: ThreadInfoX86 {
            clear_tid_addr: 0,
            gpregs: registers::general(&regs),
            ..first.info.clone()
        },
        extra: RewakeThreadEntry { tid: task.pid() as u32, ..RewakeThreadEntry::default() },
        mask: u64::MAX,
        pending: 0,
        regs,
        securebits: None,
        status: None,
        seccomp: common(states),
    };
    state.add(facts);
    Ok(state)
}

/// The filters that all threads have are installed by one of them for all, this one too: it had them itself, or a thread that
/// ends is nothing they would object to. Others are nothing to it.
fn common(states: &[ThreadState]) -> seccomp::State {
    let mut all = states.iter().map(|state| &state.seccomp);
    let first = all.next().cloned().unwrap_or_default();
    if all.all(|other| *other == first) { first } else { seccomp::State::default() }
}

/// What was given to exit(2), by the wait status that came of it.
fn exit_code(wait_status: i32) -> u64 {
    u64::from(wait_status as u32 >> 8 & 0xff)
}

/// Where the process has a `syscall` instruction: where a thread waits in one, or in the vdso.
fn place(outside: &Outside, states: &[ThreadState]) -> Option<u64> {
    let vdso = outside.vmas.iter().find(|v| v.entry.status & status::VDSO != 0);
    let vdso = vdso.map_or(0..0, |v| v.entry.start..v.entry.end);
    let is_syscall = |at: &u64| {
        let mut code = [0; SYSCALL.len()];
        outside.memory.read_exact_at(&mut code, *at).is_ok() && code == SYSCALL
    };
    let mut waiting = waiting(states.iter().map(|state| &state.regs));
    // Another kernel's vdso may be another one.
    let outside_it = waiting.find(|at| !vdso.contains(at) && is_syscall(at));
    outside_it.or_else(|| Some(vdso.start + in_code(&outside.vdso)?))
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Where threads may have made the system calls that they are in: those that are made again have the address for that.
fn waiting<'a>(threads: impl Iterator<Item = &'a Registers>) -> impl Iterator<Item = u64> {
    let inside = threads.filter(|regs| regs.orig_rax as i64 >= 0);
    inside.flat_map(|regs| [regs.rip, regs.rip.wrapping_sub(SYSCALL.len() as u64)])
}

/// Offset of the first `syscall` instruction of some code.
fn in_code(code: &[u8]) -> Option<u64> {
    code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL).map(|at| at as u64)
}

/// Children of such processes that are to get a signal when their parent dies. The kernel means the thread that has made them; a
/// restored leader makes all of them before it ends. `ended` are the processes whose leader has.
pub fn signalled(tasks: &[TaskSurvey], ended: &[i32]) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    for parent in tasks.iter().filter(|task| ended.contains(&task.pid)) {
        for child in tasks.iter().filter(|task| task.ppid == parent.pid) {
            let cores = child.alive.iter().flat_map(|alive| &alive.inside.cores);
            let mut signals = cores.filter_map(|(_, core)| core.thread_core.as_ref()?.pdeath_sig);
            if let Some(signal) = signals.next() {
                let reason = format!(
                    "signal {signal} would come when the first thread of its parent {} ({}), which has ended, ends again after a \
                     restore",
                    parent.pid,
                    text(&parent.comm)
                );
                let problem = Problem::new("parent death signal", reason)
                    .remedy("have it do without (PR_SET_PDEATHSIG) for the time of the dump");
                obstacles.push(problem.of(child.pid, &child.comm));
            }
        }
    }
    obstacles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_what_exit_was_given() {
        assert_eq!(exit_code(0), 0);
        assert_eq!(exit_code(42 << 8), 42);
        assert_eq!(exit_code(255 << 8), 255);
    }

    #[test]
    fn a_system_call_is_looked_for_where_threads_are_in_one() {
        let outside = Registers { rip: 0x1000, orig_rax: u64::MAX, ..Registers::default() };
        let inside = Registers { rip: 0x2002, orig_rax: 35, ..Registers::default() };
        let found: Vec<u64> = waiting([outside, inside].iter()).collect();
        assert_eq!(found, [0x2002, 0x2000]);
    }

    #[test]
    fn code_has_a_system_call_or_none() {
        assert_eq!(in_code(&[0x90, 0x0f, 0x0b, 0x0f, 0x05, 0xc3]), Some(3));
        assert_eq!(in_code(&[0x90, 0x0f]), None);
        assert_eq!(in_code(&[]), None);
    }
}
