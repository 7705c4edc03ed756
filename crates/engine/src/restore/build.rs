//! The scripts of one task: what its agents do from birth to the moment before it goes on.
//!
//! * **birth** (all tasks, top down): session, group, children, a socket for descriptors;
//! * **build** (all tasks at the same time): memory, descriptors, threads, everything that does not tick;
//! * **locks** (after all tasks are built; those that lock files): their locks;
//! * **finish** (after all tasks are built): credentials, queued signals, timers.
//!
//! Pure: nothing is opened here, and every descriptor number inside the task is known beforehand, because a process
//! gets the lowest free number.

use super::arena::Space;
use super::heritage::{Act, Heritage};
use super::lineage::{Action, Lineage, Node, Role};
use super::locks::{Locked, lock_steps};
use super::namespaces::{self, Namespaces};
use super::read::{Alive, Task};
use super::template::Holdings;
use super::terminal::{foreground_steps, terminal_steps};
use super::thread::{
    seccomp_steps, thread_basics, thread_credentials, thread_last_steps, thread_steps, waits,
};
use super::turns;
use crate::error::{Error, Result};
use rewake_agent::layout::{FLAG_CLONE, Op};
use rewake_image::messages::{CredsEntry, VmaEntry};
use rewake_image::{PageStore, StoredPages};
use rewake_objects::Problem;
use rewake_objects::files::epoll;
use rewake_objects::files::pty::Controlling;
use rewake_objects::memory::future;
use rewake_objects::memory::inherit::{self, Inheritance};
use rewake_objects::memory::lazy;
use rewake_objects::memory::mm::{self, Held, Layout, Specials};
use rewake_objects::memory::vma::{self, status};
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::{Inherited, lend_timer_slack};
use rewake_objects::task::{attributes, limits, seccomp, signals, timers};
use std::collections::{BTreeMap, HashMap};

/// Descriptors passed in one message (the kernel's SCM_MAX_FD is 253).
pub const A_MESSAGE: usize = 250;

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
    /// Sizes of System V shared memory segments by id.
    pub segments: HashMap<u64, u64>,
    /// File locks by the process that is to take them.
    pub locks: HashMap<i32, Vec<Locked>>,
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
    /// What could not be restored as it was, but does not stop the restore.
    pub warnings: Vec<String>,
}

pub(super) fn op(nr: i64, args: &[u64]) -> Op {
    Op::new(nr, args)
}

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const WEXITED: u64 = 4;
const WNOWAIT: u64 = 0x0100_0000;
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
        for thread in &alive.threads[1..] {
            let base = space.next_data_address();
            let mut steps = Steps::new(base);
            thread_steps(&mut steps, thread);
            // Filters of its own: after those that the leader installs for all.
            let mut finish = waits(alive, thread).then(|| Steps::new(base));
            if let Some(finish) = &mut finish {
                seccomp_steps(finish, thread, alive.common_filters());
            }
            let last = finish.as_mut().unwrap_or(&mut steps);
            thread_last_steps(last, tasks[index].pid, thread, env);
            let scripts = || [Some(&steps), finish.as_ref()].into_iter().flatten();
            let data = scripts().map(|s| s.script.data_len()).max().unwrap_or(0);
            let ops = scripts().map(|s| s.script.ops.len()).max().unwrap_or(0);
            let (at, len, data) = space.take(data, ops);
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
        let Builder { steps: build, warnings, messages, .. } = builder;
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
        task = Some(TaskPlan { index, build, locks, finish, threads, messages, socket, warnings });
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
    let (ring, len, data) = space.take(data, ops.max(8));
    Ok(NodePlan { at: ring, len, data, sequence, birth, task, init })
}

fn birth_steps(
    steps: &mut Steps,
    tasks: &[Task],
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    rings: &HashMap<usize, u64>,
    from_template: bool,
) -> Result<()> {
    let node = &lineage.nodes[at];
    opening_steps(steps, lineage, at, env, from_template);
    if node.subreaper {
        let reaper = op(libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0]);
        steps.must(Label::Text("becoming a subreaper"), reaper);
    }
    let clone = |steps: &mut Steps, child: usize| {
        let c: &Node = &lineage.nodes[child];
        let (flags, signal) =
            if c.sibling { (libc::CLONE_PARENT as u64, 0) } else { (0, libc::SIGCHLD as u64) };
        lend_timer_slack(steps, default_slack(tasks, c).or(default_slack(tasks, node)));
        let result = clone_op(steps, c.pid, flags | c.share, signal, rings[&child]);
        let zombie = matches!(c.role, Role::Task(i) if tasks[i].alive.is_none());
        if zombie && !c.sibling && !c.orphan {
            let info = steps.data(&[0; 128]);
            steps.must(
                Label::Text("waiting for a zombie to die"),
                op(libc::SYS_waitid, &[1, 0, info.address, WEXITED | WNOWAIT, 0]).arg_result(
                    1,
                    result as u32,
                    0,
                ),
            );
        }
        if matches!(c.role, Role::Leader | Role::Orphaner) {
            steps.must(
                Label::Text("reaping a helper"),
                op(libc::SYS_wait4, &[0, 0, WALL, 0]).arg_result(0, result as u32, 0),
            );
        }
    };
    for child in &node.early {
        hand_down(steps, env, at, *child)?;
        clone(steps, *child);
    }
    if node.setsid {
        session_steps(steps, tasks, node, env);
    }
    if node.own_group {
        steps.must(Label::Text("making a process group"), op(libc::SYS_setpgid, &[0, 0]));
    }
    for child in &node.late {
        hand_down(steps, env, at, *child)?;
        clone(steps, *child);
    }
    if node.part & libc::CLONE_FS as u64 != 0 {
        let unshare = op(libc::SYS_unshare, &[libc::CLONE_FS as u64]);
        steps.must(Label::Text("leaving a working directory to those who share it"), unshare);
    }
    if node.part & libc::CLONE_FILES as u64 != 0 {
        close_all(steps, libc::CLOSE_RANGE_UNSHARE.into());
    } else if !env.lent.is_empty() && !shares_table(lineage, at) {
        close_lent(steps, env);
    }
    match node.role {
        Role::Leader | Role::Orphaner => {
            steps.may(Label::Text("ending a helper"), op(libc::SYS_exit_group, &[0]));
        }
        Role::Task(i) if tasks[i].alive.is_none() => zombie_steps(steps, &tasks[i]),
        Role::Task(_) | Role::Group | Role::Init => {}
    }
    Ok(())
}

/// Has a process make what the next one that it clones has from it.
fn hand_down(steps: &mut Steps, env: &Environment, node: usize, child: usize) -> Result<()> {
    let of = |problem: Problem| Error::new(problem.to_string());
    for act in env.heritage.before(node, child) {
        match act {
            Act::Unmap(range) => inherit::unmap(steps, range),
            Act::Map(vma) => {
                let file = if is_file(vma) { env.lent(mapped(vma).map_err(of)?) } else { None };
                inherit::map(steps, vma, file.unwrap_or(-1));
            }
            Act::Write(runs) => {
                let number = |store| env.lent(Handed::Pages(store));
                inherit::write(steps, runs, &number).map_err(of)?;
            }
        }
    }
    Ok(())
}

/// What every node does first.
pub(super) fn opening_steps(
    steps: &mut Steps,
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    from_template: bool,
) {
    if !lineage.nodes[at].orphan {
        // On the longer way, a parent whose number is not known beforehand tells it (`turns`).
        let told = (!lineage.sequence.is_empty()).then_some(0);
        die_with(steps, parent_of(lineage, at, env).or(told));
    }
    if lineage.nodes[at].clean {
        close_all_but_lent(steps, env);
    }
    if at == 0 {
        env.namespaces.enter(steps);
        // A template is stripped already.
        if !from_template {
            strip_steps(steps, env);
        }
    }
}

/// Makes a session, with its terminal: only children that are born later inherit it.
pub(super) fn session_steps(steps: &mut Steps, tasks: &[Task], node: &Node, env: &Environment) {
    steps.must(Label::Text("making a session"), op(libc::SYS_setsid, &[]));
    if let Role::Task(i) = node.role
        && tasks[i].alive.is_some()
        && let Some(terminal) = env.terminals.get(&tasks[i].pid)
    {
        terminal_steps(steps, terminal);
    }
}

/// The default timer slack of a node, if it is a task whose images tell it.
pub(super) fn default_slack(tasks: &[Task], node: &Node) -> Option<u64> {
    match node.role {
        Role::Task(i) => tasks[i].alive.as_ref()?.threads[0].default_slack(),
        _ => None,
    }
}

/// Asks to be killed when the parent dies; if that happened already, ends at once.
pub fn die_with(steps: &mut Steps, parent: Option<i32>) {
    let kill = op(libc::SYS_prctl, &[PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0, 0, 0]);
    steps.must(Label::Text("asking to die with the parent"), kill);
    if let Some(parent) = parent {
        let own = op(libc::SYS_getppid, &[]).expect(parent as u64);
        steps.may(Label::Text("looking for the parent"), own);
    }
}

/// The parent a node has when it is born, if its pid is known.
fn parent_of(lineage: &Lineage, at: usize, env: &Environment) -> Option<i32> {
    let node = &lineage.nodes[at];
    match node.cloner {
        None => Some(env.root_parent),
        Some(cloner) if node.sibling => parent_of(lineage, cloner, env),
        Some(cloner) => lineage.nodes[cloner].pid,
    }
}

/// Closes whatever is in the table of descriptors that the process came by.
fn close_all(steps: &mut Steps, flags: u64) {
    let close = op(libc::SYS_close_range, &[0, u64::from(u32::MAX), flags]);
    steps.must(Label::Text("closing inherited descriptors"), close);
}

/// Closes all but what is lent until all are born.
fn close_all_but_lent(steps: &mut Steps, env: &Environment) {
    if env.lent.is_empty() {
        return close_all(steps, 0);
    }
    let past = FIRST_LENT + env.lent.len();
    for (first, last) in [(0, FIRST_LENT as u64 - 1), (past as u64, u64::from(u32::MAX))] {
        let close = op(libc::SYS_close_range, &[first, last, 0]);
        steps.must(Label::Text("closing inherited descriptors"), close);
    }
}

/// Closes what is lent.
fn close_lent(steps: &mut Steps, env: &Environment) {
    let (first, last) = (FIRST_LENT as u64, (FIRST_LENT + env.lent.len()) as u64 - 1);
    let close = op(libc::SYS_close_range, &[first, last, 0]);
    steps.must(Label::Text("closing lent descriptors"), close);
}

/// Does a node have its descriptors together with others? Then these may still need what is lent when it does not any more.
fn shares_table(lineage: &Lineage, at: usize) -> bool {
    let files = libc::CLONE_FILES as u64;
    let passed_on = |n: &Node| n.cloner == Some(at) && n.share & files != 0;
    lineage.nodes[at].share & files != 0 || lineage.nodes.iter().any(passed_on)
}

/// Takes everything away that the root stub inherited from the controller, but the agent and the kernel's mappings.
pub fn strip_steps(steps: &mut Steps, env: &Environment) {
    if let Some((address, size, signature)) = env.rseq {
        const UNREGISTER: u64 = 1;
        steps.must(
            Label::Text("unregistering rseq"),
            op(libc::SYS_rseq, &[address, u64::from(size), UNREGISTER, u64::from(signature)]),
        );
    }
    let mut keep = vec![env.arena];
    keep.extend(env.specials.span().map(|s| (s.start, s.end)));
    unmap_all_but(steps, keep, env.end);
    future::forget(steps);
    // The controller's numbers of what is lent are all above these.
    for (number, (_, fd)) in (FIRST_LENT as u64..).zip(&env.lent) {
        let lend = op(libc::SYS_dup3, &[*fd as u64, number, 0]);
        steps.must(Label::Text("lending descriptors"), lend);
    }
    close_all_but_lent(steps, env);
}

/// Unmaps everything below `end` but the ranges to keep.
pub fn unmap_all_but(steps: &mut Steps, mut keep: Vec<(u64, u64)>, end: u64) {
    keep.sort_unstable();
    let mut from = 0;
    for (start, past) in keep.into_iter().chain([(end, end)]) {
        if from < start {
            steps.must(
                Label::Text("emptying the address space"),
                op(libc::SYS_munmap, &[from, start - from]),
            );
        }
        from = past;
    }
}

/// A zombie dies again as it died.
pub(super) fn zombie_steps(steps: &mut Steps, task: &Task) {
    name_steps(steps, &task.comm);
    let wait_status = task.tc.exit_code;
    let signal = wait_status & 0x7f;
    if signal == 0 {
        let code = u64::from(wait_status >> 8 & 0xff);
        steps.may(Label::Text("ending a zombie"), op(libc::SYS_exit_group, &[code]));
        return;
    }
    // The default action, unblocked, without a core file.
    let limit = steps.words(&[0, 0]);
    steps.may(Label::Text("ending a zombie"), op(libc::SYS_prlimit64, &[0, 4, limit.address, 0]));
    let action = steps.words(&[0; 4]);
    let number = u64::from(signal);
    steps.may(
        Label::Text("ending a zombie"),
        op(libc::SYS_rt_sigaction, &[number, action.address, 0, 8]),
    );
    let mask = steps.words(&[!(1 << (signal - 1))]);
    steps.may(
        Label::Text("ending a zombie"),
        op(libc::SYS_rt_sigprocmask, &[2, mask.address, 0, 8]),
    );
    let own = steps.may(Label::Text("ending a zombie"), op(libc::SYS_getpid, &[]));
    steps.may(
        Label::Text("ending a zombie"),
        op(libc::SYS_kill, &[0, number]).arg_result(0, own as u32, 0),
    );
    steps.may(Label::Text("ending a zombie"), op(libc::SYS_exit_group, &[128 + number]));
}

pub(super) fn name_steps(steps: &mut Steps, comm: &[u8]) {
    let name = steps.script.cstr(&comm[..comm.len().min(15)]);
    steps.must(
        Label::Text("setting the command name"),
        op(libc::SYS_prctl, &[PR_SET_NAME, name.address, 0, 0, 0]),
    );
}

/// How many descriptors a stub may have.
fn open_files(env: &Environment) -> u32 {
    let (limit, _) = env.limits.get(7).copied().unwrap_or((1024, 1024));
    limit.min(1 << 30) as u32
}

/// A number for an agent's socket beyond so many descriptors that are lent, if a stub may have so many. Not a high one: the
/// kernel's table of descriptors grows up to it, and stays as large as it has become.
pub fn number_beyond(lent: usize, env: &Environment) -> u32 {
    /// The socket pair, pages, and whatever else is lent but not for a mapping.
    const SPARE: usize = 16;
    // What is lent gets the lowest numbers that are free.
    ((lent + SPARE).min(1 << 30) as u32).min(open_files(env).saturating_sub(1))
}

/// A number for the agent's socket that neither the task's descriptors nor what is lent to those that share them will ever have.
/// `table` is the first task that has them.
fn socket_number(tasks: &[Task], table: usize, env: &Environment) -> Result<i32> {
    let limit = open_files(env);
    let users = || tasks.iter().filter(|t| t.part.table == table).filter_map(|t| t.alive.as_ref());
    let fds = users().next().map_or(&[][..], |alive| &alive.fds);
    let files = |alive: &Alive| alive.mm.vmas.iter().filter(|v| v.shmid != 0).count();
    let stores = |alive: &Alive| pages(alive).count();
    let files = users().map(|alive| files(alive) + stores(alive)).max().unwrap_or(0);
    // Those who share descriptors keep what is lent at birth until all are born.
    let files = files + if users().count() > 1 { FIRST_LENT + env.lent.len() } else { 0 };
    let beyond = fds.last().map_or(0, |f| f.fd.saturating_add(1));
    let lent = number_beyond(2 * fds.len() + files, env);
    let mut number = lent.max(beyond).min(limit.saturating_sub(1));
    for taken in fds.iter().rev().map(|f| f.fd) {
        if taken < number {
            break;
        }
        if taken == number {
            number = number.saturating_sub(1);
        }
    }
    if fds.iter().any(|f| f.fd == number) {
        return Err(Error::new(format!(
            "every descriptor below the limit of {limit} open files that this command may raise to is one of the images', and \
             one more is needed while they are put in place"
        ))
        .hint("raise the hard limit of open files by one (ulimit -Hn)"));
    }
    let above = fds.last().map_or(0, |f| f.fd);
    if above >= limit {
        return Err(Error::new(format!(
            "descriptor {above} of the images is beyond the limit of {limit} open files that this command may raise to"
        ))
        .hint("raise the hard limit of open files (ulimit -Hn)"));
    }
    Ok(number as i32)
}

/// Makes the socket through which descriptors come; the agent's end gets `number`. Returns where the numbers of the pair are.
pub fn socket_steps(steps: &mut Steps, number: i32) -> rewake_inject::ring::Data {
    let label = Label::Text("making the agent's socket");
    let cell = steps.data(&[0xff; 8]);
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    steps.must(label, op(libc::SYS_socketpair, &[1, kind, 0, cell.address]));
    steps.must(
        label,
        op(libc::SYS_dup3, &[0, number as u64, libc::O_CLOEXEC as u64]).arg_deref(0, cell.address),
    );
    steps.must(label, op(libc::SYS_close, &[0]).arg_deref(0, cell.address));
    cell
}

/// Is this a mapping of a file?
pub fn is_file(vma: &VmaEntry) -> bool {
    vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0
}

/// The pages files of a task that it has pages in.
pub fn pages(alive: &Alive) -> impl Iterator<Item = Handed> {
    alive.pages.iter().flat_map(|pages| pages.stores()).map(Handed::Pages)
}

/// Receives one message with `count` descriptors through the agent's socket.
pub fn receive(steps: &mut Steps, socket: i32, count: usize) {
    let byte = steps.data(&[0; 8]);
    let iov = steps.words(&[byte.address, 1]);
    let room = 16 + (count * 4).next_multiple_of(8);
    let control = steps.script.space(room);
    // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags
    let header = steps.words(&[0, 0, iov.address, 1, control.address, room as u64, 0]);
    steps.must_be(
        Label::Text("receiving descriptors"),
        1,
        op(libc::SYS_recvmsg, &[socket as u64, header.address, 0]),
    );
}

/// What a mapping of a file needs: images may name a description that is not open for writing.
pub fn mapped(vma: &VmaEntry) -> std::result::Result<Handed, Problem> {
    let id = u32::try_from(vma.shmid).map_err(|_| {
        Problem::new(Label::Vma(vma.start, vma.end).to_string(), "its file id is out of range")
    })?;
    let shared = vma.status & status::FILE_SHARED != 0;
    let writable = vma.fdflags.unwrap_or(0) & libc::O_ACCMODE as u32 == libc::O_RDWR as u32
        || vma.prot & libc::PROT_WRITE as u32 != 0;
    Ok(if shared && writable { Handed::Writable(id) } else { Handed::File(id) })
}

struct Builder<'a> {
    index: usize,
    task: &'a Task,
    alive: &'a Alive,
    env: &'a Environment,
    socket: i32,
    held: &'a Held,
    shares_table: bool,
    inherited: &'a Inheritance,
    /// What the task fills itself.
    pages: Option<&'a StoredPages>,
    steps: Steps,
    warnings: Vec<String>,
    messages: Vec<Vec<Handed>>,
}

impl Builder<'_> {
    fn of(&self, problem: Problem) -> Error {
        Error::of(self.task.pid, &self.task.comm, problem)
    }

    /// Who shares the memory of one before it finds it made.
    fn makes_memory(&self) -> bool {
        self.task.part.memory == self.index
    }

    fn build(
        &mut self,
        group: Option<i32>,
        zombies: &[(i32, i32)],
        orphan: bool,
        same_vdso: bool,
        threads: &[ThreadPlan],
        headers: &[u64],
    ) -> Result<()> {
        let steps = &mut self.steps;
        if orphan {
            die_with(steps, Some(self.task.ppid));
        }
        if let Some(group) = group {
            steps.must(
                Label::Text("joining the process group"),
                op(libc::SYS_setpgid, &[0, group as u64]),
            );
        }
        for (pid, group) in zombies {
            steps.must(
                Label::Text("putting a zombie into its process group"),
                op(libc::SYS_setpgid, &[*pid as u64, *group as u64]),
            );
        }
        // The controller has taken its end (number 1: the pair got 0 and 1), and the first of those who share it closes it.
        if self.task.part.table == self.index {
            steps.must(Label::Text("closing the controller's socket"), op(libc::SYS_close, &[1]));
            if self.shares_table && !self.env.lent.is_empty() {
                close_lent(steps, self.env);
            }
        }
        let lent = self.lend()?;
        if self.makes_memory() {
            self.memory(&lent, same_vdso)?;
        }
        if self.task.part.directories {
            self.file_system(&lent)?;
        }
        let steps = &mut self.steps;
        if !lent.is_empty() {
            steps.must(
                Label::Text("closing lent descriptors"),
                op(libc::SYS_close_range, &[0, lent.len() as u64 - 1, 0]),
            );
        }
        if self.task.part.fills_table {
            self.descriptors()?;
        }
        self.process();
        self.threads(threads, headers);
        Ok(())
    }

    /// Receives what building needs (mapped files, pages, exe, directories) as numbers 0, 1, 2…
    fn lend(&mut self) -> Result<HashMap<Handed, i32>> {
        let mut list: Vec<Handed> = Vec::new();
        let mut numbers = HashMap::new();
        let mut add = |handed: Handed| {
            numbers.entry(handed).or_insert_with(|| {
                list.push(handed);
                list.len() as i32 - 1
            });
        };
        let alive = self.alive;
        let held = |vma: &VmaEntry| self.held.places.contains_key(&vma.start);
        let vmas = if self.makes_memory() { alive.mm.vmas.as_slice() } else { &[] };
        let own = || vmas.iter().filter(|v| mm::is_mapped(v) && !held(v));
        if own().any(vma::has_private_pages) {
            let stores = self.pages.iter().flat_map(|pages| pages.stores());
            stores.map(Handed::Pages).for_each(&mut add);
        }
        if self.makes_memory() && !alive.aio.is_empty() {
            pages(alive).for_each(&mut add);
        }
        for vma in own().filter(|v| is_file(v) && !self.inherited.has(v)) {
            add(mapped(vma).map_err(|p| self.of(p))?);
        }
        if self.makes_memory() && !self.held.in_place {
            add(Handed::File(alive.mm.exe_file_id));
        }
        if self.task.part.directories {
            add(Handed::File(alive.fs.cwd_id));
            if !self.env.plain_root {
                add(Handed::File(alive.fs.root_id));
            }
        }
        for chunk in list.chunks(A_MESSAGE) {
            receive(&mut self.steps, self.socket, chunk.len());
            self.messages.push(chunk.to_vec());
        }
        Ok(numbers)
    }

    fn memory(&mut self, lent: &HashMap<Handed, i32>, same_vdso: bool) -> Result<()> {
        let number = |handed: Handed| {
            lent.get(&handed)
                .copied()
                .ok_or_else(|| Problem::new(format!("{handed:?}"), "it was not handed over"))
        };
        let descriptor = |vma: &VmaEntry| mapped(vma).and_then(number);
        let layout = Layout {
            stub: &self.env.specials,
            hop: self.env.hop,
            same_vdso,
            descriptor: &descriptor,
            segment: &|id| self.env.segments.get(&id).copied().unwrap_or(0),
            pages: &|store| lent.get(&Handed::Pages(store)).copied(),
            lock_on_fault: self.alive.extra.as_ref().map_or(&[], |e| &e.lock_on_fault),
            held: self.held,
            aio: &self.alive.aio,
            inherited: self.inherited,
        };
        let alive = self.alive;
        // Before anything is mapped: the kernel does not change the executable while the old one, ours, is mapped, and
        // the program may be rewake itself.
        if !self.held.in_place {
            let exe = number(Handed::File(alive.mm.exe_file_id)).map_err(|p| self.of(p))?;
            mm::restore_map(&mut self.steps, &alive.mm, exe);
        }
        mm::restore(&mut self.steps, &alive.mm, self.pages, &layout).map_err(|p| self.of(p))?;
        let mdwe = alive.extra.as_ref().and_then(|e| e.mdwe).unwrap_or(0);
        let thp_disabled = alive.mm.thp_disabled.unwrap_or(false);
        attributes::restore_memory_policy(&mut self.steps, thp_disabled, mdwe);
        if let Some(later) = &alive.later {
            lazy::register(&mut self.steps, &lazy::mappings(&alive.mm, later), self.socket);
        }
        Ok(())
    }

    /// Root, working directory, umask.
    fn file_system(&mut self, lent: &HashMap<Handed, i32>) -> Result<()> {
        let fs = &self.alive.fs;
        let steps = &mut self.steps;
        let enter = |steps: &mut Steps, id: u32, what: &'static str| {
            let fd = lent.get(&Handed::File(id)).copied().unwrap_or(-1);
            steps.must(Label::Text(what), op(libc::SYS_fchdir, &[fd as u64]));
        };
        if !self.env.plain_root {
            enter(steps, fs.root_id, "entering the root directory");
            let here = steps.script.cstr(b".");
            steps.must(
                Label::Text("changing the root directory"),
                op(libc::SYS_chroot, &[here.address]),
            );
        }
        enter(steps, fs.cwd_id, "entering the working directory");
        let umask = u64::from(fs.umask.unwrap_or(0o22));
        steps.may(Label::Text("setting the umask"), op(libc::SYS_umask, &[umask]));
        Ok(())
    }

    /// Receives the task's descriptors. They come in ascending order, so each lands on a number that is not above its
    /// own: moving them from the last to the first never hits one that is still to be moved.
    fn descriptors(&mut self) -> Result<()> {
        let fds = &self.alive.fds;
        let mut taken: std::collections::HashSet<u32> = [self.socket as u32].into();
        // Numbers below are taken for good.
        let mut free = 0;
        for chunk in fds.chunks(A_MESSAGE) {
            receive(&mut self.steps, self.socket, chunk.len());
            while taken.contains(&free) {
                free += 1;
            }
            let landing: Vec<u32> =
                (free..).filter(|n| !taken.contains(n)).take(chunk.len()).collect();
            for (fd, landed) in chunk.iter().zip(landing).rev() {
                let label = Label::Descriptor(fd.fd);
                let cloexec = fd.flags & 1 != 0;
                let (from, to) = (u64::from(landed), u64::from(fd.fd));
                if landed != fd.fd {
                    let flags = if cloexec { libc::O_CLOEXEC as u64 } else { 0 };
                    self.steps.must(label, op(libc::SYS_dup3, &[from, to, flags]));
                    self.steps.must(label, op(libc::SYS_close, &[from]));
                } else if cloexec {
                    let set = op(libc::SYS_fcntl, &[to, libc::F_SETFD as u64, 1]);
                    self.steps.must(label, set);
                }
            }
            taken.extend(chunk.iter().map(|f| f.fd));
            self.messages.push(chunk.iter().map(|f| Handed::File(f.id)).collect());
        }
        Ok(())
    }

    fn process(&mut self) {
        let tc = &self.task.tc;
        let leader = &self.alive.threads[0];
        let extra = self.alive.extra.as_ref();
        name_steps(&mut self.steps, &tc.comm);
        attributes::restore_process(
            &mut self.steps,
            tc.child_subreaper.unwrap_or(false),
            tc.membarrier_registration_mask.unwrap_or(0),
            extra.and_then(|e| e.tsc).unwrap_or(0),
            extra.and_then(|e| e.io_flusher).unwrap_or(false),
        );
        // CRIU reads the hexadecimal file as decimal: its value cannot be told from a right one; ours is beside it.
        let personality = extra.and_then(|e| e.personality).unwrap_or(tc.personality);
        if personality != self.env.personality {
            self.steps.must(
                Label::Text("setting the personality"),
                op(libc::SYS_personality, &[u64::from(personality)]),
            );
        }
        thread_basics(&mut self.steps, leader);
    }

    fn threads(&mut self, threads: &[ThreadPlan], headers: &[u64]) {
        let flags = (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM) as u64;
        for (n, (thread, header)) in threads.iter().zip(headers).enumerate() {
            let all = &self.alive.threads;
            let own = || all[0].default_slack();
            lend_timer_slack(&mut self.steps, all[n + 1].default_slack().or_else(own));
            clone_op(&mut self.steps, Some(thread.tid), flags, 0, *header);
        }
        // Each thread reports its first batch; a word that has changed already does not block.
        for header in headers {
            let done = header + rewake_agent::layout::offset::DONE as u64;
            self.steps.may(
                Label::Text("waiting for a thread"),
                op(libc::SYS_futex, &[done, libc::FUTEX_WAIT as u64, 0, 0]),
            );
        }
        // Timers may name threads, so they come after them.
        if let Some(entries) = &self.task.tc.timers {
            timers::restore_created(&mut self.steps, entries, self.env.timer_ids);
        }
        if let Some(entries) = &self.task.tc.rlimits {
            self.warnings.extend(limits::restore(
                &mut self.steps,
                entries,
                &self.env.limits,
                self.env.may_raise,
            ));
        }
        if self.task.part.fills_table {
            self.steps.must(
                Label::Text("closing the agent's socket"),
                op(libc::SYS_close, &[self.socket as u64]),
            );
        }
    }
}

/// The audit system's login uid: only a task itself may set it, and only once unless it has `CAP_AUDIT_CONTROL`.
fn login_uid_steps(steps: &mut Steps, uid: u32) {
    let label = Label::Text("setting the login uid");
    let path = steps.script.cstr(b"/proc/self/loginuid");
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
    let open =
        steps.wish(label, op(libc::SYS_openat, &[libc::AT_FDCWD as u64, path.address, flags]));
    let number = uid.to_string();
    let text = steps.data(number.as_bytes());
    let write = op(libc::SYS_write, &[0, text.address, number.len() as u64]);
    steps.wish(label, write.arg_result(0, open as u32, 0));
    steps.may(label, op(libc::SYS_close, &[0]).arg_result(0, open as u32, 0));
}

fn finish_steps(
    steps: &mut Steps,
    task: &Task,
    alive: &Alive,
    env: &Environment,
    makes_memory: bool,
    group_helpers: &[i32],
) {
    let leader = &alive.threads[0];
    if let Some(extra) = alive.extra.as_ref().filter(|_| makes_memory) {
        future::restore(steps, &alive.mm, extra);
    }
    for helper in group_helpers {
        steps.must(
            Label::Text("reaping a helper"),
            op(libc::SYS_wait4, &[*helper as u64, 0, WALL, 0]),
        );
    }
    // SIGCHLDs of helpers and zombies are pending: ignoring the signal for a moment takes them away.
    let ignore = steps.words(&[1, 0, 0, 0]);
    steps.must(
        Label::Signal(libc::SIGCHLD as u32),
        op(libc::SYS_rt_sigaction, &[libc::SIGCHLD as u64, ignore.address, 0, 8]),
    );
    signals::restore_actions(steps, &task.tc.sigactions);
    if let Some(uid) = task.tc.loginuid.filter(|uid| Some(*uid) != env.login_uid) {
        login_uid_steps(steps, uid);
    }
    // A filter needs no_new_privs or the capability that the credentials may be about to take away.
    let common = alive.common_filters();
    let filters = leader.seccomp.filters.get(..common).unwrap_or(&[]);
    seccomp::restore_filters(steps, filters, alive.threads.len() > 1);
    seccomp_steps(steps, leader, common);
    thread_credentials(steps, leader, env);
    attributes::restore_after_credentials(
        steps,
        alive.mm.dumpable,
        leader.thread.pdeath_sig.unwrap_or(0),
    );
    if let Some(queue) = &task.tc.signals_s {
        signals::restore_queue(steps, queue, task.pid, None);
    }
    if let Some(queue) = &leader.thread.signals_p {
        signals::restore_queue(steps, queue, task.pid, Some(task.pid));
    }
    if let Some(entries) = &task.tc.timers {
        timers::restore_armed(steps, entries);
    }
}
