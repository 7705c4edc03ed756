//! Kernel state: the action of every signal: handlers, SIG_IGN, SIG_DFL, flags, masks, restorer; another set of them in
//! a child.
#![allow(unsafe_code, reason = "raw rt_sigaction, so that the restorer and every flag are seen")]

use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, check, ensure, ensure_eq};

/// The kernel's struct sigaction on x86-64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

static SEEN: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];
static MASKS: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

extern "C" fn count(signo: i32) {
    let mut mask = 0u64;
    // SAFETY: `mask` is the kernel's 8-byte set.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
    SEEN[signo as usize].fetch_add(1, Ordering::SeqCst);
    MASKS[signo as usize].store(mask, Ordering::SeqCst);
}

extern "C" fn count_info(signo: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to SA_SIGINFO handlers.
    if unsafe { (*info).si_signo } == signo {
        count(signo);
    }
}

fn action(signo: i32, new: Option<&Action>) -> Result<Action, String> {
    let mut old = Action::default();
    let new = new.map_or(std::ptr::null(), |a| a as *const Action);
    // SAFETY: both pointers are to the kernel's layout or null.
    let ret = unsafe { libc::syscall(libc::SYS_rt_sigaction, signo, new, &raw mut old, 8) };
    check(ret as i32, &format!("rt_sigaction({signo})"))?;
    Ok(old)
}

fn catchable() -> impl Iterator<Item = i32> {
    (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s))
}

const SA_RESTORER: u64 = 0x0400_0000;

fn install(restorer: u64, shift: u64, with_trap: bool) -> Check {
    for signo in catchable() {
        // Tracers that step or use breakpoints lose the action of a blocked or ignored SIGTRAP: a variant of its own.
        if signo == libc::SIGTRAP && !with_trap {
            continue;
        }
        let n = signo as u64 + shift;
        let mut flags = 0;
        for (bit, flag) in [
            libc::SA_NODEFER,
            libc::SA_RESTART,
            libc::SA_ONSTACK,
            libc::SA_SIGINFO,
            libc::SA_NOCLDSTOP,
            0x800, // SA_EXPOSE_TAGBITS
        ]
        .into_iter()
        .enumerate()
        {
            if n.wrapping_mul(0x9e37_79b9) >> bit & 1 == 1 {
                flags |= flag as u64;
            }
        }
        let handler = match n % 5 {
            0 => libc::SIG_IGN as u64,
            1 => libc::SIG_DFL as u64,
            _ if flags & libc::SA_SIGINFO as u64 != 0 => count_info as *const () as u64,
            _ => count as *const () as u64,
        };
        // Never resettable ones here: SA_RESETHAND is tried apart. KILL and STOP cannot be masked.
        let mask = n.wrapping_mul(0x1234_5678_9abc_def1) & !(1 << 8 | 1 << 18);
        action(signo, Some(&Action { handler, flags: flags | SA_RESTORER, restorer, mask }))?;
    }
    Ok(())
}

fn all() -> Result<Vec<Action>, String> {
    catchable().map(|s| action(s, None)).collect()
}

fn main() {
    zoo::run(|z| {
        zoo::on_signal(libc::SIGUSR1, count as *const () as usize, 0)?;
        let with_trap = z.param("ZOO_TRAP", 0) == 1;
        let restorer = action(libc::SIGUSR1, None)?.restorer;
        let child = z.fork(|z| {
            install(restorer, 3, with_trap)?;
            let before = all()?;
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(all()?, before, "actions in the child");
            Ok(())
        })?;
        z.wait_for("up")?;
        install(restorer, 0, with_trap)?;
        // Children must stay waitable.
        action(libc::SIGCHLD, Some(&Action { handler: 0, flags: SA_RESTORER, restorer, mask: 5 }))?;
        let once = Action {
            handler: count as *const () as u64,
            flags: SA_RESTORER | libc::SA_RESETHAND as u64 | libc::SA_ONSTACK as u64,
            restorer,
            mask: 0,
        };
        action(libc::SIGUSR2, Some(&once))?;
        let before = all()?;
        z.ready()?;
        z.wait_for_check();
        for (signo, (got, want)) in catchable().zip(all()?.iter().zip(&before)) {
            ensure_eq!(got, want, "action of signal {signo}");
        }
        for (signo, a) in catchable().zip(&before) {
            if a.handler < 2 || signo == libc::SIGCONT {
                continue;
            }
            let seen = SEEN[signo as usize].load(Ordering::SeqCst);
            // SAFETY: sends a signal with a handler to this thread.
            unsafe { libc::syscall(libc::SYS_tgkill, zoo::pid(), zoo::tid(), signo) };
            ensure_eq!(
                SEEN[signo as usize].load(Ordering::SeqCst),
                seen + 1,
                "deliveries of signal {signo}"
            );
            let own = if a.flags & libc::SA_NODEFER as u64 == 0 { 1u64 << (signo - 1) } else { 0 };
            ensure_eq!(
                MASKS[signo as usize].load(Ordering::SeqCst),
                a.mask | own,
                "mask in handler of {signo}"
            );
        }
        ensure!(action(libc::SIGUSR2, None)?.handler == 0, "SA_RESETHAND did not reset the action");
        z.join(child)
    })
}
