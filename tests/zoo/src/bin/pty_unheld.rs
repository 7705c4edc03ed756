//! Kernel state: a pseudoterminal that is the terminal of a session, while nobody has its slave open: the session can open
//! it by /dev/tty, and its leader is told when the master is closed.
#![allow(unsafe_code, reason = "terminal calls through the C library")]

use std::ffi::CStr;
use zoo::{Flag, block, check, ensure, ensure_eq, on_signal};

static HUNG_UP: Flag = Flag::new();

extern "C" fn hung_up(_: i32) {
    HUNG_UP.set();
}

fn main() {
    zoo::run(|z| {
        let mut name = [0; 64];
        // SAFETY: integers, and room for a name.
        let master = unsafe {
            let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY);
            check(master, "posix_openpt")?;
            check(libc::unlockpt(master), "unlockpt")?;
            check(libc::ptsname_r(master, name.as_mut_ptr(), name.len()), "ptsname")?;
            master
        };
        // SAFETY: the call has ended it with a zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_owned();
        let leader = z.fork(|z| {
            on_signal(libc::SIGHUP, hung_up as extern "C" fn(i32) as usize, 0)?;
            // SAFETY: integers and a string that ends.
            unsafe {
                check(libc::setsid(), "setsid")?;
                check(libc::close(master), "close")?;
                let slave = libc::open(name.as_ptr(), libc::O_RDWR | libc::O_NOCTTY);
                check(slave, "open")?;
                check(libc::ioctl(slave, libc::TIOCSCTTY, 0), "TIOCSCTTY")?;
                check(libc::close(slave), "close")?;
            }
            z.publish("lost", "");
            z.wait_for_check();
            z.wait_for("looked")?;
            let mut group = 0;
            // SAFETY: a string that ends, and an integer that outlives the call.
            unsafe {
                let own = libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR);
                check(own, "/dev/tty afterwards")?;
                check(libc::ioctl(own, libc::TIOCGPGRP, &mut group), "TIOCGPGRP")?;
                check(libc::close(own), "close")?;
            }
            ensure_eq!(group, zoo::pid(), "the foreground group");
            ensure!(!HUNG_UP.is_set(), "SIGHUP came too early");
            z.publish("asked", "");
            ensure!(HUNG_UP.wait(10_000), "no SIGHUP came");
            Ok(())
        })?;
        z.wait_for("lost")?;
        block(libc::SIGHUP)?;
        let session = || {
            let mut session = 0;
            // SAFETY: an integer that outlives the call.
            let done = unsafe { libc::ioctl(master, libc::TIOCGSID, &mut session) };
            (done, session)
        };
        ensure_eq!(session(), (0, leader), "the session of the master");
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(session(), (0, leader), "the session of the master afterwards");
        let mut byte = 0u8;
        // SAFETY: room for a byte.
        let got = unsafe { libc::read(master, (&raw mut byte).cast(), 1) };
        ensure_eq!((got, zoo::errno()), (-1, libc::EIO), "reading without a slave");
        z.publish("looked", "");
        z.wait_for("asked")?;
        // SAFETY: ours.
        check(unsafe { libc::close(master) }, "close")?;
        z.join(leader)
    })
}
