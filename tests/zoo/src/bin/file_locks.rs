//! Kernel state: file locks: flock(2) of descriptions that are shared and not, record locks of two processes, one of an
//! open file description, leases; a child that waits for a lock of its parent's.
//! `ZOO_INHERITED`: it has taken one by an inherited description. `ZOO_ORPHAN`: who took the lock has ended.
#![allow(unsafe_code, reason = "fcntl, flock and signals")]

use std::fs::File;
use std::os::fd::AsRawFd;
use zoo::{Check, Zoo, check, ensure, ensure_eq, errno, nap};

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;

fn flock(file: &File, how: i32, what: &str) -> Check {
    // SAFETY: takes numbers.
    check(unsafe { libc::flock(file.as_raw_fd(), how) }, what)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    // SAFETY: plain numbers.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    (range.l_start, range.l_len) = (start, len);
    range
}

fn lock(file: &File, command: i32, kind: i32, start: i64, len: i64) -> Check {
    let range = range(kind, start, len);
    // SAFETY: `range` lives.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &range) }, "locking a range")
}

/// Type, first byte, length and process of the lock that would be in the way of ours.
fn in_the_way(
    file: &File,
    command: i32,
    kind: i32,
    start: i64,
    len: i64,
) -> Result<(i32, i64, i64, i32), String> {
    let mut range = range(kind, start, len);
    // SAFETY: `range` lives.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &mut range) }, "asking for a lock")?;
    Ok((i32::from(range.l_type), range.l_start, range.l_len, range.l_pid))
}

fn lease(file: &File) -> i32 {
    // SAFETY: takes numbers.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }
}

fn set_lease(file: &File, kind: i32) -> Check {
    // SAFETY: takes numbers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }, "F_SETLEASE")
}

fn open(z: &Zoo, name: &str, write: bool) -> Result<File, String> {
    let mut options = File::options();
    options.read(true).write(write).create(write);
    options.open(z.path(name)).map_err(|e| format!("{name}: {e}"))
}

/// Is there a lock in the way of ours on a description of its own?
fn is_locked(z: &Zoo, name: &str, how: i32) -> Result<bool, String> {
    let other = open(z, name, false)?;
    match flock(&other, how | libc::LOCK_NB, name) {
        Ok(()) => Ok(false),
        Err(_) if errno() == libc::EWOULDBLOCK => Ok(true),
        Err(e) => Err(e),
    }
}

fn orphan(z: &Zoo) -> Check {
    let file = open(z, "orphan", true)?;
    let taker = z.fork(|_| flock(&file, libc::LOCK_EX, "flock"))?;
    z.join(taker)?;
    z.ready()?;
    z.wait_for_check();
    ensure!(is_locked(z, "orphan", libc::LOCK_SH)?, "the lock is lost");
    flock(&file, libc::LOCK_UN, "unlock")?;
    ensure!(!is_locked(z, "orphan", libc::LOCK_EX)?, "the lock was another description's");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        if z.param("ZOO_ORPHAN", 0) == 1 {
            return orphan(z);
        }
        let exclusive = open(z, "exclusive", true)?;
        flock(&exclusive, libc::LOCK_EX, "flock")?;
        let shared = [open(z, "shared", true)?, open(z, "shared", false)?];
        for file in &shared {
            flock(file, libc::LOCK_SH, "flock")?;
        }
        let ranges = open(z, "ranges", true)?;
        let reader = open(z, "ranges", false)?;
        lock(&ranges, libc::F_SETLK, WRITE, 5, 10)?;
        lock(&reader, libc::F_SETLK, READ, 50, 10)?;
        lock(&ranges, libc::F_SETLK, WRITE, 1 << 40, 0)?;
        let ofd = open(z, "ofd", true)?;
        lock(&ofd, libc::F_OFD_SETLK, WRITE, 3, 0)?;
        let own = zoo::pid();
        let leased = open(z, "leased", true)?;
        drop(open(z, "read leased", true)?);
        let read_leased = open(z, "read leased", false)?;
        set_lease(&leased, WRITE)?;
        set_lease(&read_leased, READ)?;
        zoo::block(libc::SIGIO)?;
        zoo::block(libc::SIGRTMIN())?;
        // SAFETY: takes numbers.
        check(unsafe { libc::fcntl(leased.as_raw_fd(), 10, libc::SIGRTMIN()) }, "F_SETSIG")?;
        let inherited = z.param("ZOO_INHERITED", 0) == 1;
        let child = z.fork(|z| {
            let again = open(z, "ranges", true)?;
            let ranges = if inherited { &ranges } else { &again };
            lock(ranges, libc::F_SETLK, WRITE, 20, 10)?;
            z.publish("up", "");
            // The parent's; it lets go in its check.
            lock(ranges, libc::F_SETLKW, WRITE, 5, 10)?;
            let found = in_the_way(ranges, libc::F_GETLK, WRITE, 50, 1)?;
            ensure_eq!(found, (READ, 50, 10, own), "the parent's read lock, as the child sees it");
            z.publish("got", "");
            z.wait_for("end")
        })?;
        z.wait_for("up")?;
        let waiter = z.fork(|z| {
            // Both are the parent's.
            let other = open(z, "exclusive", false)?;
            flock(&other, libc::LOCK_SH, "flock")?;
            z.publish("got flock", "");
            Ok(())
        })?;
        nap(20);
        z.ready()?;
        z.wait_for_check();

        ensure!(is_locked(z, "exclusive", libc::LOCK_SH)?, "the exclusive lock is lost");
        ensure!(is_locked(z, "shared", libc::LOCK_EX)?, "the shared locks are lost");
        ensure!(!is_locked(z, "shared", libc::LOCK_SH)?, "the shared locks are exclusive now");
        flock(&exclusive, libc::LOCK_EX | libc::LOCK_NB, "the lock is not the description's")?;
        let found = in_the_way(&ranges, libc::F_GETLK, READ, 0, 0)?;
        ensure_eq!(found, (WRITE, 20, 10, child), "the child's lock");
        let other = open(z, "ofd", true)?;
        let found = in_the_way(&other, libc::F_OFD_GETLK, READ, 0, 0)?;
        ensure_eq!(found, (WRITE, 3, 0, -1), "the description's lock");
        let found = in_the_way(&ofd, libc::F_OFD_GETLK, WRITE, 0, 0)?;
        ensure_eq!(found.0, libc::F_UNLCK, "the description's lock, as itself sees it");
        let asker = z.fork(|_| {
            let found = in_the_way(&ranges, libc::F_GETLK, WRITE, 0, 20)?;
            ensure_eq!(found, (WRITE, 5, 10, own), "the first range");
            let found = in_the_way(&ranges, libc::F_GETLK, WRITE, 40, 1 << 30)?;
            ensure_eq!(found, (READ, 50, 10, own), "the range that is read");
            let found = in_the_way(&ranges, libc::F_GETLK, WRITE, 100, 0)?;
            ensure_eq!(found, (WRITE, 1 << 40, 0, own), "the range without an end");
            Ok(())
        })?;
        z.join(asker)?;
        ensure!(!z.path("got").exists(), "the child got the lock while it was held");
        lock(&ranges, libc::F_SETLK, libc::F_UNLCK, 5, 10)?;
        z.wait_for("got")?;
        ensure!(!z.path("got flock").exists(), "the waiter got the lock while it was held");
        flock(&exclusive, libc::LOCK_UN, "unlock")?;
        z.wait_for("got flock")?;
        z.join(waiter)?;

        ensure_eq!(lease(&leased), WRITE, "the write lease");
        ensure_eq!(lease(&read_leased), READ, "the read lease");
        let breaker = z.fork(|z| {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            ensure!(options.open(z.path("leased")).is_err(), "the write lease lets others open");
            options.write(true);
            ensure!(
                options.open(z.path("read leased")).is_err(),
                "the read lease lets others write"
            );
            Ok(())
        })?;
        z.join(breaker)?;
        for (signal, file) in [(libc::SIGRTMIN(), &leased), (libc::SIGIO, &read_leased)] {
            // SAFETY: the set is a live local; so is the time.
            let got = unsafe {
                let mut set = std::mem::zeroed();
                libc::sigemptyset(&mut set);
                libc::sigaddset(&mut set, signal);
                libc::sigtimedwait(&set, std::ptr::null_mut(), &zoo::timespec(5_000_000_000))
            };
            ensure_eq!(got, signal, "the signal that tells of the broken lease");
            set_lease(file, libc::F_UNLCK)?;
        }
        z.publish("end", "");
        z.join(child)
    })
}
