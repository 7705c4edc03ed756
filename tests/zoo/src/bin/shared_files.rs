//! Kernel state: processes with one table of descriptors (`CLONE_FILES`): a child, a grandchild, one that shares its working
//! directory too, one whose parent has taken a table of its own since; beside them some that do not share it, and two that share
//! another. With ZOO_PLAIN only a parent and its child.
#![allow(unsafe_code, reason = "descriptors by number")]

use libc::{CLONE_FILES, CLONE_FS};
use std::os::fd::IntoRawFd;
use zoo::kin::Kin;
use zoo::{Check, Zoo, check, ensure_eq, ok};

/// Has a process open a file with some text in it, its own name; returns its number.
fn open(z: &Zoo, by: &Kin, name: &str, flags: i32) -> Result<u64, String> {
    let path = z.path(name);
    std::fs::write(&path, name).map_err(|e| e.to_string())?;
    let at = by.put(path.as_os_str().as_encoded_bytes());
    let args = [libc::AT_FDCWD as u64, at, (libc::O_RDWR | flags) as u64, 0, 0, 0];
    Ok(by.call(libc::SYS_openat, args)? as u64)
}

/// The close-on-exec flag of a descriptor in a process, or that it is not open there.
fn flag(kin: &Kin, fd: u64) -> i64 {
    kin.try_call(libc::SYS_fcntl, [fd, libc::F_GETFD as u64, 0, 0, 0, 0])
}

fn flag_here(fd: u64) -> i64 {
    // SAFETY: integers.
    match unsafe { libc::fcntl(fd as i32, libc::F_GETFD) } {
        -1 => -i64::from(zoo::errno()),
        flag => i64::from(flag),
    }
}

/// Reads from a file, in a process.
fn read(kin: &Kin, fd: u64, len: u64) -> Result<Vec<u8>, String> {
    let got = kin.call(libc::SYS_read, [fd, kin.data(), len, 0, 0, 0])?;
    Ok(kin.get(got as usize))
}

const BAD: i64 = -(libc::EBADF as i64);

/// What one of `sharers` opens or closes, all of them have or have not; `others` never notice.
fn follow(z: &Zoo, sharers: &[&Kin], others: &[&Kin]) -> Check {
    for (n, by) in sharers.iter().enumerate() {
        let flags = if n % 2 == 0 { libc::O_CLOEXEC } else { 0 };
        let wanted = i64::from(flags != 0);
        let fd = open(z, by, &format!("new{n}"), flags)?;
        ensure_eq!(flag_here(fd), wanted, "what {n} opened, here");
        for (i, kin) in sharers.iter().enumerate() {
            ensure_eq!(flag(kin, fd), wanted, "what {n} opened, in {i}");
        }
        for (i, kin) in others.iter().enumerate() {
            ensure_eq!(flag(kin, fd), BAD, "what {n} opened, in the other {i}");
        }
        // SAFETY: nobody here uses the number otherwise.
        check(unsafe { libc::close(fd as i32) }, "close")?;
        for (i, kin) in sharers.iter().enumerate() {
            ensure_eq!(flag(kin, fd), BAD, "what was closed here, in {i}");
        }
    }
    Ok(())
}

fn plain(z: &Zoo) -> Check {
    let child = Kin::child("child", CLONE_FILES)?;
    let old = open(z, &child, "old", libc::O_CLOEXEC)?;
    z.ready()?;
    z.wait_for_check();
    ensure_eq!(flag_here(old), 1, "what the child opened before");
    ensure_eq!(read(&child, old, 2)?, b"ol", "what it reads");
    follow(z, &[&child], &[])?;
    child.end(None)
}

fn all(z: &Zoo) -> Check {
    let child = Kin::child("child", CLONE_FILES)?;
    let with_fs = Kin::child("with-fs", CLONE_FILES | CLONE_FS)?;
    let grandchild = child.spawn("grandchild", CLONE_FILES)?;
    // A copy of the table as it is now.
    let copy = child.spawn("copy", 0)?;
    // It leaves its child in the table and goes on with a copy.
    let left = Kin::child("left", CLONE_FILES)?;
    let behind = left.spawn("behind", CLONE_FILES)?;
    left.call(libc::SYS_unshare, [CLONE_FILES as u64, 0, 0, 0, 0, 0])?;
    // A table that only two have, and one that was made from it.
    let first = Kin::child("first", CLONE_FS)?;
    let second = first.spawn("second", CLONE_FILES)?;
    let apart = second.spawn("apart", 0)?;

    let old = open(z, &grandchild, "old", libc::O_CLOEXEC)?;
    let theirs = open(z, &first, "theirs", 0)?;
    let plus = open(z, &second, "theirs-too", libc::O_CLOEXEC)?;
    let alone = open(z, &left, "alone", 0)?;
    // One far away, of a kind that is filled late, and a ring of two ends.
    // SAFETY: a number that nobody uses.
    let far = ok(i64::from(unsafe { libc::dup3(old as i32, 700, 0) }), "dup3")? as u64;
    // SAFETY: an integer.
    let epoll = ok(i64::from(unsafe { libc::epoll_create1(0) }), "epoll_create1")? as u64;
    let mut ends = [0; 2];
    // SAFETY: two integers that outlive the call.
    check(unsafe { libc::pipe(ends.as_mut_ptr()) }, "pipe")?;
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 77 };
    // SAFETY: a live structure.
    check(
        unsafe { libc::epoll_ctl(epoll as i32, libc::EPOLL_CTL_ADD, ends[0], &raw mut event) },
        "epoll_ctl",
    )?;
    let table = [&child, &with_fs, &grandchild, &behind];
    let others = [&copy, &left, &first, &second, &apart];
    z.ready()?;
    z.wait_for_check();

    ensure_eq!(flag_here(old), 1, "what the grandchild opened before");
    for (i, kin) in table.iter().enumerate() {
        ensure_eq!((flag(kin, old), flag(kin, far)), (1, 0), "the old file in {i}");
    }
    ensure_eq!(read(&behind, far, 1)?, b"o", "one description, read by one");
    ensure_eq!(read(&child, old, 2)?, b"ld", "and by another");
    ensure_eq!([&left, &first, &apart].map(|k| flag(k, far)), [BAD; 3], "elsewhere");
    ensure_eq!((flag(&first, theirs), flag(&second, theirs)), (0, 0), "the other table");
    ensure_eq!((flag(&first, plus), flag(&second, plus)), (1, 1), "the other table too");
    ensure_eq!(flag(&apart, plus), BAD, "in a copy of that");
    ensure_eq!(read(&left, alone, 9)?, b"alone", "what the one that left has opened since");
    // SAFETY: a live byte.
    check(unsafe { libc::write(ends[1], [7u8].as_ptr().cast(), 1) } as i32 - 1, "write")?;
    let got = grandchild.call(libc::SYS_epoll_wait, [epoll, grandchild.data(), 1, 5000, 0, 0])?;
    ensure_eq!((got, grandchild.get(5)[4]), (1, 77), "the epoll instance, in the grandchild");

    follow(z, &table, &others)?;
    let fd = open(z, &second, "more", 0)?;
    ensure_eq!((flag(&first, fd), flag(&apart, fd)), (0, BAD), "opened in the other table");
    let file = std::fs::File::open(z.path("old")).map_err(|e| e.to_string())?.into_raw_fd();
    ensure_eq!(flag(&behind, file as u64), 1, "opened here");

    grandchild.end(Some(&child))?;
    copy.end(Some(&child))?;
    behind.end(Some(&left))?;
    apart.end(Some(&second))?;
    second.end(Some(&first))?;
    [child, with_fs, left, first].into_iter().try_for_each(|kin| kin.end(None))
}

fn main() {
    zoo::run(|z| if z.param("ZOO_PLAIN", 0) != 0 { plain(z) } else { all(z) });
}
