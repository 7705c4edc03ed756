//! What ptrace and `/proc` tell of single threads.

use super::inside::Visible;
use super::outside::Outside;
use crate::error::{Context, Result};
use crate::freeze::Task;
use rewake_image::messages::{RewakeThreadEntry, RseqEntry, ThreadCoreEntry};
use rewake_inject::interrupted::{mend_interrupted, out_of_sequence};
use rewake_inject::tracee::Stopped;
use rewake_inject::visit::Visited;
use rewake_objects::Problem;
use rewake_objects::iterators::threads::Thread;
use rewake_objects::task::{registers, schedule, seccomp, signals};
use rewake_proc::read::ProcDir;
use rewake_proc::status::Status;
use rewake_sys::call::if_known;
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::sched::{self, SchedAttr};
use rewake_sys::task::robust_list;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What any of our threads can find out of a thread that stands still: nothing of it needs the tracer.
#[derive(Debug)]
pub struct Facts {
    /// `/proc/PID/task/TID/status`; of the first living thread it is [`Outside::status`].
    pub status: Option<Status>,
    robust_list: (u64, u64),
    attr: SchedAttr,
    nice: i32,
    affinity: Vec<u64>,
    io_priority: Option<u32>,
}

/// From so many threads on, another thread of ours gathers their facts meanwhile.
const MANY: usize = 16;

/// Has the task so many threads that another thread of ours gathers their facts?
pub fn needs_help(task: &Task) -> bool {
    task.tids.len() >= MANY
}

/// Gathers the facts of all threads of some tasks, the leader first (but last if it has ended), while `work` does what needs the tracer.
///
/// # Errors
/// A thread is gone; whatever `work` returns.
pub fn with_facts<T>(
    tasks: &[Arc<Task>],
    seen: &[Visible],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Vec<Facts>>)> {
    let each = || tasks.iter().zip(seen);
    let gather =
        || each().map(|(task, seen)| gather_all(task, &seen.outside)).collect::<Result<Vec<_>>>();
    if !tasks.iter().any(|task| needs_help(task)) {
        return Ok((work()?, gather()?));
    }
    std::thread::scope(|scope| {
        let gathering = std::thread::Builder::new().spawn_scoped(scope, gather);
        let done = work();
        let died = |_| Err(crate::Error::new("a thread that reads /proc died"));
        let gathered = match gathering {
            Ok(thread) => thread.join().unwrap_or_else(died),
            // Without a further thread it takes longer, that is all.
            Err(_) => gather(),
        };
        Ok((done?, gathered?))
    })
}

fn gather_all(task: &Task, outside: &Outside) -> Result<Vec<Facts>> {
    let mut buffer = Vec::with_capacity(4096);
    let ended = task.leader_ended.map(|_| task.pid());
    let tids = task.tids.iter().copied().chain(ended);
    let first = task.tid();
    let mut status = |tid| match told_status(outside, first, tid) {
        Some(status) => Ok(status),
        None => read_status(&task.dir, tid, &mut buffer),
    };
    let all = tids.map(|tid| {
        let status = if tid == first { None } else { Some(status(tid)?) };
        gather(tid, status)
    });
    all.collect::<std::result::Result<Vec<_>, String>>().of(task.pid(), task.comm())
}

/// Does seccomp apply to any thread of the task?
///
/// # Errors
/// A thread is gone.
pub fn any_filtered(task: &Task) -> Result<bool> {
    let mut buffer = Vec::new();
    for tid in &task.tids {
        let status = read_status(&task.dir, *tid, &mut buffer).of(task.pid(), task.comm())?;
        if status.seccomp.unwrap_or(0) != 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The status of a thread of which the kernel has told that all credentials are those of the first. Its text would tell of
/// signals and the like as well, which are asked for by other ways.
fn told_status(outside: &Outside, first: i32, tid: i32) -> Option<Status> {
    let (told, first) = (outside.threads.get(&tid)?, outside.threads.get(&first)?);
    // In the text some characters of a name stand for others.
    let plain = told.comm.iter().all(|byte| *byte != b'\\' && !byte.is_ascii_control());
    if told.credentials != first.credentials || !plain {
        return None;
    }
    Some(Status {
        name: told.comm.clone().into(),
        pid: tid,
        no_new_privs: told.no_new_privs,
        seccomp: Some(told.seccomp),
        ..outside.status.clone()
    })
}

fn read_status(
    dir: &ProcDir,
    tid: i32,
    buffer: &mut Vec<u8>,
) -> std::result::Result<Status, String> {
    let failed = |e: &dyn std::fmt::Display| format!("thread {tid}: reading its status: {e}");
    let text = dir.read_single(&format!("task/{tid}/status"), buffer).map_err(|e| failed(&e))?;
    rewake_proc::status::parse(text).map_err(|e| failed(&e))
}

fn gather(tid: i32, status: Option<Status>) -> std::result::Result<Facts, String> {
    let at =
        |what: &'static str| move |e: &dyn std::fmt::Display| format!("thread {tid}: {what}: {e}");
    let attr = sched::attributes(tid).map_err(|e| at("reading scheduling attributes")(&e))?;
    Ok(Facts {
        status,
        robust_list: robust_list(tid).map_err(|e| at("reading the robust list")(&e))?,
        // Of a real-time policy the attributes leave it out.
        nice: match attr.policy as i32 {
            libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE => attr.nice,
            _ => sched::nice(tid).unwrap_or(attr.nice),
        },
        attr,
        affinity: sched::affinity(tid).map_err(|e| at("reading the CPU affinity")(&e))?,
        io_priority: Some(sched::io_priority(tid).map_err(|e| at("reading the I/O priority")(&e))?),
    })
}

/// A thread's part of the images.
pub struct ThreadState {
    pub core: ThreadCoreEntry,
    pub info: rewake_image::messages::ThreadInfoX86,
    pub extra: RewakeThreadEntry,
    pub mask: u64,
    /// Signals in its own queue, as a mask.
    pub pending: u64,
    /// The registers with which it goes on, out of any restartable sequence.
    pub regs: Registers,
    /// Of threads other than the first living one.
    pub securebits: Option<u32>,
    /// Of threads other than the first living one.
    pub status: Option<Status>,
    /// What applies to it.
    pub seccomp: seccomp::State,
}

impl ThreadState {
    /// Adds what was gathered meanwhile.
    pub fn add(&mut self, facts: Facts) {
        let Facts { status, robust_list, attr, nice, affinity, io_priority } = facts;
        (self.core.futex_rla, self.core.futex_rla_len) = (robust_list.0, robust_list.1 as u32);
        schedule::survey(&mut self.core, &mut self.extra, &attr, nice);
        self.extra.affinity = affinity;
        self.extra.io_priority = io_priority;
        self.status = status;
    }

    /// Adds the seccomp mode and filters, of a thread that stands still.
    pub fn add_seccomp(&mut self, status: &Status, problems: &mut Vec<Problem>) {
        match seccomp::survey(self.extra.tid as i32, status.seccomp.unwrap_or(0)) {
            Ok(state) => self.seccomp = state,
            Err(problem) => problems.push(problem),
        }
    }

    /// Adds what the kernel has told, which makes a visit needless.
    pub fn told(&mut self, told: &Thread) {
        let (sp, size, flags) = told.alternate_stack;
        self.securebits = Some(told.credentials.securebits);
        self.extra.timer_slack = Some(told.timer_slack);
        self.extra.default_timer_slack = Some(told.default_timer_slack).filter(|s| *s != 0);
        self.info.clear_tid_addr = told.tid_address;
        self.core.sas = Some(signals::alternate_stack(sp, size, flags));
        self.core.pdeath_sig = Some(told.pdeath_sig).filter(|s| *s != 0);
    }

    /// Adds what a visit brought.
    pub fn visited(&mut self, visited: &Visited) {
        let result = &visited.result;
        self.securebits = Some(visited.securebits);
        self.extra.timer_slack = Some(visited.timer_slack);
        self.extra.default_timer_slack = Some(visited.default_timer_slack).filter(|s| *s != 0);
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

/// Would a system call that is made in the thread now be handed to its handler?
fn is_dispatched(sud: &ptrace::SudConfig, outside: &Outside) -> bool {
    const ALLOW: u8 = 0;
    let mut selector = [ALLOW];
    // Without a selector all are. One that cannot be read ends the program by itself.
    sud.selector == 0
        || outside.memory.read_exact_at(&mut selector, sud.selector).is_ok() && selector != [ALLOW]
}

/// The request of ioctl(2) in which a thread is a processor of a virtual machine (linux/kvm.h). Where the kernel keeps the
/// guest's registers in the place of the thread's own, no agent could be put into it.
const KVM_RUN: u32 = 0xae80;

/// Reads what ptrace tells of a stopped thread. `xsave` is room for its FPU registers.
///
/// # Errors
/// The thread is gone, or its state cannot be saved.
pub fn state(
    thread: &Stopped,
    xsave: &mut [u8],
    task: &Task,
    outside: &Outside,
) -> Result<ThreadState> {
    let (tid, pid, comm) = (thread.tid(), task.pid(), task.comm());
    let at = |what: &'static str| {
        move |e: rewake_sys::SyscallError| format!("thread {tid}: {what}: {e}")
    };
    let regs = thread.registers().of(pid, comm)?;
    if regs.orig_rax == libc::SYS_ioctl as u64 && regs.rsi as u32 == KVM_RUN {
        let text = format!("thread {tid} runs a virtual machine (KVM), which cannot be saved");
        return Err(text).of(pid, comm);
    }
    let len = match if_known(ptrace::regset(tid, ptrace::NT_X86_XSTATE, xsave)) {
        Ok(None) => ptrace::regset(tid, ptrace::NT_PRFPREG, xsave),
        Ok(Some(len)) => Ok(len),
        Err(e) => Err(e),
    };
    let len = len.map_err(at("reading FPU registers")).of(pid, comm)?;
    let mut extra = RewakeThreadEntry { tid: tid as u32, ..RewakeThreadEntry::default() };
    let rseq = if_known(ptrace::rseq_config(tid)).map_err(at("reading rseq")).of(pid, comm)?;
    let area = rseq.map_or(0, |config| config.pointer);
    let regs = out_of_sequence(area, &outside.memory, &regs);
    let image_regs = for_image(&regs, &mut extra, outside);
    let mask = ptrace::signal_mask(tid).map_err(at("reading the signal mask")).of(pid, comm)?;
    let queue =
        ptrace::queued_signals(tid, false).map_err(at("reading queued signals")).of(pid, comm)?;
    let mut core = ThreadCoreEntry { blk_sigset: Some(mask), ..ThreadCoreEntry::default() };
    let pending = queue.iter().fold(0, |all, info| all | signals::bit(info));
    core.signals_p = Some(signals::queue(queue));
    if let Some(config) = rseq {
        core.rseq_entry = Some(RseqEntry {
            rseq_abi_pointer: config.pointer,
            rseq_abi_size: config.size,
            signature: config.signature,
            rseq_cs_pointer: None,
        });
    }
    let sud = if_known(ptrace::sud_config(tid));
    if let Some(sud) = sud.map_err(at("reading syscall user dispatch")).of(pid, comm)?
        && sud.mode != 0
    {
        extra.syscall_dispatch = vec![sud.mode, sud.selector, sud.offset, sud.len];
        if is_dispatched(&sud, outside) {
            let text = format!(
                "thread {tid} has its system calls dispatched (PR_SET_SYSCALL_USER_DISPATCH), those of an agent too"
            );
            let error = Err(text).of(pid, comm);
            return error.map_err(|e: crate::Error| crate::Error {
                transient: true,
                ..e.hint("try again when it runs code whose system calls are its own")
            });
        }
    }
    let info = registers::survey(&image_regs, &xsave[..len], 0)
        .map_err(|p| crate::Error::of(pid, comm, p))?;
    Ok(ThreadState {
        core,
        info,
        extra,
        mask,
        pending,
        regs,
        securebits: None,
        status: None,
        seccomp: seccomp::State::default(),
    })
}
