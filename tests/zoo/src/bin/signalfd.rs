//! Kernel state: signalfds with their masks, while the signals they wait for are queued.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{check, ensure_eq, errno, ok};

fn read(fd: i32) -> Result<(u32, u64), i32> {
    // SAFETY: zeroed is valid, then written by the kernel.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let size = size_of_val(&info);
        let n = libc::read(fd, (&raw mut info).cast(), size);
        if n == size as isize { Ok((info.ssi_signo, info.ssi_ptr)) } else { Err(errno()) }
    }
}

fn make(signals: &[i32], flags: i32) -> Result<i32, String> {
    // SAFETY: the set is a local.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        Ok(ok(libc::signalfd(-1, &set, flags) as i64, "signalfd")? as i32)
    }
}

fn main() {
    zoo::run(|z| {
        let (usr1, usr2, rt) = (libc::SIGUSR1, libc::SIGUSR2, libc::SIGRTMIN() + 2);
        for signal in [usr1, usr2, rt] {
            zoo::block(signal)?;
        }
        let first = make(&[usr1, rt], libc::SFD_NONBLOCK)?;
        let second = make(&[usr2], libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)?;
        // SAFETY: queues signals, all blocked, to this process.
        unsafe {
            for i in 0..3usize {
                let value = libc::sigval { sival_ptr: (0x1000 + i) as *mut _ };
                check(libc::sigqueue(zoo::pid(), rt, value), "sigqueue")?;
            }
            check(libc::kill(zoo::pid(), usr2), "kill")?;
        }
        z.ready()?;
        z.wait_for_check();
        for i in 0..3 {
            ensure_eq!(read(first), Ok((rt as u32, 0x1000 + i)), "signal {i} in the first");
        }
        ensure_eq!(read(first), Err(libc::EAGAIN), "the first when drained");
        ensure_eq!(read(second).map(|i| i.0), Ok(usr2 as u32), "the second");
        ensure_eq!(read(second), Err(libc::EAGAIN), "the second when drained");
        // SAFETY: integers.
        unsafe { libc::kill(zoo::pid(), usr1) };
        ensure_eq!(read(second), Err(libc::EAGAIN), "the second, of a signal it does not take");
        ensure_eq!(read(first).map(|i| i.0), Ok(usr1 as u32), "the first, of a fresh signal");
        Ok(())
    })
}
