//! Kernel state: many threads (ZOO_N, default 1000), each with its own id, TLS base, name, signal mask, alternate signal
//! stack and a robust mutex it holds.
//!
//! All block in one futex. When released each checks itself; then each ends without unlocking its mutex, which the
//! kernel must notice by the robust list (EOWNERDEAD).
#![allow(unsafe_code, reason = "robust mutexes, masks and alternate stacks through the C library")]

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex};
use zoo::{Check, check, ensure_eq};

thread_local! {
    static MINE: Cell<usize> = const { Cell::new(0) };
}

struct Robust(Box<std::cell::UnsafeCell<libc::pthread_mutex_t>>);
// SAFETY: a pthread mutex is made to be used by several threads; it is only touched through pthread calls.
unsafe impl Send for Robust {}
// SAFETY: as above.
unsafe impl Sync for Robust {}

impl Robust {
    fn new() -> Result<Robust, String> {
        // SAFETY: attribute and mutex are initialised before use; the mutex does not move (it is boxed).
        unsafe {
            let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attr);
            libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
            let mutex = Robust(Box::new(std::cell::UnsafeCell::new(std::mem::zeroed())));
            ensure_eq!(libc::pthread_mutex_init(mutex.0.get(), &attr), 0, "pthread_mutex_init");
            Ok(mutex)
        }
    }
    fn lock(&self) -> i32 {
        // SAFETY: initialised in `new`.
        unsafe { libc::pthread_mutex_lock(self.0.get()) }
    }
}

const STACK: usize = 16 << 10;

/// Everything a thread can tell of itself.
#[derive(Debug, PartialEq)]
struct State {
    tid: i32,
    handle: u64,
    tls: usize,
    name: String,
    mask: Vec<i32>,
    altstack: (usize, usize, i32),
}

fn state() -> State {
    // SAFETY: out-parameters are valid; null means "only ask".
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
        let mut stack: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut stack);
        let mut name = [0u8; 16];
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        State {
            tid: zoo::tid(),
            handle: libc::pthread_self(),
            tls: MINE.get(),
            name: String::from_utf8_lossy(&name).trim_end_matches('\0').to_string(),
            mask: (1..=64).filter(|&s| libc::sigismember(&set, s) == 1).collect(),
            altstack: (stack.ss_sp as usize, stack.ss_size, stack.ss_flags),
        }
    }
}

fn set_up(i: usize, stack: &mut [u8]) -> Check {
    MINE.set(i * 7 + 1);
    // SAFETY: `stack` lives as long as the thread; the name is NUL-terminated.
    unsafe {
        let name = zoo::cstring(format!("zoo-{i}"));
        check(libc::prctl(libc::PR_SET_NAME, name.as_ptr()), "PR_SET_NAME")?;
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signo in (1..=64).filter(|s| (i >> (s % 10)) & 1 == 1 && ![9, 19, 32, 33].contains(s)) {
            libc::sigaddset(&mut set, signo);
        }
        check(
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()),
            "pthread_sigmask",
        )?;
        let ss =
            libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        check(libc::sigaltstack(&ss, std::ptr::null_mut()), "sigaltstack")
    }
}

fn main() {
    zoo::run(|z| {
        let n = z.param("ZOO_N", 1000);
        let gate = Arc::new((Mutex::new((0usize, false)), Condvar::new()));
        let mutexes: Arc<Vec<Robust>> =
            Arc::new((0..n).map(|_| Robust::new()).collect::<Result<_, _>>()?);
        let mut threads = Vec::new();
        for i in 0..n {
            let (gate, mutexes) = (gate.clone(), mutexes.clone());
            let body = move || -> Check {
                let mut stack = vec![0u8; STACK];
                set_up(i, &mut stack)?;
                ensure_eq!(mutexes[i].lock(), 0, "lock of robust mutex {i}");
                let before = state();
                {
                    let (lock, wake) = &*gate;
                    let mut open = lock.lock().map_err(|e| e.to_string())?;
                    open.0 += 1;
                    while !open.1 {
                        open = wake.wait(open).map_err(|e| e.to_string())?;
                    }
                }
                ensure_eq!(state(), before, "thread {i}");
                // The standard library takes its own alternate stack down again; ours must not be left in use.
                let off = libc::stack_t {
                    ss_sp: std::ptr::null_mut(),
                    ss_flags: libc::SS_DISABLE,
                    ss_size: 0,
                };
                // SAFETY: disables the stack; `stack` is still alive.
                check(unsafe { libc::sigaltstack(&off, std::ptr::null_mut()) }, "sigaltstack off")
            };
            let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(body);
            threads.push(thread.map_err(|e| format!("thread {i}: {e}"))?);
        }
        let (lock, wake) = &*gate;
        while lock.lock().map_err(|e| e.to_string())?.0 < n {
            zoo::nap(1);
        }
        zoo::nap(5);
        let me = state();
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state(), me, "main thread");
        lock.lock().map_err(|e| e.to_string())?.1 = true;
        wake.notify_all();
        for (i, thread) in threads.into_iter().enumerate() {
            thread.join().map_err(|_| format!("thread {i} panicked"))??;
        }
        for (i, mutex) in mutexes.iter().enumerate() {
            ensure_eq!(mutex.lock(), libc::EOWNERDEAD, "mutex {i}, left locked by its ended owner");
        }
        Ok(())
    })
}
