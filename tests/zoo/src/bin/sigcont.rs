//! Kernel state: a SIGCONT that is queued, for the process and for single threads. A traced process stops at one that is sent
//! to it. Its action is the default one, which takes queued ones away when it is set, or with `ZOO_HANDLED` a handler.
#![allow(unsafe_code, reason = "signals of single threads, rt_sigtimedwait")]

use std::sync::atomic::{AtomicI32, Ordering};
use zoo::{Check, check, ensure_eq};

static SET: u64 = 1 << (libc::SIGCONT - 1);

extern "C" fn handler(_: i32) {}

fn to_thread(tid: i32) -> Check {
    // SAFETY: integers.
    check(
        unsafe { libc::syscall(libc::SYS_tgkill, zoo::pid(), tid, libc::SIGCONT) } as i32,
        "tgkill",
    )
}

/// Takes the next one off the queue: who sent it, and how. `None` if there is none.
fn next() -> Option<(i32, i32)> {
    // SAFETY: zeroed is a valid siginfo; all pointers are to locals.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let now = zoo::timespec(0);
        let (set, now) = (&raw const SET, &raw const now);
        let got = libc::syscall(libc::SYS_rt_sigtimedwait, set, &raw mut info, now, 8);
        (got == i64::from(libc::SIGCONT)).then(|| (info.si_code, info.si_pid()))
    }
}

fn main() {
    zoo::run(|z| {
        let handled = z.param("ZOO_HANDLED", 0) == 1;
        if handled {
            // SAFETY: a handler that does nothing.
            unsafe { libc::signal(libc::SIGCONT, handler as *const () as usize) };
        }
        // SAFETY: the kernel's 8-byte set.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const SET, 0, 8) };
        static TID: AtomicI32 = AtomicI32::new(0);
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        let thread = std::thread::spawn(move || {
            TID.store(zoo::tid(), Ordering::SeqCst);
            z.wait_for_check();
            next()
        });
        while TID.load(Ordering::SeqCst) == 0 {
            zoo::nap(1);
        }
        // SAFETY: a signal to ourselves, blocked.
        check(unsafe { libc::kill(zoo::pid(), libc::SIGCONT) }, "kill")?;
        to_thread(zoo::tid())?;
        to_thread(TID.load(Ordering::SeqCst))?;
        z.ready()?;
        z.wait_for_check();
        let others = thread.join().map_err(|_| "thread panicked")?;
        ensure_eq!(others, Some((libc::SI_TKILL, zoo::pid())), "the other thread's");
        ensure_eq!(next(), Some((libc::SI_TKILL, zoo::pid())), "the first thread's");
        ensure_eq!(next(), Some((libc::SI_USER, zoo::pid())), "the process's");
        ensure_eq!(next(), None, "any more");
        // SAFETY: a question.
        let action = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGCONT, std::ptr::null(), &raw mut action);
            action.sa_sigaction
        };
        ensure_eq!(action, if handled { handler as *const () as usize } else { 0 }, "the action");
        Ok(())
    })
}
