//! The scripts of one task: what its agents do from birth to the moment before it goes on.
//!
//! * **birth** (all tasks, top down): session, group, children, a socket for descriptors;
//! * **build** (all tasks at the same time): memory, descriptors, threads, everything that does not tick;
//! * **locks** (after all tasks are built; those that lock files): their locks;
//! * **finish** (after all tasks are built): credentials, queued signals, timers.
//!
//! [`birth`], [`task`] and [`finish`] write them, [`super::locks`] the third; how descriptors come is in [`descriptors`].
//! Pure: nothing is opened here, and every descriptor number inside the task is known beforehand, because a process
//! gets the lowest free number.

mod birth;
mod descriptors;
mod finish;
mod task;

use super::arena::Space;
use super::heritage::Heritage;
use super::lineage::{Action, Lineage, Role};
use super::locks::{Locked, lock_steps};
use super::namespaces::{self, Namespaces};
use super::read::{Alive, Task};
use super::start::sleep_steps;
use super::template::Holdings;
use super::terminal::foreground_steps;
use super::thread::{seccomp_steps, thread_last_steps, thread_steps, waits};
use super::turns;
use crate::error::Result;
use birth::{birth_steps, shares_table};
pub use birth::{
    default_slack, die_with, opening_steps, session_steps, strip_steps, unmap_all_but, zombie_steps,
};
use descriptors::socket_number;
pub use descriptors::{A_MESSAGE, is_file, mapped, number_beyond, pages, receive, socket_steps};
use finish::finish_steps;
use rewake_agent::layout::{FLAG_CLONE, Op};
use rewake_image::PageStore;
use rewake_image::messages::CredsEntry;
use rewake_objects::files::epoll;
use rewake_objects::files::io_uring::open::ROOM;
use rewake_objects::files::pty::Controlling;
use rewake_objects::memory::huge::{self, Place, Staged};
use rewake_objects::memory::inherit::Inheritance;
use rewake_objects::memory::mm::{Held, Specials};
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::Inherited;
use std::collections::{BTreeMap, HashMap, HashSet};
use task::Builder;

/// What is handed to a task's agent through its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Handed {
    /// The description of this file id.
    File(u32),
    /// The file of this id, open for writing, whatever its own description is.
    Writable(u32),
    /// A pages file, of the images or of a parent of theirs.
    Pages(PageStore),
}

/// What all scripts need to know of the machine and the controller.
#[derive(Debug)]
pub struct Environment {
    /// vvar and vdso of every stub.
    pub specials: Specials,
    /// A free range as large as them, in all tasks.
    pub hop: u64,
    /// First and past-last address of the arena.
    pub arena: (u64, u64),
    /// Past the last address of user space.
    pub end: u64,
    /// rseq area that stubs inherit: address, size, signature.
    pub rseq: Option<(u64, u32, u32)>,
    /// Limits that stubs inherit.
    pub limits: Vec<(u64, u64)>,
    /// May hard limits be raised? (`CAP_SYS_RESOURCE`)
    pub may_raise: bool,
    /// Credentials that stubs inherit.
    pub creds: CredsEntry,
    /// Scheduling that stubs inherit.
    pub schedule: Inherited,
    /// Personality that stubs inherit.
    pub personality: u32,
    /// Login uid that stubs inherit; `None` where the kernel has no such thing.
    pub login_uid: Option<u32>,
    /// Can the kernel be told the ids of POSIX timers?
    pub timer_ids: bool,
    /// Who the root's parent is: the controller, or its parent with `--restore-sibling`.
    pub root_parent: i32,
    /// Is this the root directory of the images too? (by file id, from the opener)
    pub plain_root: bool,
    /// The terminals of sessions whose leaders are in the tree, by session.
    pub terminals: BTreeMap<i32, Controlling>,
    /// Process group that stubs inherit.
    pub group: i32,
    /// What the tree gets for itself.
    pub namespaces: Namespaces,
    /// The first process waits until unix sockets are made in its namespaces, before anybody else is born.
    pub gate: bool,
    /// Sizes of System V shared memory segments by id.
    pub segments: HashMap<u64, u64>,
    /// Threads that have something to do for io_uring instances when all tasks are built.
    pub ring_workers: HashSet<i32>,
    /// File locks by the process that is to take them.
    pub locks: HashMap<i32, Vec<Locked>>,
    /// Where processes may have an area of huge pages to fill their memory with.
    pub huge: Option<Place>,
    /// What processes have from those that clone them.
    pub heritage: Heritage,
    /// What they need for it, with the controller's descriptors, which the root stub inherits and hands down.
    pub lent: Vec<(Handed, i32)>,
}

/// The first number of what is lent at birth; the agent's socket pair gets those before it.
pub const FIRST_LENT: usize = 2;

impl Environment {
    /// The number, in a process that is being born, of something that is lent to it.
    fn lent(&self, handed: Handed) -> Option<i32> {
        let at = self.lent.iter().position(|(lent, _)| *lent == handed)?;
        i32::try_from(FIRST_LENT + at).ok()
    }
}

/// A script and where its ring lies in the arena.
#[derive(Debug)]
pub struct ThreadPlan {
    /// Thread id.
    pub tid: i32,
    /// Offset of its ring.
    pub at: usize,
    /// Bytes of the ring.
    pub len: usize,
    /// Bytes of data in it.
    pub data: usize,
    /// What it does.
    pub steps: Steps,
    /// What it does after the leader's last script, if it has to wait for that.
    pub finish: Option<Steps>,
}

/// Everything one node of the lineage does.
#[derive(Debug)]
pub struct NodePlan {
    /// Offset of its ring.
    pub at: usize,
    /// Bytes of the ring.
    pub len: usize,
    /// Bytes of data in it.
    pub data: usize,
    /// On the longer way of the lineage: what it does first, and then when its turn comes, before its birth script, of
    /// which only the socket is left.
    pub sequence: Vec<Steps>,
    /// First script.
    pub birth: Steps,
    /// What a living task does besides.
    pub task: Option<TaskPlan>,
    /// The last script of an init.
    pub init: Option<Steps>,
}

/// The further scripts of a living task.
#[derive(Debug)]
pub struct TaskPlan {
    /// Index of the task.
    pub index: usize,
    /// Second script.
    pub build: Steps,
    /// Third script, if the task has locked files.
    pub locks: Option<Steps>,
    /// Last script.
    pub finish: Steps,
    /// Further threads.
    pub threads: Vec<ThreadPlan>,
    /// What is handed over, message by message.
    pub messages: Vec<Vec<Handed>>,
    /// Where the numbers of the socket pair are, in the birth script's data; of those that share descriptors only the first
    /// makes one.
    pub socket: Option<rewake_inject::ring::Data>,
    /// What the controller fills of its memory, from when the birth script is done.
    pub staged: Staged,
    /// What could not be restored as it was, but does not stop the restore.
    pub warnings: Vec<String>,
}

pub(super) fn op(nr: i64, args: &[u64]) -> Op {
    Op::new(nr, args)
}

const PR_SET_NAME: u64 = 15;
const WALL: u64 = 0x4000_0000;

/// `clone3` of a node or thread that goes on as an agent on the ring at `header`.
pub fn clone_op(
    steps: &mut Steps,
    pid: Option<i32>,
    flags: u64,
    exit_signal: u64,
    header: u64,
) -> usize {
    let tid = steps.words(&[pid.unwrap_or(0) as u64]);
    let set_tid = if pid.is_some() { (tid.address, 1) } else { (0, 0) };
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    let args = steps.words(&[flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid.0, set_tid.1, 0]);
    let mut op = op(libc::SYS_clone3, &[args.address, args.len as u64, 0, 0, 0, header]);
    op.flags |= FLAG_CLONE;
    steps.must(Label::Clone(pid.unwrap_or(0)), op)
}

/// Plans all nodes; children before the nodes that clone them, whose scripts name the children's rings. `held` is what each
/// task has from a template, if there is one.
///
/// # Errors
/// The images ask for something impossible.
pub fn plan(
    tasks: &[Task],
    lineage: &Lineage,
    env: &Environment,
    space: &mut Space,
    same_vdso: &dyn Fn(&Alive) -> Result<bool>,
    epolls: &HashMap<i32, Vec<epoll::Adder>>,
    held: Option<&Holdings>,
) -> Result<Vec<NodePlan>> {
    let mut plans: Vec<Option<NodePlan>> = lineage.nodes.iter().map(|_| None).collect();
    // Cloners come before those they clone, so backwards every child is planned first.
    for at in (0..lineage.nodes.len()).rev() {
        let header = |node: usize| plans[node].as_ref().map_or(0, |p| space.address(p.at));
        let node = &lineage.nodes[at];
        let turns = lineage.sequence.iter().filter(|(by, _)| *by == at);
        let clones = turns.filter_map(|(_, action)| match action {
            Action::Clone(child) => Some(child),
            _ => None,
        });
        let cloned = node.early.iter().chain(&node.late).chain(clones);
        let rings: HashMap<usize, u64> = cloned.clone().map(|n| (*n, header(*n))).collect();
        let parents: HashMap<usize, u64> = cloned
            .filter_map(|n| Some((*n, plans[*n].as_ref()?)))
            .map(|(n, plan)| (n, turns::parent_cell(space.address(plan.at), plan.data)))
            .collect();
        plans[at] = Some(plan_node(
            tasks, lineage, at, env, space, same_vdso, epolls, &rings, &parents, held,
        )?);
    }
    Ok(plans.into_iter().flatten().collect())
}

#[allow(clippy::too_many_arguments, reason = "one call site, all of it needed")]
fn plan_node(
    tasks: &[Task],
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    space: &mut Space,
    same_vdso: &dyn Fn(&Alive) -> Result<bool>,
    epolls: &HashMap<i32, Vec<epoll::Adder>>,
    rings: &HashMap<usize, u64>,
    parents: &HashMap<usize, u64>,
    held: Option<&Holdings>,
) -> Result<NodePlan> {
    let node = &lineage.nodes[at];
    let index = match node.role {
        Role::Task(index) => Some(index),
        _ => None,
    };
    let alive = index.and_then(|i| tasks[i].alive.as_ref());
    // Threads first: their rings lie before the leader's, whose script names them.
    let mut threads = Vec::new();
    if let (Some(index), Some(alive)) = (index, alive) {
        let common = alive.common_filters();
        for thread in &alive.threads[1..] {
            let base = space.next_data_address();
            let mut steps = Steps::new(base);
            thread_steps(&mut steps, tasks[index].pid, thread);
            // Filters of its own: after those that the leader installs for all.
            let works = env.ring_workers.contains(&thread.tid);
            let mut finish = (works || waits(common, thread)).then(|| Steps::new(base));
            if let Some(finish) = &mut finish {
                seccomp_steps(finish, thread, common);
            }
            let last = finish.as_mut().unwrap_or(&mut steps);
            thread_last_steps(last, tasks[index].pid, thread, env);
            // With copies, the rings are used again.
            if held.is_none() {
                sleep_steps(last, thread);
            }
            let scripts = || [Some(&steps), finish.as_ref()].into_iter().flatten();
            let data = scripts().map(|s| s.script.data_len()).max().unwrap_or(0);
            let ops = scripts().map(|s| s.script.ops.len()).max().unwrap_or(0);
            let room = if works { ROOM } else { (0, 0) };
            let (at, len, data) = space.take(data.max(room.0), ops.max(room.1));
            threads.push(ThreadPlan { tid: thread.tid, at, len, data, steps, finish });
        }
    }
    let base = space.next_data_address();
    let mut birth = Steps::new(base);
    let sequence = turns::plan(tasks, lineage, at, env, rings, parents, held.is_some(), base);
    if sequence.is_empty() {
        birth_steps(&mut birth, tasks, lineage, at, env, rings, held.is_some())?;
    }
    let mut task = None;
    if let (Some(index), Some(alive)) = (index, alive) {
        let part = tasks[index].part;
        let number = socket_number(tasks, part.table, env)?;
        let socket = (part.table == index).then(|| socket_steps(&mut birth, number));
        let nothing = Held::default();
        let no_heritage = Inheritance::default();
        let headers: Vec<u64> = threads.iter().map(|t| space.address(t.at)).collect();
        let mut builder = Builder {
            index,
            task: &tasks[index],
            alive,
            env,
            socket: number,
            held: held.and_then(|h| h.tasks.get(index)).unwrap_or(&nothing),
            pages: env.heritage.of(index).map(|i| &i.missing).or(alive.pages.as_ref()),
            inherited: env.heritage.of(index).unwrap_or(&no_heritage),
            shares_table: shares_table(lineage, at),
            steps: Steps::new(base),
            staged: Staged::new(),
            warnings: Vec::new(),
            messages: Vec::new(),
        };
        let group = lineage.joins.iter().find(|(i, _)| *i == index).map(|(_, group)| *group);
        let zombies: Vec<(i32, i32)> = lineage
            .joined
            .iter()
            .filter(|(parent, ..)| *parent == index)
            .map(|(_, pid, group)| (*pid, *group))
            .collect();
        builder.build(group, &zombies, node.orphan, same_vdso(alive)?, &threads, &headers)?;
        let Builder { steps: build, staged, warnings, messages, .. } = builder;
        // After those are cloned who would have it too.
        huge::stage(&mut birth, &staged);
        let locks = env.locks.get(&tasks[index].pid).map(|locks| lock_steps(base, locks));
        let mut finish = Steps::new(base);
        let groups: Vec<i32> = node
            .late
            .iter()
            .map(|n| &lineage.nodes[*n])
            .filter(|n| n.role == Role::Group)
            .filter_map(|n| n.pid)
            .collect();
        // Only now: as long as the controller holds pipe ends too, a pipe does not tell that its other end is closed.
        for (number, entry) in epolls.get(&tasks[index].pid).into_iter().flatten() {
            epoll::restore_items(&mut finish, *number, entry);
        }
        // All are in their groups; a group of which nobody is left would need none.
        if let Some(terminal) = env.terminals.get(&tasks[index].pid)
            && tasks.iter().any(|t| t.pgid == terminal.group)
        {
            foreground_steps(&mut finish, terminal, alive);
        }
        let makes_memory = tasks[index].part.memory == index;
        finish_steps(&mut finish, &tasks[index], alive, env, makes_memory, &groups);
        if held.is_none() {
            sleep_steps(&mut finish, &alive.threads[0]);
        }
        task = Some(TaskPlan {
            index,
            build,
            locks,
            finish,
            threads,
            messages,
            socket,
            staged,
            warnings,
        });
    }
    let init = (node.role == Role::Init).then(|| {
        let mut steps = Steps::new(base);
        namespaces::init_steps(&mut steps, env, held.map(|h| h.specials.clone()));
        steps
    });
    let scripts = [
        Some(&birth),
        task.as_ref().map(|t| &t.build),
        task.as_ref().and_then(|t| t.locks.as_ref()),
        task.as_ref().map(|t| &t.finish),
        init.as_ref(),
    ];
    let scripts = || scripts.iter().flatten().copied().chain(&sequence);
    let data = scripts().map(|s| s.script.data_len()).max().unwrap_or(0);
    let ops = scripts().map(|s| s.script.ops.len()).max().unwrap_or(0);
    let pid = index.map(|index| tasks[index].pid);
    let works = pid.is_some_and(|pid| env.ring_workers.contains(&pid));
    let room = if works { ROOM } else { (0, 8) };
    let (ring, len, data) = space.take(data.max(room.0), ops.max(room.1));
    Ok(NodePlan { at: ring, len, data, sequence, birth, task, init })
}

pub(super) fn name_steps(steps: &mut Steps, comm: &[u8]) {
    let name = steps.script.cstr(&comm[..comm.len().min(15)]);
    steps.must(
        Label::Text("setting the command name"),
        op(libc::SYS_prctl, &[PR_SET_NAME, name.address, 0, 0, 0]),
    );
}
