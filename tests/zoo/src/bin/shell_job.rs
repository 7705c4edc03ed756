//! Kernel state: a job of a shell: descriptors of the shell's terminal, its session, its foreground process group. Started
//! from an interactive shell on a terminal; dumped and restored with --shell-job.
#![allow(unsafe_code, reason = "terminal calls through the C library")]

use zoo::{check, ensure, ensure_eq};

fn main() {
    zoo::run(|z| {
        // SAFETY: integers only.
        unsafe {
            ensure_eq!((libc::isatty(0), libc::isatty(1), libc::isatty(2)), (1, 1, 1), "terminals");
            // The shell leads the session, this job its own group in the foreground.
            ensure!(libc::getsid(0) != zoo::pid(), "this is no job of a shell");
        }
        println!("job is ready");
        z.ready()?;
        z.wait_for_check();
        // SAFETY: integers only; `typed` is valid for its length.
        unsafe {
            ensure_eq!((libc::isatty(0), libc::isatty(1), libc::isatty(2)), (1, 1, 1), "terminals");
            ensure!(libc::getsid(0) != zoo::pid(), "the job became a session leader");
            let tty = libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR);
            ensure!(tty >= 0, "no controlling terminal: {}", std::io::Error::last_os_error());
            ensure_eq!(libc::tcgetpgrp(tty), libc::getpgid(0), "foreground group of the terminal");
            check(
                libc::write(1, c"who types?\n".as_ptr().cast(), 11) as i32,
                "write to the terminal",
            )?;
            let mut typed = [0u8; 64];
            let n = libc::read(0, typed.as_mut_ptr().cast(), typed.len());
            ensure_eq!(&typed[..n.max(0) as usize], b"somebody\n", "line typed at the terminal");
        }
        Ok(())
    })
}
