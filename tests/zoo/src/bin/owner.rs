//! Kernel state: the owner of a descriptor (`F_SETOWN_EX`) with its signal and the user ids of whoever set it, by which the
//! kernel decides whether the owner is signalled.
#![allow(unsafe_code, reason = "fcntl and raw system calls")]

use std::sync::atomic::{AtomicU32, Ordering};
use zoo::{check, ensure_eq, ok};

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
/// `F_OWNER_PID`.
const PROCESS: i32 = 1;

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Makes a pipe whose reading end signals this process, as set by somebody with these user ids.
fn owned(uids: [u32; 2], signal: i32) -> Result<[i32; 2], String> {
    let mut pipe = [0; 2];
    let own = [PROCESS, zoo::pid()];
    // SAFETY: live arrays of the right size, and numbers. The saved user id stays, so the way back is open.
    unsafe {
        check(libc::pipe2(pipe.as_mut_ptr(), libc::O_NONBLOCK), "pipe2")?;
        ok(libc::syscall(libc::SYS_setresuid, uids[0], uids[1], u32::MAX), "setresuid")?;
        let set = libc::fcntl(pipe[0], F_SETOWN_EX, own.as_ptr());
        ok(libc::syscall(libc::SYS_setresuid, 0, 0, u32::MAX), "setresuid")?;
        check(set, "F_SETOWN_EX")?;
        check(libc::fcntl(pipe[0], F_SETSIG, signal), "F_SETSIG")?;
        check(libc::fcntl(pipe[0], libc::F_SETFL, libc::O_NONBLOCK | libc::O_ASYNC), "F_SETFL")?;
    }
    Ok(pipe)
}

fn look(pipe: [i32; 2]) -> Result<([i32; 2], [u32; 2], i32), String> {
    let (mut owner, mut uids) = ([0; 2], [0; 2]);
    // SAFETY: live arrays of the right size.
    let signal = unsafe {
        check(libc::fcntl(pipe[0], F_GETOWN_EX, owner.as_mut_ptr()), "F_GETOWN_EX")?;
        check(libc::fcntl(pipe[0], F_GETOWNER_UIDS, uids.as_mut_ptr()), "F_GETOWNER_UIDS")?;
        ok(libc::fcntl(pipe[0], F_GETSIG).into(), "F_GETSIG")? as i32
    };
    Ok((owner, uids, signal))
}

fn main() {
    zoo::run(|z| {
        let signal = libc::SIGRTMIN() + 3;
        // SAFETY: the handler only counts.
        unsafe { libc::signal(signal, count as extern "C" fn(i32) as libc::sighandler_t) };
        // The first may not signal root, the second may.
        let strange = owned([1234, 2345], signal)?;
        let usual = owned([0, 0], signal)?;
        z.ready()?;
        z.wait_for_check();
        let own = [PROCESS, zoo::pid()];
        ensure_eq!(look(strange)?, (own, [1234, 2345], signal), "owner under other user ids");
        ensure_eq!(look(usual)?, (own, [0, 0], signal), "owner");
        for (pipe, signals) in [(strange, 0), (usual, 1)] {
            // SAFETY: one byte that is live.
            check(unsafe { libc::write(pipe[1], b"!".as_ptr().cast(), 1) } as i32, "write")?;
            zoo::nap(1);
            ensure_eq!(SIGNALS.load(Ordering::Relaxed), signals, "signals so far");
        }
        Ok(())
    })
}
