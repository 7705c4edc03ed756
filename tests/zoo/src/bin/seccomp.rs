//! Kernel state: seccomp: a filter on the whole program, a second one in a child that is killed for nearly everything
//! (so that a checkpoint must not make it do anything), strict mode in another.
#![allow(unsafe_code, reason = "raw seccomp and system calls")]

use zoo::{check, ensure_eq, errno};

const BPF_LD_W_ABS: u16 = 0x20;
const BPF_JMP_JEQ_K: u16 = 0x15;
const BPF_RET_K: u16 = 0x06;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;

#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

#[repr(C)]
struct Program {
    len: u16,
    filter: *const Insn,
}

/// Verdict `special` for the calls listed, `rest` for all others.
fn install(calls: &[i64], special: u32, rest: u32) -> zoo::Check {
    let mut code = vec![Insn { code: BPF_LD_W_ABS, jt: 0, jf: 0, k: 0 }];
    for &call in calls {
        code.push(Insn { code: BPF_JMP_JEQ_K, jt: 0, jf: 1, k: call as u32 });
        code.push(Insn { code: BPF_RET_K, jt: 0, jf: 0, k: special });
    }
    code.push(Insn { code: BPF_RET_K, jt: 0, jf: 0, k: rest });
    let program = Program { len: code.len() as u16, filter: code.as_ptr() };
    // SAFETY: the program points to `code`, which outlives the call.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")?;
        check(
            libc::syscall(libc::SYS_seccomp, 1, 0, &raw const program) as i32,
            "SECCOMP_SET_MODE_FILTER",
        )
    }
}

/// After this only read, write, exit (and sigreturn) are left: waits for a byte and ends with it.
fn obey(fd: i32) -> ! {
    let mut byte = 99u8;
    // SAFETY: one byte of a local; exit does not return.
    unsafe {
        while libc::syscall(libc::SYS_read, fd, &raw mut byte, 1) != 1 {}
        libc::syscall(libc::SYS_exit, byte as i32);
    }
    unreachable!("exit returned")
}

fn main() {
    zoo::run(|z| {
        let mut pipes = [[0; 2]; 2];
        for p in &mut pipes {
            // SAFETY: room for two descriptors.
            check(unsafe { libc::pipe(p.as_mut_ptr()) }, "pipe")?;
        }
        let [[tight_in, tight_out], [strict_in, strict_out]] = pipes;
        // A task with a filter cannot go strict, so this child comes first.
        let strict = z.fork(|z| {
            z.publish("up.strict", "");
            // SAFETY: integers; from here on only read, write and exit.
            check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, 1) }, "strict mode")?;
            obey(strict_in)
        })?;
        install(&[libc::SYS_getppid, libc::SYS_sethostname], ERRNO | libc::ENOTTY as u32, ALLOW)?;
        let tight = z.fork(|z| {
            z.publish("up.tight", "");
            install(&[libc::SYS_read, libc::SYS_exit], ALLOW, KILL_PROCESS)?;
            obey(tight_in)
        })?;
        z.wait_for("up.tight")?;
        z.wait_for("up.strict")?;
        zoo::nap(20);
        zoo::wait_state(tight, 'S')?;
        zoo::wait_state(strict, 'S')?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(zoo::status_of("/proc/self/status", "Seccomp")?, "2", "seccomp mode");
        ensure_eq!(
            zoo::status_of("/proc/self/status", "Seccomp_filters")?,
            "1",
            "number of filters"
        );
        // SAFETY: takes nothing.
        let refused = unsafe { libc::syscall(libc::SYS_getppid) };
        ensure_eq!((refused, errno()), (-1, libc::ENOTTY), "a call the filter refuses");
        // SAFETY: one byte of a literal each.
        unsafe {
            libc::write(tight_out, [11u8].as_ptr().cast(), 1);
            libc::write(strict_out, [12u8].as_ptr().cast(), 1);
        }
        ensure_eq!(zoo::wait4(tight, 0)?, 11 << 8, "status of the tightly filtered child");
        ensure_eq!(zoo::wait4(strict, 0)?, 12 << 8, "status of the strict child");
        Ok(())
    })
}
