//! ptrace stops as types: what can be done with a thread depends on whether it is stopped.

use crate::{Error, Result};
use rewake_sys::ptrace;
use rewake_sys::wait::{self, Status, Stop};
use std::time::{Duration, Instant};

/// A traced thread that may be running.
#[derive(Debug)]
pub struct Running {
    tid: i32,
}

/// A traced thread in a ptrace stop. Only its tracer thread may use it.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    /// The group stop (SIGSTOP and friends) it was found in, if any.
    group_stop: Option<i32>,
}

/// Waits for a change of state: looks again at once a few times (a stop takes some 15 µs), then sleeps in between.
fn wait_status(tid: i32, deadline: Option<Instant>) -> Result<Status> {
    let failed = Error::syscall("waiting for a thread to stop");
    let Some(deadline) = deadline else { return wait::wait(tid).map_err(failed) };
    let mut looks = 0u32;
    loop {
        match wait::try_wait(tid) {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() >= deadline => return Err(Error::Stuck { tid }),
            Ok(None) if looks < 200 => std::thread::yield_now(),
            Ok(None) => std::thread::sleep(Duration::from_micros(200)),
            Err(e) => return Err(failed(e)),
        }
        looks += 1;
    }
}

impl Running {
    /// Seizes `tid` without stopping it.
    ///
    /// # Errors
    /// The failed `PTRACE_SEIZE`.
    pub fn seize(tid: i32, options: u32) -> std::result::Result<Running, rewake_sys::SyscallError> {
        ptrace::seize(tid, options)?;
        Ok(Running { tid })
    }

    /// Takes a traced thread that was just continued.
    #[must_use]
    pub fn known(tid: i32) -> Running {
        Running { tid }
    }

    /// Thread id.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Asks the thread to stop; [`Running::wait_stop`] says when it has.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn interrupt(&self) -> Result<()> {
        ptrace::interrupt(self.tid).map_err(Error::syscall("stopping a thread"))
    }

    /// Waits until the thread stands in a `PTRACE_EVENT_STOP` (after [`Running::interrupt`]). Signals that arrive
    /// first are delivered, so that what is then seen is a state in which nothing is half done.
    ///
    /// # Errors
    /// [`Error::Gone`] if it ended instead.
    pub fn wait_stop(self) -> Result<Stopped> {
        self.wait_stop_until(None)
    }

    /// As [`Running::wait_stop`], but gives up at `deadline`: a thread in uninterruptible sleep does not stop.
    ///
    /// # Errors
    /// [`Error::Stuck`] besides.
    pub fn wait_stop_until(self, deadline: Option<Instant>) -> Result<Stopped> {
        self.wait_event(deadline, |signal| signal)
    }

    /// As [`Running::wait_stop`], but signals that arrive first are not delivered: they are given to `note`.
    ///
    /// # Errors
    /// As [`Running::wait_stop`].
    pub fn wait_stop_noting(&self, mut note: impl FnMut(i32)) -> Result<Stopped> {
        self.wait_event(None, |signal| {
            note(signal);
            0
        })
    }

    /// Waits for an event stop; `deliver` says which signal is delivered instead of one that arrived.
    fn wait_event(
        &self,
        deadline: Option<Instant>,
        mut deliver: impl FnMut(i32) -> i32,
    ) -> Result<Stopped> {
        loop {
            match wait_status(self.tid, deadline)? {
                Status::Stop(Stop::Event) => {
                    return Ok(Stopped { tid: self.tid, group_stop: None });
                }
                Status::Stop(Stop::Group(signal)) => {
                    return Ok(Stopped { tid: self.tid, group_stop: Some(signal) });
                }
                Status::Stop(Stop::Signal(signal)) => {
                    ptrace::cont(self.tid, deliver(signal))
                        .map_err(Error::syscall("delivering a signal"))?;
                }
                Status::Stop(Stop::Syscall | Stop::Other(_)) => {
                    ptrace::cont(self.tid, 0).map_err(Error::syscall("continuing a thread"))?;
                }
                Status::Exited(code) => {
                    return Err(Error::Gone { tid: self.tid, how: format!("exit code {code}") });
                }
                Status::Killed(signal) => {
                    return Err(Error::Gone { tid: self.tid, how: format!("signal {signal}") });
                }
                Status::Continued => {}
            }
        }
    }
}

/// Waits until all of `pending` stand in a `PTRACE_EVENT_STOP`, in whatever order they do, and calls `done` for each
/// at once.
///
/// # Errors
/// [`Error::Stuck`], or whatever `done` returns.
pub fn wait_all(
    pending: Vec<Running>,
    deadline: Option<Instant>,
    mut done: impl FnMut(Result<Stopped>) -> Result<()>,
) -> Result<()> {
    if let [_] = pending.as_slice() {
        for running in pending {
            done(running.wait_stop_until(deadline))?;
        }
        return Ok(());
    }
    let mut waiting: std::collections::HashSet<i32> = pending.iter().map(Running::tid).collect();
    let mut looks = 0u32;
    while let Some(&any) = waiting.iter().next() {
        let failed = Error::syscall("waiting for threads to stop");
        let Some((tid, status)) = wait::try_wait_any().map_err(failed)? else {
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return Err(Error::Stuck { tid: any });
            }
            if looks < 1000 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
            looks += 1;
            continue;
        };
        looks = 0;
        if !waiting.contains(&tid) {
            continue;
        }
        let outcome = match status {
            Status::Stop(Stop::Event) => Ok(Stopped { tid, group_stop: None }),
            Status::Stop(Stop::Group(signal)) => Ok(Stopped { tid, group_stop: Some(signal) }),
            Status::Stop(Stop::Signal(signal)) => {
                ptrace::cont(tid, signal).map_err(Error::syscall("delivering a signal"))?;
                continue;
            }
            Status::Stop(Stop::Syscall | Stop::Other(_)) => {
                ptrace::cont(tid, 0).map_err(Error::syscall("continuing a thread"))?;
                continue;
            }
            Status::Continued => continue,
            Status::Exited(code) => Err(Error::Gone { tid, how: format!("exit code {code}") }),
            Status::Killed(signal) => Err(Error::Gone { tid, how: format!("signal {signal}") }),
        };
        waiting.remove(&tid);
        done(outcome)?;
    }
    Ok(())
}

impl Stopped {
    /// Takes a thread that is known to stand in a stop.
    #[must_use]
    pub fn assume(tid: i32) -> Stopped {
        Stopped { tid, group_stop: None }
    }

    /// Thread id.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The group stop it was found in.
    #[must_use]
    pub fn group_stop(&self) -> Option<i32> {
        self.group_stop
    }

    /// Notes the group stop the thread belongs to.
    pub fn set_group_stop(&mut self, signal: Option<i32>) {
        self.group_stop = signal;
    }

    /// General registers.
    ///
    /// # Errors
    /// The thread is gone, or a 32-bit one.
    pub fn registers(&self) -> Result<ptrace::Registers> {
        ptrace::registers(self.tid).map_err(Error::syscall("reading registers"))
    }

    /// Sets general registers.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn set_registers(&self, regs: &ptrace::Registers) -> Result<()> {
        ptrace::set_registers(self.tid, regs).map_err(Error::syscall("writing registers"))
    }

    /// Lets it run.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn resume(self) -> Result<Running> {
        ptrace::cont(self.tid, 0).map_err(Error::syscall("continuing a thread"))?;
        Ok(Running { tid: self.tid })
    }

    /// Lets it run to the next system call boundary.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Signal`] or [`Error::Unexpected`] with the stop that came instead (the thread is left in
    /// it).
    pub fn to_syscall_stop(self) -> Result<Stopped> {
        let again = Error::syscall("continuing a thread");
        ptrace::cont_syscall(self.tid).map_err(again)?;
        let group_stop = self.group_stop;
        // A member of a stopped group stops for its group once more on the way.
        for _ in 0..3 {
            match wait::wait(self.tid).map_err(Error::syscall("waiting for a system call"))? {
                Status::Stop(Stop::Syscall) => return Ok(Stopped { tid: self.tid, group_stop }),
                Status::Stop(Stop::Group(_) | Stop::Event) => {
                    ptrace::cont_syscall(self.tid)
                        .map_err(Error::syscall("continuing a thread"))?;
                }
                Status::Exited(code) => {
                    return Err(Error::Gone { tid: self.tid, how: format!("exit code {code}") });
                }
                Status::Killed(signal) => {
                    return Err(Error::Gone { tid: self.tid, how: format!("signal {signal}") });
                }
                Status::Stop(Stop::Signal(signal)) => {
                    return Err(Error::Signal { tid: self.tid, signal });
                }
                other => {
                    return Err(Error::Unexpected { tid: self.tid, stop: format!("{other:?}") });
                }
            }
        }
        Err(Error::Unexpected {
            tid: self.tid,
            stop: "it stops for its group again and again".into(),
        })
    }

    /// From any stop to a `PTRACE_EVENT_STOP` without an instruction of user code in between.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn to_event_stop(self) -> Result<Stopped> {
        ptrace::interrupt(self.tid).map_err(Error::syscall("stopping a thread"))?;
        let group_stop = self.group_stop;
        let mut stopped = self.resume()?.wait_stop()?;
        stopped.group_stop = group_stop;
        Ok(stopped)
    }

    /// Ends tracing; the thread runs on (after `signal`, if not 0).
    ///
    /// # Errors
    /// The thread is gone.
    pub fn detach(self, signal: i32) -> Result<()> {
        ptrace::detach(self.tid, signal).map_err(Error::syscall("detaching from a thread"))
    }
}
