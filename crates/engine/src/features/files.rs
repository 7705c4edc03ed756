//! Features around descriptors, terminals, mounts and System V IPC.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rewake_sys::{Errno, SyscallError, kcmp, probe};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, FlockOperation, MemfdFlags, Mode, OFlags, ResolveFlags};
use rustix::mount::MoveMountFlags;
use rustix::process::getpid;
use rustix::pty::OpenptFlags;
use rustix::time::{TimerfdClockId, TimerfdFlags};

use super::tasks::refused_with;
use super::{Attempt, Reason, ensure, read};

fn info(fd: &OwnedFd) -> Result<String, Reason> {
    read(&format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
}

fn memfd() -> Result<OwnedFd, Reason> {
    Ok(rustix::fs::memfd_create("rewake-check", MemfdFlags::CLOEXEC)?)
}

/// An epoll and an eventfd that it watches.
fn watched() -> Result<(OwnedFd, OwnedFd), Reason> {
    let event = eventfd(42, EventfdFlags::CLOEXEC)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &event, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
    Ok((poll, event))
}

pub fn mnt_id() -> Attempt {
    ensure(info(&memfd()?)?.contains("mnt_id:"), "fdinfo has no mnt_id")
}

pub fn fdinfo() -> Attempt {
    let (poll, event) = watched()?;
    ensure(info(&event)?.contains("eventfd-count:"), "fdinfo has no counter of an eventfd")?;
    ensure(info(&poll)?.contains("tfd:"), "fdinfo has no targets of an epoll")?;
    let watcher = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watcher, "/", WatchFlags::CREATE)?;
    ensure(info(&watcher)?.contains("inotify wd:"), "fdinfo has no watches of an inotify")
}

pub fn fdinfo_lock() -> Attempt {
    let file = memfd()?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    ensure(info(&file)?.contains("lock:"), "fdinfo has no locks")
}

pub fn kcmp_epoll() -> Attempt {
    let (poll, event) = watched()?;
    let me = getpid().as_raw_pid();
    let (poll, event) = (poll.as_raw_fd(), event.as_raw_fd());
    ensure(
        kcmp::is_epoll_target(me, poll, event, 0, me, event)?,
        "kcmp does not find the target of an epoll",
    )
}

pub fn owner_uids() -> Attempt {
    probe::owner_uids(memfd()?.as_fd())?;
    Ok(())
}

pub fn timerfd() -> Attempt {
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    ensure(info(&timer)?.contains("ticks:"), "fdinfo has no ticks of a timerfd")?;
    Ok(probe::timerfd_set_ticks(timer.as_fd(), 3)?)
}

pub fn tty() -> Attempt {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let slave =
        rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(probe::tty_locks(slave.as_fd())?)
}

pub fn sysv_ipc() -> Attempt {
    for kind in ["msg", "sem", "shm"] {
        read(&format!("/proc/sys/kernel/{kind}_next_id"))?;
    }
    Ok(probe::message_copy()?)
}

pub fn openat2() -> Attempt {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    Ok(())
}

/// The flags are looked at before the paths, so a path that does not exist tells whether the flag is known.
pub fn set_group() -> Attempt {
    const NOWHERE: &str = "/proc/self/rewake-check";
    let outcome =
        rustix::mount::move_mount(CWD, NOWHERE, CWD, NOWHERE, MoveMountFlags::MOVE_MOUNT_SET_GROUP);
    refused_with(outcome.map_err(|errno| SyscallError::new("move_mount", errno)), Errno::NOENT)
}

pub fn autofs() -> Attempt {
    let known = read("/proc/filesystems")?
        .lines()
        .any(|line| line.split('\t').any(|word| word == "autofs"));
    ensure(known || File::open("/dev/autofs").is_ok(), "the kernel knows no autofs")
}
