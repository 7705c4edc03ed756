//! The way of an agent into a live process, in steps that end where the process has something to do: so that the steps
//! of several processes can be made in turns.

use crate::interrupted::{after_rseq, self_resuming};
use crate::live::{DATA, Live, OPS, UNDO_AT, VISIT_RESULTS, VISIT_RESULTS_AT, Way};
use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Ring, Script};
use crate::tell::{self, Owed};
use crate::tracee::{Running, Stopped};
use crate::{Error, Result};
use rewake_agent::arch::{Bootstrap, VISITORS, executor};
use rewake_agent::layout::{FLAG_HANGUP, Header, Op, deref_flag, offset};
use rewake_sys::ptrace::{self, Registers};
use rustix::fd::{BorrowedFd, OwnedFd, RawFd};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

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

/// What is known of a process that an agent is put into.
#[derive(Debug)]
pub struct Target<'a> {
    /// A pidfd of it.
    pub pidfd: BorrowedFd<'a>,
    /// `/proc/PID/mem`.
    pub memory: Arc<File>,
    /// Executable private mappings (start, end), the vdso first.
    pub candidates: &'a [(u64, u64)],
    /// A signal that it ignores; see [`tell::telling_signal`].
    pub signal: i32,
    /// The registers with which its first thread goes on ([`crate::interrupted::out_of_sequence`]), and its signal mask.
    pub start: (Registers, u64),
}

/// A process that an agent is to be put into.
#[derive(Debug)]
pub struct Entry<'a, F> {
    /// Its first thread, in a ptrace stop.
    pub leader: Stopped,
    /// What is known of it.
    pub target: Target<'a>,
    /// Builds the first batch, for the given data address.
    pub first: F,
}

/// A process on the way to having an agent: its first thread is, or soon will be, where the next step begins.
#[derive(Debug)]
pub(crate) struct Entering<'a> {
    target: Target<'a>,
    boot: Bootstrap,
    room: Room,
    tid: i32,
    /// The thread, where its system calls are followed; none where it tells when it is there.
    stopped: Option<Stopped>,
    original: Registers,
    mask: u64,
    owed: Owed,
}

impl<'a> Entering<'a> {
    /// Sends the thread into the bootstrap, on its way to the first gate.
    pub(crate) fn begin(leader: Stopped, target: Target<'a>) -> Result<Self> {
        let boot = Bootstrap::get();
        let tid = leader.tid();
        let result = find_room(&target.memory, target.candidates, &boot).and_then(|room| {
            let (leader, (original, mask)) = let_out(leader, &target, &room, &boot)?;
            let owed = Owed::default();
            let mut entering =
                Entering { target, boot, room, tid, stopped: None, original, mask, owed };
            entering.enter(&leader)?;
            entering.go_on(leader)?;
            Ok(entering)
        });
        result.inspect_err(|_| give_up(tid))
    }

    /// From the first gate, where it has made a memfd, on to the second.
    pub(crate) fn map(mut self) -> Result<Mapping<'a>> {
        match self.try_map() {
            Ok((map, shared)) => Ok(Mapping { entering: self, map, shared }),
            Err(e) => {
                self.give_up();
                Err(e)
            }
        }
    }

    /// After a failure: lets the thread go, and gives back what came for it meanwhile.
    fn give_up(mut self) {
        give_up(self.tid);
        self.owed.pay(self.tid);
    }

    /// The memory of the ring, and whether the process shares it. It has some of its own where its table of descriptors is
    /// full: then it is copied, while the process stands still.
    fn try_map(&mut self) -> Result<(Arc<SharedMap>, bool)> {
        let (leader, regs, number) = self.at_first_gate()?;
        let shared = !self.may_tell_instead(number);
        let (memfd, flags) = if shared {
            inside("memfd_create", number)?;
            (fetch(self.target.pidfd, number)?, libc::MAP_SHARED)
        } else {
            let own = rustix::fs::memfd_create("rewake", rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(Error::errno("making a ring", "memfd_create"))?;
            (own, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        };
        rustix::fs::ftruncate(&memfd, map_len() as u64)
            .map_err(Error::errno("sizing the ring", "ftruncate"))?;
        let map = Arc::new(SharedMap::of_file(memfd, map_len())?);
        map.write(0, executor());
        map.put(PAGE + offset::SOCKETS, &[-1i32, -1]);
        leader.set_registers(&Registers {
            rip: self.at(self.boot.map),
            rbx: 0,
            r12: number,
            r15: flags as u64,
            orig_rax: u64::MAX,
            ..regs
        })?;
        self.go_on(leader)?;
        Ok((map, shared))
    }

    /// Did a system call fail because the table of descriptors is full, in a process that can do without: one that has a
    /// signal to tell by?
    fn may_tell_instead(&self, result: u64) -> bool {
        result as i64 == -i64::from(libc::EMFILE) && self.target.signal != 0
    }

    fn at(&self, part: usize) -> u64 {
        self.room.address + part as u64
    }

    /// Writes the bootstrap for the thread as it is, and sends it there.
    fn enter(&self, leader: &Stopped) -> Result<()> {
        let boot = &self.boot;
        let mut bytes = boot.bytes[..boot.len(self.room.visitors)].to_vec();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        for (i, word) in self_resuming(&self.original).words().iter().enumerate() {
            put(boot.saved + i * 8, &word.to_ne_bytes());
        }
        put(boot.mask, &self.mask.to_ne_bytes());
        put(boot.quiet, &tell::quiet_mask(self.target.signal).to_ne_bytes());
        put(boot.size, &(map_len() as u64).to_ne_bytes());
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
        leader.set_registers(&Registers { rip, orig_rax: u64::MAX, ..self.original })?;
        // Only then: the bootstrap gives the thread its mask back by itself, if it must.
        ptrace::set_signal_mask(leader.tid(), tell::quiet_mask(self.target.signal))
            .map_err(Error::syscall("blocking signals"))
    }

    /// Lets the thread run to where it tells, or keeps it for its system calls to be followed.
    fn go_on(&mut self, leader: Stopped) -> Result<()> {
        if self.target.signal != 0 {
            leader.resume()?;
        } else {
            self.stopped = Some(leader);
        }
        Ok(())
    }

    /// Waits for the first gate; returns the number of the memfd, as the kernel returned it.
    fn at_first_gate(&mut self) -> Result<(Stopped, Registers, u64)> {
        if let Some(leader) = self.stopped.take() {
            // Its mask, then the memfd.
            let leader = tell::follow(leader, 4, &mut self.owed)?;
            let regs = leader.registers()?;
            return Ok((leader, regs, regs.rax));
        }
        let (leader, regs) =
            tell::wait_told(self.tid, self.target.signal, self.mask, &mut self.owed)?;
        Ok((leader, regs, regs.r12))
    }

    /// Waits for the second gate: the ring is mapped (header in rbx) and holds a socket pair, if there was room for one.
    fn at_second_gate(&mut self) -> Result<(Stopped, Registers, bool)> {
        let (leader, regs, mapped, paired) = if let Some(mut leader) = self.stopped.take() {
            // All of it, then the page of code.
            let mut mapped = 0;
            for _ in 0..2 {
                leader = tell::follow(leader, 2, &mut self.owed)?;
                mapped = leader.registers()?.rax;
                inside("mmap", mapped)?;
            }
            let leader = tell::follow(leader, 2, &mut self.owed)?;
            let regs = leader.registers()?;
            (leader, regs, mapped, regs.rax)
        } else {
            let (leader, regs) =
                tell::wait_told(self.tid, self.target.signal, self.mask, &mut self.owed)?;
            (leader, regs, regs.r13, regs.r14)
        };
        inside("mmap", mapped)?;
        let full = self.may_tell_instead(paired);
        if !full {
            inside("socketpair", paired)?;
        }
        Ok((leader, regs, !full))
    }
}

/// A process on the way from the first gate to the second, with the memory that will be its ring.
#[derive(Debug)]
pub(crate) struct Mapping<'a> {
    entering: Entering<'a>,
    map: Arc<SharedMap>,
    shared: bool,
}

impl Mapping<'_> {
    /// From the second gate into the executor, with a first batch, whose number is returned.
    pub(crate) fn run(self, first: impl FnOnce(u64) -> Script) -> Result<(Live, Script, u32)> {
        let Mapping { mut entering, map, shared } = self;
        let running = Self::try_run(&mut entering, &map, shared, first);
        let (agent, ring, way, script, number) = match running {
            Ok(running) => running,
            Err(e) => {
                entering.give_up();
                return Err(e);
            }
        };
        let live = Live {
            pid: entering.tid,
            agent,
            original: entering.original,
            mask: entering.mask,
            boot: entering.boot,
            room: entering.room,
            memory: entering.target.memory,
            ring,
            map,
            signal: entering.target.signal,
            owed: RefCell::new(entering.owed),
            abandoned: Cell::new(false),
            way,
        };
        Ok((live, script, number))
    }

    fn try_run(
        entering: &mut Entering<'_>,
        map: &Arc<SharedMap>,
        shared: bool,
        first: impl FnOnce(u64) -> Script,
    ) -> Result<(Running, Ring, Way, Script, u32)> {
        let (leader, regs, paired) = entering.at_second_gate()?;
        let header = regs.rbx;
        let (way, sockets, doorbell) = if paired {
            // SAFETY: two i32.
            let sockets: [i32; 2] = unsafe { map.get(PAGE + offset::SOCKETS) };
            let socket = fetch(entering.target.pidfd, u64::from(sockets[1] as u32))?;
            (Way::Socket, sockets, Doorbell::Socket(socket))
        } else {
            (if shared { Way::Stops } else { Way::Copied }, [-1; 2], Doorbell::Tracer)
        };
        let ring = Ring::new(map.clone(), PAGE, Ring::size_for(OPS, DATA), DATA, header, doorbell);
        let (wait, report) = match way {
            Way::Socket => {
                let recv = Op::new(libc::SYS_recvfrom, &[0, header + UNUSED, 1, 0, 0, 0]);
                // MSG_TRUNC is not asked for, so a hang-up is the only way to read nothing.
                let wait = Op { flags: FLAG_HANGUP | deref_flag(0), ..recv }
                    .arg_deref(0, header + offset::SOCKETS as u64);
                let done = header + offset::DONE as u64;
                (wait, Op::new(libc::SYS_futex, &[done, libc::FUTEX_WAKE as u64, i32::MAX as u64]))
            }
            // It tells (it has just done so, with its own number in rdi). If nobody stops it then, nobody is there.
            Way::Stops | Way::Copied => {
                let tell = Op::new(libc::SYS_tkill, &[regs.rdi, entering.target.signal as u64]);
                (Op { flags: FLAG_HANGUP, ..tell }, Op::NOTHING)
            }
        };
        ring.initialise(&Header {
            exit: entering.at(entering.boot.leave),
            undo_count: u32::from(paired),
            undo: header + (UNDO_AT - PAGE) as u64,
            sockets,
            wait,
            report,
            ..Header::EMPTY
        });
        map.put(
            UNDO_AT,
            &Op::new(libc::SYS_close, &[0]).arg_deref(0, header + offset::SOCKETS as u64),
        );
        let script = first(ring.data_base());
        let number = ring.load(&script)?;
        if way == Way::Copied {
            crate::live::push(map, &entering.target.memory, header)?;
        }
        leader.set_registers(&Registers {
            rip: entering.at(entering.boot.run),
            orig_rax: u64::MAX,
            ..regs
        })?;
        Ok((leader.resume()?, ring, way, script, number))
    }
}

/// A thread that is still in the entry of an agent whose controller was killed, on its way back to where it was, is let
/// out of it first. Returns with what registers and mask it goes on.
fn let_out(
    mut leader: Stopped,
    target: &Target<'_>,
    room: &Room,
    boot: &Bootstrap,
) -> Result<(Stopped, (Registers, u64))> {
    let room = room.address..room.address + boot.len(room.visitors) as u64;
    if !room.contains(&target.start.0.rip) {
        return Ok((leader, target.start));
    }
    let tid = leader.tid();
    for _ in 0..1000 {
        let running = leader.resume()?;
        std::thread::sleep(Duration::from_micros(100));
        running.interrupt()?;
        leader = running.wait_stop()?;
        let regs = leader.registers()?;
        if !room.contains(&regs.rip) {
            let mask =
                ptrace::signal_mask(tid).map_err(Error::syscall("reading the signal mask"))?;
            return Ok((leader, (after_rseq(tid, &target.memory, &regs), mask)));
        }
    }
    Err(Error::Unexpected { tid, stop: "it does not leave an old agent's entry".into() })
}

/// After a failure: the thread is in one of the bootstrap's own states, from which it finds its way back.
pub(crate) fn give_up(tid: i32) {
    let _ = ptrace::detach(tid, 0);
}

/// Length of the memory that a controller shares with its agent: a page of code, the ring, what is beside it.
fn map_len() -> usize {
    (VISIT_RESULTS_AT + VISIT_RESULTS).next_multiple_of(PAGE)
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
