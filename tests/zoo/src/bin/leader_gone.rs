//! Kernel state: processes whose first thread has ended while others go on: it is a zombie until the last thread ends, which gives the
//! process its status. The program itself is one, and a child of it, which ends so. With ZOO_N so many further threads, with
//! ZOO_FDS so many further descriptors, with ZOO_MIB so much memory, with ZOO_FILTER a seccomp filter that all threads have but the one
//! that is gone. With ZOO_PDEATH a child is to get a signal when its parent dies. With ZOO_LATE the first thread ends when there is a
//! file `end`.
#![allow(
    unsafe_code,
    reason = "exit(2), timers and signals of single threads, fork by the C library"
)]

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use zoo::{Check, Zoo, check, ensure, ensure_eq};

/// What the first threads give to exit(2): /proc tells.
const CODE: i32 = 200;
/// What the child's other thread gives.
const LAST_CODE: i32 = 9;

const COMM: &str = "leader_gone";

static TICKS: AtomicU64 = AtomicU64::new(0);
static CAUGHT_BY: AtomicI32 = AtomicI32::new(0);
static COUNTS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
static DONE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn tick(_: i32) {
    TICKS.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn caught(_: i32) {
    CAUGHT_BY.store(zoo::tid(), Ordering::SeqCst);
}

/// Ends the calling thread, and no other.
fn end_thread(code: i32) -> ! {
    // SAFETY: an integer; nothing on this thread's stack is used by others.
    unsafe { libc::syscall(libc::SYS_exit, code) };
    unreachable!("exit(2) returned")
}

fn set_name(name: &str) -> Check {
    let name = zoo::cstring(name);
    // SAFETY: NUL-terminated.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }, "PR_SET_NAME")
}

/// The first thread of this process is dead, under its name, and all others are there.
fn leader_is_gone(threads: &[i32]) -> Check {
    let pid = zoo::pid();
    // A restored one ends as soon as it is let go.
    zoo::wait_state(pid, 'Z')?;
    let comm = std::fs::read_to_string(format!("/proc/self/task/{pid}/comm"));
    let comm = comm.map_err(|e| e.to_string())?;
    ensure_eq!(comm.trim_end(), COMM, "name of the first thread");
    ensure_eq!(tids()?, threads, "threads");
    Ok(())
}

fn tids() -> Result<Vec<i32>, String> {
    let list = std::fs::read_dir("/proc/self/task").map_err(|e| e.to_string())?;
    let mut tids: Vec<i32> =
        list.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable();
    Ok(tids)
}

/// The state of one thread that only it can tell.
#[derive(Debug, PartialEq)]
struct Own {
    tid: i32,
    mask: u64,
    name: String,
    altstack: usize,
    handle: u64,
}

fn own() -> Result<Own, String> {
    let mut mask = 0u64;
    let mut name = [0u8; 16];
    // SAFETY: out-parameters are valid; null means "only ask".
    let altstack = unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut stack);
        libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, 8);
        check(libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()), "PR_GET_NAME")?;
        stack.ss_sp as usize
    };
    let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
    // SAFETY: takes nothing.
    Ok(Own { tid: zoo::tid(), mask, name, altstack, handle: unsafe { libc::pthread_self() } })
}

/// A set of one signal, as the kernel has it.
fn only(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The value with which a signal comes that this thread has blocked.
fn await_signal(signal: i32, seconds: i64) -> Result<u64, String> {
    let set = only(signal);
    let until = zoo::now() + seconds * 1_000_000_000;
    loop {
        let mut info = [0u64; 16];
        let rest = zoo::timespec((until - zoo::now()).max(0));
        // SAFETY: all pointers are to locals of the kernel's sizes.
        let got = unsafe {
            let (set, rest) = (&raw const set, &raw const rest);
            libc::syscall(libc::SYS_rt_sigtimedwait, set, info.as_mut_ptr(), rest, 8)
        };
        if got == i64::from(signal) {
            // The value of siginfo_t.
            return Ok(info[3]);
        }
        ensure!(zoo::errno() == libc::EINTR, "signal {signal} did not come: {}", zoo::errno());
    }
}

/// A timer that sends a signal to this very thread, an hour from now.
fn timer(signal: i32, value: usize) -> Result<i32, String> {
    // SAFETY: the event and the id are locals.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_value = libc::sigval { sival_ptr: value as *mut _ };
        event.sigev_notify_thread_id = zoo::tid();
        let (event, mut id) = (&raw const event, 0i32);
        let made = libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, event, &raw mut id);
        check(made as i32, "timer_create")?;
        set_timer(id, 3_600_000_000_000)?;
        Ok(id)
    }
}

fn set_timer(id: i32, nanoseconds: i64) -> Check {
    let times =
        libc::itimerspec { it_interval: zoo::timespec(0), it_value: zoo::timespec(nanoseconds) };
    // SAFETY: `times` is a local.
    let set = unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &raw const times, 0) };
    check(set as i32, "timer_settime")
}

/// One of the threads that go on: it counts, and is asked what it is at the end.
fn worker(z: &Zoo, n: usize) -> Check {
    set_name(&format!("worker {n}"))?;
    let signal = libc::SIGRTMIN() + 3;
    zoo::block(signal)?;
    if n % 2 == 1 {
        zoo::block(libc::SIGUSR1)?;
    }
    let timer = timer(signal, 5000 + n)?;
    // One that waits for this thread alone.
    let mut info = [0u64; 16];
    (info[0], info[1], info[3]) = (signal as u64, libc::SI_QUEUE as u32 as u64, 1000 + n as u64);
    // SAFETY: `info` has the kernel's size.
    let sent = unsafe {
        let (call, info) = (libc::SYS_rt_tgsigqueueinfo, info.as_ptr());
        libc::syscall(call, zoo::pid(), zoo::tid(), signal, info)
    };
    check(sent as i32, "rt_tgsigqueueinfo")?;
    let before = own()?;
    zoo::here();
    if n == 0 {
        // It never sleeps.
        while !z.checking() {
            for _ in 0..1000 {
                COUNTS[n].fetch_add(1, Ordering::SeqCst);
            }
        }
    } else {
        z.wait_for_check();
    }
    ensure_eq!(own()?, before, "thread {n}");
    ensure_eq!(await_signal(signal, 10)?, 1000 + n as u64, "value of thread {n}'s signal");
    set_timer(timer, 1_000_000)?;
    ensure_eq!(await_signal(signal, 10)?, 5000 + n as u64, "value of thread {n}'s timer");
    Ok(())
}

/// A child whose first thread has ended, too. It ends as the last thread does.
fn child(z: &Zoo) -> Check {
    set_name(COMM)?;
    // SAFETY: the process ends with its threads.
    let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
    let heir = move || {
        let body = || -> Check {
            zoo::wait_state(zoo::pid(), 'Z')?;
            let threads = tids()?;
            ensure_eq!(threads, [zoo::pid(), zoo::tid()], "threads of the child");
            z.publish("child", "");
            z.wait_for_check();
            leader_is_gone(&threads)
        };
        if let Err(text) = body() {
            z.complain(&text);
        }
        end_thread(LAST_CODE)
    };
    std::thread::Builder::new().spawn(heir).map_err(|e| e.to_string())?;
    end_thread(CODE)
}

/// A seccomp filter for this thread, and those it makes, that lets everything through.
fn filter() -> Check {
    let code = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }];
    let program = libc::sock_fprog { len: 1, filter: code.as_ptr().cast_mut() };
    // SAFETY: integers, and a program that outlives the call.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")?;
        let program = &raw const program;
        check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, program), "a filter")
    }
}

fn body(z: &Zoo) -> Check {
    if !is_late() {
        zoo::wait_state(zoo::pid(), 'Z')?;
    }
    // SAFETY: the program ends with this closure.
    let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
    let child = z.fork(child)?;
    z.wait_for("child")?;
    let plain = z.fork(|z| {
        // SAFETY: takes nothing.
        let parent = || unsafe { libc::getppid() };
        let before = parent();
        if z.param("ZOO_PDEATH", 0) > 0 {
            // SAFETY: integers.
            check(
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2) },
                "PR_SET_PDEATHSIG",
            )?;
        }
        z.publish("plain", "");
        z.wait_for_check();
        ensure_eq!(parent(), before, "parent of the other child");
        Ok(())
    })?;
    z.wait_for("plain")?;

    if z.param("ZOO_FILTER", 0) > 0 {
        filter()?;
    }
    let n = z.param("ZOO_N", 3);
    for i in 0..n {
        let work = move || {
            if let Err(text) = worker(z, i) {
                z.complain(&text);
            }
            DONE.fetch_add(1, Ordering::SeqCst);
            // The others count the threads.
            loop {
                zoo::nap(1000);
            }
        };
        std::thread::Builder::new().stack_size(64 << 10).spawn(work).map_err(|e| e.to_string())?;
    }
    zoo::all_here(n)?;
    let threads = tids()?;
    ensure_eq!(threads.len(), n + 2, "number of threads");

    zoo::on_signal(libc::SIGALRM, tick as *const () as usize, libc::SA_RESTART)?;
    zoo::on_signal(libc::SIGUSR1, caught as *const () as usize, libc::SA_RESTART)?;
    alarm(3600, 0)?;
    let size = z.param("ZOO_MIB", 1) << 20;
    let memory = zoo::mmap_anon(size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
    // SAFETY: just mapped, and ours.
    let memory = unsafe { zoo::bytes(memory, size) };
    for (at, byte) in memory.iter_mut().enumerate() {
        *byte = ((at * 31) >> 4) as u8;
    }
    let mut file = std::fs::File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(z.path("file"))
        .map_err(|e| e.to_string())?;
    use std::io::{Read, Seek, Write};
    file.write_all(b"written before").map_err(|e| e.to_string())?;
    let mut pipes = Vec::new();
    for i in 0..1 + z.param("ZOO_FDS", 0) / 2 {
        let (end, mut other) = std::io::pipe().map_err(|e| e.to_string())?;
        other.write_all(&(i as u32).to_ne_bytes()).map_err(|e| e.to_string())?;
        pipes.push((end, other));
    }
    let before = own()?;
    z.ready()?;
    z.wait_for_check();

    ensure_eq!(own()?, before, "the second thread");
    leader_is_gone(&threads)?;
    ensure!(
        memory.iter().enumerate().all(|(at, byte)| *byte == ((at * 31) >> 4) as u8),
        "memory differs"
    );
    ensure_eq!(file.stream_position().map_err(|e| e.to_string())?, 14, "position of the file");
    for (i, (end, _)) in pipes.iter_mut().enumerate() {
        let mut number = [0; 4];
        end.read_exact(&mut number).map_err(|e| e.to_string())?;
        ensure_eq!(u32::from_ne_bytes(number), i as u32, "content of pipe {i}");
    }
    let rest = alarm(0, 1000)?;
    ensure!((1..=3600).contains(&rest), "{rest} seconds were left of an hour");
    let until = zoo::now() + 10_000_000_000;
    // SAFETY: a signal to ourselves, which some thread takes that has not blocked it.
    check(unsafe { libc::kill(zoo::pid(), libc::SIGUSR1) }, "kill")?;
    let all_came = || {
        let by = CAUGHT_BY.load(Ordering::SeqCst);
        by != 0 && by != zoo::pid() && TICKS.load(Ordering::SeqCst) == 1
    };
    while !(all_came() && DONE.load(Ordering::SeqCst) == n) {
        ensure!(zoo::now() < until, "the alarm, a signal or {n} threads did not come in time");
        zoo::nap(1);
    }
    ensure!(n == 0 || COUNTS[0].load(Ordering::SeqCst) > 0, "the counting thread did not count");
    z.join(plain)?;
    ensure_eq!(zoo::wait4(child, 0)?, LAST_CODE << 8, "wait status of the child");
    Ok(())
}

/// Has SIGALRM come after that time; returns the seconds that were left before.
fn alarm(seconds: i64, microseconds: i64) -> Result<i64, String> {
    let time = |tv_sec, tv_usec| libc::timeval { tv_sec, tv_usec };
    let new = libc::itimerval { it_interval: time(0, 0), it_value: time(seconds, microseconds) };
    let mut before = new;
    // SAFETY: both are locals.
    check(unsafe { libc::setitimer(libc::ITIMER_REAL, &new, &mut before) }, "setitimer")?;
    Ok(before.it_value.tv_sec)
}

fn is_late() -> bool {
    std::env::var_os("ZOO_LATE").is_some()
}

fn main() {
    let named = set_name(COMM);
    let heir = move || {
        zoo::run(|z| {
            named?;
            body(z)
        })
    };
    if let Err(e) = std::thread::Builder::new().name("heir".into()).spawn(heir) {
        eprintln!("no thread: {e}");
        std::process::exit(1);
    }
    let dir = std::env::args_os().nth(1).unwrap_or_default();
    while is_late() && !std::path::Path::new(&dir).join("end").exists() {
        std::hint::spin_loop();
    }
    end_thread(CODE)
}
