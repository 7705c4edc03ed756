//! Socket options and messages that rustix lacks.

use crate::call::{self, Result, SyscallError};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Reads a socket option as raw bytes (`getsockopt(2)`), at most `N`.
///
/// # Errors
/// `ENOPROTOOPT` if the socket has no such option.
pub fn option<const N: usize>(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
) -> Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: value is live for `len` bytes.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if result < 0 {
        return Err(SyscallError::new("getsockopt", last_errno()));
    }
    Ok((value, len as usize))
}

/// Reads a socket option that is asked about by what is in `value` beforehand; returns the length of the answer.
///
/// # Errors
/// As [`option`].
pub fn ask_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> Result<usize> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: value is live for `len` bytes, for reading and writing.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if result < 0 {
        return Err(SyscallError::new("getsockopt", last_errno()));
    }
    Ok(len as usize)
}

/// Reads an `int` socket option.
///
/// # Errors
/// As [`option`].
pub fn option_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32> {
    option::<4>(fd, level, name).map(|(value, _)| i32::from_ne_bytes(value))
}

/// Sets a socket option from raw bytes (`setsockopt(2)`).
///
/// # Errors
/// `EPERM`, `EINVAL`, `ENOPROTOOPT`.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: value is live for its length; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(SyscallError::new("setsockopt", last_errno()));
    }
    Ok(())
}

/// Sets an `int` socket option.
///
/// # Errors
/// As [`set_option`].
pub fn set_option_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

fn last_errno() -> crate::Errno {
    // SAFETY: errno is a thread-local of libc, always readable.
    crate::Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// The bytes of a socket's own address (getsockname(2)), for families that rustix does not know; zeros follow.
///
/// # Errors
/// `ENOTSOCK`.
pub fn own_address(fd: BorrowedFd<'_>) -> Result<[u8; size_of::<libc::sockaddr_storage>()]> {
    let mut address = [0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = address.len() as libc::socklen_t;
    // SAFETY: the address has room for `len` bytes.
    let result =
        unsafe { libc::getsockname(fd.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len) };
    if result < 0 {
        return Err(SyscallError::new("getsockname", last_errno()));
    }
    Ok(address)
}

/// Binds a socket to an address given as bytes (bind(2)), for families that rustix does not know.
///
/// # Errors
/// `EADDRINUSE`, `ENODEV` and others.
pub fn bind_to(fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    // SAFETY: the address is live for its length; the kernel only reads it.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    };
    if result < 0 {
        return Err(SyscallError::new("bind", last_errno()));
    }
    Ok(())
}

/// A message as recvmsg(2) gives it.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Bytes of data.
    pub data: usize,
    /// Bytes of control messages.
    pub control: usize,
    /// `MSG_TRUNC` and others.
    pub flags: i32,
    /// Who has sent it, if that is an internet address.
    pub source: Option<std::net::SocketAddr>,
}

/// Receives a message with its control messages and the address of its sender (recvmsg(2)); `flags` are `MSG_*`.
///
/// # Errors
/// `EAGAIN` if there is none, with `MSG_DONTWAIT`.
pub fn receive(
    fd: BorrowedFd<'_>,
    data: &mut [u8],
    control: &mut [u8],
    flags: i32,
) -> Result<Received> {
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut address = std::mem::MaybeUninit::<libc::sockaddr_storage>::zeroed();
    // SAFETY: all zero is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = address.as_mut_ptr().cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len();
    // SAFETY: name, data and control are live for the lengths given.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    if received < 0 {
        return Err(SyscallError::new("recvmsg", last_errno()));
    }
    // SAFETY: it was zeroed; the kernel has written what it wrote.
    let address = unsafe { address.assume_init() };
    Ok(Received {
        data: received as usize,
        control: message.msg_controllen,
        flags: message.msg_flags,
        source: internet_address(&address),
    })
}

fn internet_address(address: &libc::sockaddr_storage) -> Option<std::net::SocketAddr> {
    use std::net::{Ipv4Addr, SocketAddrV4, SocketAddrV6};
    match i32::from(address.ss_family) {
        libc::AF_INET => {
            // SAFETY: the storage is larger, aligned, and of this family.
            let v4 = unsafe { &*(&raw const *address).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*(&raw const *address).cast::<libc::sockaddr_in6>() };
            let port = u16::from_be(v6.sin6_port);
            let ip = v6.sin6_addr.s6_addr.into();
            Some(SocketAddrV6::new(ip, port, v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// The control messages that [`receive`] has left in `control`: level, type, contents.
pub fn control_messages(control: &[u8]) -> impl Iterator<Item = (i32, i32, &[u8])> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut rest = control;
    std::iter::from_fn(move || {
        let length = usize::from_ne_bytes(*rest.first_chunk()?);
        let number = |at: usize| Some(i32::from_ne_bytes(*rest.get(at..)?.first_chunk()?));
        let message = (number(8)?, number(12)?, rest.get(HEADER..length)?);
        rest = rest.get(length.next_multiple_of(size_of::<usize>())..).unwrap_or(&[]);
        Some(message)
    })
}

/// How much is in a queue, in bytes: `SIOCINQ`, `SIOCOUTQ` or `SIOCOUTQNSD` (tcp(7), unix(7)).
///
/// # Errors
/// `EINVAL` for a listening socket.
pub fn queue_length(fd: BorrowedFd<'_>, which: u32) -> Result<usize> {
    let mut length: libc::c_int = 0;
    // SAFETY: the requests named write an int.
    unsafe {
        call::syscall(
            "ioctl",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, which as usize, &raw mut length as usize, 0, 0, 0],
        )
    }?;
    Ok(usize::try_from(length).unwrap_or(0))
}

/// Whether the next byte of a stream is the one out of band (`SIOCATMARK`; sockatmark(3)).
///
/// # Errors
/// `ENOTTY` where there are no such bytes.
pub fn at_mark(fd: BorrowedFd<'_>) -> Result<bool> {
    const SIOCATMARK: u32 = 0x8905;
    queue_length(fd, SIOCATMARK).map(|answer| answer != 0)
}

/// Opens, as by `O_PATH`, the file a unix socket is bound to (`SIOCUNIXFILE`).
///
/// # Errors
/// `ENOENT` if it is bound to none.
pub fn bound_file(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    const SIOCUNIXFILE: usize = 0x89e0;
    // SAFETY: the request takes no pointer.
    let opened = unsafe {
        call::syscall(
            "SIOCUNIXFILE",
            libc::SYS_ioctl,
            [fd.as_raw_fd() as usize, SIOCUNIXFILE, 0, 0, 0, 0],
        )
    }?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

/// The classic BPF filter of a socket (`SO_GET_FILTER`), an instruction an element: `code << 48 | jt << 40 | jf << 32 | k`.
///
/// # Errors
/// `EACCES` if it is an eBPF program.
pub fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u64>> {
    // Asked with no room, the kernel tells how many instructions there are.
    let (_, count) = option::<0>(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER)?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut program = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; count];
    let mut len = count as libc::socklen_t;
    // SAFETY: for this option the length counts instructions, and there is room for as many.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            program.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(SyscallError::new("SO_GET_FILTER", last_errno()));
    }
    program.truncate(len as usize);
    Ok(program
        .iter()
        .map(|i| {
            u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k)
        })
        .collect())
}

/// Attaches a classic BPF filter (`SO_ATTACH_FILTER`), instructions as [`filter`] gives them.
///
/// # Errors
/// `EINVAL` if it is not a valid program.
pub fn attach_filter(fd: BorrowedFd<'_>, program: &[u64]) -> Result<()> {
    attach(fd, program, libc::SO_ATTACH_FILTER, "SO_ATTACH_FILTER")
}

/// Has a classic BPF program decide which member of the socket's `SO_REUSEPORT` group gets what arrives
/// (`SO_ATTACH_REUSEPORT_CBPF`).
///
/// # Errors
/// `EINVAL` if it is not a valid program, or the socket is in no group.
pub fn attach_reuseport_filter(fd: BorrowedFd<'_>, program: &[u64]) -> Result<()> {
    attach(fd, program, libc::SO_ATTACH_REUSEPORT_CBPF, "SO_ATTACH_REUSEPORT_CBPF")
}

fn attach(fd: BorrowedFd<'_>, program: &[u64], option: i32, name: &'static str) -> Result<()> {
    let mut instructions: Vec<libc::sock_filter> = program
        .iter()
        .map(|i| libc::sock_filter {
            code: (i >> 48) as u16,
            jt: (i >> 40) as u8,
            jf: (i >> 32) as u8,
            k: *i as u32,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len())
            .map_err(|_| SyscallError::new(name, crate::Errno::INVAL))?,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the program and its instructions are live; the kernel only reads them.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(SyscallError::new(name, last_errno()));
    }
    Ok(())
}

/// Gives the calling thread a working directory of its own (unshare(2) with `CLONE_FS`), for binding unix sockets to
/// relative paths.
///
/// # Errors
/// `ENOMEM`.
pub fn unshare_directory() -> Result<()> {
    // SAFETY: no pointer; only the thread's own idea of its working directory, root and umask changes.
    unsafe { call::syscall("unshare", libc::SYS_unshare, [libc::CLONE_FS as usize, 0, 0, 0, 0, 0]) }
        .map(drop)
}

/// Gives the calling thread a network namespace of its own (unshare(2) with `CLONE_NEWNET`).
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn unshare_network() -> Result<()> {
    // SAFETY: no pointer; descriptors keep working.
    unsafe {
        call::syscall("unshare", libc::SYS_unshare, [libc::CLONE_NEWNET as usize, 0, 0, 0, 0, 0])
    }
    .map(drop)
}
