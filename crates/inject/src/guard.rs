//! A guard: makes what must not be left half done one step: the killing of many processes or the release of many, the time
//! in which options of a live program's sockets are other than it knows them.
//!
//! It is an agent in a process of its own, which shares the controller's memory, has the descriptors that the controller had
//! when it was posted, and waits for the end of a pipe. If the controller dies before it has dismissed the guard, the guard
//! does what it was posted for.

use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Ring, Script};
use crate::{Error, Result};
use rewake_agent::arch::executor;
use rewake_agent::layout::{FLAG_HANGUP, Header, Op};
use rewake_sys::task::{CloneArgs, clone_agent};
use rewake_sys::{signal, wait};
use rustix::fd::OwnedFd;
use rustix::pipe::PipeFlags;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Operations and bytes of data of the ring itself: one operation each way, and a byte to read into.
const OPS: usize = 4;
const DATA: usize = 64;

/// Number of a ring's first batch.
const FIRST: u32 = 1;
/// A guard that has not begun after this long never will.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket option that is an `int`, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SocketOption {
    /// The socket.
    pub fd: RawFd,
    /// `SOL_SOCKET`, `IPPROTO_IP`, …
    pub level: i32,
    /// Within the level.
    pub name: i32,
    /// What it is set to.
    pub value: i32,
}

/// A guard on duty. Dropping it sends it away without a deed.
#[derive(Debug)]
pub struct Guard {
    pid: i32,
    ring: Ring,
    /// Its end is our end.
    lifeline: OwnedFd,
}

impl Guard {
    /// Posts a guard that kills `pids`, in their order, should this process die.
    ///
    /// # Errors
    /// The failed call.
    pub fn post(pids: &[i32]) -> Result<Guard> {
        let kill =
            |(_, pid): (u64, &i32)| Op::new(libc::SYS_kill, &[*pid as u64, libc::SIGKILL as u64]);
        Guard::with_deeds(pids, kill)
    }

    /// Posts a guard that sets these socket options, in their order, should this process die.
    ///
    /// # Errors
    /// The failed call.
    pub fn of_sockets(options: &[SocketOption]) -> Result<Guard> {
        let set = |(at, option): (u64, &SocketOption)| {
            let value = at + offset_of!(SocketOption, value) as u64;
            let SocketOption { fd, level, name, .. } = *option;
            let args = [fd as u64, level as u64, name as u64, value, size_of::<i32>() as u64];
            Op::new(libc::SYS_setsockopt, &args)
        };
        Guard::with_deeds(options, set)
    }

    /// Posts one that does what `deed` makes of each item; it is told where the guard finds a copy of the item.
    fn with_deeds<T: Copy>(items: &[T], deed: impl Fn((u64, &T)) -> Op) -> Result<Guard> {
        let ring_len = Ring::size_for(OPS, DATA);
        let deeds_at = PAGE + ring_len.next_multiple_of(size_of::<Op>());
        let items_at = deeds_at + items.len() * size_of::<Op>();
        let len = (items_at + size_of_val(items)).next_multiple_of(PAGE);
        let file = rustix::fs::memfd_create("rewake", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::errno("creating a guard", "memfd_create"))?;
        rustix::fs::ftruncate(&file, len as u64)
            .map_err(Error::errno("creating a guard", "ftruncate"))?;
        let map = Arc::new(SharedMap::of_file(file, len)?);
        map.write(0, executor());
        map.make_code(PAGE)?;
        for (i, item) in items.iter().enumerate() {
            let at = items_at + i * size_of::<T>();
            map.put(at, item);
            map.put(deeds_at + i * size_of::<Op>(), &deed((map.address() + at as u64, item)));
        }
        let (theirs, lifeline) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(Error::errno("creating a guard", "pipe2"))?;
        let base = map.address();
        let header = base + PAGE as u64;
        let ring = Ring::new(map.clone(), PAGE, ring_len, DATA, header, Doorbell::Futex);
        let byte = ring.data_base();
        ring.initialise(&Header {
            undo_count: items.len() as u32,
            undo: base + deeds_at as u64,
            wait: Op {
                flags: FLAG_HANGUP,
                ..Op::new(libc::SYS_read, &[theirs.as_raw_fd() as u64, byte, 1])
            },
            ..Header::EMPTY
        });
        // Its copy of our end must not keep the pipe open.
        let mut first = Script::new(ring.data_base());
        first.push(Op::new(libc::SYS_close, &[lifeline.as_raw_fd() as u64]));
        // Who kills our process group or session does not mean the guard.
        first.push(Op::new(libc::SYS_setsid, &[]));
        ring.load(&first)?;
        let args = CloneArgs {
            flags: libc::CLONE_VM as u64,
            exit_signal: libc::SIGCHLD as u64,
            ..CloneArgs::default()
        };
        // SAFETY: the executor stands at the start of the mapping, and the header is filled. The mapping outlives the
        // child: `Drop` waits for its end.
        let pid = unsafe { clone_agent(&args, base as usize, header as usize) }
            .map_err(Error::syscall("creating a guard"))?;
        Ok(Guard { pid, ring, lifeline })
    }

    /// Sends the guard away: what it was posted for is done.
    ///
    /// # Errors
    /// It cannot be told, which leaves it on duty until it is dropped.
    pub fn dismiss(self) -> Result<()> {
        // It may not have begun yet; its first batch must be over before another takes its place.
        self.ring.wait(FIRST, |waited| match waited > PATIENCE {
            true => Err(Error::Timeout { pid: self.pid, seconds: PATIENCE.as_secs() }),
            false => Ok(()),
        })?;
        let mut leave = Script::new(self.ring.data_base());
        leave.push(Op::new(libc::SYS_exit_group, &[0]));
        self.ring.load(&leave)?;
        rustix::io::write(&self.lifeline, b"!")
            .map(drop)
            .map_err(Error::errno("dismissing the guard", "write"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // One that was dismissed is leaving already. The memory it runs in is ours, so its end is waited for.
        let _ = signal::kill(self.pid, libc::SIGKILL);
        wait::until_dead(self.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().expect("sleep starts")
    }

    #[test]
    fn a_dismissed_guard_does_nothing() {
        let mut child = sleeper();
        Guard::post(&[child.id() as i32]).expect("a guard").dismiss().expect("it leaves");
        drop(Guard::post(&[child.id() as i32]).expect("a guard"));
        std::thread::sleep(Duration::from_millis(20));
        assert!(child.try_wait().expect("a child").is_none());
        child.kill().expect("ours");
        child.wait().expect("ours");
    }

    #[test]
    fn a_guard_without_a_controller_kills() {
        let mut children = [sleeper(), sleeper()];
        let pids: Vec<i32> = children.iter().map(|c| c.id() as i32).collect();
        let guard = Guard::post(&pids).expect("a guard");
        // What the end of this process would do.
        let Guard { lifeline, .. } = &guard;
        rustix::io::dup2(rustix::pipe::pipe().expect("a pipe").1, &mut same_number(lifeline))
            .expect("the other end is closed");
        let until = Instant::now() + Duration::from_secs(10);
        while children.iter_mut().any(|c| c.try_wait().expect("a child").is_none()) {
            assert!(Instant::now() < until, "the guard does nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_guard_without_a_controller_puts_options_back() {
        use rewake_sys::sockets::{option_int, set_option_int};
        use std::os::fd::AsFd;
        let (a, b) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let level = libc::SOL_SOCKET;
        let option = |socket: &std::os::unix::net::UnixStream, name, value| SocketOption {
            fd: socket.as_raw_fd(),
            level,
            name,
            value,
        };
        let before = [option(&a, libc::SO_OOBINLINE, 1), option(&b, libc::SO_PASSCRED, 1)];
        let of_each = || {
            [(&a, libc::SO_OOBINLINE), (&b, libc::SO_PASSCRED)]
                .map(|(socket, name)| option_int(socket.as_fd(), level, name).expect("an option"))
        };
        drop(Guard::of_sockets(&before).expect("a guard"));
        assert_eq!(of_each(), [0, 0]);
        let guard = Guard::of_sockets(&before).expect("a guard");
        set_option_int(a.as_fd(), level, libc::SO_KEEPALIVE, 1).expect("settable");
        rustix::io::dup2(
            rustix::pipe::pipe().expect("a pipe").1,
            &mut same_number(&guard.lifeline),
        )
        .expect("the other end is closed");
        let until = Instant::now() + Duration::from_secs(10);
        while of_each() != [1, 1] {
            assert!(Instant::now() < until, "the guard does nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The same descriptor, to be replaced.
    fn same_number(fd: &OwnedFd) -> std::mem::ManuallyDrop<OwnedFd> {
        use std::os::fd::FromRawFd;
        // SAFETY: never dropped.
        std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(fd.as_raw_fd()) })
    }
}
