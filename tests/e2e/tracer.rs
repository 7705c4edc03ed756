//! The command under test, stopped at a certain one of its system calls: killed there, or the call made to fail. Its
//! threads are traced too; its children (which exit with SIGCHLD) are not.
//!
//! This executable runs itself as a tracer (`e2e --at-step WHAT N COMMAND…`), since the harness proper has a thread that
//! waits for all its children. The command needs nothing built in for it: the tests run the binary that is shipped.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

/// First argument of a run as tracer.
pub const ROLE: &str = "--at-step";
/// What the tracer exits with if the command ended before the step was reached and did not exit with a small number.
const UNREACHED_OTHERWISE: i32 = 199;
/// Added to the command's exit status if it ended before the step was reached.
const UNREACHED: i32 = 200;

/// What is done at the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// SIGKILL before the call is made.
    Kill,
    /// The call is not made and results in this errno.
    Fail(i32),
}

/// How a traced command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Before the step: it has fewer. The exit status.
    Unreached(i32),
    /// It was killed at the step.
    Killed,
    /// After the failed call: the exit status, or 128 and the signal.
    Exited(i32),
}

/// The command that runs `command` up to its step `n` (from 1).
pub fn command(at: At, n: u64, command: &Command) -> Result<Command, String> {
    let me = std::env::current_exe().map_err(|e| e.to_string())?;
    let what = match at {
        At::Kill => "kill".to_owned(),
        At::Fail(errno) => errno.to_string(),
    };
    let mut traced = Command::new(me);
    traced.args([ROLE, &what, &n.to_string()]);
    traced.arg(command.get_program()).args(command.get_args());
    Ok(traced)
}

/// What the wait status of [`command`] says.
pub fn end(status: i32) -> Result<End, String> {
    if !libc::WIFEXITED(status) {
        return Err(format!("the tracer ended with wait status {status:#x}"));
    }
    match libc::WEXITSTATUS(status) {
        137 => Ok(End::Killed),
        status @ UNREACHED.. => Ok(End::Unreached(status - UNREACHED)),
        UNREACHED_OTHERWISE => Err("the command ended by itself, not with a status".into()),
        status => Ok(End::Exited(status)),
    }
}

/// The tracer's whole life; returns its exit status.
pub fn main(args: &[OsString]) -> i32 {
    let parsed = (|| {
        let [what, n, program, rest @ ..] = args else { return None };
        let at = match what.to_str()? {
            "kill" => At::Kill,
            errno => At::Fail(errno.parse().ok()?),
        };
        Some((at, n.to_str()?.parse().ok()?, program, rest))
    })();
    let Some((at, n, program, rest)) = parsed else {
        eprintln!("usage: {ROLE} kill|ERRNO N COMMAND…");
        return 98;
    };
    match start(Path::new(program), rest).and_then(|child| trace(child.id() as i32, at, n)) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("tracing: {e}");
            98
        }
    }
}

fn start(program: &Path, args: &[OsString]) -> Result<Child, String> {
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: ptrace with integers is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0usize, 0usize) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    command.spawn().map_err(|e| format!("{}: {e}", program.display()))
}

/// Calls whose failure the world does not bring about, or of which no program survives it (the allocator's, those of
/// threads among themselves).
fn never_fails(regs: &libc::user_regs_struct) -> bool {
    let anonymous = regs.r10 & libc::MAP_ANONYMOUS as u64 != 0;
    match regs.orig_rax as i64 {
        libc::SYS_mmap => anonymous,
        // One's own limits can always be read.
        libc::SYS_prlimit64 => regs.rdx == 0,
        libc::SYS_munmap
        | libc::SYS_mprotect
        | libc::SYS_mremap
        | libc::SYS_madvise
        | libc::SYS_brk
        | libc::SYS_futex
        | libc::SYS_exit
        | libc::SYS_exit_group
        | libc::SYS_sched_yield
        | libc::SYS_nanosleep
        | libc::SYS_clock_nanosleep
        | libc::SYS_restart_syscall
        // To a process that one traces a signal can always be sent.
        | libc::SYS_kill
        | libc::SYS_rt_sigprocmask
        | libc::SYS_rt_sigaction
        | libc::SYS_sigaltstack
        | libc::SYS_set_robust_list
        | libc::SYS_rseq
        | libc::SYS_close
        | libc::SYS_getpid
        | libc::SYS_gettid
        | libc::SYS_getppid
        | libc::SYS_getuid
        | libc::SYS_geteuid
        | libc::SYS_getgid
        | libc::SYS_getegid
        | libc::SYS_clock_gettime
        | libc::SYS_getrandom => true,
        _ => false,
    }
}

fn request(what: u32, tid: i32, address: usize, data: usize) -> Result<(), String> {
    // SAFETY: only requests whose data is an integer, or a pointer that the callers below keep alive.
    match unsafe { libc::ptrace(what, tid, address, data) } {
        -1 => Err(format!("ptrace {what} of {tid}: {}", std::io::Error::last_os_error())),
        _ => Ok(()),
    }
}

/// Runs the stopped `pid` and its threads to the `n`-th system call after the runtime has started.
fn trace(pid: i32, at: At, n: u64) -> Result<i32, String> {
    let mut first = true;
    let mut counting = false;
    let mut step = 0;
    // Who is inside a call, and whose call is to fail on its way out.
    let mut inside = std::collections::HashSet::new();
    let mut failing = None;
    let mut reached = false;
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writing.
        let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL) };
        if tid < 0 {
            return Err(format!("waitpid: {}", std::io::Error::last_os_error()));
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if tid != pid {
                continue;
            }
            let exited = libc::WIFEXITED(status);
            return Ok(match (reached, exited) {
                (true, true) => libc::WEXITSTATUS(status),
                (true, false) => 128 + libc::WTERMSIG(status),
                (false, true) => (UNREACHED + libc::WEXITSTATUS(status)).min(255),
                (false, false) => UNREACHED_OTHERWISE,
            });
        }
        if first {
            first = false;
            let options =
                libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize)?;
            request(libc::PTRACE_SYSCALL, tid, 0, 0)?;
            continue;
        }
        let mut deliver = 0;
        match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => {
                // SAFETY: plain integers, written by the kernel.
                let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
                request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
                if inside.insert(tid) {
                    if counting && !(at != At::Kill && never_fails(&regs)) {
                        step += 1;
                        if step == n {
                            reached = true;
                            match at {
                                At::Kill => {
                                    // SAFETY: integers.
                                    unsafe { libc::kill(pid, libc::SIGKILL) };
                                    continue;
                                }
                                At::Fail(_) => {
                                    eprintln!("[step {n}: system call {} fails]", regs.orig_rax);
                                    failing = Some(tid);
                                    regs.orig_rax = u64::MAX;
                                    request(libc::PTRACE_SETREGS, tid, 0, &raw mut regs as usize)?;
                                }
                            }
                        }
                    }
                    // The last thing the language's runtime does before `main`.
                    counting |= regs.orig_rax as i64 == libc::SYS_sigaltstack;
                } else {
                    inside.remove(&tid);
                    if failing == Some(tid)
                        && let At::Fail(errno) = at
                    {
                        failing = None;
                        regs.rax = -i64::from(errno) as u64;
                        request(libc::PTRACE_SETREGS, tid, 0, &raw mut regs as usize)?;
                    }
                }
            }
            // A new thread, or the event in the one that made it.
            libc::SIGTRAP | libc::SIGSTOP => {}
            signal => deliver = signal as usize,
        }
        // It may have been killed meanwhile.
        let _ = request(libc::PTRACE_SYSCALL, tid, 0, deliver);
    }
}
