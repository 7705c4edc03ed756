//! Kernel state: one socket that a dump must refuse (`ZOO_KIND`: cork, more, ebpf, reuseport, ring, xdp, alg, can, tipc, sctp, bluetooth, answer), or that a restore must refuse
//! where its address or interface is not there (udp, address, netlink, group, device, packet). Its port is in `DIR/port`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{bind, connect, send, set, set_int, socket};
use zoo::{check, ensure_eq, ok};

const UDP: i32 = libc::SOCK_DGRAM;

/// A UDP socket connected to another, so that something can be sent.
fn pair() -> Result<(OwnedFd, UdpSocket), String> {
    let other = zoo::net::udp("127.0.0.1")?;
    let fd = socket(libc::AF_INET, UDP)?;
    ensure_eq!(connect(&fd, other.local_addr().map_err(|e| e.to_string())?), 0, "connect");
    Ok((fd, other))
}

/// An eBPF program that drops everything, as a socket filter; or that chooses the first of a `SO_REUSEPORT` group.
fn ebpf(fd: &OwnedFd, z: &zoo::Zoo, option: i32) -> zoo::Check {
    // mov r0, 0; exit
    let code: [u64; 2] = [0xb7, 0x95];
    let license = c"GPL";
    let mut attr = [0u64; 16];
    // BPF_PROG_TYPE_SOCKET_FILTER, two instructions.
    attr[0] = 1 | 2 << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = license.as_ptr() as u64;
    // SAFETY: BPF_PROG_LOAD reads `attr`, the code and the license, which are live.
    let program = unsafe { libc::syscall(libc::SYS_bpf, 5, attr.as_ptr(), size_of_val(&attr)) };
    if program < 0 {
        z.skip(&format!("bpf(BPF_PROG_LOAD): {}", std::io::Error::last_os_error()));
    }
    set_int(fd, libc::SOL_SOCKET, option, program as i32)?;
    // SAFETY: the descriptor is ours and of no further use.
    check(unsafe { libc::close(program as i32) }, "close")
}

fn packet() -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(ok(fd as i64, "socket(AF_PACKET)")? as i32))
    }
}

fn interface() -> Result<u32, String> {
    // SAFETY: a NUL-terminated name.
    match unsafe { libc::if_nametoindex(c"zoo0".as_ptr()) } {
        0 => Err("there is no zoo0".to_owned()),
        index => Ok(index),
    }
}

/// Binds a socket whose family `zoo::net` does not know.
fn bind_bytes(fd: &OwnedFd, address: &[u8]) -> zoo::Check {
    // SAFETY: the address is live for its length.
    let ret = unsafe {
        libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    };
    check(ret, "bind")
}

fn make(z: &zoo::Zoo, kind: &str) -> Result<Vec<OwnedFd>, String> {
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    Ok(match kind {
        "cork" => {
            let (fd, other) = pair()?;
            set_int(&fd, libc::IPPROTO_UDP, libc::UDP_CORK, 1)?;
            ensure_eq!(send(&fd, b"half of it", 0), 10, "send");
            vec![fd, other.into()]
        }
        "more" => {
            let (fd, other) = pair()?;
            ensure_eq!(send(&fd, b"half of it", libc::MSG_MORE), 10, "send");
            vec![fd, other.into()]
        }
        "ebpf" => {
            let fd = socket(libc::AF_INET, UDP)?;
            ebpf(&fd, z, libc::SO_ATTACH_BPF)?;
            vec![fd]
        }
        "reuseport" => {
            let fd = socket(libc::AF_INET, UDP)?;
            set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
            bind(&fd, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0))?;
            ebpf(&fd, z, libc::SO_ATTACH_REUSEPORT_EBPF)?;
            vec![fd]
        }
        "ring" => {
            let fd = packet()?;
            let geometry: Vec<u8> =
                [4096u32, 2, 2048, 4].iter().flat_map(|w| w.to_ne_bytes()).collect();
            set(&fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &geometry)?;
            // A part of it: the kernel maps rings as a whole only.
            // SAFETY: a new mapping, of which nobody uses the second half.
            unsafe {
                let (at, shared) = (std::ptr::null_mut(), libc::MAP_SHARED);
                let base = libc::mmap(at, 8192, libc::PROT_READ, shared, fd.as_raw_fd(), 0);
                check(-i32::from(base == libc::MAP_FAILED), "mmap")?;
                check(libc::munmap(base.byte_add(4096), 4096), "munmap")?;
            }
            vec![fd]
        }
        "xdp" | "alg" | "can" | "tipc" | "sctp" | "bluetooth" => {
            let (family, type_, protocol) = match kind {
                "xdp" => (libc::AF_XDP, libc::SOCK_RAW, 0),
                "alg" => (libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
                "can" => (libc::AF_CAN, libc::SOCK_RAW, libc::CAN_RAW),
                "tipc" => (libc::AF_TIPC, libc::SOCK_RDM, 0),
                "sctp" => (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
                _ => (libc::AF_BLUETOOTH, libc::SOCK_RAW, 1),
            };
            // SAFETY: integers; the descriptor is new.
            let fd = unsafe { libc::socket(family, type_ | libc::SOCK_CLOEXEC, protocol) };
            if fd < 0 {
                z.skip(&format!("socket({kind}): {}", std::io::Error::last_os_error()));
            }
            // SAFETY: it is new.
            vec![unsafe { OwnedFd::from_raw_fd(fd) }]
        }
        "udp" | "address" => {
            let ip = if kind == "udp" { "127.0.0.1" } else { "10.78.0.1" };
            let socket = zoo::net::udp(ip)?;
            let port = socket.local_addr().map_err(|e| e.to_string())?.port();
            z.publish("port", &port.to_string());
            vec![socket.into()]
        }
        "answer" => {
            // SAFETY: integers; the descriptor is new.
            let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
            // SAFETY: as above.
            let fd = unsafe { OwnedFd::from_raw_fd(ok(fd as i64, "socket")? as i32) };
            // struct nlmsghdr that asks for an acknowledgement (NLMSG_NOOP, NLM_F_REQUEST | NLM_F_ACK)
            let mut request = 16u32.to_ne_bytes().to_vec();
            request.extend([1u16.to_ne_bytes(), 5u16.to_ne_bytes()].concat());
            request.extend([7u32.to_ne_bytes(), [0; 4]].concat());
            ensure_eq!(send(&fd, &request, 0), 16, "request");
            vec![fd]
        }
        "netlink" => {
            // SAFETY: integers; the descriptor is new.
            let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
            // SAFETY: as above.
            let fd = unsafe { OwnedFd::from_raw_fd(ok(fd as i64, "socket")? as i32) };
            // struct sockaddr_nl
            let mut address = [(libc::AF_NETLINK as u16).to_ne_bytes(), [0; 2]].concat();
            address.extend([7_000_000u32.to_ne_bytes(), [0; 4]].concat());
            bind_bytes(&fd, &address)?;
            vec![fd]
        }
        "group" => {
            let fd = socket(libc::AF_INET, UDP)?;
            bind(&fd, any)?;
            // struct ip_mreqn
            let request = [[239, 7, 7, 7], [0; 4], interface()?.to_ne_bytes()].concat();
            set(&fd, libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &request)?;
            vec![fd]
        }
        "device" => {
            let fd = socket(libc::AF_INET, UDP)?;
            set(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"zoo0\0")?;
            vec![fd]
        }
        "packet" => {
            let fd = packet()?;
            // struct sockaddr_ll
            let mut address =
                [(libc::AF_PACKET as u16).to_ne_bytes(), 0x88b5u16.to_be_bytes()].concat();
            address.extend(interface()?.to_ne_bytes());
            address.resize(20, 0);
            bind_bytes(&fd, &address)?;
            vec![fd]
        }
        other => return Err(format!("no ZOO_KIND {other}")),
    })
}

fn main() {
    zoo::run(|z| {
        let kind = std::env::var("ZOO_KIND").unwrap_or_default();
        let fds = make(z, &kind)?;
        z.ready()?;
        z.wait_for_check();
        if kind == "cork" || kind == "more" {
            // What was put together while nobody was looking goes out as one.
            set_int(&fds[0], libc::IPPROTO_UDP, libc::UDP_CORK, 0)?;
            ensure_eq!(send(&fds[0], b"", 0).max(0), 0, "send");
            let mut room = [0; 32];
            let n = zoo::net::recv(&fds[1], &mut room, libc::MSG_DONTWAIT);
            ensure_eq!(n, 10, "the datagram");
        }
        Ok(())
    })
}
