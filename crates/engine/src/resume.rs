//! Stopping a tree as SIGSTOP does, and letting one that a checkpoint left Stopped run on.

use crate::error::{Context, Error, Result};
use crate::freeze::{Life, Tree, refuse_thread};
use crate::options::Pid;
use crate::stopped::Notes;
use rewake_objects::problem::text;
use rewake_proc::read::{ProcDir, ReadError};
use rewake_proc::stat::{Stat, TaskState};
use rewake_sys::signal;
use std::time::{Duration, Instant};

/// Sends SIGSTOP to every living task of a frozen tree; they stop as soon as they are released.
pub fn stop_tree(tree: &Tree) -> Result<()> {
    let before: Vec<Pid> =
        tree.tasks.iter().filter(|t| matches!(t.life, Life::Stopped(_))).map(|t| t.pid()).collect();
    if let Some(root) = tree.tasks.first() {
        Notes::here().write(root.pid(), &before)?;
    }
    for task in tree.tasks.iter().filter(|t| t.life == Life::Alive) {
        signal::kill(task.pid(), libc::SIGSTOP).of(task.pid(), task.comm())?;
    }
    Ok(())
}

/// Waits until tasks that are sent a stop signal and let go have stopped, with all their threads, so that whoever looks at
/// them after the command finds them so. One that a stop cannot reach yet (in an uninterruptible wait) is not waited for
/// longer than a moment.
pub fn until_stopped(pids: impl Iterator<Item = Pid>) {
    let give_up = Instant::now() + Duration::from_secs(1);
    let mut buffer = Vec::new();
    for dir in pids.filter_map(|pid| ProcDir::open(pid).ok()) {
        let mut stands = |tid: i32| {
            let stat = dir.task(tid).and_then(|thread| thread.stat(&mut buffer));
            // Gone, dead, or in the hands of a tracer: none of these is waited for.
            !stat.is_ok_and(|stat| matches!(stat.state, TaskState::Running | TaskState::Sleeping))
        };
        for tid in dir.tids().unwrap_or_default() {
            while !stands(tid) && Instant::now() < give_up {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

fn directory(pid: Pid) -> Result<ProcDir> {
    ProcDir::open(pid).map_err(|e| gone(pid, &e))
}

fn gone(pid: Pid, e: &ReadError) -> Error {
    if e.is_gone() {
        Error::new(format!("there is no process {pid}"))
    } else {
        Error::new(e.to_string())
    }
}

fn is_stopped(pid: Pid) -> bool {
    let stat = ProcDir::open_living(pid).and_then(|dir| dir.stat(&mut Vec::new()));
    stat.is_ok_and(|stat| stat.state == TaskState::Stopped)
}

fn stat(pid: Pid) -> Result<Stat> {
    directory(pid)?.stat(&mut Vec::new()).map_err(|e| gone(pid, &e))
}

/// Lets a tree that a checkpoint left Stopped run on. Returns how many tasks were woken.
///
/// # Errors
/// No such process, or the tree is not stopped.
pub fn resume(root: Pid) -> Result<usize> {
    refuse_thread(&directory(root)?, &mut Vec::new())?;
    let root_stat = stat(root)?;
    let notes = Notes::here();
    let keep = notes.read(&root_stat);
    if !is_stopped(root) && !keep.contains(&root) {
        return Err(Error::new(format!(
            "process {root} ({}) is not stopped",
            text(&root_stat.comm)
        ))
        .hint("resume is for trees left by --leave-stopped"));
    }
    // What its connections are to send goes out, and what comes in is answered.
    match rewake_objects::sockets::lock::of_tree(root, root_stat.starttime) {
        Ok(found) => log::debug!("network locks removed: {:?}", found.removed),
        // There is none on a kernel that has no locks, or none that the caller could have made.
        Err(e) => log::debug!("{e}"),
    }
    // Children first: a parent that waits for stopped children must not find them half woken.
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(pid) = tree.get(at).copied() {
        at += 1;
        let Ok(dir) = ProcDir::open(pid) else { continue };
        let mut buffer = Vec::new();
        for tid in dir.tids().unwrap_or_default() {
            if let Ok(list) = dir.read(&format!("task/{tid}/children"), &mut buffer)
                && let Ok(children) = rewake_proc::children::parse(list)
            {
                tree.extend(children.into_iter().filter(|c| !tree.contains(c)).collect::<Vec<_>>());
            }
        }
    }
    let mut woken = 0;
    for pid in tree.into_iter().rev().filter(|pid| !keep.contains(pid)) {
        if is_stopped(pid) {
            signal::kill(pid, libc::SIGCONT)
                .map_err(|e| Error::new(format!("process {pid} cannot be woken: {e}")))?;
            woken += 1;
        }
    }
    notes.remove(&root_stat);
    Ok(woken)
}
