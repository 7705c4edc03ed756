//! Kernel state: robust lists and set_tid_address: a process that ends after a restore while it holds robust mutexes in
//! shared memory, and a thread whose end clears its id and wakes a futex.
#![allow(unsafe_code, reason = "process-shared robust mutexes and raw clone through the C library")]

use std::sync::atomic::{AtomicI32, Ordering};
use zoo::{check, ensure, ensure_eq};

const N: usize = 20;
static CLEARED: AtomicI32 = AtomicI32::new(0);

fn main() {
    zoo::run(|z| {
        let page = zoo::mmap_anon(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)?;
        let mutexes: *mut libc::pthread_mutex_t = page.cast();
        // SAFETY: the page holds N mutexes, initialised before use.
        unsafe {
            let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attr);
            libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutexattr_setpshared(&mut attr, libc::PTHREAD_PROCESS_SHARED);
            for i in 0..N {
                ensure_eq!(
                    libc::pthread_mutex_init(mutexes.add(i), &attr),
                    0,
                    "pthread_mutex_init"
                );
            }
        }
        // SAFETY (below): the mutexes are initialised.
        let holder = z.fork(|z| {
            for i in 0..N {
                ensure_eq!(unsafe { libc::pthread_mutex_lock(mutexes.add(i)) }, 0, "lock");
            }
            z.publish("held", "");
            z.wait_for_check();
            Ok(())
        })?;
        let killed = z.fork(|z| {
            // A thread has a robust list of its own.
            std::thread::spawn(|| {
                zoo::here();
                loop {
                    zoo::nap(1000);
                }
            });
            zoo::all_here(1)?;
            z.publish("threaded", "");
            loop {
                zoo::nap(1000);
            }
        })?;
        z.wait_for("held")?;
        z.wait_for("threaded")?;
        // A thread that asks for its word to be cleared at its end, apart from what the C library asked for.
        let thread = std::thread::spawn({
            // SAFETY: the program ends with this closure.
            let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
            move || {
                CLEARED.store(zoo::tid(), Ordering::SeqCst);
                z.publish("up", "");
                z.wait_for_check();
                // Only this thread: the C library must not see its end, it would free the stack under us.
                // SAFETY: ends the thread; nothing of it is used afterwards.
                unsafe {
                    libc::syscall(libc::SYS_set_tid_address, CLEARED.as_ptr());
                    libc::syscall(libc::SYS_exit, 0);
                }
            }
        });
        z.wait_for("up")?;
        let tid = CLEARED.load(Ordering::SeqCst);
        ensure!(
            unsafe { libc::pthread_mutex_trylock(mutexes) } == libc::EBUSY,
            "the mutex is not held"
        );
        z.ready()?;
        z.wait_for_check();
        for i in 0..N {
            let got = unsafe { libc::pthread_mutex_lock(mutexes.add(i)) };
            ensure_eq!(got, libc::EOWNERDEAD, "lock of mutex {i} whose holder ended");
        }
        z.join(holder)?;
        let until = zoo::now() + 5_000_000_000;
        while CLEARED.load(Ordering::SeqCst) == tid && zoo::now() < until {
            let wait = zoo::timespec(100_000_000);
            // SAFETY: a static word and a local.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    CLEARED.as_ptr(),
                    libc::FUTEX_WAIT,
                    tid,
                    &raw const wait,
                )
            };
        }
        ensure_eq!(CLEARED.load(Ordering::SeqCst), 0, "the word of an ended thread");
        ensure!(zoo::state_of(tid).is_none(), "the ended thread is still there");
        std::mem::forget(thread);
        // SAFETY: our own child.
        check(unsafe { libc::kill(killed, libc::SIGKILL) }, "kill")?;
        ensure_eq!(zoo::wait4(killed, 0)?, libc::SIGKILL, "status of the killed child");
        Ok(())
    })
}
