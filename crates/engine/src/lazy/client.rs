//! The restore's side: it finds a pager or starts one, and tells it of each process.

use super::wire;
use crate::error::{Error, Result};
use crate::options::RestoreOptions;
use crate::peer::is_ours;
use crate::servant;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::File;

/// The log of a pager that a restore has started, in the work directory.
pub const LOG: &str = "lazy-pages.log";

/// A connection to a pager.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// We have started it.
    own: bool,
    /// The userfaultfds told: as long as we hold them nothing reads as zeros, whatever becomes of the pager.
    held: Vec<OwnedFd>,
}

fn lost(e: Errno) -> Error {
    Error::new(format!("the pager (lazy-pages) that was to bring the memory is gone: {e}"))
        .hint("its own output or log says why")
}

impl Client {
    /// Connects to the pager in the work directory, or starts one if there is none.
    ///
    /// # Errors
    /// It does not start.
    pub fn connect(options: &RestoreOptions) -> Result<Client> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(lost)?;
        // The command works in the work directory: so the address is short enough.
        let address = SocketAddrUnix::new(wire::SOCKET).map_err(lost)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) if is_ours(socket.as_fd()) != Ok(true) => Err(Error::new(format!(
                "{}: it belongs to another user, who would get hold of the memory",
                options.work_dir.join(wire::SOCKET).display()
            ))
            .hint("choose another work directory with -W, or end that process")),
            Ok(()) if options.new_pidns => {
                Err(Error::new(
                    "a pager of its own (lazy-pages) cannot serve a tree in a PID namespace of its own (--new-pidns)",
                )
                .hint("end it: a restore with --lazy-pages starts one that can"))
            }
            Ok(()) => {
                if options.record_working_set {
                    log::warn!(
                        "--record-working-set: it is the pager (lazy-pages) that has to be told"
                    );
                }
                Ok(Client { socket, own: false, held: Vec::new() })
            }
            Err(Errno::NOENT | Errno::CONNREFUSED) => start(options),
            Err(e) => Err(Error::new(format!("{}: {e}", wire::SOCKET))),
        }
    }

    /// Tells of a process: its pid in the images, its userfaultfd, itself.
    ///
    /// # Errors
    /// The pager is gone.
    pub fn process(&mut self, pid: i32, uffd: OwnedFd, pidfd: &OwnedFd) -> Result<()> {
        let fds = [uffd.as_fd(), pidfd.as_fd()];
        let fds = if self.own { &fds[..] } else { &fds[..1] };
        wire::send_process(self.socket.as_fd(), pid, fds).map_err(lost)?;
        self.held.push(uffd);
        Ok(())
    }

    /// Tells of a process that waits for nothing.
    ///
    /// # Errors
    /// The pager is gone.
    pub fn nothing(&mut self, pid: i32) -> Result<()> {
        wire::send_nothing(self.socket.as_fd(), pid).map_err(lost)
    }

    /// Tells that all are ready to go on.
    ///
    /// # Errors
    /// The pager is gone.
    pub fn ready(&mut self) -> Result<()> {
        wire::send_ready(self.socket.as_fd()).map_err(lost)?;
        let mut byte = [0];
        // One that is not ours says nothing.
        match self.own.then(|| rustix::io::read(&self.socket, &mut byte)) {
            None | Some(Ok(1)) => Ok(()),
            Some(Ok(_)) => Err(lost(Errno::CONNRESET)),
            Some(Err(e)) => Err(lost(e)),
        }
    }

    /// Does the pager live, or has it done its work?
    ///
    /// # Errors
    /// Neither.
    pub fn check(&self) -> Result<()> {
        if !self.own {
            return Ok(());
        }
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&now)).map_err(lost)? == 0 {
            return Ok(());
        }
        match rustix::io::read(&self.socket, &mut [0]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(lost(Errno::CONNRESET)),
            Err(e) => Err(lost(e)),
        }
    }
}

/// Starts a pager for this restore alone.
fn start(options: &RestoreOptions) -> Result<Client> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(format!("the pager of a lazy restore does not start: {e}"))
    };
    let path = options.work_dir.join(LOG);
    let log = File::create(&path).map_err(|e| failed(&format!("{}: {e}", path.display())))?;
    let (socket, child) = servant::start("pager", SocketType::STREAM, |command| {
        command.arg(&options.images_dir).stderr(log);
        if !options.verify {
            command.arg("--no-verify");
        }
        if options.record_working_set {
            command.arg("--record-working-set");
        }
    })
    .map_err(|e| failed(&e))?;
    log::info!("process {} brings the memory; its log is {}", child.id(), path.display());
    Ok(Client { socket, own: true, held: Vec::new() })
}
