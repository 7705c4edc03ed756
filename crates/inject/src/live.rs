//! An agent in a live process, for a dump.
//!
//! The way in is one register write: the bootstrap, written beforehand into unused bytes at the end of the vdso (or of
//! another executable mapping), makes a memfd and a socket pair, and enters the executor. Whatever
//! happens to the controller, each step falls through to a way back that the bootstrap walks alone, so the process is
//! never more than its own instructions away from where it was. The process's memory and stack are not touched.

use crate::interrupted::{after_rseq, mend_interrupted, self_resuming};
use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Results, Ring, Script};
use crate::tell::{self, Owed};
use crate::tracee::{Running, Stopped};
use crate::{Error, Result};
use rewake_agent::arch::{Bootstrap, VISITORS, VisitorResult, executor};
use rewake_agent::layout::{FLAG_HANGUP, Header, Op, deref_flag, offset};
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::wait::{self, Status, Stop};
use rustix::fd::{BorrowedFd, OwnedFd, RawFd};
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
const UNDO_AT: usize = PAGE + Ring::size_for(OPS, DATA);
/// Where the results of thread visits lie, past that.
pub(crate) const VISIT_RESULTS_AT: usize = UNDO_AT + size_of::<Op>();
/// Their length.
const VISIT_RESULTS: usize = VISITORS * size_of::<VisitorResult>();
/// An agent that does not answer a batch of cheap calls for this long never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// Unused bytes in an executable mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) address: u64,
    pub(crate) visitors: usize,
}

/// Finds zero bytes at the end of one of `candidates` (start, end), the first that suffices.
fn find_room(memory: &File, candidates: &[(u64, u64)], boot: &Bootstrap) -> Result<Room> {
    for &(start, end) in candidates {
        let span = ((end - start) as usize).min(PAGE);
        let mut tail = vec![0u8; span];
        if memory.read_exact_at(&mut tail, end - span as u64).is_err() {
            continue;
        }
        let zeros = tail.iter().rev().take_while(|b| **b == 0).count();
        // Keep one word of distance from what looks used.
        let usable = zeros.saturating_sub(16) & !15;
        for visitors in (0..=VISITORS).rev() {
            let needed = boot.len(visitors).next_multiple_of(16);
            if needed <= usable || span >= needed && is_left_over(&tail[span - needed..], boot) {
                return Ok(Room { address: end - needed as u64, visitors });
            }
        }
    }
    Err(Error::NoRoom { needed: boot.len(0) })
}

/// Is this the entry of an agent whose controller was killed? It did its work and is only waste now.
fn is_left_over(bytes: &[u8], boot: &Bootstrap) -> bool {
    let code = boot.entry..boot.leave;
    bytes.get(code.clone()) == boot.bytes.get(code)
}

fn memfd_flags() -> u32 {
    use rustix::fs::MemfdFlags;
    // MFD_EXEC exists since 6.3 and is refused before.
    static FLAGS: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *FLAGS.get_or_init(|| {
        let exec = MemfdFlags::CLOEXEC | MemfdFlags::EXEC;
        match rustix::fs::memfd_create("rewake", exec) {
            Ok(_) => exec.bits(),
            Err(_) => MemfdFlags::CLOEXEC.bits(),
        }
    })
}

fn fetch(pidfd: BorrowedFd<'_>, fd: u64) -> Result<OwnedFd> {
    rustix::process::pidfd_getfd(
        pidfd,
        // A number of the target's table; it is only passed to the kernel.
        fd as RawFd,
        rustix::process::PidfdGetfdFlags::empty(),
    )
    .map_err(Error::errno("fetching a descriptor", "pidfd_getfd"))
}

/// The process an agent is put into.
#[derive(Debug)]
pub struct Target<'a> {
    /// A pidfd of it.
    pub pidfd: BorrowedFd<'a>,
    /// `/proc/PID/mem`.
    pub memory: File,
    /// Executable private mappings (start, end), the vdso first.
    pub candidates: &'a [(u64, u64)],
    /// A signal that it ignores; see [`telling_signal`].
    pub signal: i32,
}

/// An agent that waits for batches inside a live process.
#[derive(Debug)]
pub struct Live {
    pid: i32,
    agent: Running,
    original: Registers,
    mask: u64,
    pub(crate) boot: Bootstrap,
    pub(crate) room: Room,
    pub(crate) memory: File,
    pub(crate) ring: Ring,
    pub(crate) map: Arc<SharedMap>,
    /// By which foreign code tells; 0 if the process has none to spare.
    pub(crate) signal: i32,
    /// What came while the agent was in, to be given back when it is out.
    pub(crate) owed: RefCell<Owed>,
    /// A thread was left in the padding, on its way back alone: its code must stay.
    pub(crate) abandoned: Cell<bool>,
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
        let boot = Bootstrap::get();
        let room = match find_room(&target.memory, target.candidates, &boot) {
            Ok(room) => room,
            Err(e) => {
                let _ = leader.detach(0);
                return Err(e);
            }
        };
        let map_len = (VISIT_RESULTS_AT + VISIT_RESULTS).next_multiple_of(PAGE);
        let tid = leader.tid();
        let start = Start { target, boot, room, map_len, owed: Owed::default() };
        // A failure in here leaves the thread in one of the bootstrap's own states: detaching sends it back.
        match start.go(leader, first) {
            Ok(live) => Ok(live),
            Err(e) => {
                let _ = ptrace::detach(tid, 0);
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
        let number = self.ring.load(script)?;
        self.ring.ring()?;
        self.finish(script, number)
    }

    fn finish(&self, script: &Script, number: u32) -> Result<Results> {
        self.ring.wait(number, |waited| self.look_after(waited))?;
        Ok(self.ring.results(script))
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
        self.agent.interrupt()?;
        let leader = self.agent.wait_stop_noting(|signal| {
            if signal != self.signal || self.mask & !tell::quiet_mask(signal) != 0 {
                owed.add(signal);
            }
        })?;
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
            tell::wait_told(tid, self.signal, self.mask, &mut owed)?.0
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

struct Start<'a> {
    target: Target<'a>,
    boot: Bootstrap,
    room: Room,
    map_len: usize,
    owed: Owed,
}

impl Start<'_> {
    fn at(&self, part: usize) -> u64 {
        self.room.address + part as u64
    }

    /// Writes the bootstrap for a thread with these registers and this mask, and sends the thread there.
    fn enter(&self, leader: &Stopped, original: &Registers, mask: u64) -> Result<()> {
        let boot = &self.boot;
        let mut bytes = boot.bytes[..boot.len(self.room.visitors)].to_vec();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        for (i, word) in self_resuming(original).words().iter().enumerate() {
            put(boot.saved + i * 8, &word.to_ne_bytes());
        }
        put(boot.mask, &mask.to_ne_bytes());
        put(boot.size, &(self.map_len as u64).to_ne_bytes());
        put(boot.memfd_flags, &memfd_flags().to_ne_bytes());
        put(boot.signal, &self.target.signal.to_ne_bytes());
        self.target.memory.write_all_at(&bytes, self.room.address).map_err(|e| Error::Syscall {
            doing: "writing the agent's entry",
            source: rewake_sys::SyscallError::new(
                "pwrite /proc/PID/mem",
                rewake_sys::Errno::from_io_error(&e).unwrap_or(rewake_sys::Errno::IO),
            ),
        })?;
        // The one step into foreign code: before it the process is as it was, after it the bootstrap looks after it.
        let rip = self.at(boot.entry);
        leader.set_registers(&Registers { rip, orig_rax: u64::MAX, ..*original })?;
        // Only then: the bootstrap gives the thread its mask back by itself, if it must.
        ptrace::set_signal_mask(leader.tid(), tell::quiet_mask(self.target.signal))
            .map_err(Error::syscall("blocking signals"))
    }

    /// A thread that is still in the entry of an agent whose controller was killed, on its way back to where it was, is
    /// let out of it first.
    fn let_out(&self, mut leader: Stopped) -> Result<Stopped> {
        let room = self.room.address..self.room.address + self.boot.len(self.room.visitors) as u64;
        for _ in 0..1000 {
            if !room.contains(&leader.registers()?.rip) {
                return Ok(leader);
            }
            let running = leader.resume()?;
            std::thread::sleep(Duration::from_micros(100));
            running.interrupt()?;
            leader = running.wait_stop()?;
        }
        Err(Error::Unexpected {
            tid: leader.tid(),
            stop: "it does not leave an old agent's entry".into(),
        })
    }

    /// To the first gate; returns the number of the memfd, as the kernel returned it.
    fn at_first_gate(&mut self, leader: Stopped, mask: u64) -> Result<(Stopped, Registers, u64)> {
        if self.target.signal != 0 {
            let tid = leader.resume()?.tid();
            let (leader, regs) = tell::wait_told(tid, self.target.signal, mask, &mut self.owed)?;
            return Ok((leader, regs, regs.r12));
        }
        let leader = tell::follow(leader, 2, &mut self.owed)?;
        let regs = leader.registers()?;
        Ok((leader, regs, regs.rax))
    }

    /// To the second gate: the ring is mapped (header in rbx) and holds a socket pair.
    fn at_second_gate(&mut self, leader: Stopped, mask: u64) -> Result<(Stopped, Registers)> {
        let (leader, regs, mapped, paired) = if self.target.signal != 0 {
            let tid = leader.resume()?.tid();
            let (leader, regs) = tell::wait_told(tid, self.target.signal, mask, &mut self.owed)?;
            (leader, regs, regs.r13, regs.r14)
        } else {
            // All of it, then the page of code.
            let mut leader = leader;
            let mut mapped = 0;
            for _ in 0..2 {
                leader = tell::follow(leader, 2, &mut self.owed)?;
                mapped = leader.registers()?.rax;
                inside("mmap", mapped)?;
            }
            let leader = tell::follow(leader, 2, &mut self.owed)?;
            let regs = leader.registers()?;
            (leader, regs, mapped, regs.rax)
        };
        inside("mmap", mapped)?;
        inside("socketpair", paired)?;
        Ok((leader, regs))
    }

    fn go(mut self, leader: Stopped, first: impl FnOnce(u64) -> Script) -> Result<(Live, Results)> {
        let leader = self.let_out(leader)?;
        let pid = leader.tid();
        let original = after_rseq(pid, &self.target.memory, &leader.registers()?);
        let mask = ptrace::signal_mask(pid).map_err(Error::syscall("reading the signal mask"))?;
        self.enter(&leader, &original, mask)?;
        let (leader, regs, number) = self.at_first_gate(leader, mask)?;
        inside("memfd_create", number)?;
        let memfd = fetch(self.target.pidfd, number)?;
        rustix::fs::ftruncate(&memfd, self.map_len as u64)
            .map_err(Error::errno("sizing the ring", "ftruncate"))?;
        let map = Arc::new(SharedMap::of_file(memfd, self.map_len)?);
        map.write(0, executor());
        map.put(PAGE + offset::SOCKETS, &[-1i32, -1]);
        leader.set_registers(&Registers {
            rip: self.at(self.boot.map),
            rbx: 0,
            r12: number,
            orig_rax: u64::MAX,
            ..regs
        })?;
        let (leader, regs) = self.at_second_gate(leader, mask)?;
        let header = regs.rbx;
        // SAFETY: two i32.
        let sockets: [i32; 2] = unsafe { map.get(PAGE + offset::SOCKETS) };
        let socket = fetch(self.target.pidfd, u64::from(sockets[1] as u32))?;

        let ring = Ring::new(
            map.clone(),
            PAGE,
            Ring::size_for(OPS, DATA),
            DATA,
            header,
            Doorbell::Socket(socket),
        );
        let recv = Op::new(libc::SYS_recvfrom, &[0, header + UNUSED, 1, 0, 0, 0]);
        ring.initialise(&Header {
            exit: self.at(self.boot.leave),
            undo_count: 1,
            undo: header + (UNDO_AT - PAGE) as u64,
            sockets,
            // MSG_TRUNC is not asked for, so a hang-up is the only way to read nothing.
            wait: Op { flags: FLAG_HANGUP | deref_flag(0), ..recv }
                .arg_deref(0, header + offset::SOCKETS as u64),
            report: Op::new(
                libc::SYS_futex,
                &[header + offset::DONE as u64, libc::FUTEX_WAKE as u64, i32::MAX as u64],
            ),
            ..Header::EMPTY
        });
        map.put(
            UNDO_AT,
            &Op::new(libc::SYS_close, &[0]).arg_deref(0, header + offset::SOCKETS as u64),
        );
        let script = first(ring.data_base());
        let number = ring.load(&script)?;
        leader.set_registers(&Registers {
            rip: self.at(self.boot.run),
            orig_rax: u64::MAX,
            ..regs
        })?;
        let agent = leader.resume()?;
        let live = Live {
            pid,
            agent,
            original,
            mask,
            boot: self.boot,
            room: self.room,
            memory: self.target.memory,
            ring,
            map,
            signal: self.target.signal,
            owed: RefCell::new(self.owed),
            abandoned: Cell::new(false),
        };
        let results = live.finish(&script, number)?;
        Ok((live, results))
    }
}

/// An unused word of the header, where the agent's wait puts the byte it receives.
const UNUSED: u64 = std::mem::offset_of!(Header, reserved2) as u64;

fn inside(what: &'static str, rax: u64) -> Result<()> {
    let value = rax as i64;
    if (-4095..0).contains(&value) {
        return Err(Error::Inside {
            what,
            errno: rewake_sys::Errno::from_raw_os_error(-value as i32),
        });
    }
    Ok(())
}
