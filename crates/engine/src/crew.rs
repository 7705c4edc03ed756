//! Tracer threads.
//!
//! ptrace(2) ties a tracee to the thread that seized it: nobody else may read its registers or let it go. So a tree of
//! many processes is divided among a few threads, each of which keeps what it traces to itself (`S`) and works on it
//! when it is told to. A small tree is looked after by the caller's own thread alone.

use crate::error::{Error, Result};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// The caller's thread and its helpers, each with a state of its own that never leaves it.
#[derive(Debug)]
pub struct Crew<S> {
    own: S,
    helpers: Vec<Helper<S>>,
}

#[derive(Debug)]
struct Helper<S> {
    jobs: Option<Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Default + 'static> Crew<S> {
    /// The caller's thread alone.
    #[must_use]
    pub fn alone() -> Crew<S> {
        Crew { own: S::default(), helpers: Vec::new() }
    }

    /// Members, the caller included.
    #[must_use]
    pub fn len(&self) -> usize {
        1 + self.helpers.len()
    }

    /// Adds helpers until there are `members`, or as many as the system allows threads.
    pub fn grow(&mut self, members: usize) {
        while self.len() < members {
            let (sender, jobs): (_, Receiver<Job<S>>) = channel();
            let thread = Builder::new().name("tracer".into()).spawn(move || {
                let mut state = S::default();
                for job in jobs {
                    job(&mut state);
                }
            });
            match thread {
                Ok(thread) => {
                    self.helpers.push(Helper { jobs: Some(sender), thread: Some(thread) });
                }
                Err(e) => {
                    log::debug!("no further tracer thread: {e}");
                    return;
                }
            }
        }
    }

    /// Has every member do what `job` makes for it (by its number), all at the same time; the results in order.
    ///
    /// # Errors
    /// A helper died.
    pub fn each<T, J>(&mut self, mut job: impl FnMut(usize) -> J) -> Result<Vec<T>>
    where
        T: Send + 'static,
        J: FnOnce(&mut S) -> T + Send + 'static,
    {
        let mut pending = Vec::with_capacity(self.helpers.len());
        let own = job(0);
        for (i, helper) in self.helpers.iter().enumerate() {
            let (sender, result) = channel();
            let job = job(i + 1);
            let job: Job<S> = Box::new(move |state| {
                // The receiver is gone only if the caller gave up.
                let _ = sender.send(job(state));
            });
            if let Some(jobs) = &helper.jobs {
                jobs.send(job).map_err(|_| died())?;
            }
            pending.push(result);
        }
        let mut results = vec![own(&mut self.own)];
        for result in pending {
            results.push(result.recv().map_err(|_| died())?);
        }
        Ok(results)
    }
}

/// CPUs that we may use. The standard library looks through our control groups for it, which takes longer than what little
/// work there may be: whoever has little does not ask.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Divides `items` among as many threads as there are CPUs, `enough` to each at least, and has each do `work` on its share;
/// the results in order.
///
/// # Errors
/// The first that `work` returns.
pub fn spread<I: Sync, T: Send>(
    items: &[I],
    enough: usize,
    work: impl Fn(&[I]) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if items.len() <= enough {
        return Ok(vec![work(items)?]);
    }
    let share = items.len().div_ceil(cpus()).max(enough);
    if share >= items.len() {
        return Ok(vec![work(items)?]);
    }
    let (own, others) = items.split_at(share);
    std::thread::scope(|scope| {
        let work = &work;
        let begin = |part| (part, Builder::new().spawn_scoped(scope, move || work(part)));
        let running: Vec<_> = others.chunks(share).map(begin).collect();
        let mut results = vec![work(own)];
        results.extend(running.into_iter().map(|(part, begun)| match begun {
            Ok(thread) => {
                thread.join().unwrap_or_else(|_| Err(Error::new("a thread of rewake died")))
            }
            // Without a further thread it takes longer, that is all.
            Err(_) => work(part),
        }));
        results.into_iter().collect()
    })
}

fn died() -> Error {
    Error::new("a tracer thread of rewake died")
}

impl<S> Drop for Helper<S> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_keeps_its_own_state() {
        let mut crew: Crew<Vec<usize>> = Crew::alone();
        crew.grow(4);
        let lengths =
            crew.each(|i| move |state: &mut Vec<usize>| state.extend(0..i)).map(|r| r.len());
        assert_eq!(lengths.ok(), Some(4));
        let sums = crew.each(|_| |state: &mut Vec<usize>| state.iter().sum::<usize>());
        assert_eq!(sums.ok(), Some(vec![0, 0, 1, 3]));
    }

    #[test]
    fn a_dead_helper_is_an_error() {
        let mut crew: Crew<()> = Crew::alone();
        crew.grow(2);
        let result = crew.each(|i| move |(): &mut ()| assert!(i == 0, "for the test"));
        assert!(result.is_err());
    }
}
