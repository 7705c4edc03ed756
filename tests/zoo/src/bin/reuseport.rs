//! Kernel state: groups of sockets that share a port (`SO_REUSEPORT`), and classic BPF programs that decide which member
//! gets what arrives. Two groups of UDP sockets, one with a program (by the first byte of a datagram) and one without (by
//! sender), a group of TCP listeners that belong to somebody else (by the port of the client), and a socket that
//! is not bound yet and has a program already. Members are not in the order of their descriptors.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use zoo::net::{self, err, poll, set_int, socket};
use zoo::{check, ensure, ensure_eq};

/// `code, jt, jf, k`
type Instruction = (u16, u8, u8, u32);

/// The first byte.
const BY_BYTE: &[Instruction] = &[(0x30, 0, 0, 0), (0x16, 0, 0, 0)];
/// The last bit of the client's port, behind twenty bytes of IP header.
const BY_PORT: &[Instruction] =
    &[(0x28, 0, 0, (-0x10_0000 + 20) as u32), (0x54, 0, 0, 1), (0x16, 0, 0, 0)];

fn attach(fd: &OwnedFd, program: &[Instruction]) -> zoo::Check {
    let mut code: Vec<libc::sock_filter> =
        program.iter().map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k }).collect();
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the program and its instructions are live.
    check(
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const program).cast(),
                size_of_val(&program) as libc::socklen_t,
            )
        },
        "SO_ATTACH_REUSEPORT_CBPF",
    )
}

fn member(kind: i32, owner: u32) -> Result<OwnedFd, String> {
    let fd = socket(libc::AF_INET, kind)?;
    set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    std::os::unix::fs::fchown(&fd, Some(owner), Some(owner)).map_err(err)?;
    Ok(fd)
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Binds to a port of the program's own.
fn bound(fd: &OwnedFd) -> Result<u16, String> {
    net::bind(fd, at(0))?;
    let own = UdpSocket::from(fd.try_clone().map_err(err)?);
    Ok(own.local_addr().map_err(err)?.port())
}

/// Four members, of which the second then leaves: the last takes its place. Returns the port and the others as they are in the
/// group.
fn group(kind: i32, owner: u32) -> Result<(u16, Vec<OwnedFd>), String> {
    let mut fds = Vec::new();
    for _ in 0..4 {
        fds.push(member(kind, owner)?);
    }
    // From the highest descriptor down.
    fds.reverse();
    let port = bound(&fds[0])?;
    for (i, fd) in fds.iter().enumerate() {
        if i != 0 {
            net::bind(fd, at(port))?;
        }
        if kind == libc::SOCK_STREAM {
            net::listen(fd, 8)?;
        }
    }
    fds.swap_remove(1);
    Ok((port, fds))
}

/// Which of them has something to be read; it is read.
fn receiver(fds: &[OwnedFd], kind: i32) -> Result<usize, String> {
    for _ in 0..100 {
        for (i, fd) in fds.iter().enumerate() {
            if poll(fd, 5)? & libc::POLLIN == 0 {
                continue;
            }
            let fd = fd.try_clone().map_err(err)?;
            if kind == libc::SOCK_STREAM {
                TcpListener::from(fd).accept().map_err(err)?;
            } else {
                UdpSocket::from(fd).recv(&mut [0; 8]).map_err(err)?;
            }
            return Ok(i);
        }
    }
    Err("nobody has got it".to_owned())
}

fn main() {
    zoo::run(|z| {
        let (udp, tcp) = (libc::SOCK_DGRAM, libc::SOCK_STREAM);
        let (by_byte_port, by_byte) = group(udp, 0)?;
        attach(&by_byte[1], BY_BYTE)?;
        let (by_sender_port, by_sender) = group(udp, 65534)?;
        let (by_port_port, by_port) = group(tcp, 65534)?;
        attach(&by_port[2], BY_PORT)?;
        let later = member(udp, 0)?;
        attach(&later, BY_BYTE)?;
        let senders: Vec<UdpSocket> =
            (0..12).map(|_| net::udp("127.0.0.1")).collect::<Result<_, _>>()?;

        let by_bytes = || -> zoo::Check {
            for byte in [0u8, 2, 1, 1, 0, 2] {
                senders[0].send_to(&[byte], at(by_byte_port)).map_err(err)?;
                ensure_eq!(receiver(&by_byte, udp)?, byte as usize, "who has got the datagram");
            }
            Ok(())
        };
        let by_senders = || -> Result<Vec<usize>, String> {
            let one = |sender: &UdpSocket| {
                sender.send_to(b"hello", at(by_sender_port)).map_err(err)?;
                receiver(&by_sender, udp)
            };
            senders.iter().map(one).collect()
        };
        let by_ports = || -> zoo::Check {
            let mut seen = [0; 2];
            for _ in 0..64 {
                let client = TcpStream::connect(at(by_port_port)).map_err(err)?;
                let bit = usize::from(client.local_addr().map_err(err)?.port() & 1);
                ensure_eq!(receiver(&by_port, tcp)?, bit, "who has got the connection");
                seen[bit] += 1;
                if seen.iter().all(|n| *n > 2) {
                    break;
                }
            }
            Ok(())
        };
        by_bytes()?;
        by_ports()?;
        let before = by_senders()?;
        println!("by sender: {before:?}");
        ensure!(before.iter().any(|i| *i != before[0]), "all senders have the same receiver");

        z.ready()?;
        z.wait_for_check();

        by_bytes()?;
        by_ports()?;
        ensure_eq!(by_senders()?, before, "who gets the datagrams of each sender");
        // Another one of theirs, without a program.
        let own = bound(&later)?;
        let second = member(udp, 0)?;
        net::bind(&second, at(own))?;
        for byte in [1u8, 0, 1] {
            senders[1].send_to(&[byte], at(own)).map_err(err)?;
            let at = receiver(&[&later, &second].map(|fd| fd.try_clone().unwrap()), udp)?;
            ensure_eq!(at, byte as usize, "who has got the datagram of the later group");
        }
        Ok(())
    })
}
