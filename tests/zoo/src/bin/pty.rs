//! Kernel state: pseudoterminals whose master is in the tree: sessions and foreground groups, settings, sizes, what waits in
//! both directions, a line half typed, /dev/tty, packet and exclusive mode, one side closed, never opened.
#![allow(unsafe_code, reason = "terminal calls through the C library")]

use std::ffi::CString;
use zoo::{Check, Zoo, check, ensure, ensure_eq, errno};

fn master() -> Result<(i32, CString), String> {
    // SAFETY: integers, and room for a name.
    unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY);
        ensure!(fd >= 0, "posix_openpt: {}", errno());
        check(libc::unlockpt(fd), "unlockpt")?;
        let mut name = [0; 64];
        check(libc::ptsname_r(fd, name.as_mut_ptr(), name.len()), "ptsname")?;
        Ok((fd, std::ffi::CStr::from_ptr(name.as_ptr()).to_owned()))
    }
}

fn open(name: &CString) -> Result<i32, String> {
    // SAFETY: a string that ends.
    let fd = unsafe { libc::open(name.as_ptr(), libc::O_RDWR | libc::O_NOCTTY) };
    ensure!(fd >= 0, "{name:?}: errno {}", errno());
    Ok(fd)
}

fn settings(fd: i32) -> Result<libc::termios, String> {
    // SAFETY: plain numbers, filled by the call.
    unsafe {
        let mut termios = std::mem::zeroed();
        check(libc::tcgetattr(fd, &mut termios), "tcgetattr")?;
        Ok(termios)
    }
}

fn set(fd: i32, change: impl Fn(&mut libc::termios)) -> Check {
    let mut termios = settings(fd)?;
    change(&mut termios);
    // SAFETY: a live struct.
    check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &termios) }, "tcsetattr")
}

fn write(fd: i32, text: &[u8]) -> Check {
    // SAFETY: a live buffer of that length.
    let n = unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
    ensure_eq!(n, text.len() as isize, "write");
    Ok(())
}

/// What can be read at once.
fn read(fd: i32) -> Vec<u8> {
    let mut buffer = [0u8; 65536];
    // SAFETY: a live buffer of that length; the flags are given back.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
        let n = libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len());
        libc::fcntl(fd, libc::F_SETFL, flags);
        buffer[..n.max(0) as usize].to_vec()
    }
}

fn hung_up(fd: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one struct.
    unsafe { libc::poll(&mut poll, 1, 0) };
    poll.revents & libc::POLLHUP != 0
}

fn leader(z: &Zoo, name: &CString) -> Check {
    // SAFETY: integers and strings.
    let (slave, tty) = unsafe {
        check(libc::setsid(), "setsid")?;
        let slave = open(name)?;
        check(libc::ioctl(slave, libc::TIOCSCTTY, 0), "TIOCSCTTY")?;
        let path = if z.param("ZOO_CTTY", 1) == 1 { c"/dev/tty" } else { name.as_c_str() };
        (slave, libc::open(path.as_ptr(), libc::O_RDWR))
    };
    ensure!(tty >= 0, "/dev/tty: {}", errno());
    let job = z.fork(|z| {
        // SAFETY: integers.
        unsafe { check(libc::setpgid(0, 0), "setpgid")? };
        z.publish("job", "");
        z.wait_for_check();
        // SAFETY: integers.
        unsafe {
            ensure_eq!(libc::tcgetpgrp(slave), zoo::pid(), "the foreground group");
            ensure_eq!(libc::tcgetpgrp(tty), zoo::pid(), "the foreground group of /dev/tty");
            let again = libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR);
            ensure!(again >= 0, "the job has no terminal: {}", errno());
        }
        ensure_eq!(read(slave), b"first\n", "a line");
        ensure_eq!(read(slave), b"second\n", "another line");
        ensure_eq!(read(slave), b"", "a line that is not ended");
        z.publish("lines", "");
        z.wait_for("typed")?;
        zoo::nap(50);
        ensure_eq!(read(slave), b"half and whole\n", "the line that was being typed");
        write(tty, b"bye\n")
    })?;
    z.wait_for("job")?;
    // SAFETY: integers; SIGTTOU would stop who is in the background then.
    unsafe {
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
        check(libc::tcsetpgrp(slave, job), "tcsetpgrp")?;
    }
    z.publish("led", "");
    z.wait_for_check();
    // SAFETY: integers.
    unsafe { ensure_eq!(libc::getsid(0), zoo::pid(), "the session") };
    z.join(job)
}

fn main() {
    zoo::run(|z| {
        let (shell, name) = master()?;
        // Without a session and what is typed there; and two facts that CRIU does not keep are not asked for.
        let simple = z.param("ZOO_SIMPLE", 0) == 1;
        let child = match simple {
            true => open(&name)?,
            false => z.fork(|z| leader(z, &name))?,
        };
        if !simple {
            z.wait_for("led")?;
        }
        let size = libc::winsize { ws_row: 33, ws_col: 101, ws_xpixel: 7, ws_ypixel: 9 };
        // SAFETY: a live struct.
        unsafe { check(libc::ioctl(shell, libc::TIOCSWINSZ, &size), "TIOCSWINSZ")? };
        set(shell, |t| {
            t.c_lflag &= !libc::ECHO;
            t.c_cc[libc::VINTR] = 7;
        })?;
        if !simple {
            write(shell, b"first\nsecond\nhalf")?;
        }

        // Both sides here, raw, much data on its way.
        let (raw, name) = master()?;
        let slave = open(&name)?;
        set(slave, |t| unsafe { libc::cfmakeraw(t) })?;
        let much: Vec<u8> = (0..9000u32).map(|i| (i % 251) as u8).collect();
        write(slave, &much)?;
        write(raw, b"\x03\x04\x00 as it is\r\n")?;
        // SAFETY: integers.
        unsafe { check(libc::ioctl(slave, libc::TIOCEXCL), "TIOCEXCL")? };

        // Packet mode, its slave never opened; its slave opened and closed; its master closed.
        let (packets, _) = master()?;
        let on = 1i32;
        // SAFETY: a live number.
        unsafe { check(libc::ioctl(packets, libc::TIOCPKT, &on), "TIOCPKT")? };
        let (alone, name) = master()?;
        let other = open(&name)?;
        set(other, |t| t.c_oflag = 0)?;
        write(other, b"last words\n")?;
        let (gone, name) = master()?;
        let orphan = open(&name)?;
        // SAFETY: two descriptors of ours.
        unsafe { (libc::close(other), libc::close(gone)) };
        ensure!(hung_up(alone) && !hung_up(packets), "poll before the checkpoint");
        z.ready()?;
        z.wait_for_check();

        if !simple {
            z.wait_for("lines")?;
            write(shell, b" and whole\n")?;
            z.publish("typed", "");
        }
        // SAFETY: a live struct; integers.
        unsafe {
            let mut now: libc::winsize = std::mem::zeroed();
            check(libc::ioctl(shell, libc::TIOCGWINSZ, &mut now), "TIOCGWINSZ")?;
            ensure_eq!(
                (now.ws_row, now.ws_col, now.ws_xpixel, now.ws_ypixel),
                (33, 101, 7, 9),
                "window size"
            );
            let mut value = 0i32;
            check(libc::ioctl(packets, 0x8004_5438, &mut value), "TIOCGPKT")?;
            ensure_eq!(value, 1, "packet mode");
            check(libc::ioctl(slave, 0x8004_5440, &mut value), "TIOCGEXCL")?;
            ensure!(simple || value == 1, "it is not exclusive");
        }
        let now = settings(shell)?;
        ensure_eq!((now.c_lflag & libc::ECHO, now.c_cc[libc::VINTR]), (0, 7), "settings");
        if !simple {
            z.join(child)?;
            ensure_eq!(read(shell), b"bye\r\n", "what the job said");
        }
        let mut all = Vec::new();
        while all.len() < much.len() {
            let part = read(raw);
            ensure!(!part.is_empty(), "only {} of {} bytes wait", all.len(), much.len());
            all.extend(part);
        }
        ensure!(all == much, "what waits at a master");
        ensure_eq!(read(slave), b"\x03\x04\x00 as it is\r\n", "what waits at a slave");
        ensure!(!hung_up(packets) && !hung_up(raw), "a slave seems to be closed");
        ensure!(simple || hung_up(alone), "a slave is no longer closed");
        ensure!(simple || read(alone) == b"last words\n", "what a closed slave wrote is gone");
        ensure!(settings(orphan).is_err() && hung_up(orphan), "a slave without a master");
        Ok(())
    })
}
