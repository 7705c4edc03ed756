//! ptrace stops as types: what can be done with a thread depends on whether it is stopped.

use crate::{Error, Result};
use rewake_sys::ptrace;
use rewake_sys::wait::{self, Status, Stop};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// Keeps what has it in the thread it was made in: ptrace(2) knows no other.
type Here = PhantomData<*const ()>;

/// A traced thread that may be running.
#[derive(Debug)]
pub struct Running {
    tid: i32,
    here: Here,
}

/// A traced thread in a ptrace stop. Only its tracer thread may use it.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    /// The group stop (SIGSTOP and friends) it was found in, if any.
    group_stop: Option<i32>,
    here: Here,
}

/// Waits for a change of state: looks again at once a few times (a stop takes some 15 µs), then sleeps in between.
fn wait_status(tid: i32, deadline: Option<Instant>) -> Result<Status> {
    let failed = Error::syscall("waiting for a thread to stop");
    let Some(deadline) = deadline else { return wait::wait_soon(tid).map_err(failed) };
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
        Ok(Running { tid, here: PhantomData })
    }

    /// Takes a traced thread that was just continued.
    #[must_use]
    pub fn known(tid: i32) -> Running {
        Running { tid, here: PhantomData }
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
                    return Ok(Stopped { tid: self.tid, group_stop: None, here: PhantomData });
                }
                Status::Stop(Stop::Group(signal)) => {
                    return Ok(Stopped {
                        tid: self.tid,
                        group_stop: Some(signal),
                        here: PhantomData,
                    });
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

    /// Waits until it has come to a system call boundary, after [`Stopped::resume_to_syscall`].
    ///
    /// # Errors
    /// As [`Stopped::to_syscall_stop`].
    pub fn wait_syscall_stop(self) -> Result<Stopped> {
        let tid = self.tid;
        // A member of a stopped group stops for its group once more on the way.
        for _ in 0..3 {
            match wait::wait_soon(tid).map_err(Error::syscall("waiting for a system call"))? {
                Status::Stop(Stop::Syscall) => return Ok(Stopped::assume(tid)),
                Status::Stop(Stop::Group(_) | Stop::Event) => {
                    ptrace::cont_syscall(tid).map_err(Error::syscall("continuing a thread"))?;
                }
                Status::Exited(code) => {
                    return Err(Error::Gone { tid, how: format!("exit code {code}") });
                }
                Status::Killed(signal) => {
                    return Err(Error::Gone { tid, how: format!("signal {signal}") });
                }
                Status::Stop(Stop::Signal(signal)) => return Err(Error::Signal { tid, signal }),
                other => return Err(Error::Unexpected { tid, stop: format!("{other:?}") }),
            }
        }
        Err(Error::Unexpected { tid, stop: "it stops for its group again and again".into() })
    }
}

/// Waits until all of `pending` stand in a `PTRACE_EVENT_STOP`, in whatever order they do, and calls `done` for each
/// at once: what a stop does to a system call is to be mended before anything happens to us. If something fails, the
/// others are waited for and done with all the same, since they stop too. Now and then `has_ended` is asked of
/// those that do not stop (of a first thread that ends while others go on the kernel says nothing), and `hopeless` whether one that
/// is slow never will.
///
/// # Errors
/// [`Error::Stuck`], or the first that `done` returned.
pub fn wait_all(
    pending: Vec<Running>,
    mut deadline: Option<Instant>,
    mut done: impl FnMut(Result<Stopped>) -> Result<()>,
    mut has_ended: impl FnMut(i32) -> bool,
    mut hopeless: impl FnMut(i32) -> bool,
) -> Result<()> {
    /// How many looks in vain come before we sleep in between.
    const BUSY: u32 = 1000;
    /// How long it takes until a thread is slow.
    const SLOW: Duration = Duration::from_millis(500);
    /// How long the others are waited for after a failure.
    const AFTER_FAILURE: Duration = Duration::from_secs(1);
    let mut pending: Vec<i32> = pending.iter().map(Running::tid).collect();
    let mut idle = 0u32;
    let mut quiet = Instant::now();
    let mut failed = None;
    while !pending.is_empty() {
        let before = pending.len();
        let had_failed = failed.is_some();
        pending.retain(|tid| {
            let result = match look(*tid) {
                Ok(Some(outcome)) => done(outcome),
                Ok(None) => return true,
                // Once more, so that it is not left with what the stop did to it.
                Err(e) if failed.is_none() => {
                    failed = Some(e);
                    return true;
                }
                Err(_) => return false,
            };
            if let Err(e) = result {
                failed.get_or_insert(e);
            }
            false
        });
        if failed.is_some() && !had_failed {
            let soon = Instant::now() + AFTER_FAILURE;
            deadline = Some(deadline.map_or(soon, |d| d.min(soon)));
        }
        if pending.len() < before {
            (idle, quiet) = (0, Instant::now());
        } else {
            idle += 1;
        }
        match (idle, pending.first()) {
            (1.., Some(&tid)) if deadline.is_some_and(|d| Instant::now() >= d) => {
                // There may be more to be said of it.
                let _ = failed.is_none() && hopeless(tid);
                return Err(failed.unwrap_or(Error::Stuck { tid }));
            }
            (BUSY.., Some(&tid)) if quiet.elapsed() >= SLOW => {
                (idle, quiet) = (BUSY - 1, Instant::now());
                if hopeless(tid) {
                    pending.retain(|other| *other != tid);
                    failed.get_or_insert(Error::Stuck { tid });
                }
            }
            (BUSY, _) => {
                let ended = pending.extract_if(.., |tid| has_ended(*tid));
                for tid in ended {
                    let how = "it has ended before the other threads".into();
                    if let Err(e) = done(Err(Error::Gone { tid, how })) {
                        failed.get_or_insert(e);
                    }
                }
            }
            (1..BUSY, _) => std::thread::yield_now(),
            (BUSY.., _) => std::thread::sleep(Duration::from_micros(200)),
            _ => {}
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Has `tid` come to an event stop, or ended? What it meets on the way is passed on to it.
fn look(tid: i32) -> Result<Option<Result<Stopped>>> {
    let stopped = |group_stop| Stopped { tid, group_stop, here: PhantomData };
    let failed = Error::syscall("waiting for threads to stop");
    Ok(Some(match wait::try_wait(tid).map_err(failed)? {
        None | Some(Status::Continued) => return Ok(None),
        Some(Status::Stop(Stop::Event)) => Ok(stopped(None)),
        Some(Status::Stop(Stop::Group(signal))) => Ok(stopped(Some(signal))),
        Some(Status::Stop(Stop::Signal(signal))) => {
            ptrace::cont(tid, signal).map_err(Error::syscall("delivering a signal"))?;
            return Ok(None);
        }
        Some(Status::Stop(Stop::Syscall | Stop::Other(_))) => {
            ptrace::cont(tid, 0).map_err(Error::syscall("continuing a thread"))?;
            return Ok(None);
        }
        Some(Status::Exited(code)) => Err(Error::Gone { tid, how: format!("exit code {code}") }),
        Some(Status::Killed(signal)) => Err(Error::Gone { tid, how: format!("signal {signal}") }),
    }))
}

impl Stopped {
    /// Takes a thread that is known to stand in a stop.
    #[must_use]
    pub fn assume(tid: i32) -> Stopped {
        Stopped { tid, group_stop: None, here: PhantomData }
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
        Ok(Running { tid: self.tid, here: PhantomData })
    }

    /// Lets it run to the next system call boundary.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Signal`] or [`Error::Unexpected`] with the stop that came instead (the thread is left in
    /// it).
    pub fn to_syscall_stop(self) -> Result<Stopped> {
        let group_stop = self.group_stop;
        let mut stopped = self.resume_to_syscall()?.wait_syscall_stop()?;
        stopped.group_stop = group_stop;
        Ok(stopped)
    }

    /// Lets it run; [`Running::wait_syscall_stop`] says when it has come to a system call boundary.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn resume_to_syscall(self) -> Result<Running> {
        ptrace::cont_syscall(self.tid).map_err(Error::syscall("continuing a thread"))?;
        Ok(Running { tid: self.tid, here: PhantomData })
    }

    /// Lets it run only as far as to an event stop; [`Running::wait_stop`] says when it is there.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn resume_to_event(self) -> Result<Running> {
        ptrace::interrupt(self.tid).map_err(Error::syscall("stopping a thread"))?;
        self.resume()
    }

    /// From any stop to a `PTRACE_EVENT_STOP` without an instruction of user code in between.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn to_event_stop(self) -> Result<Stopped> {
        let group_stop = self.group_stop;
        let mut stopped = self.resume_to_event()?.wait_stop()?;
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
