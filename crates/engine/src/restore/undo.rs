//! What a restore that fails takes back.

use super::Run;
use crate::error::{Error, Result};
use rewake_objects::pids::Pids;
use rewake_sys::signal;
use rewake_sys::wait;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The processes created so far: killed when this is dropped, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct Created {
    pub(super) pids: Vec<i32>,
    /// The first process of each tree.
    pub(super) roots: Vec<i32>,
    pub(super) sibling: bool,
}

impl Created {
    /// Notes a process of the tree. Of a PID namespace only the first counts: the others die with it.
    pub(super) fn note(&mut self, pid: Option<i32>, pids: &Pids) {
        if matches!(pids, Pids::Same) {
            self.pids.extend(pid);
        }
    }

    pub(super) fn keep(mut self) {
        self.pids.clear();
        self.roots.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if self.roots.is_empty() && self.pids.is_empty() {
            return;
        }
        // The roots first: what they have not told us of dies with them.
        for pid in self.roots.iter().chain(&self.pids) {
            let _ = signal::kill(*pid, libc::SIGKILL);
        }
        // Orphans come to us, for we are a subreaper meanwhile.
        let give_up = Instant::now() + Duration::from_secs(10);
        while Instant::now() < give_up {
            match wait::try_wait_any() {
                Ok(Some(_)) => {}
                Ok(None) => std::thread::sleep(Duration::from_micros(200)),
                Err(_) => break,
            }
        }
        if self.sibling {
            log::debug!("the roots {:?} were siblings and are reaped by our parent", self.roots);
        }
    }
}

/// A pidfile, removed again when this is dropped, unless it is kept.
#[derive(Debug, Default)]
pub(super) struct PidFile(pub(super) Option<PathBuf>);

impl PidFile {
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("pidfile {} stays behind: {e}", path.display());
        }
    }
}

/// Makes us a subreaper for as long as it lives.
pub(super) struct Subreaper(bool);

impl Subreaper {
    pub(super) fn become_one() -> Subreaper {
        let was = rustix::process::child_subreaper().is_ok_and(|p| p.is_some());
        let _ = rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1));
        Subreaper(was)
    }
}

impl Drop for Subreaper {
    fn drop(&mut self) {
        if !self.0 {
            let _ = rustix::process::set_child_subreaper(None);
        }
    }
}

impl Run<'_> {
    pub(super) fn write_pidfile(&self, text: &str) -> Result<PidFile> {
        let Some(path) = &self.options.pidfile else { return Ok(PidFile::default()) };
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| {
                let written = PidFile(Some(path.clone()));
                file.write_all(text.as_bytes()).map(|()| written)
            })
            .map_err(|e| Error::new(format!("pidfile {}: {e}", path.display())))
    }
}
