//! Kernel state: threads blocked in system calls that a checkpoint must interrupt: nanosleep and clock_nanosleep
//! (relative, absolute), poll, ppoll, select, pselect, futex (with and without timeout), rt_sigtimedwait, rt_sigsuspend,
//! pause, read of a pipe and of an eventfd, wait4.
//!
//! Nothing happens to them until the check, so any return before it is the checkpoint's doing: EINTR is noted in
//! `DIR/eintr` (the harness knows where it is allowed) and the call made again; anything else fails.
#![allow(unsafe_code, reason = "raw system calls")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use zoo::{Check, Zoo, check, ensure, ensure_eq, timespec};

static RELEASED: AtomicBool = AtomicBool::new(false);
static FUTEX: AtomicU32 = AtomicU32::new(0);
const HOUR: i64 = 3_600_000_000_000;

extern "C" fn nothing(_: i32) {}

/// A call that blocks: returns the raw result, negative errno for errors.
type Call = Box<dyn Fn() -> i64 + Send>;

/// How a sleeper is woken for the check, and what its call must return then.
enum Wake {
    /// SIGUSR1, whose handler does nothing: -EINTR.
    Signal,
    /// SIGUSR2, blocked everywhere: the call returns this.
    Awaited(i64),
    /// Something main does: the call returns this.
    Main(i64),
}

struct Sleeper {
    name: &'static str,
    tid: Arc<AtomicI32>,
    thread: std::thread::JoinHandle<Result<i64, String>>,
    wake: Wake,
}

fn raw(ret: i64) -> i64 {
    if ret < 0 { -(zoo::errno() as i64) } else { ret }
}

macro_rules! call {
    ($($arg:expr),+ $(,)?) => { raw(libc::syscall($($arg),+)) };
}

fn sleeper(z: &'static Zoo, name: &'static str, wake: Wake, call: Call) -> Result<Sleeper, String> {
    let tid = Arc::new(AtomicI32::new(0));
    let mine = tid.clone();
    let body = move || {
        mine.store(zoo::tid(), Ordering::SeqCst);
        loop {
            let ret = call();
            if RELEASED.load(Ordering::SeqCst) {
                return Ok(ret);
            }
            ensure_eq!(ret, -(libc::EINTR as i64), "{name} returned before the check");
            z.note("eintr", name);
        }
    };
    let thread = std::thread::Builder::new().name(name.into()).stack_size(128 << 10).spawn(body);
    Ok(Sleeper { name, tid, thread: thread.map_err(|e| e.to_string())?, wake })
}

/// Sleeps again and again for a short while, and watches that no sleep is shorter than asked.
fn napper() -> Check {
    while !RELEASED.load(Ordering::SeqCst) {
        let begun = zoo::now();
        zoo::nap(30);
        let took = zoo::now() - begun;
        ensure!(took >= 30_000_000, "a sleep of 30 ms took {} us", took / 1000);
        ensure!(took < 30_000_000_000, "a sleep of 30 ms took {} s", took / 1_000_000_000);
    }
    Ok(())
}

fn pipe() -> Result<(i32, i32), String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe(fds.as_mut_ptr()) }, "pipe")?;
    Ok((fds[0], fds[1]))
}

const MASK_BYTES: usize = 8;

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        zoo::on_signal(libc::SIGUSR1, nothing as *const () as usize, 0)?;
        zoo::block(libc::SIGUSR2)?;
        let (quiet, _quiet_write) = pipe()?;
        let (reader, writer) = pipe()?;
        let (polled, poll_writer) = pipe()?;
        // SAFETY: integers only.
        let event = unsafe { libc::eventfd(0, 0) };
        let child = z.fork(|z| {
            z.wait_for("child-ends")?;
            zoo::exit_now(7)
        })?;
        let usr2: u64 = 1 << (libc::SIGUSR2 - 1);

        // SAFETY (all below): every pointer is to a local that outlives the call; null where the call allows it.
        let mut all = vec![
            sleeper(
                z,
                "nanosleep",
                Wake::Signal,
                Box::new(|| unsafe {
                    let mut left = timespec(HOUR);
                    call!(libc::SYS_nanosleep, &left as *const _, &mut left as *mut _)
                }),
            )?,
            sleeper(
                z,
                "nanosleep_norem",
                Wake::Signal,
                Box::new(|| unsafe { call!(libc::SYS_nanosleep, &timespec(HOUR) as *const _, 0) }),
            )?,
            sleeper(
                z,
                "clock_nanosleep_boottime",
                Wake::Signal,
                Box::new(|| unsafe {
                    let mut left = timespec(HOUR);
                    call!(
                        libc::SYS_clock_nanosleep,
                        libc::CLOCK_BOOTTIME,
                        0,
                        &left as *const _,
                        &mut left as *mut _
                    )
                }),
            )?,
            sleeper(
                z,
                "clock_nanosleep_abs_monotonic",
                Wake::Signal,
                Box::new(|| unsafe {
                    let until = timespec(zoo::now() + HOUR);
                    call!(
                        libc::SYS_clock_nanosleep,
                        libc::CLOCK_MONOTONIC,
                        libc::TIMER_ABSTIME,
                        &until as *const _,
                        0
                    )
                }),
            )?,
            sleeper(
                z,
                "clock_nanosleep_abs_realtime",
                Wake::Signal,
                Box::new(|| unsafe {
                    let until = timespec(zoo::clock(libc::CLOCK_REALTIME) + HOUR);
                    call!(
                        libc::SYS_clock_nanosleep,
                        libc::CLOCK_REALTIME,
                        libc::TIMER_ABSTIME,
                        &until as *const _,
                        0
                    )
                }),
            )?,
            sleeper(
                z,
                "poll",
                Wake::Main(1),
                Box::new(move || unsafe {
                    let mut p = libc::pollfd { fd: polled, events: libc::POLLIN, revents: 0 };
                    call!(libc::SYS_poll, &mut p as *mut _, 1, -1)
                }),
            )?,
            sleeper(
                z,
                "poll_timed",
                Wake::Main(1),
                Box::new(move || unsafe {
                    let mut p = libc::pollfd { fd: polled, events: libc::POLLIN, revents: 0 };
                    call!(libc::SYS_poll, &mut p as *mut _, 1, 3_600_000)
                }),
            )?,
            sleeper(
                z,
                "ppoll",
                Wake::Main(1),
                Box::new(move || unsafe {
                    let mut p = libc::pollfd { fd: polled, events: libc::POLLIN, revents: 0 };
                    call!(libc::SYS_ppoll, &mut p as *mut _, 1, 0, 0, 0)
                }),
            )?,
            sleeper(
                z,
                "ppoll_timed_masked",
                Wake::Main(1),
                Box::new(move || unsafe {
                    let mut p = libc::pollfd { fd: polled, events: libc::POLLIN, revents: 0 };
                    let mut left = timespec(HOUR);
                    call!(
                        libc::SYS_ppoll,
                        &mut p as *mut _,
                        1,
                        &mut left as *mut _,
                        &u64::MAX as *const _,
                        MASK_BYTES
                    )
                }),
            )?,
            sleeper(
                z,
                "select",
                Wake::Signal,
                Box::new(move || unsafe {
                    let mut set: libc::fd_set = std::mem::zeroed();
                    libc::FD_SET(quiet, &mut set);
                    call!(libc::SYS_select, quiet + 1, &mut set as *mut _, 0, 0, 0)
                }),
            )?,
            sleeper(
                z,
                "select_timed",
                Wake::Signal,
                Box::new(move || unsafe {
                    let mut set: libc::fd_set = std::mem::zeroed();
                    libc::FD_SET(quiet, &mut set);
                    let mut left = libc::timeval { tv_sec: 3600, tv_usec: 0 };
                    call!(
                        libc::SYS_select,
                        quiet + 1,
                        &mut set as *mut _,
                        0,
                        0,
                        &mut left as *mut _
                    )
                }),
            )?,
            sleeper(
                z,
                "pselect6",
                Wake::Signal,
                Box::new(move || unsafe {
                    let mut set: libc::fd_set = std::mem::zeroed();
                    libc::FD_SET(quiet, &mut set);
                    call!(libc::SYS_pselect6, quiet + 1, &mut set as *mut _, 0, 0, 0, 0)
                }),
            )?,
            sleeper(
                z,
                "futex",
                Wake::Main(0),
                Box::new(|| unsafe {
                    call!(libc::SYS_futex, &FUTEX as *const _, libc::FUTEX_WAIT, 0, 0)
                }),
            )?,
            sleeper(
                z,
                "futex_timed",
                Wake::Main(0),
                Box::new(|| unsafe {
                    call!(
                        libc::SYS_futex,
                        &FUTEX as *const _,
                        libc::FUTEX_WAIT,
                        0,
                        &timespec(HOUR) as *const _
                    )
                }),
            )?,
            sleeper(
                z,
                "futex_abs",
                Wake::Main(0),
                Box::new(|| unsafe {
                    let until = timespec(zoo::now() + HOUR);
                    let op = libc::FUTEX_WAIT_BITSET;
                    call!(libc::SYS_futex, &FUTEX as *const _, op, 0, &until as *const _, 0, !0u32)
                }),
            )?,
            sleeper(
                z,
                "sigtimedwait",
                Wake::Awaited(libc::SIGUSR2 as i64),
                Box::new(move || unsafe {
                    call!(libc::SYS_rt_sigtimedwait, &usr2 as *const _, 0, 0, MASK_BYTES)
                }),
            )?,
            sleeper(
                z,
                "sigtimedwait_timed",
                Wake::Awaited(libc::SIGUSR2 as i64),
                Box::new(move || unsafe {
                    call!(
                        libc::SYS_rt_sigtimedwait,
                        &usr2 as *const _,
                        0,
                        &timespec(HOUR) as *const _,
                        MASK_BYTES
                    )
                }),
            )?,
            sleeper(
                z,
                "sigsuspend",
                Wake::Signal,
                Box::new(|| unsafe {
                    call!(libc::SYS_rt_sigsuspend, &0u64 as *const _, MASK_BYTES)
                }),
            )?,
            sleeper(z, "pause", Wake::Signal, Box::new(|| unsafe { call!(libc::SYS_pause) }))?,
            sleeper(
                z,
                "read_pipe",
                Wake::Main(4),
                Box::new(move || unsafe {
                    let mut buf = [0u8; 8];
                    call!(libc::SYS_read, reader, buf.as_mut_ptr(), buf.len())
                }),
            )?,
            sleeper(
                z,
                "read_eventfd",
                Wake::Main(8),
                Box::new(move || unsafe {
                    let mut buf = [0u8; 8];
                    call!(libc::SYS_read, event, buf.as_mut_ptr(), buf.len())
                }),
            )?,
            sleeper(
                z,
                "wait4",
                Wake::Main(child as i64),
                Box::new(move || unsafe {
                    let mut status = 0;
                    call!(libc::SYS_wait4, child, &mut status as *mut i32, 0, 0)
                }),
            )?,
        ];
        let napper = std::thread::spawn(napper);
        for s in &all {
            while s.tid.load(Ordering::SeqCst) == 0 {
                zoo::nap(1);
            }
            zoo::wait_state(s.tid.load(Ordering::SeqCst), 'S')?;
        }
        zoo::nap(5);
        let begun = zoo::now();
        z.ready()?;
        z.wait_for_check();
        let waited = zoo::now() - begun;
        ensure!(
            (0..600_000_000_000).contains(&waited),
            "between ready and check the clock moved by {waited} ns"
        );
        for s in &all {
            // Just resumed it may still be on its way back into the call.
            let blocked = zoo::wait_state(s.tid.load(Ordering::SeqCst), 'S');
            blocked.map_err(|e| format!("{}: {e}", s.name))?;
        }

        // SAFETY: plain writes and signals to own threads.
        unsafe {
            RELEASED.store(true, Ordering::SeqCst);
            libc::write(writer, c"wake".as_ptr().cast(), 4);
            libc::write(event, &1u64 as *const u64 as *const _, 8);
            libc::write(poll_writer, c"x".as_ptr().cast(), 1);
            let woken = libc::syscall(libc::SYS_futex, &FUTEX as *const _, libc::FUTEX_WAKE, 100);
            ensure_eq!(woken, 3, "threads woken from their futex");
            z.publish("child-ends", "");
            for s in &all {
                let (signal, tid) = match s.wake {
                    Wake::Signal => (libc::SIGUSR1, s.tid.load(Ordering::SeqCst)),
                    Wake::Awaited(_) => (libc::SIGUSR2, s.tid.load(Ordering::SeqCst)),
                    Wake::Main(_) => continue,
                };
                check(libc::syscall(libc::SYS_tgkill, zoo::pid(), tid, signal) as i32, "tgkill")?;
            }
        }
        for s in all.drain(..) {
            let want = match s.wake {
                Wake::Signal => -(libc::EINTR as i64),
                Wake::Awaited(n) | Wake::Main(n) => n,
            };
            let got = s.thread.join().map_err(|_| format!("{} panicked", s.name))??;
            ensure_eq!(got, want, "what {} returned when woken", s.name);
        }
        napper.join().map_err(|_| "napper panicked")?
    })
}
