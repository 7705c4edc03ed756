//! Finding a process tree and stopping it, every thread, without missing one that is being born.

use crate::crew::{Crew, cpus, spread};
use crate::error::{Context, Error, Result};
use crate::seize::{self, Stopping};
use rewake_inject::live::Live;
use rewake_inject::tracee::Stopped;
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::{Stat, TaskState};
use rewake_sys::sched::Pin;
use rewake_sys::{signal, wait};
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

    /// Stops some processes; returns those that were there.
    fn stop(
        &mut self,
        found: Vec<(ProcDir, Stat)>,
        root: bool,
        deadline: Option<Instant>,
    ) -> Result<Vec<Arc<Task>>> {
        let mut new = Vec::with_capacity(found.len());
        let mut living = Vec::with_capacity(found.len());
        for (dir, stat) in found {
            if stat.flags & KERNEL_THREAD != 0 {
                return Err(Error::new(format!(
                    "process {} ({}) is a kernel thread, which has no state of its own to save",
                    stat.pid,
                    text(&stat.comm)
                )));
            }
            if matches!(stat.state, TaskState::Zombie | TaskState::Dead) {
                new.push(zombie(dir, stat, root)?);
            } else {
                living.push(Stopping::new(dir, stat));
            }
        }
        seize::stop_all(&mut living, deadline)?;
        for stopping in living {
            let pid = stopping.pid();
            let gone = |e: &dyn std::fmt::Display| Error::new(format!("process {pid}: {e}"));
            if stopping.is_gone() {
                if root {
                    return Err(gone(&"it ended while it was being stopped"));
                }
                // Look at it as what it is now.
                drop(stopping);
                new.extend(ended(pid)?);
                continue;
            }
            // It may have executed another program since its stat was read.
            let stat = stopping.dir().stat(&mut Vec::new()).map_err(|e| gone(&e))?;
            let (dir, threads) = stopping.done();
            let tids = threads.iter().map(Stopped::tid).collect();
            let life = match threads.first().and_then(Stopped::group_stop) {
                Some(signal) => Life::Stopped(signal),
                None => Life::Alive,
            };
            let task = Arc::new(Task { dir, stat, life, tids });
            self.held.push(Held { task: task.clone(), threads, agent: None });
            new.push(task);
        }
        Ok(new)
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
            move |shard: &mut Shard| shard.stop(share, root, deadline)
        })?;
        let mut new = Vec::new();
        for part in stopped {
            new.extend(part?);
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
