//! Kernel state: a process that traces another one by ptrace(2): a child; with ZOO_KIND=thread a thread of that which is not its first;
//! with ZOO_KIND=clone what the child makes while it is traced (CLONE_PTRACE), and not the child any more.
#![allow(unsafe_code, reason = "raw ptrace, clone and wait")]

use zoo::{Check, Zoo, check, ensure, ensure_eq};

fn ptrace(request: u32, tid: i32, what: &str) -> Check {
    // SAFETY: a request without pointers, of a thread of our own tree.
    check(unsafe { libc::ptrace(request, tid, 0usize, 0usize) } as i32, what)
}

/// Stops a tracee.
fn interrupt(tid: i32) -> Check {
    ptrace(libc::PTRACE_INTERRUPT, tid, "PTRACE_INTERRUPT")?;
    let status = zoo::wait4(tid, libc::__WALL)?;
    ensure!(libc::WIFSTOPPED(status), "a tracee does not stop but: {status:#x}");
    ensure_eq!(status >> 16, libc::PTRACE_EVENT_STOP, "stop of a tracee");
    Ok(())
}

/// What a tracee does: it tells who it is, and waits.
fn traced(z: &Zoo) -> Check {
    z.publish("tracee", &zoo::pid().to_string());
    z.publish("thread", &zoo::tid().to_string());
    z.wait_for("detached")
}

/// A child of this process that is traced as it is itself.
fn clone_traced(z: &Zoo) -> Check {
    z.wait_for("seized")?;
    let flags = (libc::CLONE_PTRACE | libc::SIGCHLD) as u64;
    // SAFETY: no stack of its own: as fork(2).
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match zoo::ok(child, "clone")? {
        0 => {
            if let Err(text) = traced(z) {
                z.complain(&text);
            }
            zoo::exit_now(0)
        }
        child => {
            z.wait_for("detached")?;
            z.join(child as i32)
        }
    }
}

fn number(z: &Zoo, name: &str) -> Result<i32, String> {
    let text = std::fs::read_to_string(z.path(name)).map_err(|e| format!("{name}: {e}"))?;
    text.parse().map_err(|e| format!("{name}: {e}"))
}

fn main() {
    zoo::run(|z| {
        let kind = std::env::var("ZOO_KIND").unwrap_or_default();
        let of = kind.clone();
        let child = z.fork(move |z| match &of[..] {
            "clone" => clone_traced(z),
            "thread" => std::thread::scope(|scope| {
                let thread = scope.spawn(|| traced(z));
                thread.join().map_err(|_| "panicked".to_owned())?
            }),
            _ => traced(z),
        })?;
        if kind == "clone" {
            ptrace(libc::PTRACE_SEIZE, child, "PTRACE_SEIZE")?;
            z.publish("seized", "");
            // The new one stands in a stop at first.
            let new = loop {
                let mut status = 0;
                // SAFETY: the status is a local.
                let got = unsafe { libc::waitpid(-1, &mut status, libc::__WALL) };
                if got != child {
                    break zoo::ok(i64::from(got), "waitpid")? as i32;
                }
            };
            ptrace(libc::PTRACE_CONT, new, "PTRACE_CONT")?;
            interrupt(child)?;
            ptrace(libc::PTRACE_DETACH, child, "PTRACE_DETACH")?;
        }
        z.wait_for("thread")?;
        let tid = number(z, "thread")?;
        if kind != "clone" {
            ptrace(libc::PTRACE_SEIZE, tid, "PTRACE_SEIZE")?;
        }
        z.ready()?;
        z.wait_for_check();
        let tracer = zoo::status_of(&format!("/proc/{tid}/status"), "TracerPid")?;
        ensure_eq!(tracer, zoo::pid().to_string(), "tracer");
        interrupt(tid)?;
        ptrace(libc::PTRACE_DETACH, tid, "PTRACE_DETACH")?;
        z.publish("detached", "");
        z.join(child)
    })
}
