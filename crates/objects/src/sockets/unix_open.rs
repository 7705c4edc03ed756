//! Restoring unix sockets.
//!
//! A pair is made by socketpair(2), or, if an end has a listening socket's address, by a connection to that listener, which
//! exists before. Whoever is asked for first makes what belongs to it; the other sockets wait in [`Restore`] until they are
//! asked for.

use super::options::{self, Making};
use super::unix::{ESTABLISHED, LISTEN, shown};
use super::{Restore, unix_path};
use crate::Problem;
use crate::files::open::Opener;
use rewake_image::kind;
use rewake_image::messages::{SkShutdown, UnixSkEntry};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::AsRawFd;

/// A unix socket of the image.
#[derive(Debug)]
pub(super) struct State {
    entry: Box<UnixSkEntry>,
    made: Option<OwnedFd>,
    /// It is whole: its queue filled, its options set.
    finished: bool,
}

/// What a socket's queue holds.
type Packets = Vec<Vec<u8>>;

fn problem(entry: &UnixSkEntry, reason: impl Into<String>) -> Problem {
    Problem::new(describe(entry), reason)
}

pub(super) fn describe(entry: &UnixSkEntry) -> String {
    if entry.name.is_empty() {
        format!("unix socket [{}]", entry.ino)
    } else {
        format!("unix socket {}", shown(&entry.name))
    }
}

fn kind_of(entry: &UnixSkEntry) -> SocketType {
    SocketType::from_raw(entry.r#type)
}

fn is_datagram(entry: &UnixSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_DGRAM
}

fn socket(entry: &UnixSkEntry) -> Result<OwnedFd, Problem> {
    rustix::net::socket_with(AddressFamily::UNIX, kind_of(entry), SocketFlags::CLOEXEC, None)
        .map_err(|e| problem(entry, format!("cannot be made: {e}")))
}

fn pair(entry: &UnixSkEntry) -> Result<(OwnedFd, OwnedFd), Problem> {
    rustix::net::socketpair(AddressFamily::UNIX, kind_of(entry), SocketFlags::CLOEXEC, None)
        .map_err(|e| problem(entry, format!("cannot be made: {e}")))
}

/// The description of a unix socket of the image.
///
/// # Errors
/// Its address is in use, or its state is one that cannot be restored.
pub fn open(opener: &mut Opener<'_>, entry: &UnixSkEntry) -> Result<OwnedFd, Problem> {
    load(opener)?;
    if entry.uflags & 1 != 0 {
        return Err(problem(
            entry,
            "it is connected to a socket outside the tree, which cannot be restored yet",
        ));
    }
    if !matches!(entry.r#type as i32, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET) {
        return Err(problem(entry, format!("the image has an impossible type {}", entry.r#type)));
    }
    let sockets = &mut opener.sockets;
    sockets.make(entry.ino)?;
    sockets.finish(entry.ino)?;
    let state = sockets.unix.get_mut(&entry.ino);
    // Others may still need it: to connect to, to send from.
    state
        .and_then(|state| state.made.as_ref())
        .ok_or_else(|| problem(entry, "it could not be made"))?
        .try_clone()
        .map_err(|e| problem(entry, e.to_string()))
}

fn load(opener: &mut Opener<'_>) -> Result<(), Problem> {
    if opener.sockets.unix_loaded {
        return Ok(());
    }
    let queues = opener
        .images
        .read_with_payload(kind::SK_QUEUES, ())
        .map_err(|e| Problem::new("sk-queues.img", e.to_string()))?;
    for (packet, data) in queues {
        opener.sockets.packets.entry(packet.id_for).or_default().push((packet, data));
    }
    for entry in opener.files.values().filter_map(|file| file.usk.as_deref()) {
        let state = State { entry: Box::new(entry.clone()), made: None, finished: false };
        opener.sockets.unix.insert(entry.ino, state);
    }
    opener.sockets.unix_loaded = true;
    Ok(())
}

impl Restore {
    fn entry(&self, inode: u32) -> Option<&UnixSkEntry> {
        self.unix.get(&inode).map(|state| &*state.entry)
    }

    fn is_made(&self, inode: u32) -> bool {
        self.unix.get(&inode).is_some_and(|state| state.made.is_some())
    }

    fn put(&mut self, inode: u32, fd: OwnedFd) {
        if let Some(state) = self.unix.get_mut(&inode) {
            state.made = Some(fd);
        }
    }

    /// The peer of a socket, if that is connected to it in turn.
    fn mutual(&self, entry: &UnixSkEntry) -> Option<&UnixSkEntry> {
        self.entry(entry.peer).filter(|peer| peer.peer == entry.ino && entry.peer != 0)
    }

    fn packets(&mut self, entry: &UnixSkEntry) -> Result<Packets, Problem> {
        let packets = self.packets.remove(&entry.id).unwrap_or_default();
        if packets.iter().any(|(packet, _)| !packet.scm.is_empty()) {
            return Err(problem(
                entry,
                "descriptors are in flight in it (SCM_RIGHTS), which cannot be restored yet",
            ));
        }
        Ok(packets.into_iter().map(|(_, data)| data).collect())
    }

    /// Makes the socket and those that are made with it.
    fn make(&mut self, inode: u32) -> Result<(), Problem> {
        let Some(entry) = self.entry(inode).cloned() else { return Ok(()) };
        if self.is_made(inode) {
            return Ok(());
        }
        if entry.state == u32::from(LISTEN) {
            return self.make_listening(&entry);
        }
        if is_datagram(&entry) {
            return self.make_datagram(&entry);
        }
        if let Some(peer) = self.mutual(&entry).cloned() {
            return self.make_stream_pair(&entry, &peer);
        }
        if entry.state == u32::from(ESTABLISHED) || entry.peer != 0 {
            // Its peer is closed, or is one that the dump has dropped.
            let (fd, other) = pair(&entry)?;
            let packets = self.packets(&entry)?;
            make_room(&other, &entry, &packets)?;
            fill(&entry, other.as_fd(), &packets)?;
            drop(other);
            self.put(inode, fd);
            return Ok(());
        }
        let fd = socket(&entry)?;
        unix_path::bind(&entry, fd.as_fd(), |_| Ok(()))?;
        self.put(inode, fd);
        Ok(())
    }

    /// Makes a listening socket and, while nobody else can have it, all connections that were accepted from it.
    fn make_listening(&mut self, entry: &UnixSkEntry) -> Result<(), Problem> {
        let fd = socket(entry)?;
        let accepted: Vec<(UnixSkEntry, UnixSkEntry)> = self
            .unix
            .values()
            .filter(|state| state.made.is_none())
            .filter(|state| state.entry.name == entry.name && state.entry.r#type == entry.r#type)
            .filter_map(|state| Some((*state.entry.clone(), self.mutual(&state.entry)?.clone())))
            .collect();
        unix_path::bind(entry, fd.as_fd(), |address| {
            // With its final backlog once the connections are there.
            let backlog = entry.backlog as i32;
            let first = if accepted.is_empty() { backlog } else { backlog.max(1) };
            rustix::net::listen(&fd, first)
                .map_err(|e| problem(entry, format!("cannot listen: {e}")))?;
            for (server, client) in &accepted {
                if self.is_made(server.ino) || self.is_made(client.ino) {
                    continue;
                }
                let (s, c) = connect_and_accept(&fd, address, server, client)?;
                self.put(server.ino, s);
                self.put(client.ino, c);
            }
            if first != backlog {
                rustix::net::listen(&fd, backlog)
                    .map_err(|e| problem(entry, format!("cannot listen: {e}")))?;
            }
            Ok(())
        })?;
        self.put(entry.ino, fd);
        Ok(())
    }

    /// Makes a connected pair of streams or sequential packets.
    fn make_stream_pair(&mut self, one: &UnixSkEntry, other: &UnixSkEntry) -> Result<(), Problem> {
        // An accepted socket has the address of its listener.
        let listener = self.unix.values().map(|state| &*state.entry).find(|listener| {
            listener.state == u32::from(LISTEN)
                && !listener.name.is_empty()
                && (listener.name == one.name || listener.name == other.name)
        });
        if let Some(listener) = listener.map(|l| l.ino) {
            self.make(listener)?;
        }
        if self.is_made(one.ino) {
            return Ok(());
        }
        let server = if one.name.is_empty() { other } else { one };
        if server.name.is_empty() {
            let (a, b) = pair(one)?;
            self.put(one.ino, a);
            self.put(other.ino, b);
            return Ok(());
        }
        // Its listener is gone: one for a moment.
        let client = if server.ino == one.ino { other } else { one };
        let listener = socket(server)?;
        unix_path::bind(server, listener.as_fd(), |address| {
            rustix::net::listen(&listener, 1)
                .map_err(|e| problem(server, format!("cannot listen: {e}")))?;
            let (s, c) = connect_and_accept(&listener, address, server, client)?;
            self.put(server.ino, s);
            self.put(client.ino, c);
            Ok(())
        })
    }

    fn make_datagram(&mut self, entry: &UnixSkEntry) -> Result<(), Problem> {
        if let Some(peer) = self.mutual(entry).cloned() {
            let (a, b) = if peer.ino == entry.ino {
                // Connected to itself.
                let fd = socket(entry)?;
                unix_path::bind(entry, fd.as_fd(), |address| {
                    rustix::net::connect(&fd, address)
                        .map_err(|e| problem(entry, format!("cannot be connected: {e}")))
                })?;
                self.put(entry.ino, fd);
                return Ok(());
            } else {
                pair(entry)?
            };
            unix_path::bind(entry, a.as_fd(), |_| Ok(()))?;
            unix_path::bind(&peer, b.as_fd(), |_| Ok(()))?;
            self.put(entry.ino, a);
            self.put(peer.ino, b);
            return Ok(());
        }
        if entry.peer == 0 && entry.state == u32::from(ESTABLISHED) && entry.name.is_empty() {
            // Its peer is closed (with an address, it might just be one that others are connected to). What it has received
            // is filled in from there.
            let (fd, other) = pair(entry)?;
            let packets = self.packets(entry)?;
            make_room(&other, entry, &packets)?;
            fill(entry, other.as_fd(), &packets)?;
            self.put(entry.ino, fd);
            return Ok(());
        }
        // Its queue is filled before it is connected, because then only its peer may send.
        let fd = socket(entry)?;
        let packets = self.packets(entry)?;
        unix_path::bind(entry, fd.as_fd(), |address| send_all(entry, address, &packets))?;
        self.put(entry.ino, fd);
        if entry.peer == 0 {
            return Ok(());
        }
        let peer = self.entry(entry.peer).cloned().ok_or_else(|| {
            problem(entry, "it is connected to a socket that the image does not have")
        })?;
        self.make(peer.ino)?;
        if peer.name.is_empty() {
            return Err(problem(
                entry,
                "it is connected to a socket without an address that is not connected to it, which cannot be restored",
            ));
        }
        if peer.deleted == Some(true) {
            return Err(problem(
                entry,
                "it is connected to a socket whose file is deleted, which cannot be restored yet",
            ));
        }
        let fd = self.unix.get(&entry.ino).and_then(|state| state.made.as_ref());
        let Some(fd) = fd.map(AsFd::as_fd) else { return Ok(()) };
        unix_path::at(&peer, |address| {
            rustix::net::connect(fd, address).map_err(|e| {
                problem(entry, format!("cannot be connected to {}: {e}", shown(&peer.name)))
            })
        })
    }

    /// Fills the queues of a socket and of its peer, sets options, shuts down.
    fn finish(&mut self, inode: u32) -> Result<(), Problem> {
        let Some(entry) = self.entry(inode).cloned() else { return Ok(()) };
        if self.unix.get(&inode).is_some_and(|state| state.finished) {
            return Ok(());
        }
        let peer = self.mutual(&entry).cloned();
        let mut whole = vec![entry.clone()];
        whole.extend(peer.clone().filter(|peer| peer.ino != inode));
        if let Some(peer) = &peer {
            for (to, from) in [(&entry, peer), (peer, &entry)] {
                let packets = self.packets(to)?;
                let sender = self.unix.get(&from.ino).and_then(|state| state.made.as_ref());
                let Some(sender) = sender else { continue };
                make_room(sender, to, &packets)?;
                fill(to, sender.as_fd(), &packets)?;
            }
        }
        for entry in &whole {
            let Some(state) = self.unix.get_mut(&entry.ino) else { continue };
            state.finished = true;
            let Some(fd) = &state.made else { continue };
            let what = describe(entry);
            let making = Making { fd: fd.as_fd(), object: &what };
            options::apply_before_bind(making, &entry.opts, false)?;
            options::apply(making, &entry.opts)?;
        }
        for entry in &whole {
            if let Some(fd) = self.unix.get(&entry.ino).and_then(|state| state.made.as_ref()) {
                shut_down(fd.as_fd(), entry)?;
            }
        }
        Ok(())
    }
}

fn make_room(sender: &OwnedFd, to: &UnixSkEntry, packets: &[Vec<u8>]) -> Result<(), Problem> {
    options::make_room(Making { fd: sender.as_fd(), object: &describe(to) }, 0, total(packets))
}

fn total(packets: &[Vec<u8>]) -> usize {
    // An empty packet occupies memory too.
    packets.iter().map(|p| p.len() + 512).sum()
}

/// Sends what a queue held, from the other end.
fn fill(to: &UnixSkEntry, from: BorrowedFd<'_>, packets: &[Vec<u8>]) -> Result<(), Problem> {
    let failed = |e: Errno| problem(to, format!("its receive queue cannot be filled: {e}"));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    for packet in packets {
        let mut rest = packet.as_slice();
        loop {
            let done = rustix::net::send(from, rest, flags).map_err(failed)?;
            rest = &rest[done..];
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
}

/// Sends what a queue held to a socket that is connected to nobody, from a passing socket.
fn send_all(
    to: &UnixSkEntry,
    address: &SocketAddrUnix,
    packets: &[Vec<u8>],
) -> Result<(), Problem> {
    if packets.is_empty() {
        return Ok(());
    }
    let from = socket(to)?;
    make_room(&from, to, packets)?;
    for packet in packets {
        unix_path::send_to(from.as_fd(), address, packet)
            .map_err(|e| problem(to, format!("its receive queue cannot be filled: {e}")))?;
    }
    Ok(())
}

/// Both ends of a new connection to a listening socket: the accepted one first.
fn connect_and_accept(
    listener: &OwnedFd,
    address: &SocketAddrUnix,
    server: &UnixSkEntry,
    client: &UnixSkEntry,
) -> Result<(OwnedFd, OwnedFd), Problem> {
    let failed = |e: Errno| problem(server, format!("its connection cannot be made: {e}"));
    let calling = socket(client)?;
    if !client.name.is_empty() && client.name != server.name {
        unix_path::bind(client, calling.as_fd(), |_| Ok(()))?;
    }
    rustix::net::connect(&calling, address).map_err(failed)?;
    loop {
        let accepted = rustix::net::accept_with(listener, SocketFlags::CLOEXEC).map_err(failed)?;
        // The address is there for everyone: a stranger may have been faster. It will call again.
        let caller = rustix::net::sockopt::socket_peercred(&accepted).map_err(failed)?;
        if caller.pid == rustix::process::getpid() {
            return Ok((accepted, calling));
        }
        log::warn!(
            "{}: a connection from outside came while it was restored, and was closed (fd {})",
            describe(server),
            accepted.as_raw_fd()
        );
    }
}

fn shut_down(fd: BorrowedFd<'_>, entry: &UnixSkEntry) -> Result<(), Problem> {
    let Some(directions) = entry.shutdown else { return Ok(()) };
    let how = match SkShutdown::try_from(directions) {
        Ok(SkShutdown::None) => return Ok(()),
        Ok(SkShutdown::Read) => Shutdown::Read,
        Ok(SkShutdown::Write) => Shutdown::Write,
        Ok(SkShutdown::Both) => Shutdown::Both,
        Err(_) => return Err(problem(entry, "the image has no valid shutdown state")),
    };
    rustix::net::shutdown(fd, how).map_err(|e| problem(entry, format!("cannot be shut down: {e}")))
}
