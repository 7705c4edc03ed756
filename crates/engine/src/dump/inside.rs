//! What only a task itself can tell (asked through an agent) and what ptrace tells of its threads.

use super::outside::Outside;
use crate::error::{Context, Result};
use crate::freeze::{Life, Task};
use rewake_image::messages::{
    CoreEntry, March, RewakeThreadEntry, RseqEntry, SaEntry, TaskCoreEntry, TaskRlimitsEntry,
    TaskTimersEntry, ThreadCoreEntry,
};
use rewake_inject::live::{Live, Visited, after_rseq, mend_interrupted};
use rewake_inject::ring::Script;
use rewake_inject::tracee::Stopped;
use rewake_objects::memory::vma::status;
use rewake_objects::task::attributes::{self, Attributes};
use rewake_objects::task::{credentials, limits, registers, schedule, signals, timers};
use rewake_proc::status::Status;
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::sched::{self, Pin};
use rewake_sys::task::robust_list;
use rustix::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

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
    /// `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` as the task sees them: seconds, nanoseconds.
    pub clocks: [(u64, u64); 2],
    /// Was a signal delivered meanwhile? Its frame is new on some stack.
    pub delivered_signals: bool,
}

struct Answers {
    actions: Vec<SaEntry>,
    timers: TaskTimersEntry,
    limits: TaskRlimitsEntry,
    attributes: Attributes,
    clocks: [(u64, u64); 2],
    shared: Vec<ptrace::SigInfo>,
}

/// Puts an agent into the task, asks, and takes it out again if `cure` says so (a task that is going to be killed need
/// not be cured). On return every thread stands in an event stop.
///
/// # Errors
/// The task is gone, or the agent could not be put in.
pub fn survey(
    task: &mut Task,
    outside: &Outside,
    pidfd: &OwnedFd,
    pin: &mut Pin,
    cure: bool,
) -> Result<(Inside, Option<Live>)> {
    let (pid, comm) = (task.pid(), task.comm().to_vec());
    let mut xsave = vec![0u8; registers::XSAVE_MAX];
    let mut threads: Vec<Stopped> = std::mem::take(&mut task.threads);
    let result = (|| {
        pin.to(task.stat.processor as usize);
        let leader = threads.remove(0);
        let group_stop = leader.group_stop();
        let leader_regs = leader.registers().of(pid, &comm)?;
        let leader_state = thread_state(&leader, &leader_regs, &mut xsave, task, outside, pid)?;
        let shared = ptrace::queued_signals(pid, true).of(pid, &comm)?;
        let mut asked = None;
        let memory = outside.memory.try_clone().of(pid, &comm)?;
        let (live, results) = Live::inject(leader, pidfd.as_fd(), memory, &rooms(outside), |base| {
            let mut script = Script::new(base);
            let actions = signals::ask_actions(&mut script);
            let timers = timers::ask(&mut script, &outside.timers[..outside.timers.len().min(32)]);
            let limits = limits::ask(&mut script);
            let attributes = attributes::ask(&mut script);
            let clocks = script.space(32);
            for (i, clock) in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].into_iter().enumerate() {
                let to = clocks.address + i as u64 * 16;
                script.push(rewake_agent::layout::Op::new(libc::SYS_clock_gettime, &[clock as u64, to]));
            }
            let room = rewake_inject::live::OPS - script.ops.len();
            let flags = ask_cloexec(&mut script, &outside.fds[..outside.fds.len().min(room)]);
            asked = Some((actions, timers, limits, attributes, clocks, flags));
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
        // The closure ran: the batch was executed.
        let Some((actions, timers_asked, limits_asked, attributes_asked, clocks, flags)) = asked
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
        let mut states = vec![(pid, leader_state)];
        let mut visited = Vec::with_capacity(threads.len());
        // By CPU, so that we move seldom.
        let mut buffer = Vec::new();
        let mut by_cpu: Vec<(u32, Stopped)> = Vec::with_capacity(threads.len());
        for thread in threads.drain(..) {
            let stat = task.dir.task(thread.tid()).and_then(|dir| dir.stat(&mut buffer));
            by_cpu.push((stat.map_or(0, |s| s.processor), thread));
        }
        by_cpu.sort_by_key(|(cpu, thread)| (*cpu, thread.tid()));
        for (cpu, thread) in by_cpu {
            pin.to(cpu as usize);
            let tid = thread.tid();
            let regs = thread.registers().of(pid, &comm)?;
            let status =
                task.dir.task(tid).and_then(|dir| dir.status(&mut buffer)).of(pid, &comm)?;
            // Threads change their credentials together but in the rarest programs.
            let alike = same_credentials(&status, &outside.status);
            let (thread, result) = live.visit(thread, &regs, !alike).of(pid, &comm)?;
            // A signal may have been delivered meanwhile.
            let regs = thread.registers().of(pid, &comm)?;
            let mut state = thread_state(&thread, &regs, &mut xsave, task, outside, pid)?;
            state.visited(&result);
            state.status = Some(status);
            states.push((tid, state));
            visited.push(thread);
        }
        visited.sort_by_key(Stopped::tid);
        states[1..].sort_by_key(|(tid, _)| *tid);
        threads = visited;
        pin.to(task.stat.processor as usize);
        let mut inside = build(task, outside, answers, states, cloexec)?;
        inside.delivered_signals = live.delivered_signals();
        if cure {
            let mut leader = live.cure().of(pid, &comm)?;
            leader.set_group_stop(group_stop);
            threads.insert(0, leader);
            Ok((inside, None))
        } else {
            Ok((inside, Some(live)))
        }
    })();
    task.threads = threads;
    result
}

fn same_credentials(a: &Status, b: &Status) -> bool {
    let facts = |s: &Status| {
        (s.uid, s.gid, s.cap_inh, s.cap_prm, s.cap_eff, s.cap_bnd, s.cap_amb, s.no_new_privs)
    };
    facts(a) == facts(b) && a.groups == b.groups
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

struct ThreadState {
    core: ThreadCoreEntry,
    info: rewake_image::messages::ThreadInfoX86,
    extra: RewakeThreadEntry,
    mask: u64,
    /// Of threads other than the leader, if they have credentials of their own.
    securebits: Option<u32>,
    /// Of threads other than the leader.
    status: Option<Status>,
}

impl ThreadState {
    fn visited(&mut self, visited: &Visited) {
        let result = &visited.result;
        self.securebits = visited.securebits;
        self.info.clear_tid_addr = result.tid_address;
        self.core.sas =
            Some(signals::alternate_stack(result.ss_sp, result.ss_size, result.ss_flags as u32));
        // The kernel stores an int.
        self.core.pdeath_sig = Some(result.pdeath_sig as u32).filter(|s| *s != 0);
    }
}

const EINTR: u64 = -4i64 as u64;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Registers for the image: an interrupted system call is made again, as CRIU writes it; where the kernel's restart
/// block is needed the image says `EINTR`, and our own extra says how to do better.
fn for_image(regs: &Registers, extra: &mut RewakeThreadEntry, outside: &Outside) -> Registers {
    if (regs.orig_rax as i64) < 0 {
        return *regs;
    }
    let back = regs.rip.wrapping_sub(2);
    match regs.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
            Registers { rax: regs.orig_rax, rip: back, ..*regs }
        }
        ERESTART_RESTARTBLOCK => {
            extra.again = vec![interrupted_call(regs, back, outside), back];
            Registers { rax: EINTR, ..*regs }
        }
        _ => match mend_interrupted(regs) {
            Some(_) => Registers { rax: regs.orig_rax, rip: back, ..*regs },
            None => *regs,
        },
    }
}

/// The number of the call that has a restart block. If it was restarted before, the registers name restart_syscall(2);
/// what it was then stands in the code, for C libraries load the number right before the instruction at `back`, or can
/// be told from the arguments, if it was a sleep.
fn interrupted_call(regs: &Registers, back: u64, outside: &Outside) -> u64 {
    const MOV_EAX: u8 = 0xb8;
    const CLOCKS: u64 = 16;
    const LOWEST_POINTER: u64 = 1 << 16;
    if regs.orig_rax != libc::SYS_restart_syscall as u64 {
        return regs.orig_rax;
    }
    let mut code = [0u8; 5];
    let read = outside.memory.read_exact_at(&mut code, back.wrapping_sub(5));
    if let (Ok(()), [MOV_EAX, a, b, c, d]) = (read, code) {
        return u64::from(u32::from_le_bytes([a, b, c, d]));
    }
    let is_time = |address: u64| {
        let mut bytes = [0u8; 16];
        let read = outside.memory.read_exact_at(&mut bytes, address);
        let nanoseconds = u64::from_ne_bytes([
            bytes[8], bytes[9], bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15],
        ]);
        read.is_ok() && bytes != [0; 16] && nanoseconds < 1_000_000_000
    };
    let pointer_or_null = |v: u64| v == 0 || v >= LOWEST_POINTER;
    if regs.rdi < CLOCKS && regs.rsi == 0 && is_time(regs.rdx) && pointer_or_null(regs.r10) {
        libc::SYS_clock_nanosleep as u64
    } else if pointer_or_null(regs.rsi) && is_time(regs.rdi) {
        libc::SYS_nanosleep as u64
    } else {
        regs.orig_rax
    }
}

fn thread_state(
    thread: &Stopped,
    regs: &Registers,
    xsave: &mut [u8],
    task: &Task,
    outside: &Outside,
    pid: i32,
) -> Result<ThreadState> {
    let tid = thread.tid();
    let comm = task.comm();
    let at = |what: &'static str| {
        move |e: rewake_sys::SyscallError| format!("thread {tid}: {what}: {e}")
    };
    let len = ptrace::regset(tid, ptrace::NT_X86_XSTATE, xsave)
        .or_else(|_| ptrace::regset(tid, ptrace::NT_PRFPREG, xsave))
        .map_err(at("reading FPU registers"))
        .of(pid, comm)?;
    let mut extra = RewakeThreadEntry { tid: tid as u32, ..RewakeThreadEntry::default() };
    let image_regs = for_image(&after_rseq(tid, &outside.memory, regs), &mut extra, outside);
    let mask = ptrace::signal_mask(tid).map_err(at("reading the signal mask")).of(pid, comm)?;
    let queue =
        ptrace::queued_signals(tid, false).map_err(at("reading queued signals")).of(pid, comm)?;
    let (futex_rla, futex_rla_len) =
        robust_list(tid).map_err(at("reading the robust list")).of(pid, comm)?;
    let mut core = ThreadCoreEntry {
        futex_rla,
        futex_rla_len: futex_rla_len as u32,
        blk_sigset: Some(mask),
        signals_p: Some(signals::queue(queue)),
        ..ThreadCoreEntry::default()
    };
    if let Ok(config) = ptrace::rseq_config(tid) {
        core.rseq_entry = Some(RseqEntry {
            rseq_abi_pointer: config.pointer,
            rseq_abi_size: config.size,
            signature: config.signature,
            rseq_cs_pointer: None,
        });
    }
    let attr = sched::attributes(tid).map_err(at("reading scheduling attributes")).of(pid, comm)?;
    let nice = sched::nice(tid).unwrap_or(attr.nice);
    schedule::survey(&mut core, &mut extra, &attr, nice);
    extra.affinity = sched::affinity(tid).unwrap_or_default();
    extra.io_priority = sched::io_priority(tid).ok();
    if let Ok(sud) = ptrace::sud_config(tid)
        && sud.mode != 0
    {
        extra.syscall_dispatch = vec![sud.mode, sud.selector, sud.offset, sud.len];
    }
    let info = registers::survey(&image_regs, &xsave[..len], 0)
        .map_err(|p| crate::Error::of(pid, comm, p))?;
    Ok(ThreadState { core, info, extra, mask, securebits: None, status: None })
}

fn build(
    task: &Task,
    outside: &Outside,
    answers: Answers,
    states: Vec<(i32, ThreadState)>,
    cloexec: Vec<bool>,
) -> Result<Inside> {
    let (pid, comm) = (task.pid(), task.comm());
    let Answers { actions, timers, limits, attributes, clocks, shared } = answers;
    let mut cores = Vec::with_capacity(states.len());
    let mut extra = Vec::with_capacity(states.len());
    let mut buffer = Vec::new();
    for (tid, mut state) in states {
        let leader = tid == pid;
        let status = state.status.as_ref().unwrap_or(&outside.status);
        if leader {
            state.info.clear_tid_addr = attributes.tid_address;
            let (sp, flags, size) = attributes.alternate_stack;
            state.core.sas = Some(signals::alternate_stack(sp, size, flags));
            state.core.pdeath_sig = Some(attributes.pdeath_sig).filter(|s| *s != 0);
        }
        let securebits = state.securebits.unwrap_or(attributes.securebits);
        state.core.creds = Some(credentials::survey(status, securebits));
        state.core.comm = Some(status_name(task, tid, &mut buffer));
        state.core.cg_set = Some(1);
        // The file exists for every tid, but not below task/.
        state.extra.timer_slack = rewake_proc::read::ProcDir::open(tid).ok().and_then(|dir| {
            let text = dir.read_single("timerslack_ns", &mut buffer).ok()?;
            rewake_proc::single::timerslack_ns(text).ok()
        });
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
    }
    Ok(Inside { cores, extra, attributes, cloexec, clocks, delivered_signals: false })
}

/// The thread's name, from `comm`, where nothing is escaped.
fn status_name(task: &Task, tid: i32, buffer: &mut Vec<u8>) -> Vec<u8> {
    if tid == task.pid() {
        return task.comm().to_vec();
    }
    task.dir
        .read_single(&format!("task/{tid}/comm"), buffer)
        .ok()
        .and_then(|text| rewake_proc::single::comm(text).ok().map(<[u8]>::to_vec))
        .unwrap_or_else(|| task.comm().to_vec())
}
