//! Sockets, a module a family, and what they share.
//!
//! A survey asks the description itself (getsockopt(2)) and, where that does not tell, sock_diag(7): one dump a table, when
//! the first socket needs it. What waits in queues is read after the survey ([`read`]) and written by [`write`].
//!
//! A restore makes sockets whole in the controller, but for TCP connections: those stay in repair mode, silent, until
//! [`set_going`] just before the tasks go on.

mod accept_queue;
mod alike;
mod bind;
mod datagram;
mod ended;
mod handshake;
mod hidden;
mod holder;
pub mod host;
pub mod inet;
mod ip;
pub mod lock;
mod membership;
pub mod netlink;
mod note;
mod option_own;
mod option_table;
pub mod options;
mod packet;
mod packet_ring;
mod packet_socket;
mod queue;
mod raw;
mod reading;
pub mod repair;
pub(crate) mod reuseport;
pub mod stream;
mod stream_options;
mod udp;
pub mod unix;
mod unix_check;
mod unix_fill;
mod unix_open;
mod unix_path;
mod unix_waiting;
mod vsock;

#[cfg(test)]
mod tests;

use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use crate::pids::Pids;
use crate::problem::text;
use rewake_image::messages::{FdTypes, FileEntry, RewakePacketEntry};
use rewake_image::{ImageWriter, kind};
use rewake_netlink::{Error, Socket, diag};
use rewake_sys::sockets::{option, option_int};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use accept_queue::{put_back as put_back_waiting, take as take_waiting};
use option_table::{Kinds, When};
use options::Making;
pub use stream::read;
pub use unix_check::load as check_unix;
pub use unix_open::{prepare as prepare_unix, settle as settle_unix};
pub use unix_waiting::take as take_unix_waiting;

/// The id that the image has for the network namespace of the tree.
const SOCKETS_NETNS: u32 = 2;

/// A table of sock_diag: address family, protocol.
type Table = (u32, u32);

/// What a dump knows of the tree's sockets besides their entries.
#[derive(Debug, Default)]
pub struct Survey {
    /// TCP connections, whose queues are to be read.
    pub connections: Vec<stream::Connection>,
    /// Listening TCP sockets whose queues are to be saved.
    listeners: Vec<accept_queue::Listener>,
    /// Handshakes with these that are not done: the own end, the peer's.
    half_open: Vec<(SocketAddr, SocketAddr)>,
    /// Connections that wait to be accepted.
    pub(crate) waiting: Vec<accept_queue::Waiting>,
    /// Unix sockets of the tree by inode number.
    pub(crate) unix: HashMap<u32, unix::Found>,
    /// Listening unix sockets at which somebody waits.
    pub(crate) unix_waiting: unix_waiting::Waiting,
    /// `sk-queues.img`.
    pub(crate) packets: Vec<unix::Packet>,
    /// Queues of unix sockets that are still to be read.
    later: Vec<unix::Later>,
    /// `SO_NETNS_COOKIE` of the network namespace that we are in.
    netns: Option<[u8; 8]>,
    diag: Option<Socket>,
    inet_tables: HashMap<Table, HashMap<u32, diag::Inet>>,
    /// TCP sockets by address family and inode number.
    tcp_tables: HashMap<u32, HashMap<u32, Arc<diag::Tcp>>>,
    unix_table: Option<unix::Table>,
    packet_table: Option<HashMap<u32, diag::Packet>>,
    /// What no call tells of them.
    hidden: hidden::Hidden,
    /// `SO_REUSEPORT` groups.
    groups_of_ports: reuseport::Groups,
    /// The options of new sockets.
    usuals: option_own::Usuals,
    /// Threads that read the options of connections meanwhile.
    readers: stream_options::Readers,
    /// Addresses that sockets are bound to: does an interface have them?
    local: HashMap<IpAddr, bool>,
    /// Multicast groups of the network namespace.
    groups: Option<Vec<rewake_proc::net::Group>>,
    /// Tables of /proc/net, by name and inode number.
    listed: HashMap<&'static str, HashMap<u64, rewake_proc::net::Socket>>,
}

impl Survey {
    /// Does an interface have this address, as far as can be told?
    fn is_local(&mut self, ip: IpAddr) -> bool {
        let told = match ip {
            IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback(),
            // Link-local ones depend on the interface.
            IpAddr::V6(ip) => {
                !ip.is_unspecified()
                    && !ip.is_multicast()
                    && !ip.is_loopback()
                    && !ip.is_unicast_link_local()
            }
        };
        let try_it = || {
            let absent = Some(libc::EADDRNOTAVAIL);
            std::net::UdpSocket::bind((ip, 0)).err().and_then(|e| e.raw_os_error()) != absent
        };
        !told || *self.local.entry(ip).or_insert_with(try_it)
    }

    /// Whether there is nothing to be locked or read.
    #[must_use]
    pub fn is_without_connections(&self) -> bool {
        self.connections.is_empty() && self.waiting.is_empty() && self.half_open.is_empty()
    }

    fn diag(&mut self) -> Result<&mut Socket, Error> {
        if self.diag.is_none() {
            self.diag = Some(diag::open()?);
        }
        // It has just been put there.
        self.diag.as_mut().ok_or(Error::Unsteady)
    }

    /// Whether a socket belongs to the network namespace that we are in, where a restore would put it.
    fn is_own_netns(&mut self, fd: BorrowedFd<'_>) -> Result<bool, String> {
        let own = match self.netns {
            Some(own) => own,
            None => {
                let own = netns_cookie(self.diag().map_err(|e| e.to_string())?.as_fd())?;
                self.netns = Some(own);
                own
            }
        };
        Ok(netns_cookie(fd)? == own)
    }

    /// What sock_diag tells of a packet socket.
    fn packet(&mut self, inode: u32) -> Result<Option<diag::Packet>, Error> {
        if self.packet_table.is_none() {
            self.packet_table = Some(diag::packet(self.diag()?)?);
        }
        Ok(self.packet_table.as_ref().and_then(|table| table.get(&inode)).cloned())
    }

    /// What sock_diag tells of an internet socket; nothing of one that is not bound.
    fn inet(
        &mut self,
        family: u32,
        protocol: u32,
        inode: u32,
    ) -> Result<Option<diag::Inet>, Error> {
        let key = (family, protocol);
        if !self.inet_tables.contains_key(&key) {
            let table = diag::inet(self.diag()?, family as u8, protocol as u8)?;
            self.inet_tables.insert(key, table);
        }
        Ok(self.inet_tables[&key].get(&inode).copied())
    }

    /// What sock_diag tells of a TCP socket; nothing of one that is not bound.
    fn tcp(&mut self, family: u32, inode: u32) -> Result<Option<Arc<diag::Tcp>>, Error> {
        if !self.tcp_tables.contains_key(&family) {
            let table = diag::tcp(self.diag()?, family as u8)?;
            let table = table.into_iter().map(|(inode, record)| (inode, Arc::new(record)));
            self.tcp_tables.insert(family, table.collect());
        }
        Ok(self.tcp_tables[&family].get(&inode).cloned())
    }

    /// What sock_diag tells of all unix sockets.
    fn unix_table(&mut self) -> Result<&unix::Table, Error> {
        if self.unix_table.is_none() {
            self.unix_table = Some(unix::Table::new(diag::unix(self.diag()?)?));
        }
        // It has just been put there.
        self.unix_table.as_ref().ok_or(Error::Unsteady)
    }

    /// What `rewake.img` says of messages in the queues of unix sockets.
    pub fn packets_extra(&self) -> impl Iterator<Item = &RewakePacketEntry> {
        let told = |e: &&RewakePacketEntry| {
            !e.credentials.is_empty() || e.sender.is_some() || e.oob.is_some()
        };
        self.packets.iter().map(|packet| &packet.extra).filter(told)
    }
}

fn netns_cookie(fd: BorrowedFd<'_>) -> Result<[u8; 8], String> {
    let cookie = option::<8>(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE);
    cookie.map(|(cookie, _)| cookie).map_err(|e| e.to_string())
}

/// Surveys a socket of any family.
///
/// # Errors
/// Why it cannot be saved.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let get = |name| {
        option_int(view.as_fd(), libc::SOL_SOCKET, name)
            .map_err(|e| view.problem(format!("its kind cannot be read: {e}")))
    };
    let (family, kind, protocol) =
        (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?);
    match collector.sockets.is_own_netns(view.as_fd()) {
        Ok(true) => {}
        Ok(false) => {
            return Err(view
                .problem("sockets of another network namespace cannot be saved yet")
                .remedy("run rewake in the network namespace of the tree"));
        }
        Err(e) => {
            return Err(view.problem(format!("its network namespace cannot be told: {e}")));
        }
    }
    let refused = |what: &str| Err(view.problem(format!("{what} cannot be saved")));
    let (id, done) = match family {
        libc::AF_INET | libc::AF_INET6 => inet::survey(collector, view, family, kind, protocol),
        libc::AF_UNIX => unix::survey(collector, view, kind),
        libc::AF_NETLINK => netlink::survey(collector, view, kind, protocol),
        libc::AF_PACKET => packet_socket::survey(collector, view, kind),
        libc::AF_VSOCK => vsock::survey(collector, view, kind),
        libc::AF_XDP => refused("express data path sockets (AF_XDP)"),
        libc::AF_CAN => refused("CAN bus sockets (AF_CAN)"),
        libc::AF_BLUETOOTH => refused("Bluetooth sockets (AF_BLUETOOTH)"),
        libc::AF_ALG => refused("kernel crypto sockets (AF_ALG)"),
        libc::AF_TIPC => refused("TIPC sockets (AF_TIPC)"),
        libc::AF_RDS => refused("RDS sockets (AF_RDS)"),
        SMC => refused("SMC sockets (AF_SMC)"),
        family => refused(&format!("sockets of address family {family}")),
    }?;
    // Those of connections are read with their queues.
    if !collector.sockets.connections.last().is_some_and(|c| c.is(id)) {
        option_own::survey(collector, view, id, (family, kind, protocol))?;
    }
    let (uid, gid) = (view.stat.st_uid, view.stat.st_gid);
    if (uid, gid) != (0, 0) {
        let extra = collector.extra_of(id);
        (extra.uid, extra.gid) = (Some(uid), Some(gid));
    }
    Ok((id, done))
}

/// Makes a socket of the image.
///
/// # Errors
/// Why it cannot be made.
pub(crate) fn open(opener: &mut Opener<'_>, file: &FileEntry) -> Result<OwnedFd, Problem> {
    let absent = || Problem::new(format!("file id {}", file.id), "its entry is missing");
    let (fd, object) = match FdTypes::try_from(file.r#type) {
        Ok(FdTypes::Inetsk) => {
            let entry = file.isk.as_deref().ok_or_else(absent)?;
            if opener.sockets.sharing.is_none() {
                opener.sockets.sharing = Some(inet::sharing(opener));
            }
            (inet::open(opener, entry)?.0, inet::describe(entry))
        }
        Ok(FdTypes::Unixsk) => {
            let entry = file.usk.as_deref().ok_or_else(absent)?;
            (unix_open::open(opener, entry)?, unix_open::describe(entry))
        }
        Ok(FdTypes::Netlinksk) => {
            let entry = file.nlsk.as_deref().ok_or_else(absent)?;
            (netlink::open(opener, entry)?, netlink::describe(entry))
        }
        Ok(FdTypes::Packetsk) => {
            let entry = file.psk.as_deref().ok_or_else(absent)?;
            (packet_socket::open(opener, entry)?, packet_socket::describe(entry))
        }
        Ok(FdTypes::Ext) => {
            let extra = opener.extra.get(&file.id).and_then(|extra| extra.vsock.clone());
            let entry = extra.ok_or_else(|| {
                Problem::new(
                    format!("file id {}", file.id),
                    "it was saved by a plugin of CRIU, which cannot be run",
                )
            })?;
            (vsock::open(opener, file.id, &entry)?, vsock::describe(&entry))
        }
        _ => return Err(absent()),
    };
    // Those of unix sockets are set when all queues are full.
    if file.usk.is_none() {
        let making = Making { fd: fd.as_fd(), object: &object };
        apply_own(opener, file.id, making, When::Made)?;
        set_owner(opener, file.id, making);
    }
    note_last(opener, file.id, object);
    Ok(fd)
}

/// Has the options of a socket that come last set when the tasks go on.
fn note_last(opener: &mut Opener<'_>, id: u32, object: String) {
    if opener.extra.get(&id).is_some_and(|extra| !extra.socket_options.is_empty()) {
        opener.sockets.last.push((id, object));
    }
}

/// Makes all TCP connections of the image, a share of them on each CPU: with the first one that is asked for. Returns them
/// by file id.
///
/// # Errors
/// One cannot be made.
pub(crate) fn open_connections(opener: &mut Opener<'_>) -> Result<Vec<(u32, OwnedFd)>, Problem> {
    if std::mem::replace(&mut opener.sockets.connections_made, true) {
        return Ok(Vec::new());
    }
    repair::prepare(opener)?;
    accept_queue::load(opener)?;
    let waiting = accept_queue::ids(opener);
    let is_one = |file: &&FileEntry| {
        file.isk.as_deref().is_some_and(inet::is_connection)
            && !waiting.contains(&file.id)
            && !crate::files::external::replaces(opener, file)
    };
    let shared = &*opener;
    let mut files: Vec<&FileEntry> = shared.files.values().filter(is_one).collect();
    // In the order of the images, neighbours of which are mostly the ends of one connection.
    files.sort_unstable_by_key(|file| file.id);
    let shares = files.chunks(stream::share(files.len())).map(|share| (share, ()));
    let made = stream::at_once(shares, |share: &[&FileEntry], ()| {
        share.iter().map(|file| open_connection(shared, file)).collect::<Result<Vec<_>, _>>()
    })?;
    let mut descriptors = Vec::with_capacity(files.len());
    for Connection { id, fd, object, pending } in made.into_iter().flatten() {
        opener.sockets.connections.extend(pending);
        note_last(opener, id, object);
        descriptors.push((id, fd));
    }
    Ok(descriptors)
}

/// A connection that was made.
struct Connection {
    id: u32,
    fd: OwnedFd,
    object: String,
    pending: Option<repair::Pending>,
}

fn open_connection(opener: &Opener<'_>, file: &FileEntry) -> Result<Connection, Problem> {
    let absent = || Problem::new(format!("file id {}", file.id), "its entry is missing");
    let entry = file.isk.as_deref().ok_or_else(absent)?;
    let object = inet::describe(entry);
    let (fd, pending) = inet::open(opener, entry)?;
    let making = Making { fd: fd.as_fd(), object: &object };
    apply_own(opener, file.id, making, When::Made)?;
    set_owner(opener, file.id, making);
    crate::files::open::apply_common(file, fd.as_fd())?;
    Ok(Connection { id: file.id, fd, object, pending })
}

/// Gives a socket to its owner: members of a `SO_REUSEPORT` group have to have the same, and packet filters ask for it.
fn set_owner(opener: &Opener<'_>, id: u32, making: Making<'_>) {
    let Some(extra) = opener.extra.get(&id).filter(|e| e.uid.is_some() || e.gid.is_some()) else {
        return;
    };
    let uid = extra.uid.map(rustix::fs::Uid::from_raw);
    let gid = extra.gid.map(rustix::fs::Gid::from_raw);
    if let Err(e) = rustix::fs::fchown(making.fd, uid, gid) {
        log::warn!("{}: it cannot be given to its owner: {e}", making.object);
    }
}

/// Sets the options of `rewake.img` that are to be set in a phase.
fn apply_own(opener: &Opener<'_>, id: u32, making: Making<'_>, when: When) -> Result<(), Problem> {
    let Some(extra) = opener.extra.get(&id).filter(|e| !e.socket_options.is_empty()) else {
        return Ok(());
    };
    let image = opener.files.get(&id).and_then(|file| file.isk.as_deref());
    let kinds = match image {
        Some(entry) => Kinds::of(entry.family as i32, entry.r#type as i32, entry.proto as i32),
        None => {
            let get = |name| {
                option_int(making.fd, libc::SOL_SOCKET, name)
                    .map_err(|e| making.problem(e.to_string()))
            };
            Kinds::of(get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?)
        }
    };
    option_own::apply(making, &extra.socket_options, kinds, when)
}

/// Lets all TCP connections go on, and sets what must be set last. To be called when all tasks exist and just before they
/// go on.
///
/// # Errors
/// A connection refuses; others may go on already.
pub(crate) fn set_going(opener: &mut Opener<'_>) -> Result<(), Problem> {
    repair::leave_repair(opener)?;
    ended::end(opener)?;
    for id in opener.sockets.sharing.take().unwrap_or_default() {
        let (Ok(fd), Some(entry)) = (opener.opened(id), opener.files.get(&id)) else { continue };
        if entry.isk.as_ref().is_some_and(|s| s.opts.so_reuseport != Some(true)) {
            bind::alone(Making { fd, object: "a socket that shares its port" })?;
        }
    }
    for (id, object) in std::mem::take(&mut opener.sockets.last) {
        apply_own(opener, id, Making { fd: opener.opened(id)?, object: &object }, When::Last)?;
    }
    Ok(())
}

/// Which network namespace a socket belongs to (Linux 5.14).
const SO_NETNS_COOKIE: i32 = 71;

/// `AF_SMC`
const SMC: i32 = 43;

/// Writes what was in queues: `sk-queues.img` and the streams of TCP connections.
///
/// # Errors
/// They cannot be written.
pub fn write(images: &ImageWriter, survey: &Survey) -> Result<(), rewake_image::ImageError> {
    let mut queues = images.stream(kind::SK_QUEUES, ());
    for packet in &survey.packets {
        queues.push(&packet.entry)?;
        queues.payload(&packet.data)?;
    }
    queues.finish()?;
    stream::write(images, &survey.connections)?;
    survey.waiting.iter().try_for_each(|waiting| waiting.write(images))
}

/// What a restore keeps of sockets until the tasks go on.
#[derive(Debug, Default)]
pub struct Restore {
    /// TCP connections in repair mode.
    connections: Vec<repair::Pending>,
    /// TCP connections that are to wait to be accepted.
    waiting: Vec<accept_queue::Saved>,
    /// Unix sockets by inode number of the image.
    unix: HashMap<u32, unix_open::State>,
    /// How ids of processes are to be understood.
    pids: Pids,
    unix_loaded: bool,
    unix_made: bool,
    unix_filling: bool,
    unix_filled: bool,
    /// The files of bound unix sockets.
    places: unix_path::Places,
    /// Connections of unix sockets that wait to be accepted and have something in their queues.
    line: unix_waiting::Line,
    /// Receive queues by file id.
    packets: HashMap<u32, Vec<unix_fill::Packet>>,
    /// Source and destination of each connection in the image: who finds itself reversed has its peer in the tree.
    ends: HashSet<repair::Ends>,
    /// `SO_REUSEPORT` groups that have been made.
    port_groups: HashSet<u32>,
    /// Whether all connections are made.
    connections_made: bool,
    /// Inet sockets that share their ports without `SO_REUSEPORT`, which they have until the tasks go on; found with the
    /// first that is asked for.
    sharing: Option<HashSet<u32>>,
    /// Sockets that have options in `rewake.img`, by file id, and how error texts call them.
    last: Vec<(u32, String)>,
}

impl Restore {
    /// What was made in file systems, without the sockets.
    #[must_use]
    pub fn into_made(self) -> Made {
        Made(self.places)
    }
}

/// What a restore has made in file systems; dropping it removes that.
#[derive(Debug)]
pub struct Made(unix_path::Places);

impl Made {
    /// Lets it stay: the restore has succeeded.
    pub fn keep(mut self) {
        self.0.keep();
    }
}

/// The number of a network interface by the name in the image.
fn interface_index(fd: BorrowedFd<'_>, name: &[u8]) -> Result<u32, String> {
    let shown = text(name);
    rustix::net::netdevice::name_to_index(fd, &shown)
        .map_err(|e| format!("network interface {shown}: {e}"))
}
