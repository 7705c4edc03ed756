//! Files are locked again, by the tasks themselves: it is they who are to be named as holders.

use super::Run;
use super::read::Checkpoint;
use crate::error::{Error, Result};
use rewake_image::messages::FileLockEntry;
use rewake_image::{ImageDir, kind};
use rewake_inject::ring::Ring;
use rewake_objects::Problem;
use rewake_objects::files::locks;
use rewake_objects::files::open::{self, Opener};
use rewake_objects::steps::Steps;
use std::collections::HashMap;

/// A lock of the images.
#[derive(Debug)]
pub struct Locked {
    lock: FileLockEntry,
    /// The description by which it is taken.
    file: u32,
}

impl Locked {
    /// The file id of what is locked.
    #[must_use]
    pub fn file(&self) -> u32 {
        self.file
    }
}

/// Reads the locks of the images, by process.
///
/// # Errors
/// They name no descriptor of a living task, are of no kind that can be restored, somebody holds them, or several `copies`
/// would.
pub fn read(
    images: &ImageDir,
    checkpoint: &Checkpoint,
    opener: &Opener<'_>,
    copies: bool,
) -> Result<HashMap<i32, Vec<Locked>>> {
    let mut all: HashMap<i32, Vec<Locked>> = HashMap::new();
    let entries = images.read_all(kind::FILE_LOCKS, ())?;
    if entries.is_empty() {
        return Ok(all);
    }
    let held = locks::Held::read();
    for lock in entries {
        let task = checkpoint.tasks.iter().find(|t| t.pid == lock.pid);
        let alive = task.and_then(|t| Some((t, t.alive.as_ref()?)));
        let Some((task, alive)) = alive else {
            return Err(Error::new(format!(
                "filelocks.img: process {} is none of the living ones",
                lock.pid
            )));
        };
        locks::check(&lock).map_err(|p| Error::of(task.pid, &task.comm, p))?;
        let descriptor = alive.fds.iter().find(|f| i64::from(f.fd) == i64::from(lock.fd));
        let Some(file) = descriptor.map(|f| f.id) else {
            let problem = Problem::new(
                format!("fd {}", lock.fd),
                "filelocks.img has a lock of it, but the process has no such descriptor",
            );
            return Err(Error::of(task.pid, &task.comm, problem));
        };
        if let Some((path, flags)) = opener.ordinary(file) {
            if copies && locks::excludes(&lock) {
                let error = Error::of(task.pid, &task.comm, locks::only_one(&lock, &path));
                return Err(error.hint(super::copies::SAME_FILES));
            }
            held.check(&lock, &path, flags).map_err(|p| Error::of(task.pid, &task.comm, p))?;
        }
        all.entry(lock.pid).or_default().push(Locked { lock, file });
    }
    Ok(all)
}

/// The script that takes a task's locks, in their order.
pub fn lock_steps(base: u64, locked: &[Locked]) -> Steps {
    let mut steps = Steps::new(base);
    let entries: Vec<FileLockEntry> = locked.iter().map(|l| l.lock.clone()).collect();
    locks::restore(&mut steps, &entries);
    steps
}

impl Run<'_> {
    /// Has the tasks take their locks, all at the same time. Everything must be open that will be: a lease is only given
    /// if nobody else has the file open.
    pub(super) fn lock_files(&self, rings: &[Ring], opener: &Opener<'_>) -> Result<()> {
        let mut running = Vec::new();
        for (ring, plan) in rings.iter().zip(self.plans) {
            let Some(task) = &plan.task else { continue };
            let Some(steps) = &task.locks else { continue };
            let number = ring
                .load(&steps.script)
                .and_then(|number| ring.ring().map(|()| number))
                .map_err(|e| Error::new(e.to_string()))?;
            running.push((ring, task, steps, number));
        }
        let mut result = Ok(());
        for (ring, plan, steps, number) in running {
            let task = self.task(plan);
            self.wait(ring, number, task)?;
            let results = ring.results(&steps.script);
            for (i, locked) in self.env.locks.get(&task.pid).into_iter().flatten().enumerate() {
                let Err(errno) = results.value(i) else {
                    result = result.and(disown(locked, opener));
                    continue;
                };
                let path = opener.entry(locked.file).ok().and_then(|e| e.reg.as_deref());
                let path = path.map_or(&b"a file"[..], |reg| &reg.name);
                let fd = opener.opened(locked.file).ok();
                let stat = fd.and_then(|fd| rustix::fs::fstat(fd).ok());
                let problem = locks::failure(&locked.lock, errno, stat.as_ref(), path);
                result = result.and(Err(Error::of(task.pid, &task.comm, problem)));
                break;
            }
        }
        result
    }
}

/// Takes the owner away whom the kernel has given the description of a lease, if it had none.
fn disown(locked: &Locked, opener: &Opener<'_>) -> Result<()> {
    if !locks::is_lease(&locked.lock) {
        return Ok(());
    }
    if open::owner_of(opener.entry(locked.file)?).is_none() {
        let fd = opener.opened(locked.file)?;
        rewake_sys::file::set_owner(fd, rewake_sys::file::OWNER_PROCESS, 0).map_err(|e| {
            Error::new(format!("the owner of descriptor {} (a lease): {e}", locked.lock.fd))
        })?;
    }
    Ok(())
}
