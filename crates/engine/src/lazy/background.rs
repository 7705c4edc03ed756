//! What nobody has touched yet comes in the background: what the last restore has touched first.

use super::space::{Brought, Space, lock};
use super::working_set::Wanted;
use crate::error::{Error, Result};
use rewake_sys::Errno;
use rustix::fd::OwnedFd;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Copies are so large: faults have to wait for one of them.
const CHUNK: u64 = 256 << 10;
/// How long the background waits when the kernel does not take pages at the moment.
const SOON: Duration = Duration::from_micros(100);
/// How long memory may be short before that is an error.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a thread looks that has found nothing to do.
const IDLE: Duration = Duration::from_millis(20);

/// What the threads share.
#[derive(Debug)]
pub struct Background {
    spaces: RwLock<Vec<Arc<Space>>>,
    wanted: Mutex<VecDeque<Wanted>>,
    /// Nothing is left, or all has failed.
    over: AtomicBool,
    more: (Mutex<()>, Condvar),
    failure: Mutex<Option<Error>>,
    /// Written when a thread has found nothing to do.
    idle: OwnedFd,
    /// Bytes brought.
    pub brought: AtomicU64,
}

impl Background {
    /// `wanted` comes first; `idle` is an eventfd(2).
    pub fn new(wanted: Vec<Wanted>, idle: OwnedFd) -> Background {
        Background {
            spaces: RwLock::default(),
            wanted: Mutex::new(wanted.into()),
            over: AtomicBool::new(false),
            more: Default::default(),
            failure: Mutex::default(),
            idle,
            brought: AtomicU64::new(0),
        }
    }

    /// All address spaces.
    pub fn spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One more.
    pub fn add(&self, space: Arc<Space>) {
        self.spaces.write().unwrap_or_else(PoisonError::into_inner).push(space);
        self.more.1.notify_all();
    }

    /// One that lacks nothing any more.
    pub fn remove(&self, key: u64) {
        self.spaces.write().unwrap_or_else(PoisonError::into_inner).retain(|s| s.key != key);
    }

    /// Ends all threads.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.more.1.notify_all();
    }

    /// Why a thread has given up, if one has.
    pub fn failure(&self) -> Option<Error> {
        lock(&self.failure).take()
    }

    /// What a thread does.
    pub fn work(&self) {
        while !self.over.load(Ordering::Acquire) {
            match self.round() {
                Ok(true) => {}
                Ok(false) => {
                    let _ = rustix::io::write(&self.idle, &1u64.to_ne_bytes());
                    let held = lock(&self.more.0);
                    drop(self.more.1.wait_timeout(held, IDLE));
                }
                Err(e) => {
                    lock(&self.failure).get_or_insert(e);
                    let _ = rustix::io::write(&self.idle, &1u64.to_ne_bytes());
                    return;
                }
            }
        }
    }

    /// Brings something of each address space; false if nothing was missing.
    fn round(&self) -> Result<bool> {
        let spaces = self.spaces();
        loop {
            let Some(wanted) = lock(&self.wanted).pop_front() else { break };
            for space in spaces.iter().filter(|s| s.pid == wanted.pid) {
                let bytes = space.bring_range(&wanted.range)?;
                self.brought.fetch_add(bytes, Ordering::Relaxed);
            }
            if self.over.load(Ordering::Acquire) {
                return Ok(true);
            }
        }
        let mut found = false;
        for space in &spaces {
            let mut short: Option<Instant> = None;
            while let Some((bytes, brought)) = space.bring_next(CHUNK)? {
                found = true;
                match brought {
                    Brought::Done => {
                        self.brought.fetch_add(bytes, Ordering::Relaxed);
                        short = None;
                    }
                    Brought::NotNow(errno) => {
                        let since = short.get_or_insert_with(Instant::now);
                        if errno == Errno::NOMEM && since.elapsed() > PATIENCE {
                            return Err(Error::new(format!(
                                "{}: there is no memory for the {} bytes it still lacks",
                                space.name,
                                space.bytes()
                            )));
                        }
                        std::thread::sleep(SOON);
                    }
                }
                if self.over.load(Ordering::Acquire) {
                    return Ok(true);
                }
            }
        }
        Ok(found)
    }
}
