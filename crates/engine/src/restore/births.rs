//! The first scripts: from the root on, every process clones its children.

use super::build::default_slack;
use super::lineage::Role;
use super::undo::Created;
use super::{PATIENCE, Run, namespaces};
use crate::error::{Context, Error, Result};
use crate::options::Pid;
use rewake_inject::ring::Ring;
use rewake_inject::stub::Kind;
use rewake_objects::files::open::Opener;
use rewake_objects::problem::text;
use rewake_proc::read::{ProcDir, ProcRoot};
use rewake_proc::stat::Stat;
use rewake_sys::Errno;
use rewake_sys::task::CloneArgs;
use rustix::fd::{AsFd, OwnedFd};

impl Run<'_> {
    /// Puts the first script of every node and thread into its ring.
    pub(super) fn load(&self) -> Result<Vec<Ring>> {
        let failed = |e: rewake_inject::Error| Error::new(e.to_string());
        let mut rings = Vec::with_capacity(self.plans.len());
        for plan in self.plans {
            let ring = self.arena.ring(plan.at, plan.len, plan.data, Kind::Process);
            let first = plan.sequence.first().unwrap_or(&plan.birth);
            ring.load(&first.script).map_err(failed)?;
            rings.push(ring);
            let Some(task) = &plan.task else { continue };
            for thread in &task.threads {
                let kind = if thread.finish.is_some() { Kind::Process } else { Kind::Thread };
                let ring = self.arena.ring(thread.at, thread.len, thread.data, kind);
                ring.load(&thread.steps.script).map_err(failed)?;
            }
        }
        Ok(rings)
    }

    pub(super) fn clone_root(&self, rings: &[Ring], created: &mut Created) -> Result<Pid> {
        let pid = self.lineage.nodes[0].pid.unwrap_or(0);
        let tids = [pid];
        let sibling = self.options.sibling;
        let args = CloneArgs {
            flags: self.env.namespaces.flags()
                | if sibling { libc::CLONE_PARENT as u64 } else { 0 },
            exit_signal: if sibling { 0 } else { libc::SIGCHLD as u64 },
            set_tid: tids.as_ptr() as u64,
            set_tid_size: 1,
            ..CloneArgs::default()
        };
        let slack = default_slack(&self.checkpoint.tasks, &self.lineage.nodes[0]);
        let root = self.with_timer_slack(slack, || self.clone_stub(&args, &rings[0], pid))?;
        created.roots.push(root);
        created.sibling = sibling;
        Ok(root)
    }

    /// Does something with another timer slack of our own, which is what whoever is cloned has as default.
    fn with_timer_slack<T>(
        &self,
        slack: Option<u64>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        use rustix::thread::{current_timer_slack, set_current_timer_slack};
        let Some(slack) = slack.and_then(std::num::NonZeroU64::new) else { return work() };
        let failed = |e: rustix::io::Errno| Error::new(format!("setting our timer slack: {e}"));
        let before = std::num::NonZeroU64::new(current_timer_slack().map_err(failed)?);
        set_current_timer_slack(Some(slack)).map_err(failed)?;
        let result = work();
        set_current_timer_slack(before).map_err(failed)?;
        result
    }

    /// Clones a stub of our own, in a time namespace if a clock would go backwards.
    pub(super) fn clone_stub(&self, args: &CloneArgs, ring: &Ring, pid: Pid) -> Result<Pid> {
        let before = self.clocks_go_on()?;
        let result = self.arena.clone_root(args, ring);
        if let Some(before) = before {
            rewake_sys::task::enter_time_namespace(before.as_fd())
                .map_err(|e| Error::new(format!("returning to the time namespace: {e}")))?;
        }
        result.map_err(|e| clone_error(pid, e.errno))
    }

    /// From now on ids are those of the tree's PID namespace, and paths those of its mount namespace, if it has them.
    pub(super) fn look_from_inside(&self, first: Pid, opener: &mut Opener<'_>) -> Result<()> {
        opener.pids = self.pids.clone();
        if self.env.namespaces.pid {
            use rustix::fs::{Mode, OFlags};
            let root = format!("/proc/{first}/root");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(&root, flags, Mode::empty())
                .map_err(|e| Error::new(format!("{root}: {e}")))?;
            opener.root = Some(root);
        }
        Ok(())
    }

    /// If a clock of the images is ahead of ours (after a reboot, on another machine): a time namespace in which it is
    /// not, so that it never goes backwards for the program.
    pub(super) fn clocks_go_on(&self) -> Result<Option<OwnedFd>> {
        use rustix::time::{ClockId, clock_gettime};
        let Some(then) = &self.checkpoint.clocks else { return Ok(None) };
        let nanoseconds = |sec: i64, nsec: i64| i128::from(sec) * 1_000_000_000 + i128::from(nsec);
        let offset = |then: &rewake_image::messages::Timespec, clock: ClockId| {
            let now = clock_gettime(clock);
            let ahead = nanoseconds(then.tv_sec as i64, then.tv_nsec as i64)
                - nanoseconds(now.tv_sec, now.tv_nsec);
            let ahead = ahead.max(0);
            ((ahead / 1_000_000_000) as i64, (ahead % 1_000_000_000) as i64)
        };
        let monotonic = offset(&then.monotonic, ClockId::Monotonic);
        let boottime = offset(&then.boottime, ClockId::Boottime);
        if monotonic == (0, 0) && boottime == (0, 0) {
            return Ok(None);
        }
        rewake_sys::task::new_time_namespace(monotonic, boottime).map(Some).map_err(|e| {
            Error::new(format!("a time namespace in which the clocks go on cannot be made: {e}"))
        })
    }

    /// Waits until every node is born, cloners before those they clone.
    pub(super) fn wait_births(&self, rings: &[Ring], created: &mut Created) -> Result<()> {
        if !self.lineage.sequence.is_empty() {
            return self.take_turns(rings, created);
        }
        let transient: Vec<usize> = (0..self.plans.len())
            .filter(|i| match self.lineage.nodes[*i].role {
                Role::Leader | Role::Orphaner => true,
                Role::Task(t) => self.checkpoint.tasks[t].alive.is_none(),
                Role::Group | Role::Init => false,
            })
            .collect();
        for (i, plan) in self.plans.iter().enumerate() {
            let node = &self.lineage.nodes[i];
            if transient.contains(&i) {
                created.note(node.pid, &self.pids);
                continue;
            }
            let (pid, comm) = self.name(i);
            rings[i]
                .wait(1, |waited| {
                    // A helper reports only if it could not do what it was made for.
                    let stuck = transient.iter().any(|t| rings[*t].is_done(1));
                    if stuck || waited > PATIENCE {
                        return Err(rewake_inject::Error::Timeout {
                            pid,
                            seconds: waited.as_secs(),
                        });
                    }
                    self.still_there(pid)
                })
                .or_else(|e| self.helper_error(rings, &transient).and(Err(e).of(pid, &comm)))?;
            self.check(
                &plan.birth,
                &rings[i].results(&plan.birth.script),
                pid,
                &comm,
                &mut Vec::new(),
            )?;
            created.note(node.pid, &self.pids);
        }
        Ok(())
    }

    /// Tells why a helper could not do its work, if one could not.
    pub(super) fn helper_error(&self, rings: &[Ring], transient: &[usize]) -> Result<()> {
        for i in transient.iter().filter(|t| rings[**t].is_done(1)) {
            let (pid, comm) = self.name(*i);
            let birth = &self.plans[*i].birth;
            self.check(birth, &rings[*i].results(&birth.script), pid, &comm, &mut Vec::new())?;
        }
        Ok(())
    }

    pub(super) fn name(&self, node: usize) -> (Pid, Vec<u8>) {
        match self.lineage.nodes[node].role {
            Role::Task(i) => (self.checkpoint.tasks[i].pid, self.checkpoint.tasks[i].comm.clone()),
            Role::Init => (1, namespaces::INIT.to_vec()),
            _ => (self.lineage.nodes[node].pid.unwrap_or(0), b"helper".to_vec()),
        }
    }
}

/// A pid that is taken is told with who has it.
pub(super) fn clone_error(pid: Pid, errno: Errno) -> Error {
    if errno == Errno::EXIST {
        return taken(pid);
    }
    let error = Error::new(format!("creating process {pid}: {errno}"));
    if errno == Errno::PERM {
        return error.hint("choosing pids needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN");
    }
    error
}

fn taken(pid: Pid) -> Error {
    let stat = |pid| ProcDir::open(pid)?.stat(&mut Vec::new());
    let error = |holder: String| Error::new(format!("pid {pid} of the images is taken, {holder}"));
    let end = |error: Error| error.hint("end that process, or use --new-pidns");
    let Ok(holder) = stat(pid) else {
        if let Some(member) = member_of(pid) {
            let (name, dead) = (text(&member.comm), member.has_ended());
            let suffix = if dead { ", which is dead and waits to be reaped" } else { "" };
            let holder = format!("process {} ({name}){suffix}", member.pid);
            let mut error = end(error(format!("as the session or process group of {holder}")));
            error.transient = dead;
            return error;
        }
        // It is one that has just died, and is not in /proc any more.
        let mut error = end(error("by a process that is not in /proc".to_owned()));
        error.transient = true;
        return error;
    };
    let comm = text(&holder.comm);
    let leader = ProcDir::open(pid).and_then(|dir| dir.status(&mut Vec::new())).map(|s| s.tgid);
    if let Some(leader) = leader.ok().filter(|leader| *leader != pid) {
        return end(error(format!("by a thread of process {leader} ({comm})")));
    }
    if !holder.has_ended() {
        return end(error(format!("by process {pid} ({comm})")));
    }
    let parent = stat(holder.ppid).map_or_else(
        |_| "its parent".to_owned(),
        |parent| format!("process {} ({})", parent.pid, text(&parent.comm)),
    );
    let dead =
        format!("by process {pid} ({comm}), which is dead and waits to be reaped by {parent}");
    let mut error = error(dead).hint("have that do it, or use --new-pidns");
    // It may do so any moment.
    error.transient = true;
    error
}

/// A process in the session or group of this number.
fn member_of(group: Pid) -> Option<Stat> {
    let proc = ProcRoot::open().ok()?;
    let mut buffer = Vec::new();
    let stats = proc.pids().ok()?.into_iter();
    let mut stats = stats.filter_map(|pid| proc.pid(pid).ok()?.stat(&mut buffer).ok());
    stats.find(|stat| stat.pgrp == group || stat.session == group)
}
