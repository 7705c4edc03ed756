//! Network namespaces for trials: made without any helper program, gone with their last user.

use crate::harness::{Fail, NotReady, execute};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

/// A network namespace with its loopback up.
#[derive(Debug)]
pub struct Net {
    ns: OwnedFd,
}

fn last(what: &str) -> Fail {
    format!("{what}: {}", std::io::Error::last_os_error())
}

impl Net {
    /// A fresh one; it needs `CAP_SYS_ADMIN`.
    pub fn new() -> Result<Net, Fail> {
        let made = std::thread::spawn(|| {
            // SAFETY: only this thread's namespace changes.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(last("unshare"));
            }
            raise("lo")?;
            File::open("/proc/thread-self/ns/net").map_err(|e| e.to_string())
        });
        let ns = made.join().map_err(|_| "the thread panicked")??;
        Ok(Net { ns: ns.into() })
    }

    /// The thread's own.
    pub fn current() -> Result<Net, Fail> {
        let ns = File::open("/proc/thread-self/ns/net").map_err(|e| e.to_string())?;
        Ok(Net { ns: ns.into() })
    }

    /// Runs `body` inside; what it starts is inside too.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T, Fail> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                // SAFETY: only this thread's namespace changes.
                if unsafe { libc::setns(self.ns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(last("setns"));
                }
                Ok(body())
            });
            inside.join().map_err(|_| "the thread panicked".to_owned())?
        })
    }
}

fn control() -> Result<OwnedFd, Fail> {
    zoo::net::socket(libc::AF_INET, libc::SOCK_DGRAM)
}

fn request(interface: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request
}

/// Switches an interface of the thread's namespace on.
pub fn raise(interface: &str) -> Result<(), Fail> {
    let control = control()?;
    let mut request = request(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: a valid request.
    match unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(last(&format!("{interface} up"))),
    }
}

/// Runs `ip` of iproute2 in the thread's namespace.
pub fn ip(dir: &Path, arguments: &str) -> Result<(), NotReady> {
    let places = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip"];
    let Some(path) = places.iter().find(|p| Path::new(p).exists()) else {
        return Err(NotReady::Skip("ip (iproute2) is not installed".into()));
    };
    let mut command = Command::new(path);
    command.args(arguments.split_whitespace());
    let done = execute(command, dir)?;
    if done.success() {
        return Ok(());
    }
    let text = format!("ip {arguments}: {}", done.text.trim());
    let lacks = ["Unknown device type", "Operation not supported"];
    Err(if lacks.iter().any(|l| text.contains(l)) { NotReady::Skip(text) } else { text.into() })
}

impl Net {
    /// A pair of virtual interfaces: `near` in the thread's namespace, `far` in this one.
    pub fn cable(&self, dir: &Path, near: &str, far: &str) -> Result<(), NotReady> {
        let (me, ns) = (std::process::id(), self.ns.as_raw_fd());
        ip(dir, &format!("link add {near} type veth peer name {far} netns /proc/{me}/fd/{ns}"))?;
        ip(dir, &format!("link set {near} up"))
    }
}
