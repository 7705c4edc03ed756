//! An agent in a live process, for a dump.
//!
//! The way in is one register write: the bootstrap, written beforehand into unused bytes at the end of the vdso (or of
//! another executable mapping), blocks signals, makes a memfd and a socket pair, and enters the executor. Whatever
//! happens to the controller, each step falls through to a way back that the bootstrap walks alone, so the process is
//! never more than its own instructions away from where it was. The process's memory and stack are not touched.

use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Results, Ring, Script};
use crate::tracee::{Running, Stopped};
use crate::{Error, Result};
use rewake_agent::arch::{Bootstrap, VISITORS, VisitorResult, executor};
use rewake_agent::layout::{FLAG_HANGUP, Header, Op, deref_flag, offset};
use rewake_sys::ptrace::{self, Registers};
use rewake_sys::wait::{self, Status, Stop};
use rustix::fd::{BorrowedFd, OwnedFd, RawFd};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// Operations that fit a batch of a live agent.
pub const OPS: usize = 256;
/// Bytes of data that fit.
pub const DATA: usize = 32 * 1024;
/// Room for the results of thread visits, past the data.
const VISIT_RESULTS: usize = VISITORS * size_of::<VisitorResult>();
/// An agent that does not answer a batch of cheap calls for this long never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// System calls that end with `EINTR` after a stop without a signal, and that the kernel does not restart by itself.
/// Executing them again is invisible to the program.
const REPEATED: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    333, // io_pgetevents, which libc lacks on this target
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_flock,
];

const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The kernel left `regs` inside a system call that our stop interrupted with a plain `EINTR`: make it be executed
/// again. `None` if there is nothing to mend. Not for threads with a deliverable signal: those must see the `EINTR`.
#[must_use]
pub fn mend_interrupted(regs: &Registers) -> Option<Registers> {
    let number = regs.orig_rax as i64;
    (regs.rax as i64 == EINTR && REPEATED.contains(&number)).then(|| again(regs, regs.orig_rax))
}

fn again(regs: &Registers, number: u64) -> Registers {
    // Both forms of the instruction (syscall, int 0x80) are two bytes long.
    Registers { rax: number, orig_rax: u64::MAX, rip: regs.rip.wrapping_sub(2), ..*regs }
}

/// Registers that resume `regs` without the kernel's help: interrupted calls are made again, those with a restart
/// block through restart_syscall(2). Used where the kernel's own restart logic does not run.
#[must_use]
pub fn self_resuming(regs: &Registers) -> Registers {
    if (regs.orig_rax as i64) < 0 {
        return *regs;
    }
    match regs.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => again(regs, regs.orig_rax),
        ERESTART_RESTARTBLOCK => again(regs, libc::SYS_restart_syscall as u64),
        _ => mend_interrupted(regs).unwrap_or(*regs),
    }
}

/// Unused bytes in an executable mapping.
#[derive(Debug, Clone, Copy)]
struct Room {
    address: u64,
    visitors: usize,
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

/// What only a thread itself can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visited {
    /// Alternate stack, thread id's address, parent-death signal.
    pub result: VisitorResult,
    /// `PR_GET_SECUREBITS`, if it was asked for.
    pub securebits: Option<u32>,
}

/// An agent that waits for batches inside a live process.
#[derive(Debug)]
pub struct Live {
    pid: i32,
    agent: Running,
    original: Registers,
    mask: u64,
    boot: Bootstrap,
    room: Room,
    memory: File,
    ring: Ring,
    map: Arc<SharedMap>,
    /// A stop signal (SIGSTOP cannot be blocked) that came while the agent was in: given back when it is out.
    deferred_stop: std::cell::Cell<i32>,
    /// Was a signal delivered on the way? Its frame is new on some stack.
    delivered: std::cell::Cell<bool>,
}

impl Live {
    /// Puts an agent into the process of `leader`, which stands in an event stop, and runs the script that `first`
    /// builds for the given data address as its first batch.
    ///
    /// `candidates` are executable private mappings (start, end), the vdso first; `memory` is `/proc/PID/mem`.
    ///
    /// # Errors
    /// Why it could not be done; the thread is then detached and on its way back to where it was.
    pub fn inject(
        leader: Stopped,
        pidfd: BorrowedFd<'_>,
        memory: File,
        candidates: &[(u64, u64)],
        first: impl FnOnce(u64) -> Script,
    ) -> Result<(Live, Results)> {
        let boot = Bootstrap::get();
        let room = match find_room(&memory, candidates, &boot) {
            Ok(room) => room,
            Err(e) => {
                let _ = leader.detach(0);
                return Err(e);
            }
        };
        let ring_len = Ring::size_for(OPS, DATA) + size_of::<Op>() + VISIT_RESULTS;
        let map_len = (PAGE + ring_len).next_multiple_of(PAGE);

        let tid = leader.tid();
        let start = Start { pidfd, boot, room, map_len, memory };
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
            Some(Status::Stop(Stop::Signal(libc::SIGSTOP))) => {
                self.deferred_stop.set(libc::SIGSTOP);
                ptrace::cont(tid, 0).map_err(Error::syscall("continuing the agent"))
            }
            // A member of a stopped group stops for its group once more.
            Some(Status::Stop(Stop::Group(_) | Stop::Event)) => {
                ptrace::cont(tid, 0).map_err(Error::syscall("continuing the agent"))
            }
            Some(Status::Stop(stop)) => Err(Error::Unexpected { tid, stop: format!("{stop:?}") }),
        }
    }

    /// Was a signal delivered to a thread while the agent came in or visited? Then its stack holds a frame that it did
    /// not have before.
    #[must_use]
    pub fn delivered_signals(&self) -> bool {
        self.delivered.get()
    }

    /// How many threads can be visited.
    #[must_use]
    pub fn can_visit(&self) -> bool {
        self.room.visitors > 0
    }

    /// Asks another thread of the process, which stands in an event stop, what only it can tell. It stands in an
    /// event stop with its registers unchanged afterwards. Securebits are only asked for if `with_securebits` says so.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn visit(
        &self,
        thread: Stopped,
        regs: &Registers,
        with_securebits: bool,
    ) -> Result<(Stopped, Visited)> {
        let slot = 0;
        let (saved, entry, _) = self.boot.visitors[slot];
        let result_at =
            PAGE + Ring::size_for(OPS, DATA) + size_of::<Op>() + slot * size_of::<VisitorResult>();
        let tid = thread.tid();
        let group_stop = thread.group_stop();
        let mut regs = *regs;
        let mut thread = thread;
        loop {
            regs = after_rseq(tid, &self.memory, &regs);
            let words: Vec<u8> =
                self_resuming(&regs).words().iter().flat_map(|w| w.to_ne_bytes()).collect();
            self.memory.write_all_at(&words, self.room.address + saved as u64).map_err(|_| {
                Error::Inside { what: "saving registers", errno: rewake_sys::Errno::FAULT }
            })?;
            let here = self.ring.header_address() - PAGE as u64 + result_at as u64;
            thread.set_registers(&Registers {
                rip: self.room.address + entry as u64,
                r13: here,
                orig_rax: u64::MAX,
                ..regs
            })?;
            let mut interrupted = None;
            // sigaltstack and two or three prctl, in and out
            for _ in 0..if with_securebits { 8 } else { 6 } {
                match thread.to_syscall_stop() {
                    Ok(stopped) => thread = stopped,
                    Err(Error::Signal { signal, .. }) => {
                        interrupted = Some(signal);
                        thread = Stopped::assume(tid);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
            if let Some(signal) = interrupted {
                thread = deliver(thread, &regs, signal)?;
                self.delivered.set(true);
                regs = thread.registers()?;
                continue;
            }
            let securebits =
                if with_securebits { Some(thread.registers()?.rax as u32) } else { None };
            let mut stopped = thread.to_event_stop()?;
            stopped.set_registers(&regs)?;
            stopped.set_group_stop(group_stop);
            // SAFETY: VisitorResult is a struct of integers.
            let result = unsafe { self.map.get::<VisitorResult>(result_at) };
            return Ok((stopped, Visited { result, securebits }));
        }
    }

    /// Takes the agent out: the thread stands in an event stop with the registers and mask it had, and nothing of the
    /// agent is left.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cure(self) -> Result<Stopped> {
        let tid = self.agent.tid();
        self.agent.interrupt()?;
        let mut leader = self.agent.wait_stop()?;
        // SAFETY: an i32.
        let socket: i32 = unsafe { self.map.get(PAGE + offset::SOCKETS) };
        leader.set_registers(&Registers {
            rip: self.room.address + self.boot.depart as u64,
            rbx: self.ring.header_address(),
            r12: u64::from(socket as u32),
            orig_rax: u64::MAX,
            ..self.original
        })?;
        // close in, out; munmap in, out
        for _ in 0..4 {
            leader = leader.to_syscall_stop()?;
        }
        // The kernel mends interrupted system calls only on the way out of a get_signal stop.
        leader = leader.to_event_stop()?;
        ptrace::set_signal_mask(tid, self.mask)
            .map_err(Error::syscall("restoring the signal mask"))?;
        leader.set_registers(&mend_interrupted(&self.original).unwrap_or(self.original))?;
        let zeros = vec![0u8; self.boot.len(self.room.visitors)];
        let _ = self.memory.write_all_at(&zeros, self.room.address);
        if self.deferred_stop.get() != 0 {
            let _ = rewake_sys::signal::kill(self.pid, self.deferred_stop.get());
        }
        Ok(leader)
    }
}

/// Has `signal`, which is about to be delivered, delivered to the thread as it was (with registers `regs`), and stops
/// the thread again before it runs an instruction.
fn deliver(thread: Stopped, regs: &Registers, signal: i32) -> Result<Stopped> {
    let tid = thread.tid();
    thread.set_registers(regs)?;
    ptrace::interrupt(tid).map_err(Error::syscall("stopping a thread"))?;
    ptrace::cont(tid, signal).map_err(Error::syscall("delivering a signal"))?;
    Running::known(tid).wait_stop()
}

/// The registers with which a thread must go on after it ran foreign code: if it stands in a restartable sequence
/// (rseq(2)), at the sequence's abort handler. The kernel would send it there by itself after a preemption, but forgets
/// the sequence when it sees the thread elsewhere.
#[must_use]
pub fn after_rseq(tid: i32, memory: &File, regs: &Registers) -> Registers {
    let abort = || {
        let word = |at: u64| {
            let mut bytes = [0u8; 8];
            memory.read_exact_at(&mut bytes, at).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let area = ptrace::rseq_config(tid).ok()?.pointer;
        // struct rseq: cpu_id_start, cpu_id, rseq_cs
        let cs = word(area.checked_add(8).filter(|_| area != 0)?)?;
        if cs == 0 {
            return None;
        }
        // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
        let (start, len) = (word(cs.checked_add(8)?)?, word(cs.checked_add(16)?)?);
        let abort = word(cs.checked_add(24)?)?;
        (regs.rip.wrapping_sub(start) < len).then_some(abort)
    };
    match abort() {
        Some(abort) => Registers { rip: abort, ..*regs },
        None => *regs,
    }
}

struct Start<'a> {
    pidfd: BorrowedFd<'a>,
    boot: Bootstrap,
    room: Room,
    map_len: usize,
    memory: File,
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
        self.memory.write_all_at(&bytes, self.room.address).map_err(|e| Error::Syscall {
            doing: "writing the agent's entry",
            source: rewake_sys::SyscallError::new(
                "pwrite /proc/PID/mem",
                rewake_sys::Errno::from_io_error(&e).unwrap_or(rewake_sys::Errno::IO),
            ),
        })?;
        // The one step into foreign code: before it the process is as it was, after it the bootstrap looks after it.
        let rip = self.at(boot.entry);
        leader.set_registers(&Registers { rip, orig_rax: u64::MAX, ..*original })
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

    /// To the exit from the first system call, after which all signals are blocked.
    fn block_signals(&self, mut leader: Stopped) -> Result<(Stopped, Registers, u64, bool)> {
        leader = self.let_out(leader)?;
        let mut delivered = false;
        loop {
            let tid = leader.tid();
            let original = after_rseq(tid, &self.memory, &leader.registers()?);
            let mask =
                ptrace::signal_mask(tid).map_err(Error::syscall("reading the signal mask"))?;
            self.enter(&leader, &original, mask)?;
            match leader.to_syscall_stop().and_then(Stopped::to_syscall_stop) {
                Ok(stopped) => return Ok((stopped, original, mask, delivered)),
                // Delivered to the thread as it was; then once more.
                Err(Error::Signal { signal, .. }) => {
                    leader = deliver(Stopped::assume(tid), &original, signal)?;
                    delivered = true;
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn go(self, leader: Stopped, first: impl FnOnce(u64) -> Script) -> Result<(Live, Results)> {
        let pid = leader.tid();
        let (mut leader, original, mask, delivered) = self.block_signals(leader)?;
        let Start { pidfd, boot, room, map_len, memory } = self;
        let at = |part: usize| room.address + part as u64;
        // memfd_create in, out
        for _ in 0..2 {
            leader = leader.to_syscall_stop()?;
        }
        let regs = leader.registers()?;
        inside("memfd_create", regs.rax)?;
        let memfd = fetch(pidfd, regs.rax)?;
        rustix::fs::ftruncate(&memfd, map_len as u64)
            .map_err(Error::errno("sizing the ring", "ftruncate"))?;
        let map = Arc::new(SharedMap::of_file(memfd, map_len)?);
        map.write(0, executor());
        map.put(PAGE + offset::SOCKETS, &[-1i32, -1]);
        leader.set_registers(&Registers {
            rip: at(boot.map),
            rbx: 0,
            r12: regs.rax,
            orig_rax: u64::MAX,
            ..regs
        })?;

        // mmap in, out; socketpair in, out
        for step in 0..4 {
            leader = leader.to_syscall_stop()?;
            if step == 1 {
                inside("mmap", leader.registers()?.rax)?;
            }
        }
        let regs = leader.registers()?;
        inside("socketpair", regs.rax)?;
        let header = regs.rbx;
        // SAFETY: two i32.
        let sockets: [i32; 2] = unsafe { map.get(PAGE + offset::SOCKETS) };
        let socket = fetch(pidfd, u64::from(sockets[1] as u32))?;

        let ring = Ring::new(
            map.clone(),
            PAGE,
            Ring::size_for(OPS, DATA),
            DATA,
            header,
            Doorbell::Socket(socket),
        );
        let undo_at = PAGE + Ring::size_for(OPS, DATA);
        let recv = Op::new(libc::SYS_recvfrom, &[0, header + UNUSED, 1, 0, 0, 0]);
        ring.initialise(&Header {
            exit: at(boot.leave),
            undo_count: 1,
            undo: header + (undo_at - PAGE) as u64,
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
            undo_at,
            &Op::new(libc::SYS_close, &[0]).arg_deref(0, header + offset::SOCKETS as u64),
        );
        let script = first(ring.data_base());
        let number = ring.load(&script)?;
        leader.set_registers(&Registers { rip: at(boot.run), orig_rax: u64::MAX, ..regs })?;
        let agent = leader.resume()?;
        let live = Live {
            pid,
            agent,
            original,
            mask,
            boot,
            room,
            memory,
            ring,
            map,
            deferred_stop: std::cell::Cell::new(0),
            delivered: std::cell::Cell::new(delivered),
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
