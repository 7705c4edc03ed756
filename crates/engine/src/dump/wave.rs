//! What a tracer thread does: it surveys its tasks, some at the same time (a wave).

use super::inside::{self, Inside, Visible};
use super::live::{Before, Live};
use super::outside::{self, Outside};
use super::probes;
use super::sharing::Sharing;
use super::thread;
use crate::error::{Context, Error, Result};
use crate::freeze::{Held, Task, Tree};
use crate::track::{self, Tracks};
use rewake_inject::witness::Witness;
use rewake_objects::memory::tracking;
use rewake_objects::problem::text;
use rewake_sys::sched::Pin;
use rewake_sys::userfaultfd::Userfaultfd;
use rustix::process::PidfdFlags;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// What tasks are compared with.
pub(super) struct Own {
    pub(super) namespaces: Vec<Vec<u8>>,
    pub(super) vdso: Vec<u8>,
    pub(super) witnesses: Witnesses,
    pub(super) tracks: Arc<Tracks>,
    /// What was tracked until now counts.
    pub(super) counts: bool,
    pub(super) sharing: Arc<Sharing>,
    /// Keeps memory as it is at this instant.
    pub(super) live: Option<Arc<Live>>,
}

impl Own {
    pub(super) fn new(tree: &Tree, tracks: Arc<Tracks>, live: Option<Arc<Live>>) -> Result<Own> {
        let sharing = Arc::new(Sharing::survey(&tree.tasks)?);
        Ok(Own {
            namespaces: outside::own_namespaces(),
            vdso: crate::own::AddressSpace::read()?.vdso,
            witnesses: Witnesses::default(),
            counts: tracks.begin(),
            tracks,
            sharing,
            live,
        })
    }

    /// What is known of the mappings of tasks.
    pub(super) fn before(&self) -> Before<'_> {
        self.live.as_deref().map_or(Before::Unseen, Before::Protected)
    }
}

/// Whom tasks may look at that are in no Landlock domain, by user and group id.
#[derive(Debug, Default)]
pub(super) struct Witnesses(Mutex<HashMap<(u32, u32), Option<Witness>>>);

impl Witnesses {
    /// The pid of one with these ids, if there can be one.
    pub(super) fn of(&self, uid: u32, gid: u32) -> Option<i32> {
        let mut called = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let witness = called.entry((uid, gid)).or_insert_with(|| {
            let witness = Witness::call(uid, gid);
            witness.inspect_err(|e| log::debug!("Landlock domains are not noticed: {e}")).ok()
        });
        witness.as_ref().map(Witness::pid)
    }
}

/// A living task, as its tracer thread saw it.
pub(super) struct Seen {
    pub(super) visible: Visible,
    pub(super) inside: Inside,
    /// Made to track its memory from now on.
    pub(super) uffd: Option<Userfaultfd>,
}

/// Divides tasks into those that are asked at the same time: while one does what its agent wants, the tracer is busy with
/// the others. One that takes turns with others is alone.
pub(super) fn waves<'h>(mut held: &'h mut [Held], sharing: &Sharing) -> Vec<&'h mut [Held]> {
    const WAVE: usize = 16;
    let mut waves = Vec::new();
    while !held.is_empty() {
        let few =
            |held: &&Held| !thread::needs_help(&held.task) && !sharing.takes_turns(held.task.pid());
        let len = held.iter().take(WAVE).take_while(few).count().max(1);
        let (wave, rest) = held.split_at_mut(len);
        waves.push(wave);
        held = rest;
    }
    waves
}

/// Surveys some tasks. With `pin`, the calling thread works on the CPU where the first of them is.
pub(super) fn survey_wave(
    mut held: &mut [Held],
    own: &Own,
    mut pin: Option<&mut Pin>,
    cure: bool,
) -> Result<Vec<Seen>> {
    let first = held.first().map(|held| held.task.pid());
    let turn = first.and_then(|pid| own.sharing.wait_for_turn(pid));
    let cure = cure || turn.is_some();
    let mut visible = Vec::with_capacity(held.len());
    let mut filtered = Vec::with_capacity(held.len());
    for held in &*held {
        let seen = look_at(&held.task, own, own.before())?;
        filtered.push(suspend_seccomp(&held.task, seen.outside.status.seccomp.unwrap_or(0) != 0)?);
        visible.push(seen);
    }
    let mut insides = Vec::with_capacity(held.len());
    let mut uffds = Vec::with_capacity(held.len());
    while !held.is_empty() {
        // If we are killed, an agent finds its way out under the filters of its task, which may forbid it: there it stays
        // no longer than it must.
        let done = insides.len();
        let len = filtered[done..].iter().take_while(|filtered| !**filtered).count().max(1);
        let (now, later) = held.split_at_mut(len);
        insides.append(&mut inside::survey(
            now,
            &visible[done..done + len],
            &own.witnesses,
            pin.as_deref_mut(),
        )?);
        for (held, visible) in now.iter().zip(&visible[done..]) {
            uffds.push(track(held, &visible.outside, own));
        }
        if cure || filtered[done] {
            now.iter_mut().for_each(Held::cure);
        }
        let asked = now.iter().zip(&mut visible[done..]).zip(&mut insides[done..]);
        for (((held, visible), inside), uffd) in asked.zip(&uffds[done..]) {
            if let Some(live) = &own.live {
                live.survey(&held.task, &mut visible.outside)?;
            } else {
                let tracking = own.tracks.of(&held.task, uffd.as_ref(), own.counts);
                visible.outside.survey_pages(&held.task, tracking)?;
            }
            probes::leave_out(&held.task, &mut visible.outside, inside)?;
        }
        held = later;
    }
    let seen = visible.into_iter().zip(insides).zip(uffds);
    Ok(seen.map(|((visible, inside), uffd)| Seen { visible, inside, uffd }).collect())
}

/// Makes a userfaultfd in a task that has an agent inside, if its memory is to be tracked and is not yet. It is no reason
/// to fail if that cannot be.
pub(super) fn track(held: &Held, outside: &Outside, own: &Own) -> Option<Userfaultfd> {
    if !outside.owns.vm {
        return None;
    }
    let untrackable = if tracking::has_pinned_memory(&outside.vmas) {
        Some("its asynchronous I/O (io_uring, AIO) writes to memory without being noticed")
    } else if own.sharing.takes_turns(held.task.pid()) {
        Some("it shares memory or descriptors with another process")
    } else {
        None
    };
    if let Some(why) = untrackable {
        own.tracks.forget(&held.task);
        own.tracks.cannot(&held.task, why);
        return None;
    }
    if !own.tracks.wants(&held.task, outside.is_watched()) {
        return None;
    }
    let made = match &held.agent {
        Some(agent) => track::make(agent),
        None => Err("it has no agent".to_owned()),
    };
    made.map_err(|why| own.tracks.cannot(&held.task, &why)).ok()
}

/// Makes pidfd_open(2) take a thread that leads no process (linux/pidfd.h).
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// Looks at a task from outside.
pub(super) fn look_at(task: &Task, own: &Own, before: Before<'_>) -> Result<Visible> {
    let (pid, comm) = (task.pid(), task.comm());
    let owns = own.sharing.owns(pid);
    let outside = outside::survey(task, owns, &own.namespaces, &own.vdso, before)?;
    if outside.has_guest() {
        let mut error = Error::new(format!(
            "process {pid} ({}) has another dump's agent inside, or memory that looks like it",
            text(comm)
        ))
        .hint("wait for the other dump to end");
        error.transient = true;
        return Err(error);
    }
    let tid = task.tid();
    let raw = rustix::process::Pid::from_raw(tid)
        .ok_or_else(|| Error::new(format!("{tid} is no process id")))?;
    // That of a process is its leader's, which has no descriptors any more if it has ended.
    let flags = match task.leader_ended {
        None => PidfdFlags::empty(),
        Some(_) => PidfdFlags::from_bits_retain(PIDFD_THREAD),
    };
    let opened = rustix::process::pidfd_open(raw, flags);
    let pidfd = match opened {
        Err(rustix::io::Errno::INVAL) if task.leader_ended.is_some() => {
            let what = "its first thread has ended while others run on, and this kernel opens no pidfd of another thread";
            let error = Error::new(format!("process {pid} ({}): {what}", text(comm)));
            return Err(error.hint("it needs Linux 6.9 or later"));
        }
        opened => opened.map_err(|e| format!("pidfd_open: {e}")).of(pid, comm)?,
    };
    Ok(Visible { outside, pidfd })
}

/// Has the filters of a task's threads not apply as long as they are traced: they stand still, and what runs in them
/// meanwhile is ours. Returns whether there are any.
pub(super) fn suspend_seccomp(task: &Task, leader: bool) -> Result<bool> {
    use rewake_sys::ptrace::{O_SUSPEND_SECCOMP, O_TRACESYSGOOD, set_options};
    // Each thread has a mode of its own. Looking would take longer than doing it.
    if !leader && task.tids.len() == 1 {
        return Ok(false);
    }
    let suspend = |tid: &i32| set_options(*tid, O_TRACESYSGOOD | O_SUSPEND_SECCOMP);
    let Err(e) = task.tids.iter().try_for_each(suspend) else { return Ok(leader) };
    let any = leader || thread::any_filtered(task)?;
    if !any {
        return Ok(false);
    }
    Err(Error::new(format!(
        "process {} ({}): its seccomp filters cannot be suspended: {e}",
        task.pid(),
        text(task.comm())
    ))
    .hint("run rewake with CAP_SYS_ADMIN, and outside of any seccomp filter itself"))
}
