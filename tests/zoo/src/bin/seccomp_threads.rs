//! Kernel state: seccomp of single threads: filters that all threads share and that one has for itself, installed with
//! CAP_SYS_ADMIN by a thread that has lost it since (without no_new_privs), with it, with the log flag. Somebody outside reads the filters by ptrace(2) before and after.
//! With ZOO_STRICT a thread in strict mode is among them. With ZOO_UNIFORM all threads have the same filters, and one more can be installed for all (TSYNC).
#![allow(unsafe_code, reason = "raw seccomp, ptrace and system calls")]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use zoo::{check, ensure_eq, errno};

const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;
const TSYNC: u64 = 1;
const LOG: u64 = 2;
const CAP_SYS_ADMIN: u32 = 21;

#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

#[repr(C)]
struct Program {
    len: u16,
    filter: *const Insn,
}

/// `call` fails with `error`.
fn refuse(call: i64, error: i32, flags: u64) -> zoo::Check {
    let code = [
        Insn { code: 0x20, jt: 0, jf: 0, k: 0 },
        Insn { code: 0x15, jt: 0, jf: 1, k: call as u32 },
        Insn { code: 0x06, jt: 0, jf: 0, k: ERRNO | error as u32 },
        Insn { code: 0x06, jt: 0, jf: 0, k: ALLOW },
    ];
    let program = Program { len: code.len() as u16, filter: code.as_ptr() };
    // SAFETY: the program points to `code`, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, 1, flags, &raw const program) };
    match result {
        0 => Ok(()),
        -1 => Err(format!("SECCOMP_SET_MODE_FILTER: errno {}", errno())),
        tid => Err(format!("SECCOMP_SET_MODE_FILTER: thread {tid} cannot be synchronised")),
    }
}

fn refused(call: i64) -> i32 {
    // SAFETY: calls without arguments.
    if unsafe { libc::syscall(call, 0, 0, 0) } == -1 { errno() } else { 0 }
}

fn own_status(key: &str) -> Result<String, String> {
    zoo::status_of("/proc/thread-self/status", key)
}

/// Drops CAP_SYS_ADMIN from this thread's permitted and effective sets.
fn drop_admin() -> zoo::Check {
    #[repr(C)]
    struct Header(u32, i32);
    let header = Header(0x2008_0522, 0);
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: header and two sets, as the call wants them.
    unsafe {
        check(
            libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) as i32,
            "capget",
        )?;
        sets[0][0] &= !(1 << CAP_SYS_ADMIN);
        sets[0][1] &= !(1 << CAP_SYS_ADMIN);
        check(libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) as i32, "capset")
    }
}

/// All filters of all threads of `pid`, by ptrace(2): code and flags.
fn look(pid: i32) -> Result<String, String> {
    let mut text = String::new();
    let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|e| e.to_string())?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_unstable();
    for tid in tids {
        // SAFETY: requests with numbers, and with memory of the sizes they want.
        unsafe {
            check(libc::ptrace(0x4206, tid, 0, 0) as i32, "PTRACE_SEIZE")?;
            check(libc::ptrace(0x4207, tid, 0, 0) as i32, "PTRACE_INTERRUPT")?;
            let mut status = 0;
            check(libc::waitpid(tid, &raw mut status, libc::__WALL).min(0), "waitpid")?;
            for n in 0u64.. {
                let mut code = [0u64; 4096];
                let len = libc::ptrace(0x420c, tid, n, code.as_mut_ptr());
                if len < 0 {
                    break;
                }
                let mut meta = [n, 0];
                check(
                    (libc::ptrace(0x420d, tid, 16, meta.as_mut_ptr()) as i32).min(0),
                    "PTRACE_SECCOMP_GET_METADATA",
                )?;
                text += &format!(
                    "{tid} filter {n}: {:x?} flags {:x}\n",
                    &code[..len as usize],
                    meta[1]
                );
            }
            check(libc::ptrace(17, tid, 0, 0) as i32, "PTRACE_DETACH")?;
        }
    }
    Ok(text)
}

/// Have the filters been compared?
static GO: AtomicBool = AtomicBool::new(false);

fn uniform() -> bool {
    std::env::var_os("ZOO_UNIFORM").is_some()
}

/// A thread in strict mode, which ends as soon as it can read a byte, and where to write that.
fn strict_thread() -> Result<(i32, i32), String> {
    static TID: AtomicI32 = AtomicI32::new(0);
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
    let [from, to] = pipe;
    std::thread::spawn(move || {
        TID.store(zoo::tid(), Ordering::Relaxed);
        let mut byte = 0u8;
        zoo::here();
        // SAFETY: one byte of a local; exit(2) ends this thread only, which nobody joins.
        unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, 1);
            while libc::syscall(libc::SYS_read, from, &raw mut byte, 1) != 1 || byte != 7 {}
            libc::syscall(libc::SYS_exit, 0);
        }
    });
    zoo::all_here(1)?;
    zoo::nap(20);
    Ok((TID.load(Ordering::Relaxed), to))
}

fn main() {
    zoo::run(|z| {
        let main = zoo::pid();
        z.outside(move |z| {
            z.wait_for("look")?;
            let before = look(main)?;
            z.publish("looked", "");
            z.wait_for("compare")?;
            ensure_eq!(look(main)?, before, "filters seen from outside");
            z.publish("compared", "");
            Ok(())
        })?;
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        // A thread with a filter could not go strict.
        let strict = z.param("ZOO_STRICT", 0) != 0;
        let strict = strict.then(strict_thread).transpose()?;
        refuse(libc::SYS_getppid, libc::ENOTTY, LOG)?;
        let spawn = |set: fn() -> zoo::Check, judge: fn() -> zoo::Check| {
            std::thread::spawn(move || {
                let done = set();
                zoo::here();
                done?;
                while !GO.load(Ordering::Relaxed) {
                    zoo::nap(10);
                }
                ensure_eq!(refused(libc::SYS_getppid), libc::ENOTTY, "the filter of all");
                judge()
            })
        };
        let plain: fn() -> zoo::Check = || Ok(());
        let mut threads = vec![spawn(plain, || {
            ensure_eq!(own_status("NoNewPrivs")?, "0", "no_new_privs");
            ensure_eq!(own_status("Seccomp")?, "2", "mode of a thread without filters of its own");
            if uniform() {
                ensure_eq!(refused(libc::SYS_getpgrp), libc::ENOLINK, "filter of a later TSYNC");
            }
            Ok(())
        })];
        if !uniform() {
            threads.push(spawn(
                || {
                    refuse(libc::SYS_getpgrp, libc::ENOLINK, 0)?;
                    refuse(libc::SYS_getuid, libc::EXDEV, LOG)?;
                    drop_admin()
                },
                || {
                    ensure_eq!(own_status("Seccomp_filters")?, "3", "filters, one thread");
                    ensure_eq!(own_status("NoNewPrivs")?, "0", "no_new_privs of that thread");
                    ensure_eq!(refused(libc::SYS_getpgrp), libc::ENOLINK, "own filter");
                    ensure_eq!(refused(libc::SYS_getuid), libc::EXDEV, "own second filter");
                    ensure_eq!(refused(libc::SYS_getgid), 0, "a call that no filter refuses");
                    Ok(())
                },
            ));
            threads.push(spawn(
                || {
                    drop_admin()?;
                    // SAFETY: integers.
                    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, "nnp")?;
                    refuse(libc::SYS_getgid, libc::EXDEV, 0)
                },
                || {
                    ensure_eq!(own_status("NoNewPrivs")?, "1", "no_new_privs of a thread with it");
                    ensure_eq!(refused(libc::SYS_getgid), libc::EXDEV, "own filter");
                    ensure_eq!(refused(libc::SYS_getpgrp), 0, "another thread's filter");
                    Ok(())
                },
            ));
        }
        zoo::all_here(threads.len() + usize::from(strict.is_some()))?;
        z.publish("look", "");
        z.wait_for("looked")?;
        z.ready()?;
        z.wait_for_check();
        let compared = |z: &zoo::Zoo| {
            z.publish("compare", "");
            z.wait_for("compared")
        };
        compared(z)?;
        if uniform() {
            refuse(libc::SYS_getpgrp, libc::ENOLINK, TSYNC)?;
        }
        GO.store(true, Ordering::Relaxed);
        if let Some((strict, out)) = strict {
            // SAFETY: one byte of a literal.
            unsafe { libc::write(out, [7u8].as_ptr().cast(), 1) };
            while zoo::state_of(strict).is_some() {
                zoo::nap(1);
            }
        }
        for (i, thread) in threads.into_iter().enumerate() {
            thread.join().map_err(|_| format!("thread {i} panicked"))??;
        }
        let own = if uniform() { "2" } else { "1" };
        ensure_eq!(own_status("Seccomp_filters")?, own, "filters of the first thread");
        ensure_eq!(own_status("NoNewPrivs")?, "0", "no_new_privs of the first thread");
        Ok(())
    })
}
