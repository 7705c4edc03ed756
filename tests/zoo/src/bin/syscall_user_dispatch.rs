//! Kernel state: syscall user dispatch: with its selector on, a system call outside the allowed range gives SIGSYS.
#![allow(unsafe_code, reason = "prctl and a SIGSYS handler")]

use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
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
        z.ready()?;
        z.wait_for_check();
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
