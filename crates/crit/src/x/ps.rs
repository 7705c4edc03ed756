//! The process tree.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
};

use rewake_image::{kind, messages::PstreeEntry};

use crate::error::Error;

use super::{dir::Dir, write_name};

pub(super) fn show(dir: &Dir, out: &mut impl Write) -> Result<(), Error> {
    let processes = dir.processes()?;
    let pids: HashSet<u32> = processes.iter().map(|p| p.pid).collect();
    // Whose parent is not in the file heads a tree of its own; so does who is its own parent.
    let is_root = |p: &PstreeEntry| p.ppid == p.pid || !pids.contains(&p.ppid);
    let mut children: HashMap<u32, Vec<&PstreeEntry>> = HashMap::new();
    for process in processes.iter().rev().filter(|p| !is_root(p)) {
        children.entry(process.ppid).or_default().push(process);
    }

    writeln!(out, "{:>7}{:>7}{:>7}   COMM", "PID", "PGID", "SID")?;
    // The next to print is at the end. Children are removed as they are reached: a loop of parents ends there.
    let mut left: Vec<(usize, &PstreeEntry)> =
        processes.iter().rev().filter(|p| is_root(p)).map(|p| (0, p)).collect();
    while let Some((depth, process)) = left.pop() {
        write!(
            out,
            "{:7}{:7}{:7}   {:indent$}",
            process.pid,
            process.pgid,
            process.sid,
            "",
            indent = 4 * depth
        )?;
        if let Some(tc) = dir.one(kind::CORE, process.pid)?.and_then(|core| core.tc) {
            write_name(out, &tc.comm)?;
        }
        writeln!(out)?;
        left.extend(
            children.remove(&process.pid).into_iter().flatten().map(|child| (depth + 1, child)),
        );
    }
    Ok(())
}
