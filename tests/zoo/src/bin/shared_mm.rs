//! Kernel state: processes in one address space (`CLONE_VM`), with and without common signal handlers (`CLONE_SIGHAND`),
//! descriptors and directories, as processes were threads before there were any: a child, one with a thread, a sibling, a
//! grandchild; beside them a pair with an address space of its own. What the kernel has by task stays apart.
#![allow(unsafe_code, reason = "memory, signal handlers and timers of other processes")]

use libc::{
    CLONE_FILES, CLONE_FS, CLONE_PARENT, CLONE_SIGHAND, CLONE_SYSVSEM, CLONE_THREAD, CLONE_VM,
};
use std::sync::atomic::{AtomicI64, Ordering};
use zoo::kin::Kin;
use zoo::{Check, check, ensure, ensure_eq};

static WORD: AtomicI64 = AtomicI64::new(1);

extern "C" fn handler_one(_: i32) {}
extern "C" fn handler_two(_: i32) {}

/// Sets the action of SIGUSR2 here.
fn set_action(handler: extern "C" fn(i32)) -> Check {
    zoo::on_signal(libc::SIGUSR2, handler as *const () as usize, libc::SA_RESTART)
}

/// The handler of SIGUSR2 in a process.
fn action(kin: &Kin) -> Result<usize, String> {
    kin.call(libc::SYS_rt_sigaction, [libc::SIGUSR2 as u64, 0, kin.data(), 8, 0, 0])?;
    Ok(word(kin, 0) as usize)
}

/// A word of what a call has written.
fn word(kin: &Kin, at: usize) -> i64 {
    let bytes = kin.get(at * 8 + 8);
    i64::from_ne_bytes(bytes[at * 8..].try_into().unwrap_or_default())
}

/// Has a process map a page.
fn map(kin: &Kin) -> Result<u64, String> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let both = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    Ok(kin.call(libc::SYS_mmap, [0, 4096, both, flags, u64::MAX, 0])? as u64)
}

fn brk(kin: &Kin, to: u64) -> i64 {
    kin.try_call(libc::SYS_brk, [to, 0, 0, 0, 0, 0])
}

/// What each task has for itself, set apart by `n`.
fn mark(kin: &Kin, n: u64) -> Check {
    let set = kin.put(&(1u64 << (20 + n)).to_ne_bytes());
    kin.call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, set, 0, 8, 0, 0])?;
    kin.call(libc::SYS_set_robust_list, [0x1000 * (n + 1), 24, 0, 0, 0, 0])?;
    let name = kin.put(format!("kin-{n}").as_bytes());
    kin.call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, name, 0, 0, 0, 0])?;
    // A timer that never tells, and whose id the kernel chooses by process.
    let mut event = [0u8; 64];
    event[12] = libc::SIGEV_NONE as u8;
    let event = kin.put(&event[..63]);
    kin.call(libc::SYS_timer_create, [libc::CLOCK_MONOTONIC as u64, event, event + 128, 0, 0, 0])?;
    let id = word(kin, 16) & 0xffff_ffff;
    let when: [i64; 4] = [0, 0, 100_000 + n as i64, 0];
    let bytes: Vec<u8> = when.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let when = kin.put(&bytes);
    kin.call(libc::SYS_timer_settime, [id as u64, 0, when, 0, 0, 0]).map(drop)
}

fn marked(kin: &Kin, n: u64) -> Check {
    kin.call(libc::SYS_rt_sigprocmask, [0, 0, kin.data(), 8, 0, 0])?;
    ensure_eq!(word(kin, 0), 1 << (20 + n), "{n}: blocked signals");
    kin.call(libc::SYS_get_robust_list, [0, kin.data(), kin.data() + 8, 0, 0, 0])?;
    ensure_eq!(word(kin, 0), 0x1000 * (n as i64 + 1), "{n}: robust list");
    kin.call(libc::SYS_prctl, [libc::PR_GET_NAME as u64, kin.data(), 0, 0, 0, 0])?;
    ensure_eq!(kin.get(5), format!("kin-{n}").into_bytes(), "{n}: name");
    kin.call(libc::SYS_timer_gettime, [0, kin.data(), 0, 0, 0, 0])?;
    let left = word(kin, 2);
    ensure!((90_000..=100_000 + n as i64).contains(&left), "{n}: {left} s left of its timer");
    ensure_eq!(kin.call(libc::SYS_gettid, [0; 6])?, i64::from(kin.pid), "{n}: its id");
    // Nobody has a robust list there that the kernel could walk when it ends.
    kin.call(libc::SYS_set_robust_list, [0, 24, 0, 0, 0, 0]).map(drop)
}

fn main() {
    zoo::run(|z| {
        const ALL: i32 = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND;
        set_action(handler_one)?;
        let mut on_heap = Box::new(5i64);
        let child = Kin::child("child", ALL)?;
        let thread = child.spawn("thread", ALL | CLONE_THREAD | CLONE_SYSVSEM)?;
        let sibling = child.spawn("sibling", ALL | CLONE_PARENT)?;
        let bare = Kin::child("bare", CLONE_VM)?;
        let below = bare.spawn("below", CLONE_VM | CLONE_FILES)?;
        // A copy of the memory, and one that shares the copy.
        let apart = Kin::child("apart", 0)?;
        let with_it = apart.spawn("with-it", CLONE_VM | CLONE_SIGHAND)?;

        let address = (&raw mut *on_heap) as u64;
        let sharers = [&child, &thread, &sibling, &bare, &below];
        let all = [&child, &thread, &sibling, &bare, &below, &apart, &with_it];
        for (n, kin) in all.iter().enumerate() {
            if kin.pid != thread.pid {
                mark(kin, n as u64)?;
            }
        }
        set_action(handler_two)?;
        let page = map(&below)?;
        sibling.poke(page, 99);
        with_it.poke(address, 6);
        let top = brk(&child, 0);
        let higher = (top + 0x3000) as u64;
        ensure_eq!(brk(&bare, higher), higher as i64, "brk");
        let flags = [&child, &bare].map(|kin| flag_of(kin, 1));
        z.ready()?;
        z.wait_for_check();

        ensure_eq!([&child, &bare].map(|kin| flag_of(kin, 1)), flags, "descriptor 1");
        for (n, kin) in all.iter().enumerate() {
            if kin.pid != thread.pid {
                marked(kin, n as u64)?;
            }
        }
        // SAFETY: mapped by another in this address space.
        ensure_eq!(unsafe { (page as *const i64).read_volatile() }, 99, "a page of the sibling");
        ensure_eq!((*on_heap, apart.peek(address), with_it.peek(address)), (5, 6, 6), "the heap");
        ensure_eq!((brk(&sibling, 0), brk(&apart, 0)), (higher as i64, top), "brk");
        for (n, kin) in sharers.iter().enumerate() {
            let n = n as i64;
            WORD.store(n, Ordering::SeqCst);
            ensure_eq!(kin.peek(WORD.as_ptr() as u64), n, "what was written here, in {n}");
            kin.poke(WORD.as_ptr() as u64, 100 + n as u64);
            ensure_eq!(WORD.load(Ordering::SeqCst), 100 + n, "what {n} wrote");
            let new = map(kin)?;
            sharers[0].poke(new, 7);
            ensure_eq!(sharers.map(|k| k.peek(new)), [7; 5], "a page that {n} has mapped");
            ensure_eq!(
                apart.try_call(libc::SYS_madvise, [new, 4096, 0, 0, 0, 0]),
                -i64::from(libc::ENOMEM),
                "elsewhere"
            );
        }
        apart.poke(address, 8);
        ensure_eq!((*on_heap, with_it.peek(address)), (5, 8), "the copy of the heap");

        let [one, two] =
            [handler_one, handler_two].map(|h: extern "C" fn(i32)| h as *const () as usize);
        for kin in [&child, &thread, &sibling] {
            ensure_eq!(action(kin)?, two, "a handler in common");
        }
        for kin in [&bare, &below, &apart, &with_it] {
            ensure_eq!(action(kin)?, one, "a handler of its own");
        }
        set_action(handler_one)?;
        ensure_eq!(action(&sibling)?, one, "a handler that was set here");
        // The action of SIGUSR2 becomes SIG_IGN.
        let ignore = with_it.put(&[
            1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0,
        ]);
        with_it.call(libc::SYS_rt_sigaction, [libc::SIGUSR2 as u64, ignore, 0, 8, 0, 0])?;
        ensure_eq!((action(&apart)?, action(&bare)?), (1, one), "what was set there");

        // Descriptors: those of the child and its like are ours, those of `bare` are below's.
        // SAFETY: integers.
        let here = unsafe { libc::dup(1) };
        check(here, "dup")?;
        ensure_eq!([&child, &sibling].map(|k| flag_of(k, here)), [0, 0], "a descriptor of all");
        let bad = -i64::from(libc::EBADF);
        ensure_eq!([&bare, &below, &apart].map(|k| flag_of(k, here)), [bad; 3], "and not of these");
        let theirs = below.call(libc::SYS_dup, [1, 0, 0, 0, 0, 0])? as i32;
        check(close(here), "close")?;
        ensure_eq!((flag_of(&bare, theirs), flag_of(&child, theirs)), (0, bad), "and of two");

        below.end(Some(&bare))?;
        with_it.end(Some(&apart))?;
        [child, sibling, bare, apart].into_iter().try_for_each(|kin| kin.end(None))?;
        *on_heap = 0;
        ensure_eq!(*on_heap, 0, "the heap, alone");
        Ok(())
    });
}

fn flag_of(kin: &Kin, fd: i32) -> i64 {
    kin.try_call(libc::SYS_fcntl, [fd as u64, libc::F_GETFD as u64, 0, 0, 0, 0])
}

fn close(fd: i32) -> i32 {
    // SAFETY: the caller's own descriptor.
    unsafe { libc::close(fd) }
}
