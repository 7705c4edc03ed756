//! Options of internet sockets of every protocol: ip(7), ipv6(7).

use super::options::Making;
use crate::Problem;
use crate::files::collect::View;
use rewake_image::messages::{InetSkEntry, IpOptsEntry};
use rewake_sys::sockets::option_int;

const IPV6_FREEBIND: i32 = 78;

/// Reads them.
pub(super) fn survey(view: &View<'_>, family: i32) -> Result<IpOptsEntry, Problem> {
    let fd = view.as_fd();
    let v6 = family == libc::AF_INET6;
    let (freebind, packet_info) = if v6 {
        ((libc::IPPROTO_IPV6, IPV6_FREEBIND), (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO))
    } else {
        ((libc::IPPROTO_IP, libc::IP_FREEBIND), (libc::IPPROTO_IP, libc::IP_PKTINFO))
    };
    let number = |(level, name): (i32, i32)| {
        option_int(fd, level, name)
            .map_err(|e| view.problem(format!("its options cannot be read: {e}")))
    };
    let unless_zero = |value: i32| (value != 0).then_some(value as u32);
    Ok(IpOptsEntry {
        freebind: (number(freebind)? != 0).then_some(true),
        pktinfo: (number(packet_info)? != 0).then_some(true),
        tos: unless_zero(number((libc::IPPROTO_IP, libc::IP_TOS))?),
        ttl: if v6 { None } else { unless_zero(number((libc::IPPROTO_IP, libc::IP_TTL))?) },
        raw: None,
    })
}

/// Sets what of ip(7) and ipv6(7) decides where a socket may be bound.
pub(super) fn apply_before_bind(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    let v6 = entry.family as i32 == libc::AF_INET6;
    if let Some(v6only) = entry.v6only.filter(|_| v6) {
        making.set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, "IPV6_V6ONLY", v6only.into())?;
    }
    if entry.ip_opts.as_ref().and_then(|o| o.freebind) == Some(true) {
        if v6 {
            making.set(libc::IPPROTO_IPV6, IPV6_FREEBIND, "IPV6_FREEBIND", 1)?;
        } else {
            making.set(libc::IPPROTO_IP, libc::IP_FREEBIND, "IP_FREEBIND", 1)?;
        }
    }
    Ok(())
}

/// Sets the other options of ip(7) and ipv6(7).
pub(super) fn apply(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    let Some(options) = &entry.ip_opts else { return Ok(()) };
    if options.pktinfo == Some(true) {
        if entry.family as i32 == libc::AF_INET6 {
            making.set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", 1)?;
        } else {
            making.set(libc::IPPROTO_IP, libc::IP_PKTINFO, "IP_PKTINFO", 1)?;
        }
    }
    if let Some(tos) = options.tos.filter(|tos| *tos != 0) {
        making.set(libc::IPPROTO_IP, libc::IP_TOS, "IP_TOS", tos as i32)?;
    }
    // To set it is to pin it: only if it is not what the socket has anyway (sysctl net.ipv4.ip_default_ttl).
    if let Some(ttl) = options.ttl
        && option_int(making.fd, libc::IPPROTO_IP, libc::IP_TTL) != Ok(ttl as i32)
    {
        making.set(libc::IPPROTO_IP, libc::IP_TTL, "IP_TTL", ttl as i32)?;
    }
    Ok(())
}
