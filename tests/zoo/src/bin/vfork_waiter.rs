//! Kernel state that cannot be checkpointed: a process that waits in vfork(2) for its child.
#![allow(unsafe_code, reason = "clone with CLONE_VFORK")]

use std::sync::atomic::{AtomicBool, Ordering};
use zoo::{check, ensure_eq};

static OVER: AtomicBool = AtomicBool::new(false);

/// The child has its parent's memory: system calls only.
extern "C" fn wait(path: *mut libc::c_void) -> i32 {
    let pause = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    // SAFETY: the path is a string of the waiting parent, who does not run; the times outlive the call.
    unsafe {
        while libc::access(path.cast(), libc::F_OK) != 0 {
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
        }
    }
    OVER.store(true, Ordering::SeqCst);
    7
}

fn main() {
    zoo::run(|z| {
        let parent = z.fork(|z| {
            let check_file = zoo::cstring(z.path("check"));
            let mut stack = vec![0u128; 4096];
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            // SAFETY: the stack and the path outlive the call, which returns when the child has ended.
            let child = unsafe {
                let top = stack.as_mut_ptr().add(stack.len());
                libc::clone(wait, top.cast(), flags, check_file.as_ptr().cast_mut().cast())
            };
            check(child, "clone")?;
            ensure_eq!(OVER.load(Ordering::SeqCst), true, "the child is over when clone returns");
            ensure_eq!(libc::WEXITSTATUS(zoo::wait4(child, 0)?), 7, "its exit code");
            Ok(())
        })?;
        zoo::wait_state(parent, 'D')?;
        let children = format!("/proc/{parent}/task/{parent}/children");
        let child = std::fs::read_to_string(children).map_err(|e| e.to_string())?;
        z.publish("child", child.trim());
        z.ready()?;
        z.wait_for_check();
        z.join(parent)
    });
}
