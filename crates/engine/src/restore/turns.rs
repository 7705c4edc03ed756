//! The longer way of the lineage: its steps are made one after the other, each by whoever's turn it is.

use super::build::{
    Environment, clone_op, default_slack, die_with, op, opening_steps, session_steps, zombie_steps,
};
use super::lineage::{Action, Lineage, Role};
use super::read::Task;
use super::undo::Created;
use super::{PATIENCE, Run};
use crate::error::{Context, Error, Result};
use crate::options::Pid;
use rewake_agent::layout::{FLAG_STORE, offset};
use rewake_inject::ring::Ring;
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::lend_timer_slack;
use std::collections::HashMap;

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const WCLONE: u64 = 0x8000_0000;

/// Where the number is that the first script of a node, whose ring is at `header`, expects its parent to have: it asks to die
/// with its parent, then looks for it.
pub(super) fn parent_cell(header: u64, data: usize) -> u64 {
    const LOOKS: usize = 1;
    let fifth = offset::ARGS + 5 * size_of::<u64>();
    Ring::ops_address(header, data) + (LOOKS * offset::OP + fifth) as u64
}

/// The scripts of one node: what it does first, and then when its turn comes. None on the quick way.
#[allow(clippy::too_many_arguments, reason = "one call site, all of it needed")]
pub(super) fn plan(
    tasks: &[Task],
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    rings: &HashMap<usize, u64>,
    parents: &HashMap<usize, u64>,
    from_template: bool,
    base: u64,
) -> Vec<Steps> {
    if lineage.sequence.is_empty() {
        return Vec::new();
    }
    let mut opening = Steps::new(base);
    opening_steps(&mut opening, lineage, at, env, from_template);
    let turns = lineage.sequence.iter().filter(|(node, _)| *node == at).map(|(_, action)| {
        let mut steps = Steps::new(base);
        if let (Action::Clone(child), None) = (action, lineage.nodes[at].pid) {
            // Whoever it clones looks for its parent first, and is told here who that is.
            let mut tell = op(libc::SYS_getpid, &[]);
            tell.flags |= FLAG_STORE;
            tell.args[5] = parents.get(child).copied().unwrap_or(0);
            steps.must(Label::Text("telling a child its parent"), tell);
        }
        turn(&mut steps, tasks, lineage, at, env, rings, *action);
        steps
    });
    std::iter::once(opening).chain(turns).collect()
}

fn turn(
    steps: &mut Steps,
    tasks: &[Task],
    lineage: &Lineage,
    at: usize,
    env: &Environment,
    rings: &HashMap<usize, u64>,
    action: Action,
) {
    let node = &lineage.nodes[at];
    let task = match node.role {
        Role::Task(i) => Some(&tasks[i]),
        _ => None,
    };
    match action {
        Action::Clone(child) => {
            let c = &lineage.nodes[child];
            // Helpers are told from children by their exit signal.
            let signal = match c.role {
                Role::Task(_) => libc::SIGCHLD as u64,
                _ => 0,
            };
            lend_timer_slack(steps, default_slack(tasks, c).or(default_slack(tasks, node)));
            clone_op(steps, c.pid, 0, signal, rings.get(&child).copied().unwrap_or(0));
        }
        Action::Session => session_steps(steps, tasks, node, env),
        Action::Group => {
            steps.must(Label::Text("making a process group"), op(libc::SYS_setpgid, &[0, 0]));
        }
        Action::Join(group) => {
            let group = if group == 0 { env.group } else { group };
            steps.must(
                Label::Text("joining the process group"),
                op(libc::SYS_setpgid, &[0, group as u64]),
            );
        }
        Action::Reaper(on) => {
            steps.must(
                Label::Text("setting the subreaper attribute"),
                op(libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER, u64::from(on), 0, 0, 0]),
            );
        }
        Action::Fall => {
            // All by itself: whoever else dies meanwhile, it comes to its parent or to nothing. Signals are blocked, and
            // that of the helper's death comes when the parent is another.
            const TOLD_BY: i32 = libc::SIGUSR1;
            let label = Label::Text("outliving a helper");
            let outlive = [PR_SET_PDEATHSIG, TOLD_BY as u64, 0, 0, 0];
            steps.must(label, op(libc::SYS_prctl, &outlive));
            let helper = steps.must(label, op(libc::SYS_getppid, &[])) as u32;
            let kill = op(libc::SYS_kill, &[0, libc::SIGKILL as u64]);
            steps.must(label, kill.arg_result(0, helper, 0));
            let told = steps.words(&[1 << (TOLD_BY - 1)]);
            steps.must_be(
                label,
                i64::from(TOLD_BY),
                op(libc::SYS_rt_sigtimedwait, &[told.address, 0, 0, 8]),
            );
            die_with(steps, task.map(|t| t.ppid));
        }
        Action::Exit => {
            steps.may(Label::Text("ending a helper"), op(libc::SYS_exit_group, &[0]));
        }
        Action::Reap => {
            steps.must(
                Label::Text("reaping a helper"),
                op(libc::SYS_wait4, &[u64::MAX, 0, WCLONE, 0]),
            );
        }
        Action::Die => {
            if let Some(task) = task {
                zombie_steps(steps, task);
            }
        }
        Action::Await(pid) => {
            let info = steps.data(&[0; 128]);
            // P_PID, WEXITED | WNOWAIT
            steps.must(
                Label::Text("waiting for a zombie to die"),
                op(libc::SYS_waitid, &[1, pid as u64, info.address, 0x0100_0004, 0]),
            );
        }
    }
}

impl Run<'_> {
    /// Everybody is made, put where it belongs, and gets the socket through which descriptors come.
    pub(super) fn take_turns(&self, rings: &[Ring], created: &mut Created) -> Result<()> {
        let nodes = &self.lineage.nodes;
        let mut pids: Vec<Pid> = nodes.iter().map(|n| n.pid.unwrap_or(0)).collect();
        let mut next = vec![1; nodes.len()];
        let missing = || Error::new("a step of the lineage has no script");
        self.await_turn(rings, 0, 1, self.plans[0].sequence.first().ok_or_else(missing)?, pids[0])?;
        created.note(nodes[0].pid, &self.pids);
        for (node, action) in &self.lineage.sequence {
            let ring = &rings[*node];
            let steps = self.plans[*node].sequence.get(next[*node]).ok_or_else(missing)?;
            next[*node] += 1;
            let number = self.give_turn(ring, steps)?;
            if matches!(action, Action::Exit | Action::Die) {
                continue;
            }
            self.await_turn(rings, *node, number, steps, pids[*node])?;
            if let Action::Clone(child) = *action {
                let results = ring.results(&steps.script);
                pids[child] = results.or_zero(steps.script.ops.len() - 1) as Pid;
                let opening = self.plans[child].sequence.first().ok_or_else(missing)?;
                self.await_turn(rings, child, 1, opening, pids[child])?;
                // A helper's number may be somebody else's soon; it dies with whoever has cloned it.
                if let Role::Task(_) = nodes[child].role {
                    created.note(nodes[child].pid, &self.pids);
                }
            }
        }
        let mut running = Vec::new();
        for (node, plan) in self.plans.iter().enumerate().filter(|(_, plan)| plan.task.is_some()) {
            running.push((node, self.give_turn(&rings[node], &plan.birth)?));
        }
        for (node, number) in running {
            self.await_turn(rings, node, number, &self.plans[node].birth, pids[node])?;
        }
        Ok(())
    }

    fn give_turn(&self, ring: &Ring, steps: &Steps) -> Result<u32> {
        ring.load(&steps.script)
            .and_then(|number| ring.ring().map(|()| number))
            .map_err(|e| Error::new(e.to_string()))
    }

    fn await_turn(
        &self,
        rings: &[Ring],
        node: usize,
        number: u32,
        steps: &Steps,
        pid: Pid,
    ) -> Result<()> {
        let (_, comm) = self.name(node);
        rings[node]
            .wait(number, |waited| match waited > PATIENCE {
                true => Err(rewake_inject::Error::Timeout { pid, seconds: waited.as_secs() }),
                false => self.still_there(pid),
            })
            .of(pid, &comm)?;
        self.check(steps, &rings[node].results(&steps.script), pid, &comm, &mut Vec::new())
    }
}
