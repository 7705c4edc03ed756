//! The second script: memory, working directory, descriptors, threads, and what does not tick of the process.

use super::super::read::{Alive, Task};
use super::super::thread::thread_basics;
use super::birth::{close_lent, die_with};
use super::descriptors::{A_MESSAGE, is_file, mapped, pages, receive};
use super::{Environment, Handed, ThreadPlan, clone_op, name_steps, op};
use crate::error::{Error, Result};
use rewake_image::StoredPages;
use rewake_image::messages::VmaEntry;
use rewake_objects::Problem;
use rewake_objects::memory::huge::Staged;
use rewake_objects::memory::inherit::Inheritance;
use rewake_objects::memory::mm::{self, Held, Layout, Strings};
use rewake_objects::memory::vma;
use rewake_objects::memory::{lazy, numa};
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::lend_timer_slack;
use rewake_objects::task::{attributes, limits, signals, timers};
use std::collections::HashMap;

/// Builds a task.
pub(super) struct Builder<'a> {
    pub(super) index: usize,
    pub(super) task: &'a Task,
    pub(super) alive: &'a Alive,
    pub(super) env: &'a Environment,
    pub(super) socket: i32,
    pub(super) held: &'a Held,
    pub(super) shares_table: bool,
    pub(super) inherited: &'a Inheritance,
    /// What the task fills itself.
    pub(super) pages: Option<&'a StoredPages>,
    pub(super) steps: Steps,
    /// What the controller fills.
    pub(super) staged: Staged,
    pub(super) warnings: Vec<String>,
    pub(super) messages: Vec<Vec<Handed>>,
}

impl Builder<'_> {
    fn of(&self, problem: Problem) -> Error {
        Error::of(self.task.pid, &self.task.comm, problem)
    }

    /// Who shares the memory of one before it finds it made.
    fn makes_memory(&self) -> bool {
        self.task.part.memory == self.index
    }

    /// All of it, in the order in which it can be done.
    pub(super) fn build(
        &mut self,
        group: Option<i32>,
        zombies: &[(i32, i32)],
        orphan: bool,
        same_vdso: bool,
        threads: &[ThreadPlan],
        headers: &[u64],
    ) -> Result<()> {
        let steps = &mut self.steps;
        if orphan {
            die_with(steps, Some(self.task.ppid));
        }
        if let Some(group) = group {
            steps.must(
                Label::Text("joining the process group"),
                op(libc::SYS_setpgid, &[0, group as u64]),
            );
        }
        for (pid, group) in zombies {
            steps.must(
                Label::Text("putting a zombie into its process group"),
                op(libc::SYS_setpgid, &[*pid as u64, *group as u64]),
            );
        }
        // The controller has taken its end (number 1: the pair got 0 and 1), and the first of those who share it closes it.
        if self.task.part.table == self.index {
            steps.must(Label::Text("closing the controller's socket"), op(libc::SYS_close, &[1]));
            if self.shares_table && !self.env.lent.is_empty() {
                close_lent(steps, self.env);
            }
        }
        // Further threads inherit it.
        if let Some(policy) = self.alive.extra.as_ref().and_then(|e| e.policy.as_ref()) {
            numa::restore_own(&mut self.steps, policy);
        }
        let lent = self.lend()?;
        if self.makes_memory() {
            self.memory(&lent, same_vdso)?;
        }
        if self.task.part.directories {
            self.file_system(&lent)?;
        }
        let steps = &mut self.steps;
        if !lent.is_empty() {
            steps.must(
                Label::Text("closing lent descriptors"),
                op(libc::SYS_close_range, &[0, lent.len() as u64 - 1, 0]),
            );
        }
        if self.task.part.fills_table {
            self.descriptors()?;
        }
        self.process();
        self.threads(threads, headers);
        Ok(())
    }

    /// Receives what building needs (mapped files, pages, exe, directories) as numbers 0, 1, 2…
    fn lend(&mut self) -> Result<HashMap<Handed, i32>> {
        let mut list: Vec<Handed> = Vec::new();
        let mut numbers = HashMap::new();
        let mut add = |handed: Handed| {
            numbers.entry(handed).or_insert_with(|| {
                list.push(handed);
                list.len() as i32 - 1
            });
        };
        let alive = self.alive;
        let held = |vma: &VmaEntry| self.held.places.contains_key(&vma.start);
        let vmas = if self.makes_memory() { alive.mm.vmas.as_slice() } else { &[] };
        let own = || vmas.iter().filter(|v| mm::is_mapped(v) && !held(v));
        if own().any(vma::has_private_pages) {
            let stores = self.pages.iter().flat_map(|pages| pages.stores());
            stores.map(Handed::Pages).for_each(&mut add);
        }
        if self.makes_memory() && !alive.aio.is_empty() {
            pages(alive).for_each(&mut add);
        }
        for vma in own().filter(|v| is_file(v) && !self.inherited.has(v)) {
            add(mapped(vma).map_err(|p| self.of(p))?);
        }
        if self.makes_memory() && !self.held.in_place {
            add(Handed::File(alive.mm.exe_file_id));
        }
        if self.task.part.directories {
            add(Handed::File(alive.fs.cwd_id));
            if !self.env.plain_root {
                add(Handed::File(alive.fs.root_id));
            }
        }
        for chunk in list.chunks(A_MESSAGE) {
            receive(&mut self.steps, self.socket, chunk.len());
            self.messages.push(chunk.to_vec());
        }
        Ok(numbers)
    }

    fn memory(&mut self, lent: &HashMap<Handed, i32>, same_vdso: bool) -> Result<()> {
        let number = |handed: Handed| {
            lent.get(&handed)
                .copied()
                .ok_or_else(|| Problem::new(format!("{handed:?}"), "it was not handed over"))
        };
        let descriptor = |vma: &VmaEntry| mapped(vma).and_then(number);
        let layout = Layout {
            stub: &self.env.specials,
            hop: self.env.hop,
            same_vdso,
            descriptor: &descriptor,
            segment: &|id| self.env.segments.get(&id).copied().unwrap_or(0),
            pages: &|store| lent.get(&Handed::Pages(store)).copied(),
            lock_on_fault: self.alive.extra.as_ref().map_or(&[], |e| &e.lock_on_fault),
            held: self.held,
            later: self.alive.later.as_ref(),
            policies: self.alive.extra.as_ref().map_or(&[], |e| &e.policies),
            aio: &self.alive.aio,
            huge: self.env.huge.filter(|_| !self.alive.mm.thp_disabled.unwrap_or(false)),
            inherited: self.inherited,
        };
        let alive = self.alive;
        // Before anything is mapped: the kernel does not change the executable while the old one, ours, is mapped, and
        // the program may be rewake itself.
        if !self.held.in_place {
            let exe = number(Handed::File(alive.mm.exe_file_id)).map_err(|p| self.of(p))?;
            let strings = if alive.later.is_some() { Strings::Withheld } else { Strings::Told };
            mm::restore_map(&mut self.steps, &alive.mm, exe, strings);
        }
        let staged = mm::restore(&mut self.steps, &alive.mm, self.pages, &layout);
        self.staged = staged.map_err(|p| self.of(p))?;
        let mdwe = alive.extra.as_ref().and_then(|e| e.mdwe).unwrap_or(0);
        let thp_disabled = alive.mm.thp_disabled.unwrap_or(false);
        attributes::restore_memory_policy(&mut self.steps, thp_disabled, mdwe);
        if let Some(later) = &alive.later {
            lazy::register(&mut self.steps, &lazy::mappings(&alive.mm, later), self.socket);
            if !self.held.in_place {
                mm::restore_strings(&mut self.steps, &alive.mm);
            }
        }
        Ok(())
    }

    /// Root, working directory, umask.
    fn file_system(&mut self, lent: &HashMap<Handed, i32>) -> Result<()> {
        let fs = &self.alive.fs;
        let steps = &mut self.steps;
        let enter = |steps: &mut Steps, id: u32, what: &'static str| {
            let fd = lent.get(&Handed::File(id)).copied().unwrap_or(-1);
            steps.must(Label::Text(what), op(libc::SYS_fchdir, &[fd as u64]));
        };
        if !self.env.plain_root {
            enter(steps, fs.root_id, "entering the root directory");
            let here = steps.script.cstr(b".");
            steps.must(
                Label::Text("changing the root directory"),
                op(libc::SYS_chroot, &[here.address]),
            );
        }
        enter(steps, fs.cwd_id, "entering the working directory");
        let umask = u64::from(fs.umask.unwrap_or(0o22));
        steps.may(Label::Text("setting the umask"), op(libc::SYS_umask, &[umask]));
        Ok(())
    }

    /// Receives the task's descriptors. They come in ascending order, so each lands on a number that is not above its
    /// own: moving them from the last to the first never hits one that is still to be moved.
    fn descriptors(&mut self) -> Result<()> {
        let fds = &self.alive.fds;
        let mut taken: std::collections::HashSet<u32> = [self.socket as u32].into();
        // Numbers below are taken for good.
        let mut free = 0;
        for chunk in fds.chunks(A_MESSAGE) {
            receive(&mut self.steps, self.socket, chunk.len());
            while taken.contains(&free) {
                free += 1;
            }
            let landing: Vec<u32> =
                (free..).filter(|n| !taken.contains(n)).take(chunk.len()).collect();
            for (fd, landed) in chunk.iter().zip(landing).rev() {
                let label = Label::Descriptor(fd.fd);
                let cloexec = fd.flags & 1 != 0;
                let (from, to) = (u64::from(landed), u64::from(fd.fd));
                if landed != fd.fd {
                    let flags = if cloexec { libc::O_CLOEXEC as u64 } else { 0 };
                    self.steps.must(label, op(libc::SYS_dup3, &[from, to, flags]));
                    self.steps.must(label, op(libc::SYS_close, &[from]));
                } else if cloexec {
                    let set = op(libc::SYS_fcntl, &[to, libc::F_SETFD as u64, 1]);
                    self.steps.must(label, set);
                }
            }
            taken.extend(chunk.iter().map(|f| f.fd));
            self.messages.push(chunk.iter().map(|f| Handed::File(f.id)).collect());
        }
        Ok(())
    }

    fn process(&mut self) {
        let tc = &self.task.tc;
        let leader = &self.alive.threads[0];
        let extra = self.alive.extra.as_ref();
        name_steps(&mut self.steps, &tc.comm);
        attributes::restore_process(
            &mut self.steps,
            tc.child_subreaper.unwrap_or(false),
            tc.membarrier_registration_mask.unwrap_or(0),
            extra.and_then(|e| e.tsc).unwrap_or(0),
            extra.and_then(|e| e.io_flusher).unwrap_or(false),
        );
        // CRIU reads the hexadecimal file as decimal: its value cannot be told from a right one; ours is beside it.
        let personality = extra.and_then(|e| e.personality).unwrap_or(tc.personality);
        if personality != self.env.personality {
            self.steps.must(
                Label::Text("setting the personality"),
                op(libc::SYS_personality, &[u64::from(personality)]),
            );
        }
        thread_basics(&mut self.steps, leader);
        if self.task.has_queued(signals::continues) {
            let (pid, steps) = (self.task.pid, &mut self.steps);
            signals::restore_continue_action(steps, &tc.sigactions);
            for (queue, tid) in [(&tc.signals_s, None), (&leader.thread.signals_p, Some(pid))] {
                if let Some(queue) = queue {
                    signals::restore_continue(steps, queue, pid, tid);
                }
            }
        }
    }

    fn threads(&mut self, threads: &[ThreadPlan], headers: &[u64]) {
        let flags = (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM) as u64;
        for (n, (thread, header)) in threads.iter().zip(headers).enumerate() {
            let all = &self.alive.threads;
            let own = || all[0].default_slack();
            lend_timer_slack(&mut self.steps, all[n + 1].default_slack().or_else(own));
            clone_op(&mut self.steps, Some(thread.tid), flags, 0, *header);
        }
        // Each thread reports its first batch; a word that has changed already does not block.
        for header in headers {
            let done = header + rewake_agent::layout::offset::DONE as u64;
            self.steps.may(
                Label::Text("waiting for a thread"),
                op(libc::SYS_futex, &[done, libc::FUTEX_WAIT as u64, 0, 0]),
            );
        }
        // Timers may name threads, so they come after them.
        if let Some(entries) = &self.task.tc.timers {
            timers::restore_created(&mut self.steps, entries, self.env.timer_ids);
        }
        if let Some(entries) = &self.task.tc.rlimits {
            self.warnings.extend(limits::restore(
                &mut self.steps,
                entries,
                &self.env.limits,
                self.env.may_raise,
            ));
        }
        if self.task.part.fills_table {
            self.steps.must(
                Label::Text("closing the agent's socket"),
                op(libc::SYS_close, &[self.socket as u64]),
            );
        }
    }
}
