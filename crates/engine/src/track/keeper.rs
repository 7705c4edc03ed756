//! The keeper: a process that holds the userfaultfds of a tree between two commands, since tracking lasts as long as
//! somebody holds them.
//!
//! It is this program again (`rewake keeper`), daemonized, and waits on a socket in the images directory until a later
//! command takes over what it holds, or all of the tree is gone; then it ends. If it is killed, memory is not tracked any
//! more, and nothing else happens.
//!
//! Messages are those of a `SOCK_SEQPACKET` unix socket. From the command to a new keeper, and from the keeper to the next
//! command: one with the number of processes (and, to the keeper, the directory), then some with pids, start times and
//! descriptors, then one that says which images it is about.

use super::{Images, Tracked};
use crate::error::{Error, Result};
use crate::peer::is_ours;
use crate::servant;
use rewake_sys::userfaultfd::Userfaultfd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{ExitCode, Stdio};

/// The socket's name in the images directory.
pub const SOCKET: &str = "rewake-keeper.socket";

/// Processes a message, two descriptors each.
const EACH: usize = 100;
/// Bytes of one: pid, padding, start time.
const ENTRY: usize = 16;
const FDS: usize = 2 * EACH;

const HELLO: &[u8; 16] = b"rewake keeper 1\0";
/// What a command asks of a keeper.
const TAKE: &[u8] = b"take";
const END: &[u8] = b"end";
/// What it says when it has all.
const TAKEN: &[u8] = b"taken";

/// How long a keeper or command may take to answer.
const PATIENCE: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 5, tv_nsec: 0 };

type Io<T> = std::result::Result<T, Errno>;

fn send(to: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Io<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Receives a message; an empty one is the end.
fn receive(from: BorrowedFd<'_>) -> Io<(Vec<u8>, Vec<OwnedFd>)> {
    if poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&PATIENCE))? == 0 {
        return Err(Errno::TIMEDOUT);
    }
    let mut bytes = vec![0; EACH * ENTRY];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    bytes.truncate(got.bytes);
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    Ok((bytes, fds.collect()))
}

fn word(bytes: &[u8], at: usize) -> Io<u64> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or(Errno::PROTO)?;
    Ok(u64::from_ne_bytes(*word))
}

fn send_tasks<'a>(
    to: BorrowedFd<'_>,
    tasks: impl ExactSizeIterator<Item = &'a Tracked>,
    beside: &[BorrowedFd<'_>],
) -> Io<()> {
    let mut hello = HELLO.to_vec();
    hello.extend((tasks.len() as u64).to_ne_bytes());
    send(to, &hello, beside)?;
    let tasks: Vec<&Tracked> = tasks.collect();
    for part in tasks.chunks(EACH) {
        let mut bytes = Vec::with_capacity(part.len() * ENTRY);
        let mut fds = Vec::with_capacity(part.len() * 2);
        for task in part {
            bytes.extend(u64::from(task.pid as u32).to_ne_bytes());
            bytes.extend(task.start.to_ne_bytes());
            fds.extend([task.uffd.as_fd(), task.pidfd.as_fd()]);
        }
        send(to, &bytes, &fds)?;
    }
    Ok(())
}

fn receive_tasks(from: BorrowedFd<'_>) -> Io<(HashMap<i32, Tracked>, Vec<OwnedFd>)> {
    let (hello, beside) = receive(from)?;
    if !hello.starts_with(HELLO) {
        return Err(Errno::PROTO);
    }
    let count = word(&hello, HELLO.len())? as usize;
    let _ = rewake_sys::descriptors::make_room(2 * count.min(1 << 22));
    let mut tasks = HashMap::new();
    while tasks.len() < count {
        let (bytes, fds) = receive(from)?;
        let mut fds = fds.into_iter();
        for entry in bytes.chunks_exact(ENTRY) {
            let (pid, start) = (word(entry, 0)? as i32, word(entry, 8)?);
            // Fewer than were sent: our table is full.
            let (Some(uffd), Some(pidfd)) = (fds.next(), fds.next()) else {
                return Err(Errno::MFILE);
            };
            tasks.insert(pid, Tracked { pid, start, uffd: Userfaultfd::from_fd(uffd), pidfd });
        }
        if bytes.is_empty() {
            return Err(Errno::CONNRESET);
        }
    }
    Ok((tasks, beside))
}

fn send_images(to: BorrowedFd<'_>, images: Images) -> Io<()> {
    let bytes = [images.device, images.inode].map(u64::to_ne_bytes).concat();
    send(to, &bytes, &[])
}

fn receive_images(from: BorrowedFd<'_>) -> Io<Images> {
    let (bytes, _) = receive(from)?;
    Ok(Images { device: word(&bytes, 0)?, inode: word(&bytes, 8)? })
}

/// A keeper that has all it is to hold, and waits for the images to be complete. Dropping this ends it.
#[derive(Debug)]
pub struct Begun {
    socket: OwnedFd,
}

/// Starts a keeper for images that will be in `dir`.
///
/// # Errors
/// It does not start.
pub fn begin(dir: &Path, tasks: &[&Tracked]) -> Result<Begun> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Error::new(format!("memory cannot be tracked: {what}: {e}"))
    };
    let (own, child) = servant::start("keeper", SocketType::SEQPACKET, |command| {
        command.arg(dir).stderr(Stdio::null());
    })
    .map_err(|e| failed("its keeper does not start", &e))?;
    let dir =
        rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed(&dir.display().to_string(), &e))?;
    let ready = send_tasks(own.as_fd(), tasks.iter().copied(), &[dir.as_fd()])
        .and_then(|()| receive(own.as_fd()))
        .map_err(|e| failed("its keeper does not answer", &e))?;
    if ready.0 != TAKEN {
        let why = String::from_utf8_lossy(&ready.0).into_owned();
        return Err(failed("its keeper", &why));
    }
    log::info!("process {} keeps track of memory", child.id());
    Ok(Begun { socket: own })
}

impl Begun {
    /// The images are complete: the keeper stays.
    ///
    /// # Errors
    /// It is gone.
    pub fn stay(self, dir: &Path) -> Result<()> {
        let gone = |e: &dyn std::fmt::Display| {
            Error::new(format!("the images are complete, but memory is not tracked any more: {e}"))
        };
        let images = Images::of(dir).map_err(|e| gone(&e))?;
        send_images(self.socket.as_fd(), images).map_err(|e| gone(&e))
    }
}

/// Connects to the keeper of `dir`; a socket that nobody listens on is removed. `None` if there is none.
fn connect(dir: &Path) -> Io<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&socket, &address(dir.as_fd())?) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::CONNREFUSED) => {
            let _ = rustix::fs::unlinkat(&dir, SOCKET, AtFlags::empty());
            return Ok(None);
        }
        Err(e) => return Err(e),
    }
    if is_ours(socket.as_fd())? { Ok(Some(socket)) } else { Err(Errno::PERM) }
}

/// Paths of sockets are short: this one is always short enough.
fn address(dir: BorrowedFd<'_>) -> Io<SocketAddrUnix> {
    SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// Why nothing is known of memory.
const NOBODY: &str = "nobody kept track of it: it could not be tracked, or its keeper has ended";

/// Takes over what the keeper of `dir` holds; it ends.
///
/// # Errors
/// There is none, or it does not answer.
pub fn take(dir: &Path) -> std::result::Result<(Images, HashMap<i32, Tracked>), String> {
    let socket = match connect(dir) {
        Ok(Some(socket)) => socket,
        Ok(None) => return Err(NOBODY.into()),
        Err(e) => return Err(format!("its keeper cannot be reached: {e}")),
    };
    let taken = send(socket.as_fd(), TAKE, &[])
        .and_then(|()| receive_tasks(socket.as_fd()))
        .and_then(|(tasks, _)| Ok((receive_images(socket.as_fd())?, tasks)))
        .map_err(|e| match e {
            // It was just ending, as one does that has nothing to keep.
            Errno::CONNRESET | Errno::PIPE => NOBODY.into(),
            e => format!("its keeper does not tell: {e}"),
        })?;
    let _ = send(socket.as_fd(), TAKEN, &[]);
    // It ends before we go on: its socket is gone then.
    let _ = receive(socket.as_fd());
    Ok(taken)
}

/// Ends the keeper of `dir`, if there is one.
pub fn end(dir: &Path) {
    if let Ok(Some(socket)) = connect(dir) {
        let _ = send(socket.as_fd(), END, &[]).and_then(|()| receive(socket.as_fd()));
    }
}

/// The keeper itself: what `rewake keeper` does.
#[must_use]
pub fn main() -> ExitCode {
    let stdin = std::io::stdin();
    let parent = stdin.as_fd();
    if rustix::net::sockopt::socket_type(parent) != Ok(SocketType::SEQPACKET) {
        return ExitCode::FAILURE;
    }
    let _ = rustix::thread::set_name(c"rewake-keeper");
    let _ = rustix::process::setsid();
    match keep(parent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = send(parent, e.to_string().as_bytes(), &[]);
            ExitCode::FAILURE
        }
    }
}

fn keep(parent: BorrowedFd<'_>) -> Io<()> {
    let (mut tasks, dir) = receive_tasks(parent)?;
    let dir = dir.into_iter().next().ok_or(Errno::PROTO)?;
    let listener = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    let _ = rustix::fs::unlinkat(&dir, SOCKET, AtFlags::empty());
    rustix::process::umask(Mode::from_raw_mode(0o177));
    rustix::net::bind(&listener, &address(dir.as_fd())?)?;
    let result = rustix::net::listen(&listener, 4)
        .and_then(|()| send(parent, TAKEN, &[]))
        // Saving the images may take its time; if the command dies, its end of the socket is closed.
        .and_then(|()| poll(&mut [PollFd::new(&parent, PollFlags::IN)], None))
        .and_then(|_| receive_images(parent))
        .and_then(|images| serve(listener.as_fd(), &mut tasks, images));
    let _ = rustix::fs::unlinkat(&dir, SOCKET, AtFlags::empty());
    // Only now does the client see that its connection ends.
    result.map(drop)
}

/// Waits until someone takes over, whose connection is returned, or all processes are gone.
fn serve(
    listener: BorrowedFd<'_>,
    tasks: &mut HashMap<i32, Tracked>,
    images: Images,
) -> Io<Option<OwnedFd>> {
    while !tasks.is_empty() {
        let mut fds = vec![PollFd::new(&listener, PollFlags::IN)];
        let pids: Vec<i32> = tasks.keys().copied().collect();
        fds.extend(tasks.values().map(|task| PollFd::new(&task.pidfd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        let asked = !fds[0].revents().is_empty();
        let gone: Vec<i32> = pids
            .into_iter()
            .zip(&fds[1..])
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(pid, _)| pid)
            .collect();
        for pid in gone {
            tasks.remove(&pid);
        }
        if asked
            && let Ok(client) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)
            && is_ours(client.as_fd()) == Ok(true)
            && answer(client.as_fd(), tasks, images) == Ok(true)
        {
            return Ok(Some(client));
        }
    }
    Ok(None)
}

/// Answers one command; true if that was the end.
fn answer(client: BorrowedFd<'_>, tasks: &HashMap<i32, Tracked>, images: Images) -> Io<bool> {
    let (asked, _) = receive(client)?;
    if asked == END {
        return Ok(true);
    }
    if asked != TAKE {
        return Err(Errno::PROTO);
    }
    send_tasks(client, tasks.values(), &[])?;
    send_images(client, images)?;
    Ok(receive(client)?.0 == TAKEN)
}
