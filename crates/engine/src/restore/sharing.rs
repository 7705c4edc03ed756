//! Which clone passes on what, so that processes share memory, descriptors and the like again. Pure: works on numbers only.
//!
//! What processes share was inherited, and can only be inherited again: between any two that share something every clone must
//! have passed it on (`CLONE_VM`, `CLONE_FILES`…). Who stands in between without sharing it has it until all are born, and then
//! takes a copy (unshare(2)); of memory and signal handlers nobody can.

use super::lineage::{Member, Node, Role};
use crate::error::{Error, Result};
use rewake_objects::task::sharing::{KINDS, Objects, connected, name};
use rewake_sys::kcmp::Kind;
use std::collections::{BTreeMap, HashMap};

const FILES: u64 = libc::CLONE_FILES as u64;

/// The clone flag of a kind.
fn flag(kind: Kind) -> u64 {
    (match kind {
        Kind::Vm => libc::CLONE_VM,
        Kind::Files => libc::CLONE_FILES,
        Kind::Fs => libc::CLONE_FS,
        _ => libc::CLONE_SIGHAND,
    }) as u64
}

/// Fills in what each node shares with its cloner. Cloners come before those they clone.
///
/// # Errors
/// Nobody could have passed it on.
pub fn plan(members: &[Member], nodes: &mut [Node]) -> Result<()> {
    let mut shared_tables = vec![false; nodes.len()];
    for kind in KINDS {
        let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (at, node) in nodes.iter().enumerate() {
            if let Role::Task(i) = node.role
                && !members[i].zombie
            {
                groups.entry(members[i].objects.get(kind)).or_default().push(at);
            }
        }
        groups.retain(|_, group| group.len() > 1);
        let mut passing: Vec<Option<u32>> = vec![None; nodes.len()];
        for (object, group) in groups {
            for at in passed_through(&group, nodes) {
                if passing[at].replace(object).is_some_and(|other| other != object) {
                    return Err(impossible(members, nodes, kind, &group, "it would have two"));
                }
                let node = &nodes[at];
                let has_it = match node.role {
                    Role::Task(i) => members[i].objects.get(kind) == object,
                    // They end when they have cloned the others.
                    Role::Leader | Role::Orphaner => true,
                    Role::Init | Role::Group => false,
                };
                match kind {
                    _ if has_it => {}
                    Kind::Files | Kind::Fs => nodes[at].part |= flag(kind),
                    _ => return Err(impossible(members, nodes, kind, &group, "it has its own")),
                }
            }
            // Whoever is not the first of them has it from its cloner.
            for at in passed_through(&group, nodes).into_iter().skip(1) {
                nodes[at].share |= flag(kind);
            }
        }
        if kind == Kind::Files {
            shared_tables = passing.iter().map(Option::is_some).collect();
        }
    }
    // Of a table that several have, a copy may have in it what another of them has just opened.
    for node in nodes {
        let copied = node.cloner.is_some_and(|by| shared_tables[by]);
        node.clean = copied && node.share & FILES == 0;
    }
    Ok(())
}

/// What a task does for those it shares something with. Who shares nothing does all of it for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part {
    /// The first of those with its memory: the one that makes it.
    pub memory: usize,
    /// The first of those with its descriptors: the one that makes the socket through which all of them get theirs.
    pub table: usize,
    /// It is the last of those, and takes the descriptors that stay.
    pub fills_table: bool,
    /// It goes to the working directory and root, and sets the umask.
    pub directories: bool,
    /// When it builds itself: after all that it shares memory or descriptors with and that are before it.
    pub turn: usize,
}

/// Divides the work among tasks, given by their objects; `None` for zombies.
#[must_use]
pub fn parts(tasks: &[Option<Objects>]) -> Vec<Part> {
    let mut owners = Vec::with_capacity(tasks.len());
    let mut first: HashMap<(usize, u32), u32> = HashMap::new();
    let mut last: HashMap<u32, usize> = HashMap::new();
    for (at, objects) in tasks.iter().enumerate() {
        let mut own = Objects::default();
        for (n, kind) in KINDS.into_iter().enumerate() {
            let mut owner = at as u32;
            if let Some(objects) = objects {
                owner = *first.entry((n, objects.get(kind))).or_insert(owner);
            }
            own.set(kind, owner);
        }
        owners.push(own);
        last.insert(own.files, at);
    }
    let mut turns: HashMap<usize, usize> = HashMap::new();
    let connected = connected(&owners);
    let part = |(at, (own, with)): (usize, (&Objects, usize))| {
        let next = turns.entry(with).or_default();
        *next += 1;
        Part {
            memory: own.vm as usize,
            table: own.files as usize,
            fills_table: last.get(&own.files) == Some(&at),
            directories: own.fs as usize == at,
            turn: *next - 1,
        }
    };
    owners.iter().zip(connected).enumerate().map(part).collect()
}

/// All nodes between those of `group` and the one from which they all descend, which is the first; in order.
fn passed_through(group: &[usize], nodes: &[Node]) -> Vec<usize> {
    let above = |at: usize| nodes[at].cloner.unwrap_or(0);
    let mut top = group[0];
    for at in group {
        let mut at = *at;
        while at != top {
            if at > top { at = above(at) } else { top = above(top) }
        }
    }
    let mut all = std::collections::BTreeSet::from([top]);
    for at in group {
        let mut at = *at;
        while at != top {
            all.insert(at);
            at = above(at);
        }
    }
    all.into_iter().collect()
}

fn impossible(members: &[Member], nodes: &[Node], kind: Kind, group: &[usize], why: &str) -> Error {
    let pid = |at: &usize| match nodes[*at].role {
        Role::Task(i) => members[i].pid.to_string(),
        _ => String::new(),
    };
    let pids: Vec<String> = group.iter().map(pid).collect();
    Error::new(format!(
        "processes {} share their {}, and no clone could make it so again: a process between them would have to pass it on, but {why}",
        pids.join(", "),
        name(kind)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::lineage::Lineage;
    use rewake_objects::task::sharing::Objects;

    fn m(pid: i32, ppid: i32, objects: [u32; 4]) -> Member {
        let [vm, files, fs, sighand] = objects;
        let objects = Objects { vm, files, fs, sighand };
        Member { pid, ppid, pgid: 1, sid: 1, zombie: false, objects }
    }

    fn node(lineage: &Lineage, pid: i32) -> &Node {
        lineage.nodes.iter().find(|n| n.pid == Some(pid)).expect("a node")
    }

    const VM: u64 = libc::CLONE_VM as u64;
    const FS: u64 = libc::CLONE_FS as u64;

    #[test]
    fn who_stands_between_takes_a_copy_afterwards() {
        // 1 and 3 share directory and descriptors, 2 between them does not; 4 shares nothing.
        let tree = [m(1, 0, [1; 4]), m(2, 1, [2; 4]), m(3, 2, [3, 1, 1, 3]), m(4, 2, [4; 4])];
        let lineage = Lineage::plan(&tree, false, false).expect("a plan");
        let of = |pid| {
            let n = node(&lineage, pid);
            (n.share, n.part, n.clean)
        };
        assert_eq!(of(1), (0, 0, false));
        assert_eq!(of(2), (FILES | FS, FILES | FS, false));
        assert_eq!(of(3), (FILES | FS, 0, false));
        assert_eq!(of(4), (0, 0, true));
    }

    #[test]
    fn the_work_is_divided() {
        let own = |n| Objects { vm: n, files: n, fs: n, sighand: n };
        let tasks = [
            Some(own(9)),
            None,
            Some(Objects { fs: 2, ..own(9) }),
            Some(Objects { files: 9, ..own(5) }),
        ];
        let parts = parts(&tasks);
        let all =
            |at| Part { memory: at, table: at, fills_table: true, directories: true, turn: 0 };
        assert_eq!(parts[0], Part { fills_table: false, ..all(0) });
        assert_eq!(parts[1], all(1));
        assert_eq!(parts[2], Part { fills_table: false, turn: 1, ..all(0) });
        assert_eq!(parts[3], Part { memory: 3, table: 0, turn: 2, ..all(0) });
    }

    #[test]
    fn nobody_can_leave_an_address_space() {
        let tree = [m(1, 0, [1; 4]), m(2, 1, [2; 4]), m(3, 2, [1, 3, 3, 3])];
        let error = Lineage::plan(&tree, false, false).unwrap_err();
        assert!(error.message.contains("processes 1, 3 share their address space"), "{error}");
        let child = [m(1, 0, [1; 4]), m(2, 1, [1, 2, 2, 2]), m(3, 2, [1, 3, 3, 3])];
        let lineage = Lineage::plan(&child, false, false).expect("a plan");
        assert_eq!([2, 3].map(|pid| node(&lineage, pid).share), [VM, VM]);
    }

    #[test]
    fn one_process_cannot_pass_on_two() {
        let tree = [
            m(1, 0, [1; 4]),
            m(2, 1, [2; 4]),
            m(3, 2, [3, 7, 3, 3]),
            m(4, 1, [4, 7, 4, 4]),
            m(5, 2, [5, 8, 5, 5]),
            m(6, 1, [6, 8, 6, 6]),
        ];
        // 4 and 6 were left to 1 by one below 2: helpers of 3 and 5 clone them.
        assert!(Lineage::plan(&tree, false, false).is_ok());
        let tree = [
            m(1, 0, [1; 4]),
            m(2, 1, [2; 4]),
            m(3, 2, [3, 7, 3, 3]),
            m(4, 1, [4; 4]),
            m(5, 4, [5, 7, 5, 5]),
            m(6, 4, [6, 1, 6, 6]),
        ];
        let error = Lineage::plan(&tree, false, false).unwrap_err();
        assert!(error.message.contains("it would have two"), "{error}");
    }
}
