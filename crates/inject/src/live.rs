//! An agent in a live process, for a dump.
//!
//! The way in ([`crate::enter`]) is one register write: the bootstrap, written beforehand into unused bytes at the end of
//! the vdso (or of another executable mapping), makes a memfd and a socket pair, and enters the executor. Whatever happens to the controller, each step falls through to a way back that the bootstrap walks alone, so the process is
//! never more than its own instructions away from where it was. The process's memory and stack are not touched.
//!
//! Where its table of descriptors is full, the agent does without any: it waits by telling ([`crate::tell`]), which stops it
//! as long as there is a tracer, and its ring is memory of the process, copied to and fro.

use crate::enter::{Entering, Entry, Room, Target, give_up};
use crate::interrupted::mend_interrupted;
use crate::map::{PAGE, SharedMap};
use crate::ring::{Results, Ring, Script};
use crate::tell::{self, Owed};
use crate::tracee::{Running, Stopped};
use crate::{Error, Result};
use rewake_agent::arch::{Bootstrap, VISITORS, VisitorResult};
use rewake_agent::layout::{Op, offset};
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::wait::{self, Status, Stop};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// Operations that fit a batch of a live agent.
pub const OPS: usize = 256;
/// Bytes of data that fit.
pub const DATA: usize = 32 * 1024;
/// Where in the mapping the agent's undo operation lies: past the ring.
pub(crate) const UNDO_AT: usize = PAGE + Ring::size_for(OPS, DATA);
/// Where the results of thread visits lie, past that.
pub(crate) const VISIT_RESULTS_AT: usize = UNDO_AT + size_of::<Op>();
/// Their length.
pub(crate) const VISIT_RESULTS: usize = VISITORS * size_of::<VisitorResult>();
/// An agent that does not answer a batch of cheap calls for this long never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// How an agent is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through a socket and shared memory.
    Socket,
    /// It stops when it is done, and its memory is shared.
    Stops,
    /// It stops when it is done; its memory is its own.
    Copied,
}

/// Copies the controller's side of a ring into the process, whose header is at `header`.
pub(crate) fn push(map: &SharedMap, memory: &File, header: u64) -> Result<()> {
    let mut bytes = vec![0; map.len()];
    map.read(0, &mut bytes);
    memory.write_all_at(&bytes, header - PAGE as u64).map_err(copying("writing the ring"))
}

fn pull(map: &SharedMap, memory: &File, header: u64) -> Result<()> {
    let mut bytes = vec![0; map.len()];
    memory.read_exact_at(&mut bytes, header - PAGE as u64).map_err(copying("reading the ring"))?;
    map.write(0, &bytes);
    Ok(())
}

fn copying(doing: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |e| Error::Syscall {
        doing,
        source: rewake_sys::SyscallError::new(
            "/proc/PID/mem",
            rewake_sys::Errno::from_io_error(&e).unwrap_or(rewake_sys::Errno::IO),
        ),
    }
}

/// An agent that waits for batches inside a live process.
#[derive(Debug)]
pub struct Live {
    pub(crate) pid: i32,
    pub(crate) agent: Running,
    pub(crate) original: Registers,
    pub(crate) mask: u64,
    pub(crate) boot: Bootstrap,
    pub(crate) room: Room,
    pub(crate) memory: Arc<File>,
    pub(crate) ring: Ring,
    pub(crate) map: Arc<SharedMap>,
    /// By which foreign code tells; 0 if the process has none to spare.
    pub(crate) signal: i32,
    /// What came while the agent was in, to be given back when it is out.
    pub(crate) owed: RefCell<Owed>,
    /// A thread was left in the padding, on its way back alone: its code must stay.
    pub(crate) abandoned: Cell<bool>,
    pub(crate) way: Way,
}

impl Live {
    /// Puts an agent into the process of `leader`, which stands in a ptrace stop, and runs the script that `first`
    /// builds for the given data address as its first batch.
    ///
    /// # Errors
    /// Why it could not be done; the thread is then detached and on its way back to where it was.
    pub fn inject(
        leader: Stopped,
        target: Target<'_>,
        first: impl FnOnce(u64) -> Script,
    ) -> Result<(Live, Results)> {
        let mapping = Entering::begin(leader, target)?.map()?;
        let (live, script, number) = mapping.run(first)?;
        live.finish_first(&script, number)
    }

    /// As [`Live::inject`], for several processes: while one does what a step asks of it, the others are looked after.
    #[must_use]
    pub fn inject_all<F>(entries: Vec<Entry<'_, F>>) -> Vec<Result<(Live, Results)>>
    where
        F: FnOnce(u64) -> Script,
    {
        // Each step of all before the next step of any.
        let begun: Vec<_> = entries
            .into_iter()
            .map(|Entry { leader, target, first }| (Entering::begin(leader, target), first))
            .collect();
        let mapping: Vec<_> = begun
            .into_iter()
            .map(|(entering, first)| (entering.and_then(Entering::map), first))
            .collect();
        let running: Vec<_> = mapping
            .into_iter()
            .map(|(mapping, first)| mapping.and_then(|mapping| mapping.run(first)))
            .collect();
        running
            .into_iter()
            .map(|run| run.and_then(|(live, script, number)| live.finish_first(&script, number)))
            .collect()
    }

    fn finish_first(self, script: &Script, number: u32) -> Result<(Live, Results)> {
        match self.finish(script, number) {
            Ok(results) => Ok((self, results)),
            Err(e) => {
                give_up(self.pid);
                self.owed.take().pay(self.pid);
                Err(e)
            }
        }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Address at which the data of this agent's scripts lie.
    #[must_use]
    pub fn data_base(&self) -> u64 {
        self.ring.data_base()
    }

    /// Executes a script.
    ///
    /// # Errors
    /// The process ended or the agent does not answer. Failed operations are in the results.
    pub fn run(&self, script: &Script) -> Result<Results> {
        self.run_with(script, || Ok(()))
    }

    /// Executes a script whose operations wait for what `beside` does.
    pub(crate) fn run_with(
        &self,
        script: &Script,
        beside: impl FnOnce() -> Result<()>,
    ) -> Result<Results> {
        let number = self.ring.load(script)?;
        match self.way {
            Way::Socket => self.ring.ring()?,
            Way::Stops | Way::Copied => self.go_on(Stopped::assume(self.pid))?,
        }
        beside()?;
        self.finish(script, number)
    }

    fn finish(&self, script: &Script, number: u32) -> Result<Results> {
        match self.way {
            Way::Socket => self.ring.wait(number, |waited| self.look_after(waited))?,
            Way::Stops | Way::Copied => self.wait_stopped(number)?,
        }
        Ok(self.ring.results(script))
    }

    /// Lets an agent go on that stands where it told.
    fn go_on(&self, agent: Stopped) -> Result<()> {
        if self.way == Way::Copied {
            push(&self.map, &self.memory, self.ring.header_address())?;
        }
        // Another stop, for somebody else's signal, is told from its own by that.
        agent.set_registers(&Registers { orig_rax: u64::MAX, ..agent.registers()? })?;
        agent.resume().map(drop)
    }

    /// Waits until the agent has told that batch `number` is done.
    fn wait_stopped(&self, number: u32) -> Result<()> {
        loop {
            let mut owed = self.owed.borrow_mut();
            let (agent, _) = tell::wait_told(self.pid, self.signal, self.mask, &mut owed)?;
            drop(owed);
            self.take_over()?;
            if self.ring.is_done(number) {
                return Ok(());
            }
            self.go_on(agent)?;
        }
    }

    /// Brings what the process has written to our side of the ring, if it does not share it. It stands still.
    pub(crate) fn take_over(&self) -> Result<()> {
        match self.way {
            Way::Copied => pull(&self.map, &self.memory, self.ring.header_address()),
            Way::Socket | Way::Stops => Ok(()),
        }
    }

    /// Handles stops that come while the agent runs.
    fn look_after(&self, waited: Duration) -> Result<()> {
        let tid = self.agent.tid();
        match wait::try_wait(tid).map_err(Error::syscall("looking after the agent"))? {
            None if waited > PATIENCE => {
                Err(Error::Timeout { pid: self.pid, seconds: PATIENCE.as_secs() })
            }
            None | Some(Status::Continued) => Ok(()),
            Some(Status::Exited(code)) => {
                Err(Error::Gone { tid, how: format!("exit code {code}") })
            }
            Some(Status::Killed(signal)) => {
                Err(Error::Gone { tid, how: format!("signal {signal}") })
            }
            // SIGSTOP, which cannot be blocked, or the telling signal, of which the same holds as in `wait_told`.
            Some(Status::Stop(Stop::Signal(signal))) => {
                if signal != self.signal || self.mask & !tell::quiet_mask(signal) != 0 {
                    self.owed.borrow_mut().add(signal);
                }
                ptrace::cont(tid, 0).map_err(Error::syscall("continuing the agent"))
            }
            // A member of a stopped group stops for its group once more.
            Some(Status::Stop(Stop::Group(_) | Stop::Event)) => {
                ptrace::cont(tid, 0).map_err(Error::syscall("continuing the agent"))
            }
            Some(Status::Stop(stop)) => Err(Error::Unexpected { tid, stop: format!("{stop:?}") }),
        }
    }

    /// Takes the agent out: the thread stands in a ptrace stop with the registers and mask it had, and nothing of the
    /// agent is left.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cure(self) -> Result<Stopped> {
        let tid = self.agent.tid();
        let mut owed = self.owed.take();
        let leader = if self.way == Way::Socket {
            self.agent.interrupt()?;
            self.agent.wait_stop_noting(|signal| {
                if signal != self.signal || self.mask & !tell::quiet_mask(signal) != 0 {
                    owed.add(signal);
                }
            })?
        } else {
            Stopped::assume(tid)
        };
        // SAFETY: an i32.
        let socket: i32 = unsafe { self.map.get(PAGE + offset::SOCKETS) };
        leader.set_registers(&Registers {
            rip: self.room.address + self.boot.depart as u64,
            rbx: self.ring.header_address(),
            r12: u64::from(socket as u32),
            orig_rax: u64::MAX,
            ..self.original
        })?;
        let leader = if self.signal != 0 {
            leader.resume()?;
            let told = tell::wait_told(tid, self.signal, self.mask, &mut owed)?.0;
            tell::forget(told, self.signal, self.mask, &mut owed)?
        } else {
            // close in, out; munmap in, out. The kernel mends interrupted system calls only on the way out of a
            // get_signal stop.
            tell::follow(leader, 4, &mut owed)?.to_event_stop()?
        };
        ptrace::set_signal_mask(tid, self.mask)
            .map_err(Error::syscall("restoring the signal mask"))?;
        leader.set_registers(&mend_interrupted(&self.original).unwrap_or(self.original))?;
        if !self.abandoned.get() {
            let zeros = vec![0u8; self.boot.len(self.room.visitors)];
            let _ = self.memory.write_all_at(&zeros, self.room.address);
        }
        owed.pay(self.pid);
        Ok(leader)
    }
}
