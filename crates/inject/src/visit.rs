//! Visits to the threads of a process that has an agent inside: what only a thread itself can tell.
//!
//! As many threads at a time as there are slots in the padding run the visitor's few system calls and tell; whoever is done
//! makes room for the next.

use crate::interrupted::self_resuming;
use crate::live::{Live, VISIT_RESULTS_AT};
use crate::tell::{self, Owed};
use crate::tracee::Stopped;
use crate::{Error, Result};
use rewake_agent::arch::{VisitorResult, VisitorSlot};
use rewake_sys::ptrace::{self, Registers};
use std::collections::VecDeque;
use std::os::unix::fs::FileExt;

/// What only a thread itself can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visited {
    /// Alternate stack, thread id's address, parent-death signal.
    pub result: VisitorResult,
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_TIMERSLACK`, in nanoseconds.
    pub timer_slack: u64,
    /// What `PR_SET_TIMERSLACK` goes back to with 0, in nanoseconds; 0 where the kernel does not tell (real-time policies).
    pub default_timer_slack: u64,
}

/// A thread that is to be visited: it stands in a ptrace stop with this signal mask.
#[derive(Debug)]
pub struct Host {
    /// The thread.
    pub thread: Stopped,
    /// The registers with which it goes on afterwards; see [`crate::interrupted::out_of_sequence`].
    pub regs: Registers,
    /// Its signal mask.
    pub mask: u64,
}

/// System calls of the visitor before it tells.
const QUESTIONS: usize = 9;

impl Live {
    /// Asks threads of the process what only they can tell. They stand in a ptrace stop with the registers and masks given
    /// afterwards, in the same order.
    ///
    /// # Errors
    /// A thread is gone, or there was no room for a visitor in the process.
    pub fn visit(&self, hosts: Vec<Host>) -> Result<Vec<(Stopped, Visited)>> {
        let slots = if self.signal == 0 { 1 } else { self.room.visitors };
        if self.room.visitors == 0 && !hosts.is_empty() {
            return Err(Error::NoRoom { needed: self.boot.len(1) });
        }
        let mut owed = Owed::default();
        let mut done = Vec::with_capacity(hosts.len());
        let mut rest = hosts.into_iter();
        // Whoever comes home makes room for the next one at once, so that all slots are always in use: a CPU that falls
        // idle meanwhile takes longer to wake than a visit takes.
        let mut on_their_way: VecDeque<(usize, Host)> = VecDeque::with_capacity(slots);
        let mut failed = None;
        let first: Vec<Host> = rest.by_ref().take(slots).collect();
        if let Err(e) = self.fill_slots(0, &first) {
            failed = Some(e);
        }
        for (slot, host) in first.into_iter().enumerate() {
            self.set_out(slot, host, &mut on_their_way, &mut failed);
        }
        while let Some((slot, host)) = on_their_way.pop_front() {
            let tid = host.thread.tid();
            match self.bring_home(slot, host, &mut owed) {
                Ok(visited) => done.push(visited),
                Err(e) => {
                    self.abandon(tid);
                    failed.get_or_insert(e);
                }
            }
            // Whoever fails, those on their way are brought home all the same.
            if failed.is_none()
                && let Some(host) = rest.next()
            {
                if let Err(e) = self.fill_slots(slot, std::slice::from_ref(&host)) {
                    failed = Some(e);
                }
                self.set_out(slot, host, &mut on_their_way, &mut failed);
            }
        }
        for host in rest {
            let_go(host);
        }
        self.owed.borrow_mut().merge(owed);
        failed.map_or(Ok(done), Err)
    }

    /// Sends a thread into its slot, unless something has failed.
    fn set_out(
        &self,
        slot: usize,
        host: Host,
        on_their_way: &mut VecDeque<(usize, Host)>,
        failed: &mut Option<Error>,
    ) {
        if failed.is_some() {
            return let_go(host);
        }
        match self.send(slot, &host) {
            Ok(()) => on_their_way.push_back((slot, host)),
            Err(e) => {
                self.abandon(host.thread.tid());
                *failed = Some(e);
            }
        }
    }

    /// Leaves a thread to itself, wherever in the visitor it is: it goes back alone, through code that must be there for
    /// it until then. If it is running and thus cannot be let go, the end of its tracer lets it go.
    fn abandon(&self, tid: i32) {
        self.abandoned.set(true);
        let _ = ptrace::detach(tid, 0);
    }

    fn send(&self, slot: usize, Host { thread, regs, .. }: &Host) -> Result<()> {
        thread.set_registers(&Registers {
            rip: self.room.address + self.boot.visitor as u64,
            r13: self.room.address + self.boot.slot(slot) as u64,
            orig_rax: u64::MAX,
            ..*regs
        })?;
        // After the registers: the visitor gives the thread its mask back by itself, if it must.
        ptrace::set_signal_mask(thread.tid(), tell::quiet_mask(self.signal))
            .map_err(Error::syscall("blocking signals"))?;
        if self.signal != 0 {
            ptrace::cont(thread.tid(), 0).map_err(Error::syscall("continuing a thread"))?;
        }
        Ok(())
    }

    /// Waits until a thread has told, takes its answers and puts it back to where it was.
    fn bring_home(&self, slot: usize, host: Host, owed: &mut Owed) -> Result<(Stopped, Visited)> {
        let Host { thread, regs, mask } = host;
        let (tid, group_stop) = (thread.tid(), thread.group_stop());
        let (mut stopped, answers) = if self.signal != 0 {
            let (stopped, at) = tell::wait_told(tid, self.signal, mask, owed)?;
            (tell::forget(stopped, self.signal, mask, owed)?, at)
        } else {
            let stopped = tell::follow(thread, 2 * QUESTIONS, owed)?;
            let at = stopped.registers()?;
            (stopped.to_event_stop()?, at)
        };
        // The mask first: whoever is still in the visitor gets it back anyway.
        ptrace::set_signal_mask(tid, mask).map_err(Error::syscall("restoring the signal mask"))?;
        stopped.set_registers(&regs)?;
        stopped.set_group_stop(group_stop);
        self.take_over()?;
        // SAFETY: VisitorResult is a struct of integers.
        let result = unsafe { self.map.get(result_at(slot)) };
        let visited = Visited {
            result,
            securebits: answers.rdx as u32,
            timer_slack: answers.r10,
            default_timer_slack: answers.r8,
        };
        Ok((stopped, visited))
    }

    /// Writes what visitors need to go back alone, from slot `from` on, in one piece.
    fn fill_slots(&self, from: usize, hosts: &[Host]) -> Result<()> {
        let first = self.boot.slot(from);
        let mut bytes = self.boot.bytes[first..self.boot.slot(from + hosts.len())].to_vec();
        for (n, Host { regs, mask, .. }) in (from..).zip(hosts) {
            let resumed = self_resuming(regs);
            let at = self.boot.slot(n);
            let slot = VisitorSlot {
                registers: [
                    resumed.rax,
                    resumed.rdi,
                    resumed.rsi,
                    resumed.rdx,
                    resumed.r10,
                    resumed.rcx,
                    resumed.r11,
                    resumed.r13,
                    resumed.rip,
                    resumed.r8,
                ],
                mask: *mask,
                out: self.ring.header_address() - crate::map::PAGE as u64 + result_at(n) as u64,
                tail: self.room.address + (at + size_of::<VisitorSlot>()) as u64,
            };
            let words = slot.registers.into_iter().chain([slot.mask, slot.out, slot.tail]);
            for (i, word) in words.enumerate() {
                let to = at - first + i * 8;
                bytes[to..to + 8].copy_from_slice(&word.to_ne_bytes());
            }
        }
        self.memory.write_all_at(&bytes, self.room.address + first as u64).map_err(|_| {
            Error::Inside { what: "saving registers", errno: rewake_sys::Errno::FAULT }
        })
    }
}

/// Lets a thread go that was not touched yet. If it is dead, that is no news.
fn let_go(host: Host) {
    drop(host.thread.detach(0));
}

/// Where the result of slot `n` lies in the mapping.
fn result_at(n: usize) -> usize {
    VISIT_RESULTS_AT + n * size_of::<VisitorResult>()
}
