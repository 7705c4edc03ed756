//! Connections to listening unix sockets that are not accepted yet and have sent something already, or were closed again.
//!
//! # How they are saved
//! What they have sent is in the queue of a socket that nobody has a descriptor for before accept(2), and no call puts an
//! accepted one back. So they are accepted by the dump itself, as the last thing that is done before the tree dies
//! ([`take`]): a dump whose tree is to live on refuses them. If such a dump fails afterwards, these connections end, as
//! those of a server that is restarted.
//!
//! # How they are restored
//! Their clients connect, send it all again ([`Line`]), and close again if they had.

use super::unix::credential_words;
use super::unix_open::{State, as_noted, describe, problem, socket};
use super::{Restore, queue, unix_path};
use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::{RewakeUnixConnectionEntry, UnixSkEntry};
use rewake_netlink::diag;
use rewake_sys::message::{connect_as, peer_credentials};
use rewake_sys::sockets::set_option_int;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::SocketFlags;
use std::collections::{HashMap, HashSet};

/// A listening socket of the tree at which somebody waits.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    object: String,
    pid: i32,
    id: u32,
    inode: u32,
    kind: i32,
}

/// Listening sockets at which somebody waits, and those of them whose connections have to be accepted.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    listeners: Vec<Listener>,
    wanted: HashSet<u32>,
    /// The accepted connections, until the tree is gone.
    accepted: Vec<OwnedFd>,
}

impl Waiting {
    /// Notes a listening socket with file id `id`.
    pub(super) fn note(
        &mut self,
        view: &View<'_>,
        (pid, id, kind): (i32, u32, i32),
    ) -> Result<(), Problem> {
        let fd = view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?;
        let inode = view.stat.st_ino as u32;
        self.listeners.push(Listener { fd, object: view.object(), pid, id, inode, kind });
        Ok(())
    }

    /// The connections of the listening socket with this inode number have to be accepted.
    pub(super) fn want(&mut self, listener: u32) {
        self.wanted.insert(listener);
    }

    /// Does any connection have to be accepted?
    pub(super) fn any(&self) -> bool {
        self.listeners.iter().any(|listener| self.wanted.contains(&listener.inode))
    }
}

/// Accepts the connections that have sent something, of a frozen tree that is going to die and that nothing else stands in
/// the way of saving, and reads what they have sent. Descriptors among that are still to be collected. Returns what cannot
/// be read, with the process.
pub fn take(collector: &mut Collector) -> Vec<(i32, Problem)> {
    let waiting = std::mem::take(&mut collector.sockets.unix_waiting);
    let Waiting { listeners, wanted, mut accepted } = waiting;
    let mut problems = Vec::new();
    for listener in listeners.iter().filter(|listener| wanted.contains(&listener.inode)) {
        match take_from(collector, listener) {
            Ok(taken) => accepted.extend(taken),
            Err(problem) => problems.push((listener.pid, problem)),
        }
    }
    collector.sockets.unix_waiting.accepted = accepted;
    problems
}

fn take_from(collector: &mut Collector, listener: &Listener) -> Result<Vec<OwnedFd>, Problem> {
    let failed = |e: &dyn std::fmt::Display| {
        let reason = format!("a connection that waits to be accepted cannot be taken: {e}");
        Problem::new(&*listener.object, reason)
    };
    let mut taken = Vec::new();
    while is_ready(listener.fd.as_fd()) {
        let fd = rustix::net::accept_with(&listener.fd, SocketFlags::CLOEXEC);
        taken.push(fd.map_err(|e| failed(&e))?);
    }
    log::debug!("{}: {} connections that wait are taken", listener.object, taken.len());
    // Whose they are, now that they are sockets of their own.
    let table = collector.sockets.diag().and_then(diag::unix).map_err(|e| failed(&e))?;
    let mut entries = Vec::with_capacity(taken.len());
    for fd in &taken {
        let inode = rustix::fs::fstat(fd).map_err(|e| failed(&e))?.st_ino as u32;
        let client = table.get(&inode).and_then(|socket| socket.peer).unwrap_or(0);
        if client != 0 && !collector.sockets.unix.contains_key(&client) {
            log::warn!(
                "{}: a client outside the tree that waits to be accepted is dropped",
                listener.object
            );
            continue;
        }
        // Senders are noted before anybody asks for them; the program may ask once it has accepted the connection.
        set_option_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1)
            .map_err(|e| failed(&e))?;
        let object = format!("{}: a connection that waits to be accepted", listener.object);
        let source = queue::Source {
            fd: fd.try_clone().map_err(|e| failed(&e))?,
            object,
            kind: listener.kind,
        };
        let contents = queue::read(&source)?;
        let mut entry = RewakeUnixConnectionEntry { client, ..Default::default() };
        if client == 0 {
            let credentials = peer_credentials(fd.as_fd()).map_err(|e| failed(&e))?;
            entry.credentials = credential_words(credentials);
            entry.name = Some(unix_path::name_of_peer(fd.as_fd())).filter(|name| !name.is_empty());
        }
        if !contents.is_empty() {
            let id = collector.new_id();
            entry.queue = Some(id);
            collector.sockets.keep(listener.pid, id, &source, contents);
        }
        entries.push(entry);
    }
    let unix = collector.extra_of(listener.id).unix.get_or_insert_default();
    unix.waiting = entries.iter().map(|entry| entry.client).filter(|ino| *ino != 0).collect();
    unix.connections = entries;
    Ok(taken)
}

fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut wanted, Some(&at_once)).is_ok() && wanted[0].revents().contains(PollFlags::IN)
}

/// Who has sent what a connection that waits has received.
#[derive(Debug)]
pub(super) enum Client {
    /// The socket with this inode number.
    Living(u32),
    /// One that is closed again once it has sent it.
    Closed(OwnedFd),
}

/// Connections that wait in restored sockets, by the ids of their queues: who sends, and the listening socket.
pub(super) type Line = HashMap<u32, (Client, Box<UnixSkEntry>)>;

impl Restore {
    /// Has all connect to a listening socket that have waited there, in their order.
    pub(super) fn line_up(
        &mut self,
        listener: &UnixSkEntry,
        connections: &[RewakeUnixConnectionEntry],
    ) -> Result<(), Problem> {
        for connection in connections {
            let client = connection.client;
            if client == 0 {
                self.wait_closed(listener, connection)?;
                continue;
            }
            let waits = |s: &State| s.entry.peer == listener.ino && s.made.is_none();
            if self.unix.get(&client).is_some_and(waits) {
                self.wait_in_line(listener, client)?;
                if let Some(queue) = connection.queue {
                    let sender = (Client::Living(client), Box::new(listener.clone()));
                    self.line.insert(queue, sender);
                }
            }
        }
        Ok(())
    }

    /// Has a client that was closed again connect to a listening socket.
    fn wait_closed(
        &mut self,
        listener: &UnixSkEntry,
        entry: &RewakeUnixConnectionEntry,
    ) -> Result<(), Problem> {
        let fd = socket(listener)?;
        let name = entry.name.as_deref().unwrap_or_default();
        if let Err(e) = self.places.bind_apart(name, fd.as_fd()) {
            log::warn!(
                "{}: a client that is closed has no address any more: {e}",
                describe(listener)
            );
        }
        let made = self.unix.get(&listener.ino).and_then(|state| state.made.as_ref());
        let Some(listening) = made else { return Ok(()) };
        let reach = unix_path::Reach::to(listening.as_fd(), &listener.name)?;
        as_noted(&self.pids, &entry.credentials, |caller| {
            connect_as(caller, fd.as_fd(), reach.address())
        })
        .map_err(|e| {
            problem(listener, format!("a client that is closed cannot be connected: {e}"))
        })?;
        if let Some(queue) = entry.queue {
            self.line.insert(queue, (Client::Closed(fd), Box::new(listener.clone())));
        }
        Ok(())
    }
}

impl Collector {
    /// Must connections be taken that have sent something before they were accepted ([`take`])?
    #[must_use]
    pub fn has_unix_waiting(&self) -> bool {
        self.sockets.unix_waiting.any()
    }
}
