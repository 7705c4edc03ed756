//! Kernel state: contexts of asynchronous I/O (io_setup): one that has gone round its ring, with events that wait to be
//! taken; one whose events wrap around the end; one never used. With ZOO_FORKED a child has the ring of its parent, and no
//! context (a dump must be refused).
#![allow(unsafe_code, reason = "asynchronous I/O has no library functions here")]

use std::os::fd::AsRawFd;
use zoo::{Check, ensure, ensure_eq, errno};

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

struct Context(usize);

impl Context {
    fn new(requests: usize) -> Result<Context, String> {
        let mut id = 0usize;
        // SAFETY: a word for the id.
        let ret = unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut id) };
        ensure_eq!(ret, 0, "io_setup");
        Ok(Context(id))
    }

    /// Makes a request (0 reads, 1 writes) at a place of a file.
    fn submit(&self, write: bool, fd: i32, buffer: &mut [u8], at: u64, data: u64) -> Check {
        let request: [u64; 8] = [
            data,
            0,
            u64::from(write) | (fd as u64) << 32,
            buffer.as_mut_ptr() as u64,
            buffer.len() as u64,
            at,
            0,
            0,
        ];
        let list = [request.as_ptr()];
        // SAFETY: a list of one request whose buffer outlives it: these end at once.
        let ret = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) };
        ensure!(ret == 1, "io_submit: {ret}, errno {}", errno());
        Ok(())
    }

    fn take(&self, least: usize, most: usize) -> Result<Vec<Event>, String> {
        let mut events = vec![Event::default(); most];
        let none: *const libc::timespec = std::ptr::null();
        // SAFETY: room for so many events.
        let ret = unsafe {
            libc::syscall(libc::SYS_io_getevents, self.0, least, most, events.as_mut_ptr(), none)
        };
        ensure!(ret >= 0, "io_getevents: errno {}", errno());
        events.truncate(ret as usize);
        Ok(events)
    }

    /// A word of the ring's head: number, room, head, tail, magic…
    fn word(&self, at: usize) -> u32 {
        // SAFETY: the ring's head is mapped.
        unsafe { (self.0 as *const u32).add(at).read_volatile() }
    }

    /// Writes and takes so many times.
    fn turn(&self, fd: i32, times: u64) -> Check {
        for n in 0..times {
            self.submit(true, fd, &mut n.to_ne_bytes(), 8 * n, n)?;
            ensure_eq!(self.take(1, 1)?[0].data, n, "a turn");
        }
        Ok(())
    }

    /// Writes without taking.
    fn leave(&self, fd: i32, first: u64, count: u64) -> Check {
        for n in first..first + count {
            self.submit(true, fd, &mut n.to_ne_bytes(), 8 * n, n)?;
        }
        Ok(())
    }

    fn expect(&self, first: u64, count: u64) -> Check {
        let events = self.take(count as usize, count as usize + 10)?;
        let told: Vec<(u64, i64)> = events.iter().map(|e| (e.data, e.result)).collect();
        let wanted: Vec<(u64, i64)> = (first..first + count).map(|n| (n, 8)).collect();
        ensure_eq!(told, wanted, "events that waited");
        Ok(())
    }

    fn destroy(self) -> Check {
        // SAFETY: an integer.
        ensure_eq!(unsafe { libc::syscall(libc::SYS_io_destroy, self.0) }, 0, "io_destroy");
        Ok(())
    }
}

fn main() {
    zoo::run(|z| {
        let path = z.dir().join("data");
        let mut options = std::fs::File::options();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let fd = file.as_raw_fd();
        // One that is gone again: numbers of contexts have gaps.
        let gone = Context::new(1)?;
        let round = Context::new(1)?;
        let wrapped = Context::new(200)?;
        let unused = Context::new(5000)?;
        gone.destroy()?;
        let room = u64::from(round.word(1));
        round.turn(fd, room + 20)?;
        round.leave(fd, 1000, 5)?;
        let room = u64::from(wrapped.word(1));
        wrapped.turn(fd, room - 3)?;
        wrapped.leave(fd, 2000, 10)?;
        let heads = |c: &Context| [c.word(1), c.word(2), c.word(3), c.word(4)];
        let before = [&round, &wrapped, &unused].map(heads);
        let child = std::env::var_os("ZOO_FORKED").map(|_| {
            z.fork(|_| {
                loop {
                    zoo::nap(1000);
                }
            })
        });
        let child = child.transpose()?;
        z.ready()?;
        z.wait_for_check();
        if let Some(child) = child {
            // SAFETY: a signal to a child of our own.
            unsafe { libc::kill(child, libc::SIGKILL) };
            zoo::wait4(child, 0)?;
        }
        ensure_eq!([&round, &wrapped, &unused].map(heads), before, "heads of the rings");
        round.expect(1000, 5)?;
        wrapped.expect(2000, 10)?;
        ensure_eq!(unused.take(0, 10)?, [], "events of an unused context");
        for context in [&round, &wrapped, &unused] {
            context.turn(fd, 300)?;
            let mut got = [0; 8];
            context.submit(false, fd, &mut got, 8 * 1004, 7)?;
            ensure_eq!(context.take(1, 1)?.len(), 1, "events");
            ensure_eq!(u64::from_ne_bytes(got), 1004, "what was read");
        }
        // As many at once as before, and no more than there is room for.
        wrapped.leave(fd, 0, 200)?;
        wrapped.expect(0, 200)?;
        [round, wrapped, unused].into_iter().try_for_each(Context::destroy)
    })
}
