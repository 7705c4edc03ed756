//! TCP connections that have ended, with something that their program does not know yet: bytes that are not read, the error
//! that ended them.
//!
//! What a program finds in such a socket depends on how the connection ended: after FINs of both sides it reads what has come and
//! then the end of the stream; after a reset what has come and then the error. So a restore has a connection end in the same
//! way: one to nobody, made in repair mode at the old address, filled with the bytes, and ended by a segment that we send to
//! ourselves. What the kernel answers reaches nobody either.

use super::inet::{self, CLOSE, CLOSE_WAIT, CLOSING};
use super::options::{self, Making};
use super::packet::{ACK, Courier, FIN, RST, Segment, arrives};
use super::{Survey, ip, repair, stream};
use crate::Problem;
use crate::files::collect::View;
use crate::files::open::Opener;
use rewake_image::messages::{InetSkEntry, RewakeEndedEntry, SkShutdown};
use rewake_sys::SyscallError;
use rewake_sys::tcp::{self, Queue, Repair, Window};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Both sides closed it.
    Closed,
    /// The peer reset it, before or after it had closed its side.
    Reset { closed: bool },
    /// The peer closed its side and then reset it.
    Broken,
    /// There was never one.
    Refused,
}

impl End {
    /// By the error that waits for the program, and whether the stream was at its end.
    fn of(error: i32, done: bool) -> Option<End> {
        Some(match error {
            0 => End::Closed,
            libc::ECONNRESET => End::Reset { closed: done },
            libc::EPIPE => End::Broken,
            libc::ECONNREFUSED => End::Refused,
            _ => return None,
        })
    }
}

/// Looks at a socket whose connection has ended: what is to be kept of it. `failed` says that an error waits, `source` where
/// it was.
///
/// # Errors
/// There are bytes in it that cannot be kept.
pub(super) fn survey(
    sockets: &mut Survey,
    view: &View<'_>,
    source: SocketAddr,
    failed: bool,
    waiting: usize,
) -> Result<Option<RewakeEndedEntry>, Problem> {
    if !failed && waiting == 0 {
        return Ok(None);
    }
    // Reading the error would take it away.
    let told = if failed { sockets.hidden.of(view).map(Some) } else { Ok(None) };
    let end = match told {
        Ok(None) => Ok((0, false)),
        Ok(Some(told)) if End::of(told.error, told.done).is_some() => Ok((told.error, told.done)),
        Ok(Some(told)) => Err(Errno::from_raw_os_error(told.error).to_string()),
        Err(why) => Err(format!("which one is not known: {why}")),
    };
    let (error, done) = match end {
        Ok(end) => end,
        Err(why) if waiting == 0 => {
            log::warn!(
                "{}: the error that ended its connection is not saved ({why})",
                view.object()
            );
            return Ok(None);
        }
        Err(why) => {
            return Err(view
                .problem(format!(
                    "its TCP connection has ended with an error, and {waiting} bytes of it are not read yet; they cannot be saved ({why})"
                ))
                .remedy("--tcp-close drops them; or try again once the program has read them"));
        }
    };
    let received = match waiting {
        // Nothing but the error would be read.
        0 => Vec::new(),
        _ => stream::peek_all(view.as_fd(), waiting)
            .map_err(|e| view.problem(format!("what it has received cannot be read: {e}")))?,
    };
    let address = match source.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    Ok(Some(RewakeEndedEntry {
        address,
        port: source.port().into(),
        error: (error != 0).then_some(error as u32),
        done: done.then_some(true),
        received,
    }))
}

/// Where nobody is: an address of this host to which a socket is bound that does not listen.
struct Nobody {
    _socket: OwnedFd,
    address: SocketAddr,
}

impl Nobody {
    fn new(mut at: SocketAddr) -> Result<Nobody, Errno> {
        let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        at.set_port(0);
        rustix::net::bind(&socket, &at)?;
        let address = rustix::net::getsockname(&socket)?;
        let address = SocketAddr::try_from(address).map_err(|_| Errno::AFNOSUPPORT)?;
        Ok(Nobody { _socket: socket, address })
    }
}

/// What is told of the ended connections of an image is brought about. All other sockets are there.
///
/// # Errors
/// It cannot be.
pub(super) fn end(opener: &Opener<'_>) -> Result<(), Problem> {
    let mut courier = Courier::default();
    for (id, extra) in &opener.extra {
        let Some(ended) = &extra.ended else { continue };
        let (Ok(fd), Some(entry)) =
            (opener.opened(*id), opener.files.get(id).and_then(|file| file.isk.as_deref()))
        else {
            continue;
        };
        let object = format!("TCP socket of an ended connection ({})", entry.ino);
        let making = Making { fd, object: &object };
        match connect_and_end(making, entry, ended, &mut courier) {
            Err(e) if e.0 == Errno::PERM && ended.received.is_empty() => {
                log::warn!(
                    "{object}: the error that ended its connection is not restored: {}",
                    e.1
                );
                inet::shut_down(making, SkShutdown::Both as i32)?;
            }
            Err(e) if e.0 == Errno::PERM => {
                return Err(making
                    .problem(format!("what it has received cannot be put into it: {}", e.1))
                    .remedy(
                        "restore with CAP_NET_ADMIN and CAP_NET_RAW in its network namespace",
                    ));
            }
            Err(e) => {
                return Err(
                    making.problem(format!("its connection cannot be made to end again: {}", e.1))
                );
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// What went wrong, also in words.
struct Failed(Errno, String);

impl From<SyscallError> for Failed {
    fn from(e: SyscallError) -> Failed {
        Failed(e.errno, e.to_string())
    }
}

fn named(what: &'static str) -> impl Fn(Errno) -> Failed {
    move |e| Failed(e, format!("{what}: {e}"))
}

impl From<Problem> for Failed {
    fn from(e: Problem) -> Failed {
        Failed(Errno::INVAL, e.to_string())
    }
}

fn connect_and_end(
    making: Making<'_>,
    entry: &InetSkEntry,
    ended: &RewakeEndedEntry,
    courier: &mut Courier,
) -> Result<(), Failed> {
    const FIRST: u32 = 1 << 20;
    let fd = making.fd;
    let damaged = |what: &str| Failed(Errno::INVAL, format!("the image has no valid {what}"));
    let end = End::of(ended.error.unwrap_or(0) as i32, ended.done == Some(true))
        .ok_or_else(|| damaged("error"))?;
    let wanted = inet::local_address(entry, making, &ended.address, ended.port)
        .ok_or_else(|| damaged("address"))??;
    // Another process may have the port, or the program itself.
    tcp::repair(fd, Repair::On)?;
    let source = match rustix::net::bind(fd, &wanted) {
        Ok(()) => wanted,
        Err(Errno::ADDRNOTAVAIL) => {
            let here = with_ip(wanted, loopback(wanted.ip()));
            log::warn!(
                "{}: its connection has ended; it was at {wanted}, an address that no interface here has, and comes back at {here}",
                making.object
            );
            rustix::net::bind(fd, &here).map_err(named("bind"))?;
            here
        }
        Err(e) => return Err(named("bind")(e)),
    };
    let near = if source.ip().is_unspecified() { loopback(source.ip()) } else { source.ip() };
    let nobody = Nobody::new(with_ip(source, near)).map_err(named("bind"))?;
    if end == End::Refused {
        tcp::repair(fd, Repair::OffSilent)?;
        rustix::io::ioctl_fionbio(fd, true).map_err(named("FIONBIO"))?;
        // The answer comes by the loopback before this returns, or the error waits.
        let connected = rustix::net::connect(fd, &nobody.address);
        let blocking = entry.flags & libc::O_NONBLOCK as u32 == 0;
        rustix::io::ioctl_fionbio(fd, !blocking).map_err(named("FIONBIO"))?;
        if connected != Err(Errno::INPROGRESS) {
            return Err(Failed(Errno::INVAL, "a connection to nobody is not refused".to_owned()));
        }
    } else {
        tcp::choose_queue(fd, Queue::Receive)?;
        tcp::set_sequence(fd, FIRST)?;
        tcp::choose_queue(fd, Queue::Send)?;
        tcp::set_sequence(fd, FIRST)?;
        rustix::net::connect(fd, &nobody.address).map_err(named("connect"))?;
        options::make_room(making, ended.received.len(), 0)?;
        tcp::choose_queue(fd, Queue::Receive)?;
        repair::fill(fd, &ended.received).map_err(named("its queue"))?;
        let next = FIRST.wrapping_add(ended.received.len() as u32);
        // Room for a segment more.
        let window = Window { rcv_wnd: 1 << 16, rcv_wup: next, ..tcp::window(fd)? };
        tcp::set_window(fd, window)?;
        // What is sent with this queue in repair mode counts as sent.
        tcp::choose_queue(fd, Queue::Send)?;
        let mut segment = |flags, acknowledged| {
            let (from, to) = (nobody.address, with_ip(source, near));
            let sequence = next.wrapping_add(u32::from(flags == RST && end.is_closed()));
            let (window, options, data) = (1 << 10, &[][..], &[][..]);
            courier
                .deliver(&Segment {
                    from,
                    to,
                    sequence,
                    acknowledged,
                    flags,
                    window,
                    options,
                    data,
                })
                .map_err(named("a packet to itself"))
        };
        if matches!(end, End::Closed | End::Reset { closed: true }) {
            rustix::net::shutdown(fd, Shutdown::Write).map_err(named("shutdown"))?;
        }
        match end {
            // With the last acknowledgement the connection is over.
            End::Closed => segment(FIN | ACK, FIRST + 1)?,
            End::Reset { closed: false } => segment(RST, 0)?,
            End::Reset { closed: true } | End::Broken | End::Refused => {
                segment(FIN | ACK, FIRST)?;
                // The answer to that has met nobody, and has been answered by a reset.
                segment(RST, 0)?;
            }
        }
    }
    let mut state = 0;
    arrives(|| {
        state = u32::from(tcp::info(fd)?.state);
        Ok::<_, SyscallError>(state == CLOSE)
    })?;
    tcp::repair(fd, Repair::OffSilent)?;
    if state != CLOSE {
        let what = match state {
            CLOSE_WAIT | CLOSING => "a reset",
            _ => "a packet",
        };
        let text = format!("{what} to itself did not arrive (state {state})");
        return Err(Failed(Errno::INVAL, text));
    }
    ip::apply(making, entry)?;
    options::apply(making, &entry.opts)?;
    Ok(inet::apply_tcp(making, entry)?)
}

impl End {
    /// Is a reset behind a FIN?
    fn is_closed(self) -> bool {
        matches!(self, End::Broken | End::Reset { closed: true })
    }
}

/// Another address; its interface is kept.
fn with_ip(mut address: SocketAddr, ip: IpAddr) -> SocketAddr {
    address.set_ip(ip);
    address
}

fn loopback(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => {
            Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()
        }
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Makes the socket of an ended connection as far as can be done before others are there.
pub(super) fn prepare(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    ip::apply_before_bind(making, entry)?;
    options::apply_before_bind(making, &entry.opts, true)
}
