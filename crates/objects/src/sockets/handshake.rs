//! Putting a TCP connection into the queue of a listening socket.
//!
//! The kernel puts there what shook hands with it, and nothing else. So the handshake is made once more, in the name of the
//! peer and behind the network lock: the peer, who shook hands long ago, notices nothing of it. The peer's sequence number is
//! in its SYN. Our own, which the kernel would choose at random, it takes from the last connection between the two addresses
//! if that lingers in TIME_WAIT: the number after its last one, and [`TIME_WAIT_GAP`] more (RFC 1122, 4.2.2.13). So first a
//! socket is brought into that state, by repair mode and without a word to anybody.
//!
//! What is agreed in a handshake is what the peer's SYN offers; our own offers are the kernel's, as they were. Timestamps go on
//! while the machine is the same one (their offset depends on the addresses and on a secret of the boot); elsewhere they would
//! go back, and the peer would drop our segments. So there the connection goes on without them.

use super::inet::CLOSE;
use super::packet::{ACK, Courier, FIN, PUSH, SYN, Segment, arrives};
use super::repair::Ends;
use crate::Problem;
use rewake_image::messages::TcpStreamEntry;
use rewake_netlink::{destroy, diag};
use rewake_sys::SyscallError;
use rewake_sys::sockets::{option_int, set_option_int};
use rewake_sys::tcp::{self, Queue, Repair};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

/// How far the kernel starts a connection behind the last one that lingers.
const TIME_WAIT_GAP: u32 = 65_535 + 2;
/// How much a segment carries: what the kernel makes of it takes little more memory than that.
const PIECE: usize = 31 << 10;

/// A connection that is to be in a queue.
#[derive(Debug)]
pub(super) struct Queued<'a> {
    pub(super) listener: BorrowedFd<'a>,
    /// What error texts call the listening socket.
    pub(super) object: &'a str,
    /// The own end.
    pub(super) source: SocketAddr,
    /// The peer.
    pub(super) destination: SocketAddr,
    pub(super) stream: &'a TcpStreamEntry,
    pub(super) received: &'a [u8],
    /// Whether the peer's FIN has taken a number.
    pub(super) ended: bool,
    /// Whether it is to be received again from us.
    pub(super) closes: bool,
    /// Whether timestamps go on.
    pub(super) timestamps: bool,
}

/// Both addresses without what depends on the family of the socket.
pub(super) fn plain(source: SocketAddr, destination: SocketAddr) -> Ends {
    let plain = |a: SocketAddr| (a.ip().to_canonical(), a.port());
    (plain(source), plain(destination))
}

impl Queued<'_> {
    fn problem(&self, reason: impl std::fmt::Display) -> Problem {
        let who = format!("{}: the connection of {}", self.object, self.destination);
        Problem::new(who, format!("it cannot wait to be accepted again: {reason}"))
    }

    /// Our own first sequence number.
    fn own_start(&self) -> u32 {
        self.stream.outq_seq.wrapping_sub(self.stream.outq_len).wrapping_sub(1)
    }

    /// The peer's.
    fn peer_start(&self) -> u32 {
        let data_end = self.stream.inq_seq.wrapping_sub(self.ended.into());
        data_end.wrapping_sub(self.stream.inq_len).wrapping_sub(1)
    }

    fn agreed(&self, option: u32) -> bool {
        self.stream.opt_mask & option != 0
    }

    fn segment(&self, flags: u8) -> Segment<'static> {
        let scale = if self.agreed(tcp::WINDOW_SCALE) { self.stream.snd_wscale.min(14) } else { 0 };
        let window = self.stream.snd_wnd.unwrap_or(0) >> scale;
        Segment {
            from: self.destination,
            to: self.source,
            sequence: self.peer_start().wrapping_add(1),
            acknowledged: self.own_start().wrapping_add(1),
            flags,
            window: window.min(u16::MAX.into()) as u16,
            options: self.stamp(),
            data: &[],
        }
    }

    /// The timestamps option of a segment. What the peer's clock says is not known: 0 stands for that, as in the first segments
    /// of some systems, and the next real one is taken for good.
    fn stamp(&self) -> &'static [u8] {
        if self.with_timestamps() { &[1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0] } else { &[] }
    }

    fn with_timestamps(&self) -> bool {
        self.timestamps && self.agreed(tcp::TIMESTAMPS)
    }

    /// Brings a socket with the addresses of the connection into TIME_WAIT.
    fn linger(&self, courier: &mut Courier) -> Result<(), Problem> {
        let failed = |e: SyscallError| self.problem(e);
        let family = if self.source.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|e| self.problem(e))?;
        let fd = socket.as_fd();
        tcp::repair(fd, Repair::On).map_err(failed)?;
        rustix::net::bind(fd, &self.source)
            .map_err(|e| self.problem(format!("{}: {e}", self.source)))?;
        // Before the peer's first number, or its SYN would look like an old one.
        let theirs = self.peer_start().wrapping_sub(1 << 16);
        let ours = self.own_start().wrapping_sub(TIME_WAIT_GAP).wrapping_sub(1);
        tcp::choose_queue(fd, Queue::Receive).map_err(failed)?;
        tcp::set_sequence(fd, theirs).map_err(failed)?;
        tcp::choose_queue(fd, Queue::Send).map_err(failed)?;
        tcp::set_sequence(fd, ours).map_err(failed)?;
        rustix::net::connect(fd, &self.destination)
            .map_err(|e| self.problem(format!("connection to itself: {e}")))?;
        // In repair mode with this queue the FIN counts as sent and is not.
        tcp::choose_queue(fd, Queue::Send).map_err(failed)?;
        rustix::net::shutdown(fd, Shutdown::Write).map_err(|e| self.problem(e))?;
        let fin = Segment {
            sequence: theirs,
            acknowledged: ours.wrapping_add(1),
            options: &[],
            ..self.segment(FIN | ACK)
        };
        courier.deliver(&fin).map_err(|e| self.problem(e))?;
        let mut state = 0;
        let is_there = || {
            state = u32::from(tcp::info(fd)?.state);
            Ok(state == CLOSE)
        };
        match arrives(is_there).map_err(failed)? {
            true => Ok(()),
            false => {
                Err(self.problem(format!("a packet to itself did not arrive (state {state})")))
            }
        }
    }

    /// Shakes hands in the name of the peer.
    fn shake_hands(&self, courier: &mut Courier) -> Result<(), Problem> {
        let mss = self.stream.mss_clamp.min(u16::MAX.into()) as u16;
        let mut options = vec![2, 4];
        options.extend(mss.to_be_bytes());
        if self.agreed(tcp::SACK) {
            options.extend([1, 1, 4, 2]);
        }
        if self.agreed(tcp::WINDOW_SCALE) {
            options.extend([1, 3, 3, self.stream.snd_wscale.min(14) as u8]);
        }
        options.extend(self.stamp());
        let greeting = Segment {
            sequence: self.peer_start(),
            acknowledged: 0,
            window: u16::MAX,
            options: &options,
            ..self.segment(SYN)
        };
        courier.deliver(&greeting).map_err(|e| self.problem(e))?;
        courier.deliver(&self.segment(ACK)).map_err(|e| self.problem(e))
    }

    /// Puts it into the queue, without what it has received.
    fn establish(&self, courier: &mut Courier) -> Result<(), Problem> {
        let _deferred = Undeferred::new(self.listener).map_err(|e| self.problem(e))?;
        let _room = Room::new(self.listener, self.received.len()).map_err(|e| self.problem(e))?;
        self.linger(courier)?;
        self.shake_hands(courier)
    }

    fn ends(&self) -> Ends {
        plain(self.source, self.destination)
    }

    /// Sends what the peer has sent from byte `from` on.
    fn feed(&self, courier: &mut Courier, from: usize, piece: usize) -> Result<(), Problem> {
        let mut at = from;
        for data in self.received.get(from..).unwrap_or_default().chunks(piece) {
            let first = self.segment(ACK | PUSH);
            let sequence = first.sequence.wrapping_add(at as u32);
            courier.deliver(&Segment { sequence, data, ..first }).map_err(|e| self.problem(e))?;
            at += data.len();
        }
        Ok(())
    }

    fn close(&self, courier: &mut Courier) -> Result<(), Problem> {
        if !self.closes {
            return Ok(());
        }
        let fin = self.segment(FIN | ACK);
        let sequence = fin.sequence.wrapping_add(self.received.len() as u32);
        courier.deliver(&Segment { sequence, ..fin }).map_err(|e| self.problem(e))
    }
}

/// `TCP_DEFER_ACCEPT` of a listening socket, which keeps handshakes from being done, switched off until this is dropped.
struct Undeferred<'a>(BorrowedFd<'a>, i32);

impl<'a> Undeferred<'a> {
    fn new(fd: BorrowedFd<'a>) -> Result<Option<Undeferred<'a>>, SyscallError> {
        match option_int(fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT)? {
            0 => Ok(None),
            seconds => {
                set_option_int(fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 0)?;
                Ok(Some(Undeferred(fd, seconds)))
            }
        }
    }
}

impl Drop for Undeferred<'_> {
    fn drop(&mut self) {
        let set = set_option_int(self.0, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, self.1);
        if let Err(e) = set {
            log::error!("TCP_DEFER_ACCEPT cannot be set again: {e}");
        }
    }
}

/// A listening socket's receive buffer, made larger until this is dropped: an accepted socket starts with the same, and what
/// it had received may have been packed more tightly than our segments are. One whose program has chosen a size keeps it.
struct Room<'a> {
    listener: BorrowedFd<'a>,
    size: i32,
    locks: i32,
}

/// `SO_BUF_LOCK` (Linux 5.16), and its bit for receive buffers that a program has chosen.
const SO_BUF_LOCK: i32 = 72;
const RECEIVE_LOCK: i32 = 2;

impl<'a> Room<'a> {
    fn new(listener: BorrowedFd<'a>, received: usize) -> Result<Option<Room<'a>>, SyscallError> {
        /// Behind this the kernel would choose another window scale.
        const MOST: usize = 1 << 20;
        let locks = option_int(listener, libc::SOL_SOCKET, SO_BUF_LOCK)?;
        let size = option_int(listener, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
        let wanted = (2 * received).min(MOST) as i32;
        if locks & RECEIVE_LOCK != 0 || size >= 2 * wanted {
            return Ok(None);
        }
        let room = Room { listener, size, locks };
        room.resize(wanted)?;
        Ok(Some(room))
    }

    /// The kernel doubles the size, and takes it for chosen.
    fn resize(&self, half: i32) -> Result<(), SyscallError> {
        set_option_int(self.listener, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, half)?;
        set_option_int(self.listener, libc::SOL_SOCKET, SO_BUF_LOCK, self.locks)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.resize(self.size / 2) {
            log::error!("SO_RCVBUF of a listening socket cannot be set again: {e}");
        }
    }
}

/// Puts connections into the queues of their listening sockets, in this order. They should be locked.
///
/// # Errors
/// One cannot be put there; the others are.
pub(super) fn enqueue(queued: &[Queued<'_>]) -> Result<(), Problem> {
    if queued.is_empty() {
        return Ok(());
    }
    let mut courier = Courier::default();
    let mut failure = None;
    let mut done = |one: &Queued<'_>, result: Result<(), Problem>| match result {
        Ok(()) => true,
        Err(problem) => {
            log::debug!("{}: {problem}", one.destination);
            failure.get_or_insert(problem);
            false
        }
    };
    let mut there: Vec<&Queued<'_>> = queued.iter().collect();
    there.retain(|one| done(one, one.establish(&mut courier)));
    feed(&mut there, &mut courier, &mut done)?;
    there.retain(|one| done(one, one.close(&mut courier)));
    failure.map_or(Ok(()), Err)
}

/// Has connections receive what they had; those that do not are taken out of the list and handed to `done`.
fn feed(
    there: &mut Vec<&Queued<'_>>,
    courier: &mut Courier,
    done: &mut impl FnMut(&Queued<'_>, Result<(), Problem>) -> bool,
) -> Result<(), Problem> {
    /// The kernel lets in only so much at a time; then smaller segments get what is left into the queue.
    const ROUNDS: u32 = 5;
    let mut piece = PIECE;
    let mut received: HashMap<Ends, u32> = HashMap::new();
    let got = |received: &HashMap<Ends, u32>, one: &Queued<'_>| {
        received.get(&one.ends()).map_or(0, |length| *length as usize)
    };
    for _ in 0..ROUNDS {
        there.retain(|one| {
            let from = got(&received, one);
            done(one, one.feed(courier, from, piece))
        });
        // Most of it is there at once.
        arrives(|| {
            received = arrived(there)?;
            Ok(there.iter().all(|one| received.contains_key(&one.ends())))
        })?;
        if there.iter().any(|one| got(&received, one) < one.received.len()) {
            std::thread::sleep(Duration::from_millis(2));
            received = arrived(there)?;
        }
        there.retain(|one| {
            let is_there = match received.contains_key(&one.ends()) {
                true => Ok(()),
                false => Err(one.problem("the handshake has failed; is the queue full?")),
            };
            done(one, is_there)
        });
        if there.iter().all(|one| got(&received, one) >= one.received.len()) {
            return Ok(());
        }
        piece = (piece / 4).max(256);
    }
    there.retain(|one| {
        let (got, all) = (got(&received, one), one.received.len());
        let reason = format!("it takes {got} of the {all} bytes that it had received");
        done(one, if got < all { Err(one.problem(reason)) } else { Ok(()) })
    });
    Ok(())
}

/// How much those in queues have received.
fn arrived(queued: &[&Queued<'_>]) -> Result<HashMap<Ends, u32>, Problem> {
    let failed = |e| Problem::new("TCP connections", format!("sock_diag: {e}"));
    let mut socket = diag::open().map_err(failed)?;
    let mut all = HashMap::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // An IPv6 socket may have connections of either kind.
        let wanted = family == libc::AF_INET6 || queued.iter().any(|one| one.source.is_ipv4());
        if wanted {
            all.extend(destroy::held_by_nobody(&mut socket, family as u8).map_err(failed)?);
        }
    }
    Ok(all)
}
