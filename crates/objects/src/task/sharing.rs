//! Which processes share an address space, a table of descriptors, and the like (clone(2)).
//!
//! kcmp(2) gives an order of kernel objects, so tasks are sorted by it: n log n comparisons for n tasks.

use crate::Problem;
use rewake_sys::kcmp::{self, Kind};
use std::collections::BTreeMap;

/// What can be shared, in the order of [`Objects`].
pub const KINDS: [Kind; 4] = [Kind::Vm, Kind::Files, Kind::Fs, Kind::Sighand];

/// Something for each of [`KINDS`]: a number of a kernel object, or the index of a task. Tasks share what has the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Objects {
    /// The address space.
    pub vm: u32,
    /// The table of descriptors.
    pub files: u32,
    /// Working directory, root, umask.
    pub fs: u32,
    /// The table of signal handlers.
    pub sighand: u32,
}

impl Objects {
    /// The one of this kind.
    #[must_use]
    pub fn get(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Vm => self.vm,
            Kind::Files => self.files,
            Kind::Fs => self.fs,
            _ => self.sighand,
        }
    }

    /// Sets the one of this kind.
    pub fn set(&mut self, kind: Kind, to: u32) {
        match kind {
            Kind::Vm => self.vm = to,
            Kind::Files => self.files = to,
            Kind::Fs => self.fs = to,
            _ => self.sighand = to,
        }
    }
}

/// What a kind is called in texts.
#[must_use]
pub fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Vm => "address space",
        Kind::Files => "table of descriptors",
        Kind::Fs => "working directory and umask",
        _ => "table of signal handlers",
    }
}

/// For each task, given by its pid (`None` for a zombie, which has none of it), the index of the first task that has the same
/// object: its own, if it shares it with none before it.
///
/// # Errors
/// kcmp(2) is refused, or a task is gone.
pub fn survey(pids: &[Option<i32>]) -> Result<Vec<Objects>, Problem> {
    /// From so many tasks on, the kinds are compared at the same time.
    const MANY: usize = 64;
    let all: Vec<(u32, i32)> =
        (0..).zip(pids).filter_map(|(at, pid)| Some((at, (*pid)?))).collect();
    let all = all.as_slice();
    let (vm, files, fs) = if all.len() < MANY {
        (owners(all, Kind::Vm), owners(all, Kind::Files), owners(all, Kind::Fs))
    } else {
        std::thread::scope(|scope| {
            let begin =
                |kind| std::thread::Builder::new().spawn_scoped(scope, move || owners(all, kind));
            // Without further threads it takes longer, that is all.
            let end = |begun: std::io::Result<std::thread::ScopedJoinHandle<'_, Owners>>, kind| {
                match begun {
                    Ok(thread) => thread.join().unwrap_or_else(|_| {
                        Err(Problem::new(name(kind), "cannot be compared: a thread of rewake died"))
                    }),
                    Err(_) => owners(all, kind),
                }
            };
            let (files, fs) = (begin(Kind::Files), begin(Kind::Fs));
            (owners(all, Kind::Vm), end(files, Kind::Files), end(fs, Kind::Fs))
        })
    };
    let (vm, files, fs) = (vm?, files?, fs?);
    let mut objects: Vec<Objects> =
        (0..pids.len() as u32).map(|i| Objects { vm: i, files: i, fs: i, sighand: i }).collect();
    for (((at, _), vm), (files, fs)) in all.iter().zip(&vm).zip(files.iter().zip(&fs)) {
        let objects = &mut objects[*at as usize];
        (objects.vm, objects.files, objects.fs) = (*vm, *files, *fs);
    }
    // Handlers are shared only by those that share memory: clone(2) does not allow it otherwise.
    let mut groups: BTreeMap<u32, Vec<(u32, i32)>> = BTreeMap::new();
    for (task, vm) in all.iter().zip(vm) {
        groups.entry(vm).or_default().push(*task);
    }
    for group in groups.into_values().filter(|group| group.len() > 1) {
        for ((at, _), sighand) in group.iter().zip(owners(&group, Kind::Sighand)?) {
            objects[*at as usize].sighand = sighand;
        }
    }
    Ok(objects)
}

/// Of each task the first that has the same object, by index.
type Owners = Result<Vec<u32>, Problem>;

/// Compares tasks, given by index and pid.
fn owners(tasks: &[(u32, i32)], kind: Kind) -> Owners {
    let mut sorted: Vec<(u32, i32)> = Vec::with_capacity(tasks.len());
    let mut owners = Vec::with_capacity(tasks.len());
    for &(task, pid) in tasks {
        let mut failed = None;
        let found = sorted.binary_search_by(|(_, other)| {
            kcmp::compare(*other, pid, kind).unwrap_or_else(|e| {
                failed = Some(e);
                std::cmp::Ordering::Less
            })
        });
        if let Some(e) = failed {
            return Err(Problem::new(name(kind), format!("cannot be compared: {e}")));
        }
        owners.push(match found {
            Ok(at) => sorted[at].0,
            Err(at) => {
                sorted.insert(at, (task, pid));
                task
            }
        });
    }
    Ok(owners)
}

/// Sorts tasks, given by the owners of their objects, into those that share memory or descriptors, be it through others:
/// for each the index of the first that it is so connected with.
#[must_use]
pub fn connected(owners: &[Objects]) -> Vec<usize> {
    fn find(root: &mut [usize], mut at: usize) -> usize {
        while root[at] != at {
            root[at] = root[root[at]];
            at = root[at];
        }
        at
    }
    let mut root: Vec<usize> = (0..owners.len()).collect();
    for (at, own) in owners.iter().enumerate() {
        for owner in [own.vm as usize, own.files as usize] {
            let (a, b) = (find(&mut root, at), find(&mut root, owner));
            root[a.max(b)] = a.min(b);
        }
    }
    (0..owners.len()).map(|at| find(&mut root, at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_everything_and_zombies_nothing() {
        let (tx, rx) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tx.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("a listener");
            let _ = wait.recv();
        });
        let tid = rx.recv().expect("a thread");
        let own = std::process::id() as i32;
        let seen = survey(&[Some(own), None, Some(tid)]).expect("kcmp");
        let first = Objects::default();
        assert_eq!(seen, [first, Objects { vm: 1, files: 1, fs: 1, sighand: 1 }, first]);
        drop(done);
        thread.join().expect("a thread that ends");
        assert!(survey(&[Some(own), Some(-1)]).is_err());
    }

    #[test]
    fn those_are_connected_that_share_through_others() {
        let own = |vm, files, fs| Objects { vm, files, fs, sighand: 0 };
        // 0 and 2 share memory, 2 and 3 descriptors; 1 and 4 nothing but a working directory.
        let owners = [own(0, 0, 0), own(1, 1, 1), own(0, 2, 2), own(3, 2, 3), own(4, 4, 1)];
        assert_eq!(connected(&owners), [0, 1, 0, 0, 4]);
    }
}
