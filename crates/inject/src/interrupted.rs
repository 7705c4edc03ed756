//! Where a thread goes on that was stopped: system calls that the stop cut short, restartable sequences.

use rewake_sys::ptrace::{self, Registers};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// System calls that end with `EINTR` after a stop without a signal, and that the kernel does not restart by itself.
/// Executing them again is invisible to the program.
const REPEATED: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    333, // io_pgetevents, which libc lacks on this target
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_flock,
];

const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The kernel left `regs` inside a system call that our stop interrupted with a plain `EINTR`: make it be executed
/// again. `None` if there is nothing to mend. Not for threads with a deliverable signal: those must see the `EINTR`.
#[must_use]
pub fn mend_interrupted(regs: &Registers) -> Option<Registers> {
    let number = regs.orig_rax as i64;
    (regs.rax as i64 == EINTR && REPEATED.contains(&number)).then(|| again(regs, regs.orig_rax))
}

fn again(regs: &Registers, number: u64) -> Registers {
    // Both forms of the instruction (syscall, int 0x80) are two bytes long.
    Registers { rax: number, orig_rax: u64::MAX, rip: regs.rip.wrapping_sub(2), ..*regs }
}

/// Registers that resume `regs` without the kernel's help: interrupted calls are made again, those with a restart
/// block through restart_syscall(2). Used where the kernel's own restart logic does not run.
#[must_use]
pub fn self_resuming(regs: &Registers) -> Registers {
    if (regs.orig_rax as i64) < 0 {
        return *regs;
    }
    match regs.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => again(regs, regs.orig_rax),
        ERESTART_RESTARTBLOCK => again(regs, libc::SYS_restart_syscall as u64),
        _ => mend_interrupted(regs).unwrap_or(*regs),
    }
}

/// As [`out_of_sequence`], of a thread whose registered area is still to be asked for.
#[must_use]
pub fn after_rseq(tid: i32, memory: &File, regs: &Registers) -> Registers {
    let area = ptrace::rseq_config(tid).map_or(0, |config| config.pointer);
    out_of_sequence(area, memory, regs)
}

/// The registers with which a thread must go on after it ran foreign code: if it stands in a restartable sequence
/// (rseq(2)), at the sequence's abort handler. The kernel would send it there by itself after a preemption, but forgets
/// the sequence when it sees the thread elsewhere. `area` is the address of its `struct rseq`, 0 if it has none.
#[must_use]
pub fn out_of_sequence(area: u64, memory: &File, regs: &Registers) -> Registers {
    let abort = || {
        let word = |at: u64| {
            let mut bytes = [0u8; 8];
            memory.read_exact_at(&mut bytes, at).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        // struct rseq: cpu_id_start, cpu_id, rseq_cs
        let cs = word(area.checked_add(8).filter(|_| area != 0)?)?;
        if cs == 0 {
            return None;
        }
        // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
        let (start, len) = (word(cs.checked_add(8)?)?, word(cs.checked_add(16)?)?);
        let abort = word(cs.checked_add(24)?)?;
        (regs.rip.wrapping_sub(start) < len).then_some(abort)
    };
    match abort() {
        Some(abort) => Registers { rip: abort, ..*regs },
        None => *regs,
    }
}
