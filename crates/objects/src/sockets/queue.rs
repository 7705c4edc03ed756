//! What waits in the receive queue of a unix socket: looked at with `MSG_PEEK`, which takes nothing out.
//!
//! A peek of a message with descriptors (`SCM_RIGHTS`) installs them here, so that what is in flight can be surveyed like
//! any other descriptor ([`crate::files::flight`]).
//!
//! Most queues are empty or hold plain bytes, which [`glance`] finds without touching anything. For others [`read`] has to
//! change options of the program's sockets for a moment; a guard puts them back if this process dies meanwhile.

use crate::Problem;
use rewake_inject::guard::SocketOption;
use rewake_sys::message::{Credentials, Message, before_last_message, peek};
use rewake_sys::sockets::{at_mark, option_int, set_option_int};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::fd::AsRawFd;

const SO_PEEK_OFF: i32 = 42;
/// Linux 6.5.
const SO_PASSPIDFD: i32 = 76;
/// How long a piece of a stream is at most; packets are as long as they are.
const PIECE: usize = 32 << 10;
/// Room for a packet at first: more than the usual limit, net.core.wmem_default.
const ROOM: usize = 256 << 10;
/// More than a packet can be.
const LIMIT: usize = 1 << 30;

/// A message in a queue, or a piece of a stream.
#[derive(Debug, Default)]
pub struct Queued {
    /// Its bytes.
    pub data: Vec<u8>,
    /// Descriptors that travel with it.
    pub rights: Vec<OwnedFd>,
    /// The sender's, if they are noted and the socket asks for them (`SO_PASSCRED`).
    pub credentials: Option<Credentials>,
    /// Address of the sender of a datagram; empty if it has none.
    pub sender: Vec<u8>,
    /// It is one byte, out of band.
    pub oob: bool,
}

impl Queued {
    fn new(data: &[u8], message: Message, sender: bool) -> Queued {
        Queued {
            data: data[..message.length].to_vec(),
            rights: message.rights,
            // What was sent when nobody asked for credentials has none: the kernel tells pid 0.
            credentials: message.credentials.filter(|c| c.pid != 0),
            sender: if sender { message.sender } else { Vec::new() },
            oob: false,
        }
    }
}

/// A number that is an option of a socket for a while; put back as it was when this is dropped.
struct Meanwhile<'a> {
    fd: BorrowedFd<'a>,
    name: i32,
    before: i32,
    changed: bool,
}

impl<'a> Meanwhile<'a> {
    fn set(fd: BorrowedFd<'a>, name: i32, value: i32) -> Result<Meanwhile<'a>, SyscallError> {
        let before = option_int(fd, libc::SOL_SOCKET, name)?;
        let mut meanwhile = Meanwhile { fd, name, before, changed: false };
        if before != value {
            meanwhile.change(value)?;
        }
        Ok(meanwhile)
    }

    /// As [`Meanwhile::set`], for an option that moves on its own.
    fn set_anew(fd: BorrowedFd<'a>, name: i32, value: i32) -> Result<Meanwhile<'a>, SyscallError> {
        let mut meanwhile = Meanwhile::set(fd, name, value)?;
        meanwhile.change(value)?;
        Ok(meanwhile)
    }

    fn change(&mut self, value: i32) -> Result<(), SyscallError> {
        self.changed = true;
        set_option_int(self.fd, libc::SOL_SOCKET, self.name, value)
    }
}

impl Drop for Meanwhile<'_> {
    fn drop(&mut self) {
        if self.changed
            && let Err(e) = set_option_int(self.fd, libc::SOL_SOCKET, self.name, self.before)
        {
            log::warn!("option {} of a socket cannot be put back: {e}", self.name);
        }
    }
}

/// A socket whose queue is read.
#[derive(Debug)]
pub struct Source {
    /// The socket.
    pub fd: OwnedFd,
    /// How error texts call it.
    pub object: String,
    /// `SOCK_*`
    pub kind: i32,
}

impl Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn problem(&self, reason: impl Into<String>) -> Problem {
        Problem::new(&*self.object, reason)
    }

    /// The options that [`read`] may change, as they are.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn options(&self) -> Result<Vec<SocketOption>, Problem> {
        let names: &[i32] = match self.kind {
            libc::SOCK_STREAM => &[SO_PEEK_OFF, libc::SO_OOBINLINE, libc::SO_PASSCRED],
            _ => &[SO_PEEK_OFF, libc::SO_PASSCRED],
        };
        let (fd, level) = (self.fd.as_raw_fd(), libc::SOL_SOCKET);
        let option = |name: &i32| {
            let name = *name;
            let value = option_int(self.as_fd(), level, name).map_err(|e| failed(self, &e))?;
            Ok(SocketOption { fd, level, name, value })
        };
        names.iter().map(option).collect()
    }
}

/// The contents of a queue, if they can be told without changing an option of the socket; `None` if they cannot.
///
/// # Errors
/// The queue cannot be read.
pub fn glance(view: &Source) -> Result<Option<Vec<Queued>>, Problem> {
    let fd = view.as_fd();
    // Of a stream, all that waits; of others, the first packet. Packets may be empty.
    let waiting = rustix::io::ioctl_fionread(fd).map_err(|e| failed(view, &e))? as usize;
    let stream = view.kind == libc::SOCK_STREAM;
    if stream && waiting == 0 {
        return Ok(Some(Vec::new()));
    }
    if waiting != 0 && !stream
        || option_int(fd, libc::SOL_SOCKET, SO_PASSPIDFD) == Ok(1)
        || option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF).map_err(|e| failed(view, &e))? >= 0
    {
        return Ok(None);
    }
    if stream {
        let mut data = vec![0; waiting];
        let message = look(view, &mut data, 0)?.unwrap_or_default();
        return Ok(message.is_plain(waiting).then(|| plain(&data)));
    }
    Ok(look(view, &mut [0; 1], 0)?.is_none().then(Vec::new))
}

/// Bytes and nothing else, in pieces.
fn plain(data: &[u8]) -> Vec<Queued> {
    let piece = |data: &[u8]| Queued { data: data.to_vec(), ..Queued::default() };
    data.chunks(PIECE).map(piece).collect()
}

trait Plain {
    /// Whether it is these many bytes and nothing else.
    fn is_plain(&self, length: usize) -> bool;
}

impl Plain for Message {
    fn is_plain(&self, length: usize) -> bool {
        self.length == length && self.rights.is_empty() && self.credentials.is_none()
    }
}

/// The contents of the receive queue, by packets; of a stream, by pieces.
///
/// # Errors
/// Something in it cannot be told.
pub fn read(view: &Source) -> Result<Vec<Queued>, Problem> {
    let fd = view.as_fd();
    // Who asks for senders as pidfds gets them from the credentials, which the kernel tells only who asks for those.
    let _credentials = match option_int(fd, libc::SOL_SOCKET, SO_PASSPIDFD) {
        Ok(1) => Some(Meanwhile::set(fd, libc::SO_PASSCRED, 1).map_err(|e| failed(view, &e))?),
        _ => None,
    };
    if view.kind != libc::SOCK_STREAM {
        return packets(view);
    }
    let waiting = rustix::io::ioctl_fionread(fd).map_err(|e| failed(view, &e))? as usize;
    if waiting == 0 { Ok(Vec::new()) } else { stream(view, waiting) }
}

fn failed(view: &Source, e: &dyn std::fmt::Display) -> Problem {
    view.problem(format!("its receive queue cannot be read: {e}"))
}

/// One peek; `None` if nothing waits.
fn look(view: &Source, buffer: &mut [u8], flags: i32) -> Result<Option<Message>, Problem> {
    match peek(view.as_fd(), buffer, flags) {
        Ok(message) if message.flags & libc::MSG_CTRUNC != 0 => {
            Err(failed(view, &"more descriptors are in flight in it than rewake may open")
                .remedy("raise the limit of open files (ulimit -n) for rewake"))
        }
        Ok(message) => Ok(Some(message)),
        Err(e) if e.errno == Errno::AGAIN => Ok(None),
        Err(e) => Err(failed(view, &e)),
    }
}

fn stream(view: &Source, waiting: usize) -> Result<Vec<Queued>, Problem> {
    let mut data = vec![0; waiting];
    {
        // Most streams hold nothing but bytes: one look is enough.
        let _offset =
            Meanwhile::set(view.as_fd(), SO_PEEK_OFF, -1).map_err(|e| failed(view, &e))?;
        let message = look(view, &mut data, 0)?.unwrap_or_default();
        if message.is_plain(waiting) {
            return Ok(plain(&data));
        }
    }
    pieces(view, &mut data)
}

/// A stream that is not just bytes, in pieces that come and go as one: the kernel never reads across descriptors, other
/// credentials or the mark of the byte out of band.
fn pieces(view: &Source, buffer: &mut [u8]) -> Result<Vec<Queued>, Problem> {
    let waiting = buffer.len();
    let fd = view.as_fd();
    let failed = |e: SyscallError| failed(view, &e);
    let urgent = urgent(view)?;
    // So that the byte counts like others where it is the first.
    let _inline = match urgent {
        Some(_) => Some(Meanwhile::set(fd, libc::SO_OOBINLINE, 1).map_err(failed)?),
        None => None,
    };
    let mut offset = Meanwhile::set(fd, SO_PEEK_OFF, 0).map_err(failed)?;
    let mut queue = Vec::new();
    let mut at = 0;
    if let Some(byte) = urgent
        && at_mark(fd).map_err(failed)?
    {
        queue.push(Queued { data: vec![byte], oob: true, ..Queued::default() });
        at = 1;
    }
    while at < waiting {
        offset.change(at as i32).map_err(failed)?;
        let message = look(view, &mut buffer[at..], 0)?.filter(|m| m.length > 0);
        let Some(message) = message else {
            return Err(view.problem(format!(
                "only {at} of the {waiting} bytes that wait in its receive queue can be read"
            )));
        };
        let length = message.length;
        // Bytes sent before the descriptors are read together with them.
        let start = match message.rights.is_empty() {
            true => 0,
            false => {
                offset.change(at as i32).map_err(failed)?;
                before_last_message(fd, length).map_err(failed)?
            }
        };
        if start > 0 {
            let credentials = message.credentials.filter(|c| c.pid != 0);
            let data = buffer[at..at + start].to_vec();
            queue.push(Queued { data, credentials, ..Queued::default() });
        }
        let message = Message { length: length - start, ..message };
        queue.push(Queued::new(&buffer[at + start..], message, false));
        at += length;
    }
    if let Some(byte) = urgent
        && !queue.iter().any(|piece| piece.oob)
    {
        mark(&mut queue, byte);
    }
    Ok(queue)
}

/// The byte out of band, if there is one.
fn urgent(view: &Source) -> Result<Option<u8>, Problem> {
    let _outline =
        Meanwhile::set(view.as_fd(), libc::SO_OOBINLINE, 0).map_err(|e| failed(view, &e))?;
    let mut byte = [0];
    // EINVAL if there is none; EOPNOTSUPP where the kernel has no such bytes (Linux < 5.15).
    let found = peek(view.as_fd(), &mut byte, libc::MSG_OOB).is_ok_and(|m| m.length == 1);
    Ok(found.then_some(byte[0]))
}

/// Makes the byte at the mark a piece of its own: reads end there although neither descriptors nor credentials differ.
fn mark(queue: &mut Vec<Queued>, byte: u8) {
    let borders = || (1..queue.len()).filter(|i| queue[*i].data.first() == Some(&byte));
    let plain = |i: &usize| {
        queue[i - 1].rights.is_empty() && queue[i - 1].credentials == queue[*i].credentials
    };
    let Some(at) = borders().find(plain).or_else(|| borders().next()) else { return };
    let rest = queue[at].data.split_off(1);
    let credentials = queue[at].credentials;
    let oob = Queued { data: vec![byte], credentials, oob: true, ..Queued::default() };
    queue[at].data = rest;
    queue.insert(at, oob);
    queue.retain(|piece| !piece.data.is_empty());
}

fn packets(view: &Source) -> Result<Vec<Queued>, Problem> {
    let mut buffer = vec![0; ROOM];
    'longer: loop {
        // From here on every peek goes on where the last one ended.
        let _offset =
            Meanwhile::set_anew(view.as_fd(), SO_PEEK_OFF, 0).map_err(|e| failed(view, &e))?;
        let mut packets: Vec<Queued> = Vec::new();
        loop {
            let Some(message) = look(view, &mut buffer, 0)? else { return Ok(packets) };
            if message.flags & libc::MSG_TRUNC != 0 {
                if buffer.len() >= LIMIT {
                    return Err(view.problem("a message in it is too long"));
                }
                buffer.resize(buffer.len() * 4, 0);
                continue 'longer;
            }
            let empty = message.length == 0 && message.rights.is_empty();
            let last_was_empty =
                packets.last().is_some_and(|p| p.data.is_empty() && p.rights.is_empty());
            if empty && last_was_empty && at_end(view.as_fd()) {
                packets.pop();
                return Ok(packets);
            }
            packets.push(Queued::new(&buffer, message, view.kind == libc::SOCK_DGRAM));
        }
    }
}

/// Whether an empty read means the end of a shut-down socket and not an empty packet.
fn at_end(fd: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut ends = [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut ends, Some(&at_once)).is_ok() && ends[0].revents().contains(PollFlags::RDHUP)
}
