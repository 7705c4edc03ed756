//! Options that all sockets have: socket(7). The table of those that are numbers is [`option_table`](super::option_table);
//! here are the others, and how any is set.

use super::option_table::{Default, Field, Kinds, OPTIONS, Place, SocketOption, When};
use super::reading::Reading;
use crate::Problem;
use crate::files::collect::View;
use crate::problem::text;
use rewake_image::messages::SkOptsEntry;
use rewake_sys::sockets::{attach_filter, filter, option, option_int, set_option, set_option_int};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::BorrowedFd;

const SOCKET: i32 = libc::SOL_SOCKET;
/// Which buffer sizes were set by the program, and are not tuned by the kernel (Linux 5.14).
const SO_BUF_LOCK: i32 = 72;

/// Reads the options. `local` sockets are those whose messages can carry credentials: unix and netlink.
///
/// # Errors
/// An eBPF filter is attached.
pub fn survey(view: &View<'_>, local: bool) -> Result<SkOptsEntry, Problem> {
    read(Making { fd: view.as_fd(), object: &view.object() }.into(), local)
}

/// The same without all else that is known of a descriptor.
///
/// # Errors
/// As [`survey`].
pub fn read(reading: Reading<'_>, local: bool) -> Result<SkOptsEntry, Problem> {
    let socket = reading.socket;
    let fd = socket.fd;
    let failed = |e: SyscallError| socket.problem(format!("its options cannot be read: {e}"));
    let unsigned = |name| reading.int(SOCKET, name).map(|v| v as u32).map_err(failed);
    let (send_seconds, send_microseconds) = time(fd, libc::SO_SNDTIMEO).map_err(failed)?;
    let (receive_seconds, receive_microseconds) = time(fd, libc::SO_RCVTIMEO).map_err(failed)?;
    let so_filter = match reading.filter {
        Some(filter) => filter.to_vec(),
        None => classic_filter(socket)?,
    };
    let (linger, _) = option::<8>(fd, SOCKET, libc::SO_LINGER).map_err(failed)?;
    let (on, seconds) = words(linger);
    let device = match reading.known {
        Some(known) if known.interface == 0 => Vec::new(),
        _ => device(fd).map_err(failed)?,
    };
    let mut entry = SkOptsEntry {
        so_sndbuf: unsigned(libc::SO_SNDBUF)?,
        so_rcvbuf: unsigned(libc::SO_RCVBUF)?,
        so_snd_tmo_sec: send_seconds,
        so_snd_tmo_usec: send_microseconds,
        so_rcv_tmo_sec: receive_seconds,
        so_rcv_tmo_usec: receive_microseconds,
        so_bound_dev: Some(device).filter(|name| !name.is_empty()),
        so_filter,
        so_linger: (on != 0).then_some(seconds as u32),
        so_buf_lock: option_int(fd, SOCKET, SO_BUF_LOCK).ok().map(|lock| lock as u32),
        ..SkOptsEntry::default()
    };
    let kinds = if local { Kinds::LOCAL } else { Kinds::REMOTE };
    for (row, field) in OPTIONS.iter().filter_map(in_socket).filter(|(row, _)| row.kinds.any(kinds))
    {
        let value = reading
            .int(row.level, row.number)
            .map_err(|e| socket.problem(format!("{} cannot be read: {e}", row.name)))?;
        if value != 0 || field.always {
            (field.put)(&mut entry, value);
        }
    }
    Ok(entry)
}

/// The interface a socket is bound to (`SO_BINDTODEVICE`).
fn device(fd: BorrowedFd<'_>) -> Result<Vec<u8>, SyscallError> {
    let (device, length) = option::<16>(fd, SOCKET, libc::SO_BINDTODEVICE)?;
    Ok(device[..length].split(|b| *b == 0).next().unwrap_or_default().to_vec())
}

/// The classic BPF filter of a socket.
fn classic_filter(socket: Making<'_>) -> Result<Vec<u64>, Problem> {
    filter(socket.fd).map_err(|e| match e.errno {
        Errno::ACCESS => socket
            .problem("it has an eBPF filter attached (SO_ATTACH_BPF), which cannot be saved")
            .remedy("have the program detach it for the time of the dump (SO_DETACH_FILTER)"),
        _ => socket.problem(format!("its options cannot be read: {e}")),
    })
}

/// The classic BPF filter of a socket whose other options are read later.
///
/// # Errors
/// An eBPF filter is attached.
pub fn filter_of(view: &View<'_>) -> Result<Vec<u64>, Problem> {
    classic_filter(Making { fd: view.as_fd(), object: &view.object() })
}

/// The option and its field, if it has one in [`SkOptsEntry`].
fn in_socket(
    row: &'static SocketOption,
) -> Option<(&'static SocketOption, &'static Field<SkOptsEntry>)> {
    match &row.place {
        Place::Socket(field) => Some((row, field)),
        _ => None,
    }
}

fn words(bytes: [u8; 8]) -> (i32, i32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (i32::from_ne_bytes([a, b, c, d]), i32::from_ne_bytes([e, f, g, h]))
}

/// A `struct timeval`.
fn time(fd: BorrowedFd<'_>, name: i32) -> Result<(u64, u64), SyscallError> {
    let (bytes, _) = option::<16>(fd, SOCKET, name)?;
    let word = u128::from_ne_bytes(bytes);
    let (low, high) = (word as u64, (word >> 64) as u64);
    Ok(if cfg!(target_endian = "little") { (low, high) } else { (high, low) })
}

/// A socket in the making, or one that is looked at: its descriptor, and how error texts call it.
#[derive(Debug, Clone, Copy)]
pub struct Making<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Family, type and address.
    pub object: &'a str,
}

impl Making<'_> {
    /// Sets an option that the image names.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn set(&self, level: i32, name: i32, what: &str, value: i32) -> Result<(), Problem> {
        set_option_int(self.fd, level, name, value).map_err(|e| self.refused(what, value, &e))
    }

    /// Sets an option that the image has a field for, unless it is so anyway.
    ///
    /// # Errors
    /// The kernel refuses it, but not for want of a privilege: that is worth a warning.
    pub(super) fn set_field(
        &self,
        row: &SocketOption,
        default: Default,
        value: i32,
    ) -> Result<(), Problem> {
        let as_it_is = match default {
            Default::Is(default) => value == default,
            Default::Varies => option_int(self.fd, row.level, row.number) == Ok(value),
        };
        if as_it_is {
            return Ok(());
        }
        let set = set_option_int(self.fd, row.level, row.number, value);
        self.settled(row.name, value, set)
    }

    /// Judges how setting an option went: what only privileges or a newer kernel could set is left as it is, with a warning.
    pub(super) fn settled(
        &self,
        what: &str,
        value: impl std::fmt::Display,
        set: Result<(), SyscallError>,
    ) -> Result<(), Problem> {
        match set {
            Err(e) if matches!(e.errno, Errno::PERM | Errno::ACCESS) => {
                log::warn!(
                    "{}: {what} is not restored, for it takes CAP_NET_ADMIN in the network namespace to set it to {value}",
                    self.object
                );
                Ok(())
            }
            Err(e) if matches!(e.errno, Errno::NOPROTOOPT | Errno::OPNOTSUPP) => {
                log::warn!(
                    "{}: {what} is not restored, for this kernel does not have it",
                    self.object
                );
                Ok(())
            }
            other => other.map_err(|e| self.refused(what, value, &e)),
        }
    }

    /// The problem that an option cannot be set.
    pub fn refused(
        &self,
        what: &str,
        value: impl std::fmt::Display,
        error: &SyscallError,
    ) -> Problem {
        self.problem(format!("{what} cannot be set to {value}: {error}"))
    }

    /// A problem with the socket.
    pub fn problem(&self, reason: impl Into<String>) -> Problem {
        Problem::new(self.object, reason)
    }
}

/// Sets what decides where a socket may be bound.
///
/// `SO_REUSEADDR` is set too if `reuse`; [`apply`] puts it back.
///
/// # Errors
/// The interface does not exist.
pub fn apply_before_bind(
    making: Making<'_>,
    options: &SkOptsEntry,
    reuse: bool,
) -> Result<(), Problem> {
    if reuse && options.reuseaddr != Some(true) {
        making.set(SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", 1)?;
    }
    apply_table(making, options, When::BeforeBind)?;
    if let Some(device) = &options.so_bound_dev {
        set_option(making.fd, SOCKET, libc::SO_BINDTODEVICE, device).map_err(|e| {
            let device = text(device);
            if e.errno == Errno::NODEV {
                return making
                    .problem(format!(
                        "it was bound to the network interface {device}, which does not exist here"
                    ))
                    .remedy("create the interface, or restore in a network namespace that has it");
            }
            making.refused("SO_BINDTODEVICE", device, &e)
        })?;
    }
    Ok(())
}

/// Sets all other options, and those that were changed for binding.
///
/// # Errors
/// The kernel refuses one.
pub fn apply(making: Making<'_>, options: &SkOptsEntry) -> Result<(), Problem> {
    let fd = making.fd;
    let reuse = i32::from(options.reuseaddr == Some(true));
    if option_int(fd, SOCKET, libc::SO_REUSEADDR) != Ok(reuse) {
        making.set(SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", reuse)?;
    }
    for (name, what, seconds, microseconds) in [
        (libc::SO_SNDTIMEO, "SO_SNDTIMEO", options.so_snd_tmo_sec, options.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, "SO_RCVTIMEO", options.so_rcv_tmo_sec, options.so_rcv_tmo_usec),
    ] {
        if (seconds, microseconds) != (0, 0) {
            let mut value = [0; 16];
            value[..8].copy_from_slice(&seconds.to_ne_bytes());
            value[8..].copy_from_slice(&microseconds.to_ne_bytes());
            set_option(fd, SOCKET, name, &value)
                .map_err(|e| making.refused(what, format!("{seconds} s {microseconds} µs"), &e))?;
        }
    }
    apply_table(making, options, When::Made)?;
    if let Some(seconds) = options.so_linger {
        let mut value = [0; 8];
        value[..4].copy_from_slice(&1i32.to_ne_bytes());
        value[4..].copy_from_slice(&seconds.to_ne_bytes());
        set_option(fd, SOCKET, libc::SO_LINGER, &value)
            .map_err(|e| making.refused("SO_LINGER", seconds, &e))?;
    }
    apply_buffers(making, options)?;
    if !options.so_filter.is_empty() {
        attach_filter(fd, &options.so_filter)
            .map_err(|e| making.problem(format!("its BPF filter cannot be attached: {e}")))?;
    }
    Ok(())
}

/// Sets the options of a phase that have fields.
fn apply_table(making: Making<'_>, options: &SkOptsEntry, when: When) -> Result<(), Problem> {
    for (row, field) in OPTIONS.iter().filter(|row| row.when == when).filter_map(in_socket) {
        if let Some(value) = (field.get)(options) {
            making.set_field(row, field.default, value)?;
        }
    }
    Ok(())
}

/// Sets the sizes of the buffers, as far as they differ, and whether the kernel may tune them.
///
/// # Errors
/// The kernel refuses one.
pub fn apply_buffers(making: Making<'_>, options: &SkOptsEntry) -> Result<(), Problem> {
    apply_receive_buffer(making, options)?;
    let send = (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, "SO_SNDBUF", options.so_sndbuf);
    apply_buffer(making, options, send)
}

/// Sets the size of the receive buffer alone.
///
/// # Errors
/// The kernel refuses it.
pub fn apply_receive_buffer(making: Making<'_>, options: &SkOptsEntry) -> Result<(), Problem> {
    let receive = (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, "SO_RCVBUF", options.so_rcvbuf);
    apply_buffer(making, options, receive)
}

fn apply_buffer(
    making: Making<'_>,
    options: &SkOptsEntry,
    (name, force, what, size): (i32, i32, &str, u32),
) -> Result<(), Problem> {
    let fd = making.fd;
    let lock = options.so_buf_lock.unwrap_or(0);
    if option_int(fd, SOCKET, name) != Ok(size as i32) {
        set_buffer(fd, name, force, size).map_err(|e| making.refused(what, size, &e))?;
    } else if option_int(fd, SOCKET, SO_BUF_LOCK).is_ok_and(|now| now as u32 == lock) {
        return Ok(());
    }
    match options.so_buf_lock {
        Some(lock) => making.set(SOCKET, SO_BUF_LOCK, "SO_BUF_LOCK", lock as i32),
        None => Ok(()),
    }
}

/// Sets a buffer to the size that reading the option gives, for which half of it is to be written.
fn set_buffer(fd: BorrowedFd<'_>, name: i32, force: i32, size: u32) -> Result<(), SyscallError> {
    let half = (size / 2) as i32;
    set_option_int(fd, SOCKET, force, half).or_else(|e| match e.errno {
        // Without CAP_NET_ADMIN, what the sysctl allows.
        Errno::PERM => set_option_int(fd, SOCKET, name, half),
        _ => Err(e),
    })
}

/// Makes room for `bytes` that are to be put into a queue; [`apply_buffers`] sets the final size.
///
/// # Errors
/// The kernel refuses it.
pub fn make_room(making: Making<'_>, receive: usize, send: usize) -> Result<(), Problem> {
    for (name, force, what, bytes) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, "SO_SNDBUF", send),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, "SO_RCVBUF", receive),
    ] {
        // The kernel counts what the bytes occupy, which for small pieces is several times as much.
        let wanted = u32::try_from(bytes.saturating_mul(4)).unwrap_or(u32::MAX).min(1 << 30);
        let now = option_int(making.fd, SOCKET, name).unwrap_or(0);
        if bytes != 0 && (now as u32) < wanted {
            set_buffer(making.fd, name, force, wanted)
                .map_err(|e| making.refused(what, wanted, &e))?;
        }
    }
    Ok(())
}
