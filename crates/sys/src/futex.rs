//! futex(2) on words that other processes share, and the memory orders that go with them.

use crate::call::{Errno, syscall};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `*word == expected`, at most `timeout`. Spurious returns are possible.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let ts = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
    };
    // SAFETY: the word is live for the call, the timespec too. Every outcome (woken, changed, timed out, EINTR)
    // means the same to the caller: look again.
    let _ = unsafe {
        syscall(
            "futex",
            libc::SYS_futex,
            [
                word.as_ptr() as usize,
                libc::FUTEX_WAIT as usize,
                expected as usize,
                (&raw const ts) as usize,
                0,
                0,
            ],
        )
    };
}

/// Wakes everyone who sleeps on `word`.
pub fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE reads no memory; the address is only a key.
    let result = unsafe {
        syscall(
            "futex",
            libc::SYS_futex,
            [word.as_ptr() as usize, libc::FUTEX_WAKE as usize, i32::MAX as usize, 0, 0, 0],
        )
    };
    debug_assert!(!matches!(result, Err(e) if e.errno == Errno::FAULT));
}
