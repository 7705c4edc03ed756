//! Kernel state: children stopped by job control signals. They stay stopped across a checkpoint, and go on by SIGCONT
//! and only by it, also after `resume` of a tree that the checkpoint itself had left stopped.
#![allow(unsafe_code, reason = "kill and wait through the C library")]

use zoo::{check, ensure, ensure_eq, wait_state};

fn main() {
    zoo::run(|z| {
        let mut children = Vec::new();
        let third = z.param("ZOO_SIGNAL", libc::SIGSTOP as usize) as i32;
        for (i, signal) in [libc::SIGSTOP, libc::SIGTSTP, third].into_iter().enumerate() {
            let child = z.fork(|z| {
                // A group of its own: stops of an orphaned group by anything but SIGSTOP are ignored.
                check(unsafe { libc::setpgid(0, 0) }, "setpgid")?;
                z.publish(&format!("up.{i}"), "");
                loop {
                    zoo::nap(1);
                    z.publish(&format!("beat.{i}"), &zoo::now().to_string());
                    if z.path("end").exists() {
                        return Ok(());
                    }
                }
            })?;
            z.wait_for(&format!("up.{i}"))?;
            // SAFETY: our own child.
            check(unsafe { libc::kill(child, signal) }, "kill")?;
            wait_state(child, 'T')?;
            let status = zoo::wait4(child, libc::WUNTRACED)?;
            ensure!(
                libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == signal,
                "stop status {status:#x}"
            );
            children.push(child);
        }
        let beat =
            |i: usize| std::fs::read_to_string(z.path(&format!("beat.{i}"))).unwrap_or_default();
        let before: Vec<String> = (0..children.len()).map(beat).collect();
        z.ready()?;
        z.wait_for_check();
        for (i, &child) in children.iter().enumerate() {
            ensure_eq!(zoo::state_of(child), Some('T'), "state of child {i}");
            ensure_eq!(beat(i), before[i], "child {i} ran meanwhile: its beat");
        }
        z.publish("end", "");
        zoo::nap(20);
        for (i, &child) in children.iter().enumerate() {
            ensure_eq!(zoo::state_of(child), Some('T'), "state of child {i} before SIGCONT");
            // SAFETY: our own child.
            check(unsafe { libc::kill(child, libc::SIGCONT) }, "kill")?;
            z.join(child)?;
        }
        Ok(())
    })
}
