//! Restoring unix sockets, all of an image at once and in this order, since each step needs what the one before has made:
//!
//! 1. [`prepare`], before any process exists: the sockets themselves, bound and, if they are streams, connected. What
//!    `SO_PEERCRED` tells is noted by the kernel when this happens, of the process that does it; so somebody who has the
//!    right id for a moment does it ([`rewake_sys::message::pairs_as`] and others), while the id is still free.
//! 2. [`unix_fill`](super::unix_fill), when the first of them is asked for: queues, with the descriptors that are in flight
//!    in them; then datagram sockets are connected, after which only their peers may send to them; then options.
//! 3. [`settle`], just before the tasks go on: the files that the sockets are bound to appear in their places.

use super::unix::{CLOSE, EXTERNAL, LISTEN, shown};
use super::unix_path::{Reach, is_abstract};
use super::{Restore, unix_check, unix_fill};
use crate::Problem;
use crate::files::open::Opener;
use crate::pids::Pids;
use rewake_image::messages::{RewakeUnixEntry, UnixSkEntry};
use rewake_sys::message::{self, Caller, connect_as, listen_as, pairs_as};
use rewake_sys::{Errno, SyscallError, descriptors};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use std::collections::HashMap;

/// Inode numbers of both ends of pairs.
type Pairs = Vec<(u32, u32)>;

/// A unix socket of the image.
#[derive(Debug)]
pub(super) struct State {
    pub(super) entry: Box<UnixSkEntry>,
    pub(super) extra: RewakeUnixEntry,
    pub(super) made: Option<OwnedFd>,
    /// The other end of one whose peer is closed, as long as there is something to be sent from it.
    pub(super) other: Option<OwnedFd>,
    /// The end of a socketpair(2) that has this one for its peer, but need not be the peer of this one.
    pub(super) partner: Option<u32>,
    /// It came from outside (`--inherit-fd`) and is left as it is.
    pub(super) inherited: bool,
}

impl State {
    pub(super) fn new(entry: UnixSkEntry, extra: RewakeUnixEntry) -> State {
        let entry = Box::new(entry);
        State { entry, extra, made: None, other: None, partner: None, inherited: false }
    }

    pub(super) fn is_external(&self) -> bool {
        self.entry.uflags & EXTERNAL != 0
    }

    fn listens(&self) -> bool {
        self.entry.state == u32::from(LISTEN) && !self.is_external()
    }

    /// Its peer was there, and is closed.
    fn lost_its_peer(&self) -> bool {
        let entry = &self.entry;
        let streams = !is_datagram(entry) || entry.name.is_empty();
        // With an address, a datagram socket might just be one that others are connected to.
        entry.peer == 0
            && (self.extra.peer_name.is_some()
                || streams && entry.state != u32::from(CLOSE) && !self.listens())
    }
}

pub(super) fn problem(entry: &UnixSkEntry, reason: impl Into<String>) -> Problem {
    Problem::new(describe(entry), reason)
}

pub(super) fn describe(entry: &UnixSkEntry) -> String {
    if entry.name.is_empty() {
        format!("unix socket [{}]", entry.ino)
    } else {
        format!("unix socket {}", shown(&entry.name))
    }
}

pub(super) fn is_datagram(entry: &UnixSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_DGRAM
}

pub(super) fn socket(entry: &UnixSkEntry) -> Result<OwnedFd, Problem> {
    // Nothing here may wait; the flags of the image are set later.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kind = SocketType::from_raw(entry.r#type);
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
        .map_err(|e| problem(entry, format!("cannot be made: {e}")))
}

/// The description of a unix socket of the image.
///
/// # Errors
/// Its address is in use, or its state is one that cannot be restored.
pub fn open(opener: &mut Opener<'_>, entry: &UnixSkEntry) -> Result<OwnedFd, Problem> {
    prepare(opener)?;
    unix_fill::fill(opener)?;
    let filled = opener.sockets.unix_filled;
    let state = opener.sockets.unix.get_mut(&entry.ino);
    let made = state.and_then(|state| {
        // While queues are being filled, others still need it: to send to, to send from.
        if filled { state.made.take() } else { state.made.as_ref()?.try_clone().ok() }
    });
    made.ok_or_else(|| problem(entry, "it could not be made"))
}

/// Makes all sockets of the image, bound and connected.
///
/// # Errors
/// An address is in use, or a peer outside the tree is not there.
pub fn prepare(opener: &mut Opener<'_>) -> Result<(), Problem> {
    unix_check::load(opener)?;
    let sockets = &mut opener.sockets;
    sockets.pids = opener.pids.clone();
    if std::mem::replace(&mut sockets.unix_made, true) || sockets.unix.is_empty() {
        return Ok(());
    }
    let mut order: Vec<(u32, u32)> =
        sockets.unix.values().map(|s| (s.entry.id, s.entry.ino)).collect();
    order.sort_unstable();
    let order: Vec<u32> = order.into_iter().map(|(_, inode)| inode).collect();
    for (inode, state) in &mut sockets.unix {
        let key = format!("socket:[{inode}]");
        if let Some(number) = opener.options.inherited.get(key.as_bytes()) {
            let fd = descriptors::duplicate(*number).map_err(|e| {
                problem(&state.entry, format!("--inherit-fd fd[{number}]:socket:[{inode}]: {e}"))
            })?;
            state.made = Some(fd);
            state.inherited = true;
        }
    }
    sockets.make_listening(&order)?;
    sockets.make_pairs(&order)?;
    let outside = opener.options.external_unix;
    order.iter().try_for_each(|inode| sockets.make(*inode, outside))?;
    sockets.queue_up(&order)
}

/// Moves the files of bound sockets to their places.
///
/// # Errors
/// A place is taken by now.
pub fn settle(opener: &mut Opener<'_>) -> Result<(), Problem> {
    opener.sockets.places.settle()
}

/// Makes a call as the process that `credentials` tell of, in the PID namespace of the tree, or as ourselves if they are not
/// known.
pub(super) fn as_noted<T>(
    pids: &Pids,
    credentials: &[u32],
    mut call: impl FnMut(Option<Caller<'_>>) -> Result<T, SyscallError>,
) -> Result<T, SyscallError> {
    let [pid, uid, gid] = *credentials else { return call(None) };
    let caller = Caller { pid: pid as i32, namespace: pids.namespace() };
    message::with_ids(uid, gid, || match call(Some(caller)) {
        Err(e) if matches!(e.call, "clone3" | "setns") => {
            log::debug!("SO_PEERCRED will not tell process {pid}: {e}");
            call(None)
        }
        result => result,
    })?
}

impl Restore {
    fn take_state(&self, inode: u32) -> Option<&State> {
        self.unix.get(&inode).filter(|state| state.made.is_none() && !state.is_external())
    }

    fn put(&mut self, inode: u32, fd: OwnedFd) {
        if let Some(state) = self.unix.get_mut(&inode) {
            state.made = Some(fd);
        }
    }

    /// The peer of a socket that is connected to it in turn, and not itself.
    pub(super) fn mutual(&self, entry: &UnixSkEntry) -> Option<&State> {
        let peer = self.unix.get(&entry.peer).filter(|_| entry.peer != 0);
        peer.filter(|peer| peer.entry.peer == entry.ino && peer.entry.ino != entry.ino)
    }

    fn bind(&mut self, inode: u32, fd: &OwnedFd) -> Result<(), Problem> {
        let Some(state) = self.unix.get(&inode) else { return Ok(()) };
        self.places.bind(&state.entry, &state.extra, fd.as_fd())
    }

    /// Makes listening sockets. As long as connections are being made, the backlog has room for all.
    fn make_listening(&mut self, order: &[u32]) -> Result<(), Problem> {
        for inode in order {
            let Some(state) = self.take_state(*inode).filter(|state| state.listens()) else {
                continue;
            };
            let entry = state.entry.clone();
            let fd = socket(&entry)?;
            self.bind(*inode, &fd)?;
            self.put(*inode, fd);
            self.listen(*inode, i32::MAX, &[])?;
        }
        Ok(())
    }

    /// Has a listening socket listen: for its clients it did so as `credentials`, or as what it has itself.
    fn listen(&self, inode: u32, backlog: i32, credentials: &[u32]) -> Result<(), Problem> {
        let Some(state) = self.unix.get(&inode) else { return Ok(()) };
        let Some(fd) = &state.made else { return Ok(()) };
        let own = &state.extra.peer_credentials;
        let credentials = if credentials.is_empty() { own } else { credentials };
        as_noted(&self.pids, credentials, |caller| listen_as(caller, fd.as_fd(), backlog))
            .map_err(|e| problem(&state.entry, format!("cannot listen: {e}")))
    }

    /// Makes what socketpair(2) makes: connected sockets of which one at least has no address. As many at a time as have
    /// the same maker.
    fn make_pairs(&mut self, order: &[u32]) -> Result<(), Problem> {
        // By type and maker, the inode numbers of both ends.
        let mut groups: HashMap<(u32, Vec<u32>), Pairs> = HashMap::new();
        let mut paired = std::collections::HashSet::new();
        for inode in order {
            let Some(state) = self.take_state(*inode) else { continue };
            let entry = &state.entry;
            let Some(peer) = self.take_state(entry.peer).filter(|_| entry.peer != entry.ino) else {
                continue;
            };
            let mutual = peer.entry.peer == entry.ino;
            let one_is_unnamed = entry.name.is_empty() || peer.entry.name.is_empty();
            let made_so = if is_datagram(entry) {
                peer.entry.name.is_empty() || mutual && one_is_unnamed
            } else {
                mutual && entry.name.is_empty() && peer.entry.name.is_empty()
            };
            if !made_so || paired.contains(inode) || paired.contains(&entry.peer) {
                continue;
            }
            paired.extend([*inode, entry.peer]);
            let maker = [&state.extra, &peer.extra].into_iter().map(|e| &e.peer_credentials);
            let maker = maker.max_by_key(|words| words.len()).cloned().unwrap_or_default();
            groups.entry((entry.r#type, maker)).or_default().push((*inode, entry.peer));
        }
        for ((kind, maker), pairs) in groups {
            let made =
                as_noted(&self.pids, &maker, |caller| pairs_as(caller, kind as i32, pairs.len()));
            let made = made.map_err(|e| {
                Problem::new("unix sockets", format!("{} pairs cannot be made: {e}", pairs.len()))
            })?;
            for ((a, b), (a_fd, b_fd)) in pairs.into_iter().zip(made) {
                self.bind(a, &a_fd)?;
                self.bind(b, &b_fd)?;
                self.finish_pair(a, b, &b_fd)?;
                self.put(a, a_fd);
                self.put(b, b_fd);
            }
        }
        Ok(())
    }

    /// Notes that two are ends of a pair; if the second has another peer than the first, it loses the first.
    fn finish_pair(&mut self, a: u32, b: u32, b_fd: &OwnedFd) -> Result<(), Problem> {
        for (inode, partner) in [(a, b), (b, a)] {
            if let Some(state) = self.unix.get_mut(&inode) {
                state.partner = Some(partner);
            }
        }
        let Some(state) = self.unix.get(&b).filter(|state| state.entry.peer != a) else {
            return Ok(());
        };
        rustix::net::connect_unspec(b_fd)
            .map_err(|e| problem(&state.entry, format!("cannot be disconnected: {e}")))
    }

    /// Makes any other socket, but for those that wait to be accepted.
    fn make(&mut self, inode: u32, outside: bool) -> Result<(), Problem> {
        let Some(state) = self.take_state(inode) else { return Ok(()) };
        let entry = state.entry.clone();
        if state.lost_its_peer() {
            return self.make_with_lost_peer(&entry);
        }
        let external = self.unix.get(&entry.peer).filter(|peer| peer.is_external());
        if let Some(peer) = external.map(|peer| peer.entry.clone()) {
            if !outside {
                return Err(problem(
                    &entry,
                    format!("it was connected to {}, outside the tree", shown(&peer.name)),
                )
                .remedy(format!(
                    "--ext-unix-sk connects it to that address anew; --inherit-fd fd[N]:socket:[{inode}] puts descriptor N in its place"
                )));
            }
            return self.make_client_of(&entry, &peer);
        }
        let peer = self.mutual(&entry).filter(|_| !is_datagram(&entry));
        if let Some(peer) = peer.map(|peer| peer.entry.clone()) {
            let (server, client) = self.roles(&entry, &peer);
            let (server_fd, client_fd) = self.connection(
                (server.r#type, &server.name),
                Some(server.ino),
                (Some(client.ino), &client.name),
            )?;
            self.put(server.ino, server_fd);
            self.put(client.ino, client_fd);
            return Ok(());
        }
        let waits = self.unix.get(&entry.peer).is_some_and(State::listens);
        if !waits {
            let fd = socket(&entry)?;
            self.bind(inode, &fd)?;
            self.put(inode, fd);
        }
        Ok(())
    }

    /// Which of two connected sockets was accepted: it has the address of a listening socket, or any at all.
    fn roles<'e>(
        &self,
        a: &'e UnixSkEntry,
        b: &'e UnixSkEntry,
    ) -> (&'e UnixSkEntry, &'e UnixSkEntry) {
        let accepted = |entry: &UnixSkEntry| self.listener(entry.r#type, &entry.name).is_some();
        let b_is_server = accepted(b) && !accepted(a) || a.name.is_empty();
        if b_is_server { (b, a) } else { (a, b) }
    }

    /// The listening socket of this type and address.
    fn listener(&self, kind: u32, name: &[u8]) -> Option<&State> {
        let is_it = |state: &&State| {
            state.listens() && state.entry.r#type == kind && state.entry.name == name
        };
        self.unix.values().filter(|_| !name.is_empty()).find(is_it)
    }

    /// Makes one whose peer is closed. The other end lives until the queue is filled from it.
    fn make_with_lost_peer(&mut self, entry: &UnixSkEntry) -> Result<(), Problem> {
        let Some(state) = self.unix.get(&entry.ino) else { return Ok(()) };
        let peer_name = state.extra.peer_name.clone().unwrap_or_default();
        let noted = state.extra.peer_credentials.clone();
        let (fd, other) = if is_datagram(entry) || entry.name.is_empty() && peer_name.is_empty() {
            let kind = entry.r#type as i32;
            let mut made = as_noted(&self.pids, &noted, |caller| pairs_as(caller, kind, 1))
                .map_err(|e| problem(entry, format!("cannot be made: {e}")))?;
            let Some((fd, other)) = made.pop() else { return Ok(()) };
            self.bind(entry.ino, &fd)?;
            if let Err(e) = self.places.bind_apart(&peer_name, other.as_fd()) {
                log::warn!("{}: its closed peer has no address any more: {e}", describe(entry));
            }
            (fd, other)
        } else if entry.name.is_empty() || self.listener(entry.r#type, &peer_name).is_some() {
            // It is the client.
            let server = (entry.r#type, peer_name.as_slice());
            let (other, fd) = self.connection(server, None, (Some(entry.ino), &entry.name))?;
            (fd, other)
        } else {
            let server = (entry.r#type, entry.name.as_slice());
            self.connection(server, Some(entry.ino), (None, &peer_name))?
        };
        self.put(entry.ino, fd);
        if let Some(state) = self.unix.get_mut(&entry.ino) {
            state.other = Some(other);
        }
        Ok(())
    }

    /// Makes a connection through a listening socket: the accepted end first. Each end is one of the image, or none; the
    /// listening socket is that of the image, or one for a moment.
    fn connection(
        &mut self,
        (kind, address): (u32, &[u8]),
        server: Option<u32>,
        (client, client_name): (Option<u32>, &[u8]),
    ) -> Result<(OwnedFd, OwnedFd), Problem> {
        let noted = |inode: Option<u32>| {
            let state = inode.and_then(|inode| self.unix.get(&inode));
            state.map(|state| state.extra.peer_credentials.clone()).unwrap_or_default()
        };
        // What the client is told of is who has called listen(2); what the server is told of, who connect(2).
        let (of_listener, of_caller) = (noted(client), noted(server));
        let named = UnixSkEntry { r#type: kind, name: address.to_vec(), ..UnixSkEntry::default() };
        let passing;
        let (listener, owner) = match self.listener(kind, address) {
            Some(state) => {
                let (inode, own) = (state.entry.ino, state.extra.peer_credentials.clone());
                if !of_listener.is_empty() && of_listener != own {
                    self.listen(inode, i32::MAX, &of_listener)?;
                }
                let state = self.unix.get(&inode).and_then(|state| state.made.as_ref());
                let fd = state.ok_or_else(|| problem(&named, "its listening socket is missing"))?;
                (fd.as_fd(), Some(inode).filter(|_| of_listener != own))
            }
            None => {
                passing = socket(&named)?;
                self.places.bind_apart(address, passing.as_fd())?;
                as_noted(&self.pids, &of_listener, |caller| listen_as(caller, passing.as_fd(), 8))
                    .map_err(|e| problem(&named, format!("cannot listen: {e}")))?;
                (passing.as_fd(), None)
            }
        };
        let listener = listener.try_clone_to_owned().map_err(|e| problem(&named, e.to_string()))?;
        let calling = socket(&named)?;
        let bind_client = !client_name.is_empty() && client_name != address;
        match client {
            Some(client) if bind_client => self.bind(client, &calling)?,
            None if bind_client => self.places.bind_apart(client_name, calling.as_fd())?,
            _ => {}
        }
        let accepted = call(&self.pids, &named, &listener, &calling, &of_caller)?;
        if let Some(owner) = owner {
            self.listen(owner, i32::MAX, &[])?;
        }
        Ok((accepted, calling))
    }

    /// Makes a socket that was connected to one outside the tree, and connects it to that one's address.
    fn make_client_of(&mut self, entry: &UnixSkEntry, peer: &UnixSkEntry) -> Result<(), Problem> {
        let fd = socket(entry)?;
        self.bind(entry.ino, &fd)?;
        // A datagram socket is connected when its queue is full.
        if !is_datagram(entry) {
            connect_outside(entry, peer, &fd)?;
        }
        self.put(entry.ino, fd);
        Ok(())
    }

    /// Connects those that wait to be accepted, in their order, and gives every listening socket its own backlog.
    fn queue_up(&mut self, order: &[u32]) -> Result<(), Problem> {
        for inode in order {
            let Some(state) = self.unix.get(inode).filter(|s| s.listens() && !s.inherited) else {
                continue;
            };
            let entry = state.entry.clone();
            let mut told = state.extra.waiting.clone();
            let connections = state.extra.connections.clone();
            self.line_up(&entry, &connections)?;
            told.retain(|client| !connections.iter().any(|c| c.client == *client));
            let waits = |inode: &&u32| {
                self.unix.get(*inode).is_some_and(|s| s.entry.peer == entry.ino && s.made.is_none())
            };
            let mut clients: Vec<u32> = told.iter().filter(waits).copied().collect();
            // CRIU's images do not tell the order.
            let others: Vec<u32> =
                order.iter().filter(waits).filter(|i| !told.contains(i)).copied().collect();
            clients.extend(others);
            for client in clients {
                self.wait_in_line(&entry, client)?;
            }
            self.listen(entry.ino, entry.backlog as i32, &[])?;
        }
        Ok(())
    }

    pub(super) fn wait_in_line(
        &mut self,
        listener: &UnixSkEntry,
        client: u32,
    ) -> Result<(), Problem> {
        let Some(state) = self.unix.get(&client) else { return Ok(()) };
        let (entry, own) = (state.entry.clone(), state.extra.own_credentials.clone());
        let fd = socket(&entry)?;
        self.bind(client, &fd)?;
        let made = self.unix.get(&listener.ino).and_then(|state| state.made.as_ref());
        let Some(listening) = made else { return Ok(()) };
        let reach = Reach::to(listening.as_fd(), &listener.name)?;
        as_noted(&self.pids, &own, |caller| connect_as(caller, fd.as_fd(), reach.address()))
            .map_err(|e| problem(&entry, format!("cannot be connected: {e}")))?;
        self.put(client, fd);
        Ok(())
    }
}

/// Connects a socket to one outside the tree.
pub(super) fn connect_outside(
    entry: &UnixSkEntry,
    peer: &UnixSkEntry,
    fd: &OwnedFd,
) -> Result<(), Problem> {
    if peer.name.is_empty() {
        return Err(problem(
            entry,
            "it was connected to a socket outside the tree that has no address",
        )
        .remedy(format!(
            "--inherit-fd fd[N]:socket:[{}] puts descriptor N in its place",
            entry.ino
        )));
    }
    connect_as(None, fd.as_fd(), Reach::outside(&peer.name).address()).map_err(|e| {
        problem(
            entry,
            format!("cannot be connected to {}, outside the tree: {}", shown(&peer.name), e.errno),
        )
        .remedy("start the server that had this address")
    })
}

/// Connects `calling` to `listener` as the process that `noted` tells of, and accepts it.
fn call(
    pids: &Pids,
    named: &UnixSkEntry,
    listener: &OwnedFd,
    calling: &OwnedFd,
    noted: &[u32],
) -> Result<OwnedFd, Problem> {
    let failed = |e: &dyn std::fmt::Display| {
        problem(named, format!("a connection to it cannot be made: {e}"))
    };
    let reach = Reach::to(listener.as_fd(), &named.name)?;
    as_noted(pids, noted, |caller| connect_as(caller, calling.as_fd(), reach.address()))
        .map_err(|e| failed(&e))?;
    // An abstract address is there for everyone: a stranger may have been faster. It will call again.
    let mut word = [0; 16];
    if is_abstract(&named.name) {
        rustix::rand::getrandom(&mut word, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| failed(&e))?;
        message::send(calling.as_fd(), &word, &[], None, &[], 0, None).map_err(|e| failed(&e))?;
    }
    loop {
        let accepted =
            rustix::net::accept_with(listener, SocketFlags::CLOEXEC).map_err(|e| failed(&e))?;
        if !is_abstract(&named.name) {
            return Ok(accepted);
        }
        let mut said = [0; 16];
        let got = rustix::net::recv(&accepted, &mut said, RecvFlags::DONTWAIT);
        if got.is_ok_and(|(n, _)| n == said.len()) && said == word {
            return Ok(accepted);
        }
        let pid = message::peer_credentials(accepted.as_fd()).ok().flatten().map_or(0, |c| c.pid);
        log::warn!(
            "{}: a connection from process {pid} came while it was restored, and was closed",
            describe(named)
        );
    }
}

/// Whether the kernel has no room at the moment.
pub(super) fn is_full(e: &SyscallError) -> bool {
    matches!(e.errno, Errno::AGAIN | Errno::NOBUFS)
}
