//! Kernel state: raw sockets of both families (filters, IP_HDRINCL, bound, connected) and ICMP echo ("ping") sockets with
//! their identifiers. Each still talks to the loopback afterwards. (`ZOO_PLAIN=1`: only raw ones, connected afterwards.)

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{bind, connect, get, poll, recv, send, set, set_int};
use zoo::{check, ensure, ensure_eq, ok};

const SOL_RAW: i32 = 255;

fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        let what = format!("socket of protocol {protocol}");
        Ok(OwnedFd::from_raw_fd(ok(fd as i64, &what)? as i32))
    }
}

fn to(ip: &str) -> Result<SocketAddr, String> {
    Ok(SocketAddr::new(ip.parse::<IpAddr>().map_err(|e| e.to_string())?, 0))
}

/// The line of /proc/net/NAME that has the socket: addresses and state.
fn listed(name: &str, fd: &OwnedFd) -> Result<String, String> {
    // SAFETY: `stat` is valid for writing.
    let inode = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        check(libc::fstat(fd.as_raw_fd(), &mut stat), "fstat")?;
        stat.st_ino.to_string()
    };
    let text = std::fs::read_to_string(format!("/proc/net/{name}")).map_err(|e| e.to_string())?;
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if words.get(9) == Some(&inode.as_str()) {
            return Ok(words[1..4].join(" "));
        }
    }
    Err(format!("/proc/net/{name} does not list a socket"))
}

/// An ICMP echo request; the kernel sums up those of ping sockets and of IPv6.
fn request(v6: bool, id: u16) -> Vec<u8> {
    let mut icmp = vec![if v6 { 128 } else { 8 }, 0, 0, 0];
    icmp.extend(id.to_be_bytes());
    icmp.extend([0, 1]);
    icmp.extend(b"is anybody there");
    if !v6 {
        let mut sum: u32 = icmp.chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
        sum = (sum & 0xffff) + (sum >> 16);
        icmp[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    icmp
}

/// Sends a request and waits for what comes of it: the first byte of the ICMP message, and its identifier.
fn ask(fd: &OwnedFd, v6: bool, skip: usize, what: &str) -> Result<(u8, u16), String> {
    let sent = send(fd, &request(v6, 0x4242), 0);
    ensure!(sent > 0, "{what}: sending: {}", std::io::Error::from_raw_os_error(-sent as i32));
    ensure!(poll(fd, 5000)? & libc::POLLIN != 0, "{what}: no answer");
    let mut packet = [0; 200];
    let n = recv(fd, &mut packet, libc::MSG_DONTWAIT);
    ensure!(n >= skip as i64 + 8, "{what}: an answer of {n} bytes");
    Ok((packet[skip], u16::from_be_bytes([packet[skip + 4], packet[skip + 5]])))
}

fn main() {
    zoo::run(|z| {
        let raw = match socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) {
            Ok(raw) => raw,
            Err(e) => z.skip(&format!("it takes CAP_NET_RAW: {e}")),
        };
        // All but echo replies are filtered out.
        set(&raw, SOL_RAW, 1, &(!1u32).to_ne_bytes())?;
        bind(&raw, to("127.0.0.1")?)?;
        let plain = z.param("ZOO_PLAIN", 0) == 1;
        if !plain {
            ensure_eq!(connect(&raw, to("127.0.0.1")?), 0, "connect");
            // SAFETY: integers.
            check(unsafe { libc::shutdown(raw.as_raw_fd(), libc::SHUT_RDWR) }, "shutdown")?;
        }
        let headers = socket(libc::AF_INET, libc::SOCK_RAW, 253)?;
        set_int(&headers, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
        set_int(&headers, libc::IPPROTO_IP, 22, 1)?;
        // Has IP_HDRINCL from the start.
        let sender = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        set_int(&sender, libc::IPPROTO_IP, libc::IP_HDRINCL, 0)?;
        // Of TCP's number, but nothing of TCP's kind.
        let tcp = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP)?;
        let talker = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
        set(&talker, SOL_RAW, 1, &(!1u32).to_ne_bytes())?;
        if !plain {
            ensure_eq!(connect(&talker, to("127.0.0.1")?), 0, "connect");
        }
        let mut sixes = Vec::new();
        if std::path::Path::new("/proc/net/if_inet6").exists() {
            let raw = socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
            let mut filter = [0xffu8; 32];
            // Echo replies (129) only.
            filter[129 / 8] = !(1 << (129 % 8));
            set(&raw, libc::IPPROTO_ICMPV6, 1, &filter)?;
            bind(&raw, to("::1")?)?;
            if !plain {
                ensure_eq!(connect(&raw, to("::1")?), 0, "connect");
            }
            let other = socket(libc::AF_INET6, libc::SOCK_RAW, 253)?;
            if !plain {
                set_int(&other, libc::IPPROTO_IPV6, 7, 4)?; // IPV6_CHECKSUM
                set_int(&other, libc::IPPROTO_IPV6, 36, 1)?; // IPV6_HDRINCL
            }
            sixes = vec![raw, other];
        }
        let echo = |family, protocol, ip: &str| {
            let fd = socket(family, libc::SOCK_DGRAM, protocol)?;
            bind(&fd, SocketAddr::new(to(ip)?.ip(), 0x4242))?;
            ensure_eq!(connect(&fd, to(ip)?), 0, "connect");
            Ok::<_, String>(fd)
        };
        let mut echoes = Vec::new();
        match echo(libc::AF_INET, libc::IPPROTO_ICMP, "127.0.0.1") {
            Ok(fd) if !plain => echoes.push(fd),
            Ok(_) => {}
            Err(e) => println!("no ICMP echo sockets: {e}"),
        }
        if !sixes.is_empty() && !echoes.is_empty() {
            echoes.push(echo(libc::AF_INET6, libc::IPPROTO_ICMPV6, "::1")?);
        }
        let state = || -> Result<Vec<String>, String> {
            let mut all = Vec::new();
            for (fd, name) in [(&raw, "raw"), (&headers, "raw"), (&sender, "raw"), (&tcp, "raw")] {
                all.push(listed(name, fd)?);
                for option in [libc::IP_HDRINCL, 22] {
                    let mut value = [0; 4];
                    get(fd, libc::IPPROTO_IP, option, &mut value)?;
                    all.push(format!("{value:?}"));
                }
            }
            let mut filter = [0; 4];
            get(&raw, SOL_RAW, 1, &mut filter)?;
            all.push(format!("filter {filter:?}"));
            for fd in &sixes {
                all.push(listed("raw6", fd)?);
                for option in [7, 36] {
                    let mut value = [0; 4];
                    get(fd, libc::IPPROTO_IPV6, option, &mut value)?;
                    all.push(format!("{value:?}"));
                }
            }
            if let Some(raw) = sixes.first() {
                let mut filter = [0; 32];
                get(raw, libc::IPPROTO_ICMPV6, 1, &mut filter)?;
                all.push(format!("filter {filter:?}"));
            }
            for (fd, name) in echoes.iter().zip(["icmp", "icmp6"]) {
                all.push(listed(name, fd)?);
            }
            all.push(format!("shut down: {:#x}", poll(&raw, 0)?));
            Ok(all)
        };
        let before = state()?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state()?, before, "raw sockets");
        if plain {
            ensure_eq!(connect(&talker, to("127.0.0.1")?), 0, "connect");
            for raw in sixes.iter().take(1) {
                ensure_eq!(connect(raw, to("::1")?), 0, "connect");
            }
        }
        ensure_eq!(ask(&talker, false, 20, "raw")?, (0, 0x4242), "answer");
        if let Some(raw) = sixes.first() {
            ensure_eq!(ask(raw, true, 0, "raw IPv6")?, (129, 0x4242), "answer");
        }
        for (fd, v6) in echoes.iter().zip([false, true]) {
            let reply = if v6 { 129 } else { 0 };
            ensure_eq!(ask(fd, v6, 0, "echo")?, (reply, 0x4242), "answer to a ping socket");
        }
        Ok(())
    })
}
