//! A process that takes TCP connections out of repair mode if its parent dies before it has done so itself.
//!
//! In repair mode a connection neither sends nor answers as its program expects, and nothing but `TCP_REPAIR` ends it. A
//! parent that is killed outright cannot; this child holds the same descriptors and sees the end of a pipe.

use crate::call::{Result, SyscallError};
use crate::{Errno, tcp};
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The child; told to end, and reaped, when this is dropped.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct Keeper {
    pid: libc::pid_t,
    told: OwnedFd,
}

impl Keeper {
    /// Starts one for sockets and whether each has `SO_REUSEADDR`, which leaving repair mode clears.
    ///
    /// # Errors
    /// As fork(2) and pipe(2).
    pub fn start(sockets: &[(RawFd, bool)]) -> Result<Keeper> {
        let (ear, told) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|e| SyscallError::new("pipe2", e))?;
        let (listening, own) = (ear.as_raw_fd(), told.as_raw_fd());
        // SAFETY: the child makes system calls only, with memory that is its own copy, and then ends: no lock that another
        // thread held at the fork is ever asked for.
        match unsafe { libc::fork() } {
            -1 => Err(SyscallError::new(
                "fork",
                Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN),
            )),
            0 => watch(listening, own, sockets),
            pid => Ok(Keeper { pid, told }),
        }
    }
}

/// Waits for a word of the parent, or for its end.
fn watch(ear: RawFd, told: RawFd, sockets: &[(RawFd, bool)]) -> ! {
    let (on, silently) = (1i32, -1i32);
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: integers, and pointers to locals of the lengths given.
    unsafe {
        // Who kills the parent's process group or session does not mean this one.
        libc::setsid();
        libc::close(told);
        let mut word = 0u8;
        let heard = loop {
            let n = libc::read(ear, (&raw mut word).cast(), 1);
            if n >= 0 || *libc::__errno_location() != libc::EINTR {
                break n;
            }
        };
        if heard == 0 {
            for (fd, reuse) in sockets {
                let (level, name) = tcp::REPAIR_OPTION;
                libc::setsockopt(*fd, level, name, (&raw const silently).cast(), len);
                if *reuse {
                    let (level, name) = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
                    libc::setsockopt(*fd, level, name, (&raw const on).cast(), len);
                }
            }
        }
        libc::_exit(0)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Should it not hear this, it finds nothing left to do.
        let _ = rustix::io::write(&self.told, &[1]);
        // SAFETY: its own child, whose status nobody wants.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) } < 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
        {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    #[test]
    fn a_dead_parents_connection_leaves_repair_mode() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let fd = connection.as_fd();
        if tcp::repair(fd, tcp::Repair::On).is_err() {
            // Without CAP_NET_ADMIN.
            return;
        }
        let keeper = Keeper::start(&[(fd.as_raw_fd(), true)]).unwrap();
        drop(keeper);
        assert!(tcp::in_repair(fd).unwrap(), "it was told that all is well");
        let keeper = std::mem::ManuallyDrop::new(Keeper::start(&[(fd.as_raw_fd(), true)]).unwrap());
        // What the parent's death does to the pipe.
        // SAFETY: nobody uses the descriptor any more.
        unsafe { libc::close(keeper.told.as_raw_fd()) };
        let until = Instant::now() + Duration::from_secs(10);
        while tcp::in_repair(fd).unwrap() {
            assert!(Instant::now() < until, "it stays in repair mode");
            std::thread::sleep(Duration::from_millis(1));
        }
        let reuse =
            || crate::sockets::option_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap() != 0;
        while !reuse() {
            assert!(Instant::now() < until, "SO_REUSEADDR stays off");
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the child has ended, or is about to.
        unsafe { libc::waitpid(keeper.pid, std::ptr::null_mut(), 0) };
    }
}
