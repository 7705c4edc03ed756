//! Connections that a listening TCP socket has not accepted yet.
//!
//! # How they are saved
//! Nothing reads what they have received but who accepts them. So the dump does, while the tree is frozen and the connections
//! are locked, and puts them back at once ([`put_back`]): whatever becomes of the dump and of the tree, the listening socket
//! has them again, in their order.

use super::handshake::{Queued, enqueue, plain};
use super::inet::{self, CLOSE_WAIT, ESTABLISHED};
use super::options::Making;
use super::stream::{Connection, fin_received};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use rewake_image::messages::{FdTypes, FileEntry, InetSkEntry, TcpOptsEntry, TcpStreamEntry};
use rewake_image::{ImageError, ImageWriter, kind};
use rewake_netlink::{destroy, diag};
use rewake_sys::sockets::option_int;
use rewake_sys::{Errno, tcp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::SocketFlags;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// A listening socket of the tree.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    object: String,
    id: u32,
    entry: InetSkEntry,
}

/// Notes a listening socket, whose queue is to be saved.
pub(super) fn note(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &InetSkEntry,
) -> Result<(), Problem> {
    let options = &collector.options;
    if !options.tcp_established || options.tcp_close || options.skip_in_flight {
        return Ok(());
    }
    let known = collector.sockets.tcp(entry.family, entry.ino);
    let known =
        known.map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?;
    if obstacle(view.as_fd(), known.as_deref()).is_some() {
        // Nobody waits there now; whoever comes meanwhile stays there.
        return Ok(());
    }
    let fd = view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?;
    let listener = Listener {
        fd,
        object: view.object(),
        id: entry.id,
        entry: InetSkEntry { ..entry.clone() },
    };
    collector.sockets.listeners.push(listener);
    Ok(())
}

/// Refuses a listening socket with connections that wait to be accepted, unless they can be saved.
///
/// # Errors
/// They cannot be, or no option says so.
pub(super) fn refuse(
    collector: &Collector,
    view: &View<'_>,
    entry: &InetSkEntry,
    known: Option<&diag::Tcp>,
    waiting: u32,
) -> Result<(), Problem> {
    let options = &collector.options;
    let wait = if waiting == 1 { "connection waits" } else { "connections wait" };
    let what = format!("{}: {waiting} {wait} to be accepted", inet::describe(entry));
    let skip = "--skip-in-flight drops them: their clients have to connect again";
    if !options.tcp_established || options.tcp_close {
        let reason = format!("{what}, which cannot be saved without an option");
        return Err(view.problem(reason).remedy(format!("--tcp-established saves them; {skip}")));
    }
    match obstacle(view.as_fd(), known) {
        Some(why) => {
            Err(view.problem(format!("{what}, which cannot be saved: {why}")).remedy(skip))
        }
        None => Ok(()),
    }
}

/// Why what waits at a listening socket cannot be put back there.
fn obstacle(fd: BorrowedFd<'_>, known: Option<&diag::Tcp>) -> Option<&'static str> {
    let interface = known.map_or(0, |known| known.interface);
    // Handshakes of our own come from the loopback, for addresses of this host.
    if interface > 1 {
        return Some("the socket is bound to an interface (SO_BINDTODEVICE)");
    }
    let transparent = option_int(fd, libc::SOL_IP, libc::IP_TRANSPARENT).is_ok_and(|on| on != 0);
    transparent.then_some("the socket takes connections to foreign addresses (IP_TRANSPARENT)")
}

/// A connection that was taken out of a queue.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Its place among the listening sockets.
    listener: usize,
    /// Until it is read.
    connection: Option<Connection>,
    id: u32,
    inode: u32,
    /// Where its entry is in [`Collector::entries`].
    entry: usize,
    state: u32,
    /// The own end.
    pub(super) source: SocketAddr,
    /// The peer.
    pub(super) destination: SocketAddr,
    stream: Option<TcpStreamEntry>,
    received: Vec<u8>,
}

impl Waiting {
    fn read(&mut self, scratch: &mut Vec<u8>) -> Result<(), Problem> {
        let Some(connection) = self.connection.take() else { return Ok(()) };
        let (state, stream, received) = connection.read_and_end(scratch)?;
        (self.state, self.stream, self.received) = (state, Some(stream), received);
        Ok(())
    }

    /// Up to which number it has received, once that is known.
    pub(super) fn received_to(&self) -> Option<u32> {
        self.stream.as_ref().map(|stream| stream.inq_seq)
    }

    /// Writes `tcp-stream-HEX.img`.
    pub(super) fn write(&self, images: &ImageWriter) -> Result<(), ImageError> {
        let Some(stream) = &self.stream else { return Ok(()) };
        let mut file = images.stream(kind::TCP_STREAM, self.inode);
        file.push(stream)?;
        file.payload(&self.received)?;
        file.finish()
    }

    fn queued<'a>(&'a self, listener: &'a Listener) -> Option<Queued<'a>> {
        let ended = fin_received(self.state);
        Some(Queued {
            listener: listener.fd.as_fd(),
            object: &listener.object,
            source: self.source,
            destination: self.destination,
            stream: self.stream.as_ref()?,
            received: &self.received,
            ended,
            closes: ended,
            timestamps: true,
        })
    }
}

/// Takes out of their queues all connections that wait, of a frozen tree that nothing else stands in the way of saving.
/// [`put_back`] has to follow, whatever happens.
///
/// # Errors
/// One cannot be taken; what was taken before is still to be put back.
pub fn take(collector: &mut Collector) -> Result<(), Problem> {
    let listeners = std::mem::take(&mut collector.sockets.listeners);
    let result = listeners.iter().enumerate().try_for_each(|(at, listener)| {
        while is_ready(listener.fd.as_fd()) {
            take_one(collector, at, listener)?;
        }
        Ok(())
    });
    let half_open = half_open(&listeners);
    collector.sockets.listeners = listeners;
    result?;
    collector.sockets.half_open = half_open?;
    Ok(())
}

/// Handshakes with our listening sockets that are not done: the own end, the peer's. Nothing of them is saved: the peer tries
/// again, and must not be told meanwhile that there is nobody.
fn half_open(listeners: &[Listener]) -> Result<Vec<(SocketAddr, SocketAddr)>, Problem> {
    if listeners.is_empty() {
        return Ok(Vec::new());
    }
    let failed = |e| Problem::new("TCP handshakes", format!("sock_diag: {e}"));
    let mut socket = diag::open().map_err(failed)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        if listeners.iter().any(|listener| listener.entry.family == family as u32) {
            found.extend(destroy::half_open(&mut socket, family as u8).map_err(failed)?);
        }
    }
    let is_ours = |(ip, port): (IpAddr, u16)| {
        listeners
            .iter()
            .filter_map(|listener| inet::ends_of(&listener.entry))
            .any(|(own, _)| own.1 == port && (own.0.is_unspecified() || own.0 == ip))
    };
    found.retain(|(own, _)| is_ours(*own));
    Ok(found.into_iter().map(|(own, peer)| (own.into(), peer.into())).collect())
}

fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut wanted, Some(&at_once)).is_ok() && wanted[0].revents().contains(PollFlags::IN)
}

fn take_one(collector: &mut Collector, at: usize, listener: &Listener) -> Result<(), Problem> {
    let failed = |e: Errno| {
        Problem::new(&*listener.object, format!("a connection that waits cannot be taken: {e}"))
    };
    // Nobody of the tree is faster; somebody outside who shares the socket may be, and then this waits for the next one.
    let fd = rustix::net::accept_with(&listener.fd, SocketFlags::CLOEXEC).map_err(failed)?;
    let state = u32::from(tcp::info(fd.as_fd()).map_err(|e| failed(e.errno))?.state);
    let address = |any: rustix::net::SocketAddrAny| SocketAddr::try_from(any).ok();
    let source = rustix::net::getsockname(&fd).map_err(failed)?;
    let peer = rustix::net::getpeername(&fd);
    let (Some(source), Ok(Some(Some(destination)))) =
        (address(source), peer.map(|p| p.map(address)))
    else {
        log::debug!("{}: a connection has ended before it was accepted", listener.object);
        return Ok(());
    };
    if !matches!(state, ESTABLISHED | CLOSE_WAIT) {
        log::debug!("{}: {destination} has reset its connection in the queue", listener.object);
        return Ok(());
    }
    let family = listener.entry.family;
    let mut entry = InetSkEntry {
        id: collector.new_id(),
        ino: rustix::fs::fstat(&fd).map_err(failed)?.st_ino as u32,
        state,
        backlog: 0,
        src_port: source.port().into(),
        dst_port: destination.port().into(),
        src_addr: inet::words(source.ip(), family as i32),
        dst_addr: inet::words(destination.ip(), family as i32),
        tcp_opts: Some(TcpOptsEntry::default()),
        ip_opts: None,
        ..listener.entry.clone()
    };
    let object = format!("{}: a connection that waits there", listener.object);
    inet::read_options(Making { fd: fd.as_fd(), object: &object }.into(), &mut entry)?;
    let place = collector.entries.len();
    let connection = Connection::new(fd, object, place, &entry, source, destination);
    collector.sockets.waiting.push(Waiting {
        listener: at,
        connection: Some(connection),
        id: entry.id,
        inode: entry.ino,
        entry: place,
        state,
        source,
        destination,
        stream: None,
        received: Vec::new(),
    });
    collector.push(FileEntry {
        r#type: FdTypes::Inetsk as i32,
        id: entry.id,
        isk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok(())
}

/// Reads what [`take`] has taken and puts it back. Connections to peers outside should be locked, and the send queues of those
/// in the tree be read.
///
/// # Errors
/// One cannot be read or put back, and is lost.
pub fn put_back(collector: &mut Collector) -> Result<(), Problem> {
    if collector.sockets.waiting.is_empty() {
        return Ok(());
    }
    let mut waiting = std::mem::take(&mut collector.sockets.waiting);
    let mut scratch = Vec::new();
    let mut result = Ok(());
    for one in &mut waiting {
        // The others are still to be put back.
        if let Err(problem) = one.read(&mut scratch) {
            log::error!("{problem}");
            result = Err(problem);
        }
    }
    let listeners = &collector.sockets.listeners;
    let queued: Vec<Queued<'_>> =
        waiting.iter().filter_map(|one| one.queued(listeners.get(one.listener)?)).collect();
    let back = enqueue(&queued);
    drop(queued);
    let boot = boot();
    for one in &waiting {
        if let Some(socket) = collector.entries.get_mut(one.entry).and_then(|e| e.isk.as_mut()) {
            socket.state = one.state;
        }
        let listener = collector.sockets.listeners.get(one.listener).map_or(0, |l| l.id);
        let extra = collector.extra_of(listener);
        extra.accept_queue.push(one.id);
        extra.boot.clone_from(&boot);
    }
    collector.sockets.waiting = waiting;
    collector.sockets.agree();
    result.and(back)
}

/// By what this machine's boot is known.
fn boot() -> Option<Vec<u8>> {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim_ascii().to_vec())
}

/// What a connection was saved as, until it is put into its queue.
#[derive(Debug)]
pub(super) struct Saved {
    listener: u32,
    object: String,
    source: SocketAddr,
    destination: SocketAddr,
    stream: TcpStreamEntry,
    received: Vec<u8>,
    ended: bool,
    timestamps: bool,
}

/// The file ids of all connections that wait to be accepted.
pub(super) fn ids(opener: &Opener<'_>) -> HashSet<u32> {
    opener.extra.values().flat_map(|extra| &extra.accept_queue).copied().collect()
}

/// Reads the connections that wait to be accepted from the images.
///
/// # Errors
/// The images contradict themselves.
pub(super) fn load(opener: &mut Opener<'_>) -> Result<(), Problem> {
    if opener.options.tcp_close {
        return Ok(());
    }
    let boot = boot();
    let mut saved = Vec::new();
    let mut listeners: Vec<_> =
        opener.extra.values().filter(|extra| !extra.accept_queue.is_empty()).collect();
    listeners.sort_unstable_by_key(|extra| extra.id);
    for extra in listeners {
        for id in &extra.accept_queue {
            let absent = || Problem::new(format!("file id {id}"), "its entry is missing");
            let file = opener.files.get(id).ok_or_else(absent)?;
            let entry = file.isk.as_deref().ok_or_else(absent)?;
            let object = inet::describe(entry);
            let damaged = |what: &str| Problem::new(object.clone(), what.to_owned());
            if !opener.options.tcp_established {
                return Err(damaged("it cannot be restored without an option")
                    .remedy("--tcp-established restores it; --tcp-close has it closed"));
            }
            let (own, peer) =
                inet::ends_of(entry).ok_or_else(|| damaged("the image has no valid address"))?;
            let image = opener.images.read_with_payload(kind::TCP_STREAM, entry.ino);
            let image = image.map_err(|e| damaged(&e.to_string()))?;
            let name = format!("tcp-stream-{:x}.img", entry.ino);
            let Some((stream, data)) = image.first() else {
                return Err(damaged(&format!("{name} is missing")));
            };
            let received = data
                .get(..stream.inq_len as usize)
                .ok_or_else(|| damaged(&format!("{name} contradicts itself")))?;
            saved.push(Saved {
                listener: extra.id,
                object: object.clone(),
                source: own.into(),
                destination: peer.into(),
                stream: stream.clone(),
                received: received.to_vec(),
                ended: fin_received(entry.state),
                timestamps: boot.is_some() && boot == extra.boot,
            });
        }
    }
    opener.sockets.waiting = saved;
    Ok(())
}

/// Puts the connections of the images into the queues of their listening sockets. To be called when all other connections are
/// made, and the network lock is still there.
///
/// # Errors
/// One cannot be put there.
pub(super) fn fill(opener: &Opener<'_>, saved: &[Saved]) -> Result<(), Problem> {
    let mut queued = Vec::with_capacity(saved.len());
    for one in saved {
        queued.push(Queued {
            listener: opener.opened(one.listener)?,
            object: &one.object,
            source: one.source,
            destination: one.destination,
            stream: &one.stream,
            received: &one.received,
            // A peer in the tree closes again by itself.
            ended: one.ended,
            closes: one.ended && !opener.sockets.ends.contains(&plain(one.destination, one.source)),
            timestamps: one.timestamps,
        });
    }
    enqueue(&queued)
}
