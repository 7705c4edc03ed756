//! Kernel state: netlink sockets: bound to addresses and groups, beyond the first 32 too, of both types, one with news not
//! read yet. They hear of what happens, and are answered, afterwards. (`ZOO_PLAIN=1`: only what CRIU can keep.)

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{get, get_int, poll, recv, send, set_int};
use zoo::{check, ensure, ensure_eq, ok};

const N: i32 = libc::SOL_NETLINK;
/// `NETLINK_LIST_MEMBERSHIPS`
const LIST: i32 = 9;
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`
const GROUPS: u32 = 1 | 1 << 4;
/// `RTNLGRP_TUNNEL`, which an address has no room for.
const FAR: i32 = 35;

fn socket(kind: i32, protocol: i32) -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(libc::AF_NETLINK, kind | libc::SOCK_CLOEXEC, protocol);
        Ok(OwnedFd::from_raw_fd(ok(fd as i64, "socket(AF_NETLINK)")? as i32))
    }
}

fn bind(fd: &OwnedFd, port: u32, groups: u32) -> zoo::Check {
    // SAFETY: all-zero is a valid address; it is live for its length.
    unsafe {
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_pid = port;
        address.nl_groups = groups;
        let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len), "bind")
    }
}

fn bound(fd: &OwnedFd) -> Result<(u32, u32), String> {
    // SAFETY: all-zero is a valid address; there is room for `len` bytes.
    unsafe {
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        let mut len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        let ret = libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &mut len);
        check(ret, "getsockname")?;
        Ok((address.nl_pid, address.nl_groups))
    }
}

/// Changes the size of packets of the loopback, which link watchers hear of.
fn change(mtu: i32) -> zoo::Check {
    let fd = zoo::net::socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_mtu = mtu;
    // SAFETY: a valid request.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFMTU, &request) }, "SIOCSIFMTU")
}

fn main() {
    zoo::run(|z| {
        let plain = z.param("ZOO_PLAIN", 0) == 1;
        let kind = if plain { libc::SOCK_RAW } else { libc::SOCK_DGRAM };
        let watcher = socket(kind, libc::NETLINK_ROUTE)?;
        bind(&watcher, 0, GROUPS)?;
        let far = !plain && set_int(&watcher, N, libc::NETLINK_ADD_MEMBERSHIP, FAR).is_ok();
        let named = socket(libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        bind(&named, 0x5eed_0000, 0)?;
        let generic = socket(libc::SOCK_RAW, libc::NETLINK_GENERIC)?;
        bind(&generic, 0, 0)?;
        let new = socket(libc::SOCK_RAW, libc::NETLINK_KOBJECT_UEVENT)?;
        // It has news that it has not read; a restore need not have it.
        let behind = socket(kind, libc::NETLINK_ROUTE)?;
        if !plain {
            bind(&behind, 0, 1)?;
            change(61_000)?;
            ensure!(poll(&behind, 5000)? & libc::POLLIN != 0, "no news");
            while poll(&watcher, 0)? & libc::POLLIN != 0 {
                ensure!(recv(&watcher, &mut [0; 8192], 0) > 0, "news");
            }
        }
        let fds = [&watcher, &named, &generic, &new, &behind];
        let state = || -> Result<Vec<String>, String> {
            let mut state = Vec::new();
            for fd in fds {
                let mut groups = [0; 16];
                let n = get(fd, N, LIST, &mut groups)?;
                state.push(format!(
                    "{:x?} groups {:?} type {}",
                    bound(fd)?,
                    &groups[..n.min(16)],
                    get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)?
                ));
            }
            Ok(state)
        };
        let before = state()?;
        ensure!(!far || before[0].contains(", 4, 0"), "no group above 32: {}", before[0]);
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state()?, before, "netlink sockets");
        // struct nlmsghdr and struct ifinfomsg of RTM_GETLINK for the loopback.
        let mut request = Vec::new();
        request.extend(32u32.to_ne_bytes());
        request.extend([18u16.to_ne_bytes(), 1u16.to_ne_bytes()].concat());
        request.extend(7u32.to_ne_bytes());
        request.extend([0; 8]);
        request.extend(1u32.to_ne_bytes());
        request.extend([0; 8]);
        ensure_eq!(send(&named, &request, 0), 32, "request");
        let mut answer = vec![0; 8192];
        ensure!(poll(&named, 5000)? & libc::POLLIN != 0, "no answer");
        ensure!(recv(&named, &mut answer, 0) > 32, "answer");
        ensure_eq!(answer[16 + 4], 1, "interface of the answer");
        ensure_eq!(poll(&watcher, 0)?, libc::POLLOUT, "nothing has happened");
        change(60_000)?;
        ensure!(poll(&watcher, 5000)? & libc::POLLIN != 0, "the watcher hears nothing");
        ensure!(plain || poll(&behind, 5000)? & libc::POLLIN != 0, "who was behind hears nothing");
        Ok(())
    })
}
