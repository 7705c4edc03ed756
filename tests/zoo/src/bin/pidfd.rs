//! Kernel state: pidfds of a living child, of the process itself, and of a child that is dead and waited for. With
//! ZOO_OF_THREADS also of threads (`PIDFD_THREAD`): of another thread, of its own first one, of the child's, of a dead one.
#![allow(unsafe_code, reason = "pidfds through raw system calls")]

use zoo::{check, ensure, ensure_eq, errno};

fn open(pid: i32) -> Result<i32, String> {
    open_with(pid, 0)
}

fn open_with(pid: i32, flags: i32) -> Result<i32, String> {
    // SAFETY: integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) } as i32;
    check(fd, "pidfd_open")?;
    Ok(fd)
}

/// Flags of a description that tell of a thread.
fn is_of_thread(fd: i32) -> bool {
    // SAFETY: integers.
    unsafe { libc::fcntl(fd, libc::F_GETFL) & libc::O_EXCL != 0 }
}

/// A thread that tells its number, and ends when told to.
struct Thread {
    tid: i32,
    end: std::sync::mpsc::Sender<()>,
    handle: std::thread::JoinHandle<()>,
}

impl Thread {
    fn new() -> Result<Thread, String> {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let handle = std::thread::spawn(move || {
            let _ = tell.send(zoo::tid());
            let _ = ended.recv();
        });
        Ok(Thread { tid: told.recv().map_err(|e| e.to_string())?, end, handle })
    }

    fn end(self) {
        drop(self.end);
        let _ = self.handle.join();
    }
}

/// Pidfds of threads.
struct OfThreads {
    dead: i32,
    other: (Thread, i32),
    own: i32,
    childs: i32,
}

impl OfThreads {
    fn new(child: i32) -> Result<OfThreads, String> {
        let short = Thread::new()?;
        let dead = open_with(short.tid, libc::O_EXCL)?;
        short.end();
        let other = Thread::new()?;
        let fd = open_with(other.tid, libc::O_EXCL)?;
        let own = open_with(zoo::pid(), libc::O_EXCL)?;
        Ok(OfThreads { dead, other: (other, fd), own, childs: open_with(child, libc::O_EXCL)? })
    }

    fn check(self) -> zoo::Check {
        let (thread, other) = self.other;
        for fd in [self.dead, other, self.own, self.childs] {
            ensure!(is_of_thread(fd), "descriptor {fd} is not of a thread any more");
        }
        ensure_eq!(send(self.dead, 0), libc::ESRCH, "a signal to the dead thread");
        for fd in [other, self.own, self.childs] {
            ensure_eq!(send(fd, 0), 0, "a signal to a living thread");
            ensure!(!ended(fd), "a living thread has ended");
        }
        thread.end();
        for _ in 0..1000 {
            if ended(other) {
                break;
            }
            zoo::nap(1);
        }
        ensure!(ended(other), "the end of a thread is not told");
        Ok(())
    }
}

fn send(fd: i32, signal: i32) -> i32 {
    // SAFETY: integers and a null pointer.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, 0usize, 0) };
    if ret < 0 { errno() } else { 0 }
}

/// Has the process of `fd` ended?
fn ended(fd: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

fn main() {
    zoo::run(|z| {
        let dead = z.fork(|_| Ok(()))?;
        let of_dead = open(dead)?;
        ensure_eq!(zoo::wait4(dead, 0)?, 0, "status of the first child");
        let living = z.fork(|_| {
            loop {
                zoo::nap(1000);
            }
        })?;
        let of_living = open(living)?;
        let of_self = open(zoo::pid())?;
        let threads = match z.param("ZOO_OF_THREADS", 0) {
            0 => None,
            _ => Some(OfThreads::new(living)?),
        };
        z.ready()?;
        z.wait_for_check();
        if let Some(threads) = threads {
            threads.check()?;
        }
        ensure_eq!(send(of_dead, 0), libc::ESRCH, "a signal to the dead child");
        ensure_eq!(send(of_self, 0), 0, "a signal to itself");
        ensure!(!ended(of_living), "the living child has ended");
        ensure_eq!(send(of_living, libc::SIGTERM), 0, "a signal to the living child");
        ensure_eq!(zoo::wait4(living, 0)?, libc::SIGTERM, "status of the living child");
        ensure!(ended(of_living) || send(of_living, 0) == libc::ESRCH, "its pidfd does not tell");
        Ok(())
    })
}
