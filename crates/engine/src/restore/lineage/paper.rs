//! Plans carried out on paper: whether they lead to what they should.

use super::{Action, Lineage, Member, Role};
use std::collections::HashMap;

/// A process on paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: i32,
    pub(super) sid: i32,
    pub(super) pgid: i32,
    pub(super) reaper: bool,
    pub(super) zombie: bool,
    children: usize,
}

/// As much of a kernel as matters here.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    pub(super) processes: HashMap<i32, Process>,
    /// How many processes each session has, and each group; and in which session that is.
    sessions: HashMap<i32, usize>,
    groups: HashMap<i32, (usize, i32)>,
}

/// Whoever is outside the tree: the root's parent, and whose children orphans become in the end.
pub(super) const OUTSIDE: i32 = 0;

impl Kernel {
    /// One process, outside the tree, of the session and group `outside`.
    pub(super) fn new(outside: i32) -> Kernel {
        let process = Process {
            parent: OUTSIDE,
            sid: outside,
            pgid: outside,
            reaper: true,
            zombie: false,
            children: 0,
        };
        Kernel {
            processes: HashMap::from([(OUTSIDE, process)]),
            sessions: HashMap::from([(outside, 1)]),
            groups: HashMap::from([(outside, (1, outside))]),
        }
    }

    fn taken(&self, pid: i32) -> bool {
        self.processes.contains_key(&pid)
            || self.sessions.contains_key(&pid)
            || self.groups.contains_key(&pid)
    }

    fn enter(&mut self, pid: i32, sid: i32, pgid: i32) {
        *self.sessions.entry(sid).or_default() += 1;
        self.groups.entry(pgid).or_insert((0, sid)).0 += 1;
        if let Some(process) = self.processes.get_mut(&pid) {
            (process.sid, process.pgid) = (sid, pgid);
        }
    }

    fn leave(&mut self, process: Process) {
        if let Some(count) = self.sessions.get_mut(&process.sid) {
            *count -= 1;
            if *count == 0 {
                self.sessions.remove(&process.sid);
            }
        }
        if let Some((count, _)) = self.groups.get_mut(&process.pgid) {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(&process.pgid);
            }
        }
    }

    pub(super) fn fork(&mut self, by: i32, sibling: bool, pid: i32) -> Option<()> {
        let cloner = self.processes.get(&by).copied().filter(|p| !p.zombie)?;
        if self.taken(pid) {
            return None;
        }
        let parent = if sibling { cloner.parent } else { by };
        self.processes.get_mut(&parent)?.children += 1;
        let process = Process { parent, reaper: false, children: 0, ..cloner };
        self.processes.insert(pid, process);
        self.enter(pid, cloner.sid, cloner.pgid);
        Some(())
    }

    pub(super) fn setsid(&mut self, pid: i32) -> Option<()> {
        let process = self.processes.get(&pid).copied().filter(|p| !p.zombie)?;
        if self.groups.contains_key(&pid) {
            return None;
        }
        self.leave(process);
        self.enter(pid, pid, pid);
        Some(())
    }

    /// `by` puts `pid`, itself or a child, into a group.
    pub(super) fn setpgid(&mut self, by: i32, pid: i32, pgid: i32) -> Option<()> {
        let (caller, process) = (self.processes.get(&by)?, *self.processes.get(&pid)?);
        let own = by == pid || process.parent == by && process.sid == caller.sid;
        let there = self.groups.get(&pgid).is_some_and(|(_, sid)| *sid == process.sid);
        if caller.zombie || !own || process.sid == pid || !(pgid == pid || there) {
            return None;
        }
        // In this order, or the group might be gone in between.
        self.enter(pid, process.sid, pgid);
        self.leave(process);
        Some(())
    }

    pub(super) fn reaper(&mut self, pid: i32, on: bool) -> Option<()> {
        self.processes.get_mut(&pid)?.reaper = on;
        Some(())
    }

    pub(super) fn exit(&mut self, pid: i32) -> Option<()> {
        let process = self.processes.get(&pid).copied().filter(|p| !p.zombie)?;
        if process.children > 0 {
            let mut heir = process.parent;
            while !self.processes.get(&heir)?.reaper {
                heir = self.processes.get(&heir)?.parent;
            }
            for child in self.processes.values_mut().filter(|p| p.parent == pid) {
                child.parent = heir;
            }
            self.processes.get_mut(&heir)?.children += process.children;
        }
        let process = self.processes.get_mut(&pid)?;
        (process.zombie, process.children) = (true, 0);
        Some(())
    }

    pub(super) fn reap(&mut self, pid: i32) -> Option<()> {
        let process = self.processes.remove(&pid).filter(|p| p.zombie)?;
        self.leave(process);
        self.processes.get_mut(&process.parent)?.children -= 1;
        Some(())
    }
}

/// Does a plan bring `members` about, each with its parent, session and group?
pub(super) fn comes_out(members: &[Member], lineage: &Lineage) -> bool {
    let mut paper = Paper {
        // The group and session of whoever restores, which a job of theirs joins.
        kernel: Kernel::new(-1),
        members,
        lineage,
        pids: vec![OUTSIDE; lineage.nodes.len()],
    };
    let done = if lineage.sequence.is_empty() { paper.quickly() } else { paper.in_sequence() };
    let root = members.first().map_or(0, |m| m.pid);
    // What is led from outside comes out as whatever is there.
    let outside = |id: i32, of_root: i32| id == of_root && of_root != root;
    let (sid, pgid) = members.first().map_or((0, 0), |m| (m.sid, m.pgid));
    let helpers = lineage.nodes.iter().filter(|n| n.role == Role::Init).count();
    done.is_some()
        && paper.kernel.processes.len() == members.len() + 1 + helpers
        && members.iter().all(|m| {
            paper.kernel.processes.get(&m.pid).is_some_and(|p| {
                (p.parent == m.ppid || m.pid == root)
                    && (p.sid == m.sid || m.sid == 0 || outside(m.sid, sid) && p.sid < 2)
                    && (p.pgid == m.pgid || m.pgid == 0 || outside(m.pgid, pgid) && p.pgid < 2)
                    && p.zombie == m.zombie
            })
        })
}

struct Paper<'a> {
    kernel: Kernel,
    members: &'a [Member],
    lineage: &'a Lineage,
    pids: Vec<i32>,
}

impl Paper<'_> {
    /// The root is cloned from outside, others by a node.
    fn clone(&mut self, node: usize) -> Option<i32> {
        let n = &self.lineage.nodes[node];
        // Any number that nobody has.
        let pid = n.pid.unwrap_or(i32::MAX - node as i32);
        let cloner = n.cloner.map_or(OUTSIDE, |c| self.pids[c]);
        self.kernel.fork(cloner, n.sibling, pid)?;
        self.pids[node] = pid;
        Some(pid)
    }

    fn quick(&mut self, node: usize) -> Option<()> {
        let n = &self.lineage.nodes[node];
        let pid = self.clone(node)?;
        if n.subreaper {
            self.kernel.reaper(pid, true)?;
        }
        for child in &n.early {
            self.quick(*child)?;
        }
        if n.setsid {
            self.kernel.setsid(pid)?;
        }
        if n.own_group {
            self.kernel.setpgid(pid, pid, pid)?;
        }
        for child in &n.late {
            self.quick(*child)?;
        }
        match n.role {
            Role::Leader | Role::Orphaner => {
                self.kernel.exit(pid)?;
                self.kernel.reap(pid)
            }
            Role::Task(i) if self.members[i].zombie => self.kernel.exit(pid),
            _ => Some(()),
        }
    }

    fn quickly(&mut self) -> Option<()> {
        self.quick(0)?;
        for (parent, pid, group) in &self.lineage.joined {
            self.kernel.setpgid(self.members[*parent].pid, *pid, *group)?;
        }
        for (i, group) in &self.lineage.joins {
            let pid = self.members[*i].pid;
            self.kernel.setpgid(pid, pid, *group)?;
        }
        for (node, n) in self.lineage.nodes.iter().enumerate() {
            if n.role == Role::Group {
                self.kernel.exit(self.pids[node])?;
                self.kernel.reap(self.pids[node])?;
            }
        }
        Some(())
    }

    fn in_sequence(&mut self) -> Option<()> {
        self.clone(0)?;
        // Whoever exited last, to be reaped next.
        let mut ended = OUTSIDE;
        for (node, action) in &self.lineage.sequence {
            let pid = self.pids[*node];
            match *action {
                Action::Clone(child) => {
                    self.clone(child)?;
                }
                Action::Session => self.kernel.setsid(pid)?,
                Action::Group => self.kernel.setpgid(pid, pid, pid)?,
                Action::Join(0) => {
                    let group = self.kernel.processes.get(&OUTSIDE)?.pgid;
                    self.kernel.setpgid(pid, pid, group)?;
                }
                Action::Join(group) => self.kernel.setpgid(pid, pid, group)?,
                Action::Reaper(on) => self.kernel.reaper(pid, on)?,
                Action::Fall => {
                    ended = self.pids[self.lineage.nodes[*node].cloner?];
                    self.kernel.exit(ended)?;
                }
                Action::Exit => {
                    self.kernel.exit(pid)?;
                    ended = pid;
                }
                Action::Reap => {
                    self.kernel.processes.get(&ended).filter(|p| p.parent == pid)?;
                    self.kernel.reap(ended)?;
                }
                Action::Die => self.kernel.exit(pid)?,
                Action::Await(child) => {
                    let child = self.kernel.processes.get(&child)?;
                    (child.zombie && child.parent == pid).then_some(())?;
                }
            }
        }
        Some(())
    }
}
