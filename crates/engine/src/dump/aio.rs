//! Requests of asynchronous I/O (io_submit(2)) that are in flight write into memory while it is copied. The kernel tells
//! nobody whether there are any: only that one has ended, by the ring.

use super::survey::Surveyed;
use crate::error::{Error, Result};
use rewake_objects::memory::aio::Ring;
use std::fs::File;
use std::time::{Duration, Instant};

/// Two looks at a ring in which nothing happened are as far apart.
const CALM: Duration = Duration::from_millis(5);
/// How long requests are waited for without `--timeout`.
const PATIENCE: Duration = Duration::from_secs(10);

/// Contexts that have been used, with the tasks' memory.
fn used(surveyed: &mut Surveyed) -> impl Iterator<Item = (i32, &[u8], &File, &mut Ring)> {
    surveyed.tasks.iter_mut().flat_map(|task| {
        let (pid, comm) = (task.pid, &task.comm[..]);
        let outside = task.alive.as_mut().map(|alive| &mut alive.outside);
        outside.into_iter().flat_map(move |outside| {
            let memory: &File = &outside.memory;
            outside.aio.iter_mut().map(move |ring| (pid, comm, memory, ring))
        })
    })
}

/// Waits until no request ends any more. The tree is frozen and makes no new ones.
///
/// # Errors
/// They do not come to an end.
pub(super) fn wait(surveyed: &mut Surveyed, timeout: Option<Duration>) -> Result<()> {
    if used(surveyed).next().is_none() {
        return Ok(());
    }
    let until = Instant::now() + timeout.unwrap_or(PATIENCE);
    loop {
        std::thread::sleep(CALM);
        let moving = check(surveyed);
        if moving.is_ok() || Instant::now() > until {
            return moving;
        }
    }
}

/// Has no request ended since the last look?
///
/// # Errors
/// One has: what was copied meanwhile may be of two times.
pub(super) fn check(surveyed: &mut Surveyed) -> Result<()> {
    let mut first = None;
    for (pid, comm, memory, ring) in used(surveyed) {
        if ring.has_moved(memory) {
            first.get_or_insert_with(|| Error::of(pid, comm, ring.busy()));
        }
    }
    first.map_or(Ok(()), Err)
}
