//! The other scripts are executed, by all tasks at the same time, and their results judged.

use super::births::clone_error;
use super::build::{Handed, NodePlan, TaskPlan, ThreadPlan};
use super::lineage::Role;
use super::locks::Locked;
use super::read::Task;
use super::{PATIENCE, Run, namespaces};
use crate::error::{Context, Error, Result};
use crate::lazy::client::Client;
use crate::options::Pid;
use rewake_agent::layout::Op;
use rewake_image::ImageDir;
use rewake_inject::ring::{Ring, Script};
use rewake_objects::Problem;
use rewake_objects::files::open::Opener;
use rewake_objects::files::pty;
use rewake_objects::problem::text;
use rewake_objects::steps::{Expect, Label, Steps};
use rewake_sys::Errno;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;

impl Run<'_> {
    /// Is the stub alive? A dead one would never answer.
    pub(super) fn still_there(&self, pid: Pid) -> rewake_inject::Result<()> {
        let gone = |how: &str| Err(rewake_inject::Error::Gone { tid: pid, how: how.into() });
        let Some(outer) = self.pids.outer(pid) else { return gone("it vanished") };
        match rewake_proc::read::ProcDir::open(outer).and_then(|d| d.stat(&mut Vec::new())) {
            Ok(stat) if stat.state == rewake_proc::stat::TaskState::Zombie => {
                gone(&format!("wait status {:#x}", stat.exit_code))
            }
            Ok(_) => Ok(()),
            Err(_) => gone("it vanished"),
        }
    }

    /// Compares what a script's operations resulted in with what they should have.
    pub(super) fn check(
        &self,
        steps: &Steps,
        results: &rewake_inject::ring::Results,
        pid: Pid,
        comm: &[u8],
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let name = || format!("process {pid} ({})", text(comm));
        for (i, (label, expect)) in steps.labels.iter().enumerate() {
            match (expect, results.value(i)) {
                (Expect::Any, _) | (Expect::Success | Expect::Wish, Ok(_)) => {}
                (Expect::Value(wanted), Ok(value)) if *wanted == value => {}
                (Expect::Value(wanted), Ok(value)) => {
                    let what = match label {
                        Label::Fill(..) => {
                            format!(
                                "only {value} of {wanted} bytes could be read: the pages file is too short"
                            )
                        }
                        _ => format!("{value:#x} instead of {wanted:#x}"),
                    };
                    return Err(Error::new(format!("{}: {label}: {what}", name())));
                }
                (Expect::Wish, Err(errno)) => {
                    warnings.push(format!("{}: {label}: {errno}", name()))
                }
                (Expect::Success | Expect::Value(_), Err(errno)) => {
                    return Err(match label {
                        Label::Clone(child) => clone_error(*child, errno),
                        Label::Aio(_) if errno == Errno::AGAIN => {
                            Error::new(format!("{}: {label}: no more contexts may be made", name()))
                                .hint("raise the limit: sysctl fs.aio-max-nr")
                        }
                        Label::Vma(..) if errno == Errno::NOMEM => {
                            Error::new(format!("{}: {label}: out of memory", name()))
                        }
                        Label::Huge(..) if matches!(errno, Errno::AGAIN | Errno::BUSY) => {
                            let mut error = Error::new(format!("{}: {label}: {errno}", name()));
                            // The kernel holds a page, for a moment.
                            error.transient = true;
                            error
                        }
                        _ => Error::new(format!("{}: {label}: {errno}", name())),
                    });
                }
            }
        }
        Ok(())
    }

    /// Hands descriptors over and has every task build itself, all at the same time but for those that share memory or
    /// descriptors.
    pub(super) fn build(
        &self,
        rings: &[Ring],
        numbers: &HashMap<usize, [u32; 2]>,
        opener: &mut Opener<'_>,
        mut pager: Option<&mut Client>,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let all = || rings.iter().zip(self.plans).filter_map(|(r, p)| Some((r, p.task.as_ref()?)));
        let turns = all().map(|(_, plan)| self.task(plan).part.turn + 1).max().unwrap_or(0);
        if self.options.copies.is_none() {
            let handed = all().flat_map(|(_, plan)| plan.messages.iter().flatten());
            let file = |handed: &Handed| match *handed {
                Handed::File(id) | Handed::Writable(id) => Some(id),
                Handed::Pages(_) => None,
            };
            let locked = self.env.locks.values().flatten().map(Locked::file).collect();
            opener.open_in_portions(handed.filter_map(file), &locked);
        }
        let mut sockets = HashMap::new();
        for turn in 0..turns {
            let mut running = Vec::new();
            for (ring, plan) in all().filter(|(_, plan)| self.task(plan).part.turn == turn) {
                let uffd = self.hand_over(numbers, plan, &mut sockets, opener)?;
                let number = ring
                    .load(&plan.build.script)
                    .and_then(|number| ring.ring().map(|()| number))
                    .map_err(|e| Error::new(e.to_string()))?;
                running.push((ring, plan, number, uffd));
            }
            for (ring, plan, number, uffd) in running {
                let task = self.task(plan);
                self.wait(ring, number, task)?;
                let results = ring.results(&plan.build.script);
                self.check_threads(plan, task, warnings)?;
                self.check(&plan.build, &results, task.pid, &task.comm, warnings)?;
                if let (Some(pager), Some(socket)) = (&mut pager, uffd) {
                    self.tell(pager, task, &socket)?;
                }
            }
        }
        Ok(())
    }

    /// Tells the pager of a task, whose userfaultfd is in the socket.
    fn tell(&self, pager: &mut Client, task: &Task, socket: &OwnedFd) -> Result<()> {
        let outer = rustix::process::Pid::from_raw(self.outer(task.pid)?).ok_or(Errno::SRCH);
        let told = receive(socket).and_then(|uffd| {
            let pidfd = rustix::process::pidfd_open(outer?, rustix::process::PidfdFlags::empty())?;
            Ok((uffd, pidfd))
        });
        let (uffd, pidfd) = told.of(task.pid, &task.comm)?;
        pager.process(task.pid, uffd, &pidfd)
    }

    /// Tells the pager of the tasks that wait for nothing.
    pub(super) fn tell_rest(&self, pager: &mut Client) -> Result<()> {
        let waits = |task: &Task| task.alive.as_ref().is_some_and(|alive| alive.later.is_some());
        let rest = self.checkpoint.tasks.iter().filter(|task| !waits(task));
        rest.into_iter().try_for_each(|task| pager.nothing(task.pid))
    }

    /// The ring of a thread. Looking at it does not change it; only its header would be written by `Arena::ring`.
    pub(super) fn thread_ring(&self, thread: &ThreadPlan) -> Ring {
        self.arena.look(thread.at, thread.len, thread.data)
    }

    /// Runs the last scripts of threads that have one, after their leader's.
    fn finish_threads(
        &self,
        plan: &TaskPlan,
        task: &Task,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let mut running = Vec::new();
        for thread in &plan.threads {
            let Some(steps) = &thread.finish else { continue };
            let ring = self.thread_ring(thread);
            let number = ring
                .load(&steps.script)
                .and_then(|number| ring.ring().map(|()| number))
                .of(task.pid, &task.comm)?;
            running.push((thread.tid, ring, steps, number));
        }
        for (tid, ring, steps, number) in running {
            self.wait(&ring, number, task)?;
            let results = ring.results(&steps.script);
            self.check(steps, &results, tid, &task.comm, warnings)?;
        }
        Ok(())
    }

    pub(super) fn check_threads(
        &self,
        plan: &TaskPlan,
        task: &Task,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        for thread in &plan.threads {
            let ring = self.thread_ring(thread);
            if ring.is_done(1) {
                let results = ring.results(&thread.steps.script);
                self.check(&thread.steps, &results, thread.tid, &task.comm, warnings)?;
            }
        }
        Ok(())
    }

    pub(super) fn wait(&self, ring: &Ring, number: u32, task: &Task) -> Result<()> {
        ring.wait(number, |waited| {
            if waited > PATIENCE {
                return Err(rewake_inject::Error::Timeout {
                    pid: task.pid,
                    seconds: waited.as_secs(),
                });
            }
            self.still_there(task.pid)
        })
        .of(task.pid, &task.comm)
    }

    /// The numbers that the ends of the agents' sockets got when they were born, by the index of the task that made them; no
    /// other batch may have run since.
    pub(super) fn socket_numbers(&self, rings: &[Ring]) -> HashMap<usize, [u32; 2]> {
        let of = |(ring, plan): (&Ring, &NodePlan)| {
            let task = plan.task.as_ref()?;
            let (socket, results) = (task.socket?, ring.results(&plan.birth.script));
            Some((task.index, [results.u32(socket, 0), results.u32(socket, 4)]))
        };
        rings.iter().zip(self.plans).filter_map(of).collect()
    }

    /// Has the leaders of sessions open their `/dev/tty`, which means something else to everybody else, and takes it.
    pub(super) fn open_controlling(&self, rings: &[Ring], opener: &mut Opener<'_>) -> Result<()> {
        for (file, session, flags) in pty::of_sessions(opener) {
            if !self.env.terminals.contains_key(&session) {
                continue;
            }
            let leads = |p: &&TaskPlan| self.task(p).pid == session;
            let all = rings.iter().zip(self.plans);
            let leader = all.filter_map(|(ring, plan)| Some((ring, plan.task.as_ref()?)));
            let Some((ring, plan)) = leader.clone().find(|(_, p)| leads(p)) else { continue };
            let mut script = Script::new(ring.data_base());
            let path = script.cstr(b"/dev/tty");
            let args = [libc::AT_FDCWD as u64, path.address, u64::from(flags)];
            script.push(Op::new(libc::SYS_openat, &args));
            let fd = self.quick(ring, &script, plan)?;
            // The session has none: then it is like any terminal of a shell's job.
            let Ok(fd) = fd else { continue };
            let task = self.task(plan);
            let failed = |e: Errno| Error::new(format!("process {}: /dev/tty: {e}", task.pid));
            let raw = rustix::process::Pid::from_raw(self.outer(task.pid)?);
            let raw = raw.ok_or_else(|| failed(Errno::SRCH))?;
            let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty());
            let none = rustix::process::PidfdGetfdFlags::empty();
            let taken = pidfd
                .and_then(|pidfd| rustix::process::pidfd_getfd(&pidfd, fd as i32, none))
                .map_err(failed)?;
            opener.controlling.insert(file, taken);
            let mut script = Script::new(ring.data_base());
            script.push(Op::new(libc::SYS_close, &[fd as u64]));
            self.quick(ring, &script, plan)?.map_err(failed)?;
        }
        Ok(())
    }

    /// Runs a script of one operation.
    fn quick(
        &self,
        ring: &Ring,
        script: &Script,
        plan: &TaskPlan,
    ) -> Result<std::result::Result<i64, Errno>> {
        let number = ring.load(script).map_err(|e| Error::new(e.to_string()))?;
        ring.ring().map_err(|e| Error::new(e.to_string()))?;
        self.wait(ring, number, self.task(plan))?;
        Ok(ring.results(script).value(0))
    }

    /// Sends a task everything it is handed, as its scripts expect it; `sockets` are those of tables that several share. What
    /// has to wait for its memory sends something back: returned is where.
    fn hand_over(
        &self,
        numbers: &HashMap<usize, [u32; 2]>,
        task_plan: &TaskPlan,
        sockets: &mut HashMap<usize, OwnedFd>,
        opener: &mut Opener<'_>,
    ) -> Result<Option<OwnedFd>> {
        let task = self.task(task_plan);
        let table = task.part.table;
        let socket = match sockets.remove(&table) {
            Some(socket) => socket,
            None => {
                let numbers = numbers.get(&table).copied().unwrap_or_default();
                take_socket(self.outer(task.pid)?, numbers)
                    .map_err(|p| Error::of(task.pid, &task.comm, p))?
            }
        };
        hand_over(&socket, &task_plan.messages, self.images, opener)
            .map_err(|p| Error::of(task.pid, &task.comm, p))?;
        let waits = task.part.memory == task_plan.index
            && task.alive.as_ref().is_some_and(|alive| alive.later.is_some());
        let kept = waits.then(|| socket.try_clone()).transpose();
        let kept = kept.map_err(|e| Error::new(format!("dup: {e}")))?;
        if !task.part.fills_table {
            sockets.insert(table, socket);
        }
        Ok(kept)
    }

    /// Values that are set through `/proc`, before credentials change who owns it.
    pub(super) fn proc_values(&self, warnings: &mut Vec<String>) {
        let own_oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let own_filter = std::fs::read_to_string("/proc/self/coredump_filter").unwrap_or_default();
        for task in &self.checkpoint.tasks {
            let Some(alive) = &task.alive else { continue };
            let Some(outer) = self.pids.outer(task.pid) else { continue };
            let mut set = |name: &str, value: String| {
                if let Err(e) = std::fs::write(format!("/proc/{outer}/{name}"), &value) {
                    warnings.push(format!(
                        "process {} ({}): {name} cannot be set to {value}: {e}",
                        task.pid,
                        text(&task.comm)
                    ));
                }
            };
            if let Some(adj) = task.tc.oom_score_adj
                && own_oom.trim() != adj.to_string()
            {
                set("oom_score_adj", adj.to_string());
            }
            if let Some(filter) = alive.extra.as_ref().and_then(|e| e.coredump_filter)
                && u32::from_str_radix(own_filter.trim(), 16) != Ok(filter)
            {
                set("coredump_filter", format!("{filter:#x}"));
            }
            // The session is new, and so is its group.
            if let Some(nice) = alive.extra.as_ref().and_then(|e| e.autogroup_nice)
                && task.sid == task.pid
            {
                set("autogroup", nice.to_string());
            }
            if let Some(uid) = task.tc.loginuid.filter(|uid| *uid != u32::MAX) {
                let now = std::fs::read_to_string(format!("/proc/{outer}/loginuid"));
                if now.is_ok_and(|now| now.trim() != uid.to_string()) {
                    set("loginuid", uid.to_string());
                }
            }
        }
    }

    /// Ends group helpers, then runs the last script of every task.
    pub(super) fn finish(&self, rings: &[Ring], warnings: &mut Vec<String>) -> Result<()> {
        for (i, ring) in rings.iter().enumerate() {
            // On the longer way they have ended.
            if self.lineage.nodes[i].role == Role::Group && self.lineage.sequence.is_empty() {
                let mut script = Script::new(ring.data_base());
                script.push(rewake_agent::layout::Op::new(libc::SYS_exit_group, &[0]));
                ring.load(&script)
                    .and_then(|_| ring.ring())
                    .map_err(|e| Error::new(e.to_string()))?;
            }
        }
        let mut running = Vec::new();
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(task) = &plan.task else { continue };
            let number = ring.load(&task.finish.script).map_err(|e| Error::new(e.to_string()))?;
            ring.ring().map_err(|e| Error::new(e.to_string()))?;
            running.push((ring, task, number));
        }
        self.finish_init(rings)?;
        for (ring, plan, number) in running {
            let task = self.task(plan);
            self.wait(ring, number, task)?;
            let results = ring.results(&plan.finish.script);
            self.check(&plan.finish, &results, task.pid, &task.comm, warnings)?;
            self.finish_threads(plan, task, warnings)?;
        }
        Ok(())
    }

    /// Runs the last script of an init.
    pub(super) fn finish_init(&self, rings: &[Ring]) -> Result<()> {
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(steps) = &plan.init else { continue };
            let number = ring
                .load(&steps.script)
                .and_then(|number| ring.ring().map(|()| number))
                .and_then(|number| ring.wait(number, |_| self.still_there(1)).map(|()| number));
            number.of(1, namespaces::INIT)?;
            let results = ring.results(&steps.script);
            self.check(steps, &results, 1, namespaces::INIT, &mut Vec::new())?;
        }
        Ok(())
    }
}

/// Takes the controller's end of the socket pair that the agent of the stub with the pid `outer` has made, whose ends got
/// `numbers`.
pub(super) fn take_socket(outer: Pid, numbers: [u32; 2]) -> std::result::Result<OwnedFd, Problem> {
    let failed = |reason: String| Problem::new("the agent's socket", reason);
    if numbers != [0, 1] {
        return Err(failed(format!("the first descriptors are {numbers:?}")));
    }
    let raw = rustix::process::Pid::from_raw(outer);
    let raw = raw.ok_or_else(|| failed(format!("{outer} is no process id")))?;
    let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        .map_err(|e| failed(format!("pidfd_open: {e}")))?;
    let none = rustix::process::PidfdGetfdFlags::empty();
    rustix::process::pidfd_getfd(&pidfd, 1, none).map_err(|e| failed(format!("pidfd_getfd: {e}")))
}

/// Receives the one descriptor that a stub sends.
fn receive(socket: &OwnedFd) -> std::result::Result<OwnedFd, Errno> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut [std::io::IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.ok_or(Errno::MFILE)
}

/// Sends messages of descriptors to a stub.
pub(super) fn hand_over(
    socket: &OwnedFd,
    messages: &[Vec<Handed>],
    images: &ImageDir,
    opener: &mut Opener<'_>,
) -> std::result::Result<(), Problem> {
    messages.iter().try_for_each(|message| send(socket, message, images, opener))
}

/// Sends one message of descriptors.
fn send(
    socket: &OwnedFd,
    message: &[Handed],
    images: &ImageDir,
    opener: &mut Opener<'_>,
) -> std::result::Result<(), Problem> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let failed = |reason: String| Problem::new("handing descriptors over", reason);
    let mut pages = HashMap::new();
    for handed in message {
        match *handed {
            Handed::File(id) => drop(opener.open(id)?),
            Handed::Writable(id) => opener.open_writable(id)?,
            Handed::Pages(id) => {
                let file = images.open_store(id);
                pages.insert(id, file.map_err(|e| Problem::new("pages", e.to_string()))?);
            }
        }
    }
    let mut fds = Vec::with_capacity(message.len());
    for handed in message {
        fds.push(match *handed {
            Handed::File(id) => opener.opened(id)?,
            Handed::Writable(id) => opener.opened_writable(id)?,
            Handed::Pages(id) => pages[&id].as_fd(),
        });
    }
    let mut room = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(254))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(failed("too many of them in one message".into()));
    }
    let byte = [std::io::IoSlice::new(b"!")];
    sendmsg(socket, &byte, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
        .map_err(|e| failed(e.to_string()))?;
    for handed in message {
        if let Handed::File(id) | Handed::Writable(id) = *handed {
            opener.sent(id);
        }
    }
    Ok(())
}
