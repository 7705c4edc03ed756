//! Features around sockets and network devices.

use std::fs::{File, OpenOptions};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use rewake_sys::probe::{self, FdQuery};
use rewake_sys::{Errno, sockets};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, socket_with};

use super::netlink::{
    self, ACK, CREATE, DUMP, NETFILTER, REQUEST, ROUTE, SOCK_DIAG, attribute, message,
};
use super::tasks::refused_with;
use super::{Attempt, Reason, ensure};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const IPPROTO_RAW: u8 = 255;

fn socket(
    family: AddressFamily,
    kind: SocketType,
    protocol: Option<Protocol>,
) -> Result<OwnedFd, Reason> {
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?)
}

/// A request for all sockets of a family and protocol (`struct inet_diag_req_v2`).
fn inet_diag(family: AddressFamily, protocol: u8) -> Attempt {
    let mut request = [0u8; 56];
    request[0] = family.as_raw() as u8;
    request[1] = protocol;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes()); // every state
    netlink::ask(SOCK_DIAG, &message(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &request), 1).map(drop)
}

pub fn sock_diag() -> Attempt {
    let mut request = [0u8; 24]; // struct unix_diag_req
    request[0] = AddressFamily::UNIX.as_raw() as u8;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let _one = UnixDatagram::unbound()?;
    netlink::ask(SOCK_DIAG, &message(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &request), 1)?;
    for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
        inet_diag(AddressFamily::INET, protocol as u8)?;
    }
    Ok(())
}

pub fn diag_raw() -> Attempt {
    inet_diag(AddressFamily::INET, IPPROTO_RAW)
}

pub fn peek_off() -> Attempt {
    let socket = UnixDatagram::unbound()?;
    Ok(sockets::set_option_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?)
}

pub fn get_filter() -> Attempt {
    probe::socket_filter_len(UnixDatagram::unbound()?.as_fd())?;
    Ok(())
}

/// Takes a socket into repair mode and out of it again.
fn repair(fd: impl AsFd) -> Attempt {
    for state in [1, -1] {
        sockets::set_option_int(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, state)?;
    }
    Ok(())
}

pub fn tcp_repair() -> Attempt {
    repair(socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::TCP))?)
}

pub fn half_closed() -> Attempt {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let _peer = listener.accept()?;
    stream.shutdown(Shutdown::Write)?;
    repair(&stream)
}

pub fn socket_namespace() -> Attempt {
    probe::query_fd(UnixDatagram::unbound()?.as_fd(), FdQuery::SocketNamespace)?;
    Ok(())
}

/// A socket without a name has no file; a kernel that knows the question says so.
pub fn unix_file() -> Attempt {
    let outcome = probe::query_fd(UnixDatagram::unbound()?.as_fd(), FdQuery::UnixFile);
    refused_with(outcome.map(drop), Errno::NOENT)
}

pub fn buf_lock() -> Attempt {
    const SO_BUF_LOCK: i32 = 72;
    sockets::option_int(UnixDatagram::unbound()?.as_fd(), libc::SOL_SOCKET, SO_BUF_LOCK)?;
    Ok(())
}

pub fn freebind6() -> Attempt {
    let socket = socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
    Ok(rustix::net::sockopt::set_ipv6_freebind(&socket, true)?)
}

fn tun_device() -> Result<File, Reason> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/net/tun")?)
}

pub fn tun() -> Attempt {
    probe::tun_features(tun_device()?.as_fd())?;
    Ok(())
}

pub fn tun_namespace() -> Attempt {
    probe::in_namespaces(libc::CLONE_NEWNET, || {
        let device = tun_device()?;
        probe::tun_attach(device.as_fd())?;
        probe::query_fd(device.as_fd(), FdQuery::TunNamespace)?;
        Ok(())
    })?
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_GETNSID: u16 = 90;
const IFLA_IFNAME: u16 = 3;

/// `struct ifinfomsg` of device `index`.
fn ifinfo(index: u32) -> Vec<u8> {
    let mut info = vec![0u8; 16];
    info[4..8].copy_from_slice(&index.to_ne_bytes());
    info
}

pub fn nsid() -> Attempt {
    const NETNSA_PID: u16 = 2;
    let mut request = vec![0u8; 4]; // struct rtgenmsg, padded
    request.extend(attribute(NETNSA_PID, &std::process::id().to_ne_bytes()));
    netlink::ask(ROUTE, &message(RTM_GETNSID, REQUEST, &request), 1).map(drop)
}

/// A veth pair with its ends in two namespaces of our own: is the id of the other one reported?
pub fn link_nsid() -> Attempt {
    probe::in_namespaces(libc::CLONE_NEWNET, || {
        let outer = File::open("/proc/thread-self/ns/net")?;
        probe::in_namespaces(libc::CLONE_NEWNET, || veth_into(&outer))?
    })?
}

fn veth_into(outer: &File) -> Attempt {
    const NAME: &[u8] = b"rewake0\0";
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    const VETH_INFO_PEER: u16 = 1;
    const IFLA_NET_NS_FD: u16 = 28;
    const IFLA_LINK_NETNSID: u16 = 37;
    let peer = [
        ifinfo(0),
        attribute(IFLA_IFNAME, b"rewake1\0"),
        attribute(IFLA_NET_NS_FD, &outer.as_raw_fd().to_ne_bytes()),
    ]
    .concat();
    let link = [
        attribute(IFLA_INFO_KIND, b"veth"),
        attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer)),
    ]
    .concat();
    let request =
        [ifinfo(0), attribute(IFLA_IFNAME, NAME), attribute(IFLA_LINKINFO, &link)].concat();
    netlink::ask(ROUTE, &message(RTM_NEWLINK, REQUEST | ACK | CREATE, &request), 1)?;
    let request = [ifinfo(0), attribute(IFLA_IFNAME, NAME)].concat();
    let answers = netlink::ask(ROUTE, &message(RTM_GETLINK, REQUEST, &request), 1)?;
    let answer = answers.first().and_then(|answer| answer.payload.get(16..)).unwrap_or_default();
    ensure(
        netlink::find(answer, IFLA_LINK_NETNSID).is_some(),
        "the namespace of a veth's other end is not reported",
    )
}

/// An index that cannot be is refused for its value by kernels that know the attribute, and ignored by others.
pub fn new_ifindex() -> Attempt {
    const IFLA_NEW_IFINDEX: u16 = 49;
    probe::in_namespaces(libc::CLONE_NEWNET, || {
        let request = [ifinfo(1), attribute(IFLA_NEW_IFINDEX, &(-1i32).to_ne_bytes())].concat();
        match netlink::exchange(ROUTE, &message(RTM_SETLINK, REQUEST | ACK, &request), 1)? {
            Err(Errno::RANGE) => Ok(()),
            Err(errno) => Err(errno.into()),
            Ok(_) => Err("IFLA_NEW_IFINDEX is ignored".into()),
        }
    })?
}

/// `struct nfgenmsg`.
fn nfgen(family: u8, subsystem: u16) -> [u8; 4] {
    let [high, low] = subsystem.to_be_bytes();
    [family, 0, high, low]
}

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const fn nft(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

pub fn nftables() -> Attempt {
    const NFT_MSG_NEWGEN: u16 = 15;
    const NFT_MSG_GETGEN: u16 = 16;
    let request = message(nft(NFT_MSG_GETGEN), REQUEST, &nfgen(0, 0));
    let answers = netlink::ask(NETFILTER, &request, 1)?;
    ensure(
        answers.first().is_some_and(|a| a.kind == nft(NFT_MSG_NEWGEN)),
        "nftables answers something else",
    )
}

/// A table and a chain at a hook, in one transaction and in a network namespace of our own.
pub fn lock_by_nftables() -> Attempt {
    const NFPROTO_INET: u8 = 1;
    const NFNL_MSG_BATCH_BEGIN: u16 = 16;
    const NFNL_MSG_BATCH_END: u16 = 17;
    const NFT_MSG_NEWTABLE: u16 = 0;
    const NFT_MSG_NEWCHAIN: u16 = 3;
    const NFTA_TABLE_NAME: u16 = 1;
    const NFTA_CHAIN_TABLE: u16 = 1;
    const NFTA_CHAIN_NAME: u16 = 3;
    const NFTA_CHAIN_HOOK: u16 = 4;
    const NFTA_CHAIN_TYPE: u16 = 7;
    const NFTA_HOOK_HOOKNUM: u16 = 1;
    const NFTA_HOOK_PRIORITY: u16 = 2;
    const NLA_F_NESTED: u16 = 0x8000;
    const INPUT: u32 = 1;
    let hook = [
        attribute(NFTA_HOOK_HOOKNUM, &INPUT.to_be_bytes()),
        attribute(NFTA_HOOK_PRIORITY, &0u32.to_be_bytes()),
    ]
    .concat();
    let table = [nfgen(NFPROTO_INET, 0).to_vec(), attribute(NFTA_TABLE_NAME, b"rewake\0")].concat();
    let chain = [
        nfgen(NFPROTO_INET, 0).to_vec(),
        attribute(NFTA_CHAIN_TABLE, b"rewake\0"),
        attribute(NFTA_CHAIN_NAME, b"input\0"),
        attribute(NFTA_CHAIN_HOOK | NLA_F_NESTED, &hook),
        attribute(NFTA_CHAIN_TYPE, b"filter\0"),
    ]
    .concat();
    let edge = nfgen(0, NFNL_SUBSYS_NFTABLES);
    let batch = [
        message(NFNL_MSG_BATCH_BEGIN, REQUEST, &edge),
        message(nft(NFT_MSG_NEWTABLE), REQUEST | ACK | CREATE, &table),
        message(nft(NFT_MSG_NEWCHAIN), REQUEST | ACK | CREATE, &chain),
        message(NFNL_MSG_BATCH_END, REQUEST, &edge),
    ]
    .concat();
    probe::in_namespaces(libc::CLONE_NEWNET, || netlink::ask(NETFILTER, &batch, 2).map(drop))?
}

pub fn legacy_iptables() -> Attempt {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW))?;
    Ok(probe::legacy_filter_table(socket.as_fd())?)
}
