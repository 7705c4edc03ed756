//! Memory that is still to come: mappings that are registered with a userfaultfd which nobody in the tree has a descriptor of.
//! Somebody outside handles their page faults, as the pager of a lazy restore does, and lets them go when all is there. That is
//! waited for while the tree runs.

use crate::error::Error;
use crate::freeze::Task;
use crate::seize;
use rewake_objects::iterators::faults;
use rewake_objects::memory::vma;
use rewake_objects::problem::text;
use rewake_objects::{Obstacle, Passing, Problem};
use rewake_proc::read::{ProcDir, ProcRoot};
use rewake_proc::vmflags::VmFlags;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How a link of `/proc/PID/fd` to one begins.
const USERFAULTFD: &[u8] = b"anon_inode:[userfaultfd]";

/// Is memory that is to come all that stands in the way?
pub fn is_all(obstacles: &[Obstacle]) -> bool {
    let memory = |o: &Obstacle| o.passing == Passing::Memory;
    obstacles.iter().any(memory) && obstacles.iter().all(|o| o.passing != Passing::No)
}

/// That memory is still to come.
pub fn error(obstacles: Vec<Obstacle>) -> Error {
    let mut error = Error::new("memory is still to come");
    error.obstacles = obstacles;
    error.coming = true;
    error
}

/// The memory of a task that is still to come, if nobody of the tree (`pids`) brings it.
pub fn of(task: &Task, problems: &[Problem], pids: &[i32]) -> Vec<Obstacle> {
    let coming = problems.iter().filter(|problem| problem.passing == Passing::Memory);
    let coming: Vec<&Problem> = coming.collect();
    if coming.is_empty() || pids.iter().any(|pid| has_one(*pid)) {
        return Vec::new();
    }
    coming.into_iter().map(|problem| problem.clone().of(task.pid(), task.comm())).collect()
}

/// The processes of a tree that runs, as far as they are there.
pub fn below(root: i32) -> Vec<ProcDir> {
    let mut found: Vec<ProcDir> = Vec::new();
    let mut seen = HashSet::new();
    let mut todo = vec![root];
    let mut buffer = Vec::new();
    while let Some(pid) = todo.pop() {
        let Some(dir) = seen.insert(pid).then(|| ProcDir::open(pid).ok()).flatten() else {
            continue;
        };
        for tid in dir.tids().unwrap_or_default() {
            if let Ok(text) = dir.read(&format!("task/{tid}/children"), &mut buffer)
                && let Ok(children) = rewake_proc::children::parse(text)
            {
                todo.extend(children);
            }
        }
        found.push(dir);
    }
    found
}

/// If a thread does not stop: does it wait for memory of its process that is still to come? Nobody can interrupt it where it does
/// so inside the kernel.
pub fn holds_up(pid: i32, tid: i32) -> Option<Error> {
    let obstacle = vma::registered(to_come(pid)?).of(pid, comm(pid)?.as_bytes());
    log::debug!("{}; thread {tid} does not stop", brief(&obstacle));
    Some(error(vec![obstacle]))
}

/// Has any process of a tree that runs a userfaultfd?
pub fn is_own(root: i32) -> bool {
    below(root).iter().any(|dir| has_one(dir.pid()))
}

/// Has a process a userfaultfd?
fn has_one(pid: i32) -> bool {
    let mut buffer = Vec::new();
    let Ok(dir) = ProcDir::open_living(pid).or_else(|_| ProcDir::open(pid)) else { return false };
    let mut is_one = |fd: i32| {
        dir.link(&format!("fd/{fd}"), &mut buffer).is_ok_and(|link| link.starts_with(USERFAULTFD))
    };
    dir.fds().is_ok_and(|fds| fds.into_iter().any(&mut is_one))
}

/// Waits until the memory of `error` is there, not longer than until `give_up`; it began at `since`.
///
/// # Errors
/// It is not; or `error` itself, if it is about something else.
pub fn wait(error: Error, since: Instant, give_up: Option<Instant>) -> Result<(), Error> {
    if !error.coming {
        return Err(error);
    }
    let mut rest = Duration::from_millis(5);
    log::info!("{}; waiting for it", error.obstacles.first().map_or(String::new(), brief));
    let mut pids: Vec<i32> = error.obstacles.iter().map(|obstacle| obstacle.pid).collect();
    pids.dedup();
    loop {
        let left = give_up.map(|give_up| give_up.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(Error::refused(explain(error.obstacles, Some(since.elapsed()))));
        }
        std::thread::sleep(left.map_or(rest, |left| left.min(rest)));
        seize::let_late_ones_go();
        rest = (rest * 2).min(Duration::from_millis(50));
        while pids.last().is_some_and(|pid| to_come(*pid).is_none()) {
            pids.pop();
        }
        if pids.is_empty() {
            log::info!("the memory is there, after {:?}", since.elapsed());
            return Ok(());
        }
    }
}

fn brief(obstacle: &Obstacle) -> String {
    format!(
        "process {} ({}): memory is still to come ({})",
        obstacle.pid, obstacle.comm, obstacle.object
    )
}

/// The first mapping of a process, which runs, whose pages are still to come. None of one that is gone.
fn to_come(pid: i32) -> Option<String> {
    let dir = ProcDir::open_living(pid).or_else(|_| ProcDir::open(pid)).ok()?;
    let (mut found, mut seen) = (None, 0);
    // It takes long, since pages are counted: no more is read than until the first is found.
    let mut enough = |text: &[u8]| {
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut before = seen;
        for line in text.get(seen..end).unwrap_or_default().split(|b| *b == b'\n') {
            if is_missing(line) {
                found = Some(before);
                break;
            }
            before += line.len() + 1;
        }
        seen = end;
        found.is_some()
    };
    let mut buffer = Vec::new();
    dir.read_until("smaps", &mut buffer, &mut enough).ok()?;
    // Names of values have a capital, addresses have none.
    let mut lines = buffer.get(..found?)?.rsplit(|byte| *byte == b'\n');
    let first = lines.find(|line| line.first().is_some_and(|b| !b.is_ascii_uppercase()))?;
    let mut ends = text(first.split(|byte| *byte == b' ').next()?);
    ends = ends.replacen('-', "-0x", 1);
    Some(format!("mapping 0x{ends}"))
}

/// Is this line of `smaps` about a mapping whose pages somebody brings?
fn is_missing(line: &[u8]) -> bool {
    let Some(codes) = line.strip_prefix(b"VmFlags:") else { return false };
    codes.split(|byte| *byte == b' ').filter_map(|code| code.try_into().ok()).any(|code| {
        let flag = VmFlags::from_code(code);
        flag == VmFlags::UFFD_MISSING || flag == VmFlags::UFFD_MINOR
    })
}

/// Obstacles in the words for those who read them: of a process's memory that is to come once, with who is to bring it, if
/// it was `waited` for or would be.
pub fn explain(obstacles: Vec<Obstacle>, waited: Option<Duration>) -> Vec<Obstacle> {
    let outside = is_all(&obstacles);
    let mut all: Vec<Obstacle> = Vec::with_capacity(obstacles.len());
    let mut more: Vec<(usize, usize)> = Vec::new();
    for obstacle in obstacles {
        let same = |o: &Obstacle| o.passing == Passing::Memory && o.pid == obstacle.pid;
        match (obstacle.passing, all.iter().position(same)) {
            (Passing::Memory, Some(at)) => match more.iter_mut().find(|(first, _)| *first == at) {
                Some((_, count)) => *count += 1,
                None => more.push((at, 1)),
            },
            _ => all.push(obstacle),
        }
    }
    let memory = |o: &&mut Obstacle| o.passing == Passing::Memory;
    for obstacle in all.iter_mut().filter(memory).filter(|_| outside) {
        tell_who(obstacle, waited);
    }
    for (at, count) in more {
        let others = if count == 1 { "another one" } else { "others" };
        let count = if count == 1 { String::new() } else { format!("{count} ") };
        all[at].object += &format!(" and {count}{others}");
    }
    all
}

/// Says of memory that is to come who is to bring it.
fn tell_who(obstacle: &mut Obstacle, waited: Option<Duration>) {
    let who = handlers(obstacle);
    let by = who.as_ref().map_or_else(
        || "a process outside the tree".to_owned(),
        |(pid, comm)| format!("process {pid} ({comm})"),
    );
    let still = waited.map_or(String::new(), |waited| {
        format!(", and has not done so within {:.1} s", waited.as_secs_f64())
    });
    obstacle.reason = format!(
        "its pages are still to come: it is registered with a userfaultfd, by which {by} brings them{still}"
    );
    let log = match who.as_ref().is_some_and(|(_, comm)| comm == "rewake-pager") {
        true => " and what its log (lazy-pages.log) says",
        false => "",
    };
    let sight = if who.is_some() { "that process" } else { "it" };
    obstacle.remedy = Some(format!(
        "a dump waits for that as long as it may: give it more time (--timeout), see whether {sight} runs{log}"
    ));
}

/// Who handles the page faults of a mapping; the guard of a pager has its descriptors only in case that dies.
fn handlers(obstacle: &Obstacle) -> Option<(i32, String)> {
    let start = obstacle.object.strip_prefix("mapping 0x")?.split('-').next()?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let pids = faults::handlers(obstacle.pid, start).unwrap_or_else(|e| {
        log::debug!("who has the userfaultfds is looked for: {e}");
        holders()
    });
    let named = pids.into_iter().filter(|pid| *pid != std::process::id() as i32);
    let mut named: Vec<(i32, String)> = named.filter_map(|pid| Some((pid, comm(pid)?))).collect();
    if named.iter().any(|(_, comm)| comm != "rewake-guard") {
        named.retain(|(_, comm)| comm != "rewake-guard");
    }
    // Who of several it is nobody can say.
    if named.len() == 1 { named.pop() } else { None }
}

fn comm(pid: i32) -> Option<String> {
    let dir = ProcDir::open(pid).ok()?;
    let stat = dir.stat(&mut Vec::new()).ok()?;
    Some(text(&stat.comm))
}

/// All processes that have a userfaultfd.
fn holders() -> Vec<i32> {
    let pids = ProcRoot::open().and_then(|root| root.pids()).unwrap_or_default();
    pids.into_iter().filter(|pid| has_one(*pid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(pid: i32, object: &str) -> Obstacle {
        vma::registered(object.to_owned()).of(pid, b"x")
    }

    #[test]
    fn memory_of_a_process_is_told_once() {
        let odd = || Problem::new("fd 3", "odd").of(7, b"x");
        let all = vec![
            registered(7, "mapping 0x1000-0x2000"),
            registered(7, "mapping 0x3000-0x4000"),
            registered(8, "mapping 0x1000-0x2000"),
            odd(),
            registered(7, "mapping 0x5000-0x6000"),
        ];
        assert!(!is_all(&all));
        let told = explain(all.clone(), None);
        let objects: Vec<&str> = told.iter().map(|o| o.object.as_str()).collect();
        assert_eq!(
            objects,
            ["mapping 0x1000-0x2000 and 2 others", "mapping 0x1000-0x2000", "fd 3"]
        );
        // Something else stands in the way: it may be the tree's own.
        assert!(told[0].reason.contains("cannot be saved"), "{}", told[0]);
        let all: Vec<Obstacle> = all.into_iter().filter(|o| *o != odd()).collect();
        assert!(is_all(&all));
        let told = explain(all, Some(Duration::from_millis(1500)));
        assert!(
            told[0].reason.ends_with("brings them, and has not done so within 1.5 s"),
            "{}",
            told[0]
        );
        assert!(told[1].to_string().contains("--timeout"), "{}", told[1]);
    }

    #[test]
    fn lines_about_missing_pages_are_told_from_others() {
        assert!(is_missing(b"VmFlags: rd wr mr mw me ac um sd "));
        assert!(is_missing(b"VmFlags: rd ui"));
        assert!(!is_missing(b"VmFlags: rd wr uw sd "));
        assert!(!is_missing(b"Rss: um"));
    }
}
