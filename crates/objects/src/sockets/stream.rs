//! Dumping TCP: the state of a socket, and the queues of a connection by `TCP_REPAIR` (tcp(7), linux/tcp.h).
//!
//! # Why a dump is harmless
//! Reading the send queue and the sequence numbers needs repair mode, in which a close is silent and `SO_REUSEADDR` is
//! forgotten. It is switched on for the reading only ([`read`], some milliseconds for hundreds of connections),
//! and off again before anything is written; a [`Guard`] does so on every way out, and its keeper if the controller
//! is killed within these milliseconds. Tasks that are to be killed get it once more, by [`Survey::silence`], so that the peer
//! is not told.
//!
//! # Why connections within the tree need no lock
//! Both ends are frozen, but the kernel's timers are not: data may still move from one end's send queue to the other's
//! receive queue. All send queues are read before all receive queues, so that whatever moved meanwhile is in both, and
//! nothing is in neither; TCP itself discards what comes twice.

use super::Survey;
use super::accept_queue;
use super::ended;
use super::inet::{self, CLOSE, CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2};
use super::inet::{LAST_ACK, LISTEN, SYN_SENT};
use super::stream_options::Job;
use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::{
    InetSkEntry, RewakeEndedEntry, RewakeSocketOptionEntry, SkShutdown, TcpStreamEntry,
};
use rewake_image::{ImageError, ImageWriter, kind};
use rewake_inject::guard::{self, SocketOption};
use rewake_netlink::diag;
use rewake_sys::sockets::{option, option_int, queue_length, set_option_int};
use rewake_sys::tcp::{self, Queue, Repair};
use rewake_sys::{Errno, SyscallError};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::RecvFlags;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

const SIOCINQ: u32 = 0x541b;
const SIOCOUTQ: u32 = 0x5411;
const SIOCOUTQNSD: u32 = 0x894b;
const SO_PEEK_OFF: i32 = 42;

/// Whether this end has sent its FIN in this state, or will once the data before it is sent.
#[must_use]
pub fn fin_sent(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK | CLOSE)
}

/// Whether the FIN this end has sent takes a place in its send queue still.
fn fin_queued(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | CLOSING | LAST_ACK)
}

/// Whether the peer's FIN has come in this state.
#[must_use]
pub fn fin_received(state: u32) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING | CLOSE)
}

/// Surveys what is particular to TCP: whether it is a connection, and what is left of one that has ended.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
    source: SocketAddr,
) -> Result<(bool, Option<RewakeEndedEntry>), Problem> {
    let fd = view.as_fd();
    let failed = |e: SyscallError| view.problem(format!("its state cannot be read: {e}"));
    let known = collector
        .sockets
        .tcp(entry.family, entry.ino)
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?;
    refuse_signing(view, entry, known.as_deref())?;
    entry.state = match known.as_deref().map(|known| known.state.into()) {
        // What listens tells more.
        Some(state) if state != LISTEN => state,
        _ => inet::state(fd).map_err(failed)?.state.into(),
    };
    match entry.state {
        LISTEN => {
            let info = inet::state(fd).map_err(failed)?;
            entry.backlog = info.sacked;
            if info.unacked != 0 && !collector.options.skip_in_flight {
                accept_queue::refuse(collector, view, entry, known.as_deref(), info.unacked)?;
            }
            Ok((false, None))
        }
        CLOSE => Ok((false, survey_closed(collector, view, entry, source)?)),
        SYN_SENT | ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING => {
            survey_connected(collector, view, entry)?;
            entry.shutdown = match (fin_received(entry.state), fin_sent(entry.state)) {
                (false, false) => None,
                (true, false) => Some(SkShutdown::Read as i32),
                (false, true) => Some(SkShutdown::Write as i32),
                (true, true) => Some(SkShutdown::Both as i32),
            };
            Ok((true, None))
        }
        other => Err(view.problem(format!("it is in TCP state {other}, which cannot be saved"))),
    }
}

/// Whether a socket has keys of the TCP authentication option (`TCP_AO_INFO`, Linux 6.7).
fn has_keys(fd: BorrowedFd<'_>) -> bool {
    const TCP_AO_INFO: i32 = 40;
    /// A kernel that was built without it says so once.
    static UNKNOWN: AtomicBool = AtomicBool::new(false);
    if UNKNOWN.load(Ordering::Relaxed) {
        return false;
    }
    match option::<48>(fd, libc::IPPROTO_TCP, TCP_AO_INFO) {
        Ok(_) => true,
        Err(e) => {
            // Where it is known, a socket without keys gives ENOENT.
            if e.errno == Errno::NOPROTOOPT {
                UNKNOWN.store(true, Ordering::Relaxed);
            }
            false
        }
    }
}

/// Keys can be set, but the kernel gives them to nobody.
fn refuse_signing(
    view: &View<'_>,
    entry: &InetSkEntry,
    known: Option<&diag::Tcp>,
) -> Result<(), Problem> {
    let signs = known.is_some_and(|known| known.signs) || has_keys(view.as_fd());
    if signs {
        return Err(view
            .problem(format!(
                "{} signs its segments (TCP_MD5SIG or TCP_AO), whose keys cannot be saved",
                inet::describe(entry)
            ))
            .remedy("end the session that is signed, or take its keys away"));
    }
    Ok(())
}

/// A socket that never was connected, or no longer is.
fn survey_closed(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
    source: SocketAddr,
) -> Result<Option<RewakeEndedEntry>, Problem> {
    let events = ready(view.as_fd());
    if !events.contains(PollFlags::RDHUP) {
        return Ok(None);
    }
    // Both sides have closed the connection, or one has reset it. Its port is not its own any more.
    entry.shutdown = Some(SkShutdown::Both as i32);
    entry.src_port = 0;
    entry.src_addr.fill(0);
    if collector.options.tcp_close {
        return Ok(None);
    }
    if events.contains(PollFlags::PRI) {
        return Err(view
            .problem("its TCP connection has ended, but holds urgent (out-of-band) data, which cannot be saved")
            .remedy("--tcp-close drops it; or try again once the program has read it"));
    }
    let failed = events.contains(PollFlags::ERR);
    let waiting = queue_length(view.as_fd(), SIOCINQ).unwrap_or(0);
    ended::survey(&mut collector.sockets, view, source, failed, waiting)
}

/// The bytes in the receive queue of a socket; they stay there.
pub(super) fn peek_all(fd: BorrowedFd<'_>, waiting: usize) -> Result<Vec<u8>, SyscallError> {
    let peeks_at = option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF).ok().filter(|at| *at >= 0);
    let mut bytes = Vec::new();
    let got = peek(fd, peeks_at, &mut bytes, waiting)?;
    bytes.truncate(got);
    if got == waiting { Ok(bytes) } else { Err(SyscallError::new("recv", Errno::AGAIN)) }
}

fn survey_connected(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
) -> Result<(), Problem> {
    let fd = view.as_fd();
    if entry.state == SYN_SENT {
        // getpeername(2) does not tell whom it calls.
        let found = collector.sockets.tcp(entry.family, entry.ino);
        let (address, port) = found
            .map_err(|e| view.problem(format!("sock_diag does not tell its peer: {e}")))?
            .and_then(|record| record.destination)
            .ok_or_else(|| view.problem("sock_diag does not tell its peer"))?;
        entry.dst_port = port.into();
        entry.dst_addr = inet::words(address, entry.family as i32);
    }
    let what = inet::describe(entry);
    let options = &collector.options;
    if !options.tcp_established && !options.tcp_close {
        return Err(view.problem(format!("{what} cannot be saved without an option")).remedy(
            "--tcp-established saves it (restore before the peer gives up); --tcp-close has it closed after the restore",
        ));
    }
    if options.tcp_close {
        return Ok(());
    }
    if let Some(name) = inet::upper_protocol(fd) {
        return Err(view
            .problem(format!(
                "{what} has the protocol {name} on top (TCP_ULP), which cannot be saved"
            ))
            .remedy("--tcp-close has it closed after the restore"));
    }
    if ready(fd).contains(PollFlags::PRI) {
        return Err(view
            .problem(format!("{what} holds urgent (out-of-band) data, which cannot be saved"))
            .remedy("try again once the program has read it, or use --tcp-close"));
    }
    Ok(())
}

/// What poll(2) says of a socket at once.
fn ready(fd: BorrowedFd<'_>) -> PollFlags {
    let wanted = PollFlags::IN | PollFlags::PRI | PollFlags::RDHUP;
    let mut poll = [PollFd::from_borrowed_fd(fd, wanted)];
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut poll, Some(&at_once)) {
        Ok(_) => poll[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

/// A connection of the tree.
#[derive(Debug)]
pub struct Connection {
    fd: Arc<OwnedFd>,
    object: String,
    inode: u32,
    id: u32,
    family: u32,
    /// Where its entry is in [`Collector::entries`].
    entry: usize,
    reuse: bool,
    /// Where the program's own peeks start (`SO_PEEK_OFF`, Linux 6.9), if it has said so.
    peeks_at: Option<i32>,
    /// As much of its entry as is read with the queues.
    options: InetSkEntry,
    unusual: Vec<RewakeSocketOptionEntry>,
    /// Its own address.
    pub source: SocketAddr,
    /// The peer's.
    pub destination: SocketAddr,
    stream: TcpStreamEntry,
    received: Vec<u8>,
    unacknowledged: Vec<u8>,
    /// Places in the sequence, behind the data, that its FIN takes: 1 or 0.
    fin: u32,
}

/// Both addresses without what depends on the family of the socket.
fn ends(source: SocketAddr, destination: SocketAddr) -> ((IpAddr, u16), (IpAddr, u16)) {
    let plain = |a: SocketAddr| (a.ip().to_canonical(), a.port());
    (plain(source), plain(destination))
}

impl Connection {
    /// A connection whose entry will be `entry` in the collection.
    pub(super) fn new(
        fd: OwnedFd,
        object: String,
        entry: usize,
        socket: &InetSkEntry,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Connection {
        Connection {
            fd: Arc::new(fd),
            object,
            inode: socket.ino,
            id: socket.id,
            family: socket.family,
            entry,
            reuse: false,
            peeks_at: None,
            options: InetSkEntry { state: socket.state, ..InetSkEntry::default() },
            unusual: Vec::new(),
            source,
            destination,
            stream: TcpStreamEntry::default(),
            received: Vec::new(),
            unacknowledged: Vec::new(),
            fin: 0,
        }
    }

    /// Whether it is the one of this file id.
    #[must_use]
    pub fn is(&self, id: u32) -> bool {
        self.id == id
    }

    /// What is to be known for reading its options.
    pub(super) fn job(&self, survey: &mut Survey, filter: Vec<u64>) -> Result<Job, Problem> {
        let known = survey
            .tcp(self.family, self.inode)
            .map_err(|e| Problem::new(&*self.object, format!("sock_diag: {e}")))?;
        Ok(Job {
            fd: Arc::clone(&self.fd),
            object: self.object.clone(),
            family: self.family,
            known,
            connected: self.options.state != SYN_SENT,
            filter,
            usual: survey.usual(self.family as i32, libc::SOCK_STREAM, libc::IPPROTO_TCP),
        })
    }

    fn problem(&self, what: &str, e: impl std::fmt::Display) -> Problem {
        let object =
            format!("{}: TCP connection {} to {}", self.object, self.source, self.destination);
        Problem::new(object, format!("{what}: {e}"))
    }

    fn failed(&self, e: SyscallError) -> Problem {
        if e.errno == Errno::PERM {
            return self
                .problem("it cannot be put into repair mode", e)
                .remedy("--tcp-established needs CAP_NET_ADMIN in its network namespace");
        }
        self.problem("it cannot be read", e)
    }

    /// Reads the send queue of a connection in repair mode. The receive queue is chosen at the end: with the send queue,
    /// the kernel would take for sent what a timer makes it try to send.
    fn read_send_side(&mut self, scratch: &mut Vec<u8>) -> Result<u32, Problem> {
        /// What is on its way when the tree is stopped arrives and is acknowledged all the same, in between.
        const TRIES: usize = 100;
        let fd = self.fd.as_fd();
        let read = || -> Result<(tcp::Info, u32, usize, usize), SyscallError> {
            let info = tcp::info(fd)?;
            tcp::choose_queue(fd, Queue::Send)?;
            let end = tcp::sequence(fd)?;
            Ok((info, end, queue_length(fd, SIOCOUTQ)?, queue_length(fd, SIOCOUTQNSD)?))
        };
        let mut tries = 0;
        let (info, end, queued, unsent, fin) = loop {
            let (info, end, queued, unsent) = read().map_err(|e| self.failed(e))?;
            let fin = usize::from(fin_queued(u32::from(info.state)));
            let queued = queued.saturating_sub(fin);
            if queued == 0 {
                break (info, end, queued, unsent, fin);
            }
            // The first segment may be acknowledged in part; the kernel has it whole.
            const SEGMENT: usize = 64 << 10;
            let got = peek(fd, self.peeks_at, scratch, queued + SEGMENT)
                .map_err(|e| self.problem("its send queue cannot be read", e))?;
            if let Some(start) = got.checked_sub(queued) {
                self.unacknowledged.extend_from_slice(&scratch[start..got]);
                break (info, end, queued, unsent, fin);
            }
            tries += 1;
            if tries == TRIES {
                let what = format!("{got} of {queued} bytes");
                return Err(self.problem("its send queue cannot be read", what));
            }
        };
        let state = u32::from(info.state);
        self.fin = fin as u32;
        tcp::choose_queue(fd, Queue::Receive).map_err(|e| self.failed(e))?;
        let options = u32::from(info.options) & (tcp::TIMESTAMPS | tcp::SACK | tcp::WINDOW_SCALE);
        self.stream.opt_mask = options;
        self.stream.snd_wscale = info.send_scale.into();
        self.stream.rcv_wscale =
            (options & tcp::WINDOW_SCALE != 0).then_some(info.receive_scale.into());
        self.stream.outq_seq = end;
        self.stream.outq_len = queued as u32;
        self.stream.unsq_len = Some(unsent.saturating_sub(fin).min(queued) as u32);
        Ok(state)
    }

    /// Reads all else.
    fn read_receive_side(&mut self, scratch: &mut Vec<u8>) -> Result<(), Problem> {
        let fd = self.fd.as_fd();
        let read = || -> Result<_, SyscallError> {
            Ok((
                tcp::sequence(fd)?,
                queue_length(fd, SIOCINQ)?,
                tcp::window(fd)?,
                tcp::timestamp(fd)?,
                option_int(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)?,
            ))
        };
        let (end, waiting, window, timestamp, mss) = read().map_err(|e| self.failed(e))?;
        if waiting != 0 {
            let got = peek(fd, self.peeks_at, scratch, waiting)
                .map_err(|e| self.problem("its receive queue cannot be read", e))?;
            if got != waiting {
                return Err(self.problem(
                    "its receive queue cannot be read",
                    format!("{got} of {waiting} bytes"),
                ));
            }
            self.received.extend_from_slice(&scratch[..got]);
        }
        let stream = &mut self.stream;
        stream.inq_seq = end;
        stream.inq_len = waiting as u32;
        stream.mss_clamp = mss as u32;
        stream.timestamp = (stream.opt_mask & tcp::TIMESTAMPS != 0).then_some(timestamp);
        stream.snd_wl1 = Some(window.snd_wl1);
        stream.snd_wnd = Some(window.snd_wnd);
        stream.max_window = Some(window.max_window);
        stream.rcv_wnd = Some(window.rcv_wnd);
        stream.rcv_wup = Some(window.rcv_wup);
        Ok(())
    }

    /// Reads a connection that nobody else holds, and has it end without a word to the peer: its state, and what is written
    /// of it.
    pub(super) fn read_and_end(
        mut self,
        scratch: &mut Vec<u8>,
    ) -> Result<(u32, TcpStreamEntry, Vec<u8>), Problem> {
        tcp::repair(self.fd.as_fd(), Repair::On).map_err(|e| self.failed(e))?;
        let read = self.read_send_side(scratch).and_then(|state| {
            self.read_receive_side(scratch)?;
            Ok(state)
        });
        if read.is_err() {
            // It is lost, and its peer shall know.
            let _ = tcp::repair(self.fd.as_fd(), Repair::OffSilent);
        }
        Ok((read?, self.stream, self.received))
    }

    /// Writes `tcp-stream-HEX.img`.
    pub(super) fn write(&self, images: &ImageWriter) -> Result<(), ImageError> {
        let mut file = images.stream(kind::TCP_STREAM, self.inode);
        file.push(&self.stream)?;
        file.payload(&self.received)?;
        file.payload(&self.unacknowledged)?;
        file.finish()
    }
}

/// Peeks `length` bytes from the start of a queue into `scratch`: how many there were. `peeks_at` is where the program's own
/// peeks start.
fn peek(
    fd: BorrowedFd<'_>,
    peeks_at: Option<i32>,
    scratch: &mut Vec<u8>,
    length: usize,
) -> Result<usize, SyscallError> {
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
    let start_at = |offset| set_option_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, offset);
    if peeks_at.is_some() {
        start_at(-1)?;
    }
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let result = rustix::net::recv(fd, &mut scratch[..length], flags);
    peeks_at.map_or(Ok(()), start_at)?;
    result.map(|(got, _)| got).map_err(|errno| SyscallError::new("recv", errno))
}

/// Connections in repair mode: until this is dropped.
#[derive(Debug, Default)]
#[must_use = "repair mode ends when this is dropped"]
pub struct Guard {
    connections: Vec<(Arc<OwnedFd>, bool)>,
    /// Does the same if this process dies meanwhile.
    keeper: Option<guard::Guard>,
}

/// Who takes connections out of repair mode if this process dies. That clears `SO_REUSEADDR`.
fn keeper(connections: &[Connection]) -> Result<guard::Guard, Problem> {
    let mut options = Vec::with_capacity(connections.len());
    for connection in connections {
        let fd = connection.fd.as_raw_fd();
        let (level, name) = tcp::REPAIR_OPTION;
        options.push(SocketOption { fd, level, name, value: Repair::OffSilent as i32 });
        let level = libc::SOL_SOCKET;
        if connection.reuse {
            options.push(SocketOption { fd, level, name: libc::SO_REUSEADDR, value: 1 });
        }
        if let Some(value) = connection.peeks_at {
            options.push(SocketOption { fd, level, name: SO_PEEK_OFF, value });
        }
    }
    guard::Guard::of_sockets(&options).map_err(|e| {
        Problem::new("TCP connections", format!("nobody can look after them meanwhile: {e}"))
    })
}

impl Guard {
    fn add(&mut self, connection: &Connection) -> Result<(), Problem> {
        tcp::repair(connection.fd.as_fd(), Repair::On).map_err(|e| connection.failed(e))?;
        self.connections.push((Arc::clone(&connection.fd), connection.reuse));
        Ok(())
    }

    /// Leaves the connections in repair mode: their tasks are gone, and nobody is to be told.
    pub fn keep(mut self) {
        self.connections.clear();
        drop(self.keeper.take());
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        for (fd, reuse) in &self.connections {
            let fd = fd.as_fd();
            let off =
                tcp::repair(fd, Repair::OffSilent).and_then(|()| inet::restore_reuse(fd, *reuse));
            if let Err(e) = off {
                log::error!("a TCP connection cannot be taken out of repair mode: {e}");
            }
        }
    }
}

/// So many connections make it worth while to have another thread work on them.
const SHARE: usize = 32;

/// How many connections a thread gets, if all CPUs take part.
pub(super) fn share(connections: usize) -> usize {
    // Counting the CPUs takes longer than a few connections do.
    if connections <= SHARE {
        return SHARE;
    }
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    connections.div_ceil(workers).max(SHARE)
}

/// Does `work` on each pair of a share of the connections and something else, all at the same time.
pub(super) fn at_once<C, T, R, E>(
    pairs: impl Iterator<Item = (C, T)>,
    work: impl Fn(C, T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E>
where
    C: Send,
    T: Send,
    R: Send,
    E: Send,
{
    let mut pairs = pairs.map(|pair| Mutex::new(Some(pair)));
    let Some(first) = pairs.next() else { return Ok(Vec::new()) };
    let others: Vec<_> = pairs.collect();
    // Who takes a pair works on it; nobody else finds it any more.
    let take = |pair: &Mutex<Option<(C, T)>>| {
        let taken = pair.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.map(|(c, t)| work(c, t))
    };
    let take = &take;
    std::thread::scope(|scope| {
        let begin = |pair| (pair, Builder::new().spawn_scoped(scope, move || take(pair)));
        let running: Vec<_> = others.iter().map(begin).collect();
        let first = take(&first);
        let others = running.into_iter().map(|(pair, begun)| match begun.map(|t| t.join()) {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            // Without a further thread it takes longer, that is all.
            Err(_) => take(pair),
        });
        std::iter::once(first).chain(others).flatten().collect()
    })
}

/// Reads the options and queues of all connections. Their tasks must be frozen, and connections to the outside locked.
///
/// # Errors
/// A connection cannot be read. None is left in repair mode.
pub fn read(collector: &mut Collector) -> Result<(), Problem> {
    let mut connections = std::mem::take(&mut collector.sockets.connections);
    let result = read_all(collector, &mut connections);
    collector.sockets.connections = connections;
    result?;
    collector.sockets.agree();
    Ok(())
}

fn read_all(collector: &mut Collector, connections: &mut [Connection]) -> Result<(), Problem> {
    let share = share(connections.len());
    let options = collector.sockets.readers.finish()?;
    for (connection, options) in connections.iter_mut().zip(options) {
        connection.options = options.entry;
        connection.unusual = options.unusual;
        connection.reuse = connection.options.opts.reuseaddr == Some(true);
        connection.peeks_at = connection.unusual.iter().find_map(|option| {
            let is_it =
                option.level == libc::SOL_SOCKET as u32 && option.number == SO_PEEK_OFF as u32;
            is_it.then(|| option.value.first_chunk().map(|value| i32::from_ne_bytes(*value)))?
        });
    }
    let keeper = match connections.is_empty() {
        true => return Ok(()),
        false => keeper(connections)?,
    };
    let shares = connections.chunks_mut(share).map(|share| (share, ()));
    let guards = at_once(shares, |share: &mut [Connection], ()| {
        let mut scratch = Vec::new();
        let mut guard = Guard::default();
        for connection in share {
            guard.add(connection)?;
            connection.options.state = connection.read_send_side(&mut scratch)?;
        }
        Ok(guard)
    })?;
    let shares = connections.chunks_mut(share).zip(guards);
    at_once(shares, |share, guard| {
        let mut scratch = Vec::new();
        share.iter_mut().try_for_each(|c| c.read_receive_side(&mut scratch))?;
        drop(guard);
        Ok(())
    })?;
    drop(keeper);
    for connection in connections {
        let unusual = std::mem::take(&mut connection.unusual);
        if !unusual.is_empty() {
            collector.extra_of(connection.id).socket_options = unusual;
        }
        let entry = collector.entries.get_mut(connection.entry);
        let Some(socket) = entry.and_then(|e| e.isk.as_mut()) else { continue };
        let options = std::mem::take(&mut connection.options);
        // The peer may have closed since the survey.
        if options.state == CLOSE && socket.state != CLOSE {
            return Err(connection.problem("it has ended since", "try again"));
        }
        socket.state = options.state;
        socket.opts = options.opts;
        socket.ip_opts = options.ip_opts;
        socket.tcp_opts = options.tcp_opts;
    }
    Ok(())
}

/// Writes the streams of all connections.
pub(super) fn write(images: &ImageWriter, connections: &[Connection]) -> Result<(), ImageError> {
    let shares = connections.chunks(share(connections.len())).map(|share| (share, ()));
    at_once(shares, |share: &[Connection], ()| share.iter().try_for_each(|c| c.write(images)))
        .map(drop)
}

impl Survey {
    /// What an end in the tree has received, the other end has sent, even if it had not when its queue was read.
    pub(super) fn agree(&mut self) {
        let by_ends: HashMap<_, u32> = self
            .connections
            .iter()
            .map(|c| (ends(c.source, c.destination), c.stream.inq_seq))
            .chain(self.waiting.iter().filter_map(|waiting| {
                Some((ends(waiting.source, waiting.destination), waiting.received_to()?))
            }))
            .collect();
        for connection in &mut self.connections {
            let Some(received) = by_ends.get(&ends(connection.destination, connection.source))
            else {
                continue;
            };
            let stream = &mut connection.stream;
            // Sequence numbers wrap. A FIN that has come, too, means that nothing is unsent; one that has not is no data.
            let missing = stream.outq_seq.wrapping_sub(connection.fin).wrapping_sub(*received);
            let missing = if missing > u32::MAX / 2 { 0 } else { missing };
            stream.unsq_len = stream.unsq_len.map(|unsent| unsent.min(missing));
        }
    }

    /// The connections whose peer is not in the tree: own address, the peer's.
    #[must_use]
    pub fn outside(&self) -> Vec<(SocketAddr, SocketAddr)> {
        self.select(|_, inside| !inside)
    }

    /// The connections that have to be locked until a restore: those to peers outside, and for CRIU's restore, which sends
    /// before all sockets are there, those with something to send. And handshakes that are not done.
    #[must_use]
    pub fn to_lock(&self) -> Vec<(SocketAddr, SocketAddr)> {
        let mut all = self.select(|c, inside| !inside || c.stream.unsq_len != Some(0));
        all.extend(&self.half_open);
        all
    }

    fn select(&self, wanted: impl Fn(&Connection, bool) -> bool) -> Vec<(SocketAddr, SocketAddr)> {
        let all: HashSet<_> =
            self.connections.iter().map(|c| ends(c.source, c.destination)).collect();
        // One that waits to be accepted is locked even if its peer is in the tree: it is taken out of its queue and put back.
        let waiting = self.waiting.iter().map(|waiting| (waiting.source, waiting.destination));
        self.connections
            .iter()
            .filter(|c| wanted(c, all.contains(&ends(c.destination, c.source))))
            .map(|c| (c.source, c.destination))
            .chain(waiting)
            .collect()
    }

    /// Lets go of all connections, a share of them on each CPU: for those whose tasks are gone, it is the end.
    pub fn close(&mut self) {
        let mut rest = std::mem::take(&mut self.connections);
        let share = share(rest.len());
        let mut shares = Vec::new();
        while rest.len() > share {
            shares.push(rest.split_off(rest.len() - share));
        }
        shares.push(rest);
        let closed = at_once(shares.into_iter().map(|share| (share, ())), |share, ()| {
            drop(share);
            Ok::<(), std::convert::Infallible>(())
        });
        // Nothing in it can fail.
        drop(closed);
    }

    /// Puts all connections into repair mode so that they end silently with their tasks. To be called just before the tasks
    /// are killed; [`Guard::keep`] once they are.
    ///
    /// # Errors
    /// A connection cannot be put into repair mode; none is left in it.
    pub fn silence(&self) -> Result<Guard, Problem> {
        let mut guard = Guard::default();
        if self.connections.is_empty() {
            return Ok(guard);
        }
        guard.keeper = Some(keeper(&self.connections)?);
        let shares =
            self.connections.chunks(share(self.connections.len())).map(|share| (share, ()));
        let silenced = at_once(shares, |share: &[Connection], ()| {
            let mut guard = Guard::default();
            share.iter().try_for_each(|connection| guard.add(connection))?;
            Ok(guard)
        })?;
        for mut share in silenced {
            guard.connections.append(&mut share.connections);
        }
        Ok(guard)
    }
}
