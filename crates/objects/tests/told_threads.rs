//! The kernel tells of threads what they would tell themselves.
#![allow(unsafe_code, reason = "calls of single threads")]

use rewake_objects::iterators::threads::of;
use std::sync::{Barrier, mpsc};

fn prctl(option: libc::c_int, argument: u64) {
    // SAFETY: of the calling thread, integers only.
    assert_eq!(unsafe { libc::prctl(option, argument) }, 0);
}

fn own_tid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

#[test]
fn threads_are_told_as_they_are() {
    let Ok(before) = of(std::process::id() as i32).inspect_err(|e| println!("not here: {e}"))
    else {
        return;
    };
    let own = before.iter().find(|thread| thread.tid == own_tid()).unwrap();
    assert!(!own.no_new_privs && own.timer_slack == own.default_timer_slack);
    let (tell, told) = mpsc::channel();
    let together = Barrier::new(2);
    let mut stack = vec![0u8; 1 << 16];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            prctl(libc::PR_SET_NAME, c"a, b".as_ptr() as u64);
            prctl(libc::PR_SET_TIMERSLACK, 77_000);
            prctl(libc::PR_SET_PDEATHSIG, 10);
            // SAFETY: the call of setting one group, of this thread only; nobody asks for it afterwards.
            let groups = unsafe { libc::syscall(libc::SYS_setgroups, 0, 0) };
            let alternate = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: stack.len(),
            };
            // SAFETY: memory that outlives the thread; no handler uses it.
            assert_eq!(unsafe { libc::sigaltstack(&alternate, std::ptr::null_mut()) }, 0);
            let mut address = 0u64;
            // SAFETY: the kernel stores one pointer.
            unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address) };
            tell.send((own_tid(), address, alternate.ss_sp as u64, groups == 0)).unwrap();
            together.wait();
            together.wait();
        });
        let (tid, address, sp, other_groups) = told.recv().unwrap();
        together.wait();
        let all = of(std::process::id() as i32).unwrap();
        let thread = all.iter().find(|thread| thread.tid == tid).unwrap().clone();
        together.wait();
        assert_eq!(thread.comm, b"a, b");
        assert_eq!((thread.timer_slack, thread.pdeath_sig), (77_000, 10));
        assert_eq!(thread.default_timer_slack, own.default_timer_slack);
        assert_eq!(thread.alternate_stack, (sp, 1 << 16, 0));
        assert_eq!(thread.tid_address, address);
        assert_eq!(thread.credentials == own.credentials, !other_groups);
        assert_eq!((thread.seccomp, thread.no_new_privs), (0, false));
    });
}
