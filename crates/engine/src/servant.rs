//! Processes of rewake's own that work beside a command or outlive it: the keeper of tracked memory, the pager of a lazy
//! restore and its guard.

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io::Result;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

/// Starts one: this very program (`/proc/self/exe`, which is there even if its file has been replaced) under the command
/// word `word`, which no help mentions. Its standard input is a socket of `kind`, whose other end is returned. `more` adds
/// what else it is to have; without it its standard error is the caller's.
///
/// # Errors
/// socketpair(2), fork(2) or execve(2) fails.
pub fn start(
    word: &str,
    kind: SocketType,
    more: impl FnOnce(&mut Command),
) -> Result<(OwnedFd, Child)> {
    let (own, its) =
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("rewake").arg(word).current_dir("/").stdin(Stdio::from(its)).stdout(Stdio::null());
    more(&mut command);
    Ok((own, command.spawn()?))
}
