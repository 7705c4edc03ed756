//! Kernel state: pidfds of a living child, of the process itself, and of a child that is dead and waited for.
#![allow(unsafe_code, reason = "pidfds through raw system calls")]

use zoo::{check, ensure, ensure_eq, errno};

fn open(pid: i32) -> Result<i32, String> {
    // SAFETY: integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    check(fd, "pidfd_open")?;
    Ok(fd)
}

fn send(fd: i32, signal: i32) -> i32 {
    // SAFETY: integers and a null pointer.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, 0usize, 0) };
    if ret < 0 { errno() } else { 0 }
}

/// Has the process of `fd` ended?
fn ended(fd: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

fn main() {
    zoo::run(|z| {
        let dead = z.fork(|_| Ok(()))?;
        let of_dead = open(dead)?;
        ensure_eq!(zoo::wait4(dead, 0)?, 0, "status of the first child");
        let living = z.fork(|_| {
            loop {
                zoo::nap(1000);
            }
        })?;
        let of_living = open(living)?;
        let of_self = open(zoo::pid())?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(send(of_dead, 0), libc::ESRCH, "a signal to the dead child");
        ensure_eq!(send(of_self, 0), 0, "a signal to itself");
        ensure!(!ended(of_living), "the living child has ended");
        ensure_eq!(send(of_living, libc::SIGTERM), 0, "a signal to the living child");
        ensure_eq!(zoo::wait4(living, 0)?, libc::SIGTERM, "status of the living child");
        ensure!(ended(of_living) || send(of_living, 0) == libc::ESRCH, "its pidfd does not tell");
        Ok(())
    })
}
