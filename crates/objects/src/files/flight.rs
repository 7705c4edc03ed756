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

const SCM_RIGHTS: u32 = libc::SCM_RIGHTS as u32;

fn is_epoll(fd: &OwnedFd) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new());
    link.is_ok_and(|link| link.as_bytes() == b"anon_inode:[eventpoll]")
}

impl Collector {
    /// Collects what is in flight in the queues of the tree's sockets, and in the queues of sockets that are in flight
    /// themselves. Call it once all tasks are surveyed. Returns what cannot be saved, with the process.
    pub fn descriptors_in_flight(&mut self) -> Vec<(i32, Problem)> {
        let mut problems = Vec::new();
        // What epoll instances watch may be in flight too: they come last.
        let mut epolls = Vec::new();
        let mut next = 0;
        loop {
            problems.extend(self.sockets.read_queues());
            if next == self.sockets.packets.len() {
                break;
            }
            // The list grows while sockets are found in it.
            while let Some(packet) = self.sockets.packets.get_mut(next) {
                let rights = std::mem::take(&mut packet.rights);
                if !rights.is_empty() {
                    let entry = ScmEntry { r#type: SCM_RIGHTS, rights: vec![0; rights.len()] };
                    packet.entry.scm = vec![entry];
                }
                for (place, fd) in rights.into_iter().enumerate() {
                    if is_epoll(&fd) {
                        epolls.push((next, place, fd));
                    } else {
                        problems.extend(self.put_right(next, place, fd));
                    }
                }
                next += 1;
            }
        }
        for (packet, place, fd) in epolls {
            problems.extend(self.put_right(packet, place, fd));
        }
        problems
    }

    /// Puts the file id of a descriptor into its place in the list of a message.
    fn put_right(&mut self, packet: usize, place: usize, fd: OwnedFd) -> Option<(i32, Problem)> {
        let pid = self.sockets.packets.get(packet)?.pid;
        let collected = self.in_flight(pid, fd);
        let packet = self.sockets.packets.get_mut(packet)?;
        match collected {
            Ok(id) => {
                *packet.entry.scm.first_mut()?.rights.get_mut(place)? = id;
                None
            }
            Err(mut problem) => {
                problem.object = format!("{}: {}", packet.object, problem.object);
                Some((pid, problem))
            }
        }
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
            tid: std::process::id() as i32,
            number,
            fd,
            link: link.into_bytes(),
            stat,
            flags,
            fdinfo: &fdinfo,
            numbers: &[],
            told: None,
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
