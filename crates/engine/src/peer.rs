//! Who is at the other end of a unix socket.

use rustix::fd::BorrowedFd;
use rustix::io::Errno;

/// Is the other end a process of the same user (`SO_PEERCRED`)? Whoever else it is could take descriptors of the tree, or
/// have processes ended.
pub fn is_ours(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid == rustix::process::geteuid())
}
