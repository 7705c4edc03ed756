//! Kernel state: syscall user dispatch: with its selector on, a system call outside the allowed range gives SIGSYS. Another
//! thread has its selector on most of the time, as one that runs the code of another system; with `ZOO_FOREIGN` always.
#![allow(unsafe_code, reason = "prctl and a SIGSYS handler")]

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;
use zoo::{check, ensure_eq};

const ALLOW: u8 = 0;
const BLOCK: u8 = 1;
static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
static CAUGHT: AtomicI64 = AtomicI64::new(-1);

extern "C" fn on_sigsys(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SELECTOR.store(ALLOW, Ordering::SeqCst);
    // SAFETY: a SIGSYS siginfo: after three ints and padding come the address, then the number of the call.
    let number = unsafe { info.cast::<u8>().add(24).cast::<i32>().read() };
    CAUGHT.store(number as i64, Ordering::SeqCst);
}

/// The other thread's.
static FOREIGN: AtomicU8 = AtomicU8::new(ALLOW);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

/// Computes with its selector on, and makes a system call from time to time.
fn foreign(always: bool) {
    // SAFETY: the selector is static.
    unsafe { libc::prctl(59, 1, 0, 0, FOREIGN.as_ptr()) };
    while !OVER.load(Ordering::SeqCst) {
        FOREIGN.store(BLOCK, Ordering::SeqCst);
        let mut n = 0u64;
        while n < 100_000 || always && !OVER.load(Ordering::SeqCst) {
            n = std::hint::black_box(n + 1);
        }
        FOREIGN.store(ALLOW, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(300));
        ROUNDS.fetch_add(1, Ordering::SeqCst);
    }
}

fn main() {
    zoo::run(|z| {
        zoo::on_signal(libc::SIGSYS, on_sigsys as *const () as usize, libc::SA_SIGINFO)?;
        let on = 1;
        // SAFETY: the selector is static; no range is exempted, it allows everything for now.
        let ret = unsafe {
            libc::prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, on, 0, 0, SELECTOR.as_ptr())
        };
        if ret != 0 {
            z.skip(&format!("PR_SET_SYSCALL_USER_DISPATCH: {}", std::io::Error::last_os_error()));
        }
        let always = z.param("ZOO_FOREIGN", 0) == 1;
        let thread = std::thread::spawn(move || foreign(always));
        while FOREIGN.load(Ordering::SeqCst) == ALLOW {
            std::hint::spin_loop();
        }
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(CAUGHT.load(Ordering::SeqCst), -1, "a call that nobody made was caught");
        let rounds = ROUNDS.load(Ordering::SeqCst);
        while !always && ROUNDS.load(Ordering::SeqCst) == rounds {
            zoo::nap(1);
        }
        OVER.store(true, Ordering::SeqCst);
        thread.join().map_err(|_| "the other thread panicked")?;
        SELECTOR.store(BLOCK, Ordering::SeqCst);
        // SAFETY: a call number that does nothing harmful; it is caught before it is made.
        unsafe { libc::syscall(libc::SYS_getpid) };
        SELECTOR.store(ALLOW, Ordering::SeqCst);
        ensure_eq!(
            CAUGHT.load(Ordering::SeqCst),
            libc::SYS_getpid,
            "number of the call that was caught"
        );
        // SAFETY: off again.
        check(unsafe { libc::prctl(59, 0, 0, 0, 0) }, "off")
    })
}
