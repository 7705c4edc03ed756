//! What only a task itself can tell (asked through an agent) and what ptrace tells of its threads.

use super::outside::Outside;
use super::thread::{self, ThreadState};
use crate::error::{Context, Result};
use crate::freeze::{Held, Life, Task};
use rewake_image::messages::{
    CoreEntry, March, RewakeThreadEntry, SaEntry, TaskCoreEntry, TaskRlimitsEntry, TaskTimersEntry,
};
use rewake_inject::live::{Live, Target};
use rewake_inject::ring::Script;
use rewake_inject::tell::telling_signal;
use rewake_inject::tracee::Stopped;
use rewake_inject::visit::Host;
use rewake_objects::Problem;
use rewake_objects::memory::vma::status;
use rewake_objects::task::attributes::{self, Attributes};
use rewake_objects::task::{credentials, landlock, limits, registers, seccomp, signals, timers};
use rewake_sys::ptrace;
use rewake_sys::sched::Pin;
use rustix::fd::{AsFd, OwnedFd};

/// A task as it tells of itself.
#[derive(Debug)]
pub struct Inside {
    /// Cores of the threads, the leader's first, with their tids.
    pub cores: Vec<(i32, CoreEntry)>,
    /// What the format has no place for, a thread each.
    pub extra: Vec<RewakeThreadEntry>,
    /// Attributes of the process.
    pub attributes: Attributes,
    /// Close-on-exec flags of the descriptors, in the order of `Outside::fds`.
    pub cloexec: Vec<bool>,
    /// What applies to each thread, in the order of `cores`.
    pub seccomp: Vec<seccomp::State>,
    /// What cannot be saved.
    pub problems: Vec<Problem>,
    /// `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` as the task sees them: seconds, nanoseconds.
    pub clocks: [(u64, u64); 2],
}

impl Inside {
    /// Adds the threads' filters to those of the tree.
    pub fn number_filters(&mut self, filters: &mut seccomp::Chains) {
        let uniform = self.seccomp.windows(2).all(|pair| pair[0] == pair[1]);
        for (n, ((_, core), state)) in self.cores.iter_mut().zip(&self.seccomp).enumerate() {
            if let Some(thread) = &mut core.thread_core
                && !(uniform && n > 0 && !state.filters.is_empty())
            {
                thread.seccomp_mode = state.mode();
                thread.seccomp_filter = filters.add(state, uniform);
            }
        }
    }
}

struct Answers {
    actions: Vec<SaEntry>,
    timers: TaskTimersEntry,
    limits: TaskRlimitsEntry,
    attributes: Attributes,
    clocks: [(u64, u64); 2],
    shared: Vec<ptrace::SigInfo>,
}

/// Puts an agent into the task, where it stays, and asks. All other threads stand in a ptrace stop on return.
///
/// # Errors
/// The task is gone, or the agent could not be put in.
pub fn survey(
    held: &mut Held,
    outside: &Outside,
    pidfd: &OwnedFd,
    witnesses: &super::Witnesses,
    mut pin: Option<&mut Pin>,
) -> Result<Inside> {
    let task = held.task.clone();
    let task = task.as_ref();
    let (pid, comm) = (task.pid(), task.comm().to_vec());
    let mut threads: Vec<Stopped> = std::mem::take(&mut held.threads);
    let agent = &mut held.agent;
    // A thread that is made while we are pinned would be pinned beside us.
    if let Some(pin) = pin.as_deref_mut().filter(|_| thread::needs_help(task)) {
        pin.release();
    }
    let result = thread::with_facts(task, || {
        if let Some(pin) = pin {
            pin.to(task.stat.processor as usize);
        }
        let mut xsave = vec![0u8; registers::XSAVE_MAX];
        let mut states = threads
            .iter()
            .map(|t| thread::state(t, &mut xsave, task, outside))
            .collect::<Result<Vec<_>>>()?;
        let shared = ptrace::queued_signals(pid, true).of(pid, &comm)?;
        let status = &outside.status;
        let mut problems = Vec::new();
        // It will not stand still later on.
        states[0].add_seccomp(status, &mut problems);
        let pending = states.iter().fold(status.shd_pnd, |all, state| all | state.pending);
        let leader = threads.remove(0);
        let mut asked = None;
        let target = Target {
            pidfd: pidfd.as_fd(),
            memory: outside.memory.try_clone().of(pid, &comm)?,
            candidates: &rooms(outside),
            signal: telling_signal(status.sig_ign, status.sig_cgt, pending),
        };
        let (live, results) = Live::inject(leader, target, |base| {
            let mut script = Script::new(base);
            let actions = signals::ask_actions(&mut script);
            let timers = timers::ask(&mut script, &outside.timers[..outside.timers.len().min(32)]);
            let limits = limits::ask(&mut script);
            let attributes = attributes::ask(&mut script);
            let landlock = landlock::ask(&mut script, own_pid());
            let clocks = script.space(32);
            for (i, clock) in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].into_iter().enumerate() {
                let to = clocks.address + i as u64 * 16;
                script.push(rewake_agent::layout::Op::new(libc::SYS_clock_gettime, &[clock as u64, to]));
            }
            let room = rewake_inject::live::OPS - script.ops.len();
            let flags = ask_cloexec(&mut script, &outside.fds[..outside.fds.len().min(room)]);
            asked = Some((actions, timers, limits, attributes, clocks, landlock, flags));
            script
        })
        .map_err(|e| match e {
            rewake_inject::Error::Inside { errno: rewake_sys::Errno::MFILE, .. } => crate::Error::new(format!(
                "process {pid} ({}): its table of descriptors is full; such a process cannot be saved yet",
                rewake_objects::problem::text(&comm)
            ))
            .hint(format!("let it have some more: prlimit --pid {pid} --nofile=…")),
            e => crate::Error::new(format!("process {pid} ({}): {e}", rewake_objects::problem::text(&comm))),
        })?;
        let live = agent.insert(live);
        // The closure ran: the batch was executed.
        let Some((actions, timers_asked, limits_asked, attributes_asked, clocks, landlock, flags)) =
            asked
        else {
            return Err(crate::Error::new("the agent ran without a script"));
        };
        let first = outside.timers.len().min(32);
        let mut answers = Answers {
            actions: signals::read_actions(&results, actions),
            timers: timers::read(&results, &timers_asked, &outside.timers[..first]),
            limits: limits::read(&results, limits_asked),
            attributes: attributes::read(&results, attributes_asked),
            clocks: [0, 16].map(|at| (results.u64(clocks, at), results.u64(clocks, at + 8))),
            shared,
        };
        // We may have capabilities that it lacks: then another one decides.
        let (uid, gid) = (status.uid.real, status.gid.real);
        if landlock::forbidden(&results, landlock)
            && let Some(witness) = witnesses.of(uid, gid)
        {
            let mut script = Script::new(live.data_base());
            let asked = landlock::ask(&mut script, witness);
            if landlock::forbidden(&live.run(&script).of(pid, &comm)?, asked) {
                problems.push(landlock::problem());
            }
        }
        for chunk in outside.timers[first..].chunks(64) {
            let mut script = Script::new(live.data_base());
            let asked = timers::ask(&mut script, chunk);
            let results = live.run(&script).of(pid, &comm)?;
            answers.timers.posix.extend(timers::read(&results, &asked, chunk).posix);
        }
        let mut cloexec: Vec<bool> = flags.map(|i| results.or_zero(i) & 1 != 0).collect();
        for chunk in outside.fds[cloexec.len()..].chunks(rewake_inject::live::OPS) {
            let mut script = Script::new(live.data_base());
            let flags = ask_cloexec(&mut script, chunk);
            let results = live.run(&script).of(pid, &comm)?;
            cloexec.extend(flags.map(|i| results.or_zero(i) & 1 != 0));
        }
        let hosts = threads
            .drain(..)
            .zip(&states[1..])
            .map(|(thread, state)| Host { thread, regs: state.regs, mask: state.mask })
            .collect();
        for ((thread, visited), state) in
            live.visit(hosts).of(pid, &comm)?.into_iter().zip(&mut states[1..])
        {
            state.visited(&visited);
            threads.push(thread);
        }
        Ok((answers, states, cloexec, problems))
    });
    held.threads = threads;
    let ((answers, mut states, cloexec, mut problems), facts) = result?;
    for (state, facts) in states.iter_mut().zip(facts) {
        if let Some(status) = &facts.status {
            state.add_seccomp(status, &mut problems);
        }
        state.add(facts);
    }
    let states = task.tids.iter().copied().zip(states);
    Ok(Inside { problems, ..build(task, outside, answers, states, cloexec) })
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

/// Adds the questions for the close-on-exec flags of `fds`; returns their indices.
fn ask_cloexec(script: &mut Script, fds: &[i32]) -> std::ops::Range<usize> {
    let first = script.ops.len();
    for fd in fds {
        let args = [*fd as u64, libc::F_GETFD as u64];
        script.push(rewake_agent::layout::Op::new(libc::SYS_fcntl, &args));
    }
    first..script.ops.len()
}

/// Executable private mappings with room for the agent's entry: the vdso first.
fn rooms(outside: &Outside) -> Vec<(u64, u64)> {
    let executable = libc::PROT_EXEC as u32;
    let is_vdso = |s: u32| s & status::VDSO != 0;
    let mut rooms: Vec<_> = outside
        .vmas
        .iter()
        .filter(|v| v.entry.prot & executable != 0 && v.entry.flags & libc::MAP_PRIVATE as u32 != 0)
        .filter(|v| v.entry.status & status::VSYSCALL == 0)
        .map(|v| (!is_vdso(v.entry.status), v.entry.start, v.entry.end))
        .collect();
    rooms.sort_unstable();
    rooms.into_iter().map(|(_, start, end)| (start, end)).collect()
}

fn build(
    task: &Task,
    outside: &Outside,
    answers: Answers,
    states: impl ExactSizeIterator<Item = (i32, ThreadState)>,
    cloexec: Vec<bool>,
) -> Inside {
    let (pid, comm) = (task.pid(), task.comm());
    let Answers { actions, timers, limits, attributes, clocks, shared } = answers;
    let mut cores = Vec::with_capacity(states.len());
    let mut extra = Vec::with_capacity(states.len());
    let mut seccomp = Vec::with_capacity(states.len());
    for (tid, mut state) in states {
        let leader = tid == pid;
        let status = state.status.as_ref().unwrap_or(&outside.status);
        if leader {
            state.info.clear_tid_addr = attributes.tid_address;
            let (sp, flags, size) = attributes.alternate_stack;
            state.core.sas = Some(signals::alternate_stack(sp, size, flags));
            state.core.pdeath_sig = Some(attributes.pdeath_sig).filter(|s| *s != 0);
            state.extra.timer_slack = Some(attributes.timer_slack);
        }
        let securebits = state.securebits.unwrap_or(attributes.securebits);
        state.core.creds = Some(credentials::survey(status, securebits));
        state.core.comm = Some(match &state.status {
            Some(status) => status.comm(),
            None => comm.to_vec(),
        });
        state.core.cg_set = Some(1);
        let tc = leader.then(|| TaskCoreEntry {
            task_state: match task.life {
                Life::Stopped(_) => 3,
                _ => 1,
            },
            exit_code: 0,
            personality: outside.values.personality,
            flags: task.stat.flags,
            blk_sigset: state.mask,
            comm: comm.to_vec(),
            timers: Some(timers.clone()),
            rlimits: Some(limits.clone()),
            signals_s: Some(signals::queue(shared.clone())),
            loginuid: Some(outside.values.loginuid.unwrap_or(u32::MAX)),
            oom_score_adj: Some(outside.values.oom_score_adj),
            sigactions: actions.clone(),
            child_subreaper: Some(attributes.child_subreaper),
            stop_signo: match task.life {
                Life::Stopped(signal) => Some(signal as u32),
                _ => None,
            },
            membarrier_registration_mask: Some(attributes.membarrier).filter(|m| *m != 0),
            ..TaskCoreEntry::default()
        });
        if leader {
            state.core.blk_sigset = None;
        }
        cores.push((
            tid,
            CoreEntry {
                mtype: March::X8664 as i32,
                thread_info: Some(state.info),
                tc,
                thread_core: Some(state.core),
                ..CoreEntry::default()
            },
        ));
        extra.push(state.extra);
        seccomp.push(state.seccomp);
    }
    let problems = Vec::new();
    Inside { cores, extra, attributes, cloexec, seccomp, problems, clocks }
}
