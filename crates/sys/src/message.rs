//! Messages of unix sockets with all that travels with them: recvmsg(2), sendmsg(2), cmsg(3), unix(7).

use crate::call::{self, Result, SyscallError};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// How many descriptors one message can carry (`SCM_MAX_FD`).
pub const MAX_RIGHTS: usize = 253;
/// `SCM_PIDFD` (Linux 6.5).
const SCM_PIDFD: i32 = 4;
/// Alignment of control messages, and the size of their header without padding.
const WORD: usize = size_of::<usize>();
const HEADER: usize = 2 * WORD;
/// Room for all control messages of one message: descriptors, credentials, a pidfd, a security label.
const CONTROL: usize = 1024;

/// `struct ucred`: what `SCM_CREDENTIALS` and `SO_PEERCRED` tell of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process id; 0: none, or of another PID namespace.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

impl Credentials {
    fn from_bytes(bytes: &[u8]) -> Option<Credentials> {
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Credentials { pid: word(0)? as i32, uid: word(4)?, gid: word(8)? })
    }

    fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.uid.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.gid.to_ne_bytes());
        bytes
    }
}

/// A message, or a piece of a stream.
#[derive(Debug, Default)]
pub struct Message {
    /// How many bytes the buffer got.
    pub length: usize,
    /// `MSG_TRUNC`, `MSG_CTRUNC`, `MSG_OOB`.
    pub flags: i32,
    /// `SCM_RIGHTS`, close-on-exec.
    pub rights: Vec<OwnedFd>,
    /// `SCM_CREDENTIALS`.
    pub credentials: Option<Credentials>,
    /// Address of the sender, as unix_diag has it: a path with its final NUL, or an abstract name after a NUL.
    pub sender: Vec<u8>,
}

/// Looks at what waits without taking it out and without waiting: recvmsg(2) with `MSG_PEEK`, `MSG_DONTWAIT` and `flags`.
///
/// # Errors
/// `EAGAIN` if nothing waits.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> Result<Message> {
    let mut control = [0u64; CONTROL];
    let mut name = [0u8; size_of::<libc::sockaddr_un>() + 1];
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as u32;
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let args = [fd.as_raw_fd() as usize, &raw mut header as usize, flags as usize, 0, 0, 0];
    // SAFETY: all that the header names is live and as long as it says.
    let length = unsafe { call::syscall("recvmsg", libc::SYS_recvmsg, args) }?;
    let mut message = Message { length, flags: header.msg_flags, ..Message::default() };
    // The family, then the address.
    message.sender = name.get(2..header.msg_namelen as usize).unwrap_or_default().to_vec();
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let used = (header.msg_controllen as usize).min(bytes.len());
    for (kind, data) in control_messages(&bytes[..used]) {
        let numbers = data.chunks_exact(4).map(|n| i32::from_ne_bytes([n[0], n[1], n[2], n[3]]));
        match kind {
            libc::SCM_RIGHTS => {
                // SAFETY: the kernel has just made these descriptors for us.
                message.rights.extend(numbers.map(|n| unsafe { OwnedFd::from_raw_fd(n) }));
            }
            libc::SCM_CREDENTIALS => message.credentials = Credentials::from_bytes(data),
            SCM_PIDFD => {
                for number in numbers.filter(|n| *n >= 0) {
                    // SAFETY: as above; nobody wants it, so it is closed at once.
                    drop(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            _ => {}
        }
    }
    Ok(message)
}

/// Of the next `length` bytes of a stream (from `SO_PEEK_OFF` on), how many come before the last message among them.
///
/// A look at a stream takes descriptors of the next message even where it has no room for any byte of that; but it ends
/// before a message that does not go into the buffer for want of memory, which the last byte has none of here.
///
/// # Errors
/// As recvmsg(2).
pub fn before_last_message(fd: BorrowedFd<'_>, length: usize) -> Result<usize> {
    let mut buffer = vec![0u8; length.saturating_sub(1)];
    let mut pieces = [
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() },
        libc::iovec { iov_base: std::ptr::without_provenance_mut(1), iov_len: 1 },
    ];
    // SAFETY: msghdr is plain data, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len() as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let args = [fd.as_raw_fd() as usize, &raw mut header as usize, flags as usize, 0, 0, 0];
    // SAFETY: the first piece is live; the second lies in the first page, which is never mapped, so that the kernel writes
    // nothing there. Without room for control messages no descriptors are made.
    match unsafe { call::syscall("recvmsg", libc::SYS_recvmsg, args) } {
        Err(SyscallError { errno: crate::Errno::FAULT, .. }) => Ok(0),
        result => result,
    }
}

/// Type and data of each control message of level `SOL_SOCKET`.
fn control_messages(mut bytes: &[u8]) -> impl Iterator<Item = (i32, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            let length = usize::from_ne_bytes(*bytes.first_chunk()?);
            let word = |at: usize| Some(i32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
            let (level, kind) = (word(WORD)?, word(WORD + 4)?);
            let data = bytes.get(HEADER..length)?;
            bytes = bytes.get(length.next_multiple_of(WORD)..).unwrap_or_default();
            if level == libc::SOL_SOCKET {
                return Some((kind, data));
            }
        }
    })
}

/// Sends `data` without waiting, with descriptors and credentials if there are any, to `address` (a `struct sockaddr_un` as
/// bytes) or, if that is empty, to the peer. The process of the credentials need not exist: then somebody has its id for a
/// moment, in PID namespace `namespace`, if the id is one of another than ours. Returns how many bytes went.
///
/// # Errors
/// `EAGAIN` if there is no room; `EPERM` or `ESRCH` for credentials that may not be claimed or whose process is not there.
pub fn send(
    fd: BorrowedFd<'_>,
    data: &[u8],
    rights: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
    address: &[u8],
    flags: i32,
    namespace: Option<BorrowedFd<'_>>,
) -> Result<usize> {
    let mut control = Vec::with_capacity(64);
    if !rights.is_empty() {
        let numbers = rights.iter().flat_map(|fd| RawFd::to_ne_bytes(fd.as_raw_fd())).collect();
        push_control(&mut control, libc::SCM_RIGHTS, numbers);
    }
    if let Some(credentials) = credentials {
        push_control(&mut control, libc::SCM_CREDENTIALS, credentials.to_bytes().to_vec());
    }
    let mut piece = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: msghdr is plain data, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if !address.is_empty() {
        header.msg_name = address.as_ptr().cast_mut().cast();
        header.msg_namelen = address.len() as u32;
    }
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    if !control.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = (control.len() * WORD) as _;
    }
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let args = [fd.as_raw_fd() as usize, &raw const header as usize, flags as usize, 0, 0, 0];
    let [socket, header, flags, ..] = args;
    let claim = |pid| {
        let caller = Some(Caller { pid, namespace });
        // SAFETY: as below.
        unsafe { one_as(caller, "sendmsg", libc::SYS_sendmsg, [socket, header, flags, 0]) }
    };
    match credentials {
        Some(Credentials { pid, .. }) if namespace.is_some() => return claim(pid),
        _ => {}
    }
    // SAFETY: all that the header names is live and as long as it says; the kernel only reads it.
    match unsafe { call::syscall("sendmsg", libc::SYS_sendmsg, args) } {
        // Nobody has the sender's id any more.
        Err(SyscallError { errno: crate::Errno::SRCH, .. }) => credentials
            .map_or(Err(SyscallError::new("sendmsg", crate::Errno::SRCH)), |c| claim(c.pid)),
        result => result,
    }
}

/// Adds a control message, padded to whole words.
fn push_control(control: &mut Vec<usize>, kind: i32, data: Vec<u8>) {
    let mut bytes = (HEADER + data.len()).to_ne_bytes().to_vec();
    bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(WORD), 0);
    let words = bytes.chunks_exact(WORD).filter_map(|word| word.first_chunk());
    control.extend(words.map(|word| usize::from_ne_bytes(*word)));
}

/// What `SO_PEERCRED` tells: who made the connection or called listen(2). `None` of a socket without a peer.
///
/// # Errors
/// It is no unix socket.
pub fn peer_credentials(fd: BorrowedFd<'_>) -> Result<Option<Credentials>> {
    let (bytes, length) = crate::sockets::option::<12>(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    // Without credentials the kernel tells the ids -1.
    Ok(Credentials::from_bytes(&bytes[..length]).filter(|c| c.uid != u32::MAX))
}

/// Who makes a call, for what the kernel notes of that.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// The id of a process that exists for the call only; 0: any.
    pub pid: i32,
    /// The PID namespace in which it has this id, if that is not ours but one below.
    pub namespace: Option<BorrowedFd<'a>>,
}

/// Has children of the calling thread be born in a PID namespace.
fn bear_in(namespace: BorrowedFd<'_>) -> Result<()> {
    let flags = libc::CLONE_NEWPID as usize;
    let args = [namespace.as_raw_fd() as usize, flags, 0, 0, 0, 0];
    // SAFETY: numbers only.
    unsafe { call::syscall("setns", libc::SYS_setns, args) }.map(drop)
}

/// Children of the calling thread are born in another PID namespace until this is dropped.
struct Nursery {
    own: std::fs::File,
}

impl Nursery {
    fn enter(namespace: BorrowedFd<'_>) -> Result<Nursery> {
        let own = std::fs::File::open("/proc/thread-self/ns/pid_for_children").map_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            SyscallError::new("open", crate::Errno::from_raw_os_error(errno))
        })?;
        bear_in(namespace)?;
        Ok(Nursery { own })
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        use std::os::fd::AsFd;
        // It was ours before, so that it may be so again; if not, clones would fail with a text of their own.
        let _ = bear_in(self.own.as_fd());
    }
}

/// A system call: its number, four arguments, and what it gave.
type Call = [usize; 6];

fn call_of(nr: i64, args: [usize; 4]) -> Call {
    [nr as usize, args[0], args[1], args[2], args[3], 0]
}

/// Makes system calls, in order and whatever they give, as a process of its own, which is `caller` and has our memory,
/// descriptors and credentials, and is gone when this returns: for what the kernel notes of the process that makes a
/// socket. Without one the calling thread makes them.
///
/// # Errors
/// `EEXIST` if the id is taken.
///
/// # Safety
/// The arguments must be valid for the calls, which must not touch the stack, registers or thread-local memory of the
/// caller.
unsafe fn as_process(caller: Option<Caller<'_>>, calls: &mut [Call]) -> Result<()> {
    let Some(Caller { pid, namespace }) = caller else {
        for [number, a, b, c, d, result] in calls {
            // SAFETY: promised by the caller.
            let given = unsafe { libc::syscall(*number as libc::c_long, *a, *b, *c, *d) };
            *result = if given < 0 { last_errno().wrapping_neg() } else { given as usize };
        }
        return Ok(());
    };
    let nursery = namespace.map(Nursery::enter).transpose()?;
    let mut pidfd = -1i32;
    let tids = [pid];
    let flags =
        libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS;
    let clone = crate::task::CloneArgs {
        flags: flags as u64,
        pidfd: (&raw mut pidfd) as u64,
        set_tid: if pid == 0 { 0 } else { tids.as_ptr() as u64 },
        set_tid_size: u64::from(pid != 0),
        ..Default::default()
    };
    let calls = calls.as_mut_ptr_range();
    let child: i64;
    // SAFETY: the child shares our memory but runs only the instructions behind the first system call, in registers: the
    // calls the caller vouches for, a store of each result, exit(0). It uses no stack, so that keeping ours (stack 0) is
    // sound, and we sleep until it is gone (CLONE_VFORK). Its end is not signalled (exit_signal 0).
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 4f",
            "2:",
            "cmp r8, r9",
            "je 3f",
            "mov rax, [r8]",
            "mov rdi, [r8 + 8]",
            "mov rsi, [r8 + 16]",
            "mov rdx, [r8 + 24]",
            "mov r10, [r8 + 32]",
            "syscall",
            "mov [r8 + 40], rax",
            "add r8, {size}",
            "jmp 2b",
            "3:",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "4:",
            size = const size_of::<Call>(),
            exit = const libc::SYS_exit,
            inlateout("rax") libc::SYS_clone3 => child,
            inlateout("rdi") &raw const clone => _,
            in("rsi") size_of_val(&clone),
            in("r8") calls.start,
            in("r9") calls.end,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    drop(nursery);
    if child < 0 {
        let errno = crate::Errno::from_raw_os_error(-child as i32);
        return Err(SyscallError::new("clone3", errno));
    }
    // SAFETY: the kernel has just made it for us.
    let fd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // __WALL: the child has no exit signal, which waitid passes over otherwise.
    let options = (libc::WEXITED | libc::__WALL) as usize;
    let wait = [libc::P_PIDFD as usize, fd.as_raw_fd() as usize, 0, options, 0, 0];
    // SAFETY: no pointers but null ones, which waitid takes for "not wanted".
    unsafe { call::syscall("waitid", libc::SYS_waitid, wait) }.map(drop)
}

/// As [`as_process`] for one call.
///
/// # Safety
/// As there.
unsafe fn one_as(
    caller: Option<Caller<'_>>,
    name: &'static str,
    nr: i64,
    args: [usize; 4],
) -> Result<usize> {
    let mut call = [call_of(nr, args)];
    // SAFETY: promised by the caller.
    unsafe { as_process(caller, &mut call) }?;
    result_of(name, &call[0])
}

fn last_errno() -> usize {
    // SAFETY: errno is a thread-local of libc, always readable.
    unsafe { *libc::__errno_location() as usize }
}

fn result_of(name: &'static str, call: &Call) -> Result<usize> {
    match call[5] as isize {
        e if e < 0 => Err(SyscallError::new(name, crate::Errno::from_raw_os_error(-e as i32))),
        _ => Ok(call[5]),
    }
}

/// socketpair(2), `count` times, as `caller` (none: the calling thread): that is whom `SO_PEERCRED` of the ends names. `kind`
/// is `SOCK_*`.
///
/// # Errors
/// `EEXIST` if the id is taken; `EMFILE`.
pub fn pairs_as(
    caller: Option<Caller<'_>>,
    kind: i32,
    count: usize,
) -> Result<Vec<(OwnedFd, OwnedFd)>> {
    let mut ends = vec![[-1i32; 2]; count];
    let kind = (kind | libc::SOCK_CLOEXEC) as usize;
    let mut calls: Vec<Call> = ends
        .iter_mut()
        .map(|pair| {
            let args = [libc::AF_UNIX as usize, kind, 0, pair.as_mut_ptr() as usize];
            call_of(libc::SYS_socketpair, args)
        })
        .collect();
    // SAFETY: there is room for two descriptors each; the calls touch nothing else.
    unsafe { as_process(caller, &mut calls) }?;
    // SAFETY: the kernel has just put them into our table.
    let owned = |n: i32| unsafe { OwnedFd::from_raw_fd(n) };
    let mut pairs = Vec::with_capacity(count);
    let mut failure = None;
    for (call, [a, b]) in calls.iter().zip(ends) {
        match result_of("socketpair", call) {
            Ok(_) => pairs.push((owned(a), owned(b))),
            Err(e) => failure = Some(e),
        }
    }
    failure.map_or(Ok(pairs), Err)
}

/// listen(2) as `caller` (none: the calling thread): that is whom `SO_PEERCRED` of clients names.
///
/// # Errors
/// `EEXIST` if the id is taken.
pub fn listen_as(caller: Option<Caller<'_>>, fd: BorrowedFd<'_>, backlog: i32) -> Result<()> {
    let args = [fd.as_raw_fd() as usize, backlog as usize, 0, 0];
    // SAFETY: no pointers.
    unsafe { one_as(caller, "listen", libc::SYS_listen, args) }.map(drop)
}

/// connect(2) as `caller` (as [`pairs_as`]) to an address given as a `struct sockaddr_un` in bytes: that is whom `SO_PEERCRED`
/// of the accepted socket names.
///
/// # Errors
/// `EEXIST` if the id is taken; `EAGAIN` if the backlog is full and the socket does not wait.
pub fn connect_as(caller: Option<Caller<'_>>, fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    let args = [fd.as_raw_fd() as usize, address.as_ptr() as usize, address.len(), 0];
    // SAFETY: the address is live for its length; the kernel only reads it.
    unsafe { one_as(caller, "connect", libc::SYS_connect, args) }.map(drop)
}

/// Gives the calling thread other effective ids, which the kernel notes for [`pairs_as`] and its like, for as long as `body`
/// runs. Other threads keep theirs.
///
/// # Errors
/// `EPERM` without `CAP_SETUID` and `CAP_SETGID`.
pub fn with_ids<T>(uid: u32, gid: u32, body: impl FnOnce() -> T) -> Result<T> {
    const SAME: usize = u32::MAX as usize;
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if own == (uid, gid) {
        return Ok(body());
    }
    let set = |call, nr, id: u32| {
        // SAFETY: numbers only; the raw call concerns the calling thread alone.
        unsafe { call::syscall(call, nr, [SAME, id as usize, SAME, 0, 0, 0]) }
    };
    set("setresgid", libc::SYS_setresgid, gid)?;
    let done = set("setresuid", libc::SYS_setresuid, uid).map(|_| {
        // Choosing process ids takes a capability, of which other ids make the thread lose the effective ones only.
        if let Ok(mut sets) = rustix::thread::capabilities(None) {
            sets.effective = sets.permitted;
            let _ = rustix::thread::set_capabilities(None, sets);
        }
        let done = body();
        set("setresuid", libc::SYS_setresuid, own.0).map(|_| done)
    });
    set("setresgid", libc::SYS_setresgid, own.1)?;
    done?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_and_credentials_travel() {
        let (a, b) = UnixStream::pair().unwrap();
        crate::sockets::set_option_int(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
        let own = Credentials { pid: std::process::id() as i32, uid: 0, gid: 0 };
        let own = Credentials { uid: rustix::process::getuid().as_raw(), ..own };
        let own = Credentials { gid: rustix::process::getgid().as_raw(), ..own };
        let many = [a.as_fd(); 7];
        assert_eq!(send(a.as_fd(), b"hello", &many, Some(own), &[], 0, None).unwrap(), 5);
        for _ in 0..2 {
            let mut buffer = [0; 9];
            let message = peek(b.as_fd(), &mut buffer, 0).unwrap();
            assert_eq!((message.length, &buffer[..5]), (5, &b"hello"[..]));
            assert_eq!((message.rights.len(), message.credentials), (7, Some(own)));
        }
    }

    #[test]
    fn the_last_message_is_found() {
        let (a, b) = UnixStream::pair().unwrap();
        for (data, rights) in [(&b"one"[..], 0), (b"two", 0), (b"three", 1), (b"four", 0)] {
            send(a.as_fd(), data, &[a.as_fd(); 1][..rights], None, &[], 0, None).unwrap();
        }
        let mut buffer = [0; 99];
        // What is looked at ends with the message that has descriptors.
        assert_eq!(peek(b.as_fd(), &mut buffer, 0).unwrap().length, 11);
        assert_eq!(before_last_message(b.as_fd(), 11).unwrap(), 6);
        assert_eq!(before_last_message(b.as_fd(), 3).unwrap(), 0);
    }

    #[test]
    fn a_pair_is_made_by_another_process() {
        let any = Caller { pid: 0, namespace: None };
        let (a, _b) = pairs_as(Some(any), libc::SOCK_STREAM, 2).unwrap().pop().unwrap();
        let made = peer_credentials(a.as_fd()).unwrap().unwrap();
        assert_ne!(made.pid, std::process::id() as i32);
        assert_ne!(made.pid, 0);
        let ours = Caller { pid: std::process::id() as i32, ..any };
        let taken = pairs_as(Some(ours), libc::SOCK_STREAM, 1).unwrap_err();
        // Without the privilege to choose ids, EPERM.
        assert!(matches!(taken.errno, crate::Errno::EXIST | crate::Errno::PERM), "{taken}");
    }

    #[test]
    fn ids_are_others_for_a_while() {
        let own = rustix::process::geteuid();
        let any = Caller { pid: 0, namespace: None };
        let made = with_ids(7, 8, || pairs_as(Some(any), libc::SOCK_SEQPACKET, 1));
        let Ok(made) = made else {
            assert!(!own.is_root());
            eprintln!("SKIP: other ids need CAP_SETUID");
            return;
        };
        let (a, _b) = made.unwrap().pop().unwrap();
        let peer = peer_credentials(a.as_fd()).unwrap().unwrap();
        assert_eq!((peer.uid, peer.gid), (7, 8));
        assert_eq!(rustix::process::geteuid(), own);
    }

    #[test]
    fn bad_control_messages_end_the_list() {
        assert_eq!(control_messages(&[0; 24]).count(), 0);
        assert_eq!(control_messages(&[255; 24]).count(), 0);
        assert_eq!(control_messages(&[]).count(), 0);
    }
}
