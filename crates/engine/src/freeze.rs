//! Finding a process tree and stopping it, every thread, without missing one that is being born.

use crate::crew::{Crew, cpus, spread};
use crate::error::{Context, Error, Result};
use rewake_inject::interrupted::mend_interrupted;
use rewake_inject::live::Live;
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::{Stat, TaskState};
use rewake_sys::sched::Pin;
use rewake_sys::{ptrace, signal, wait};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `PF_KTHREAD` of `/proc/PID/stat` flags.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// How a task of the tree was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Running or sleeping.
    Alive,
    /// Stopped by this signal before we came.
    Stopped(i32),
    /// Dead, not yet reaped: its wait status.
    Zombie(i32),
}

/// A task that stands still, as all of our threads may see it.
#[derive(Debug)]
pub struct Task {
    /// Its `/proc` directory.
    pub dir: ProcDir,
    /// `/proc/PID/stat` as it was when it was found.
    pub stat: Stat,
    /// Dead or alive.
    pub life: Life,
    /// Its threads, the leader first. Empty for a zombie.
    pub tids: Vec<i32>,
}

impl Task {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.stat.pid
    }

    /// Command name.
    #[must_use]
    pub fn comm(&self) -> &[u8] {
        &self.stat.comm
    }
}

/// A living task in the hands of the thread that traces it.
#[derive(Debug)]
pub struct Held {
    /// The task.
    pub task: Arc<Task>,
    /// Its threads in ptrace stops, the leader first; without the leader while the agent is in.
    pub threads: Vec<Stopped>,
    /// The agent, if it is in.
    pub agent: Option<Live>,
}

impl Held {
    /// Takes the agent out, if it is in.
    pub fn cure(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        match agent.cure() {
            Ok(mut leader) => {
                if let Life::Stopped(signal) = self.task.life {
                    leader.set_group_stop(Some(signal));
                }
                self.threads.insert(0, leader);
            }
            Err(e) => {
                log::warn!("process {} ({}): {e}", self.task.pid(), text(self.task.comm()));
            }
        }
    }

    /// Waits until it is dead, after a SIGKILL.
    fn see_off(self) {
        // The leader dies last: its death is told when all other threads are reaped.
        let (leader, others) = self.task.tids.split_at(1);
        for tid in others.iter().chain(leader) {
            wait::until_dead(*tid);
        }
    }
}

/// What one tracer thread holds. Dropping it takes agents out and lets every task run on as it was.
#[derive(Debug, Default)]
pub struct Shard {
    /// Its tasks.
    pub held: Vec<Held>,
    /// Where it runs.
    pub pin: Pin,
}

impl Shard {
    fn cure(&mut self) {
        self.held.iter_mut().for_each(Held::cure);
    }

    fn release(&mut self) {
        for thread in self.held.drain(..).flat_map(|held| held.threads) {
            let tid = thread.tid();
            if let Err(e) = thread.detach(0) {
                log::debug!("thread {tid} is gone before it could be released: {e}");
            }
        }
    }

    /// Stops one process. `None` if it is gone already.
    fn stop(
        &mut self,
        (dir, stat): (ProcDir, Stat),
        root: bool,
        deadline: Option<Instant>,
    ) -> Result<Option<Arc<Task>>> {
        let pid = stat.pid;
        let gone = |e: &dyn std::fmt::Display| Error::new(format!("process {pid}: {e}"));
        if stat.flags & KERNEL_THREAD != 0 {
            return Err(Error::new(format!(
                "process {pid} ({}) is a kernel thread, which has no state of its own to save",
                text(&stat.comm)
            )));
        }
        if matches!(stat.state, TaskState::Zombie | TaskState::Dead) {
            return zombie(dir, stat, root).map(Some);
        }
        let threads = match seize_all(&dir, &stat, deadline) {
            Ok(threads) => threads,
            // It ended meanwhile: look at it as what it is now.
            Err(Seize::Gone) if !root => return ended(pid),
            Err(Seize::Gone) => return Err(gone(&"it ended while it was being stopped")),
            Err(Seize::Failed(e)) => return Err(e),
        };
        let tids = threads.iter().map(Stopped::tid).collect();
        let life = match threads.first().and_then(Stopped::group_stop) {
            Some(signal) => Life::Stopped(signal),
            None => Life::Alive,
        };
        // It may have executed another program since its stat was read.
        match dir.stat(&mut Vec::new()) {
            Ok(stat) => {
                let task = Arc::new(Task { dir, stat, life, tids });
                self.held.push(Held { task: task.clone(), threads, agent: None });
                Ok(Some(task))
            }
            Err(e) => {
                for thread in threads {
                    let _ = thread.detach(0);
                }
                Err(gone(&e))
            }
        }
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.cure();
        self.release();
    }
}

/// `/proc` answers to the numbers of threads too, which are no trees of their own.
///
/// # Errors
/// It is a thread, and not the first one of its process.
pub fn refuse_thread(dir: &ProcDir, buffer: &mut Vec<u8>) -> Result<()> {
    let pid = dir.pid();
    match dir.status(buffer) {
        Ok(status) if status.tgid != pid => Err(Error::new(format!(
            "{pid} is a thread of process {} ({})",
            status.tgid,
            text(&status.name)
        ))
        .hint(format!("give the process: {}", status.tgid))),
        // Whoever needs it finds what is wrong.
        _ => Ok(()),
    }
}

/// Looks at a process. `None` if it is gone already.
fn look(pid: i32, root: bool, buffer: &mut Vec<u8>) -> Result<Option<(ProcDir, Stat)>> {
    let looked = ProcDir::open(pid).and_then(|dir| Ok((dir.stat(buffer)?, dir)));
    match looked {
        Ok((stat, dir)) => {
            if root {
                refuse_thread(&dir, buffer)?;
            }
            Ok(Some((dir, stat)))
        }
        Err(e) if e.is_gone() && !root => Ok(None),
        Err(e) if e.is_gone() => Err(Error::new(format!("there is no process {pid}"))
            .hint("give the pid of a running process with -t")),
        Err(e) => Err(Error::new(format!("process {pid}: {e}"))),
    }
}

/// A process that ended while it was being stopped: its parent, if that stands still already, has a zombie to wait for.
fn ended(pid: i32) -> Result<Option<Arc<Task>>> {
    let until = Instant::now() + Duration::from_secs(1);
    while let Some((dir, stat)) = look(pid, false, &mut Vec::new())? {
        if matches!(stat.state, TaskState::Zombie | TaskState::Dead) {
            return zombie(dir, stat, false).map(Some);
        }
        if Instant::now() > until {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(None)
}

fn zombie(dir: ProcDir, stat: Stat, root: bool) -> Result<Arc<Task>> {
    let name = format!("process {} ({})", stat.pid, text(&stat.comm));
    if stat.num_threads > 1 {
        return Err(Error::new(format!("{name}: its first thread has ended while others run on"))
            .hint("such a process cannot be saved yet"));
    }
    if root {
        return Err(Error::new(format!(
            "{name} is dead: a zombie has nothing to save but its exit code"
        )));
    }
    let life = Life::Zombie(stat.exit_code);
    Ok(Arc::new(Task { dir, stat, life, tids: Vec::new() }))
}

/// A tree that stands still. Dropping it lets every task run on as it was.
#[derive(Debug)]
pub struct Tree {
    /// Parents before children.
    pub tasks: Vec<Arc<Task>>,
    crew: Crew<Shard>,
}

/// From so many processes on, a tree is divided among several threads.
const MANY: usize = 8;

/// capabilities(7)
const CAP_SYS_PTRACE: u32 = 19;

/// Makes room for what a dump opens of so many tasks, before there are threads that would all wait each time our table of
/// descriptors grows.
fn make_room(tasks: usize) {
    /// Its `/proc` directory, memory, pidfd, agent; and some of what it has open.
    const EACH: usize = 16;
    const BESIDE: usize = 512;
    if let Err(e) = rewake_sys::descriptors::make_room(tasks * EACH + BESIDE) {
        log::debug!("no room for the descriptors of {tasks} tasks at once: {e}");
    }
}

impl Tree {
    /// Stops the tree of `root`.
    ///
    /// # Errors
    /// A task cannot be traced, or does not stop before `deadline`.
    pub fn freeze(root: i32, deadline: Option<Instant>) -> Result<Tree> {
        let mut tree = Tree { tasks: Vec::new(), crew: Crew::alone() };
        let mut known = HashSet::new();
        let mut found = vec![root];
        while !found.is_empty() {
            let new = tree.stop(found, &mut known, deadline)?;
            let first_look = |task: &Arc<Task>| children(task, &task.tids);
            found = new.iter().map(first_look).collect::<Result<Vec<_>>>()?.concat();
            if found.iter().all(|pid| known.contains(pid)) {
                // A stopped task has no more children, but may be given some: those of one that is killed, if it is
                // a subreaper. They become its first thread's.
                let second_look =
                    |task: &Arc<Task>| children(task, task.tids.get(..1).unwrap_or(&[]));
                found = tree.tasks.iter().map(second_look).collect::<Result<Vec<_>>>()?.concat();
            }
            found.retain(|pid| !known.contains(pid));
        }
        tree.order();
        Ok(tree)
    }

    /// Stops some processes; returns those that were there.
    fn stop(
        &mut self,
        pids: Vec<i32>,
        known: &mut HashSet<i32>,
        deadline: Option<Instant>,
    ) -> Result<Vec<Arc<Task>>> {
        let root = known.is_empty();
        let mut buffer = Vec::new();
        let mut found = Vec::with_capacity(pids.len());
        for pid in pids {
            if known.insert(pid) {
                found.extend(look(pid, root, &mut buffer)?);
            }
        }
        if found.len() >= MANY {
            if self.is_alone() {
                make_room(found.len());
            }
            self.crew.grow(cpus());
        }
        let members = self.crew.len();
        let mut shares: Vec<Vec<(ProcDir, Stat)>> = Vec::new();
        shares.resize_with(members, Vec::new);
        for (i, found) in found.into_iter().enumerate() {
            shares[i % members].push(found);
        }
        let stopped = self.crew.each(|member| {
            let share = std::mem::take(&mut shares[member]);
            move |shard: &mut Shard| {
                let stop = |found| shard.stop(found, root, deadline);
                share.into_iter().map(stop).collect::<Result<Vec<_>>>()
            }
        })?;
        let mut new = Vec::new();
        for part in stopped {
            new.extend(part?.into_iter().flatten());
        }
        self.tasks.extend(new.iter().cloned());
        Ok(new)
    }

    /// Is all of it held by the calling thread?
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.crew.len() == 1
    }

    /// Has the tracer threads do `job` on what they hold, all at the same time.
    ///
    /// # Errors
    /// A tracer thread died.
    pub fn each<T, J>(&mut self, job: impl FnMut(usize) -> J) -> Result<Vec<T>>
    where
        T: Send + 'static,
        J: FnOnce(&mut Shard) -> T + Send + 'static,
    {
        self.crew.each(job)
    }

    /// Parents before children, children by pid.
    fn order(&mut self) {
        let mut rest: Vec<Option<Arc<Task>>> =
            std::mem::take(&mut self.tasks).into_iter().map(Some).collect();
        let mut below: HashMap<i32, Vec<usize>> = HashMap::new();
        for (i, task) in rest.iter().enumerate().skip(1) {
            below.entry(task.as_ref().map_or(0, |t| t.stat.ppid)).or_default().push(i);
        }
        let mut stack: Vec<usize> = if rest.is_empty() { vec![] } else { vec![0] };
        while let Some(at) = stack.pop() {
            let Some(task) = rest[at].take() else { continue };
            let mut children = below.remove(&task.pid()).unwrap_or_default();
            children.sort_by_key(|i| std::cmp::Reverse(rest[*i].as_ref().map_or(0, |t| t.pid())));
            stack.extend(children);
            self.tasks.push(task);
        }
        // Whose parent changed while we looked: still ours.
        self.tasks.extend(rest.into_iter().flatten());
    }

    /// Takes all agents out again.
    pub fn cure(&mut self) {
        if let Err(e) = self.crew.each(|_| Shard::cure) {
            log::warn!("{e}");
        }
    }

    /// Lets every task run on as it was.
    pub fn release(&mut self) {
        if let Err(e) = self.crew.each(|_| Shard::release) {
            log::warn!("{e}");
        }
    }

    /// Kills the tree and waits until every task is dead.
    ///
    /// # Errors
    /// One cannot be killed; the others are all the same.
    pub fn kill(&mut self) -> Result<()> {
        let mut result = Ok(());
        let mut spared = Vec::new();
        for task in self.tasks.iter().filter(|t| !matches!(t.life, Life::Zombie(_))) {
            if let Err(e) = signal::kill(task.pid(), libc::SIGKILL)
                && e.errno != rewake_sys::Errno::SRCH
            {
                let what = format!("the images are complete, but it cannot be killed: {e}");
                result = result.and(Err(what).of(task.pid(), task.comm()));
                spared.push(task.pid());
            }
        }
        let seen_off = self.crew.each(|_| {
            let spared = spared.clone();
            move |shard: &mut Shard| {
                shard
                    .held
                    .extract_if(.., |held| !spared.contains(&held.task.pid()))
                    .for_each(Held::see_off);
            }
        });
        result.and(seen_off.map(drop))
    }
}

/// A system call that our stop cut short with `EINTR` is made again. Done at once, so that it holds even if we are
/// killed.
fn mend(thread: &Stopped) {
    if thread.group_stop().is_none()
        && let Ok(regs) = thread.registers()
        && let Some(mended) = mend_interrupted(&regs)
        && let Err(e) = thread.set_registers(&mended)
    {
        log::debug!("thread {} is gone: {e}", thread.tid());
    }
}

enum Seize {
    Gone,
    Failed(Error),
}

fn seize_all(
    dir: &ProcDir,
    stat: &Stat,
    deadline: Option<Instant>,
) -> std::result::Result<Vec<Stopped>, Seize> {
    let pid = stat.pid;
    let mut stopped: Vec<Stopped> = Vec::new();
    let mut known: HashSet<i32> = HashSet::new();
    let fail = |e: &dyn std::fmt::Display| {
        Seize::Failed(Error::new(format!("process {pid} ({}): {e}", text(&stat.comm))))
    };
    // On any failure: the ones stopped so far run on.
    let result = (|| {
        loop {
            let tids = if known.is_empty() && stat.num_threads == 1 {
                vec![pid]
            } else {
                dir.tids().map_err(|e| if e.is_gone() { Seize::Gone } else { fail(&e) })?
            };
            let mut pending = Vec::new();
            for tid in tids.into_iter().filter(|t| !known.contains(t)).collect::<Vec<_>>() {
                match Running::seize(tid, ptrace::O_TRACESYSGOOD) {
                    Ok(running) => {
                        known.insert(tid);
                        pending.push(running);
                    }
                    Err(e) if is_gone(tid, e.errno) && tid != pid => {}
                    Err(e) if is_gone(tid, e.errno) => return Err(Seize::Gone),
                    Err(e) => return Err(Seize::Failed(cannot_trace(dir, stat, tid, e))),
                }
            }
            if pending.is_empty() {
                return Ok(());
            }
            for running in &pending {
                // Gone already: waiting will tell.
                let _ = running.interrupt();
            }
            let mut leader_gone = false;
            rewake_inject::tracee::wait_all(pending, deadline, |outcome| {
                match outcome {
                    Ok(thread) => {
                        mend(&thread);
                        stopped.push(thread);
                    }
                    Err(rewake_inject::Error::Gone { tid, .. }) => leader_gone |= tid == pid,
                    Err(e) => return Err(e),
                }
                Ok(())
            })
            .map_err(|e| fail(&e))?;
            if leader_gone {
                return Err(Seize::Gone);
            }
            if stat.num_threads == 1 && known.len() == 1 {
                // It may have made a thread since its stat was read: now it stands still and one look suffices.
                let tids = dir.tids().map_err(|e| fail(&e))?;
                if tids.len() == 1 {
                    return Ok(());
                }
            }
        }
    })();
    match result {
        Ok(()) => {
            stopped.sort_by_key(|t| (t.tid() != pid, t.tid()));
            Ok(stopped)
        }
        Err(e) => {
            for thread in stopped {
                let _ = thread.detach(0);
            }
            Err(e)
        }
    }
}

/// Does a failure to seize a thread mean that it has ended? Of one that is about to be reaped the kernel says `EPERM`.
fn is_gone(tid: i32, errno: rewake_sys::Errno) -> bool {
    let ended = || match ProcDir::open(tid).and_then(|dir| dir.stat(&mut Vec::new())) {
        Ok(stat) => matches!(stat.state, TaskState::Zombie | TaskState::Dead),
        Err(_) => true,
    };
    errno == rewake_sys::Errno::SRCH || errno == rewake_sys::Errno::PERM && ended()
}

fn cannot_trace(dir: &ProcDir, stat: &Stat, tid: i32, e: rewake_sys::SyscallError) -> Error {
    let mut buffer = Vec::new();
    let tracer = dir.status(&mut buffer).map_or(0, |s| s.tracer_pid);
    let name = format!("process {} ({})", stat.pid, text(&stat.comm));
    if tracer != 0 {
        let comm = std::fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
        return Error::new(format!(
            "{name}: it is traced already, by process {tracer} ({})",
            comm.trim_end()
        ))
        .hint("end the debugger or tracer first");
    }
    /// `PF_IO_WORKER` and `PF_USER_WORKER`.
    const WORKER: u32 = 0x10 | 0x4000;
    let text = dir.read(&format!("task/{tid}/stat"), &mut buffer);
    let stat = text.ok().and_then(|text| rewake_proc::stat::parse(text).ok());
    if stat.is_some_and(|s| s.flags & WORKER != 0) {
        return Error::new(format!(
            "{name}: thread {tid} is a worker of the kernel (io_uring requests that would block), which nobody can trace"
        ))
        .hint("such a process cannot be saved yet");
    }
    let error = Error::new(format!("{name}: thread {tid} cannot be traced: {e}"));
    if e.errno == rewake_sys::Errno::PERM { error.hint(may_not_trace()) } else { error }
}

/// Why we may not trace, as far as that can be seen.
fn may_not_trace() -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let scope = scope.ok().and_then(|text| text.trim().parse::<u32>().ok()).unwrap_or(0);
    let own = ProcDir::open(std::process::id() as i32).and_then(|d| d.status(&mut Vec::new())).ok();
    let may = own.as_ref().is_some_and(|s| s.cap_eff & 1 << CAP_SYS_PTRACE != 0);
    let module = std::fs::read_to_string("/proc/self/attr/current")
        .ok()
        .map(|label| label.trim_matches(['\0', '\n']).to_owned())
        .filter(|label| !label.is_empty() && label != "unconfined");
    if scope >= 3 {
        "Yama's ptrace_scope is 3: nobody may trace until the next boot (sysctl kernel.yama.ptrace_scope)".into()
    } else if !may && scope > 0 {
        format!(
            "run as root, or with CAP_SYS_PTRACE, which Yama's ptrace_scope {scope} demands (sysctl kernel.yama.ptrace_scope)"
        )
    } else if !may {
        "run as root, or with CAP_SYS_PTRACE".into()
    } else if let Some(label) = module {
        format!(
            "the security module that runs this command as {} forbids it",
            text(label.as_bytes())
        )
    } else if own.is_some_and(|s| s.seccomp.unwrap_or(0) != 0) {
        "this command is under a seccomp filter, which may forbid ptrace: run it outside".into()
    } else {
        "it may be in a user namespace that is not below ours, or a security module (Landlock among them) forbids it".into()
    }
}

/// The children of some threads of a task.
fn children(task: &Task, tids: &[i32]) -> Result<Vec<i32>> {
    /// Threads to ask that are worth one of our own.
    const ENOUGH: usize = 64;
    let ask = |tids: &[i32]| -> Result<Vec<i32>> {
        let mut buffer = Vec::new();
        let mut found = Vec::new();
        for tid in tids {
            let text = match task.dir.read(&format!("task/{tid}/children"), &mut buffer) {
                Ok(text) => text,
                Err(e) if e.is_gone() => continue,
                Err(e) => return Err(Error::new(e.to_string())),
            };
            found.extend(rewake_proc::children::parse(text).of(task.pid(), task.comm())?);
        }
        Ok(found)
    };
    Ok(spread(tids, ENOUGH, ask)?.concat())
}
