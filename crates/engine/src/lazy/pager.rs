//! The pager at work: it serves faults, follows what processes do to their address spaces, and has the rest brought in the
//! background by as many threads as there are CPUs.

use super::PagerReport;
use super::background::Background;
use super::guard::{Guard, Process};
use super::missing::Missing;
use super::space::Space;
use super::stores::Stores;
use super::wire::{self, Word};
use super::working_set::{Order, Wanted};
use crate::error::{Error, Result};
use rewake_sys::Errno;
use rewake_sys::userfaultfd::Userfaultfd;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The working set is complete when nothing was touched for so long,
const QUIET: Duration = Duration::from_secs(1);
/// or after so long.
const LONG_ENOUGH: Duration = Duration::from_secs(10);
/// How long a page waits that the kernel does not take at the moment.
const SOON: Duration = Duration::from_micros(100);

const CONNECTION: u64 = 0;
const IDLE: u64 = 1;
const FIRST_SPACE: u64 = 16;

/// How the work is to be done.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// The restore is ours: it tells pidfds and waits for an answer.
    pub own: bool,
    /// Note in which order pages are touched.
    pub record: bool,
}

/// Serves the processes that a restore tells of on a connection, until they have all they lack.
pub struct Pager<'a> {
    stores: &'a Stores,
    connection: BorrowedFd<'a>,
    guard: &'a mut Guard,
    how: How,
    epoll: OwnedFd,
    idle: OwnedFd,
    background: Arc<Background>,
    next_key: u64,
    order: Order,
    touched: u64,
}

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::new(format!("{what}: {errno}"))
}

impl<'a> Pager<'a> {
    /// One that has not begun; `wanted` is what is to come first.
    ///
    /// # Errors
    /// The kernel gives no more descriptors.
    pub fn new(
        stores: &'a Stores,
        connection: BorrowedFd<'a>,
        guard: &'a mut Guard,
        how: How,
        wanted: Vec<Wanted>,
    ) -> Result<Pager<'a>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("epoll_create1"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let idle = eventfd(0, flags).map_err(failed("eventfd"))?;
        let told = idle.try_clone().map_err(|e| Error::new(format!("dup: {e}")))?;
        let add = |fd, key| epoll::add(&epoll, fd, EventData::new_u64(key), EventFlags::IN);
        add(connection, CONNECTION).map_err(failed("epoll_ctl"))?;
        add(idle.as_fd(), IDLE).map_err(failed("epoll_ctl"))?;
        Ok(Pager {
            stores,
            connection,
            guard,
            how,
            epoll,
            idle,
            background: Arc::new(Background::new(wanted, told)),
            next_key: FIRST_SPACE,
            order: Order::default(),
            touched: 0,
        })
    }

    /// Does all of it.
    ///
    /// # Errors
    /// The restore has failed; pages cannot be brought. The processes must be ended then.
    pub fn run(&mut self) -> Result<PagerReport> {
        self.receive()?;
        let _ = epoll::delete(&self.epoll, self.connection);
        let missing: u64 = self.background.spaces().iter().map(|s| s.bytes()).sum();
        log::info!("all processes are ready; {missing} bytes are missing");
        self.serve()?;
        let background = self.background.brought.load(Ordering::Relaxed);
        Ok(PagerReport { touched: self.touched, background })
    }

    /// In which order pages were touched.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// Waits until something happens, and tells where; address spaces with pages that could not be brought are told too.
    fn wait(&self, timeout: Option<Duration>) -> Result<Vec<u64>> {
        let spaces = self.background.spaces();
        let waiting: Vec<u64> = spaces.iter().filter(|s| s.has_waiting()).map(|s| s.key).collect();
        let timeout = if waiting.is_empty() { timeout } else { Some(SOON) };
        let timeout = timeout.map(|t| rustix::time::Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        let mut events = Vec::with_capacity(64);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(failed("epoll_wait")(e)),
        }
        let mut keys: Vec<u64> = events.iter().map(|e: &epoll::Event| e.data.u64()).collect();
        keys.extend(waiting);
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }

    /// Hears of all processes, and serves those that are there already: the restore itself may touch their memory.
    fn receive(&mut self) -> Result<()> {
        let mut expected = self.stores.processes()?;
        loop {
            let keys = self.wait(None)?;
            for key in keys.iter().filter(|key| **key >= FIRST_SPACE) {
                self.look(*key)?;
            }
            if !keys.contains(&CONNECTION) {
                continue;
            }
            match wire::receive_word(self.connection).map_err(failed("the restore"))? {
                Word::Process(pid, uffd, pidfd) => {
                    expected.retain(|p| *p != pid);
                    self.begin(pid, uffd, pidfd)?;
                }
                Word::Nothing(pid) => expected.retain(|p| *p != pid),
                Word::Ready => break,
                Word::End => return Err(Error::new("the restore has failed")),
            }
        }
        if let Some(pid) = expected.first() {
            return Err(Error::new(format!("the restore has not told of process {pid}")));
        }
        if self.how.own {
            rustix::io::write(self.connection, b"!").map_err(failed("the restore"))?;
        }
        Ok(())
    }

    /// The restore tells of a process.
    fn begin(&mut self, pid: i32, uffd: OwnedFd, pidfd: Option<OwnedFd>) -> Result<()> {
        let (comm, pieces, mappings) = self.stores.of(pid)?;
        let name = format!("process {pid} ({comm})");
        self.guard.watch(self.next_key, Process::new(pid, comm, pidfd)?, uffd.as_fd());
        self.add(pid, name, Userfaultfd::from_fd(uffd), Missing::new(pieces), mappings)
    }

    fn add(
        &mut self,
        pid: i32,
        name: String,
        uffd: Userfaultfd,
        missing: Missing,
        mappings: Vec<Range<u64>>,
    ) -> Result<()> {
        let key = self.next_key;
        self.next_key += 1;
        epoll::add(&self.epoll, &uffd, EventData::new_u64(key), EventFlags::IN)
            .map_err(failed("epoll_ctl"))?;
        self.background.add(Arc::new(Space::new(key, pid, name, uffd, missing, mappings)));
        Ok(())
    }

    /// Looks at an address space, and lets it go if it lacks nothing; true if it was touched.
    fn look(&mut self, key: u64) -> Result<bool> {
        let spaces = self.background.spaces();
        let Some(space) = spaces.iter().find(|s| s.key == key) else { return Ok(false) };
        let mut children = Vec::new();
        let mut touched = Vec::new();
        let complete = space.look(&mut children, |address, len| touched.push((address, len)))?;
        for (address, len) in &touched {
            self.touched += len;
            if self.how.record {
                self.order.touched(space.pid, *address, *len);
            }
        }
        for (uffd, missing) in children {
            self.guard.hold(self.next_key, uffd.as_fd());
            let name = format!("a child of {}", space.name);
            self.add(space.pid, name, uffd, missing, space.mappings.clone())?;
        }
        if complete {
            let _ = epoll::delete(&self.epoll, &space.uffd);
            self.background.remove(key);
            self.guard.release(key);
        }
        Ok(!touched.is_empty())
    }

    /// Serves all until nothing is missing.
    fn serve(&mut self) -> Result<()> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let background = Arc::clone(&self.background);
        std::thread::scope(|scope| {
            let mut waiting = self.how.record;
            let (begun, mut last) = (Instant::now(), Instant::now());
            let start = || (0..workers).for_each(|_| drop(scope.spawn(|| background.work())));
            if !waiting {
                start();
            }
            let result = loop {
                if background.spaces().is_empty() {
                    break Ok(());
                }
                let keys = match self.wait(Some(QUIET)) {
                    Ok(keys) => keys,
                    Err(e) => break Err(e),
                };
                if let Some(failure) = background.failure() {
                    break Err(failure);
                }
                // A thread of the background has found nothing: some address space may be complete.
                let idle = keys.contains(&IDLE);
                if idle {
                    let _ = rustix::io::read(&self.idle, &mut [0; 8]);
                }
                let all = background.spaces();
                let looked = all.iter().filter(|s| idle || keys.contains(&s.key));
                let looked = looked.map(|s| self.look(s.key)).collect::<Result<Vec<bool>>>();
                match looked {
                    Ok(touched) if touched.contains(&true) => last = Instant::now(),
                    Ok(_) => {}
                    Err(e) => break Err(e),
                }
                let known = last.elapsed() >= QUIET || begun.elapsed() >= LONG_ENOUGH;
                if waiting && known {
                    waiting = false;
                    start();
                }
            };
            background.end();
            result
        })
    }
}
