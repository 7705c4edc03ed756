//! From birth to the moment when all are there: sessions, groups, children; and what a process gives up of what it came by.

use super::super::core_flag;
use super::super::heritage::Act;
use super::super::lineage::{Lineage, Node, Role};
use super::super::read::Task;
use super::super::terminal::terminal_steps;
use super::descriptors::{is_file, mapped};
use super::{Environment, FIRST_LENT, Handed, WALL, clone_op, name_steps, op};
use crate::error::{Error, Result};
use rewake_objects::Problem;
use rewake_objects::memory::{future, inherit, numa};
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::lend_timer_slack;
use std::collections::HashMap;

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const WEXITED: u64 = 4;
const WNOWAIT: u64 = 0x0100_0000;

/// The first script of a node: session, group, children.
pub(super) fn birth_steps(
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
pub fn opening_steps(
    steps: &mut Steps,
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    from_template: bool,
) {
    // The first of all data: there it is looked for.
    let gate = (at == 0 && env.gate).then(|| steps.words(&[0]));
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
    if let Some(gate) = gate {
        let wait = op(libc::SYS_futex, &[gate.address, libc::FUTEX_WAIT as u64, 0, 0]);
        // It fails if it is open already.
        steps.may(Label::Text("waiting for unix sockets"), wait);
    }
}

/// Makes a session, with its terminal: only children that are born later inherit it.
pub fn session_steps(steps: &mut Steps, tasks: &[Task], node: &Node, env: &Environment) {
    steps.must(Label::Text("making a session"), op(libc::SYS_setsid, &[]));
    if let Role::Task(i) = node.role
        && tasks[i].alive.is_some()
        && let Some(terminal) = env.terminals.get(&tasks[i].pid)
    {
        terminal_steps(steps, terminal);
    }
}

/// The default timer slack of a node, if it is a task whose images tell it.
pub fn default_slack(tasks: &[Task], node: &Node) -> Option<u64> {
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
pub(super) fn close_lent(steps: &mut Steps, env: &Environment) {
    let (first, last) = (FIRST_LENT as u64, (FIRST_LENT + env.lent.len()) as u64 - 1);
    let close = op(libc::SYS_close_range, &[first, last, 0]);
    steps.must(Label::Text("closing lent descriptors"), close);
}

/// Does a node have its descriptors together with others? Then these may still need what is lent when it does not any more.
pub(super) fn shares_table(lineage: &Lineage, at: usize) -> bool {
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
    numa::forget(steps);
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
pub fn zombie_steps(steps: &mut Steps, task: &Task) {
    name_steps(steps, &task.comm);
    let wait_status = task.tc.exit_code;
    let signal = wait_status & 0x7f;
    if signal == 0 {
        let code = u64::from(wait_status >> 8 & 0xff);
        steps.may(Label::Text("ending a zombie"), op(libc::SYS_exit_group, &[code]));
        return;
    }
    // The default action, unblocked.
    core_flag::prepare(steps, task);
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
