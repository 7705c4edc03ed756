//! Raw and ICMP echo sockets: raw(7), icmp(7), ipv6(7).
//!
//! They have no module of sock_diag(7) on many kernels; /proc/net/raw and its like tell whom they are connected to. What
//! they have received is dropped with a warning: given back, it would reach every such socket of the host.

use super::options::Making;
use super::{Survey, inet};
use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::{InetSkEntry, IpOptsRawEntry, SkShutdown};
use rewake_proc::net;
use rewake_sys::sockets::{option, option_int, set_option};
use rewake_sys::{Errno, SyscallError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType};

/// `SOL_RAW`
const RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
const ICMPV6_FILTER: i32 = 1;
const IP_NODEFRAG: i32 = 22;

impl Survey {
    /// What /proc/net tells of a raw or ICMP echo socket.
    fn listed(&mut self, entry: &InetSkEntry) -> Result<Option<net::Socket>, Problem> {
        let name = match (entry.r#type as i32, entry.family as i32) {
            (libc::SOCK_RAW, libc::AF_INET) => "raw",
            (libc::SOCK_RAW, _) => "raw6",
            (_, libc::AF_INET) => "icmp",
            _ => "icmp6",
        };
        if !self.listed.contains_key(name) {
            let path = format!("/proc/thread-self/net/{name}");
            let failed = |e: &dyn std::fmt::Display| Problem::new(path.as_str(), e.to_string());
            let content = std::fs::read(&path).map_err(|e| failed(&e))?;
            let sockets = net::sockets(name, &content).map_err(|e| failed(&e))?;
            self.listed.insert(name, sockets.into_iter().map(|s| (s.inode, s)).collect());
        }
        Ok(self.listed[name].get(&u64::from(entry.ino)).copied())
    }
}

/// Surveys what is particular to them.
///
/// # Errors
/// Its options or its state cannot be read.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
) -> Result<(), Problem> {
    if let Some(listed) = collector.sockets.listed(entry)? {
        entry.state = listed.state.into();
        if !listed.destination.0.is_unspecified() {
            entry.dst_port = listed.destination.1.into();
            entry.dst_addr = inet::words(listed.destination.0, entry.family as i32);
        }
    }
    let events = events(view.as_fd());
    // That only sending is shut down shows nowhere.
    entry.shutdown = match (events.contains(PollFlags::HUP), events.contains(PollFlags::RDHUP)) {
        (true, _) => Some(SkShutdown::Both as i32),
        (_, true) => Some(SkShutdown::Read as i32),
        _ => None,
    };
    if rustix::io::ioctl_fionread(view.as_fd()).is_ok_and(|waiting| waiting != 0) {
        log::warn!("{}: the packets it has received, and not read, are not saved", view.object());
    }
    if entry.r#type as i32 == libc::SOCK_RAW {
        let raw = options(view.as_fd(), entry)
            .map_err(|e| view.problem(format!("its options cannot be read: {e}")))?;
        entry.ip_opts.get_or_insert_default().raw = Some(raw);
    }
    Ok(())
}

fn events(fd: BorrowedFd<'_>) -> PollFlags {
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut wanted, Some(&at_once)) {
        Ok(_) => wanted[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

fn options(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<IpOptsRawEntry, SyscallError> {
    let v6 = entry.family as i32 == libc::AF_INET6;
    let flag = |name| option_int(fd, libc::IPPROTO_IP, name).map(|v| (v != 0).then_some(true));
    let words = |(bytes, length): ([u8; 32], usize)| {
        let word = |b: &[u8]| b.first_chunk().map(|b| u32::from_ne_bytes(*b));
        bytes[..length].chunks(4).filter_map(word).collect()
    };
    Ok(IpOptsRawEntry {
        hdrincl: if v6 { None } else { flag(libc::IP_HDRINCL)? },
        nodefrag: if v6 { None } else { flag(IP_NODEFRAG)? },
        checksum: None,
        icmpv_filter: match entry.proto as i32 {
            libc::IPPROTO_ICMP if !v6 => words(option::<32>(fd, RAW, ICMP_FILTER)?),
            libc::IPPROTO_ICMPV6 if v6 => {
                words(option::<32>(fd, libc::IPPROTO_ICMPV6, ICMPV6_FILTER)?)
            }
            _ => Vec::new(),
        },
    })
}

/// Sets the options of a raw socket.
///
/// # Errors
/// The kernel refuses one.
pub(super) fn apply(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    let Some(raw) = entry.ip_opts.as_ref().and_then(|o| o.raw.as_ref()) else { return Ok(()) };
    let v6 = entry.family as i32 == libc::AF_INET6;
    for (name, what, value) in
        [(libc::IP_HDRINCL, "IP_HDRINCL", raw.hdrincl), (IP_NODEFRAG, "IP_NODEFRAG", raw.nodefrag)]
    {
        // One of protocol IPPROTO_RAW has the first set from the start.
        let value = i32::from(value == Some(true));
        if !v6 && option_int(making.fd, libc::IPPROTO_IP, name) != Ok(value) {
            making.set(libc::IPPROTO_IP, name, what, value)?;
        }
    }
    let (level, what) =
        if v6 { (libc::IPPROTO_ICMPV6, "ICMPV6_FILTER") } else { (RAW, "ICMP_FILTER") };
    if !raw.icmpv_filter.is_empty() {
        let bytes: Vec<u8> = raw.icmpv_filter.iter().flat_map(|w| w.to_ne_bytes()).collect();
        set_option(making.fd, level, ICMP_FILTER, &bytes)
            .map_err(|e| making.problem(format!("{what} cannot be set: {e}")))?;
    }
    Ok(())
}

/// Makes an ICMP echo socket, which the kernel allows to the groups of a sysctl only.
///
/// # Errors
/// The sysctl allows it to nobody.
pub(super) fn open_echo(family: AddressFamily, protocol: u32) -> Result<OwnedFd, String> {
    const SYSCTL: &str = "net.ipv4.ping_group_range";
    let socket = || {
        let protocol = RawProtocol::new(protocol).map(Protocol::from_raw);
        rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol)
    };
    match socket() {
        Ok(fd) => return Ok(fd),
        Err(Errno::ACCESS) => {}
        Err(e) => return Err(e.to_string()),
    }
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
    let mut bounds = range.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok());
    let (Some(low), Some(high)) = (bounds.next(), bounds.next()) else {
        return Err(format!("{SYSCTL} cannot be read"));
    };
    if low > high {
        return Err(format!("{SYSCTL} allows ICMP echo sockets to no group"));
    }
    // Credentials are a thread's own: one that ends with the call.
    std::thread::scope(|scope| {
        let made = std::thread::Builder::new().spawn_scoped(scope, || {
            let group = rustix::thread::Gid::from_raw(low);
            rustix::thread::set_thread_res_gid(group, group, group)
                .map_err(|e| format!("{SYSCTL} allows it to group {low}: {e}"))?;
            socket().map_err(|e| e.to_string())
        });
        let made = made.map_err(|e| e.to_string())?;
        made.join().unwrap_or_else(|_| Err("a thread has failed".to_owned()))
    })
}

/// The ICMP echo sockets (by inode number) that have an identifier, in this network namespace.
pub(super) fn echo_inodes(family: u32, identifier: u16) -> Vec<u32> {
    let name = if family as i32 == libc::AF_INET { "icmp" } else { "icmp6" };
    let content = std::fs::read(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let sockets = net::sockets(name, &content).unwrap_or_default();
    let same = sockets.iter().filter(|s| s.source.1 == identifier);
    same.map(|s| s.inode as u32).collect()
}

/// Whether a socket of the image is one of these.
pub(super) fn is_one(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_RAW || is_echo(entry)
}

/// Whether a socket of the image is an ICMP echo socket.
pub(super) fn is_echo(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_DGRAM
        && matches!(entry.proto as i32, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6)
}
