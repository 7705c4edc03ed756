//! What every zoo program needs: the protocol with the harness, and a few thin calls.
//!
//! A zoo program is started as `PROGRAM DIR`. It sets up ONE kind of kernel state, calls [`Zoo::ready`] and waits in
//! [`Zoo::wait_for_check`]. Meanwhile the harness dumps and restores it any number of times; the program is not told.
//! When it is told to check (the file `DIR/check` appears) it looks at its own state from inside and returns `Ok` or
//! the text of what is wrong, which [`run`] writes to `DIR/result` (`PASS` or `FAIL: text`).
//!
//! Files in `DIR`: `log` (stdout and stderr), `ready` (root's pid), `skip` (this machine cannot do it: why), `check`,
//! `result`, `fail.PID` (a child's complaint), `eintr` (calls that returned EINTR without a reason, see [`Zoo::note`]).
//!
//! ```no_run
//! zoo::run(|z| {
//!     let before = std::process::id();
//!     z.ready()?;
//!     z.wait_for_check();
//!     zoo::ensure_eq!(std::process::id(), before, "pid");
//!     Ok(())
//! })
//! ```
#![allow(
    unsafe_code,
    reason = "zoo programs set up raw kernel state with the C library; nothing here is shipped"
)]

pub mod kin;
pub mod net;
pub mod unix;
pub mod uring;

use std::ffi::CString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Outcome of a step or of the whole check: the text says what is wrong.
pub type Check = Result<(), String>;

/// Returns an error with the formatted text unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($text:tt)+) => {
        if !$cond {
            return Err(format!($($text)+));
        }
    };
}

/// Returns an error naming both values unless they are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($got:expr, $want:expr, $($text:tt)+) => {{
        let (got, want) = (&$got, &$want);
        if got != want {
            return Err(format!("{}: got {:?}, expected {:?}", format!($($text)+), got, want));
        }
    }};
}

/// The program's end of the protocol.
#[derive(Debug)]
pub struct Zoo {
    dir: PathBuf,
}

/// Runs a zoo program: `body` sets up, calls [`Zoo::ready`], waits, checks. Never returns.
///
/// The outcome goes to `DIR/result`, and to the exit status (0 pass, 1 fail). A panic is a failure.
pub fn run(body: impl FnOnce(&Zoo) -> Check) -> ! {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: PROGRAM DIR (see tests/zoo/src/lib.rs)");
        std::process::exit(2);
    };
    touch_stack();
    let zoo = Zoo { dir: dir.into() };
    grow_table(&zoo);
    add_threads(&zoo);
    let main_pid = pid();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&zoo)));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    });
    if pid() != main_pid {
        // A forked child that fell out of its closure by panic: its parent must not be reported as finished.
        zoo.complain(&format!("{outcome:?}"));
        exit_now(1);
    }
    let outcome = outcome.and_then(|()| zoo.complaints());
    let (text, code) = match outcome {
        Ok(()) => ("PASS".to_string(), 0),
        Err(text) => (format!("FAIL: {text}"), 1),
    };
    println!("{text}");
    zoo.publish("result", &text);
    exit_now(code)
}

/// Has the table of descriptors have room for `ZOO_TABLE`, if that is set: large ones are looked at another way.
fn grow_table(zoo: &Zoo) {
    let room = zoo.param("ZOO_TABLE", 0);
    if room > 0 {
        // SAFETY: numbers; what is made is closed again, and nobody has seen it.
        unsafe { libc::close(libc::fcntl(2, libc::F_DUPFD_CLOEXEC, room as i32 - 1)) };
    }
}

/// Adds `ZOO_THREADS` threads that do nothing, if that is set: many are looked at another way.
fn add_threads(zoo: &Zoo) {
    let none = || {
        // SAFETY: a set of signals of its own.
        unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
        }
        loop {
            std::thread::park();
        }
    };
    for _ in 0..zoo.param("ZOO_THREADS", 0) {
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(none);
        drop(thread.expect("a thread"));
    }
}

/// Ends the process (all threads) without running destructors or exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: exit_group takes no pointers and does not return.
    unsafe { libc::syscall(libc::SYS_exit_group, code) };
    unreachable!("exit_group returned")
}

/// Makes the main stack as large as it will get, so that its mapping does not change between two looks at it.
fn touch_stack() {
    let mut room = [0u8; 200 << 10];
    std::hint::black_box(&mut room);
}

impl Zoo {
    /// The program's own directory, given by the harness.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the program's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A number from the environment (the harness or a user may set it), or the default.
    pub fn param(&self, name: &str, default: usize) -> usize {
        std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
    }

    /// Writes a file whole: it appears with its content by rename.
    pub fn publish(&self, name: &str, text: &str) {
        let tmp = self.path(&format!(".{name}.{}", pid()));
        let done = std::fs::write(&tmp, text).and_then(|()| std::fs::rename(&tmp, self.path(name)));
        if let Err(e) = done {
            eprintln!("cannot write {name}: {e}");
        }
    }

    /// Everything is set up: tells the harness this process's pid (the root of the tree to dump).
    pub fn ready(&self) -> Check {
        // What children found out while being set up must stop the test here, not after the dump.
        self.complaints()?;
        self.publish("ready", &pid().to_string());
        Ok(())
    }

    /// This machine (or this user) cannot do what the program is about. Does not return.
    pub fn skip(&self, why: &str) -> ! {
        self.publish("skip", why);
        exit_now(0)
    }

    /// Whether the harness has asked for the check.
    pub fn checking(&self) -> bool {
        exists(&self.path("check"))
    }

    /// Waits (nanosleep of 10 ms and access, nothing else) until the harness asks for the check.
    pub fn wait_for_check(&self) {
        let path = cstring(self.path("check"));
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        while unsafe { libc::access(path.as_ptr(), libc::F_OK) } != 0 {
            nap(10);
        }
    }

    /// Waits until a file of the program's directory exists: how parent and children meet without kernel state.
    pub fn wait_for(&self, name: &str) -> Check {
        // Long: some trials checkpoint a program for minutes in which it waits. The harness ends a program that hangs.
        let until = Instant::now() + Duration::from_secs(1200);
        while !exists(&self.path(name)) {
            ensure!(Instant::now() < until, "waited 20 minutes for {name}");
            nap(2);
        }
        Ok(())
    }

    /// Records something the harness judges (it knows which flavour ran): one more line in `DIR/name`.
    pub fn note(&self, name: &str, line: &str) {
        use std::io::Write;
        let file = std::fs::OpenOptions::new().append(true).create(true).open(self.path(name));
        if let Err(e) = file.and_then(|mut f| writeln!(f, "{line}")) {
            eprintln!("cannot note {line} in {name}: {e}");
        }
    }

    /// Forks a child that runs `body` and exits 0, or leaves its complaint in `fail.PID` and exits 1.
    pub fn fork(&self, body: impl FnOnce(&Zoo) -> Check) -> Result<i32, String> {
        // The C library sets up a child after its birth (robust list, rseq): nobody is to look before that.
        let begun = std::io::pipe().ok();
        // SAFETY: zoo programs fork before they start threads; the child only runs `body` and exits.
        match ok(unsafe { libc::fork() } as i64, "fork")? {
            0 => {
                drop(begun);
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(self)));
                match done {
                    Ok(Ok(())) => exit_now(0),
                    Ok(Err(text)) => self.complain(&text),
                    Err(_) => self.complain("panicked"),
                }
                exit_now(1)
            }
            child => {
                if let Some((mut its_end, ours)) = begun {
                    drop(ours);
                    // End of file once the child has let go of it.
                    let _ = its_end.read(&mut [0]);
                }
                Ok(child as i32)
            }
        }
    }

    /// Starts a process that is no part of the tree: whoever reaps orphans (the harness) gets it. It is to end by itself
    /// once the file `gone` exists or this program's `result`; a complaint of it fails the whole program.
    pub fn outside(&self, body: impl FnOnce(&Zoo) -> Check) -> Check {
        let middle = self.fork(|z| {
            // A session of its own, or it would keep the root's pid taken.
            // SAFETY: it takes nothing.
            check(unsafe { libc::setsid() }, "setsid")?;
            z.fork(|z| {
                // It keeps nothing open that belongs to the tree; nobody here uses those descriptors.
                // SAFETY: integers.
                check(unsafe { libc::close_range(3, u32::MAX, 0) }, "close_range")?;
                body(z)
            })
            .map(drop)
        })?;
        self.join(middle)
    }

    /// Whether the program is over: for a process that is [`Zoo::outside`].
    pub fn is_over(&self) -> bool {
        exists(&self.path("result")) || exists(&self.path("gone"))
    }

    /// Leaves a complaint that fails the whole program.
    pub fn complain(&self, text: &str) {
        eprintln!("pid {}: {text}", pid());
        self.note(&format!("fail.{}", pid()), text);
    }

    /// Waits for a child made by [`Zoo::fork`] and fails unless it exited 0.
    pub fn join(&self, child: i32) -> Check {
        let status = wait4(child, 0)?;
        self.complaints()?;
        ensure_eq!(status, 0, "wait status of child {child}");
        Ok(())
    }

    /// Collects the complaints of children.
    pub fn complaints(&self) -> Check {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(|e| format!("read_dir: {e}"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(pid) = name.strip_prefix("fail.") {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                all.push(format!("pid {pid}: {}", text.trim()));
            }
        }
        ensure!(all.is_empty(), "{}", all.join("; "));
        Ok(())
    }
}

fn exists(path: &Path) -> bool {
    let path = cstring(path);
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

/// Fails unless a wait status says that its process ended well.
fn ensured(status: i32, name: &str) -> Check {
    ensure_eq!(status, 0, "wait status of {name}");
    Ok(())
}

/// Sleeps for some milliseconds, whatever interrupts it.
pub fn nap(ms: u64) {
    let mut left =
        libc::timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
    // SAFETY: both pointers are to the same valid timespec, which nanosleep allows.
    while unsafe { libc::nanosleep(&left, &mut left) } != 0 && errno() == libc::EINTR {}
}

/// The calling process's id, asked from the kernel every time.
pub fn pid() -> i32 {
    // SAFETY: getpid takes nothing and cannot fail.
    unsafe { libc::syscall(libc::SYS_getpid) as i32 }
}

/// The calling thread's id, asked from the kernel every time.
pub fn tid() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// The calling thread's last error number.
pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Turns a C return value into a result: negative means the last OS error, named by what was tried.
pub fn ok(ret: i64, what: &str) -> Result<i64, String> {
    if ret < 0 { Err(format!("{what}: {}", io::Error::last_os_error())) } else { Ok(ret) }
}

/// Like [`ok`], for calls whose return value is of no interest.
pub fn check(ret: i32, what: &str) -> Check {
    ok(ret as i64, what).map(drop)
}

/// A path or string as C wants it.
pub fn cstring(s: impl AsRef<std::ffi::OsStr>) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(s.as_ref().as_bytes()).expect("no NUL in zoo's strings")
}

/// wait4(2) for one pid; returns the raw status. EINTR is retried.
pub fn wait4(child: i32, options: i32) -> Result<i32, String> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is valid for writing, no rusage is asked.
        let got = unsafe { libc::wait4(child, &mut status, options, std::ptr::null_mut()) };
        if got == child || (got > 0 && child <= 0) {
            return Ok(status);
        }
        if got < 0 && errno() == libc::EINTR {
            continue;
        }
        ensure!(got >= 0, "wait4({child}): {}", io::Error::last_os_error());
        return Err(format!("wait4({child}) found nothing"));
    }
}

/// A clock's reading in nanoseconds.
pub fn clock(id: libc::clockid_t) -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writing.
    unsafe { libc::clock_gettime(id, &mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> i64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds as a timespec.
pub fn timespec(ns: i64) -> libc::timespec {
    libc::timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 }
}

/// The value of one line of /proc/…/status (`key` without the colon).
pub fn status_of(path: &str, key: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    line.map(|v| v.trim().to_string()).ok_or(format!("{path} has no {key}"))
}

/// The state letter of a task (`/proc/TID/stat`), or none if there is no such task.
pub fn state_of(tid: i32) -> Option<char> {
    // Not as UTF-8: a task's name is any bytes.
    let text = std::fs::read(format!("/proc/{tid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(')')?.1.trim().chars().next()
}

/// Waits until the task is in the state (`S` for sleeping …), so that it is blocked where the test wants it.
pub fn wait_state(tid: i32, state: char) -> Check {
    let until = Instant::now() + Duration::from_secs(10);
    while state_of(tid) != Some(state) {
        ensure!(
            Instant::now() < until,
            "task {tid} is {:?}, not {state}, after 10 s",
            state_of(tid)
        );
        nap(1);
    }
    Ok(())
}

/// Installs a handler with the flags given and an empty mask.
pub fn on_signal(signo: i32, handler: usize, flags: i32) -> Check {
    // SAFETY: an all-zero sigaction is valid; the caller's handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        check(libc::sigaction(signo, &action, std::ptr::null_mut()), "sigaction")
    }
}

/// Blocks a signal in the calling thread.
pub fn block(signo: i32) -> Check {
    // SAFETY: the set lives through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, signo);
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()), "sigprocmask")
    }
}

static HERE: AtomicUsize = AtomicUsize::new(0);

/// Called by a thread that has reached the code it will be dumped in.
pub fn here() {
    HERE.fetch_add(1, Ordering::SeqCst);
}

/// Waits until so many threads of this process have called [`here`]: a thread that is still being set up by the library
/// changes mappings and masks under the harness's eyes.
pub fn all_here(n: usize) -> Check {
    let until = Instant::now() + Duration::from_secs(20);
    while HERE.load(Ordering::SeqCst) < n {
        ensure!(
            Instant::now() < until,
            "only {} of {n} threads came up",
            HERE.load(Ordering::SeqCst)
        );
        nap(1);
    }
    Ok(())
}

/// A small fast generator of numbers for filling memory: splitmix64.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends and is not iterated over")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills memory with numbers.
    pub fn fill(&mut self, memory: &mut [u8]) {
        for chunk in memory.chunks_mut(8) {
            let n = self.next().to_le_bytes();
            chunk.copy_from_slice(&n[..chunk.len()]);
        }
    }

    /// Checks memory filled by [`Rng::fill`] from the same seed.
    pub fn verify(&mut self, memory: &[u8], what: &str) -> Check {
        for (i, chunk) in memory.chunks(8).enumerate() {
            let n = self.next().to_le_bytes();
            ensure!(*chunk == n[..chunk.len()], "{what}: byte {} differs", i * 8);
        }
        Ok(())
    }
}

/// A flag that signal handlers may set.
#[derive(Debug)]
pub struct Flag(AtomicBool);

impl Flag {
    /// A flag that is down.
    pub const fn new() -> Flag {
        Flag(AtomicBool::new(false))
    }
    /// Puts it up.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    /// Whether it is up.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
    /// Whether it was up; puts it down.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
    /// Waits some milliseconds at most for it to be up.
    pub fn wait(&self, ms: u64) -> bool {
        let until = Instant::now() + Duration::from_millis(ms);
        while !self.is_set() && Instant::now() < until {
            nap(1);
        }
        self.is_set()
    }
}

impl Default for Flag {
    fn default() -> Self {
        Flag::new()
    }
}

/// Maps anonymous memory; `addr` 0 lets the kernel choose.
pub fn mmap_anon(len: usize, prot: i32, flags: i32) -> Result<*mut u8, String> {
    mmap(0, len, prot, flags | libc::MAP_ANONYMOUS, -1, 0)
}

/// mmap(2) with errors as text.
pub fn mmap(
    addr: usize,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> Result<*mut u8, String> {
    // SAFETY: a new mapping; with MAP_FIXED the caller owns the range.
    let p = unsafe { libc::mmap(addr as *mut _, len, prot, flags, fd, offset) };
    ensure!(p != libc::MAP_FAILED, "mmap of {len} bytes: {}", io::Error::last_os_error());
    Ok(p.cast())
}

/// Memory at an address as a slice.
///
/// # Safety
/// The range must be mapped, readable and writable, and not otherwise borrowed while the slice lives.
pub unsafe fn bytes<'a>(p: *mut u8, len: usize) -> &'a mut [u8] {
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(p, len) }
}
