//! What waits in the receive queue of a unix socket: looked at with `MSG_PEEK`, which takes nothing out.
//!
//! A peek of a message with descriptors (`SCM_RIGHTS`) installs them here, so that what is in flight can be surveyed like
//! any other descriptor ([`crate::files::flight`]).

use crate::Problem;
use crate::files::collect::View;
use rewake_sys::message::{Credentials, Message, before_last_message, peek};
use rewake_sys::sockets::{at_mark, option_int, set_option_int};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::{BorrowedFd, OwnedFd};

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

/// The contents of the receive queue, by packets; of a stream, by pieces. `kind` is `SOCK_*`.
///
/// # Errors
/// Something in it cannot be told.
pub fn read(view: &View<'_>, kind: i32) -> Result<Vec<Queued>, Problem> {
    let fd = view.as_fd();
    // Who asks for senders as pidfds gets them from the credentials, which the kernel tells only who asks for those.
    let _credentials = match option_int(fd, libc::SOL_SOCKET, SO_PASSPIDFD) {
        Ok(1) => Some(Meanwhile::set(fd, libc::SO_PASSCRED, 1).map_err(|e| failed(view, &e))?),
        _ => None,
    };
    // Of a stream, all that waits; of others, the first packet. Packets may be empty.
    let waiting = rustix::io::ioctl_fionread(fd).map_err(|e| failed(view, &e))? as usize;
    if kind == libc::SOCK_STREAM {
        return if waiting == 0 { Ok(Vec::new()) } else { stream(view, waiting) };
    }
    if waiting == 0 && look(view, &mut [0; 1], 0)?.is_none() {
        return Ok(Vec::new());
    }
    packets(view, kind)
}

fn failed(view: &View<'_>, e: &dyn std::fmt::Display) -> Problem {
    view.problem(format!("its receive queue cannot be read: {e}"))
}

/// One peek; `None` if nothing waits.
fn look(view: &View<'_>, buffer: &mut [u8], flags: i32) -> Result<Option<Message>, Problem> {
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

fn stream(view: &View<'_>, waiting: usize) -> Result<Vec<Queued>, Problem> {
    let mut data = vec![0; waiting];
    {
        // Most streams hold nothing but bytes: one look is enough.
        let _offset =
            Meanwhile::set(view.as_fd(), SO_PEEK_OFF, -1).map_err(|e| failed(view, &e))?;
        let message = look(view, &mut data, 0)?.unwrap_or_default();
        if message.length == waiting && message.rights.is_empty() && message.credentials.is_none() {
            let piece = |data: &[u8]| Queued { data: data.to_vec(), ..Queued::default() };
            return Ok(data.chunks(PIECE).map(piece).collect());
        }
    }
    pieces(view, &mut data)
}

/// A stream that is not just bytes, in pieces that come and go as one: the kernel never reads across descriptors, other
/// credentials or the mark of the byte out of band.
fn pieces(view: &View<'_>, buffer: &mut [u8]) -> Result<Vec<Queued>, Problem> {
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
fn urgent(view: &View<'_>) -> Result<Option<u8>, Problem> {
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

fn packets(view: &View<'_>, kind: i32) -> Result<Vec<Queued>, Problem> {
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
            packets.push(Queued::new(&buffer, message, kind == libc::SOCK_DGRAM));
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
