//! Who clones whom, so that parents, sessions and process groups come out as they were. Pure: works on numbers only.
//!
//! A session is made only by its leader, and inherited; so each task must be cloned by someone who is in its session at
//! that moment, and must end up as a child of its parent. The ways, in order of preference:
//! 1. the parent clones it, after (or before) the parent's own setsid(2);
//! 2. the session's leader clones it with `CLONE_PARENT`, if they have the same parent;
//! 3. the leader clones a helper that clones it and exits: the kernel gives the orphan to the nearest subreaper;
//! 4. the leader is gone: a helper with the leader's pid makes the session, clones with `CLONE_PARENT`, and exits.
//!
//! A group whose leader is gone is led by a helper until all members have joined.
//!
//! What processes share (memory, descriptors…) can only be inherited too: [`super::sharing`]. So a task is cloned by one that
//! it shares something with, if its parent is not one of them.
//!
//! Trees that this does not explain are made one step after the other, by a longer way ([`creation`]).

mod creation;
#[cfg(test)]
mod history;
mod paper;

use super::sharing;
use crate::error::{Error, Result};
use rewake_objects::task::sharing::Objects;
use rewake_sys::kcmp::Kind;
use std::collections::{HashMap, HashSet};

/// What lineage needs to know of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Process id.
    pub pid: i32,
    /// Parent, 0 for the root.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// A zombie dies as soon as it is born.
    pub zombie: bool,
    /// Its kernel objects: those with the same number are shared.
    pub objects: Objects,
}

impl Member {
    /// Does it share its object of this kind with another?
    #[must_use]
    pub fn shares(&self, kind: Kind, other: &Member) -> bool {
        !self.zombie && !other.zombie && self.objects.get(kind) == other.objects.get(kind)
    }
}

/// What a node of the plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The task with this index.
    Task(usize),
    /// The init of the tree's own PID namespace: the root's parent, and whose children orphans become.
    Init,
    /// Stands in for a session leader that is gone; exits when it has cloned its members.
    Leader,
    /// Clones one orphan and exits.
    Orphaner,
    /// Stands in for a group leader that is gone; exits when all members have joined.
    Group,
}

/// One process that the restore creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub role: Role,
    /// Its pid, if it matters.
    pub pid: Option<i32>,
    /// The node that clones it; `None` for the root, which the controller clones.
    pub cloner: Option<usize>,
    /// With `CLONE_PARENT`: it becomes a sibling of its cloner.
    pub sibling: bool,
    /// Its parent exits at once: a parent-death signal would kill it.
    pub orphan: bool,
    /// It makes a session.
    pub setsid: bool,
    /// It makes a process group.
    pub own_group: bool,
    /// It must be a subreaper before others are cloned.
    pub subreaper: bool,
    /// Nodes it clones before setsid(2).
    pub early: Vec<usize>,
    /// Nodes it clones afterwards.
    pub late: Vec<usize>,
    /// `CLONE_VM`, `CLONE_FILES`…: what it shares with its cloner.
    pub share: u64,
    /// What it gets a copy of for itself when it has cloned all others.
    pub part: u64,
    /// Its table of descriptors may have something in it when it is born.
    pub clean: bool,
}

/// A step on the longer way ([`Lineage::sequence`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Clones this node.
    Clone(usize),
    /// Makes a session.
    Session,
    /// Makes a process group.
    Group,
    /// Joins this process group; 0: that of whoever restores, in which the root was born.
    Join(i32),
    /// Becomes a subreaper, or ceases to be one.
    Reaper(bool),
    /// Ends the helper that cloned it, and falls to its parent.
    Fall,
    /// A helper exits.
    Exit,
    /// Reaps a helper that it cloned.
    Reap,
    /// A zombie dies as it died.
    Die,
    /// Waits until this child is a zombie.
    Await(i32),
}

/// The whole plan; node 0 is the root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lineage {
    /// Processes to create, cloners before those they clone.
    pub nodes: Vec<Node>,
    /// Tasks (by index) that join a group once all exist, and the group.
    pub joins: Vec<(usize, i32)>,
    /// Zombies that their parent (a task, by index) puts into a group then: the zombie's pid, and the group.
    pub joined: Vec<(usize, i32, i32)>,
    /// The longer way: who does what, one after the other, instead of what the nodes and the fields above say. Empty where
    /// the quick way will do.
    pub sequence: Vec<(usize, Action)>,
}

impl Node {
    fn new(role: Role, pid: Option<i32>) -> Node {
        Node {
            role,
            pid,
            cloner: None,
            sibling: false,
            orphan: false,
            setsid: false,
            own_group: false,
            subreaper: false,
            early: Vec::new(),
            late: Vec::new(),
            share: 0,
            part: 0,
            clean: false,
        }
    }
}

impl Lineage {
    /// Plans the creation of `members`, the root first, parents before children; with `init` below an init of their own.
    ///
    /// # Errors
    /// A session cannot be made again; or the root is not a session's leader and `shell_job` is not given.
    pub fn plan(members: &[Member], shell_job: bool, init: bool) -> Result<Lineage> {
        let quick = Planner::new(members)?;
        quick.refuse_foreign_root(shell_job)?;
        let shares = quick.sharers.values().any(|n| *n > 1);
        let quick = quick.plan(init);
        if let Ok(plan) = quick.as_ref()
            && paper::comes_out(members, plan)
        {
            return quick;
        }
        // The longer way knows nothing of what is shared.
        if shares {
            return Err(quick.err().unwrap_or_else(|| {
                Error::new("no way is found to make sessions and process groups as they are, of processes that share memory, descriptors or directories")
            }));
        }
        let longer = creation::explain(members, init).filter(|p| paper::comes_out(members, p));
        longer.ok_or_else(|| {
            quick.err().unwrap_or_else(|| {
                Error::new("no way is found to make sessions and process groups as they are")
            })
        })
    }

    /// Gives helpers whose number does not matter one that is not in use.
    pub fn number_helpers(&mut self, used: &HashSet<i32>) {
        /// The kernel itself goes back to here when it has given all numbers.
        const FIRST: i32 = 300;
        let mut unused = (FIRST..).filter(|n| !used.contains(n));
        for node in self.nodes.iter_mut().filter(|n| n.pid.is_none()) {
            node.pid = unused.next();
        }
    }

    /// The node of the tree's root: the first, or the one after its init.
    #[must_use]
    pub fn root(&self) -> usize {
        self.nodes.iter().position(|n| n.role == Role::Task(0)).unwrap_or(0)
    }
}

/// The number of a session, if it could be seen from the PID namespace in which the tree was saved.
fn seen(session: i32) -> Option<i32> {
    Some(session).filter(|s| *s != 0)
}

struct Planner<'a> {
    members: &'a [Member],
    index: HashMap<i32, usize>,
    /// Session a task is born in, where it matters because it clones before its own setsid.
    born: Vec<Option<i32>>,
    lineage: Lineage,
    node_of: Vec<usize>,
    leaders: HashMap<i32, usize>,
    /// How many have an object, by its kind and number.
    sharers: HashMap<(usize, u32), usize>,
}

/// What a task is cloned for by another than its parent, what binds most first.
const TIES: [Kind; 3] = [Kind::Vm, Kind::Files, Kind::Fs];

impl<'a> Planner<'a> {
    fn new(members: &'a [Member]) -> Result<Planner<'a>> {
        if members.is_empty() {
            return Err(Error::new("there is no task to create"));
        }
        let index = members.iter().enumerate().map(|(i, m)| (m.pid, i)).collect();
        let mut sharers = HashMap::new();
        for member in members.iter().filter(|m| !m.zombie) {
            for (n, kind) in TIES.into_iter().enumerate() {
                *sharers.entry((n, member.objects.get(kind))).or_default() += 1;
            }
        }
        Ok(Planner {
            members,
            index,
            born: vec![None; members.len()],
            lineage: Lineage::default(),
            node_of: vec![usize::MAX; members.len()],
            leaders: HashMap::new(),
            sharers,
        })
    }

    fn refuse_foreign_root(&self, shell_job: bool) -> Result<()> {
        let root = self.members[0];
        if root.sid != root.pid && !shell_job {
            return Err(Error::new(format!(
                "the root {} of the images belongs to session {}, which was led from outside the tree",
                root.pid, root.sid
            ))
            .hint("use --shell-job: the tree then joins the session of this command"));
        }
        Ok(())
    }

    fn plan(mut self, init: bool) -> Result<Lineage> {
        let root = self.members[0];
        if init {
            // The root of a job stays in the session of this command, so its init may not leave it either.
            let setsid = root.sid == root.pid;
            let helper = Self::helper(Role::Init, Some(1), None);
            self.lineage.nodes.push(Node { setsid, ..helper });
        }
        self.births();
        for i in 0..self.members.len() {
            self.place(i)?;
        }
        self.groups();
        sharing::plan(self.members, &mut self.lineage.nodes)?;
        Ok(self.lineage)
    }

    fn parent(&self, i: usize) -> Option<usize> {
        self.index.get(&self.members[i].ppid).copied().filter(|_| i != 0)
    }

    /// A leader with children of another session was born into that session, if its own parent can be there.
    fn births(&mut self) {
        // Children come after parents, so a child's need is known before its parent is looked at.
        for i in (1..self.members.len()).rev() {
            let Some(parent) = self.parent(i) else { continue };
            let (member, p) = (self.members[i], self.members[parent]);
            let need = if member.sid == member.pid { self.born[i] } else { Some(member.sid) };
            let Some(need) = need.filter(|s| *s != p.sid) else { continue };
            let can = parent != 0
                && p.sid == p.pid
                && self.born[parent].is_none_or(|b| b == need)
                && self.could_be_in(parent, need);
            if can {
                self.born[parent] = Some(need);
            }
        }
    }

    /// Can the parent of `i` have been in session `sid` when it cloned `i`?
    fn could_be_in(&self, i: usize, sid: i32) -> bool {
        let mut at = i;
        while let Some(parent) = self.parent(at) {
            let p = self.members[parent];
            if p.sid == sid {
                return true;
            }
            if p.sid != p.pid {
                return false;
            }
            at = parent;
        }
        false
    }

    fn push(&mut self, node: Node, late: bool) -> usize {
        let at = self.lineage.nodes.len();
        if let Some(cloner) = node.cloner {
            let by = &mut self.lineage.nodes[cloner];
            if late { by.late.push(at) } else { by.early.push(at) }
        }
        self.lineage.nodes.push(node);
        at
    }

    fn node(&self, i: usize, cloner: Option<usize>) -> Node {
        let m = self.members[i];
        Node {
            cloner,
            setsid: m.sid == m.pid,
            own_group: m.sid != m.pid && m.pgid == m.pid,
            ..Node::new(Role::Task(i), Some(m.pid))
        }
    }

    fn helper(role: Role, pid: Option<i32>, cloner: Option<usize>) -> Node {
        Node {
            cloner,
            setsid: role == Role::Leader,
            own_group: role == Role::Group,
            ..Node::new(role, pid)
        }
    }

    fn place(&mut self, i: usize) -> Result<()> {
        let m = self.members[i];
        let Some(parent) = self.parent(i) else {
            let init = self.lineage.nodes.iter().position(|n| n.role == Role::Init);
            let node = self.node(i, init);
            self.node_of[i] = self.push(node, true);
            return Ok(());
        };
        let p = self.members[parent];
        let by = self.node_of[parent];
        // The session it must be born in.
        let need = if m.sid == m.pid { self.born[i] } else { Some(m.sid) };
        if let Some(kin) =
            self.kin(i, parent).filter(|k| need.is_none_or(|s| s == self.members[*k].sid))
        {
            self.place_by(i, parent, kin);
            return Ok(());
        }
        let (node, late) = match need {
            None => (self.node(i, Some(by)), true),
            Some(sid) if sid == p.sid => (self.node(i, Some(by)), true),
            Some(sid) if self.born[parent] == Some(sid) => (self.node(i, Some(by)), false),
            Some(sid) => return self.place_elsewhere(i, parent, sid),
        };
        self.node_of[i] = self.push(node, late);
        Ok(())
    }

    /// Whom a task must be cloned by, if not by its parent, because it shares with him what it does not share with the parent:
    /// a sibling, or one below the parent.
    fn kin(&self, i: usize, parent: usize) -> Option<usize> {
        let m = &self.members[i];
        for (n, kind) in TIES.into_iter().enumerate() {
            if self.sharers.get(&(n, m.objects.get(kind))).is_none_or(|n| *n < 2) {
                continue;
            }
            if m.shares(kind, &self.members[parent]) {
                return None;
            }
            let placed = |j: &usize| m.shares(kind, &self.members[*j]);
            let mut kin = (1..i).filter(placed).filter(|j| self.is_below(*j, parent)).peekable();
            let first = kin.peek().copied();
            if first.is_some() {
                return kin.find(|j| self.parent(*j) == Some(parent)).or(first);
            }
        }
        None
    }

    fn is_below(&self, i: usize, ancestor: usize) -> bool {
        let mut at = self.parent(i);
        while let Some(up) = at {
            if up == ancestor {
                return true;
            }
            at = self.parent(up);
        }
        false
    }

    /// Has `kin` clone the task `i` for its parent.
    fn place_by(&mut self, i: usize, parent: usize, kin: usize) {
        let by = self.node_of[kin];
        let node = if self.parent(kin) == Some(parent) {
            let orphan = self.lineage.nodes[by].orphan;
            Node { sibling: true, orphan, ..self.node(i, Some(by)) }
        } else {
            let reaper = self.node_of[parent];
            self.lineage.nodes[reaper].subreaper = true;
            let helper = self.push(Self::helper(Role::Orphaner, None, Some(by)), true);
            Node { orphan: true, ..self.node(i, Some(helper)) }
        };
        self.node_of[i] = self.push(node, true);
    }

    /// The parent is not in the session: somebody else must clone the task.
    fn place_elsewhere(&mut self, i: usize, parent: usize, sid: i32) -> Result<()> {
        let m = self.members[i];
        let by = self.node_of[parent];
        let alive = self.index.get(&sid).copied().filter(|l| !self.members[*l].zombie);
        let cloner = match alive {
            Some(leader) if self.node_of[leader] == usize::MAX => {
                return Err(self.unexplained(i, "its leader comes later in the tree"));
            }
            Some(leader) => {
                let leader_node = self.node_of[leader];
                if self.parent(leader) != Some(parent) {
                    self.lineage.nodes[by].subreaper = true;
                    let helper = Self::helper(Role::Orphaner, None, Some(leader_node));
                    let helper = self.push(helper, true);
                    let mut node = self.node(i, Some(helper));
                    node.orphan = true;
                    self.node_of[i] = self.push(node, true);
                    return Ok(());
                }
                leader_node
            }
            None => match self.leaders.get(&sid) {
                Some(helper) if self.lineage.nodes[*helper].cloner == Some(by) => *helper,
                Some(_) => {
                    return Err(self.unexplained(
                        i,
                        "its leader is gone and its members have several parents",
                    ));
                }
                None => {
                    let helper = self.push(Self::helper(Role::Leader, seen(sid), Some(by)), true);
                    self.leaders.insert(sid, helper);
                    helper
                }
            },
        };
        let mut node = self.node(i, Some(cloner));
        node.sibling = true;
        self.node_of[i] = self.push(node, true);
        debug_assert_eq!(m.sid, sid);
        Ok(())
    }

    fn unexplained(&self, i: usize, why: &str) -> Error {
        let m = self.members[i];
        Error::new(format!("process {} cannot be put into session {} again: {why}", m.pid, m.sid))
    }

    /// Who joins which group, and helpers for groups whose leader is gone. A zombie leads and belongs to groups as the
    /// living do, but it is its parent that has to put it there.
    fn groups(&mut self) {
        let mut led: HashMap<i32, i32> =
            self.members.iter().filter(|m| m.pgid == m.pid).map(|m| (m.pgid, m.sid)).collect();
        let root = self.members[0];
        for (i, m) in self.members.iter().enumerate() {
            if m.pgid == m.pid || m.pgid == 0 {
                continue;
            }
            // A job's group may be led from outside, as its session.
            if m.pgid == root.pgid && root.pgid != root.pid && !self.index.contains_key(&m.pgid) {
                continue;
            }
            let joiner = match self.parent(i) {
                _ if !m.zombie => i,
                // Only a parent of the same session may.
                Some(parent) if self.members[parent].sid == m.sid => parent,
                _ => continue,
            };
            // The group of a session whose leader is gone: its members are born into it.
            if !self.leaders.contains_key(&m.pgid)
                && let std::collections::hash_map::Entry::Vacant(group) = led.entry(m.pgid)
            {
                group.insert(m.sid);
                let cloner = self.node_of[joiner];
                let at = self.lineage.nodes.len();
                self.lineage.nodes[cloner].late.push(at);
                self.lineage.nodes.push(Self::helper(Role::Group, Some(m.pgid), Some(cloner)));
            }
            if m.zombie {
                self.lineage.joined.push((joiner, m.pid, m.pgid));
            } else {
                self.lineage.joins.push((i, m.pgid));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(pid: i32) -> Objects {
        let n = pid as u32;
        Objects { vm: n, files: n, fs: n, sighand: n }
    }

    fn m(pid: i32, ppid: i32, pgid: i32, sid: i32) -> Member {
        Member { pid, ppid, pgid, sid, zombie: false, objects: own(pid) }
    }

    /// Carries the plan out on paper: returns (parent, session, group) of each pid.
    fn simulate(lineage: &Lineage) -> HashMap<i32, (i32, i32, i32)> {
        struct State {
            pid: i32,
            parent: i32,
            sid: i32,
            pgid: i32,
        }
        let mut born: Vec<Option<State>> = lineage.nodes.iter().map(|_| None).collect();
        fn birth(
            lineage: &Lineage,
            born: &mut Vec<Option<State>>,
            at: usize,
            from: (i32, i32, i32, i32),
        ) {
            let node = &lineage.nodes[at];
            let (cloner, parent, sid, pgid) = from;
            let pid = node.pid.unwrap_or(90_000 + at as i32);
            let mut state =
                State { pid, parent: if node.sibling { parent } else { cloner }, sid, pgid };
            for early in &node.early {
                birth(lineage, born, *early, (pid, state.parent, state.sid, state.pgid));
            }
            if node.setsid {
                (state.sid, state.pgid) = (pid, pid);
            }
            if node.own_group {
                state.pgid = pid;
            }
            for late in &node.late {
                birth(lineage, born, *late, (pid, state.parent, state.sid, state.pgid));
            }
            born[at] = Some(state);
        }
        birth(lineage, &mut born, 0, (1, 1, 7, 7));
        let mut result: HashMap<i32, (i32, i32, i32)> = HashMap::new();
        for (node, state) in lineage.nodes.iter().zip(&born) {
            let state = state.as_ref().expect("every node is born");
            if let Role::Task(_) = node.role {
                let parent = if node.orphan { 100 } else { state.parent };
                result.insert(state.pid, (parent, state.sid, state.pgid));
            }
        }
        result
    }

    fn check(members: &[Member]) -> Lineage {
        check_with(members, true);
        check_with(members, false)
    }

    fn check_with(members: &[Member], init: bool) -> Lineage {
        let lineage = Lineage::plan(members, false, init).expect("a plan");
        assert_eq!(lineage.nodes[lineage.root()].role, Role::Task(0));
        assert_eq!(lineage.root(), usize::from(init));
        let result = simulate(&lineage);
        for member in members {
            let (parent, sid, pgid) = result[&member.pid];
            assert_eq!(sid, member.sid, "session of {}", member.pid);
            if member.ppid != 0 {
                assert_eq!(parent, member.ppid, "parent of {}", member.pid);
            }
            let joins =
                lineage.joins.iter().any(|(i, g)| members[*i] == *member && *g == member.pgid);
            let joins = joins || lineage.joined.contains(&(0, member.pid, member.pgid));
            assert!(pgid == member.pgid || joins, "group of {}", member.pid);
        }
        lineage
    }

    #[test]
    fn plain_children_and_groups() {
        check(&[
            m(100, 0, 100, 100),
            m(101, 100, 101, 100),
            m(102, 101, 101, 100),
            m(103, 100, 103, 103),
        ]);
    }

    #[test]
    fn a_child_from_before_the_parents_session() {
        // 101 was born in session 100, cloned 102, then made session 101.
        check(&[m(100, 0, 100, 100), m(101, 100, 101, 101), m(102, 101, 100, 100)]);
    }

    #[test]
    fn an_orphan_of_a_living_leader() {
        // 103 was a grandchild of 101 and fell to the subreaper 100.
        let lineage = check(&[m(100, 0, 100, 100), m(101, 100, 101, 101), m(103, 100, 101, 101)]);
        assert!(lineage.nodes.iter().any(|n| n.sibling), "the leader clones a sibling");
        let deep = [
            m(100, 0, 100, 100),
            m(101, 100, 100, 100),
            m(102, 101, 102, 102),
            m(103, 100, 102, 102),
        ];
        let lineage = check(&deep);
        assert!(lineage.nodes[0].subreaper);
    }

    #[test]
    fn a_session_whose_leader_is_gone() {
        let lineage = check(&[m(100, 0, 100, 100), m(105, 100, 104, 104), m(106, 105, 104, 104)]);
        let leader = lineage.nodes.iter().find(|n| n.role == Role::Leader).expect("a stand-in");
        assert_eq!(leader.pid, Some(104));
    }

    #[test]
    fn a_session_that_could_not_be_seen() {
        // 101 was there before the root made a session; the session is that of somebody outside the PID namespace.
        let tree = [m(100, 0, 100, 100), m(101, 100, 0, 0)];
        let lineage = Lineage::plan(&tree, false, false).expect("a plan");
        let leader = lineage.nodes.iter().find(|n| n.role == Role::Leader).expect("a stand-in");
        assert_eq!(leader.pid, None);
    }

    #[test]
    fn a_group_whose_leader_is_gone() {
        let lineage = check(&[m(100, 0, 100, 100), m(105, 100, 104, 100)]);
        assert!(lineage.nodes.iter().any(|n| n.role == Role::Group && n.pid == Some(104)));
    }

    #[test]
    fn an_init_is_the_parent_of_the_root_and_leads_a_session_of_its_own() {
        let tree = [m(100, 0, 100, 100), m(101, 100, 101, 100)];
        let lineage = Lineage::plan(&tree, false, true).expect("a plan");
        let init = &lineage.nodes[0];
        assert_eq!((init.role, init.pid, init.cloner), (Role::Init, Some(1), None));
        assert_eq!((init.setsid, init.late.as_slice()), (true, &[1][..]));
        let job = Lineage::plan(&[m(100, 0, 100, 50)], true, true).expect("a plan");
        assert!(!job.nodes[0].setsid, "a job stays in the session of the command");
    }

    #[test]
    fn zombies_in_groups() {
        let zombie = |pid, pgid| Member { zombie: true, ..m(pid, 100, pgid, 100) };
        // A pipeline whose first command has ended, one whose second has, and one of which nothing but a zombie is left.
        let tree = [
            m(100, 0, 100, 100),
            zombie(101, 101),
            m(102, 100, 101, 100),
            m(103, 100, 103, 100),
            zombie(104, 103),
            zombie(106, 105),
        ];
        let lineage = Lineage::plan(&tree, false, false).expect("a plan");
        assert_eq!(lineage.joins, [(2, 101)]);
        assert_eq!(lineage.joined, [(0, 104, 103), (0, 106, 105)]);
        let helpers: Vec<_> = lineage.nodes.iter().filter(|n| n.role == Role::Group).collect();
        assert_eq!(helpers.len(), 1, "a zombie leads its group as well as anyone");
        assert_eq!(helpers[0].pid, Some(105));
    }

    #[test]
    fn who_shares_is_cloned_by_one_it_shares_with() {
        let all = own(101);
        let with = |m: Member, objects| Member { objects, ..m };
        // 102 is a sibling of 101 (CLONE_PARENT); 104 was left to 100 by one that had it from 103.
        let tree = [
            m(100, 0, 100, 100),
            m(101, 100, 100, 100),
            with(m(102, 100, 100, 100), all),
            m(105, 100, 100, 100),
            m(103, 105, 100, 100),
            with(m(104, 100, 100, 100), own(103)),
        ];
        let lineage = check(&tree);
        let node = |pid: i32| {
            let at = lineage.nodes.iter().position(|n| n.pid == Some(pid)).expect("a node");
            (at, &lineage.nodes[at])
        };
        let everything =
            (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND) as u64;
        let (_, sibling) = node(102);
        assert_eq!((sibling.cloner, sibling.sibling), (Some(node(101).0), true));
        assert_eq!(sibling.share, everything);
        let (_, orphan) = node(104);
        let helper = &lineage.nodes[orphan.cloner.expect("a cloner")];
        assert_eq!((helper.role, helper.cloner), (Role::Orphaner, Some(node(103).0)));
        assert_eq!((helper.share, orphan.share), (everything, everything));
    }

    #[test]
    fn a_job_needs_the_option() {
        let job = [m(100, 0, 100, 50)];
        assert!(Lineage::plan(&job, false, false).unwrap_err().hint.is_some());
        assert!(Lineage::plan(&job, true, false).is_ok());
    }
}
