//! Restoring TCP connections by `TCP_REPAIR`: made whole in the controller but silent, let go by
//! [`leave_repair`].
//!
//! What was never sent is sent for real when the connections are let go, and so is the FIN of an end that had closed: by then
//! the other end exists, if it is in the tree, and answers; if it is outside, it knows the FIN already and acknowledges
//! it again. The FIN of a peer outside, which is acknowledged and will not come again, is sent to ourselves in its name.

use super::inet::{self, CLOSE_WAIT, CLOSING, SYN_SENT};
use super::options::{self, Making};
use super::packet::{self, Fin};
use super::stream::{self, fin_received, fin_sent};
use super::{accept_queue, bind, holder, ip, lock};
use crate::Problem;
use crate::files::open::Opener;
use rewake_image::kind;
use rewake_image::messages::{InetSkEntry, SkShutdown, TcpStreamEntry};
use rewake_netlink::{destroy, diag};
use rewake_sys::tcp::{self, Agreed, Queue, Repair, Window};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::BorrowedFd;
use rustix::net::SendFlags;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// Both ends of a connection, the own one first.
pub type Ends = ((IpAddr, u16), (IpAddr, u16));

/// How much is put into a queue by one send(2): the kernel makes one buffer of it, which it may not get if it is large.
const PIECE: usize = 32 << 10;
/// What a send falls back to when memory is short.
const SMALL_PIECE: usize = 1 << 10;

/// A connection in repair mode.
#[derive(Debug)]
pub struct Pending {
    object: String,
    entry: InetSkEntry,
    destination: SocketAddr,
    /// What is to be sent.
    unsent: Vec<u8>,
    /// Nothing is under way between this end and a peer in the tree: neither has to ask the other.
    settled: bool,
    /// The peer's FIN, if the peer will not send it again.
    fin: Option<Fin>,
}

/// Makes a connection of the image: in repair mode, or closed with `--tcp-close`. [`prepare`] comes first.
pub(super) fn open(
    opener: &Opener<'_>,
    entry: &InetSkEntry,
    making: Making<'_>,
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<Option<Pending>, Problem> {
    let closed_at_dump = opener.images.inventory().tcp_close == Some(true);
    if opener.options.tcp_close {
        open_closed(making, entry)?;
        return Ok(None);
    }
    if closed_at_dump {
        return Err(making
            .problem(
                "the checkpoint was made with --tcp-close, so that its connections cannot go on",
            )
            .remedy("use --tcp-close, which has them closed"));
    }
    if !opener.options.tcp_established {
        return Err(making
            .problem("it cannot be restored without an option")
            .remedy("--tcp-established restores it; --tcp-close has it closed"));
    }
    let image = opener
        .images
        .read_with_payload(kind::TCP_STREAM, entry.ino)
        .map_err(|e| making.problem(e.to_string()))?;
    let Some((stream, data)) = image.first() else {
        return Err(making.problem(format!("tcp-stream-{:x}.img is missing", entry.ino)));
    };
    let unsent = connect(making, entry, stream, data, source, destination)?;
    let inside = peer_in_tree(opener, source, destination);
    // A peer in the tree closes again by itself.
    let fin = (fin_received(entry.state) && !inside).then(|| Fin {
        from: destination,
        to: source,
        sequence: stream.inq_seq.wrapping_sub(1),
        acknowledged: stream
            .outq_seq
            .wrapping_sub(fin_sent(entry.state).into())
            .wrapping_sub(stream.outq_len),
        window: (stream.snd_wnd.unwrap_or(0) >> stream.snd_wscale.min(14)) as u16,
    });
    Ok(Some(Pending {
        object: making.object.to_owned(),
        entry: entry.clone(),
        destination,
        settled: inside && stream.outq_len as usize == unsent.len(),
        unsent,
        fin,
    }))
}

/// A socket whose connection has ended: nothing can be sent or received, and poll(2) says so.
fn open_closed(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    inet::shut_down(making, SkShutdown::Both as i32)?;
    ip::apply_before_bind(making, entry)?;
    options::apply_before_bind(making, &entry.opts, false)?;
    ip::apply(making, entry)?;
    options::apply(making, &entry.opts)?;
    inet::apply_tcp(making, entry)
}

fn peer_in_tree(opener: &Opener<'_>, source: SocketAddr, destination: SocketAddr) -> bool {
    let plain = |a: SocketAddr| (a.ip().to_canonical(), a.port());
    opener.sockets.ends.contains(&(plain(destination), plain(source)))
}

/// What has to be known, and done, before the first connection is made: the ends of all; and what the kernel still has of
/// these very connections is ended, if the program they were saved from was killed later: sockets without a program that
/// still try to say goodbye, behind the lock. Before the first one is made anew, since their last words are resets.
///
/// # Errors
/// The kernel has no sock_diag.
pub(super) fn prepare(opener: &mut Opener<'_>) -> Result<(), Problem> {
    let connections =
        || opener.files.values().filter_map(|f| f.isk.as_deref()).filter(|s| s.dst_port != 0);
    let families: HashSet<u32> = connections().map(|s| s.family).collect();
    let ends: HashSet<Ends> = connections().filter_map(inet::ends_of).collect();
    opener.sockets.ends = ends;
    if opener.options.tcp_close || !opener.options.tcp_established {
        return Ok(());
    }
    let ends = &opener.sockets.ends;
    let failed = |e| Problem::new("TCP connections", format!("sock_diag: {e}"));
    let mut socket = diag::open().map_err(failed)?;
    for family in families {
        let cleared = destroy::orphans(&mut socket, family as u8, |e| ends.contains(e));
        match cleared.map_err(failed)? {
            0 => {}
            n => log::debug!("{n} TCP sockets of the program's last run ended"),
        }
    }
    Ok(())
}

/// Makes the connection as it was, in repair mode. Returns what is still to be sent.
fn connect(
    making: Making<'_>,
    entry: &InetSkEntry,
    stream: &TcpStreamEntry,
    data: &[u8],
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<Vec<u8>, Problem> {
    let fd = making.fd;
    let failed = |e: SyscallError| making.problem(format!("it cannot be repaired: {e}"));
    let damaged = || making.problem(format!("tcp-stream-{:x}.img contradicts itself", entry.ino));
    let (received, queued) = data.split_at_checked(stream.inq_len as usize).ok_or_else(damaged)?;
    let queued = queued.get(..stream.outq_len as usize).ok_or_else(damaged)?;
    // CRIU's restore needs the length of the unsent part as well.
    let unsent = stream.unsq_len.unwrap_or(0) as usize;
    let (sent, unsent) = queued.split_at(queued.len().checked_sub(unsent).ok_or_else(damaged)?);

    ip::apply_before_bind(making, entry)?;
    options::apply_before_bind(making, &entry.opts, true)?;
    tcp::repair(fd, Repair::On).map_err(|e| match e.errno {
        Errno::PERM => making
            .problem("it cannot be put into repair mode")
            .remedy("--tcp-established needs CAP_NET_ADMIN in its network namespace"),
        _ => failed(e),
    })?;
    // In repair mode a bind takes no notice of others; the connect does.
    let _ = bind::bind(making, entry, source)?;
    // FINs take a place in the sequence, and are made anew.
    let receive_end = stream.inq_seq.wrapping_sub(fin_received(entry.state).into());
    let send_end = stream.outq_seq.wrapping_sub(fin_sent(entry.state).into());
    tcp::choose_queue(fd, Queue::Receive).map_err(failed)?;
    tcp::set_sequence(fd, receive_end.wrapping_sub(stream.inq_len)).map_err(failed)?;
    tcp::choose_queue(fd, Queue::Send).map_err(failed)?;
    if entry.state == SYN_SENT {
        // The SYN takes a place too.
        tcp::set_sequence(fd, send_end.wrapping_sub(stream.outq_len).wrapping_sub(1))
            .map_err(failed)?;
        return Ok(unsent.to_vec());
    }
    tcp::set_sequence(fd, send_end.wrapping_sub(stream.outq_len)).map_err(failed)?;
    rustix::net::connect(fd, &destination)
        .map_err(|e| connect_problem(making, entry, source, e))?;
    let option = |bit| stream.opt_mask & bit != 0;
    let agreed = Agreed {
        mss: stream.mss_clamp,
        scales: option(tcp::WINDOW_SCALE)
            .then_some((stream.snd_wscale, stream.rcv_wscale.unwrap_or(0))),
        sack: option(tcp::SACK),
        timestamps: option(tcp::TIMESTAMPS),
    };
    tcp::set_agreed(fd, &agreed).map_err(failed)?;
    if let Some(timestamp) = stream.timestamp {
        tcp::set_timestamp(fd, timestamp).map_err(failed)?;
    }
    options::make_room(making, received.len(), queued.len())?;
    tcp::choose_queue(fd, Queue::Receive).map_err(failed)?;
    fill(fd, received)
        .map_err(|e| making.problem(format!("its receive queue cannot be filled: {e}")))?;
    tcp::choose_queue(fd, Queue::Send).map_err(failed)?;
    fill(fd, sent).map_err(|e| making.problem(format!("its send queue cannot be filled: {e}")))?;
    // Before packets come, or more would be let in than there was room for.
    options::apply_receive_buffer(making, &entry.opts)?;
    if let Some(window) = window(stream, receive_end) {
        tcp::set_window(fd, window).map_err(failed)?;
    }
    ip::apply(making, entry)?;
    Ok(unsent.to_vec())
}

/// The windows of the image, or none: then the kernel's own do.
fn window(stream: &TcpStreamEntry, receive_end: u32) -> Option<Window> {
    let rcv_wup = stream.rcv_wup?;
    // The peer's FIN is not received yet, so neither can it have been acknowledged.
    let early = rcv_wup.wrapping_sub(receive_end);
    let early = if early > u32::MAX / 2 { 0 } else { early };
    Some(Window {
        snd_wl1: stream.snd_wl1?,
        snd_wnd: stream.snd_wnd?,
        max_window: stream.max_window?,
        rcv_wnd: stream.rcv_wnd?.wrapping_add(early),
        rcv_wup: rcv_wup.wrapping_sub(early),
    })
}

/// Puts `data` into the chosen queue, or sends it if the socket is not in repair mode.
pub(super) fn fill(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    let mut piece = PIECE;
    while !data.is_empty() {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(fd, &data[..data.len().min(piece)], flags) {
            Ok(0) => return Err(Errno::NOBUFS),
            Ok(done) => data = &data[done..],
            Err(_) if piece > SMALL_PIECE => piece /= 2,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn connect_problem(
    making: Making<'_>,
    entry: &InetSkEntry,
    source: SocketAddr,
    errno: Errno,
) -> Problem {
    match errno {
        Errno::ADDRNOTAVAIL | Errno::ADDRINUSE => {
            let by = holder::of_connection(entry.proto, source)
                .map_or_else(String::new, |holder| format!(", held by {holder}"));
            making
                .problem(format!("this very connection exists already{by}"))
                .remedy("end the process the checkpoint was made of, or use --tcp-close")
        }
        Errno::NETUNREACH | Errno::HOSTUNREACH => making.problem("there is no route to its peer"),
        e => making.problem(format!("cannot be connected: {e}")),
    }
}

/// One that is about to go on, with its descriptor: the one that the opener holds, or there might not be enough.
struct Going<'a> {
    fd: BorrowedFd<'a>,
    pending: &'a Pending,
}

impl std::ops::Deref for Going<'_> {
    type Target = Pending;

    fn deref(&self) -> &Pending {
        self.pending
    }
}

impl Going<'_> {
    fn making(&self) -> Making<'_> {
        Making { fd: self.fd, object: &self.object }
    }

    /// Whether this end closes before the FIN of a peer outside comes: neither knows yet that the other has.
    fn closes_first(&self) -> bool {
        self.fin.is_some() && self.entry.state == CLOSING
    }

    /// Receives the FIN of a peer outside anew, behind the network lock.
    fn receive_fin(&self) -> Result<(), Problem> {
        let Some(fin) = &self.fin else { return Ok(()) };
        let making = self.making();
        if self.closes_first() {
            if !self.unsent.is_empty() {
                // It has to be in the queue before the FIN, and what is put there in repair mode would count as sent.
                self.let_go(Repair::OffSilent)?;
            }
            inet::shut_down(making, SkShutdown::Write as i32)?;
        }
        fin.deliver().map_err(|e| {
            making.problem(format!("the end of what it receives cannot be restored: {e}"))
        })?;
        let is_there = || {
            let state = inet::state(making.fd)?.state;
            Ok(matches!(u32::from(state), CLOSE_WAIT | CLOSING))
        };
        let arrived = packet::arrives(is_there);
        if !arrived.map_err(|e: rewake_sys::SyscallError| making.problem(e.to_string()))? {
            return Err(making.problem(
                "the end of what it receives cannot be restored: a packet to itself did not arrive",
            ));
        }
        Ok(())
    }

    /// Ends repair mode and sends what was not sent.
    fn let_go(&self, mode: Repair) -> Result<(), Problem> {
        let making = self.making();
        // Before anything is sent: TCP_CORK and TCP_NODELAY decide how it is.
        inet::apply_tcp(making, &self.entry)?;
        tcp::repair(making.fd, mode)
            .map_err(|e| making.problem(format!("it cannot be taken out of repair mode: {e}")))?;
        if self.entry.state == SYN_SENT {
            rustix::io::ioctl_fionbio(making.fd, true)
                .and_then(|()| match rustix::net::connect(making.fd, &self.destination) {
                    Err(Errno::INPROGRESS) => Ok(()),
                    other => other,
                })
                .map_err(|e| making.problem(format!("cannot be connected: {e}")))?;
            let blocking = self.entry.flags & libc::O_NONBLOCK as u32 == 0;
            if blocking {
                rustix::io::ioctl_fionbio(making.fd, false)
                    .map_err(|e| making.problem(e.to_string()))?;
            }
            return Ok(());
        }
        fill(making.fd, &self.unsent)
            .map_err(|e| making.problem(format!("its send queue cannot be filled: {e}")))
    }

    /// Sends the FIN of an end that had.
    fn close_again(&self) -> Result<(), Problem> {
        if !fin_sent(self.entry.state) || self.closes_first() {
            return Ok(());
        }
        inet::shut_down(self.making(), SkShutdown::Write as i32)
    }

    /// Sets what repair mode has changed or what was in the way of filling the queues.
    fn finish(&self) -> Result<(), Problem> {
        options::apply(self.making(), &self.entry.opts)
    }
}

/// Lets all TCP connections go on, and removes the network lock of the checkpoint. To be called when all tasks exist and
/// just before they go on.
///
/// # Errors
/// A connection refuses; others may go on already.
pub fn leave_repair(opener: &mut Opener<'_>) -> Result<(), Problem> {
    let pending = std::mem::take(&mut opener.sockets.connections);
    let waiting = std::mem::take(&mut opener.sockets.waiting);
    let connections = pending
        .iter()
        .map(|pending| Ok(Going { fd: opener.opened(pending.entry.id)?, pending }))
        .collect::<Result<Vec<_>, Problem>>()?;
    connections.iter().try_for_each(Going::receive_fin)?;
    accept_queue::fill(opener, &waiting)?;
    unlock(opener)?;
    in_shares(&connections, |connection| {
        let gone_on = connection.closes_first() && !connection.unsent.is_empty();
        match connection.settled {
            _ if gone_on => Ok(()),
            true => connection.let_go(Repair::OffSilent),
            false => connection.let_go(Repair::Off),
        }
    })?;
    // The end whose FIN came first closes first, and before it the one that had closed without knowing of that.
    let mut in_order: Vec<&Going<'_>> = connections.iter().collect();
    in_order.sort_by_key(|c| match c.entry.state {
        CLOSING => 0,
        state => 1 + u8::from(fin_received(state)),
    });
    in_order.into_iter().try_for_each(|c| c.close_again())?;
    in_shares(&connections, |c| c.finish())
}

/// Does `work` on each, a share of them on each CPU.
fn in_shares(
    connections: &[Going<'_>],
    work: impl Fn(&Going<'_>) -> Result<(), Problem> + Sync,
) -> Result<(), Problem> {
    let shares = connections.chunks(stream::share(connections.len())).map(|share| (share, ()));
    stream::at_once(shares, |share: &[Going<'_>], ()| share.iter().try_for_each(&work)).map(drop)
}

/// Removes the lock of the checkpoint, and those of dumps that were killed.
fn unlock(opener: &Opener<'_>) -> Result<(), Problem> {
    let removed =
        lock::unlock(opener.images.inventory(), opener.files.values().chain(&opener.locked))?;
    log::debug!("network lock: {removed} tables or rules removed");
    Ok(())
}
