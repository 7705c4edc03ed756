//! Kernel state: packet sockets: bound to a protocol and an interface, or to all; memberships; two that share packets
//! (PACKET_FANOUT). Frames sent on the loopback reach them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{get_int, poll, recv, send, set, set_int};
use zoo::{check, ensure, ensure_eq, ok};

/// `ETH_P_802_EX1`, for experiments.
const PROTOCOL: u16 = 0x88b5;
const LO: i32 = 1;
const P: i32 = libc::SOL_PACKET;

fn socket(kind: i32) -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(ok(fd as i64, "socket(AF_PACKET)")? as i32))
    }
}

fn address(protocol: u16, interface: i32) -> libc::sockaddr_ll {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = interface;
    address.sll_halen = 6;
    address
}

fn bind(fd: &OwnedFd, protocol: u16, interface: i32) -> zoo::Check {
    let address = address(protocol, interface);
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is live for its length.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) }, "bind")
}

fn bound(fd: &OwnedFd) -> Result<(u16, i32), String> {
    let mut address = address(0, 0);
    let mut len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: there is room for `len` bytes.
    let ret = unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &mut len) };
    check(ret, "getsockname")?;
    Ok((u16::from_be(address.sll_protocol), address.sll_ifindex))
}

/// Sends a frame on the loopback.
fn frame(text: &[u8]) -> zoo::Check {
    let fd = socket(libc::SOCK_DGRAM)?;
    let to = address(PROTOCOL, LO);
    // SAFETY: text and address are live for their lengths.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            text.as_ptr().cast(),
            text.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    ensure_eq!(ok(sent as i64, "sendto")?, text.len() as i64, "sent");
    Ok(())
}

/// How many frames wait in a socket; takes them out.
fn count(fd: &OwnedFd) -> Result<usize, String> {
    let mut n = 0;
    while poll(fd, 20)? & libc::POLLIN != 0 {
        let mut room = [0; 200];
        ensure!(recv(fd, &mut room, libc::MSG_DONTWAIT) > 0, "recv");
        n += 1;
    }
    Ok(n)
}

fn member(fd: &OwnedFd, kind: u16, address: &[u8]) -> zoo::Check {
    let mut request = LO.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend((address.len() as u16).to_ne_bytes());
    request.extend(address);
    request.resize(16, 0);
    set(fd, P, libc::PACKET_ADD_MEMBERSHIP, &request)
}

/// How often the loopback was asked to be promiscuous (`IFLA_PROMISCUITY`): rtnetlink(7).
fn promiscuity() -> Result<u32, String> {
    // struct nlmsghdr and struct ifinfomsg of RTM_GETLINK.
    let mut request = 32u32.to_ne_bytes().to_vec();
    request.extend([18u16.to_ne_bytes(), 1u16.to_ne_bytes()].concat());
    request.extend([0; 12]);
    request.extend(LO.to_ne_bytes());
    request.extend([0; 8]);
    // SAFETY: integers; the descriptor is new.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        OwnedFd::from_raw_fd(ok(fd as i64, "socket")? as i32)
    };
    ensure_eq!(send(&fd, &request, 0), 32, "request");
    let mut answer = vec![0; 16384];
    let n = recv(&fd, &mut answer, 0);
    let mut rest = answer.get(32..n.max(0) as usize).ok_or("no answer")?;
    while rest.len() >= 4 {
        let length = u16::from_ne_bytes([rest[0], rest[1]]) as usize;
        if u16::from_ne_bytes([rest[2], rest[3]]) == 30 {
            return Ok(u32::from_ne_bytes([rest[4], rest[5], rest[6], rest[7]]));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or(&[]);
    }
    Err("no IFLA_PROMISCUITY".to_owned())
}

/// Whether the loopback receives what is sent to this hardware address.
fn receives(address: &str) -> Result<bool, String> {
    let text =
        std::fs::read_to_string("/proc/thread-self/net/dev_mcast").map_err(|e| e.to_string())?;
    Ok(text.lines().any(|l| l.contains("lo") && l.contains(address)))
}

fn main() {
    zoo::run(|z| {
        let one = match socket(libc::SOCK_RAW) {
            Ok(one) => one,
            Err(e) => z.skip(&format!("it takes CAP_NET_RAW: {e}")),
        };
        bind(&one, PROTOCOL, LO)?;
        member(&one, 1, &[])?; // PACKET_MR_PROMISC
        // CRIU refuses one that was added twice.
        let plain = z.param("ZOO_PLAIN", 0) == 1;
        let times = if plain { 1 } else { 2 };
        for _ in 0..times {
            member(&one, 0, &[1, 0, 0x5e, 1, 2, 3])?; // PACKET_MR_MULTICAST
        }
        let all = socket(libc::SOCK_DGRAM)?;
        bind(&all, PROTOCOL, 0)?;
        set_int(&all, P, libc::PACKET_AUXDATA, 1)?;
        let idle = socket(libc::SOCK_RAW)?;
        // Round robin, with roll-over, which CRIU loses.
        let roll_over = if plain { 0 } else { 0x1000 };
        let group = 0x7a | (1 | roll_over) << 16;
        let pair = [socket(libc::SOCK_RAW)?, socket(libc::SOCK_RAW)?];
        for fd in &pair {
            bind(fd, PROTOCOL, LO)?;
            set_int(fd, P, libc::PACKET_FANOUT, group)?;
        }
        let fds = || [&one, &all, &idle, &pair[0], &pair[1]];
        let state = || -> Result<Vec<String>, String> {
            let mut state = Vec::new();
            for fd in fds() {
                state.push(format!("{:?}", bound(fd)?));
                state.push(format!("fanout {:#x}", get_int(fd, P, libc::PACKET_FANOUT)?));
                state.push(format!("auxdata {}", get_int(fd, P, libc::PACKET_AUXDATA)?));
                state.push(format!("type {}", get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)?));
            }
            state.push(format!("lo: promiscuous {}", promiscuity()?));
            state.push(format!("lo: multicast {}", receives("01005e010203")?));
            Ok(state)
        };
        let before = state()?;
        ensure_eq!(promiscuity()?, 1, "promiscuity");
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state()?, before, "packet sockets");
        for fd in fds() {
            count(fd)?;
        }
        for _ in 0..4 {
            frame(b"a frame")?;
        }
        // Each comes twice: when it is sent and when it is received.
        let counts: Vec<usize> = fds().map(count).into_iter().collect::<Result<_, _>>()?;
        ensure!(counts[0] >= 4 && counts[1] >= 4, "frames received: {counts:?}");
        ensure_eq!(counts[2], 0, "frames to a socket that is not bound");
        ensure_eq!(counts[3] + counts[4], counts[0], "frames that two share");
        ensure_eq!(counts[3], counts[4], "frames of either");
        // Dropped as often as it was added.
        for _ in 0..times {
            ensure!(receives("01005e010203")?, "the multicast address is gone too early");
            let mut request = LO.to_ne_bytes().to_vec();
            request.extend([0u16.to_ne_bytes(), 6u16.to_ne_bytes()].concat());
            request.extend([1, 0, 0x5e, 1, 2, 3, 0, 0]);
            set(&one, P, libc::PACKET_DROP_MEMBERSHIP, &request)?;
        }
        ensure!(!receives("01005e010203")?, "the multicast address stays");
        Ok(())
    })
}
