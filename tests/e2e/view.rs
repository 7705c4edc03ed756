//! The tree as anybody may see it from outside: /proc and a few calls, as comparable text.
//!
//! Two views of the same tree before and after a checkpoint must be equal but for what cannot be (inode numbers of
//! anonymous objects, which are replaced by the order of their first appearance, so that sharing is still compared).

use std::collections::{BTreeMap, HashMap};
use std::fs;

/// One look at a tree: facts by name. Names start with `PID` or `PID/TID`.
#[derive(Debug, Default)]
pub struct View {
    facts: BTreeMap<String, String>,
    pids: Vec<i32>,
    tids: Vec<i32>,
}

/// A set of signals in the text of `status`; without it, all.
fn set(status: &str, key: &str) -> u64 {
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let line = lines.find(|(name, _)| *name == key);
    line.and_then(|(_, value)| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(u64::MAX)
}

/// The signals that all threads block.
fn blocked_by_all(pid: i32) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return u64::MAX };
    let statuses = threads
        .flatten()
        .map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default());
    statuses.fold(u64::MAX, |all, status| all & set(&status, "SigBlk"))
}

/// Lines of /proc/PID/task/TID/status that belong to a thread.
const THREAD_STATUS: &[&str] = &[
    "Name",
    "Umask",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Cpus_allowed",
    "THP_enabled",
    "VmLck",
    "Threads",
];

/// Is a thread one that the kernel has made for io_uring requests (`PF_IO_WORKER`)?
fn is_worker(tid: i32) -> bool {
    const IO_WORKER: u32 = 0x10;
    let stat = read(&format!("/proc/{tid}/stat"));
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|f| f & IO_WORKER != 0)
}

/// Fields of /proc/PID/task/TID/stat (numbered as in proc(5)).
const STAT: &[(usize, &str)] = &[
    (4, "ppid"),
    (5, "pgrp"),
    (6, "session"),
    (7, "tty_nr"),
    (18, "priority"),
    (19, "nice"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
    (52, "exit_code"),
];

impl View {
    /// Looks at the tree under `root`.
    pub fn take(root: i32) -> Result<View, String> {
        let mut view = View { pids: descendants(root), ..View::default() };
        let mut names = Names::default();
        if state(root).is_none() {
            return Err(format!("process {root} is gone"));
        }
        let pids = view.pids.clone();
        view.put("tree", format!("{pids:?}"));
        for &pid in &pids {
            view.process(pid, &mut names);
        }
        view.sharing(&pids);
        Ok(view)
    }

    /// Processes of the tree, the root first.
    pub fn pids(&self) -> Vec<i32> {
        self.pids.clone()
    }

    /// Tasks of the tree.
    pub fn tids(&self) -> Vec<i32> {
        self.tids.clone()
    }

    /// Processes that are not stopped and not zombies: those a checkpoint itself stops.
    pub fn running_pids(&self) -> Vec<i32> {
        let is_alive = |pid: &i32| {
            let of_it = format!("{pid}/");
            let mut of_it = self.facts.iter().filter(|(name, _)| name.starts_with(&of_it));
            of_it.any(|(name, state)| name.ends_with(" state") && state == "alive")
        };
        self.pids.iter().copied().filter(is_alive).collect()
    }

    /// The value of one fact.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.facts.get(name).map(String::as_str)
    }

    /// Facts that differ, except those whose name contains one of `ignore`; the first 25.
    pub fn diff(&self, after: &View, ignore: &[&str]) -> Vec<String> {
        let mut found = Vec::new();
        for pid in self.pids.iter().filter(|p| !after.pids.contains(p)) {
            found.push(format!(
                "  process {pid} ({}) is not there",
                self.get(&format!("{pid}/{pid} Name")).unwrap_or("?")
            ));
        }
        let names: std::collections::BTreeSet<_> =
            self.facts.keys().chain(after.facts.keys()).collect();
        for name in names {
            let (old, new) = (self.facts.get(name), after.facts.get(name));
            let pid = name.split([' ', '/']).next().and_then(|p| p.parse().ok()).unwrap_or(0);
            let lost = self.pids.contains(&pid) && !after.pids.contains(&pid);
            if old == new || lost || ignore.iter().any(|i| name.contains(i)) {
                continue;
            }
            if found.len() == 25 {
                found.push("  …".into());
                break;
            }
            // From the first line in which they differ.
            let pairs = old.zip(new).map(|(old, new)| old.lines().zip(new.lines()));
            let same = pairs.into_iter().flatten().take_while(|(old, new)| old == new);
            let same: usize = same.map(|(line, _)| line.len() + 1).sum();
            let show = |v: Option<&String>| {
                let text = v.map_or("(nothing)", |v| v.get(same..).unwrap_or("(no more)"));
                text.chars().take(400).collect::<String>()
            };
            found.push(format!("  {name}: {} -> {}", show(old), show(new)));
        }
        found
    }

    fn put(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.facts.insert(name.into(), value.into());
    }

    fn process(&mut self, pid: i32, names: &mut Names) {
        let mut tasks = tasks_of(pid);
        let all = tasks.len();
        // The kernel makes them when it needs some.
        tasks.retain(|tid| !is_worker(*tid));
        let workers = all - tasks.len();
        self.put(format!("{pid} tasks"), format!("{tasks:?}"));
        for &tid in &tasks {
            self.thread(pid, tid, workers);
        }
        let tid = living(pid);
        if state(tid) == Some('Z') {
            return;
        }
        for link in ["exe", "cwd", "root"] {
            self.put(format!("{pid} {link}"), read_link(&format!("/proc/{tid}/{link}")));
        }
        for file in ["cmdline", "environ", "limits", "personality", "coredump_filter", "cgroup"] {
            self.put(format!("{pid} {file}"), read(&format!("/proc/{tid}/{file}")));
        }
        // Threads that make timers at the same time get numbers in one order, and places in the list in another.
        let timers = read(&format!("/proc/{tid}/timers"));
        let mut timers: Vec<&str> = timers.split("ID: ").collect();
        timers.sort_unstable();
        self.put(format!("{pid} timers"), timers.join("ID: "));
        for file in ["oom_score_adj", "timerslack_ns", "auxv", "uid_map", "gid_map"] {
            let bytes = fs::read(format!("/proc/{tid}/{file}")).unwrap_or_default();
            let text = if file == "auxv" {
                format!("{bytes:x?}")
            } else {
                String::from_utf8_lossy(&bytes).into_owned()
            };
            self.put(format!("{pid} {file}"), text);
        }
        for ns in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
            self.put(format!("{pid} ns/{ns}"), read_link(&format!("/proc/{tid}/ns/{ns}")));
        }
        self.maps(pid, tid);
        self.fds(pid, tid, names);
    }

    fn thread(&mut self, pid: i32, tid: i32, workers: usize) {
        self.tids.push(tid);
        let at = format!("{pid}/{tid}");
        let class = match state(tid) {
            Some('T') => "stopped",
            Some('t') => "traced",
            Some('Z' | 'X') => "zombie",
            Some(_) => "alive",
            None => "gone",
        };
        self.put(format!("{at} state"), class);
        let dir = format!("/proc/{pid}/task/{tid}");
        let status = read(&format!("{dir}/status"));
        // Of a zombie the kernel still shows signal and capability sets, which nobody can have a use for.
        let wanted = if class == "zombie" { &THREAD_STATUS[..1] } else { THREAD_STATUS };
        for line in status.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            if !wanted.contains(&key) {
                continue;
            }
            // What nobody blocks is on its way to who runs: whether it is still seen here is chance.
            let lasting = match key {
                // Mostly there is none, and of many threads to ask each for the others takes long.
                "SigPnd" | "ShdPnd" if class != "alive" || set(&status, key) == 0 => None,
                "SigPnd" => Some(set(&status, "SigBlk")),
                "ShdPnd" => Some(blocked_by_all(pid)),
                _ => None,
            };
            if key == "Threads" {
                let threads = value.trim().parse::<usize>().unwrap_or(0);
                self.put(format!("{at} {key}"), threads.saturating_sub(workers).to_string());
                continue;
            }
            match lasting {
                Some(mask) => {
                    self.put(format!("{at} {key}"), format!("{:016x}", set(&status, key) & mask));
                }
                None => self.put(format!("{at} {key}"), value.trim()),
            }
        }
        let stat = read(&format!("{dir}/stat"));
        if let Some((_, rest)) = stat.rsplit_once(')') {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            for (number, name) in STAT {
                self.put(format!("{at} {name}"), fields.get(number - 3).copied().unwrap_or("?"));
            }
        }
        // SAFETY: integers only; the calls look at another task and change nothing.
        let (ioprio, policy) = unsafe {
            (
                libc::syscall(libc::SYS_ioprio_get, 1, tid),
                libc::syscall(libc::SYS_sched_getscheduler, tid),
            )
        };
        self.put(format!("{at} ioprio"), ioprio.to_string());
        self.put(format!("{at} scheduler"), policy.to_string());
        let (mut head, mut len) = (0u64, 0u64);
        // SAFETY: both out-pointers are valid for the call.
        let ret =
            unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
        self.put(format!("{at} robust_list"), format!("{ret} {head:#x} {len}"));
    }

    /// Mappings, with neighbours joined that differ in nothing: whether the kernel merged them is its own affair.
    fn maps(&mut self, pid: i32, tid: i32) {
        let text =
            String::from_utf8_lossy(&fs::read(format!("/proc/{tid}/smaps")).unwrap_or_default())
                .into_owned();
        let mut joined: Vec<Vma> = Vec::new();
        for vma in parse_smaps(&text) {
            match joined.last_mut() {
                Some(last) if last.continues_in(&vma) => last.end = vma.end,
                _ => joined.push(vma),
            }
        }
        for v in joined {
            // Sockets have other numbers each time.
            let path = if v.path.starts_with("socket:[") { "socket" } else { v.path.as_str() };
            self.put(
                format!("{pid} maps {:012x}-{:012x}", v.start, v.end),
                format!("{} {:x} {path} [{}]", v.perms, v.offset, v.flags),
            );
        }
    }

    fn fds(&mut self, pid: i32, tid: i32, names: &mut Names) {
        let mut numbers: Vec<i32> = list(&format!("/proc/{tid}/fd"));
        numbers.sort_unstable();
        for fd in numbers {
            let target = names.canonical(&read_link(&format!("/proc/{tid}/fd/{fd}")));
            let mut info = Vec::new();
            for line in read(&format!("/proc/{tid}/fdinfo/{fd}")).lines() {
                let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
                let keep = [
                    "pos:",
                    "flags:",
                    "eventfd-count:",
                    "eventfd-semaphore:",
                    "sigmask:",
                    "clockid:",
                    "ticks:",
                ];
                if keep.iter().any(|k| line.starts_with(k)) {
                    info.push(line);
                } else if let Some(lock) = line.strip_prefix("lock: ") {
                    // After the number in the listing: kind, type, holder, file and range.
                    info.push(format!(
                        "lock {}",
                        lock.split_once(' ').map_or("", |(_, lock)| lock)
                    ));
                } else if line.starts_with("tfd:") {
                    // Of an epoll item the descriptor, the events and the data; position and inode are internal.
                    info.push(line.split(" pos:").next().unwrap_or("").to_string());
                }
            }
            info.sort();
            self.put(format!("{pid} fd {fd}"), format!("{target} {}", info.join(", ")));
        }
    }

    /// What tasks have in common, by kcmp(2): descriptor tables, signal handlers, … and open file descriptions.
    fn sharing(&mut self, pids: &[i32]) {
        let tids = pids.iter().map(|&pid| (pid, living(pid)));
        let live: Vec<_> = tids.filter(|&(_, tid)| state(tid) != Some('Z')).collect();
        for (kind, name) in [(1, "vm"), (2, "files"), (3, "fs"), (4, "sighand"), (6, "sysvsem")] {
            for pair in live.windows(2).take(50) {
                let [(first, a), (second, b)] = [pair[0], pair[1]];
                let same = kcmp(a, b, kind, 0, 0);
                self.put(format!("{second} shares {name} with {first}"), same.to_string());
            }
        }
        // Descriptors with the same target: which of them are one description?
        let mut by_target: BTreeMap<String, Vec<(i32, i32, i32)>> = BTreeMap::new();
        for &(pid, tid) in live.iter().take(60) {
            let mut numbers: Vec<i32> = list(&format!("/proc/{tid}/fd"));
            numbers.sort_unstable();
            for fd in numbers {
                by_target
                    .entry(read_link(&format!("/proc/{tid}/fd/{fd}")))
                    .or_default()
                    .push((pid, tid, fd));
            }
        }
        for (target, holders) in by_target {
            // Anonymous inodes all have one name; comparing each with each of a few is enough.
            let mut firsts: Vec<(i32, i32, i32)> = Vec::new();
            for (pid, tid, fd) in holders.into_iter().take(400) {
                match firsts.iter().find(|f| kcmp(f.1, tid, 0, f.2, fd)) {
                    Some(f) => self.put(
                        format!("{pid} fd {fd} description"),
                        format!("that of {} fd {}", f.0, f.2),
                    ),
                    None if firsts.len() < 40 => firsts.push((pid, tid, fd)),
                    None => self.put(
                        format!("{pid} fd {fd} description"),
                        format!("own, of {}", class(&target)),
                    ),
                }
            }
        }
    }
}

#[derive(Debug)]
struct Vma {
    start: u64,
    end: u64,
    perms: String,
    offset: u64,
    path: String,
    flags: String,
}

impl Vma {
    fn continues_in(&self, next: &Vma) -> bool {
        let file = self.path.starts_with('/');
        self.end == next.start
            && self.perms == next.perms
            && self.path == next.path
            && self.flags == next.flags
            && (!file || self.offset + (self.end - self.start) == next.offset)
    }
}

fn parse_smaps(text: &str) -> Vec<Vma> {
    let mut found: Vec<Vma> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(vma) = found.last_mut() {
                // sd: soft-dirty, a matter of who wrote when; ac: accounting follows from the rest; gu: there may be guard ranges.
                // sh: without mw (a file opened for reading, a sealed memfd) it means nothing.
                let all: Vec<&str> = flags.split_whitespace().collect();
                let unshared = if all.contains(&"mw") { "" } else { "sh" };
                let flags = all.iter().filter(|f| !["sd", "ac", "gu", unshared].contains(f));
                vma.flags = flags.copied().collect::<Vec<_>>().join(" ");
            }
            continue;
        }
        let mut words = line.split_whitespace();
        let Some((start, end)) = words.next().and_then(|r| r.split_once('-')) else { continue };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        else {
            continue;
        };
        let perms = words.next().unwrap_or("").to_string();
        let offset = u64::from_str_radix(words.next().unwrap_or(""), 16).unwrap_or(0);
        let path = words.skip(2).collect::<Vec<_>>().join(" ");
        // Ghosts and memfds come back under some other name of their own kind.
        // Shared anonymous memory: CRIU's comes back as a memfd of the same name.
        let path = path
            .strip_prefix("/memfd:")
            .filter(|p| ["/dev/zero (deleted)", "/anon_hugepage (deleted)"].contains(p))
            .unwrap_or(&path)
            .to_string();
        let path = if path.ends_with("(deleted)") { class(&path) } else { path };
        let path = without_ghost(&path).unwrap_or(path);
        found.push(Vma { start, end, perms, offset, path, flags: String::new() });
    }
    found
}

/// The name of a deleted file that had to be restored under another because its own is taken: NAME.N.ghost, NAME.N.M.ghost,
/// with CRIU NAME.cr_link.
fn without_ghost(path: &str) -> Option<String> {
    if let Some(name) = path.strip_suffix(".cr_link (deleted)") {
        return Some(format!("{name} (deleted)"));
    }
    let mut name = path.strip_suffix(".ghost (deleted)")?;
    while let Some((rest, number)) = name.rsplit_once('.')
        && number.parse::<u32>().is_ok()
    {
        name = rest;
    }
    Some(format!("{name} (deleted)"))
}

/// Numbers anonymous objects by first appearance.
#[derive(Debug, Default)]
struct Names(HashMap<String, usize>);

impl Names {
    fn canonical(&mut self, target: &str) -> String {
        if let Some((kind, _)) = target.split_once(":[") {
            let n = self.0.len();
            let n = *self.0.entry(target.to_string()).or_insert(n);
            return format!("{kind}:#{n}");
        }
        target.to_string()
    }
}

fn class(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, _)) => kind.to_string(),
        None => target.to_string(),
    }
}

fn kcmp(a: i32, b: i32, kind: i32, x: i32, y: i32) -> bool {
    // SAFETY: integers only.
    unsafe {
        libc::syscall(libc::SYS_kcmp, a, b, kind, x as libc::c_ulong, y as libc::c_ulong) == 0
    }
}

fn read(path: &str) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    text.replace('\0', "\\0")
}

fn read_link(path: &str) -> String {
    fs::read_link(path).map_or_else(|e| format!("({e})"), |p| p.to_string_lossy().into_owned())
}

fn list(path: &str) -> Vec<i32> {
    let Ok(dir) = fs::read_dir(path) else { return Vec::new() };
    dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// The thread ids of a process, sorted.
pub fn tasks_of(pid: i32) -> Vec<i32> {
    let mut tids = list(&format!("/proc/{pid}/task"));
    tids.sort_unstable();
    tids
}

/// The process itself, or its first thread that lives, if its leader has ended while others go on.
pub fn living(pid: i32) -> i32 {
    if state(pid) != Some('Z') {
        return pid;
    }
    let alive = |tid: &i32| !matches!(state(*tid), None | Some('Z' | 'X'));
    tasks_of(pid).into_iter().find(alive).unwrap_or(pid)
}

/// Parent of a process.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The state letter of a task, none if it does not exist.
pub fn state(tid: i32) -> Option<char> {
    // Not as UTF-8: a task's name is any bytes.
    let stat = fs::read(format!("/proc/{tid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(')')?.1.trim().chars().next()
}

/// A process and everything below it, parents first.
pub fn descendants(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let pid = found[next];
        next += 1;
        let mut children: Vec<i32> = Vec::new();
        for tid in tasks_of(pid) {
            let text =
                fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
            children.extend(text.split_whitespace().filter_map(|c| c.parse::<i32>().ok()));
        }
        children.sort_unstable();
        found.extend(children);
    }
    found
}

/// What tasks are doing, for failures: state, system call, kernel function.
pub fn where_blocked(tids: &[i32]) -> String {
    let mut out = Vec::new();
    for tid in tids.iter().take(8) {
        let comm = read(&format!("/proc/{tid}/comm"));
        let wchan = read(&format!("/proc/{tid}/wchan"));
        let call = read(&format!("/proc/{tid}/syscall"));
        let call: String = call.split_whitespace().take(4).collect::<Vec<_>>().join(" ");
        out.push(format!(
            "{tid} ({}) {} in {wchan}, system call {call}",
            comm.trim(),
            state(*tid).unwrap_or('-')
        ));
    }
    out.join("; ")
}
