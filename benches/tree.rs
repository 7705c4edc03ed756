//! A subject's tree as /proc shows it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What must be the same before a dump and after the restore.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every process, the root first.
    pub pids: Vec<i32>,
    threads: usize,
    descriptors: usize,
    mappings: usize,
    /// One word of every 64th page of the memory that `heap1g` names.
    samples: Vec<u64>,
}

/// Looks at the tree below `root`; `memory` is an address and a length in the root.
pub fn look(root: i32, memory: Option<(u64, u64)>) -> Result<Snapshot, String> {
    let mut pids = vec![root];
    let mut threads = 0;
    let mut at = 0;
    while let Some(&pid) = pids.get(at) {
        at += 1;
        for task in list(&format!("/proc/{pid}/task"))? {
            threads += 1;
            let children = text(&format!("/proc/{pid}/task/{task}/children"))?;
            pids.extend(
                children.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok()),
            );
        }
    }
    // The kernel lists children in the order they were born or adopted; pids are what counts.
    pids[1..].sort_unstable();
    Ok(Snapshot {
        threads,
        descriptors: list(&format!("/proc/{root}/fd"))?.len(),
        mappings: mappings(root)?,
        samples: samples(root, memory)?,
        pids,
    })
}

/// The mappings that are the program's own: the kernel's helper pages may lie otherwise after a restore. Neighbours that
/// differ in nothing count as one: whether the kernel keeps them apart depends on their history.
fn mappings(pid: i32) -> Result<usize, String> {
    let maps = text(&format!("/proc/{pid}/maps"))?;
    let mut count = 0;
    let mut last = ("", [""; 4]);
    for line in maps.lines().filter(|line| !line.contains("[v")) {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next().and_then(|range| range.split_once('-')).unwrap_or_default();
        let mut word = || words.next().unwrap_or_default();
        let (access, _offset, device, inode) = (word(), word(), word(), word());
        let kind = [access, device, inode, word()];
        count += usize::from((start, kind) != last);
        last = (end, kind);
    }
    Ok(count)
}

fn samples(pid: i32, memory: Option<(u64, u64)>) -> Result<Vec<u64>, String> {
    let Some((address, length)) = memory else { return Ok(Vec::new()) };
    let path = format!("/proc/{pid}/mem");
    let mem = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
    let mut word = [0; 8];
    let mut samples = Vec::new();
    for offset in (0..length).step_by(64 * 4096) {
        mem.read_exact_at(&mut word, address + offset).map_err(|e| format!("{path}: {e}"))?;
        samples.push(u64::from_ne_bytes(word));
    }
    Ok(samples)
}

impl Snapshot {
    /// Says what differs.
    pub fn same(&self, after: &Snapshot) -> Result<(), String> {
        let part = |what: &str, before: usize, after: usize| {
            if before == after { String::new() } else { format!(" {what} {before} -> {after}") }
        };
        if self == after {
            return Ok(());
        }
        let mut differs = part("processes", self.pids.len(), after.pids.len());
        differs += &part("threads", self.threads, after.threads);
        differs += &part("descriptors", self.descriptors, after.descriptors);
        differs += &part("mappings", self.mappings, after.mappings);
        if differs.is_empty() {
            differs = " memory or pids".into();
        }
        Err(format!("what was restored differs from what was dumped:{differs}"))
    }

    /// Reaps what this process has to reap until none of the pids is taken.
    pub fn wait_gone(&self) -> Result<(), String> {
        let until = Instant::now() + Duration::from_secs(20);
        let mut left = self.pids.as_slice();
        loop {
            reap();
            while let [rest @ .., pid] = left {
                if Path::new(&format!("/proc/{pid}")).exists() {
                    break;
                }
                left = rest;
            }
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("{} processes are still there", left.len()));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The memory of all processes, each page divided by the number of its users, in bytes.
    pub fn pss(&self) -> Result<u64, String> {
        let of = |pid: &i32| {
            let all = text(&format!("/proc/{pid}/smaps_rollup"))?;
            let line = all.lines().find_map(|line| line.strip_prefix("Pss:"));
            let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
            kib.map(|kib| kib << 10)
                .ok_or_else(|| format!("process {pid} does not tell its memory"))
        };
        self.pids.iter().map(of).sum()
    }

    /// Ends every process.
    pub fn kill(&self) {
        kill(&self.pids);
    }
}

/// Ends the processes.
pub fn kill(pids: &[i32]) {
    for &pid in pids {
        // SAFETY: kill takes numbers; the pids are of a tree this process started and has not reaped.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

/// Takes the exit status of every child that has ended.
pub fn reap() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) } > 0 {}
}

fn text(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))
}

fn list(path: &str) -> Result<Vec<String>, String> {
    let names = |dir: fs::ReadDir| -> io::Result<Vec<String>> {
        dir.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    fs::read_dir(path).and_then(names).map_err(|e| format!("{path}: {e}"))
}
