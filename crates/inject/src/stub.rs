//! Agents in empty processes that become restored ones.
//!
//! All agents of a restore share one arena, a memfd mapped at the same address in the controller and in every stub:
//! first the code, then the rings. So a pointer into the arena means the same everywhere.

use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Ring};
use crate::tracee::{Running, Stopped};
use crate::{Error, Result};
use rewake_agent::arch::executor;
use rewake_agent::layout::{Header, Op, offset};
use rewake_sys::ptrace::Registers;
use rewake_sys::task::{CloneArgs, clone_agent};
use std::sync::Arc;

/// The memory that the controller and all stubs share.
#[derive(Debug)]
pub struct Arena {
    map: Arc<SharedMap>,
}

/// A word of an arena at which agents wait, by futex(2), while it is 0.
#[derive(Debug)]
pub struct Gate {
    map: Arc<SharedMap>,
    at: usize,
}

impl Gate {
    /// Sets the word and wakes all who wait.
    pub fn set(&self, value: u32) {
        let word = self.map.atomic(self.at);
        word.store(value, std::sync::atomic::Ordering::Release);
        rewake_sys::futex::wake(word);
    }
}

/// How an agent of a stub behaves when it has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A process: waits for further batches.
    Process,
    /// A further thread: runs its first batch and parks.
    Thread,
}

impl Arena {
    /// Creates an arena of `len` bytes at `base`; `Ok(None)` if that range is taken in the controller.
    ///
    /// # Errors
    /// The failed call.
    pub fn create(base: u64, len: usize) -> Result<Option<Arena>> {
        let Some(map) = SharedMap::create_at(base, len)? else { return Ok(None) };
        map.write(0, executor());
        map.make_code(PAGE)?;
        Ok(Some(Arena { map: Arc::new(map) }))
    }

    /// First address.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.map.address()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Is it empty? (Never.)
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Offset at which rings may start.
    pub const FIRST_RING: usize = PAGE;

    /// A ring at offset `at` with `len` bytes, `data` of them for data, its header initialised.
    #[must_use]
    pub fn ring(&self, at: usize, len: usize, data: usize, kind: Kind) -> Ring {
        let ring = self.look(at, len, data);
        let header = ring.header_address();
        let done = header + offset::DONE as u64;
        ring.initialise(&Header {
            wait: match kind {
                Kind::Process => Op::new(
                    libc::SYS_futex,
                    &[header + offset::SEQ as u64, libc::FUTEX_WAIT as u64, 0, 0, 0, 0],
                )
                .arg_deref(2, done),
                Kind::Thread => Op::new(libc::SYS_pause, &[]),
            },
            report: Op::new(libc::SYS_futex, &[done, libc::FUTEX_WAKE as u64, i32::MAX as u64]),
            ..Header::EMPTY
        });
        ring
    }

    /// A ring that is in use, to be looked at.
    #[must_use]
    pub fn look(&self, at: usize, len: usize, data: usize) -> Ring {
        let header = self.base() + at as u64;
        Ring::new(self.map.clone(), at, len, data, header, Doorbell::Futex)
    }

    /// A word at offset `at` at which agents wait.
    #[must_use]
    pub fn gate(&self, at: usize) -> Gate {
        Gate { map: self.map.clone(), at }
    }

    /// Clones the root stub: a child of the controller (or of its parent with `CLONE_PARENT`) that runs the batch
    /// loaded in `ring`.
    ///
    /// # Errors
    /// `EEXIST` if the pid is taken; others as clone3(2).
    pub fn clone_root(
        &self,
        args: &CloneArgs,
        ring: &Ring,
    ) -> std::result::Result<i32, rewake_sys::SyscallError> {
        assert!(args.flags & libc::CLONE_VM as u64 == 0, "the stub has its own address space");
        // SAFETY: the arena is MAP_SHARED with the executor at its start, the ring's header is filled, and the flag
        // was checked just above.
        unsafe { clone_agent(args, self.base() as usize, ring.header_address() as usize) }
    }
}

/// A system call to be made in a stopped stub through the `syscall` instruction at `gadget`.
#[derive(Debug)]
pub struct RemoteCall {
    /// The stub.
    pub stub: Stopped,
    /// Address of the instruction.
    pub gadget: u64,
    /// The call.
    pub number: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// Makes system calls in many stubs at the same time; they stand in event stops with their registers clobbered
/// afterwards, in the same order, with the results. Calls that wait are interrupted as soon as they have begun to: the results
/// may be the kernel's restart codes. Only for stubs: a live process would not survive the controller's death in here.
///
/// # Errors
/// A stub died.
pub fn remote_calls(calls: Vec<RemoteCall>) -> Result<Vec<(Stopped, i64)>> {
    // Entered first: an interrupt before that would stop the thread before the call.
    let waiting = all(enter(calls)?, |stub| stub.wait_syscall_stop()?.resume_to_event())?;
    all(waiting, |stub| {
        let stub = stub.wait_stop()?;
        let result = stub.registers()?.rax as i64;
        Ok((stub, result))
    })
}

fn enter(calls: Vec<RemoteCall>) -> Result<Vec<Running>> {
    all(calls, |RemoteCall { stub, gadget, number, args }| {
        aim(&stub, gadget, number, args)?;
        stub.resume_to_syscall()
    })
}

/// One step of all, before the next: while we attend to one, the others are on their way.
fn all<A, B>(of: Vec<A>, step: impl FnMut(A) -> Result<B>) -> Result<Vec<B>> {
    of.into_iter().map(step).collect()
}

fn aim(stub: &Stopped, gadget: u64, number: i64, args: [u64; 6]) -> Result<()> {
    let regs = stub.registers()?;
    stub.set_registers(&Registers {
        rip: gadget,
        rax: number as u64,
        orig_rax: u64::MAX,
        rdi: args[0],
        rsi: args[1],
        rdx: args[2],
        r10: args[3],
        r8: args[4],
        r9: args[5],
        ..regs
    })
}

/// Offset of a `syscall` instruction in a vdso (or any code), for [`RemoteCall`].
///
/// # Errors
/// [`Error::NoRoom`] if there is none.
pub fn find_syscall_instruction(code: &[u8]) -> Result<usize> {
    code.windows(2).position(|pair| pair == [0x0f, 0x05]).ok_or(Error::NoRoom { needed: 2 })
}
