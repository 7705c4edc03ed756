//! Dumping unix sockets: unix(7). Who is connected to whom, and the addresses, tells unix_diag.

use super::{SOCKETS_NETNS, holder, options, queue, unix_path};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::problem::text;
use rewake_image::messages::{
    FdTypes, FileEntry, RewakePacketEntry, RewakeUnixEntry, SkPacketEntry, UnixSkEntry,
};
use rewake_inject::guard::Guard;
use rewake_netlink::diag;
use rewake_sys::message::{Credentials, peer_credentials};
use rustix::fd::OwnedFd;
use std::collections::{HashMap, HashSet};

/// `TCP_ESTABLISHED`
pub const ESTABLISHED: u8 = 1;
/// `TCP_CLOSE`
pub const CLOSE: u8 = 7;
/// `TCP_LISTEN`
pub const LISTEN: u8 = 10;
/// In [`UnixSkEntry::uflags`]: a socket outside the tree, of which only the address is known.
pub const EXTERNAL: u32 = 1;

/// The remedy for what only a dump that ends the program can save.
const TAKEN_ONLY: &str = "leave out --leave-running or --leave-stopped; or try again once it is accepted; --skip-in-flight drops the connection";

/// Which unix sockets outside the tree may be left out: `--ext-unix-sk`, `--external unix[INODE]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outside {
    /// All that have an address.
    pub all: bool,
    /// Those with these inode numbers, or whose peer in the tree has them.
    pub inodes: HashSet<u32>,
}

/// A unix socket of the tree.
#[derive(Debug)]
pub(crate) struct Found {
    pid: i32,
    object: String,
    /// `SOCK_*`
    kind: i32,
    /// The inode number of the peer it needs.
    peer: u32,
    /// Of a listening socket: the inode numbers of its clients that wait for accept(2).
    waiting: Vec<u32>,
}

/// What waits in a queue, for `sk-queues.img` and `rewake.img`.
#[derive(Debug)]
pub(crate) struct Packet {
    /// Who is to name in errors.
    pub(crate) pid: i32,
    pub(crate) object: String,
    pub(crate) entry: SkPacketEntry,
    pub(crate) data: Vec<u8>,
    /// Descriptors in flight, until they are collected.
    pub(crate) rights: Vec<OwnedFd>,
    pub(crate) extra: RewakePacketEntry,
}

/// unix_diag's table, and what follows from it.
#[derive(Debug)]
pub(crate) struct Table {
    sockets: HashMap<u32, diag::Unix>,
    /// The listening socket that each client waits for, which is not accepted yet.
    listeners: HashMap<u32, u32>,
}

impl Table {
    pub(super) fn new(sockets: HashMap<u32, diag::Unix>) -> Table {
        let waiting = |(inode, socket): (&u32, &diag::Unix)| {
            let inode = *inode;
            socket.waiting.iter().map(move |client| (*client, inode)).collect::<Vec<_>>()
        };
        let listeners = sockets.iter().flat_map(waiting).collect();
        Table { sockets, listeners }
    }
}

/// Surveys a unix socket; `kind` is `SOCK_*`.
///
/// # Errors
/// It has sent what nobody can read, or something in its queue cannot be told.
pub fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
) -> Result<(u32, FdTypes), Problem> {
    if !matches!(kind, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET) {
        return Err(view.problem(format!("unix sockets of type {kind} cannot be saved")));
    }
    let inode = view.stat.st_ino as u32;
    let table = collector
        .sockets
        .unix_table()
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?;
    let listener = table.listeners.get(&inode).copied();
    let mut record = table.sockets.get(&inode).cloned().ok_or_else(|| {
        view.problem("sock_diag does not know it: it is of another network namespace")
    })?;
    let skip = collector.options.skip_in_flight;
    let dies = collector.options.dies;
    if record.state == LISTEN && record.waiting.contains(&0) && !skip {
        if !dies {
            return Err(view
                .problem(format!(
                    "unix socket listening at {}: a connection that waits to be accepted was closed by its client, and what it has sent cannot be read unless the dump ends the program",
                    shown(&record.name)
                ))
                .remedy(TAKEN_ONLY));
        }
        collector.sockets.unix_waiting.want(inode);
    }
    if skip {
        record.waiting.clear();
    }
    let waits_for = listener.filter(|_| !skip);
    if let Some(listener) = waits_for.filter(|_| record.send_queue != 0) {
        if !dies {
            return Err(view
                .problem(
                    "it has sent data on a connection that waits to be accepted, which cannot be read unless the dump ends the program",
                )
                .remedy(TAKEN_ONLY));
        }
        collector.sockets.unix_waiting.want(listener);
    }
    let mut extra = RewakeUnixEntry {
        waiting: record.waiting.iter().copied().filter(|client| *client != 0).collect(),
        peer_credentials: peer_words(view)?,
        ..RewakeUnixEntry::default()
    };
    let mut entry = UnixSkEntry {
        id: collector.new_id(),
        ino: inode,
        r#type: kind as u32,
        state: record.state.into(),
        flags: view.flags,
        backlog: record.send_queue,
        peer: waits_for.or(record.peer).unwrap_or(0),
        fown: view.owner()?,
        opts: options::survey(view, true)?,
        shutdown: (record.shutdown != 0).then_some(record.shutdown.into()),
        ns_id: Some(SOCKETS_NETNS),
        name: record.name,
        ..UnixSkEntry::default()
    };
    if waits_for.is_some() {
        let task = collector.holder(view) as u32;
        extra.own_credentials = vec![task, view.stat.st_uid, view.stat.st_gid];
    }
    if record.peer == Some(0) && entry.peer == 0 {
        closed_peer(view, &mut extra);
    }
    if entry.name.first().is_some_and(|first| *first != 0) {
        unix_path::survey(view, collector.looking(view), &mut entry, &mut extra)?;
    }
    if !record.waiting.is_empty() {
        let holder = collector.holder(view);
        collector.sockets.unix_waiting.note(view, (holder, entry.id, kind))?;
    }
    if record.state != LISTEN && (kind == libc::SOCK_DGRAM || record.state == ESTABLISHED) {
        keep_queue(collector, view, kind, entry.id)?;
    }
    let found = Found {
        pid: collector.holder(view),
        object: view.object(),
        kind,
        peer: entry.peer,
        waiting: record.waiting,
    };
    collector.sockets.unix.insert(inode, found);
    let id = entry.id;
    if extra != RewakeUnixEntry::default() {
        collector.extra_of(id).unix = Some(extra);
    }
    collector.push(FileEntry {
        r#type: FdTypes::Unixsk as i32,
        id,
        usk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Unixsk))
}

/// `SO_PEERCRED` in words.
fn peer_words(view: &View<'_>) -> Result<Vec<u32>, Problem> {
    let credentials = peer_credentials(view.as_fd())
        .map_err(|e| view.problem(format!("its peer's credentials cannot be read: {e}")))?;
    Ok(credential_words(credentials))
}

/// Credentials as the images have them.
pub(super) fn credential_words(credentials: Option<Credentials>) -> Vec<u32> {
    credentials.map_or_else(Vec::new, |c| vec![c.pid as u32, c.uid, c.gid])
}

/// What is left of a peer that is closed.
fn closed_peer(view: &View<'_>, extra: &mut RewakeUnixEntry) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    extra.peer_name = Some(unix_path::name_of_peer(view.as_fd()));
    // Without asking for it with SO_ERROR, which would take it away.
    let mut error = [PollFd::from_borrowed_fd(view.as_fd(), PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut error, Some(&at_once));
    if polled.is_ok() && error[0].revents().contains(PollFlags::ERR) {
        extra.reset = Some(true);
    }
}

/// A queue that is read once all descriptors are collected.
#[derive(Debug)]
pub(crate) struct Later {
    pid: i32,
    id: u32,
    source: queue::Source,
}

/// Copies what waits in the socket's queue, or notes that it has to be; descriptors in it are collected once all others are.
fn keep_queue(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
    id: u32,
) -> Result<(), Problem> {
    let pid = collector.holder(view);
    let fd = view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?;
    let source = queue::Source { fd, object: view.object(), kind };
    match queue::glance(&source)? {
        Some(contents) => collector.sockets.keep(pid, id, &source, contents),
        None => collector.sockets.later.push(Later { pid, id, source }),
    }
    Ok(())
}

impl super::Survey {
    pub(super) fn keep(
        &mut self,
        pid: i32,
        id: u32,
        source: &queue::Source,
        contents: Vec<queue::Queued>,
    ) {
        for (index, queued) in (0u32..).zip(contents) {
            let words = credential_words(queued.credentials);
            self.packets.push(Packet {
                pid,
                object: source.object.clone(),
                entry: SkPacketEntry {
                    id_for: id,
                    length: queued.data.len() as u32,
                    scm: Vec::new(),
                },
                data: queued.data,
                rights: queued.rights,
                extra: RewakePacketEntry {
                    id_for: id,
                    index,
                    credentials: words,
                    sender: Some(queued.sender).filter(|name| !name.is_empty()),
                    oob: queued.oob.then_some(true),
                },
            });
        }
    }

    /// Reads the queues for which options have to be changed for a moment. Returns what cannot be read, with the process.
    pub(crate) fn read_queues(&mut self) -> Vec<(i32, Problem)> {
        let later = std::mem::take(&mut self.later);
        let mut problems = Vec::new();
        let Some(first) = later.first() else { return problems };
        let mut options = Vec::new();
        let mut readable = Vec::new();
        for queue in &later {
            match queue.source.options() {
                Ok(found) => {
                    options.extend(found);
                    readable.push(queue);
                }
                Err(problem) => problems.push((queue.pid, problem)),
            }
        }
        let guard = match Guard::of_sockets(&options) {
            Ok(guard) => guard,
            Err(e) => {
                let reason = format!("nobody can look after them while their queues are read: {e}");
                return vec![(first.pid, Problem::new("unix sockets", reason))];
            }
        };
        for Later { pid, id, source } in readable {
            match queue::read(source) {
                Ok(contents) => self.keep(*pid, *id, source, contents),
                Err(problem) => problems.push((*pid, problem)),
            }
        }
        drop(guard);
        problems
    }
}

/// An address as text.
#[must_use]
pub(super) fn shown(name: &[u8]) -> String {
    match name.split_first() {
        None => "(no address)".to_owned(),
        Some((0, name)) => format!("@{}", text(name)),
        Some(_) => text(name.strip_suffix(b"\0").unwrap_or(name)),
    }
}

impl Collector {
    /// Looks at the peers of all unix sockets once all descriptors are collected. Those outside the tree that may be left
    /// out get an entry that tells their address; the others are returned as what stands in the way, with the process.
    pub fn unix_peers(&mut self) -> Vec<(i32, Problem)> {
        let unix = &self.sockets.unix;
        let strangers: Vec<(u32, &Found)> = unix
            .iter()
            .flat_map(|(inode, found)| {
                let peers = std::iter::once(&found.peer).chain(&found.waiting);
                peers.map(|peer| (*inode, *peer, found)).collect::<Vec<_>>()
            })
            .filter(|(_, peer, _)| *peer != 0 && !unix.contains_key(peer))
            .map(|(_, peer, found)| (peer, found))
            .collect();
        if strangers.is_empty() {
            return Vec::new();
        }
        let own: HashMap<u32, u32> = unix.iter().map(|(inode, f)| (f.peer, *inode)).collect();
        let outside = &self.options.outside;
        let table = self.sockets.unix_table.as_ref();
        let name_of = |inode: u32| {
            let socket = table.and_then(|table| table.sockets.get(&inode));
            socket.map_or(&b""[..], |socket| socket.name.as_slice())
        };
        let (mut left_out, mut problems) = (Vec::new(), Vec::new());
        let holders = holder::of_each(&strangers.iter().map(|(peer, _)| *peer).collect());
        // Who is nowhere else may be in flight where nobody has looked yet.
        let later = self.sockets.unix_waiting.any();
        for (peer, found) in strangers {
            if later && !holders.contains_key(&peer) {
                continue;
            }
            let named = outside.inodes.contains(&peer)
                || own.get(&peer).is_some_and(|inode| outside.inodes.contains(inode));
            let name = name_of(peer);
            let waits = found.waiting.contains(&peer);
            if named || outside.all && (waits || !name.is_empty()) {
                left_out.push((peer, name.to_vec(), waits, found.object.clone()));
                continue;
            }
            let who = holders.get(&peer).map_or("a process that cannot be found", String::as_str);
            problems.push((found.pid, refusal(found, peer, who, name, waits)));
        }
        for (peer, name, waits, object) in left_out {
            self.leave_out(peer, name, waits, &object);
        }
        problems
    }

    fn leave_out(&mut self, peer: u32, name: Vec<u8>, waits: bool, object: &str) {
        if waits {
            log::warn!("{object}: a client outside the tree that waits to be accepted is dropped");
            let lists = self.extra.values_mut().filter_map(|extra| extra.unix.as_mut());
            lists.for_each(|unix| unix.waiting.retain(|client| *client != peer));
            return;
        }
        log::warn!("{object}: its peer outside the tree, {}, is left out", shown(&name));
        let known = |file: &FileEntry| file.usk.as_ref().is_some_and(|usk| usk.ino == peer);
        if self.entries.iter().any(known) {
            return;
        }
        let id = self.new_id();
        // As CRIU has it: a datagram socket that listens.
        let entry = UnixSkEntry {
            id,
            ino: peer,
            r#type: libc::SOCK_DGRAM as u32,
            state: LISTEN.into(),
            uflags: EXTERNAL,
            name,
            ..UnixSkEntry::default()
        };
        self.push(FileEntry {
            r#type: FdTypes::Unixsk as i32,
            id,
            usk: Some(Box::new(entry)),
            ..FileEntry::default()
        });
    }
}

/// The problem that a peer is outside the tree.
fn refusal(found: &Found, peer: u32, who: &str, name: &[u8], waits: bool) -> Problem {
    if waits {
        let reason = format!("{who}, outside the tree, waits to be accepted by it");
        return Problem::new(found.object.clone(), reason).remedy(
            "--skip-in-flight drops the connection, and so does --ext-unix-sk: the client has to connect again",
        );
    }
    let kind = if found.kind == libc::SOCK_DGRAM { " (datagrams)" } else { "" };
    let at = if name.is_empty() { String::new() } else { format!(" at {}", shown(name)) };
    let problem = Problem::new(
        found.object.clone(),
        format!("unix socket{kind} connected to {who}{at}, outside the tree"),
    );
    problem.remedy(if name.is_empty() {
        format!(
            "have the program close it, or save both; or let --external unix[{peer}] leave the peer out and give the restored socket another with --inherit-fd fd[N]:socket:[INODE]"
        )
    } else {
        format!(
            "have the program close it, or save both; or let --ext-unix-sk (all) or --external unix[{peer}] (this one) leave the peer out: restored with --ext-unix-sk, the socket connects to that address anew"
        )
    })
}
