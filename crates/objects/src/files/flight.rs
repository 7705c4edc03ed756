//! Descriptors in flight: sent over a unix socket (`SCM_RIGHTS`) and not received yet.
//!
//! A look at the message gave us descriptors of our own for them ([`crate::sockets`]), so each is collected like any other:
//! kcmp(2) tells whether a process of the tree has the same description, and if not, its kind is surveyed. A socket in
//! flight may have others in its queue, or itself.

use super::collect::{Collector, View};
use crate::Problem;
use rewake_image::messages::ScmEntry;
use rewake_sys::file;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};

impl Collector {
    /// Collects what is in flight in the queues of the tree's sockets, and in the queues of sockets that are in flight
    /// themselves. Call it once all tasks are surveyed. Returns what cannot be saved, with the process.
    pub fn descriptors_in_flight(&mut self) -> Vec<(i32, Problem)> {
        let mut problems = Vec::new();
        let mut next = 0;
        // The list grows while sockets are found in it.
        while next < self.sockets.packets.len() {
            let packet = &mut self.sockets.packets[next];
            let rights = std::mem::take(&mut packet.rights);
            let (pid, object) = (packet.pid, packet.object.clone());
            let mut ids = Vec::with_capacity(rights.len());
            for fd in rights {
                match self.in_flight(pid, fd) {
                    Ok(id) => ids.push(id),
                    Err(mut problem) => {
                        problem.object = format!("{object}: {}", problem.object);
                        problems.push((pid, problem));
                    }
                }
            }
            if !ids.is_empty() {
                let scm = ScmEntry { r#type: libc::SCM_RIGHTS as u32, rights: ids };
                self.sockets.packets[next].entry.scm = vec![scm];
            }
            next += 1;
        }
        problems
    }

    /// Collects one descriptor that is in flight in a socket of process `carrier`.
    fn in_flight(&mut self, carrier: i32, fd: OwnedFd) -> Result<u32, Problem> {
        let number = fd.as_raw_fd();
        let failed = |e: &dyn std::fmt::Display| {
            Problem::new("a descriptor in flight", format!("cannot be examined: {e}"))
        };
        let link = rustix::fs::readlink(format!("/proc/self/fd/{number}"), Vec::new())
            .map_err(|e| failed(&e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| failed(&e))?;
        let flags = file::flags(fd.as_fd()).map_err(|e| failed(&e))?;
        let fdinfo =
            || std::fs::read(format!("/proc/self/fdinfo/{number}")).map_err(|e| failed(&e));
        let view = View {
            pid: std::process::id() as i32,
            number,
            fd,
            link: link.into_bytes(),
            stat,
            flags,
            fdinfo: &fdinfo,
            numbers: &[],
        };
        let known = self.entries.len();
        self.carrier = Some(carrier);
        let collected = self.descriptor(&view);
        self.carrier = None;
        if self.entries.len() != known {
            // Later ones are compared with it.
            self.in_flight.push(view.fd);
        }
        collected.map(|(id, _)| id)
    }
}
