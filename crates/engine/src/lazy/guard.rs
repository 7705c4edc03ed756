//! The guard: if the pager dies, its userfaultfds are closed, and pages that have not come would read as zeros. So another
//! process (`rewake guard`) holds them too, and ends the tree instead.
//!
//! Messages are those of a `SOCK_SEQPACKET` unix socket, the guard's standard input, from the pager: a letter, a number, and
//! for a process the rest. When the socket ends without a last word, the pager has died.

use crate::error::{Error, Result};
use crate::servant;
use rewake_objects::problem::text;
use rewake_proc::read::ProcRoot;
use rewake_sys::signal;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::collections::{HashMap, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A process with its userfaultfd.
const WATCH: u8 = b'w';
/// A further userfaultfd.
const HOLD: u8 = b'h';
/// One that is not needed any more.
const RELEASE: u8 = b'r';
/// The last word.
const DONE: u8 = b'd';

/// A restored process.
#[derive(Debug)]
pub struct Process {
    /// Its pid here.
    pid: i32,
    comm: String,
    pidfd: OwnedFd,
}

impl Process {
    /// The process with the number `pid`, or that of `pidfd`, if there is one.
    ///
    /// # Errors
    /// It is gone.
    pub fn new(pid: i32, comm: String, pidfd: Option<OwnedFd>) -> Result<Process> {
        let gone = |e: &dyn std::fmt::Display| Error::new(format!("process {pid} ({comm}): {e}"));
        let pidfd = match pidfd {
            Some(pidfd) => pidfd,
            None => Pid::from_raw(pid)
                .ok_or(Errno::SRCH)
                .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
                .map_err(|e| gone(&e))?,
        };
        let info = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
        let info = std::fs::read_to_string(info).map_err(|e| gone(&e))?;
        let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        let pid = line.and_then(|number| number.trim().parse().ok()).filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(|| gone(&"it is not there any more"))?;
        Ok(Process { pid, comm, pidfd })
    }
}

/// The pager's end, and what it knows itself: if it fails rather than dies, it ends the tree by its own hand.
#[derive(Debug)]
pub struct Guard {
    socket: OwnedFd,
    processes: Vec<Process>,
    lost: bool,
}

impl Guard {
    /// Starts one.
    ///
    /// # Errors
    /// It does not start.
    pub fn start() -> Result<Guard> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::new(format!("the pager's guard does not start: {e}"))
        };
        let (socket, _) =
            servant::start("guard", SocketType::SEQPACKET, |_| ()).map_err(|e| failed(&e))?;
        Ok(Guard { socket, processes: Vec::new(), lost: false })
    }

    fn tell(&mut self, letter: u8, key: u64, rest: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let key = key.to_ne_bytes();
        let letter = [letter];
        let pieces = [IoSlice::new(&letter), IoSlice::new(&key), IoSlice::new(rest)];
        let sent = rustix::net::sendmsg(&self.socket, &pieces, &mut control, SendFlags::NOSIGNAL);
        if let Err(e) = sent
            && !std::mem::replace(&mut self.lost, true)
        {
            log::warn!(
                "the guard is gone ({e}): if this process is killed now, the tree is not ended"
            );
        }
    }

    /// Has it watch over a process.
    pub fn watch(&mut self, key: u64, process: Process, uffd: BorrowedFd<'_>) {
        let fds = [uffd, process.pidfd.as_fd()];
        self.tell(WATCH, key, process.comm.as_bytes(), &fds);
        self.processes.push(process);
    }

    /// Has it hold the userfaultfd of a child.
    pub fn hold(&mut self, key: u64, uffd: BorrowedFd<'_>) {
        self.tell(HOLD, key, &[], &[uffd]);
    }

    /// An address space has all it lacked.
    pub fn release(&mut self, key: u64) {
        self.tell(RELEASE, key, &[], &[]);
    }

    /// Everybody has.
    pub fn done(mut self) {
        self.tell(DONE, 0, &[], &[]);
    }

    /// The tree cannot go on: ends it. The guard would, too.
    pub fn end_tree(&self) {
        end_tree(&self.processes);
    }
}

/// Kills processes and all that descends from them.
fn end_tree(processes: &[Process]) {
    let send = |process: &Process, signal| {
        rustix::process::pidfd_send_signal(&process.pidfd, signal).is_ok()
    };
    // Nobody may have children while we look for them.
    let alive: Vec<&Process> = processes.iter().filter(|p| send(p, Signal::STOP)).collect();
    let mut tree: HashSet<i32> = alive.iter().map(|p| p.pid).collect();
    let give_up = Instant::now() + Duration::from_secs(2);
    loop {
        let before = tree.len();
        for (pid, parent) in parents() {
            if tree.contains(&parent) && tree.insert(pid) {
                let _ = signal::kill(pid, libc::SIGSTOP);
            }
        }
        if tree.len() == before || Instant::now() > give_up {
            break;
        }
    }
    for pid in tree.iter().filter(|pid| !alive.iter().any(|p| p.pid == **pid)) {
        let _ = signal::kill(*pid, libc::SIGKILL);
    }
    for process in &alive {
        send(process, Signal::KILL);
    }
}

/// All processes and their parents.
fn parents() -> Vec<(i32, i32)> {
    let Ok(root) = ProcRoot::open() else { return Vec::new() };
    let stat = |pid| root.pid(pid).and_then(|dir| dir.stat(&mut Vec::new())).ok();
    let pids = root.pids().unwrap_or_default();
    pids.into_iter().filter_map(|pid| Some((pid, stat(pid)?.ppid))).collect()
}

/// What `rewake guard` does.
#[must_use]
pub fn main() -> ExitCode {
    let stdin = std::io::stdin();
    let pager = stdin.as_fd();
    if rustix::net::sockopt::socket_type(pager) != Ok(SocketType::SEQPACKET) {
        return ExitCode::FAILURE;
    }
    let _ = rustix::thread::set_name(c"rewake-guard");
    let _ = rustix::process::setsid();
    let _ = rewake_sys::descriptors::make_room(1 << 20);
    let mut held = HashMap::new();
    let mut processes = Vec::new();
    loop {
        let mut bytes = [0; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let piece = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = match rustix::net::recvmsg(pager, piece, &mut control, flags) {
            Err(Errno::INTR) => continue,
            Ok(got) if got.bytes > 8 => got.bytes,
            _ => break,
        };
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let key: [u8; 8] = bytes[1..9].try_into().unwrap_or_default();
        match bytes[0] {
            WATCH | HOLD => {
                held.extend(fds.next().map(|uffd| (key, uffd)));
                let comm = text(&bytes[9..got]);
                processes.extend(fds.next().and_then(|fd| Process::new(0, comm, Some(fd)).ok()));
            }
            RELEASE => drop(held.remove(&key)),
            _ => return ExitCode::SUCCESS,
        }
    }
    // Whoever has everything needs no pager any more.
    if held.is_empty() {
        return ExitCode::SUCCESS;
    }
    end_tree(&processes);
    if let Some(root) = processes.first() {
        let _ = rustix::io::write(
            std::io::stderr(),
            format!(
                "rewake: process {} ({}) and its tree were ended: the process that brought their memory (lazy-pages) died\n",
                root.pid, root.comm
            )
            .as_bytes(),
        );
    }
    ExitCode::FAILURE
}
