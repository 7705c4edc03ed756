//! Options that all sockets have: socket(7).

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
    let fd = view.as_fd();
    let failed = |e: SyscallError| view.problem(format!("its options cannot be read: {e}"));
    let number = |name| option_int(fd, SOCKET, name).map_err(failed);
    let unsigned = |name| number(name).map(|v| v as u32);
    let flag = |name| number(name).map(|v| v != 0);
    let (send_seconds, send_microseconds) = time(fd, libc::SO_SNDTIMEO).map_err(failed)?;
    let (receive_seconds, receive_microseconds) = time(fd, libc::SO_RCVTIMEO).map_err(failed)?;
    let so_filter = match filter(fd) {
        Ok(filter) => filter,
        Err(e) if e.errno == Errno::ACCESS => {
            return Err(view.problem("it has an eBPF filter attached, which cannot be saved"));
        }
        Err(e) => return Err(failed(e)),
    };
    let (linger, _) = option::<8>(fd, SOCKET, libc::SO_LINGER).map_err(failed)?;
    let (on, seconds) = words(linger);
    let (device, length) = option::<16>(fd, SOCKET, libc::SO_BINDTODEVICE).map_err(failed)?;
    let device = device[..length].split(|b| *b == 0).next().unwrap_or_default().to_vec();
    let opt = |name| flag(name).map(Some);
    Ok(SkOptsEntry {
        so_sndbuf: unsigned(libc::SO_SNDBUF)?,
        so_rcvbuf: unsigned(libc::SO_RCVBUF)?,
        so_snd_tmo_sec: send_seconds,
        so_snd_tmo_usec: send_microseconds,
        so_rcv_tmo_sec: receive_seconds,
        so_rcv_tmo_usec: receive_microseconds,
        reuseaddr: opt(libc::SO_REUSEADDR)?,
        so_priority: Some(unsigned(libc::SO_PRIORITY)?),
        so_rcvlowat: Some(unsigned(libc::SO_RCVLOWAT)?),
        so_mark: Some(unsigned(libc::SO_MARK)?).filter(|mark| *mark != 0),
        so_passcred: if local { opt(libc::SO_PASSCRED)? } else { None },
        so_passsec: if local { opt(libc::SO_PASSSEC)? } else { None },
        so_dontroute: opt(libc::SO_DONTROUTE)?,
        so_no_check: opt(libc::SO_NO_CHECK)?,
        so_bound_dev: Some(device).filter(|name| !name.is_empty()),
        so_filter,
        so_reuseport: opt(libc::SO_REUSEPORT)?,
        so_broadcast: opt(libc::SO_BROADCAST)?,
        so_keepalive: opt(libc::SO_KEEPALIVE)?,
        so_oobinline: Some(unsigned(libc::SO_OOBINLINE)?),
        so_linger: (on != 0).then_some(seconds as u32),
        so_buf_lock: number(SO_BUF_LOCK).ok().map(|lock| lock as u32),
        ..SkOptsEntry::default()
    })
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

/// A socket in the making: its descriptor, and how error texts call it.
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

    /// Sets a flag of socket(7) that is off in a new socket.
    fn raise(&self, name: i32, what: &str, value: Option<bool>) -> Result<(), Problem> {
        match value {
            Some(true) => self.set(SOCKET, name, what, 1),
            _ => Ok(()),
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
    if reuse || options.reuseaddr == Some(true) {
        making.set(SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", 1)?;
    }
    making.raise(libc::SO_REUSEPORT, "SO_REUSEPORT", options.so_reuseport)?;
    if let Some(mark) = options.so_mark {
        making.set(SOCKET, libc::SO_MARK, "SO_MARK", mark as i32)?;
    }
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
    if let Some(priority) = options.so_priority.filter(|p| *p != 0) {
        making.set(SOCKET, libc::SO_PRIORITY, "SO_PRIORITY", priority as i32)?;
    }
    if let Some(least) = options.so_rcvlowat.filter(|l| *l != 1) {
        making.set(SOCKET, libc::SO_RCVLOWAT, "SO_RCVLOWAT", least as i32)?;
    }
    making.raise(libc::SO_PASSCRED, "SO_PASSCRED", options.so_passcred)?;
    making.raise(libc::SO_PASSSEC, "SO_PASSSEC", options.so_passsec)?;
    making.raise(libc::SO_DONTROUTE, "SO_DONTROUTE", options.so_dontroute)?;
    making.raise(libc::SO_NO_CHECK, "SO_NO_CHECK", options.so_no_check)?;
    making.raise(libc::SO_BROADCAST, "SO_BROADCAST", options.so_broadcast)?;
    making.raise(libc::SO_KEEPALIVE, "SO_KEEPALIVE", options.so_keepalive)?;
    making.raise(libc::SO_OOBINLINE, "SO_OOBINLINE", options.so_oobinline.map(|v| v != 0))?;
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
