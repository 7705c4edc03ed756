//! What waits in the receive queue of a unix socket: looked at with `MSG_PEEK`, which takes nothing out.

use crate::Problem;
use crate::files::collect::View;
use rewake_sys::SyscallError;
use rewake_sys::sockets::{option_int, set_option_int};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSliceMut};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use std::mem::MaybeUninit;

const SO_PEEK_OFF: i32 = 42;
/// How long a piece of a stream is at most; packets are as long as they are.
const PIECE: usize = 32 << 10;
/// Room for a packet at first: more than the usual limit, net.core.wmem_default.
const ROOM: usize = 256 << 10;
/// More than a packet can be.
const LIMIT: usize = 1 << 30;

/// Where peeks start (`SO_PEEK_OFF`); put back as it was when this is dropped.
struct PeekOffset<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
    now: i32,
}

impl<'a> PeekOffset<'a> {
    fn set(fd: BorrowedFd<'a>, offset: i32) -> Result<PeekOffset<'a>, SyscallError> {
        let before = option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF)?;
        if before != offset {
            set_option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, offset)?;
        }
        Ok(PeekOffset { fd, before, now: offset })
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if self.before != self.now
            && let Err(e) = set_option_int(self.fd, libc::SOL_SOCKET, SO_PEEK_OFF, self.before)
        {
            log::warn!("a socket's peek offset cannot be put back: {e}");
        }
    }
}

/// What one peek gave.
enum Peeked {
    Nothing,
    Packet(usize),
    /// The packet is longer than the buffer.
    Longer,
}

/// The contents of the receive queue, by packets; of a stream, by pieces.
///
/// # Errors
/// There are descriptors in flight.
pub fn read(view: &View<'_>, kind: i32) -> Result<Vec<Vec<u8>>, Problem> {
    let fd = view.as_fd();
    // Of a stream, all that waits; of others, the first packet. Packets may be empty.
    let waiting = rustix::io::ioctl_fionread(fd)
        .map_err(|e| view.problem(format!("its receive queue cannot be read: {e}")))?;
    if kind == libc::SOCK_STREAM {
        return if waiting == 0 { Ok(Vec::new()) } else { stream(view, waiting as usize) };
    }
    if waiting == 0 && peek(view, &mut [0; 1]).is_ok_and(|p| matches!(p, Peeked::Nothing)) {
        return Ok(Vec::new());
    }
    packets(view)
}

fn stream(view: &View<'_>, waiting: usize) -> Result<Vec<Vec<u8>>, Problem> {
    let failed = |e: SyscallError| view.problem(format!("its receive queue cannot be read: {e}"));
    let _offset = PeekOffset::set(view.as_fd(), -1).map_err(failed)?;
    let mut data = vec![0; waiting];
    match peek(view, &mut data)? {
        Peeked::Packet(got) if got == waiting => {}
        Peeked::Packet(got) => {
            return Err(view.problem(format!(
                "only {got} of the {waiting} bytes that wait in it can be read: out-of-band data, or messages with descriptors or credentials, lie between"
            )));
        }
        _ => return Err(view.problem("what waits in it cannot be read")),
    }
    Ok(data.chunks(PIECE).map(<[u8]>::to_vec).collect())
}

fn packets(view: &View<'_>) -> Result<Vec<Vec<u8>>, Problem> {
    let failed = |e: SyscallError| view.problem(format!("its receive queue cannot be read: {e}"));
    let mut buffer = vec![0; ROOM];
    'longer: loop {
        // From here on every peek goes on where the last one ended.
        let _offset = PeekOffset::set(view.as_fd(), 0).map_err(failed)?;
        let mut packets = Vec::new();
        let mut last_was_empty = false;
        loop {
            match peek(view, &mut buffer)? {
                Peeked::Nothing => return Ok(packets),
                Peeked::Packet(0) if last_was_empty && at_end(view.as_fd()) => {
                    packets.pop();
                    return Ok(packets);
                }
                Peeked::Packet(length) => {
                    last_was_empty = length == 0;
                    packets.push(buffer[..length].to_vec());
                }
                Peeked::Longer if buffer.len() < LIMIT => {
                    buffer.resize(buffer.len() * 4, 0);
                    continue 'longer;
                }
                Peeked::Longer => return Err(view.problem("a message in it is too long")),
            }
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

fn peek(view: &View<'_>, buffer: &mut [u8]) -> Result<Peeked, Problem> {
    let mut room = [MaybeUninit::uninit(); 256];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received =
        rustix::net::recvmsg(view.as_fd(), &mut [IoSliceMut::new(buffer)], &mut control, flags);
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(Peeked::Nothing),
        Err(e) => return Err(view.problem(format!("its receive queue cannot be read: {e}"))),
    };
    let rights = control.drain().any(|m| matches!(m, RecvAncillaryMessage::ScmRights(_)));
    if rights || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(view
            .problem("descriptors are in flight in it (SCM_RIGHTS), which cannot be saved yet")
            .remedy("try again once the program has received them"));
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Peeked::Longer);
    }
    Ok(Peeked::Packet(received.bytes))
}
