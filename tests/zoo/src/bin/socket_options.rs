//! Kernel state: every socket option that can be read back, on sockets of each kind. What can be set is set to something
//! unusual; then all numbers of all levels are read, and read again in the end. (`ZOO_PLAIN=1`: only those that CRIU's
//! format has.)

use std::collections::BTreeMap;
use zoo::{check, ensure, ensure_eq, errno, ok};

/// Family, type, protocol.
type Kind = (i32, i32, i32);

const V4: i32 = libc::AF_INET;
const V6: i32 = libc::AF_INET6;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;

const KINDS: &[(&str, Kind)] = &[
    ("tcp4", (V4, libc::SOCK_STREAM, 0)),
    ("tcp6", (V6, libc::SOCK_STREAM, 0)),
    ("udp4", (V4, libc::SOCK_DGRAM, 0)),
    ("udp6", (V6, libc::SOCK_DGRAM, 0)),
    ("udplite4", (V4, libc::SOCK_DGRAM, UDPLITE)),
    ("udplite6", (V6, libc::SOCK_DGRAM, UDPLITE)),
    ("packet", (libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("unix", (libc::AF_UNIX, libc::SOCK_DGRAM, 0)),
    ("netlink", (libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)),
];

/// Which sockets an option is for, by their names' beginnings.
type For = &'static [&'static str];
const ALL: For = &[""];
const INET: For = &["tcp", "udp", "raw"];
const FOUR: For = &["tcp4", "udp4", "udplite4", "raw4"];
const SIX: For = &["tcp6", "udp6", "udplite6", "raw6"];
const LOOSE6: For = &["udp6", "udplite6", "raw6"];
const IP: For = &["tcp", "udp", "raw4"];
const IP_LOOSE: For = &["udp", "raw4"];
const UDP: For = &["udp"];
const TCP_UDP: For = &["tcp", "udp"];

const S: i32 = libc::SOL_SOCKET;
const I: i32 = libc::IPPROTO_IP;
const J: i32 = libc::IPPROTO_IPV6;
const U: i32 = libc::IPPROTO_UDP;
const N: i32 = libc::SOL_NETLINK;
const P: i32 = libc::SOL_PACKET;
const PACKET: For = &["packet"];

/// Level, number, value, for which sockets. Numbers are those of the kernel's headers.
const INTS: &[(i32, i32, i32, For)] = &[
    // Before what they would change.
    (I, libc::IP_TOS, 0x10, IP),
    (I, libc::IP_TTL, 77, IP),
    (I, libc::IP_FREEBIND, 1, FOUR),
    (I, libc::IP_TRANSPARENT, 1, FOUR),
    (I, 24, 1, IP),                          // IP_BIND_ADDRESS_NO_PORT
    (I, 51, 40_000 | 50_000 << 16, TCP_UDP), // IP_LOCAL_PORT_RANGE
    (I, libc::IP_RECVOPTS, 1, IP),
    (I, libc::IP_RETOPTS, 1, IP),
    (I, libc::IP_MTU_DISCOVER, 0, IP),
    (I, libc::IP_RECVERR, 1, IP),
    (I, libc::IP_RECVTTL, 1, IP),
    (I, libc::IP_RECVTOS, 1, IP),
    (I, libc::IP_PKTINFO, 1, IP),
    (I, libc::IP_PASSSEC, 1, IP),
    (I, libc::IP_RECVORIGDSTADDR, 1, IP),
    (I, libc::IP_MINTTL, 5, IP),
    (I, 23, 1, IP_LOOSE), // IP_CHECKSUM
    (I, 25, 1, IP_LOOSE), // IP_RECVFRAGSIZE
    (I, 26, 1, IP),       // IP_RECVERR_RFC4884
    (I, libc::IP_MULTICAST_TTL, 9, IP_LOOSE),
    (I, libc::IP_MULTICAST_LOOP, 0, IP_LOOSE),
    (I, 49, 0, FOUR),      // IP_MULTICAST_ALL
    (I, 50, 1 << 24, IP),  // IP_UNICAST_IF: the loopback, in network order
    (J, 78, 1, SIX),       // IPV6_FREEBIND
    (J, 75, 1, SIX),       // IPV6_TRANSPARENT
    (J, 76, 1 << 24, SIX), // IPV6_UNICAST_IF
    (J, libc::IPV6_MULTICAST_IF, 1, LOOSE6),
    (J, 72, 1, SIX), // IPV6_ADDR_PREFERENCES: temporary addresses
    (J, libc::IPV6_V6ONLY, 1, &["udp6"]),
    (J, libc::IPV6_RECVPKTINFO, 1, SIX),
    (J, 2, 1, SIX),
    (J, 3, 1, SIX),
    (J, 4, 1, SIX),
    (J, 5, 1, SIX),
    (J, 8, 1, SIX),
    (J, 11, 1, SIX), // IPV6_FLOWINFO
    (J, 33, 1, SIX), // IPV6_FLOWINFO_SEND
    (J, libc::IPV6_UNICAST_HOPS, 55, SIX),
    (J, libc::IPV6_MULTICAST_HOPS, 7, LOOSE6),
    (J, libc::IPV6_MULTICAST_LOOP, 0, LOOSE6),
    (J, 29, 0, SIX), // IPV6_MULTICAST_ALL
    (J, libc::IPV6_MTU_DISCOVER, 2, SIX),
    (J, libc::IPV6_RECVERR, 1, SIX),
    (J, 31, 1, SIX), // IPV6_RECVERR_RFC4884
    (J, libc::IPV6_RECVHOPLIMIT, 1, SIX),
    (J, 53, 1, SIX),
    (J, 56, 1, SIX),
    (J, 58, 1, SIX),
    (J, 60, 1, SIX), // IPV6_RECVPATHMTU
    (J, libc::IPV6_RECVTCLASS, 1, SIX),
    (J, 74, 1, SIX), // IPV6_RECVORIGDSTADDR
    (J, 77, 1, SIX), // IPV6_RECVFRAGSIZE
    (J, libc::IPV6_TCLASS, 0x20, SIX),
    (J, 62, 1, SIX),  // IPV6_DONTFRAG
    (J, 70, 0, SIX),  // IPV6_AUTOFLOWLABEL
    (J, 73, 3, SIX),  // IPV6_MINHOPCOUNT
    (U, 101, 1, UDP), // UDP_NO_CHECK6_TX
    (U, 102, 1, UDP), // UDP_NO_CHECK6_RX
    (U, libc::UDP_SEGMENT, 1200, UDP),
    (U, libc::UDP_GRO, 1, &["udp4", "udp6"]),
    (U, libc::UDP_CORK, 1, UDP),
    (U, 10, 16, &["udplite"]),
    (U, 11, 24, &["udplite"]),
    (N, libc::NETLINK_PKTINFO, 1, &["netlink"]),
    (N, libc::NETLINK_BROADCAST_ERROR, 1, &["netlink"]),
    (N, libc::NETLINK_NO_ENOBUFS, 1, &["netlink"]),
    (N, libc::NETLINK_LISTEN_ALL_NSID, 1, &["netlink"]),
    (N, libc::NETLINK_CAP_ACK, 1, &["netlink"]),
    (N, 11, 1, &["netlink"]), // NETLINK_EXT_ACK
    (N, 12, 1, &["netlink"]), // NETLINK_GET_STRICT_CHK
    (P, libc::PACKET_VERSION, 1, PACKET),
    (P, libc::PACKET_RESERVE, 32, PACKET),
    (P, libc::PACKET_AUXDATA, 1, PACKET),
    (P, libc::PACKET_ORIGDEV, 1, PACKET),
    (P, libc::PACKET_LOSS, 1, PACKET),
    (P, libc::PACKET_TIMESTAMP, 1 << 6, PACKET),
    (P, libc::PACKET_COPY_THRESH, 100, PACKET),
    (P, 19, 1, PACKET),  // PACKET_TX_HAS_OFF
    (P, 20, 1, PACKET),  // PACKET_QDISC_BYPASS
    (P, 23, 1, PACKET),  // PACKET_IGNORE_OUTGOING
    (P, 24, 12, PACKET), // PACKET_VNET_HDR_SZ
    (S, 43, 1, PACKET),  // SO_NOFCS
    (S, libc::SO_DEBUG, 1, ALL),
    (S, libc::SO_REUSEADDR, 1, ALL),
    (S, libc::SO_REUSEPORT, 1, INET),
    (S, libc::SO_DONTROUTE, 1, ALL),
    (S, libc::SO_BROADCAST, 1, ALL),
    (S, libc::SO_RCVBUF, 60_000, ALL),
    (S, libc::SO_SNDBUFFORCE, 16 << 20, ALL), // beyond net.core.wmem_max
    (S, libc::SO_OOBINLINE, 1, ALL),
    (S, libc::SO_KEEPALIVE, 1, &["tcp"]),
    (S, libc::SO_NO_CHECK, 1, ALL),
    (S, libc::SO_RCVLOWAT, 17, ALL),
    (S, libc::SO_PASSCRED, 1, &["unix", "netlink"]),
    (S, libc::SO_MARK, 0x77, ALL),
    (S, libc::SO_RXQ_OVFL, 1, ALL),
    (S, 41, 1, ALL), // SO_WIFI_STATUS
    (S, 45, 1, ALL), // SO_SELECT_ERR_QUEUE
    (S, libc::SO_BUSY_POLL, 33, ALL),
    (S, 69, 1, ALL),     // SO_PREFER_BUSY_POLL
    (S, 49, 1, TCP_UDP), // SO_INCOMING_CPU
    (S, libc::SO_ZEROCOPY, 1, TCP_UDP),
    (S, 74, 0, &["tcp"]),  // SO_TXREHASH
    (S, 75, 1, ALL),       // SO_RCVMARK
    (S, 76, 1, &["unix"]), // SO_PASSPIDFD
    (S, 82, 1, ALL),       // SO_RCVPRIORITY
    (S, libc::SO_PEEK_OFF, 4, &["tcp", "udp", "unix"]),
    // After IP_TOS, which changes it.
    (S, libc::SO_PRIORITY, 4, ALL),
    (S, 29, 1, &["tcp4", "udp4"]),     // SO_TIMESTAMP_OLD
    (S, 35, 1, &["udplite4", "raw4"]), // SO_TIMESTAMPNS_OLD
    (S, 63, 1, &["tcp6", "udp6"]),     // SO_TIMESTAMP_NEW
    (S, 64, 1, &["udplite6", "raw6"]), // SO_TIMESTAMPNS_NEW
];

/// What CRIU's format has, of those above.
const PLAIN: &[(i32, i32)] = &[
    (I, libc::IP_TOS),
    (I, libc::IP_FREEBIND),
    (J, 78),
    (J, libc::IPV6_RECVPKTINFO),
    (S, libc::SO_REUSEADDR),
    (S, libc::SO_REUSEPORT),
    (S, libc::SO_DONTROUTE),
    (S, libc::SO_BROADCAST),
    (S, libc::SO_RCVBUF),
    (S, libc::SO_SNDBUFFORCE),
    (S, libc::SO_OOBINLINE),
    (S, libc::SO_KEEPALIVE),
    (S, libc::SO_NO_CHECK),
    (S, libc::SO_RCVLOWAT),
    (S, libc::SO_PASSCRED),
    (S, libc::SO_MARK),
    (S, libc::SO_PRIORITY),
];

/// What CRIU does not restore all the same.
fn is_lost(name: &str, level: i32, number: i32) -> bool {
    let local = ["unix", "netlink", "packet"].contains(&name);
    (name.ends_with('6') && level == I) || (local && (level, number) == (S, libc::SO_REUSEADDR))
}

fn is_plain() -> bool {
    std::env::var_os("ZOO_PLAIN").is_some()
}

fn is_for(name: &str, which: For) -> bool {
    which.iter().any(|start| name.starts_with(start))
}

fn set(fd: i32, level: i32, number: i32, value: &[u8]) -> i32 {
    // SAFETY: the value is live for its length.
    unsafe {
        libc::setsockopt(fd, level, number, value.as_ptr().cast(), value.len() as libc::socklen_t)
    }
}

fn get(fd: i32, level: i32, number: i32) -> Result<Vec<u8>, i32> {
    let mut value = [0u8; 256];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` has room for `len` bytes.
    let ret = unsafe { libc::getsockopt(fd, level, number, value.as_mut_ptr().cast(), &mut len) };
    if ret < 0 { Err(errno()) } else { Ok(value[..len as usize].to_vec()) }
}

/// `SO_ERROR` is cleared by being read; cookies, memory, queue numbers and peers are not options.
const VOLATILE: &[i32] = &[libc::SO_ERROR, 55, 56, 57, 59, 71, libc::SO_PEERCRED, 77];

fn all_options(fd: i32) -> BTreeMap<(i32, i32), Result<Vec<u8>, i32>> {
    let mut all = BTreeMap::new();
    for level in [S, I, J, U, N, libc::SOL_PACKET, libc::SOL_RAW, libc::IPPROTO_ICMPV6] {
        // PACKET_STATISTICS are reset by being read.
        let read = |n: &i32| match level {
            S => !VOLATILE.contains(n),
            P => *n != libc::PACKET_STATISTICS,
            _ => true,
        };
        for number in (0..110).filter(read) {
            match get(fd, level, number) {
                Err(libc::ENOPROTOOPT | libc::EOPNOTSUPP) => {}
                other => drop(all.insert((level, number), other)),
            }
        }
    }
    all
}

/// A classic BPF program that accepts everything.
fn filter(fd: i32) -> zoo::Check {
    let mut code = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0xffff }];
    let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
    // SAFETY: a sock_fprog is plain memory; the program it points to is live.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const program).cast::<u8>(), size_of::<libc::sock_fprog>())
    };
    check(set(fd, S, libc::SO_ATTACH_FILTER, bytes), "SO_ATTACH_FILTER")
}

fn make(name: &str, (family, kind, protocol): Kind) -> Result<i32, String> {
    // SAFETY: integers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    let fd = ok(fd as i64, name)? as i32;
    for &(level, number, value, _) in INTS.iter().filter(|row| is_for(name, row.3)) {
        let kept = PLAIN.contains(&(level, number)) && !is_lost(name, level, number);
        if is_plain() && !kept {
            continue;
        }
        if set(fd, level, number, &value.to_ne_bytes()) != 0 {
            let e = std::io::Error::last_os_error();
            let code = e.raw_os_error().unwrap_or(0);
            // Another kernel, or a user without the privilege.
            ensure!(
                [libc::ENOPROTOOPT, libc::EOPNOTSUPP, libc::EPERM].contains(&code),
                "{name}: option {number} of level {level}: {e}"
            );
            println!("{name}: option {number} of level {level}: {e}");
        }
    }
    let linger = [1i32.to_ne_bytes(), 9i32.to_ne_bytes()].concat();
    check(set(fd, S, libc::SO_LINGER, &linger), "SO_LINGER")?;
    for (number, seconds) in [(libc::SO_RCVTIMEO, 3i64), (libc::SO_SNDTIMEO, 4)] {
        let time = [seconds.to_ne_bytes(), 500_000i64.to_ne_bytes()].concat();
        check(set(fd, S, number, &time), "timeouts")?;
    }
    check(set(fd, S, libc::SO_BINDTODEVICE, b"lo\0"), "SO_BINDTODEVICE")?;
    if !is_for(name, &["netlink"]) {
        filter(fd)?;
    }
    if is_plain() {
        return Ok(fd);
    }
    let rate = 123_456_789_012u64.to_ne_bytes();
    check(set(fd, S, libc::SO_MAX_PACING_RATE, &rate), "SO_MAX_PACING_RATE")?;
    let deadline = [libc::CLOCK_TAI.to_ne_bytes(), 1i32.to_ne_bytes()].concat();
    check(set(fd, S, libc::SO_TXTIME, &deadline), "SO_TXTIME")?;
    // Software timestamps of what is received, of the older or the newer form.
    let number = if name.ends_with('6') { 65 } else { 37 };
    check(
        set(fd, S, number, &[(1i32 << 3 | 1 << 4).to_ne_bytes(), [0; 4]].concat()),
        "TIMESTAMPING",
    )?;
    if is_for(name, IP) {
        // A stream identifier, padded.
        check(set(fd, I, libc::IP_OPTIONS, &[0x88, 4, 0, 7]), "IP_OPTIONS")?;
    }
    if is_for(name, SIX) {
        // A hop-by-hop header with nothing but padding.
        check(set(fd, J, 54, &[0, 0, 1, 4, 0, 0, 0, 0]), "IPV6_HOPOPTS")?;
    }
    if is_for(name, IP_LOOSE) {
        check(set(fd, I, libc::IP_MULTICAST_IF, &[127, 0, 0, 1]), "IP_MULTICAST_IF")?;
    }
    check(set(fd, S, libc::SO_LOCK_FILTER, &1i32.to_ne_bytes()), "SO_LOCK_FILTER")?;
    Ok(fd)
}

fn main() {
    zoo::run(|z| {
        let only = std::env::var("ZOO_KIND").ok();
        let mut sockets = Vec::new();
        for &(name, kind) in KINDS.iter().filter(|k| only.as_deref().is_none_or(|o| o == k.0)) {
            let fd = make(name, kind)?;
            sockets.push((name, fd, all_options(fd)));
        }
        z.ready()?;
        z.wait_for_check();
        for (name, fd, before) in sockets {
            let after = all_options(fd);
            let keys = before.keys().chain(after.keys());
            for key in keys.collect::<std::collections::BTreeSet<_>>() {
                ensure_eq!(
                    after.get(key),
                    before.get(key),
                    "{name}: option {} of level {}",
                    key.1,
                    key.0
                );
            }
        }
        Ok(())
    })
}
