//! Tasks that share kernel objects without being threads of one process.
//!
//! What is shared is surveyed and written once: by the *owner*, the first of the tree that has it.

use crate::error::{Error, Result};
use crate::freeze::Task;
use crate::report::Obstacle;
use rewake_objects::Problem;
use rewake_objects::problem::text;
use rewake_objects::task::sharing::{self, KINDS, Objects, name};
use rewake_proc::read::ProcDir;
use rewake_sys::kcmp;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which of its kernel objects a task is the owner of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owns {
    /// The address space.
    pub vm: bool,
    /// The table of descriptors.
    pub files: bool,
    /// Working directory, root, umask.
    pub fs: bool,
}

/// Who shares what.
#[derive(Debug, Default)]
pub struct Sharing {
    /// The owners of each task's objects, as indices.
    owners: Vec<Objects>,
    index: HashMap<i32, usize>,
    /// By task: whose turn it is to have an agent, among those that share memory or descriptors.
    turns: Vec<Option<Arc<Mutex<()>>>>,
}

impl Sharing {
    /// Compares the tasks of a tree.
    ///
    /// # Errors
    /// They cannot be compared.
    pub fn survey(tasks: &[Arc<Task>]) -> Result<Sharing> {
        let alive = |t: &Arc<Task>| (!t.tids.is_empty()).then(|| t.tid());
        let pids: Vec<Option<i32>> = tasks.iter().map(alive).collect();
        let owners = sharing::survey(&pids).map_err(|p| Error::new(p.to_string()))?;
        let index = tasks.iter().enumerate().map(|(i, t)| (t.pid(), i)).collect();
        let turns = turns(&owners);
        Ok(Sharing { owners, index, turns })
    }

    /// The owners of what the task at this index has.
    pub fn owners(&self, at: usize) -> Objects {
        self.owners.get(at).copied().unwrap_or_default()
    }

    /// What a task is the owner of.
    pub fn owns(&self, pid: i32) -> Owns {
        let Some(at) = self.index.get(&pid) else {
            return Owns { vm: true, files: true, fs: true };
        };
        let owners = self.owners(*at);
        let own = |owner: u32| owner as usize == *at;
        Owns { vm: own(owners.vm), files: own(owners.files), fs: own(owners.fs) }
    }

    /// Must the agent of a task be alone among those it shares memory or descriptors with?
    pub fn takes_turns(&self, pid: i32) -> bool {
        self.turn(pid).is_some()
    }

    /// Waits for a task's turn: nobody looks at what another's agent has in the memory and descriptors of both, and the
    /// agents' entries are in the same place. A tracer thread has one turn at a time.
    pub fn wait_for_turn(&self, pid: i32) -> Option<MutexGuard<'_, ()>> {
        self.turn(pid).map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn turn(&self, pid: i32) -> Option<&Mutex<()>> {
        self.turns.get(*self.index.get(&pid)?)?.as_deref()
    }
}

/// What the root of a tree shares with its parent, which is not in the tree.
pub fn with_parent(root: &Task) -> Option<Obstacle> {
    let (pid, parent) = (root.pid(), root.stat.ppid);
    let same =
        |kind: &kcmp::Kind| kcmp::compare(root.tid(), parent, *kind).is_ok_and(|o| o.is_eq());
    let kind = KINDS.into_iter().find(|kind| parent > 0 && same(kind))?;
    let comm = ProcDir::open(parent).and_then(|dir| dir.stat(&mut Vec::new())).map(|s| s.comm);
    let reason = format!(
        "it is shared with process {parent} ({}), which is outside the tree (vfork or clone)",
        text(&comm.unwrap_or_default())
    );
    let problem = Problem::new(name(kind), reason);
    Some(problem.remedy(format!("save the tree of process {parent}")).of(pid, root.comm()))
}

/// One lock for all that share memory or descriptors, be it through others; none for who does not.
fn turns(owners: &[Objects]) -> Vec<Option<Arc<Mutex<()>>>> {
    let roots = sharing::connected(owners);
    let mut size: HashMap<usize, usize> = HashMap::new();
    roots.iter().for_each(|r| *size.entry(*r).or_default() += 1);
    let mut locks: HashMap<usize, Arc<Mutex<()>>> = HashMap::new();
    let lock = |r: &usize| (size[r] > 1).then(|| locks.entry(*r).or_default().clone());
    roots.iter().map(lock).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_connected_through_others_have_one_lock() {
        let own = |vm, files, fs| Objects { vm, files, fs, sighand: 0 };
        // 0 and 2 share memory, 2 and 3 descriptors; 1 and 4 nothing but a working directory.
        let owners = [own(0, 0, 0), own(1, 1, 1), own(0, 2, 2), own(3, 2, 3), own(4, 4, 1)];
        let turns = turns(&owners);
        let some: Vec<bool> = turns.iter().map(Option::is_some).collect();
        assert_eq!(some, [true, false, true, true, false]);
        let first = turns[0].as_ref().expect("a lock");
        for at in [2, 3] {
            assert!(Arc::ptr_eq(first, turns[at].as_ref().expect("a lock")));
        }
    }
}
