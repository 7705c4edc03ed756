//! Reading the options of TCP connections: where many are alike at the end of the survey ([`alike`]), else about eighty calls
//! each, made by other threads while the survey goes on.

use super::alike;
use super::inet;
use super::option_own::{self, Usual};
use super::options::Making;
use super::reading::Reading;
use crate::Problem;
use crate::iterators::sockets::Teller;
use rewake_image::messages::{InetSkEntry, RewakeSocketOptionEntry};
use rewake_netlink::diag;
use rustix::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// So many connections are worth the handing over.
const BATCH: usize = 32;
/// More threads only get in each other's way.
const MOST: usize = 8;

/// A connection whose options are to be read, before it is in repair mode, which changes one.
#[derive(Debug)]
pub(super) struct Job {
    pub fd: Arc<OwnedFd>,
    pub object: String,
    pub family: u32,
    pub known: Option<Arc<diag::Tcp>>,
    /// It has a peer that has answered.
    pub connected: bool,
    /// Its classic BPF filter.
    pub filter: Vec<u64>,
    pub usual: Arc<[Usual]>,
}

/// The options of a connection.
#[derive(Debug, Default)]
pub(super) struct Options {
    /// Those that CRIU's format has.
    pub entry: InetSkEntry,
    /// The others, if they are not as usual.
    pub unusual: Vec<RewakeSocketOptionEntry>,
}

impl Job {
    pub(super) fn reading(&self) -> Reading<'_> {
        Reading {
            socket: Making { fd: self.fd.as_fd(), object: &self.object },
            known: self.known.as_deref(),
            connected: self.connected,
            filter: Some(&self.filter),
        }
    }

    pub(super) fn read(&self) -> Result<Options, Problem> {
        let reading = self.reading();
        let mut entry = InetSkEntry {
            family: self.family,
            r#type: libc::SOCK_STREAM as u32,
            proto: libc::IPPROTO_TCP as u32,
            ..InetSkEntry::default()
        };
        inet::read_options(reading, &mut entry)?;
        Ok(Options { entry, unusual: option_own::unusual(reading, &self.usual)? })
    }
}

pub(super) type Batch = Vec<(usize, Job)>;
pub(super) type Done = Vec<(usize, Result<Options, Problem>)>;

/// How the options are read.
#[derive(Debug, Default)]
enum Way {
    /// A thread finds out which.
    #[default]
    Unknown,
    /// All at the end: the kernel tells which are alike.
    Together(Teller),
    /// As they come.
    OneByOne,
}

#[derive(Debug, Default)]
struct State {
    way: Way,
    waiting: Vec<Batch>,
    done: Done,
    /// No more will come.
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A thread that panicked has left it whole: lists of results.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until there is nothing more to do.
    fn work(&self) {
        let mut state = self.state();
        loop {
            let now = matches!(state.way, Way::OneByOne);
            if let Some(batch) = state.waiting.pop_if(|_| now) {
                drop(state);
                let done: Done = batch.iter().map(|(at, job)| (*at, job.read())).collect();
                state = self.state();
                state.done.extend(done);
            } else if state.closed && state.waiting.is_empty() {
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Shared {
    /// Finds out how the options can be read.
    fn choose(&self) {
        let way = match Teller::new() {
            Ok(teller) => Way::Together(teller),
            Err(e) => {
                log::debug!("options of TCP connections are read one by one: {e}");
                Way::OneByOne
            }
        };
        self.state().way = way;
        self.changed.notify_all();
    }

    /// Reads all together, if that is the way; from then on each is read by itself.
    fn read_together(&self) {
        let mut state = self.state();
        while matches!(state.way, Way::Unknown) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Way::Together(mut teller) = std::mem::replace(&mut state.way, Way::OneByOne) {
            let batches = std::mem::take(&mut state.waiting);
            drop(state);
            let (done, rest) = alike::read(&mut teller, batches);
            state = self.state();
            state.done.extend(done);
            state.waiting.extend(rest);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// The threads, and what they have to do.
#[derive(Debug, Default)]
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    gathered: Batch,
    count: usize,
}

impl Readers {
    /// Has the options of one more connection read; results come in this order.
    pub fn add(&mut self, job: Job) {
        self.gathered.push((self.count, job));
        self.count += 1;
        if self.gathered.len() < BATCH {
            return;
        }
        self.hand_over();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads.len() + 1 < cpus.min(MOST) {
            let shared = Arc::clone(&self.shared);
            let first = self.threads.is_empty();
            let thread = std::thread::Builder::new().name("options".into());
            // Without it, `finish` does it all.
            let work = move || {
                if first {
                    shared.choose();
                }
                shared.work();
            };
            self.threads.extend(thread.spawn(work).ok());
        }
    }

    fn hand_over(&mut self) {
        let batch = std::mem::take(&mut self.gathered);
        self.shared.state().waiting.push(batch);
        self.shared.changed.notify_one();
    }

    /// Does the rest, and returns the options of all in their order.
    ///
    /// # Errors
    /// Those of a connection cannot be read.
    pub fn finish(&mut self) -> Result<Vec<Options>, Problem> {
        self.hand_over();
        if self.threads.is_empty() {
            self.shared.state().way = Way::OneByOne;
        }
        self.shared.read_together();
        self.end(false);
        self.shared.work();
        let died = || Problem::new("TCP connections", "a thread of rewake died");
        self.threads.drain(..).try_for_each(|thread| thread.join().map_err(|_| died()))?;
        let mut state = self.shared.state();
        state.closed = false;
        state.way = Way::Unknown;
        let mut done = std::mem::take(&mut state.done);
        drop(state);
        done.sort_unstable_by_key(|(at, _)| *at);
        if done.len() != std::mem::take(&mut self.count) {
            return Err(died());
        }
        done.into_iter().map(|(_, options)| options).collect()
    }

    fn end(&self, at_once: bool) {
        let mut state = self.shared.state();
        state.closed = true;
        if at_once {
            state.waiting.clear();
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.end(true);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn options_come_in_their_order() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut readers = Readers::default();
        // Twice, with batches and without.
        for count in [3, 3 * BATCH + 5] {
            let streams: Vec<TcpStream> = (0..count)
                .map(|at| {
                    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    stream.set_nodelay(at % 3 == 0).unwrap();
                    stream
                })
                .collect();
            for stream in &streams {
                readers.add(Job {
                    fd: Arc::new(stream.as_fd().try_clone_to_owned().unwrap()),
                    object: String::new(),
                    family: libc::AF_INET as u32,
                    known: None,
                    connected: true,
                    filter: Vec::new(),
                    usual: Arc::new([]),
                });
            }
            let options = readers.finish().unwrap();
            assert_eq!(options.len(), count);
            for (at, options) in options.into_iter().enumerate() {
                let nodelay = options.entry.tcp_opts.unwrap().nodelay;
                assert_eq!(nodelay, (at % 3 == 0).then_some(true), "{at}");
            }
        }
    }

    #[test]
    fn readers_that_are_given_up_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut readers = Readers::default();
        let fd = Arc::new(listener.as_fd().try_clone_to_owned().unwrap());
        for _ in 0..2 * BATCH {
            readers.add(Job {
                fd: Arc::clone(&fd),
                object: String::new(),
                family: libc::AF_INET as u32,
                known: None,
                connected: false,
                filter: Vec::new(),
                usual: Arc::new([]),
            });
        }
        drop(readers);
        assert_eq!(Arc::strong_count(&fd), 1);
    }
}
