//! How much memory there is: a tree that cannot have enough is refused before anything of it exists, for the kernel would end
//! whatever it likes; and errors about too little of it tell the sizes.

use crate::error::{Error, Result};
use rewake_image::{PageStore, StoredPages};
use std::collections::HashMap;
use std::fs;

/// Less than this is not looked into: it takes longer than it is worth.
const MUCH: u64 = 64 << 20;

/// Refuses pages that there can be no memory for. What several processes have in common counts once.
///
/// # Errors
/// There is none, with both sizes.
pub fn check(pages: &[&StoredPages]) -> Result<()> {
    let all: u64 = pages.iter().map(|pages| pages.bytes()).fold(0, u64::saturating_add);
    if all < MUCH {
        return Ok(());
    }
    let swap = meminfo("SwapTotal:").unwrap_or(0) << 10;
    let machine = meminfo("MemTotal:").map(|kilobytes| kilobytes << 10);
    let most = [limit(), machine].into_iter().flatten().min().map(|memory| memory + swap);
    let Some(most) = most.filter(|most| all > *most) else { return Ok(()) };
    let needed = distinct(pages);
    if needed <= most {
        return Ok(());
    }
    let message = format!("out of memory: there are {} kB at most", most >> 10);
    Err(explain(Error::new(message), needed))
}

/// Bytes of the page stores that are needed, each once.
fn distinct(pages: &[&StoredPages]) -> u64 {
    let mut parts: HashMap<PageStore, Vec<(u64, u64)>> = HashMap::new();
    for run in pages.iter().flat_map(|pages| &pages.runs) {
        parts
            .entry(run.store)
            .or_default()
            .push((run.offset, run.offset.saturating_add(run.bytes())));
    }
    let bytes = |mut parts: Vec<(u64, u64)>| {
        parts.sort_unstable();
        let (mut sum, mut done) = (0u64, 0u64);
        for (start, end) in parts {
            sum = sum.saturating_add(end.saturating_sub(start.max(done)));
            done = done.max(end);
        }
        sum
    };
    parts.into_values().map(bytes).fold(0, u64::saturating_add)
}

/// A line of `/proc/meminfo`, in kB.
fn meminfo(name: &str) -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Signs that a task lacked memory: it was told so, or the kernel has ended it.
const SIGNS: [&str; 4] =
    ["out of memory", "Cannot allocate memory", "wait status 0x9", "was ended meanwhile"];

/// Adds to an error that may come from a lack of memory how much the tree takes, in bytes, and how much there is.
pub fn explain(mut error: Error, bytes: u64) -> Error {
    if error.hint.is_none() && SIGNS.iter().any(|sign| error.message.contains(sign)) {
        let mut hint = format!("the memory of the tree takes {} kB", bytes >> 10);
        if let Some(available) = meminfo("MemAvailable:") {
            hint += &format!(", and {available} kB are available");
        }
        if let Some(limit) = limit() {
            hint += &format!("; the control group of this command may have {} kB", limit >> 10);
        }
        error.hint = Some(hint);
    }
    error
}

/// How much memory this command may take, in bytes, as far as is known.
pub fn spare() -> Option<u64> {
    let available = meminfo("MemAvailable:").map(|kilobytes| kilobytes << 10);
    [available, limit()].into_iter().flatten().min()
}

/// The least that our control group or one above it may have, in bytes.
fn limit() -> Option<u64> {
    /// No limit is written as a number near this by control groups of the first version.
    const NONE: u64 = 1 << 60;
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mounts, file): (&[&str], &str) = if controllers.is_empty() {
            (&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "memory.max")
        } else if controllers.split(',').any(|c| c == "memory") {
            (&["/sys/fs/cgroup/memory"], "memory.limit_in_bytes")
        } else {
            continue;
        };
        for mount in mounts {
            let mut path = path.trim_end_matches('/');
            loop {
                let value = fs::read_to_string(format!("{mount}{path}/{file}"));
                let value = value.ok().and_then(|text| text.trim().parse::<u64>().ok());
                if let Some(value) = value.filter(|value| *value < NONE) {
                    least = Some(least.map_or(value, |least: u64| least.min(value)));
                }
                match path.rfind('/') {
                    Some(at) => path = &path[..at],
                    None => break,
                }
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_common_counts_once() {
        let run = |store: u32, page: u64, nr_pages: u64| rewake_image::StoredRun {
            vaddr: 0,
            nr_pages,
            store: PageStore { depth: 0, pages_id: store },
            offset: page * 4096,
            lazy: false,
        };
        let one = StoredPages { runs: vec![run(1, 0, 4), run(1, 8, 2), run(2, 0, 1)] };
        let other = StoredPages { runs: vec![run(1, 2, 7), run(1, 0, 1)] };
        assert_eq!(distinct(&[&one, &other]), (10 + 1) * 4096);
        assert!(check(&[&one, &other]).is_ok());
        let huge = StoredPages { runs: vec![run(1, 0, 1 << 40)] };
        let error = check(&[&huge]).unwrap_err();
        assert!(error.hint.unwrap().contains("takes 4398046511104 kB"));
    }

    #[test]
    fn sizes_are_told_where_memory_was_lacking() {
        let told = |message: &str| explain(Error::new(message), 5 << 20).hint;
        let hint = told("process 5 (x): mapping 0x1000-0x2000: out of memory").unwrap();
        assert!(hint.contains("takes 5120 kB") && hint.contains("kB are available"), "{hint}");
        assert_eq!(told("process 5 (x): descriptor 7: No such file or directory"), None);
    }
}
