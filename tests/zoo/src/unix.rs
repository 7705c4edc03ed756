//! Unix sockets for zoo programs: thin calls that the standard library lacks.

use crate::{Check, check, ensure_eq, errno, ok};
use std::os::fd::RawFd;

/// socketpair(2)
pub fn pair(kind: i32) -> Result<[RawFd; 2], String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, "socketpair")?;
    Ok(fds)
}

/// socket(2)
pub fn socket(kind: i32) -> Result<RawFd, String> {
    // SAFETY: integers.
    ok(unsafe { libc::socket(libc::AF_UNIX, kind, 0) } as i64, "socket").map(|fd| fd as RawFd)
}

/// close(2)
pub fn close(fd: RawFd) {
    // SAFETY: integers.
    unsafe { libc::close(fd) };
}

/// An address: a path, or an abstract name that begins with `@`.
fn address(name: &str) -> (libc::sockaddr_un, u32) {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().zip(name.bytes()) {
        *to = if from == b'@' { 0 } else { from as libc::c_char };
    }
    let end = usize::from(!name.starts_with('@'));
    (address, (2 + name.len() + end) as u32)
}

/// bind(2)
pub fn bind(fd: RawFd, name: &str) -> Check {
    let (address, len) = address(name);
    // SAFETY: the address is valid for its length.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), len) }, "bind")
}

/// connect(2)
pub fn connect(fd: RawFd, name: &str) -> Check {
    let (address, len) = address(name);
    // SAFETY: the address is valid for its length.
    check(unsafe { libc::connect(fd, (&raw const address).cast(), len) }, "connect")
}

/// A listening socket.
pub fn listener(kind: i32, name: &str, backlog: i32) -> Result<RawFd, String> {
    let fd = socket(kind)?;
    bind(fd, name)?;
    // SAFETY: integers.
    check(unsafe { libc::listen(fd, backlog) }, "listen")?;
    Ok(fd)
}

/// A connected socket.
pub fn client(kind: i32, name: &str) -> Result<RawFd, String> {
    let fd = socket(kind)?;
    connect(fd, name)?;
    Ok(fd)
}

/// accept(2)
pub fn accept(fd: RawFd) -> Result<RawFd, String> {
    let null = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    ok(unsafe { libc::accept(fd, null, null.cast()) } as i64, "accept").map(|fd| fd as RawFd)
}

/// The own address (`false`) or that of the peer, as [`bind`] takes it; empty if there is none.
pub fn name(fd: RawFd, of_peer: bool) -> Result<String, String> {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as u32;
    let ask = if of_peer { libc::getpeername } else { libc::getsockname };
    // SAFETY: the address is valid for its length.
    check(unsafe { ask(fd, (&raw mut address).cast(), &mut len) }, "getsockname")?;
    Ok(shown(&address, len))
}

fn shown(address: &libc::sockaddr_un, len: u32) -> String {
    let bytes: Vec<u8> = address.sun_path.iter().map(|c| *c as u8).collect();
    let bytes = &bytes[..(len as usize).saturating_sub(2).min(bytes.len())];
    match bytes.split_first() {
        None => String::new(),
        Some((0, name)) => format!("@{}", String::from_utf8_lossy(name)),
        Some(_) => String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string(),
    }
}

/// An `int` option of level `SOL_SOCKET`.
pub fn option(fd: RawFd, name: i32) -> Result<i32, String> {
    let (mut value, mut len) = (0i32, 4);
    let value_at = (&raw mut value).cast();
    // SAFETY: the value is valid for its length.
    let done = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, value_at, &mut len) };
    check(done, "getsockopt")?;
    Ok(value)
}

/// Sets an `int` option of level `SOL_SOCKET`.
pub fn set_option(fd: RawFd, name: i32, value: i32) -> Check {
    let value_at = (&raw const value).cast();
    // SAFETY: the value is valid for its length.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, value_at, 4) }, "setsockopt")
}

/// `SO_PEERCRED`: pid, uid, gid.
pub fn peer(fd: RawFd) -> Result<(i32, u32, u32), String> {
    let mut value = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&value) as u32;
    let value_at = (&raw mut value).cast();
    // SAFETY: the value is valid for its length.
    let done =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, value_at, &mut len) };
    check(done, "SO_PEERCRED")?;
    Ok((value.pid, value.uid, value.gid))
}

/// Sends a message with descriptors.
pub fn send(fd: RawFd, data: &[u8], rights: &[RawFd]) -> Check {
    send_to(fd, data, rights, "")
}

/// Sends a message with descriptors, to an address if that is not empty.
pub fn send_to(fd: RawFd, data: &[u8], rights: &[RawFd], to: &str) -> Check {
    let mut control = [0u64; 160];
    let mut piece = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    let (mut target, target_len) = address(to);
    // SAFETY: a zeroed header is valid; everything it points to lives through the call, and the control buffer has room
    // for 256 descriptors.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        if !to.is_empty() {
            header.msg_name = (&raw mut target).cast();
            header.msg_namelen = target_len;
        }
        header.msg_iov = &mut piece;
        header.msg_iovlen = 1;
        if !rights.is_empty() {
            let len = (rights.len() * 4) as u32;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(len) as usize;
            let to = libc::CMSG_DATA(first).cast::<RawFd>();
            for (i, fd) in rights.iter().enumerate() {
                to.add(i).write_unaligned(*fd);
            }
        }
        libc::sendmsg(fd, &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    ensure_eq!(ok(sent as i64, "sendmsg")? as usize, data.len(), "bytes sent");
    Ok(())
}

/// What one recvmsg(2) gave.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its bytes.
    pub data: Vec<u8>,
    /// Descriptors.
    pub rights: Vec<RawFd>,
    /// `SCM_CREDENTIALS`: pid, uid, gid.
    pub credentials: Option<(i32, u32, u32)>,
    /// `SCM_PIDFD`
    pub pidfd: Option<RawFd>,
    /// Address of the sender.
    pub sender: String,
}

/// Receives one message, or the error number; never waits.
pub fn receive(fd: RawFd, room: usize, flags: i32) -> Result<Message, i32> {
    let mut control = [0u64; 200];
    let mut data = vec![0u8; room];
    let mut message = Message::default();
    let mut piece = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: room };
    // SAFETY: a zeroed header and address are valid; everything the header points to lives through the calls, which stay
    // inside what the kernel has filled in.
    unsafe {
        let mut from: libc::sockaddr_un = std::mem::zeroed();
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_name = (&raw mut from).cast();
        header.msg_namelen = size_of_val(&from) as u32;
        header.msg_iov = &mut piece;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        let got = libc::recvmsg(fd, &mut header, flags | libc::MSG_DONTWAIT);
        if got < 0 {
            return Err(errno());
        }
        data.truncate(got as usize);
        message.sender = shown(&from, header.msg_namelen);
        let mut at = libc::CMSG_FIRSTHDR(&header);
        while !at.is_null() {
            let len = ((*at).cmsg_len - libc::CMSG_LEN(0) as usize) / 4;
            let words = libc::CMSG_DATA(at).cast::<i32>();
            let word = |i: usize| words.add(i).read_unaligned();
            match (*at).cmsg_type {
                libc::SCM_RIGHTS => message.rights.extend((0..len).map(word)),
                libc::SCM_CREDENTIALS => {
                    message.credentials = Some((word(0), word(1) as u32, word(2) as u32));
                }
                4 => message.pidfd = Some(word(0)),
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&header, at);
        }
    }
    message.data = data;
    Ok(message)
}
