//! Comparing the page stores with their checksums: small ones before anything else, large ones while the tasks fill their
//! memory from them, by threads of their own. What is much of it goes to where the tasks want it on the way
//! ([`rewake_objects::memory::huge`]), so that it is read once. No task is released before it is done.

use crate::crew::cpus;
use crate::error::{Context, Error, Result};
use crate::options::Pid;
use rewake_image::{ImageDir, PageStore, RawCheck};
use rewake_inject::stub::Gate;
use rewake_objects::memory::huge::{OPEN, SHUT, Staged};
use rewake_sys::Errno;
use rewake_sys::memory::write_remote;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// So much is read in less time than a thread takes to start and the tasks take to come into being.
const AT_ONCE: u64 = 4 << 20;
/// Parts of a page store that are looked up by where they begin are no longer than this.
const CHUNK: u64 = 2 << 20;

/// What is still to be checked.
#[derive(Debug)]
pub struct PageCheck(RawCheck);

impl PageCheck {
    /// Checks small page stores.
    ///
    /// # Errors
    /// One is damaged.
    pub fn new(images: &ImageDir) -> Result<PageCheck> {
        let check = images.raw_check()?;
        if check.bytes() > AT_ONCE {
            return Ok(PageCheck(check));
        }
        check.run(1)?;
        Ok(PageCheck(RawCheck::default()))
    }

    /// Leaves it to a pager.
    pub fn by_others() -> PageCheck {
        PageCheck(RawCheck::default())
    }

    /// Begins with large ones. To be called when the tree exists: some things that creating it needs (a time namespace)
    /// only a process with a single thread may do.
    ///
    /// # Errors
    /// A page store cannot be opened.
    pub fn start(self, images: &ImageDir, filling: Filling) -> Result<Checking> {
        let PageCheck(mut check) = self;
        filling.want(images, &mut check)?;
        if check.bytes() == 0 {
            return Ok(Checking::default());
        }
        // Where tasks fill their memory by themselves, that is for the other CPUs.
        let workers = if filling.targets.is_empty() { cpus().div_ceil(2) } else { cpus() };
        let (stop, failure) = <(Arc<AtomicBool>, Arc<Mutex<Option<Error>>>)>::default();
        let (stopped, failed) = (stop.clone(), failure.clone());
        let work = move || {
            let take = |store, offset, bytes: &[u8]| {
                if stopped.load(Ordering::Relaxed) {
                    return Err(Error::new("the restore has failed"));
                }
                filling.take(store, offset, bytes)
            };
            let result = check.run_with(workers, &take);
            let value = if result.is_ok() { OPEN } else { SHUT };
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = result.err();
            filling.gate.iter().for_each(|gate| gate.set(value));
        };
        let thread = std::thread::Builder::new().spawn(work);
        let thread =
            thread.map_err(|e| Error::new(format!("no thread to check pages with: {e}")))?;
        Ok(Checking { thread: Some(thread), stop, failure })
    }
}

/// Memory of a task that a page store's bytes go to.
#[derive(Debug, Clone, Copy)]
struct Target {
    offset: u64,
    len: u64,
    /// Index in [`Filling::tasks`].
    task: usize,
    address: u64,
}

/// What tasks wait for at their gate.
#[derive(Debug, Default)]
pub struct Filling {
    gate: Option<Gate>,
    tasks: Vec<(Pid, Vec<u8>)>,
    /// Ascending by offset.
    targets: HashMap<PageStore, Vec<Target>>,
}

impl Filling {
    /// Nothing yet, before a gate.
    pub fn new(gate: Gate) -> Filling {
        Filling { gate: Some(gate), ..Filling::default() }
    }

    /// Adds the memory of a task; `pid` is its id here.
    pub fn add(&mut self, pid: Pid, comm: &[u8], staged: &Staged) {
        let task = self.tasks.len();
        self.tasks.push((pid, comm.to_vec()));
        for piece in staged {
            let targets = self.targets.entry(piece.store).or_default();
            let cuts = (0..piece.len).step_by(CHUNK as usize);
            targets.extend(cuts.map(|at| Target {
                offset: piece.offset + at,
                len: CHUNK.min(piece.len - at),
                task,
                address: piece.address + at,
            }));
        }
    }

    /// As it is to be used, when all are added.
    pub fn sorted(mut self) -> Filling {
        self.targets.values_mut().for_each(|targets| targets.sort_by_key(|t| t.offset));
        self
    }

    /// Has everything that is needed read.
    fn want(&self, images: &ImageDir, check: &mut RawCheck) -> Result<()> {
        for (store, targets) in &self.targets {
            let mut wanted: Vec<(u64, u64)> = Vec::new();
            for target in targets {
                match wanted.last_mut() {
                    Some(last) if target.offset <= last.1 => {
                        last.1 = last.1.max(target.offset + target.len);
                    }
                    _ => wanted.push((target.offset, target.offset + target.len)),
                }
            }
            check.want(*store, wanted, || images.open_store(*store))?;
        }
        Ok(())
    }

    /// Writes what tasks want of these bytes to their memory.
    fn take(&self, store: PageStore, offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(targets) = self.targets.get(&store) else { return Ok(()) };
        let end = offset + bytes.len() as u64;
        // No target is longer than a chunk: those that begin before do not reach here.
        let first = targets.partition_point(|t| t.offset + CHUNK <= offset);
        for target in targets[first..].iter().take_while(|t| t.offset < end) {
            let (from, to) = (target.offset.max(offset), (target.offset + target.len).min(end));
            if from < to {
                let part = &bytes[(from - offset) as usize..(to - offset) as usize];
                self.write(target, from - target.offset, part)?;
            }
        }
        Ok(())
    }

    fn write(&self, target: &Target, at: u64, bytes: &[u8]) -> Result<()> {
        let (pid, comm) = &self.tasks[target.task];
        let mut done = 0;
        while done < bytes.len() {
            let address = target.address + at + done as u64;
            match write_remote(*pid, address, &bytes[done..]) {
                Ok(0) => return Err(Errno::FAULT).of(*pid, comm),
                Ok(written) => done += written,
                Err(e) => return Err(out_of_memory(e.errno)).of(*pid, comm),
            }
        }
        Ok(())
    }
}

/// What the memory of a task that cannot be written lacks.
fn out_of_memory(errno: Errno) -> String {
    match errno {
        Errno::FAULT | Errno::NOMEM => "filling memory: out of memory".to_owned(),
        Errno::SRCH => "filling memory: it was ended meanwhile".to_owned(),
        errno => format!("filling memory: {errno}"),
    }
}

/// A check that is under way. Who drops it, waits until nobody writes to a task any more.
#[derive(Debug, Default)]
pub struct Checking {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Checking {
    /// Waits for its end.
    ///
    /// # Errors
    /// A page store is damaged, or memory cannot be filled.
    pub fn finish(mut self) -> Result<()> {
        self.join()?;
        self.failure().map_or(Ok(()), Err)
    }

    /// What has gone wrong so far.
    pub fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| Error::new("the thread that checks pages died"))
    }
}

impl Drop for Checking {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.join();
    }
}
