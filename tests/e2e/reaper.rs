//! Children: the harness is the subreaper of everything it starts, and reaps at once.
//!
//! A dumped tree's processes, a restored root (whose real parent, the restoring command, exits) and the commands
//! themselves all end up as children of this process. One thread waits for any of them, so that no zombie keeps a pid
//! taken; whoever waits for a particular command asks here.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct Reaped {
    count: u64,
    by_pid: HashMap<i32, (u64, i32)>,
}

static REAPED: OnceLock<(Mutex<Reaped>, Condvar)> = OnceLock::new();

fn table() -> &'static (Mutex<Reaped>, Condvar) {
    REAPED.get_or_init(Default::default)
}

/// Makes this process the subreaper and starts the reaping thread. To be called once, before anything is started.
pub fn start() -> Result<(), String> {
    // SAFETY: takes an integer, changes only this process's attribute.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
        return Err(format!("PR_SET_CHILD_SUBREAPER: {}", std::io::Error::last_os_error()));
    }
    std::thread::spawn(|| {
        loop {
            // SAFETY: zeroed is a valid siginfo, then written by the kernel.
            let ended = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let options = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
                if libc::waitid(libc::P_ALL, 0, &mut info, options) == 0 {
                    info.si_pid()
                } else {
                    0
                }
            };
            if ended <= 0 {
                // ECHILD: nothing to wait for just now.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            // The pid is let go under the lock: whoever finds it free in /proc and then takes a mark is after this exit.
            let (lock, wake) = table();
            let mut reaped = lock.lock().unwrap_or_else(|e| e.into_inner());
            let mut status = 0;
            // SAFETY: `status` is valid for writing.
            let pid = unsafe { libc::waitpid(ended, &mut status, libc::__WALL) };
            if pid != ended {
                continue;
            }
            reaped.count += 1;
            let count = reaped.count;
            reaped.by_pid.insert(pid, (count, status));
            wake.notify_all();
        }
    });
    Ok(())
}

/// A point in time: exits before it belong to an earlier user of a pid.
#[derive(Clone, Copy, Debug)]
pub struct Mark(u64);

/// Now, to be taken before a process is started or restored.
pub fn mark() -> Mark {
    Mark(table().0.lock().unwrap_or_else(|e| e.into_inner()).count)
}

/// Waits for the raw wait status of a child that was started after `since`.
pub fn wait(pid: i32, since: Mark, timeout: Duration) -> Option<i32> {
    let until = Instant::now() + timeout;
    let (lock, wake) = table();
    let mut reaped = lock.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        if let Some(&(count, status)) = reaped.by_pid.get(&pid)
            && count > since.0
        {
            return Some(status);
        }
        let left = until.checked_duration_since(Instant::now())?;
        reaped = wake.wait_timeout(reaped, left).map_or_else(|e| e.into_inner().0, |(g, _)| g);
    }
}

/// A wait status in words.
pub fn describe(status: i32) -> String {
    if libc::WIFEXITED(status) {
        format!("exit status {}", libc::WEXITSTATUS(status))
    } else {
        format!("killed by signal {}", libc::WTERMSIG(status))
    }
}
