//! Kernel state: queued signals: for the process and for single threads, with their siginfo (origin, value) and order,
//! standard ones merged, real-time ones in number.
#![allow(unsafe_code, reason = "raw rt_sigqueueinfo, rt_tgsigqueueinfo and rt_sigtimedwait")]

use std::sync::atomic::{AtomicI32, Ordering};
use zoo::{Check, check, ensure_eq, errno};

/// The part of siginfo_t that queued signals use.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    signo: i32,
    errno: i32,
    code: i32,
    _pad: i32,
    pid: i32,
    uid: u32,
    value: u64,
    rest: [u64; 12],
}

/// What is compared of it.
type Fact = (i32, i32, i32, u32, u64);

fn info(signo: i32, value: u64) -> Info {
    // SI_QUEUE with a made-up origin: it must come back as it is.
    Info {
        signo,
        errno: 0,
        code: libc::SI_QUEUE,
        _pad: 0,
        pid: 4242,
        uid: 1717,
        value,
        rest: [0; 12],
    }
}

fn fact(i: &Info) -> Fact {
    (i.signo, i.code, i.pid, i.uid, i.value)
}

fn to_process(signo: i32, value: u64) -> Check {
    let i = info(signo, value);
    // SAFETY: `i` has the kernel's layout and size.
    check(
        unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, zoo::pid(), signo, &raw const i) } as i32,
        "rt_sigqueueinfo",
    )
}

fn to_thread(tid: i32, signo: i32, value: u64) -> Check {
    let i = info(signo, value);
    // SAFETY: `i` has the kernel's layout and size.
    let ret =
        unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, zoo::pid(), tid, signo, &raw const i) };
    check(ret as i32, "rt_tgsigqueueinfo")
}

/// Takes every pending signal of the set off the queue, in the kernel's order.
fn drain(set: u64) -> Vec<Fact> {
    let mut got = Vec::new();
    loop {
        // SAFETY: zeroed is a valid Info; all pointers are to locals.
        let mut i: Info = unsafe { std::mem::zeroed() };
        let now = zoo::timespec(0);
        // SAFETY: as above.
        let ret = unsafe {
            libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, &raw mut i, &raw const now, 8)
        };
        if ret < 0 {
            if errno() == libc::EINTR {
                continue;
            }
            return got;
        }
        got.push(fact(&i));
    }
}

fn bit(signo: i32) -> u64 {
    1 << (signo - 1)
}

fn main() {
    zoo::run(|z| {
        // Everything but what the checkpoint itself may use (SIGCONT, stops) and what the C library needs.
        let all: u64 = !(bit(libc::SIGCONT)
            | bit(libc::SIGTSTP)
            | bit(libc::SIGTTIN)
            | bit(libc::SIGTTOU)
            | bit(32)
            | bit(33));
        // SAFETY: `all` is the kernel's 8-byte set.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8) };
        let rt = libc::SIGRTMIN() + 6;
        let other = libc::SIGRTMIN() + 20;
        static TID: AtomicI32 = AtomicI32::new(0);
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        let thread = std::thread::spawn(move || {
            TID.store(zoo::tid(), Ordering::SeqCst);
            z.wait_for_check();
            drain(bit(other) | bit(libc::SIGUSR2))
        });
        while TID.load(Ordering::SeqCst) == 0 {
            zoo::nap(1);
        }
        let (me, tid) = (zoo::tid(), TID.load(Ordering::SeqCst));
        // Shared, shared standard (merged: the first stays), private to main, private to the other thread.
        for i in 0..200u64 {
            to_process(rt, i * 0x1_0000_0001)?;
        }
        to_process(libc::SIGUSR1, 1)?;
        to_process(libc::SIGUSR1, 2)?;
        to_process(libc::SIGTERM, u64::MAX)?;
        for i in 0..20 {
            to_thread(me, rt, 1000 + i)?;
            to_thread(me, rt + 1, 2000 + i)?;
            to_thread(tid, other, 3000 + i)?;
        }
        to_thread(tid, libc::SIGUSR2, 77)?;
        // kill(2) and tgkill(2): origin is this process itself.
        // SAFETY: signals to ourselves, all blocked.
        let uid = unsafe {
            libc::kill(zoo::pid(), libc::SIGHUP);
            libc::syscall(libc::SYS_tgkill, zoo::pid(), me, libc::SIGINT);
            libc::kill(zoo::pid(), libc::SIGSEGV);
            libc::getuid()
        };
        z.ready()?;
        z.wait_for_check();

        let got = drain(all & !bit(other) & !bit(libc::SIGUSR2));
        let queued = |signo, value| (signo, libc::SI_QUEUE, 4242, 1717, value);
        let mine = |signo, code| (signo, code, zoo::pid(), uid, 0);
        // The kernel takes a thread's own queue first, synchronous faults and then low numbers first in each.
        let mut want = vec![mine(libc::SIGINT, libc::SI_TKILL)];
        want.extend((0..20).map(|i| queued(rt, 1000 + i)));
        want.extend((0..20).map(|i| queued(rt + 1, 2000 + i)));
        want.extend([
            mine(libc::SIGSEGV, libc::SI_USER),
            mine(libc::SIGHUP, libc::SI_USER),
            queued(libc::SIGUSR1, 1),
            queued(libc::SIGTERM, u64::MAX),
        ]);
        want.extend((0..200).map(|i| queued(rt, i * 0x1_0000_0001)));
        ensure_eq!(got.len(), want.len(), "number of signals queued");
        for (n, (got, want)) in got.iter().zip(&want).enumerate() {
            ensure_eq!(got, want, "signal {n} in the queue (signo, code, pid, uid, value)");
        }
        let got = thread.join().map_err(|_| "thread panicked")?;
        let mut want = vec![queued(libc::SIGUSR2, 77)];
        want.extend((0..20).map(|i| queued(other, 3000 + i)));
        ensure_eq!(got, want, "the thread's own queue");
        Ok(())
    })
}
