//! Finding a process tree and stopping it, every thread, without missing one that is being born.

use crate::crew::{Crew, cpus, spread};
use crate::error::{Context, Error, Result};
use crate::seize::{self, Stopping};
use rewake_inject::live::Live;
use rewake_inject::tracee::Stopped;
use rewake_objects::problem::text;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::Stat;
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
    /// The `/proc` directory of the first of its living threads.
    pub dir: ProcDir,
    /// `/proc/PID/stat` as it was when it was found.
    pub stat: Stat,
    /// Dead or alive.
    pub life: Life,
    /// Its living threads, the leader first, unless that has ended. Empty for a zombie.
    pub tids: Vec<i32>,
    /// The wait status with which its leader has ended while other threads go on.
    pub leader_ended: Option<i32>,
}

impl Task {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.stat.pid
    }

    /// The first of its living threads. The kernel is asked for its memory and descriptors by this one: a leader that has ended has
    /// none.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tids.first().copied().unwrap_or(self.stat.pid)
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
    /// Was it sent a SIGKILL?
    killed: bool,
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
        // The leader dies last: its death is told when all other threads are reaped. If it has ended before, that may have been
        // while we traced it.
        let (first, others) = self.task.tids.split_at(1);
        for tid in others.iter().chain(first).copied().chain([self.task.pid()]) {
            wait::until_dead(tid);
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
        let threads = self.held.drain(..).flat_map(|held| held.threads);
        for (tid, e) in seize::let_go(threads.map(|thread| (thread.tid(), thread))) {
            log::debug!("thread {tid} could not be released: {e}");
        }
    }

    /// Stops some processes; returns those that were there, and their children.
    fn stop(
        &mut self,
        pids: &[i32],
        root: bool,
        deadline: Option<Instant>,
    ) -> Result<(Vec<Arc<Task>>, Vec<i32>)> {
        let mut new = Vec::with_capacity(pids.len());
        let mut living = Vec::with_capacity(pids.len());
        let mut buffer = Vec::new();
        for pid in pids {
            let Some((dir, stat)) = look(*pid, root, &mut buffer)? else { continue };
            if stat.flags & KERNEL_THREAD != 0 {
                return Err(Error::new(format!(
                    "process {} ({}) is a kernel thread, which has no state of its own to save",
                    stat.pid,
                    text(&stat.comm)
                )));
            }
            if stat.has_ended() {
                new.push(zombie(dir, stat, root)?);
            } else {
                living.push(Stopping::new(dir, stat));
            }
        }
        seize::stop_all(&mut living, deadline)?;
        for stopping in living {
            let pid = stopping.pid();
            if stopping.is_gone() {
                if root {
                    let what = "it ended while it was being stopped";
                    return Err(Error::new(format!("process {pid}: {what}")));
                }
                // Look at it as what it is now.
                drop(stopping);
                new.extend(ended(pid)?);
                continue;
            }
            let (dir, stat, threads) = stopping.done()?;
            let tids: Vec<i32> = threads.iter().map(Stopped::tid).collect();
            let led = tids.first() == Some(&stat.pid);
            let leader_ended = (!led).then_some(stat.exit_code);
            let life = match threads.first().and_then(Stopped::group_stop) {
                Some(signal) => Life::Stopped(signal),
                None => Life::Alive,
            };
            let task = Arc::new(Task { dir, stat, life, tids, leader_ended });
            self.held.push(Held { task: task.clone(), threads, agent: None, killed: false });
            new.push(task);
        }
        let children = new.iter().map(|task| children(task, &task.tids, &mut buffer));
        let children = children.collect::<Result<Vec<_>>>()?.concat();
        Ok((new, children))
    }

    /// The children that its tasks' first threads have by now.
    fn children(&mut self) -> Result<Vec<i32>> {
        let mut buffer = Vec::new();
        let tasks = self.held.iter().map(|held| &held.task);
        let of = tasks.map(|task| {
            // The kernel's first living thread need not be that of the lowest number.
            let few = if task.leader_ended.is_some() { task.tids.len() } else { 1 };
            children(task, task.tids.get(..few).unwrap_or(&[]), &mut buffer)
        });
        Ok(of.collect::<Result<Vec<_>>>()?.concat())
    }

    /// Kills its tasks.
    fn kill(&mut self) -> Result<()> {
        let mut result = Ok(());
        for held in &mut self.held {
            match signal::kill(held.task.pid(), libc::SIGKILL) {
                Err(e) if e.errno != rewake_sys::Errno::SRCH => {
                    let what = format!("the images are complete, but it cannot be killed: {e}");
                    result = result.and(Err(what).of(held.task.pid(), held.task.comm()));
                }
                _ => held.killed = true,
            }
        }
        result
    }

    /// Waits until those are dead that it has killed.
    fn see_off(&mut self) {
        self.held.extract_if(.., |held| held.killed).for_each(Held::see_off);
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
        if stat.has_ended() {
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
    if root {
        return Err(Error::new(format!(
            "{name} is dead: a zombie has nothing to save but its exit code"
        )));
    }
    let life = Life::Zombie(stat.exit_code);
    Ok(Arc::new(Task { dir, stat, life, tids: Vec::new(), leader_ended: None }))
}

/// A tree that stands still. Dropping it lets every task run on as it was.
#[derive(Debug)]
pub struct Tree {
    /// Parents before children.
    pub tasks: Vec<Arc<Task>>,
    crew: Crew<Shard>,
    /// How many processes each of them was given.
    loads: Vec<usize>,
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
        let mut tree = Tree { tasks: Vec::new(), crew: Crew::alone(), loads: Vec::new() };
        let mut known = HashSet::new();
        let mut found = vec![root];
        while !found.is_empty() {
            found = tree.stop(found, &mut known, deadline)?;
            if found.iter().all(|pid| known.contains(pid)) {
                // A stopped task has no more children, but may be given some: those of one that is killed, if it is
                // a subreaper. They become its first thread's.
                found = Vec::new();
                for part in tree.crew.each(|_| Shard::children)? {
                    found.append(&mut part?);
                }
            }
            found.retain(|pid| !known.contains(pid));
        }
        tree.order();
        Ok(tree)
    }

    /// Stops some processes; returns the children of those that were there.
    fn stop(
        &mut self,
        mut pids: Vec<i32>,
        known: &mut HashSet<i32>,
        deadline: Option<Instant>,
    ) -> Result<Vec<i32>> {
        let root = known.is_empty();
        pids.retain(|pid| known.insert(*pid));
        if known.len() >= MANY {
            if self.is_alone() {
                make_room(pids.len());
            }
            self.crew.grow(cpus());
        }
        let members = self.crew.len();
        // Who has few gets more.
        self.loads.resize(members, 0);
        let mut shares: Vec<Vec<i32>> = vec![Vec::new(); members];
        for pid in pids {
            let Some(least) = (0..members).min_by_key(|member| self.loads[*member]) else { break };
            self.loads[least] += 1;
            shares[least].push(pid);
        }
        let stopped = self.crew.each(|member| {
            let share = std::mem::take(&mut shares[member]);
            move |shard: &mut Shard| shard.stop(&share, root, deadline)
        })?;
        let mut found = Vec::new();
        for part in stopped {
            let (mut new, mut children) = part?;
            self.tasks.append(&mut new);
            found.append(&mut children);
        }
        Ok(found)
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
        // All are killed before anybody is waited for.
        let killed = self.crew.each(|_| Shard::kill)?;
        let seen_off = self.crew.each(|_| Shard::see_off);
        killed.into_iter().collect::<Result<()>>().and(seen_off.map(drop))
    }
}

/// The children of some threads of a task.
fn children(task: &Task, tids: &[i32], buffer: &mut Vec<u8>) -> Result<Vec<i32>> {
    /// Threads to ask that are worth one of our own.
    const ENOUGH: usize = 64;
    let ask = |tids: &[i32], buffer: &mut Vec<u8>| -> Result<Vec<i32>> {
        let mut found = Vec::new();
        for tid in tids {
            let text = match task.dir.read(&format!("task/{tid}/children"), buffer) {
                Ok(text) => text,
                Err(e) if e.is_gone() => continue,
                Err(e) => return Err(Error::new(e.to_string())),
            };
            found.extend(rewake_proc::children::parse(text).of(task.pid(), task.comm())?);
        }
        Ok(found)
    };
    if tids.len() <= ENOUGH {
        return ask(tids, buffer);
    }
    Ok(spread(tids, ENOUGH, |tids| ask(tids, &mut Vec::new()))?.concat())
}
