//! Ends a command that hangs, without touching how it is waited for: the wait is part of what is measured.

use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

static WATCHED: Mutex<Option<(u32, Instant)>> = Mutex::new(None);

/// The command is ended at its deadline unless this is dropped before.
#[derive(Debug)]
pub struct Limit(());

/// Starts the thread that looks after commands.
pub fn start() {
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_secs(1));
            // Not reaped yet, or within this very instant: nobody else has the pid.
            let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((pid, _)) = watched.take_if(|(_, deadline)| Instant::now() >= *deadline) {
                // SAFETY: kill takes numbers; pids are small.
                unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            }
        }
    });
}

/// Gives a command that long.
pub fn limit(child: &Child, patience: Duration) -> Limit {
    *WATCHED.lock().unwrap_or_else(PoisonError::into_inner) =
        Some((child.id(), Instant::now() + patience));
    Limit(())
}

impl Drop for Limit {
    fn drop(&mut self) {
        *WATCHED.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
