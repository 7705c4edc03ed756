//! Kernel state: vsock sockets that are new, bound, listening.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::net::{get, get_int, set};
use zoo::{check, ensure_eq, errno};

const ANY: u32 = u32::MAX;

fn socket(kind: i32) -> Option<OwnedFd> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, kind | libc::SOCK_CLOEXEC, 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}

fn bind(fd: &OwnedFd, port: u32) -> zoo::Check {
    // SAFETY: all-zero is a valid address; it is live for its length.
    unsafe {
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as u16;
        address.svm_cid = ANY;
        address.svm_port = port;
        let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len), "bind")
    }
}

fn bound(fd: &OwnedFd) -> Result<(u32, u32), String> {
    // SAFETY: all-zero is a valid address; there is room for `len` bytes.
    unsafe {
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        let mut len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        let ret = libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &mut len);
        check(ret, "getsockname")?;
        Ok((address.svm_cid, address.svm_port))
    }
}

fn main() {
    zoo::run(|z| {
        let Some(listener) = socket(libc::SOCK_STREAM | libc::SOCK_NONBLOCK) else {
            z.skip(&format!("no vsock: error {}", errno()));
        };
        bind(&listener, ANY)?;
        set(&listener, libc::AF_VSOCK, 0, &100_000u64.to_ne_bytes())?;
        // SAFETY: integers.
        check(unsafe { libc::listen(listener.as_raw_fd(), 5) }, "listen")?;
        let packets = socket(libc::SOCK_SEQPACKET);
        let named = socket(libc::SOCK_STREAM).ok_or("socket")?;
        bind(&named, ANY)?;
        let new = socket(libc::SOCK_STREAM).ok_or("socket")?;
        let state = || -> Result<Vec<String>, String> {
            let mut state = Vec::new();
            for fd in
                [Some(&listener), packets.as_ref(), Some(&named), Some(&new)].into_iter().flatten()
            {
                let mut size = [0; 8];
                get(fd, libc::AF_VSOCK, 0, &mut size)?;
                state.push(format!(
                    "{:?} listening {} buffer {} type {}",
                    bound(fd)?,
                    get_int(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?,
                    u64::from_ne_bytes(size),
                    get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
                ));
            }
            Ok(state)
        };
        let before = state()?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state()?, before, "vsock sockets");
        // SAFETY: no address is asked for.
        let client = unsafe {
            libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut())
        };
        ensure_eq!((client, errno()), (-1, libc::EAGAIN), "accept when nobody calls");
        Ok(())
    })
}
