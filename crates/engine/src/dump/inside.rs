//! What only a task itself can tell (asked through an agent) and what ptrace tells of its threads.

use super::leader;
use super::outside::Outside;
use super::thread::{self, ThreadState};
use super::wave::Witnesses;
use crate::error::{Context, Result};
use crate::freeze::{Held, Life, Task};
use rewake_agent::layout::Op;
use rewake_image::messages::{
    CoreEntry, March, RewakePolicyEntry, RewakeThreadEntry, SaEntry, TaskCoreEntry,
    TaskRlimitsEntry, TaskTimersEntry,
};
use rewake_inject::enter::{Entry, Target};
use rewake_inject::live::Live;
use rewake_inject::ring::{Data, Results, Script};
use rewake_inject::tell::telling_signal;
use rewake_inject::visit::Host;
use rewake_objects::Problem;
use rewake_objects::memory::vma::status;
use rewake_objects::memory::{aio, future, numa};
use rewake_objects::task::attributes::{self, Attributes};
use rewake_objects::task::{
    credentials, keyrings, landlock, limits, registers, seccomp, signals, timers,
};
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
    /// What is done with new mappings.
    pub future: future::Future,
    /// NUMA policy of its first thread.
    pub policy: Option<RewakePolicyEntry>,
    /// NUMA policies of its mappings; of the owner of shared memory only.
    pub policies: Vec<RewakePolicyEntry>,
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
    future: future::Future,
    policy: Option<RewakePolicyEntry>,
    policies: Vec<RewakePolicyEntry>,
    clocks: [(u64, u64); 2],
    shared: Vec<ptrace::SigInfo>,
}

/// A task to be asked, as it looks from outside.
#[derive(Debug)]
pub struct Visible {
    /// What `/proc` tells.
    pub outside: Outside,
    /// A pidfd of it.
    pub pidfd: OwnedFd,
}

/// Puts agents into tasks, where they stay, and asks. All other threads stand in a ptrace stop on return. With `pin` the
/// calling thread works on the CPU where the first task is.
///
/// # Errors
/// A task is gone, or the agent could not be put in.
pub fn survey(
    held: &mut [Held],
    seen: &[Visible],
    witnesses: &Witnesses,
    mut pin: Option<&mut Pin>,
) -> Result<Vec<Inside>> {
    // A thread that is made while we are pinned would be pinned beside us.
    let helped = |held: &Held| thread::needs_help(&held.task);
    if let Some(pin) = pin.as_deref_mut().filter(|_| held.iter().any(helped)) {
        pin.release();
    }
    let tasks: Vec<_> = held.iter().map(|held| held.task.clone()).collect();
    let (told, facts) = thread::with_facts(&tasks, seen, || {
        if let (Some(pin), Some(task)) = (pin, tasks.first()) {
            pin.to(task.stat.processor as usize);
        }
        ask_all(held, seen, witnesses)
    })?;
    let mut insides = Vec::with_capacity(told.len());
    for (((task, Told { answers, mut states, cloexec, mut problems }), facts), seen) in
        tasks.iter().zip(told).zip(facts).zip(seen)
    {
        let mut facts = facts.into_iter();
        for (state, facts) in states.iter_mut().zip(facts.by_ref()) {
            if let Some(status) = &facts.status {
                state.add_seccomp(status, &mut problems);
            }
            state.add(facts);
        }
        let mut tids = task.tids.clone();
        if let (Some(status), Some(facts)) = (task.leader_ended, facts.next()) {
            match leader::ended(task, status, facts, &seen.outside, &states) {
                Ok(state) => {
                    tids.insert(0, task.pid());
                    states.insert(0, state);
                }
                Err(problem) => problems.push(problem),
            }
        }
        let states = tids.into_iter().zip(states);
        insides.push(Inside { problems, ..build(task, &seen.outside, answers, states, cloexec) });
    }
    Ok(insides)
}

/// What a task and its tracer tell.
struct Told {
    answers: Answers,
    states: Vec<ThreadState>,
    cloexec: Vec<bool>,
    problems: Vec<Problem>,
}

/// What was asked in a task's first batch.
struct FirstBatch {
    actions: signals::AskedActions,
    timers: timers::Asked,
    limits: Data,
    attributes: attributes::Asked,
    future: future::Asked,
    policy: numa::Asked,
    /// Which mappings are asked for a policy, and the answers of those for which there is room.
    candidates: Vec<u64>,
    modes: numa::Modes,
    /// The operation that Landlock may forbid.
    landlock: usize,
    /// Operations that ask for keyrings.
    keyrings: usize,
    aio: std::ops::Range<usize>,
    clocks: Data,
    /// Operations that ask for close-on-exec flags, of as many descriptors as there is room for.
    flags: std::ops::Range<usize>,
}

/// POSIX timers that the first batch asks for.
const FIRST_TIMERS: usize = 32;

/// Contexts of asynchronous I/O that the first batch asks for; nobody has more.
const FIRST_CONTEXTS: usize = 32;

impl FirstBatch {
    fn ask(script: &mut Script, outside: &Outside) -> FirstBatch {
        let actions = signals::ask_actions(script);
        let timers = timers::ask(script, &outside.timers[..outside.timers.len().min(FIRST_TIMERS)]);
        let limits = limits::ask(script);
        let attributes = attributes::ask(script);
        let future = future::ask(script);
        let policy = numa::ask(script, None);
        let landlock = landlock::ask(script, own_pid());
        let keyrings = keyrings::ask(script);
        let aio = aio::ask(script, &outside.aio[..outside.aio.len().min(FIRST_CONTEXTS)]);
        let clocks = script.space(32);
        for (i, clock) in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].into_iter().enumerate() {
            let to = clocks.address + i as u64 * 16;
            script.push(Op::new(libc::SYS_clock_gettime, &[clock as u64, to]));
        }
        let room = rewake_inject::live::OPS - script.ops.len();
        let flags = ask_cloexec(script, &outside.fds[..outside.fds.len().min(room)]);
        let candidates = if outside.owns.vm { numa::candidates(&outside.vmas) } else { Vec::new() };
        let room = rewake_inject::live::OPS - script.ops.len();
        let modes = numa::ask_modes(script, &candidates[..candidates.len().min(room)]);
        FirstBatch {
            actions,
            timers,
            limits,
            attributes,
            future,
            policy,
            candidates,
            modes,
            landlock,
            keyrings,
            aio,
            clocks,
            flags,
        }
    }
}

/// What ptrace tells of a task.
struct Traced {
    states: Vec<ThreadState>,
    /// Signals queued for the process.
    shared: Vec<ptrace::SigInfo>,
    problems: Vec<Problem>,
    rooms: Vec<(u64, u64)>,
    /// By which its threads can tell.
    signal: i32,
}

impl Traced {
    fn of(held: &Held, outside: &Outside, xsave: &mut [u8]) -> Result<Traced> {
        let task = held.task.as_ref();
        let (pid, comm) = (task.pid(), task.comm());
        let mut states = held
            .threads
            .iter()
            .map(|t| thread::state(t, xsave, task, outside))
            .collect::<Result<Vec<_>>>()?;
        let shared = ptrace::queued_signals(task.tid(), true).of(pid, comm)?;
        let status = &outside.status;
        let mut problems = Vec::new();
        // It will not stand still later on.
        states[0].add_seccomp(status, &mut problems);
        let pending = states.iter().fold(status.shd_pnd, |all, state| all | state.pending);
        let signal = telling_signal(status.sig_ign, status.sig_cgt, pending);
        Ok(Traced { states, shared, problems, rooms: rooms(outside), signal })
    }
}

fn ask_all(held: &mut [Held], seen: &[Visible], witnesses: &Witnesses) -> Result<Vec<Told>> {
    let mut xsave = vec![0u8; registers::XSAVE_MAX];
    // Whatever can fail comes before the first leader is let go.
    let traced = held
        .iter()
        .zip(seen)
        .map(|(held, seen)| Traced::of(held, &seen.outside, &mut xsave))
        .collect::<Result<Vec<_>>>()?;
    let mut asked: Vec<Option<FirstBatch>> = seen.iter().map(|_| None).collect();
    let results = inject(held, seen, &traced, asked.iter_mut(), |asked, script, outside| {
        *asked = Some(FirstBatch::ask(script, outside));
    });
    let mut told = Vec::with_capacity(held.len());
    for ((((held, seen), traced), results), asked) in
        held.iter_mut().zip(seen).zip(traced).zip(results).zip(asked)
    {
        let results = results.map_err(|e| cannot_inject(&held.task, e))?;
        // The closure ran: the batch was executed.
        let asked = asked.ok_or_else(|| crate::Error::new("an agent ran without a script"))?;
        told.push(ask_on(held, &seen.outside, witnesses, traced, &asked, &results)?);
    }
    Ok(told)
}

/// Puts agents into tasks, each with a first batch that `ask` makes with one of `with`.
fn inject<'w, W: 'w>(
    held: &mut [Held],
    seen: &[Visible],
    traced: &[Traced],
    with: impl Iterator<Item = &'w mut W>,
    ask: impl Fn(&mut W, &mut Script, &Outside) + Copy,
) -> Vec<rewake_inject::Result<Results>> {
    let entries = held
        .iter_mut()
        .zip(seen)
        .zip(traced)
        .zip(with)
        .map(|(((held, seen), traced), with)| Entry {
            leader: held.threads.remove(0),
            target: Target {
                pidfd: seen.pidfd.as_fd(),
                memory: seen.outside.memory.clone(),
                candidates: &traced.rooms,
                signal: traced.signal,
                start: (traced.states[0].regs, traced.states[0].mask),
            },
            first: move |base| {
                let mut script = Script::new(base);
                ask(with, &mut script, &seen.outside);
                script
            },
        })
        .collect();
    let injected = Live::inject_all(entries);
    // All agents are where they are taken out of, whatever happens, before the first failure is told.
    let mut results = Vec::with_capacity(held.len());
    for (held, injected) in held.iter_mut().zip(injected) {
        results.push(injected.map(|(live, results)| {
            held.agent = Some(live);
            results
        }));
    }
    results
}

/// Puts agents into tasks, where they stay, and asks nothing.
///
/// # Errors
/// As [`survey`].
pub fn enter(held: &mut [Held], seen: &[Visible]) -> Result<()> {
    let mut xsave = vec![0u8; registers::XSAVE_MAX];
    let traced = held
        .iter()
        .zip(seen)
        .map(|(held, seen)| Traced::of(held, &seen.outside, &mut xsave))
        .collect::<Result<Vec<_>>>()?;
    let mut nothing = vec![(); held.len()];
    let results = inject(held, seen, &traced, nothing.iter_mut(), |(), script, _| {
        script.push(Op::new(libc::SYS_getpid, &[]));
    });
    for (held, result) in held.iter().zip(results) {
        result.map_err(|e| cannot_inject(&held.task, e))?;
    }
    Ok(())
}

fn cannot_inject(task: &Task, e: rewake_inject::Error) -> crate::Error {
    let (pid, comm) = (task.pid(), rewake_objects::problem::text(task.comm()));
    match e {
        rewake_inject::Error::Inside { errno: rewake_sys::Errno::MFILE, .. } => {
            crate::Error::new(format!(
                "process {pid} ({comm}): its table of descriptors is full, and it handles every signal by which its agent could do without"
            ))
            .hint(format!("let it have some more: prlimit --pid {pid} --nofile=…"))
        }
        e => crate::Error::new(format!("process {pid} ({comm}): {e}")),
    }
}

/// Reads the answers of a task's first batch, and asks for what had no room in it, and the other threads.
fn ask_on(
    held: &mut Held,
    outside: &Outside,
    witnesses: &Witnesses,
    traced: Traced,
    asked: &FirstBatch,
    results: &Results,
) -> Result<Told> {
    let task = held.task.clone();
    let (pid, comm) = (task.pid(), task.comm());
    let Some(live) = &held.agent else {
        return Err(crate::Error::new(format!("process {pid} has no agent")));
    };
    let Traced { mut states, shared, mut problems, .. } = traced;
    problems.extend(aio::read(results, asked.aio.clone(), &outside.aio));
    problems.extend(keyrings::read(results, asked.keyrings));
    let clocks = asked.clocks;
    let first = outside.timers.len().min(FIRST_TIMERS);
    let mut answers = Answers {
        actions: signals::read_actions(results, asked.actions),
        timers: timers::read(results, &asked.timers, &outside.timers[..first]),
        limits: limits::read(results, asked.limits),
        attributes: attributes::read(results, asked.attributes),
        future: future::read(results, asked.future),
        policy: numa::read(results, asked.policy, None),
        policies: policies(live, asked, results).of(pid, comm)?,
        clocks: [0, 16].map(|at| (results.u64(clocks, at), results.u64(clocks, at + 8))),
        shared,
    };
    // We may have capabilities that it lacks: then another one decides.
    let (uid, gid) = (outside.status.uid.real, outside.status.gid.real);
    if landlock::forbidden(results, asked.landlock)
        && let Some(witness) = witnesses.of(uid, gid)
    {
        let mut script = Script::new(live.data_base());
        let asked = landlock::ask(&mut script, witness);
        if landlock::forbidden(&live.run(&script).of(pid, comm)?, asked) {
            problems.push(landlock::problem());
        }
    }
    for chunk in outside.timers[first..].chunks(64) {
        let mut script = Script::new(live.data_base());
        let asked = timers::ask(&mut script, chunk);
        let results = live.run(&script).of(pid, comm)?;
        answers.timers.posix.extend(timers::read(&results, &asked, chunk).posix);
    }
    let mut cloexec: Vec<bool> = asked.flags.clone().map(|i| results.or_zero(i) & 1 != 0).collect();
    for chunk in outside.fds[cloexec.len()..].chunks(rewake_inject::live::OPS) {
        let mut script = Script::new(live.data_base());
        let flags = ask_cloexec(&mut script, chunk);
        let results = live.run(&script).of(pid, comm)?;
        cloexec.extend(flags.map(|i| results.or_zero(i) & 1 != 0));
    }
    for state in &mut states[1..] {
        if let Some(told) = outside.threads.get(&(state.extra.tid as i32)) {
            state.told(told);
        }
    }
    if outside.threads.is_empty() {
        let hosts = std::mem::take(&mut held.threads)
            .into_iter()
            .zip(&states[1..])
            .map(|(thread, state)| Host { thread, regs: state.regs, mask: state.mask })
            .collect();
        let visited = live.visit(hosts).of(pid, comm)?;
        for ((thread, visited), state) in visited.into_iter().zip(&mut states[1..]) {
            state.visited(&visited);
            held.threads.push(thread);
        }
    }
    Ok(Told { answers, states, cloexec, problems })
}

/// Asks for the policies of the mappings that have one.
fn policies(
    live: &Live,
    asked: &FirstBatch,
    results: &Results,
) -> rewake_inject::Result<Vec<RewakePolicyEntry>> {
    /// Their masks are long.
    const AT_ONCE: usize = 64;
    let (first, rest) = asked.candidates.split_at(asked.modes.len());
    let mut found = numa::read_modes(results, asked.modes, first);
    for chunk in rest.chunks(rewake_inject::live::OPS) {
        let mut script = Script::new(live.data_base());
        let asked = numa::ask_modes(&mut script, chunk);
        found.extend(numa::read_modes(&live.run(&script)?, asked, chunk));
    }
    let mut policies = Vec::new();
    for chunk in found.chunks(AT_ONCE) {
        let mut script = Script::new(live.data_base());
        let asked: Vec<_> =
            chunk.iter().map(|start| numa::ask(&mut script, Some(*start))).collect();
        let results = live.run(&script)?;
        let read = chunk
            .iter()
            .zip(asked)
            .filter_map(|(at, asked)| numa::read(&results, asked, Some(*at)));
        policies.extend(read);
    }
    Ok(policies)
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

/// Adds the questions for the close-on-exec flags of `fds`; returns their indices.
fn ask_cloexec(script: &mut Script, fds: &[i32]) -> std::ops::Range<usize> {
    let first = script.ops.len();
    for fd in fds {
        let args = [*fd as u64, libc::F_GETFD as u64];
        script.push(Op::new(libc::SYS_fcntl, &args));
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
        .filter(|v| v.entry.status & (status::VSYSCALL | status::UPROBES) == 0)
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
    let comm = task.comm();
    let Answers { actions, timers, limits, attributes, future, policy, policies, clocks, shared } =
        answers;
    let mut cores = Vec::with_capacity(states.len());
    let mut extra = Vec::with_capacity(states.len());
    let mut seccomp = Vec::with_capacity(states.len());
    for (tid, mut state) in states {
        let (leader, first) = (tid == task.pid(), tid == task.tid());
        let status = state.status.as_ref().unwrap_or(&outside.status);
        if first {
            state.info.clear_tid_addr = attributes.tid_address;
            let (sp, flags, size) = attributes.alternate_stack;
            state.core.sas = Some(signals::alternate_stack(sp, size, flags));
            state.core.pdeath_sig = Some(attributes.pdeath_sig).filter(|s| *s != 0);
            state.extra.timer_slack = Some(attributes.timer_slack);
            state.extra.default_timer_slack =
                Some(attributes.default_timer_slack).filter(|s| *s != 0);
        }
        let securebits = state.securebits.unwrap_or(attributes.securebits);
        state.core.creds = Some(credentials::survey(status, securebits));
        state.core.comm = Some(match &state.status {
            Some(status) => status.comm(),
            None => outside.status.comm(),
        });
        state.core.cg_set = Some(1);
        let tc = leader.then(|| TaskCoreEntry {
            task_state: match task.life {
                Life::Stopped(_) => 3,
                _ => 1,
            },
            exit_code: 0,
            personality: attributes.personality,
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
    Inside {
        cores,
        extra,
        attributes,
        future,
        policy,
        policies,
        cloexec,
        seccomp,
        problems,
        clocks,
    }
}
