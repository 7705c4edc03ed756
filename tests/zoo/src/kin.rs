//! Processes that share kernel objects (clone(2) with `CLONE_VM`, `CLONE_FILES`…), and do what they are asked to.
//!
//! Such a process may have the memory, and thread-local memory, of its maker, so it must not run ordinary code: it makes
//! system calls one at a time, which it finds in a [`Slot`] of shared memory.

use crate::{Check, mmap_anon, ok};
use std::arch::asm;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// What is asked instead of a system call.
const SPAWN: i64 = -1;
const PEEK: i64 = -2;
const POKE: i64 = -3;

const IDLE: u32 = 0;
const ASKED: u32 = 1;
const ANSWERED: u32 = 2;

/// Where a process finds its next call.
#[repr(C)]
struct Slot {
    turn: AtomicU32,
    nr: i64,
    args: [u64; 6],
    result: i64,
    /// Room for what calls read or write.
    data: [u8; 2048],
}

const STACK: usize = 64 << 10;

fn syscall(nr: i64, a: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: whoever asks answers for the call; the registers are those that a system call takes and clobbers. The C library's
    // function would write to an errno that another process may be using.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _);
    }
    result
}

fn futex(word: &AtomicU32, op: i32, value: u32) {
    let pause = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    let word = std::ptr::from_ref(word) as u64;
    syscall(libc::SYS_futex, [word, op as u64, u64::from(value), &raw const pause as u64, 0, 0]);
}

fn clone(flags: u64, slot: u64, stack: u64) -> i64 {
    // SAFETY: the slot outlives the process, and the stack is nobody else's.
    let made = unsafe {
        libc::clone(serve, stack as *mut libc::c_void, flags as i32, slot as *mut libc::c_void)
    };
    i64::from(made)
}

/// The life of such a process.
extern "C" fn serve(slot: *mut libc::c_void) -> i32 {
    // SAFETY: the maker passes the address of a slot; the asker does not touch it while it is the other's turn.
    let slot = unsafe { &mut *slot.cast::<Slot>() };
    loop {
        if slot.turn.load(Ordering::Acquire) != ASKED {
            let seen = slot.turn.load(Ordering::Acquire);
            if seen != ASKED {
                futex(&slot.turn, libc::FUTEX_WAIT, seen);
            }
            continue;
        }
        let [a, b, c, ..] = slot.args;
        slot.result = match slot.nr {
            SPAWN => clone(a, b, c),
            // SAFETY: the asker knows the address in this process.
            PEEK => unsafe { (a as *const i64).read_volatile() },
            POKE => {
                // SAFETY: as above.
                unsafe { (a as *mut u64).write_volatile(b) };
                0
            }
            nr => syscall(nr, slot.args),
        };
        slot.turn.store(ANSWERED, Ordering::Release);
        futex(&slot.turn, libc::FUTEX_WAKE, i32::MAX as u32);
    }
}

/// How many there can be.
const MOST: usize = 24;

/// Address of a slot that nobody uses, and the end of a stack. All are mapped before the first process is made, so every process
/// finds them at the same place.
fn place() -> Result<(u64, u64), String> {
    static POOL: OnceLock<Result<(u64, u64), String>> = OnceLock::new();
    static USED: AtomicUsize = AtomicUsize::new(0);
    let pool = POOL.get_or_init(|| {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let slots = mmap_anon(MOST * size_of::<Slot>(), both, shared)? as u64;
        Ok((slots, mmap_anon(MOST * STACK, both, private)? as u64))
    });
    let (slots, stacks) = pool.clone()?;
    let n = USED.fetch_add(1, Ordering::Relaxed);
    crate::ensure!(n < MOST, "more than {MOST} processes");
    Ok((slots + (n * size_of::<Slot>()) as u64, stacks + ((n + 1) * STACK) as u64))
}

/// A process that does what it is asked to.
#[derive(Debug)]
pub struct Kin {
    name: &'static str,
    /// Its pid (of a thread: its tid).
    pub pid: i32,
    slot: *mut Slot,
}

impl Kin {
    /// Makes one as a child of the caller that shares what the flags say.
    pub fn child(name: &'static str, flags: i32) -> Result<Kin, String> {
        let (slot, stack) = place()?;
        let pid = ok(clone(flags as u64 | libc::SIGCHLD as u64, slot, stack), name)?;
        Kin::made(name, pid as i32, slot)
    }

    /// Has this one make another: a child, a sibling (`CLONE_PARENT`) or a thread.
    pub fn spawn(&self, name: &'static str, flags: i32) -> Result<Kin, String> {
        let (slot, stack) = place()?;
        let signal = if flags & libc::CLONE_THREAD != 0 { 0 } else { libc::SIGCHLD };
        let pid = self.act(SPAWN, [(flags | signal) as u64, slot, stack, 0, 0, 0]);
        Kin::made(name, ok(pid, name)? as i32, slot)
    }

    fn made(name: &'static str, pid: i32, slot: u64) -> Result<Kin, String> {
        let kin = Kin { name, pid, slot: slot as *mut Slot };
        // It is where it waits for what it is to do.
        let death = [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0];
        kin.call(libc::SYS_prctl, death)?;
        Ok(kin)
    }

    fn act(&self, nr: i64, args: [u64; 6]) -> i64 {
        // SAFETY: the slot lives as long as this program.
        let slot = unsafe { &mut *self.slot };
        (slot.nr, slot.args) = (nr, args);
        slot.turn.store(ASKED, Ordering::Release);
        futex(&slot.turn, libc::FUTEX_WAKE, i32::MAX as u32);
        while slot.turn.load(Ordering::Acquire) == ASKED {
            futex(&slot.turn, libc::FUTEX_WAIT, ASKED);
        }
        slot.turn.store(IDLE, Ordering::Release);
        slot.result
    }

    /// Has it make a system call; returns what the kernel returned, `-errno` if it failed.
    pub fn try_call(&self, nr: i64, args: [u64; 6]) -> i64 {
        self.act(nr, args)
    }

    /// Has it make a system call that must not fail.
    pub fn call(&self, nr: i64, args: [u64; 6]) -> Result<i64, String> {
        match self.act(nr, args) {
            result if (-4095..0).contains(&result) => {
                Err(format!("{}: system call {nr}: errno {}", self.name, -result))
            }
            result => Ok(result),
        }
    }

    /// What it sees at an address.
    pub fn peek(&self, address: u64) -> i64 {
        self.act(PEEK, [address, 0, 0, 0, 0, 0])
    }

    /// Has it write to an address.
    pub fn poke(&self, address: u64, value: u64) {
        self.act(POKE, [address, value, 0, 0, 0, 0]);
    }

    /// The address of memory that it and the caller have in common: for what calls read or write.
    pub fn data(&self) -> u64 {
        // SAFETY: only the address is taken.
        unsafe { &raw const (*self.slot).data as u64 }
    }

    /// Puts a path (or any bytes, a zero after them) where the process finds it.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        // SAFETY: it is not the process's turn.
        let data = unsafe { &mut (*self.slot).data };
        data[..bytes.len()].copy_from_slice(bytes);
        data[bytes.len()] = 0;
        self.data()
    }

    /// The first bytes of its data.
    pub fn get(&self, len: usize) -> Vec<u8> {
        // SAFETY: it is not the process's turn.
        unsafe { (&(*self.slot).data)[..len].to_vec() }
    }

    /// Ends it; `parent` is who has to wait for it, if not the caller.
    pub fn end(self, parent: Option<&Kin>) -> Check {
        // SAFETY: as in `act`; there will be no answer.
        let slot = unsafe { &mut *self.slot };
        (slot.nr, slot.args) = (libc::SYS_exit_group, [0; 6]);
        slot.turn.store(ASKED, Ordering::Release);
        futex(&slot.turn, libc::FUTEX_WAKE, i32::MAX as u32);
        match parent {
            Some(parent) => {
                parent.call(libc::SYS_wait4, [self.pid as u64, 0, 0, 0, 0, 0]).map(drop)
            }
            None => crate::ensured(crate::wait4(self.pid, 0)?, self.name),
        }
    }
}
