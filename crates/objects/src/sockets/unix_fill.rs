//! Filling the queues of restored unix sockets, and what has to wait until that is done.

use super::Restore;
use super::option_table::When;
use super::options::{self, Making};
use super::unix_open::{State, connect_outside, describe, is_datagram, is_full, problem, socket};
use super::unix_path::{Places, Reach};
use super::unix_waiting::Client;
use crate::Problem;
use crate::files::open::Opener;
use crate::pids::Pids;
use rewake_image::messages::{RewakePacketEntry, SkPacketEntry, SkShutdown, UnixSkEntry};
use rewake_sys::message::{self, Credentials, connect_as};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::Shutdown;
use std::collections::{HashMap, HashSet};
use std::os::fd::AsRawFd;

/// A message of a queue: CRIU's entry, its bytes, and what rewake.img says of it.
pub(super) type Packet = (SkPacketEntry, Vec<u8>, RewakePacketEntry);

/// Fills the queues of all unix sockets, opening what is in flight in them, and finishes the sockets.
///
/// # Errors
/// A queue takes less than it held, or an option cannot be set.
pub fn fill(opener: &mut Opener<'_>) -> Result<(), Problem> {
    if std::mem::replace(&mut opener.sockets.unix_filling, true) {
        return Ok(());
    }
    let mut queues: Vec<(u32, Vec<Packet>)> = opener.sockets.packets.drain().collect();
    // A socket in flight was found after the one it is in, and is filled before it: kernels before 6.10 count how deep they
    // are inside each other.
    queues.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
    let mut passing = Passing::default();
    for (id, packets) in queues {
        for (packet, ..) in &packets {
            for id in packet.scm.iter().flat_map(|scm| &scm.rights) {
                opener.open(*id)?;
                if opener.is_put_off(*id) {
                    return Err(Problem::new(
                        format!("file id {id}"),
                        "it is in flight in a unix socket, but is not there before the processes are",
                    ));
                }
            }
        }
        match opener.sockets.line.remove(&id) {
            Some((client, listener)) => fill_waiting(opener, client, &listener, &packets)?,
            None => match opener.entry(id).ok().and_then(|file| file.usk.as_ref()) {
                Some(entry) => fill_one(opener, entry.ino, &packets, &mut passing)?,
                // Its listening socket or its client is not one of ours.
                None => log::warn!(
                    "what waited in a unix connection that is not accepted yet is dropped"
                ),
            },
        }
    }
    drop(passing);
    let sockets = &mut opener.sockets;
    sockets.connect_datagrams()?;
    sockets.close_lost_peers();
    let whole = |s: &&State| !s.inherited && !s.is_external();
    for state in opener.sockets.unix.values().filter(whole) {
        if let Some(fd) = &state.made {
            finish(opener, &state.entry, fd.as_fd())?;
        }
    }
    opener.sockets.unix_filled = true;
    Ok(())
}

/// Sockets for a moment: the senders of datagrams who are gone, by their addresses.
#[derive(Debug, Default)]
struct Passing(HashMap<Vec<u8>, OwnedFd>);

impl Passing {
    fn make(&mut self, name: &[u8], to: &UnixSkEntry, places: &mut Places) -> Result<(), Problem> {
        if self.0.contains_key(name) {
            return Ok(());
        }
        let fd = socket(to)?;
        if let Err(e) = places.bind_apart(name, fd.as_fd()) {
            log::warn!("{}: the sender of a message is not named: {e}", describe(to));
        }
        self.0.insert(name.to_vec(), fd);
        Ok(())
    }
}

/// Who sends what a queue held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sender {
    /// The socket with this inode number, which is connected to the receiver.
    Peer(u32),
    /// The other end, which is closed afterwards.
    Other,
    /// The socket with this inode number, to the receiver's address.
    Known(u32),
    /// One for a moment, to the receiver's address.
    Passing,
}

/// Fills the queue of a connection that waits to be accepted, from its client.
fn fill_waiting(
    opener: &Opener<'_>,
    client: Client,
    listener: &UnixSkEntry,
    packets: &[Packet],
) -> Result<(), Problem> {
    let closed;
    let fd = match client {
        Client::Closed(fd) => {
            closed = fd;
            Some(&closed)
        }
        Client::Living(inode) => {
            opener.sockets.unix.get(&inode).and_then(|state| state.made.as_ref())
        }
    };
    let fd = fd.ok_or_else(|| problem(listener, "who waits there could not be made"))?;
    let what = format!("{}: a connection that waits to be accepted", describe(listener));
    let making = Making { fd: fd.as_fd(), object: &what };
    options::make_room(making, 0, packets.iter().map(|(_, data, _)| data.len() + 512).sum())?;
    let mut senders = Senders::new(opener.pids.clone());
    packets.iter().try_for_each(|packet| {
        send_packet(opener, listener, making, packet, senders.of(&packet.2, &what), &[])
    })
}

/// Sends a message of a queue, with what was in flight with it.
fn send_packet(
    opener: &Opener<'_>,
    to: &UnixSkEntry,
    making: Making<'_>,
    (packet, data, extra): &Packet,
    claim: Option<Claim>,
    address: &[u8],
) -> Result<(), Problem> {
    let ids = packet.scm.iter().flat_map(|scm| &scm.rights);
    let rights = ids.map(|id| opener.opened(*id)).collect::<Result<Vec<BorrowedFd<'_>>, _>>()?;
    let flags = if extra.oob == Some(true) { libc::MSG_OOB } else { 0 };
    send(to, making, &opener.pids, Message { data, rights, claim, address, flags })
}

fn fill_one(
    opener: &mut Opener<'_>,
    inode: u32,
    packets: &[Packet],
    passing: &mut Passing,
) -> Result<(), Problem> {
    let Some(state) = opener.sockets.unix.get(&inode) else { return Ok(()) };
    let to = state.entry.clone();
    if state.inherited {
        log::warn!("{}: what waited in its queue is dropped", describe(&to));
        return Ok(());
    }
    // An empty message occupies memory too.
    let total = packets.iter().map(|(_, data, _)| data.len() + 512).sum();
    let what = describe(&to);
    let mut reach = None;
    let mut roomy = HashSet::new();
    let mut senders = Senders::new(opener.pids.clone());
    for packet in packets {
        let (_, _, extra) = packet;
        let name = extra.sender.as_deref().unwrap_or_default();
        let sender = opener.sockets.sender(&to, name)?;
        if sender == Sender::Passing {
            passing.make(name, &to, &mut opener.sockets.places)?;
        }
        let sockets = &opener.sockets;
        let made = |inode: &u32| sockets.unix.get(inode).and_then(|state| state.made.as_ref());
        let fd = match &sender {
            Sender::Peer(inode) | Sender::Known(inode) => made(inode),
            Sender::Other => sockets.unix.get(&to.ino).and_then(|state| state.other.as_ref()),
            Sender::Passing => passing.0.get(name),
        };
        let fd = fd.ok_or_else(|| problem(&to, "who sends to it could not be made"))?;
        let making = Making { fd: fd.as_fd(), object: &what };
        if roomy.insert(fd.as_raw_fd()) {
            options::make_room(making, 0, total)?;
        }
        if matches!(sender, Sender::Known(_) | Sender::Passing) && reach.is_none() {
            reach = Some(sockets.reach(&to)?);
        }
        let address = match sender {
            Sender::Peer(_) | Sender::Other => &[][..],
            _ => reach.as_ref().map_or(&[][..], Reach::address),
        };
        let claim = senders.of(extra, &what);
        send_packet(opener, &to, making, packet, claim, address)?;
    }
    Ok(())
}

/// Who has sent the messages of a queue, by the ids that they have here.
struct Senders {
    pids: Pids,
    known: HashMap<u32, (i32, bool)>,
}

/// Credentials to be claimed.
#[derive(Debug, Clone, Copy)]
struct Claim {
    credentials: Credentials,
    /// The id is one of the tree's PID namespace, and not of ours.
    inside: bool,
}

impl Senders {
    fn new(pids: Pids) -> Senders {
        Senders { pids, known: HashMap::new() }
    }

    /// The credentials of a message. In another PID namespace the living have another id here, and the dead only one there.
    fn of(&mut self, extra: &RewakePacketEntry, what: &str) -> Option<Claim> {
        let [pid, uid, gid] = *extra.credentials else { return None };
        let pids = &self.pids;
        let (pid, inside) = *self.known.entry(pid).or_insert_with(|| {
            // 0 stands for nobody, and means the same everywhere.
            let here = if pid == 0 { Some(0) } else { pids.outer(pid as i32) };
            log::debug!("{what}: sender {pid} is {here:?} here");
            here.map_or((pid as i32, true), |here| (here, false))
        });
        Some(Claim { credentials: Credentials { pid, uid, gid }, inside })
    }
}

struct Message<'a> {
    data: &'a [u8],
    rights: Vec<BorrowedFd<'a>>,
    claim: Option<Claim>,
    address: &'a [u8],
    flags: i32,
}

fn send(
    to: &UnixSkEntry,
    making: Making<'_>,
    pids: &Pids,
    message: Message<'_>,
) -> Result<(), Problem> {
    let Message { data, mut rights, claim, address, flags } = message;
    let mut credentials = claim.map(|claim| claim.credentials);
    let namespace = pids.namespace().filter(|_| claim.is_some_and(|claim| claim.inside));
    let mut rest = data;
    let mut more = 1 << 20;
    loop {
        match message::send(making.fd, rest, &rights, credentials, address, flags, namespace) {
            Ok(done) => {
                rest = rest.get(done..).unwrap_or_default();
                rights.clear();
                if rest.is_empty() {
                    return Ok(());
                }
            }
            Err(e) if is_full(&e) && more < 1 << 30 => {
                options::make_room(making, 0, more)?;
                more *= 4;
            }
            Err(e) if credentials.is_some() && cannot_claim(&e) => {
                log::warn!(
                    "{}: a message in its queue does not tell its sender {} any more: {e}",
                    describe(to),
                    credentials.map_or(0, |c| c.pid)
                );
                credentials = None;
            }
            Err(e) => return Err(refused(to, &e)),
        }
    }
}

fn cannot_claim(e: &SyscallError) -> bool {
    matches!(e.call, "clone3" | "setns") || matches!(e.errno, Errno::PERM | Errno::SRCH)
}

fn refused(to: &UnixSkEntry, e: &SyscallError) -> Problem {
    let problem = problem(to, format!("its receive queue cannot be filled: {}", e.errno));
    if is_datagram(to) && is_full(e) {
        return problem.remedy(
            "it held more messages than this machine allows: raise net.unix.max_dgram_qlen",
        );
    }
    problem
}

impl Restore {
    /// Who sends a message to `to`: its peer, or for datagrams whoever has the sender's address.
    fn sender(&self, to: &UnixSkEntry, name: &[u8]) -> Result<Sender, Problem> {
        let Some(state) = self.unix.get(&to.ino) else { return Ok(Sender::Passing) };
        let peer = self.mutual(to).filter(|_| !is_datagram(to) || state.partner.is_some());
        if let Some(peer) = peer {
            return Ok(Sender::Peer(peer.entry.ino));
        }
        if state.other.is_some() {
            return Ok(Sender::Other);
        }
        if !is_datagram(to) {
            let reason = "its receive queue has messages, but there is no peer to send them";
            return Err(problem(to, reason));
        }
        let named = |s: &&State| is_datagram(&s.entry) && s.entry.name == name && s.made.is_some();
        let known = self.unix.values().filter(|_| !name.is_empty()).find(named);
        Ok(match (known.filter(|_| !to.name.is_empty()), state.partner) {
            (Some(known), _) => Sender::Known(known.entry.ino),
            (None, Some(partner)) => Sender::Peer(partner),
            (None, None) => Sender::Passing,
        })
    }

    fn reach(&self, to: &UnixSkEntry) -> Result<Reach, Problem> {
        let made = self.unix.get(&to.ino).and_then(|state| state.made.as_ref());
        match made {
            Some(fd) if !to.name.is_empty() => Reach::to(fd.as_fd(), &to.name),
            _ => Err(problem(to, "its receive queue has messages, but nobody can send to it")),
        }
    }

    /// Connects datagram sockets to peers that need not be connected to them. A socket that is connected itself lets nobody
    /// else connect to it any more, so its clients come first.
    fn connect_datagrams(&self) -> Result<(), Problem> {
        let connects = |s: &&State| {
            is_datagram(&s.entry)
                && s.entry.peer != 0
                && !s.inherited
                && !s.is_external()
                && s.partner != Some(s.entry.peer)
        };
        let one_way = |s: &State| self.mutual(&s.entry).is_none() && s.entry.peer != s.entry.ino;
        let mut clients: HashMap<u32, usize> = HashMap::new();
        for state in self.unix.values().filter(connects).filter(|s| one_way(s)) {
            *clients.entry(state.entry.peer).or_default() += 1;
        }
        let is_free = |s: &&State| clients.get(&s.entry.ino).is_none_or(|n| *n == 0);
        let mut ready: Vec<&State> = self.unix.values().filter(connects).filter(is_free).collect();
        let (mut done, all) = (0, self.unix.values().filter(connects).count());
        while let Some(state) = ready.pop() {
            self.connect_datagram(state)?;
            done += 1;
            let Some(left) = clients.get_mut(&state.entry.peer).filter(|_| one_way(state)) else {
                continue;
            };
            *left -= 1;
            if *left == 0 {
                ready.extend(self.unix.get(&state.entry.peer).filter(connects));
            }
        }
        if done != all {
            let reason = "they are connected in a circle, which the kernel does not allow";
            return Err(Problem::new("datagram sockets of the images", reason));
        }
        Ok(())
    }

    fn connect_datagram(&self, state: &State) -> Result<(), Problem> {
        let entry = &state.entry;
        let (Some(fd), Some(peer)) = (&state.made, self.unix.get(&entry.peer)) else {
            return Ok(());
        };
        if peer.is_external() {
            return connect_outside(entry, &peer.entry, fd);
        }
        let reach = self.reach(&peer.entry)?;
        connect_as(None, fd.as_fd(), reach.address()).map_err(|e| {
            problem(entry, format!("cannot be connected to {}: {e}", describe(&peer.entry)))
        })
    }

    /// Closes the other ends of sockets whose peers were closed; one that had not read everything makes an error of that.
    fn close_lost_peers(&mut self) {
        for state in self.unix.values_mut() {
            let Some(other) = state.other.take() else { continue };
            if let Some(fd) = state.made.as_ref().filter(|_| state.extra.reset == Some(true))
                && let Err(e) = message::send(fd.as_fd(), b"x", &[], None, &[], 0, None)
            {
                log::warn!("{}: its error ECONNRESET is lost: {e}", describe(&state.entry));
            }
            drop(other);
        }
    }
}

/// Sets options and shuts down, now that nothing more has to be sent.
fn finish(opener: &Opener<'_>, entry: &UnixSkEntry, fd: BorrowedFd<'_>) -> Result<(), Problem> {
    let what = describe(entry);
    let making = Making { fd, object: &what };
    options::apply_before_bind(making, &entry.opts, false)?;
    options::apply(making, &entry.opts)?;
    super::apply_own(opener, entry.id, making, When::Made)?;
    let Some(directions) = entry.shutdown else { return Ok(()) };
    let how = match SkShutdown::try_from(directions) {
        Ok(SkShutdown::Read) => Shutdown::Read,
        Ok(SkShutdown::Write) => Shutdown::Write,
        Ok(SkShutdown::Both) => Shutdown::Both,
        _ => return Ok(()),
    };
    rustix::net::shutdown(fd, how).map_err(|e| problem(entry, format!("cannot be shut down: {e}")))
}
