//! Who has the same memory mapped: the kernel keeps all mappings of a file, in all processes, in a tree that it finds those of a page
//! by. What is in that tree is counted; only if these are more than the caller knows of, it is looked whose they are.
//!
//! Nothing of this stands still: others map and unmap meanwhile. So what is told here is a hint, to be checked with `maps`.

use super::asm::{R1, R7, R8, STACK, Size};
use super::faults::{begin, each, end};
use super::peek::{pieces, word};
use super::{Kernel, Members, kernel, offset};
use rewake_sys::bpf::iter::Whose;
use rustix::fd::{AsRawFd, BorrowedFd};
use std::collections::{HashMap, HashSet};

/// So many mappings are looked at.
const MOST: usize = 1 << 16;

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    inode: i16,
    mapping: usize,
    tree: usize,
    node: usize,
    left: usize,
    right: usize,
    owner: usize,
    memory: i16,
    leader: i16,
    pid: i16,
    numbers: i16,
    number: i16,
}

impl Offsets {
    /// `number` is the size of a number in its namespace.
    pub(super) fn new(member: Members<'_>, number: u32) -> Result<Offsets, String> {
        let at = |of, name| member(of, name).map(|found| found.offset as usize);
        let short = |of, name| offset(member(of, name)?);
        Ok(Offsets {
            inode: short("file", "f_inode")?,
            mapping: at("inode", "i_mapping")?,
            // Its root comes first.
            tree: at("address_space", "i_mmap")?,
            // Its link comes first.
            node: at("vm_area_struct", "shared")?,
            left: at("rb_node", "rb_left")?,
            right: at("rb_node", "rb_right")?,
            owner: at("vm_area_struct", "vm_mm")?,
            memory: short("task_struct", "mm")?,
            leader: short("task_struct", "group_leader")?,
            pid: short("task_struct", "thread_pid")?,
            numbers: short("pid", "numbers")? + short("upid", "nr")?,
            number: i16::try_from(number).map_err(|e| e.to_string())?,
        })
    }
}

/// Gets ready to look, which takes milliseconds.
pub fn prepare() {
    if let Err(e) = offsets().and_then(|_| super::threads::own_level()).and_then(|_| pieces(&[])) {
        log::debug!("who else has memory of the tree mapped is not noticed: {e}");
    }
}

fn offsets() -> Result<(&'static Kernel, &'static Offsets), String> {
    let kernel = kernel()?;
    Ok((kernel, kernel.sharers.as_ref().map_err(Clone::clone)?))
}

/// Of each of these files, by descriptors of ours: who has it mapped (by process ids in our namespace), if it is mapped more often
/// than the caller knows of.
///
/// # Errors
/// Why this kernel does not tell, or not us.
pub fn of(files: &[(BorrowedFd<'_>, usize)]) -> Result<Vec<Vec<i32>>, String> {
    let (kernel, offsets) = offsets()?;
    let inodes = inodes(kernel, offsets)?;
    let addresses: Vec<u64> = files
        .iter()
        .map(|(fd, _)| inodes.get(&fd.as_raw_fd()).map(|inode| inode + offsets.mapping as u64))
        .collect::<Option<_>>()
        .ok_or("a descriptor of our own is not told")?;
    let roots: Vec<u64> =
        first_words(&addresses)?.iter().map(|at| at + offsets.tree as u64).collect();
    let found = nodes(&first_words(&roots)?, offsets)?;
    let more = |(nodes, (_, known)): (&Vec<u64>, &(_, usize))| nodes.len() > *known;
    let more: Vec<bool> = found.iter().zip(files).map(more).collect();
    if !more.contains(&true) {
        return Ok(vec![Vec::new(); files.len()]);
    }
    let processes = processes(kernel, offsets)?;
    let owner = |node: &u64| node - offsets.node as u64 + offsets.owner as u64;
    found
        .iter()
        .zip(more)
        .map(|(nodes, more)| {
            if !more {
                return Ok(Vec::new());
            }
            let places: Vec<u64> = nodes.iter().map(owner).collect();
            let memories: HashSet<u64> = first_words(&places)?.into_iter().collect();
            let pids = memories.iter().filter_map(|at| processes.get(at)).flatten();
            let mut pids: Vec<i32> = pids.copied().collect();
            pids.sort_unstable();
            pids.dedup();
            Ok(pids)
        })
        .collect()
}

fn first_words(addresses: &[u64]) -> Result<Vec<u64>, String> {
    pieces(addresses)?.iter().map(|piece| word(piece, 0)).collect()
}

/// The inodes behind our own descriptors.
fn inodes(kernel: &Kernel, offsets: &Offsets) -> Result<HashMap<i32, u64>, String> {
    let mut p = begin(24);
    p.load(Size::Word, R8, R1, 16);
    p.store(STACK, -16, R8);
    p.read((STACK, -8), 8, (R7, offsets.inode));
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    let mut found = HashMap::new();
    let mut last = -1;
    each(&end(p), kernel.files.function, Whose::Thread(own), |[number, inode]| {
        let number = number as i32;
        found.insert(number, inode);
        number > std::mem::replace(&mut last, number)
    })?;
    Ok(found)
}

/// All nodes of these trees, level by level.
fn nodes(roots: &[u64], offsets: &Offsets) -> Result<Vec<Vec<u64>>, String> {
    let mut all: Vec<Vec<u64>> = vec![Vec::new(); roots.len()];
    let mut seen = HashSet::new();
    let mut level: Vec<(usize, u64)> = roots.iter().copied().enumerate().collect();
    while !level.is_empty() {
        // A node that is being moved may be met twice.
        level.retain(|(_, node)| *node != 0 && seen.insert(*node));
        level.iter().for_each(|(which, node)| all[*which].push(*node));
        if seen.len() > MOST {
            return Err(format!("more than {MOST} mappings"));
        }
        let places: Vec<u64> = level.iter().map(|(_, node)| *node).collect();
        let mut next = Vec::with_capacity(level.len() * 2);
        for ((which, _), node) in level.into_iter().zip(pieces(&places)?) {
            let child = |at| word(&node, at).map(|child| (which, child));
            next.extend([child(offsets.left)?, child(offsets.right)?]);
        }
        level = next;
    }
    Ok(all)
}

/// All processes by the address spaces they have.
fn processes(kernel: &Kernel, offsets: &Offsets) -> Result<HashMap<u64, Vec<i32>>, String> {
    let level = i16::try_from(super::threads::own_level()?).map_err(|e| e.to_string())?;
    let mut p = begin(8);
    p.read((STACK, -16), 8, (R7, offsets.memory));
    p.read((STACK, -8), 8, (R7, offsets.leader));
    p.load(Size::Double, R7, STACK, -8);
    p.read((STACK, -8), 8, (R7, offsets.pid));
    p.load(Size::Double, R7, STACK, -8);
    p.store_value(STACK, -8, 0);
    p.read((STACK, -8), 4, (R7, offsets.numbers + level * offsets.number));
    let function = kernel.of_tasks.clone()?;
    let mut found: HashMap<u64, Vec<i32>> = HashMap::new();
    each(&end(p), function, Whose::All, |[memory, pid]| {
        // Kernel threads have none; those of other namespaces have no number in ours.
        if memory != 0 && pid != 0 {
            let pids = found.entry(memory).or_default();
            if !pids.contains(&(pid as i32)) {
                pids.push(pid as i32);
            }
        }
        true
    })?;
    Ok(found)
}
