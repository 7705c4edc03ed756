//! More descriptions than this process may have open: a restore opens those of ordinary files, pipes and eventfds in
//! portions, and closes each when the last task has been sent it.
//!
//! It does so only where the limit of open files (getrlimit(2)) makes it: what is closed cannot be asked for any more.

use super::open::Opener;
use crate::Problem;
use rewake_image::messages::FileEntry;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::collections::{HashMap, HashSet};

/// What else is open: images, sockets of tasks, what sends itself.
const BESIDE: usize = 1024;

/// The state of a restore that opens in portions.
#[derive(Debug, Default)]
pub struct Portions {
    /// How often each file is still to be sent; absent: it stays open.
    uses: HashMap<u32, usize>,
    /// How many descriptions of a pipe are not closed yet, by its id.
    ends: HashMap<u32, usize>,
    closed: HashSet<u32>,
}

impl Portions {
    /// Was this file open, and is so no more?
    pub(super) fn is_closed(&self, id: u32) -> bool {
        self.closed.contains(&id)
    }
}

/// Is there nothing about a file that has to be done once all tasks have it?
fn is_done_when_sent(opener: &Opener<'_>, file: &FileEntry) -> bool {
    let plain =
        file.reg.is_some() || file.pipe.is_some() || file.efd.is_some() || file.sgfd.is_some();
    let owned = super::open::owner_of(file).is_some();
    plain && !owned && !opener.is_put_off(file.id) && !opener.is_remapped(file.id)
}

impl Opener<'_> {
    /// Opens in portions from now on, if not all files can be open at a time. `sent` are those that will be sent to tasks,
    /// as often as they will be; `kept` must stay open.
    pub fn open_in_portions(&mut self, sent: impl IntoIterator<Item = u32>, kept: &HashSet<u32>) {
        // A pipe has both of its ends besides.
        let pipes = self.files.values().filter(|f| f.pipe.is_some()).count();
        let wanted = self.files.len() + pipes + BESIDE;
        let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        if wanted as u64 <= limit {
            return;
        }
        log::debug!("{wanted} descriptors where {limit} may be open: files are opened in portions");
        let mut portions = Portions::default();
        for id in sent {
            *portions.uses.entry(id).or_default() += 1;
        }
        let watched: HashSet<u32> = self.extra.values().flat_map(|e| &e.watched).copied().collect();
        portions.uses.retain(|id, _| {
            !kept.contains(id)
                && !watched.contains(id)
                && self.files.get(id).is_some_and(|file| is_done_when_sent(self, file))
        });
        for pipe in self.files.values().filter_map(|f| f.pipe.as_ref()) {
            *portions.ends.entry(pipe.pipe_id).or_default() += 1;
        }
        self.portions = Some(portions);
    }

    /// A task has been sent a file: it is closed if nobody else will be.
    pub fn sent(&mut self, id: u32) {
        let Some(portions) = &mut self.portions else { return };
        let Some(left) = portions.uses.get_mut(&id) else { return };
        *left -= 1;
        if *left > 0 {
            return;
        }
        portions.uses.remove(&id);
        portions.closed.insert(id);
        let pipe = self.files.get(&id).and_then(|f| f.pipe.as_ref()).map(|p| p.pipe_id);
        if let Some(pipe) = pipe
            && let Some(ends) = portions.ends.get_mut(&pipe)
        {
            *ends -= 1;
            if *ends == 0 {
                self.pipes.remove(&pipe);
            }
        }
        self.close(id);
    }

    /// Adds the way out to a problem that this process can have no more files open.
    pub(super) fn explain(&self, problem: Problem) -> Problem {
        // Where there is room for one, that was not it.
        let one_more = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 0);
        if problem.remedy.is_some() || !one_more.is_err_and(|e| e == Errno::MFILE) {
            return problem;
        }
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        problem.remedy(format!(
            "this command may have {limit} files open: raise that (ulimit -Hn, LimitNOFILE= of a service)"
        ))
    }
}
