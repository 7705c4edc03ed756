//! The thread that serves those who wait to write.

use rewake_objects::memory::shield::Shield;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Serves until it is dropped. If it is gone, so are the userfaultfds, and nobody waits.
#[derive(Debug)]
pub struct Server {
    stop: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Starts serving.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(shields: Vec<Arc<Shield>>) -> io::Result<Server> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let seen = stop.clone();
        let thread = std::thread::Builder::new()
            .name("rewake-writes".to_owned())
            .spawn(move || serve(&shields, &seen))?;
        Ok(Server { stop, thread: Mutex::new(Some(thread)) })
    }

    /// Stops serving. Nobody must wait any more.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
            if thread.join().is_err() {
                log::warn!("the thread that serves writes died");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(shields: &[Arc<Shield>], stop: &OwnedFd) {
    // The processes wait for it, whatever else there is to be done.
    if let Err(e) = rewake_sys::sched::hurry() {
        log::debug!("writes may be served late: {e}");
    }
    let uffds: Vec<&Arc<Shield>> = shields.iter().filter(|s| s.uffd().is_some()).collect();
    let mut fds: Vec<PollFd<'_>> = uffds
        .iter()
        .filter_map(|shield| shield.uffd())
        .map(|uffd| PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN))
        .collect();
    fds.push(PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN));
    loop {
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("writes cannot be served: {e}");
                return;
            }
        }
        let Some((stop, fds)) = fds.split_last_mut() else { return };
        if !stop.revents().is_empty() {
            return;
        }
        for (fd, shield) in fds.iter().zip(&uffds) {
            if fd.revents().contains(PollFlags::IN) {
                shield.serve();
            }
        }
    }
}
