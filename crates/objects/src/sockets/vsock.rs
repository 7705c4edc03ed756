//! vsock sockets, to and from a virtual machine's host: vsock(7). Those that are new, bound or listening; a connection ends
//! with either end's machine state, so it is refused.
//!
//! CRIU does not know them: in `files.img` they are files of a plugin (`EXT`), of which `rewake.img` has the rest.

use super::option_table::When;
use super::options::{self, Making};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::files::open::Opener;
use rewake_image::messages::{FdTypes, RewakeVsockEntry};
use rewake_sys::file;
use rewake_sys::sockets::{bind_to, option_int, own_address};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// `VMADDR_CID_ANY`, `VMADDR_PORT_ANY`
const ANY: u32 = u32::MAX;
/// Where `struct sockaddr_vm` has its parts.
const PORT: usize = 4;
const CID: usize = 8;
const ADDRESS: usize = 16;
/// The backlog cannot be read back: as large as the kernel lets it be.
const BACKLOG: i32 = i32::MAX;

/// Surveys a vsock socket of type `kind` (`SOCK_*`).
///
/// # Errors
/// It is connected, or a client waits to be accepted.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
) -> Result<(u32, FdTypes), Problem> {
    let fd = view.as_fd();
    let close = "have the program close it for the time of the dump";
    match rustix::net::getpeername(fd) {
        Err(Errno::NOTCONN) => {}
        Ok(None) => {}
        _ => {
            let reason =
                "vsock connections (AF_VSOCK: to a virtual machine's host) cannot be saved";
            return Err(view.problem(reason).remedy(close));
        }
    }
    let listening = option_int(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)
        .map_err(|e| view.problem(format!("its state cannot be read: {e}")))?
        != 0;
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let waiting = poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
        && wanted[0].revents().contains(PollFlags::IN);
    if listening && waiting && !collector.options.skip_in_flight {
        return Err(view
            .problem("vsock connections wait to be accepted, which cannot be saved")
            .remedy("--skip-in-flight drops them: their clients have to connect again"));
    }
    let address = own_address(fd).map_err(|e| view.problem(format!("its address: {e}")))?;
    let word = |at: usize| address[at..].first_chunk().map_or(ANY, |w| u32::from_ne_bytes(*w));
    let entry = RewakeVsockEntry {
        r#type: kind as u32,
        cid: word(CID),
        port: word(PORT),
        listening,
        flags: view.flags,
        opts: options::survey(view, false)?,
    };
    let id = collector.new_id();
    collector.extra_of(id).vsock = Some(entry);
    Ok((id, collector.push_foreign(id, view)?))
}

/// How error texts call a socket of the image.
pub(super) fn describe(entry: &RewakeVsockEntry) -> String {
    let number = |n: u32| if n == ANY { "any".to_owned() } else { n.to_string() };
    format!("vsock socket {}:{}", number(entry.cid), number(entry.port))
}

/// Makes a vsock socket of the image.
///
/// # Errors
/// Its port is in use, or this kernel has no vsock.
pub(super) fn open(
    opener: &Opener<'_>,
    id: u32,
    entry: &RewakeVsockEntry,
) -> Result<OwnedFd, Problem> {
    let object = describe(entry);
    let fd = rustix::net::socket_with(
        AddressFamily::VSOCK,
        SocketType::from_raw(entry.r#type),
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| Problem::new(object.as_str(), format!("cannot be made: {e}")))?;
    let making = Making { fd: fd.as_fd(), object: &object };
    super::apply_own(opener, id, making, When::BeforeBind)?;
    options::apply_before_bind(making, &entry.opts, false)?;
    if entry.port != ANY {
        let mut address = [0; ADDRESS];
        address[..2].copy_from_slice(&(libc::AF_VSOCK as u16).to_ne_bytes());
        address[PORT..CID].copy_from_slice(&entry.port.to_ne_bytes());
        address[CID..CID + 4].copy_from_slice(&entry.cid.to_ne_bytes());
        bind_to(making.fd, &address).map_err(|e| match e.errno {
            Errno::ADDRINUSE => making
                .problem("its address is in use")
                .remedy("end the process that has it (ss --vsock -lp tells)"),
            Errno::ADDRNOTAVAIL => making
                .problem("this machine does not have its context identifier")
                .remedy("a program that binds to VMADDR_CID_ANY can be restored in any machine"),
            _ => making.problem(format!("cannot be bound: {e}")),
        })?;
    }
    if entry.listening {
        rustix::net::listen(making.fd, BACKLOG)
            .map_err(|e| making.problem(format!("cannot listen: {e}")))?;
    }
    options::apply(making, &entry.opts)?;
    let settable = entry.flags & (libc::O_NONBLOCK | libc::O_ASYNC) as u32;
    file::set_flags(making.fd, settable).map_err(|e| making.problem(e.to_string()))?;
    Ok(fd)
}
