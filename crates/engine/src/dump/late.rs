//! What is looked at only when the memory of a tree that is going to die is written: it cannot be put back.

use super::survey::{Surveyed, TaskSurvey};
use crate::error::{Error, Result};
use rewake_objects::files::collect::Contents;
use rewake_objects::{Obstacle, Problem, sockets};

/// How many page stores are kept free for shared memory that is found then.
pub const ROOM: u32 = 1 << 16;

/// Problems with the names of the processes that have them.
pub(super) fn named(problems: Vec<(i32, Problem)>, tasks: &[TaskSurvey]) -> Vec<Obstacle> {
    let name = |(pid, problem): (i32, Problem)| {
        let comm = tasks.iter().find(|t| t.pid == pid).map_or(&b""[..], |t| &t.comm);
        problem.of(pid, comm)
    };
    problems.into_iter().map(name).collect()
}

/// Takes unix connections that have sent something before they were accepted, and collects what is in flight there.
///
/// # Errors
/// One cannot be saved. The tree runs on, but these connections end.
pub(super) fn take(surveyed: &mut Surveyed) -> Result<()> {
    let files = &mut surveyed.files;
    let mut problems = sockets::take_unix_waiting(files);
    problems.extend(files.descriptors_in_flight());
    problems.extend(files.unix_peers());
    problems.extend(files.terminal_queues());
    problems.extend(files.deleted_watches());
    let segments = files.contents.iter().filter(|c| matches!(c, Contents::Shared(_))).count();
    if segments + files.sysv.len() > surveyed.segments as usize {
        return Err(Error::new("there is more shared memory in flight than page stores for it"));
    }
    if problems.is_empty() {
        return Ok(());
    }
    log::warn!("unix connections that had sent something before they were accepted have ended");
    Err(Error::refused(named(problems, &surveyed.tasks)))
}
