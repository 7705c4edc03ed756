//! Scripts and how an agent executes them.
//!
//! A [`Script`] is a list of operations and the data they point at, built without any process at hand: its data lie at
//! addresses that are known beforehand. A [`Ring`] is the controller's view of one agent's ring.

use crate::map::SharedMap;
use crate::{Error, Result};
use rewake_agent::layout::{Header, Op, offset};
use rewake_sys::futex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Offset of the data from the header; the operations follow the data.
const DATA_AT: usize = 256;

/// Operations for an agent and the data they use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Script {
    /// The operations, in order.
    pub ops: Vec<Op>,
    data: Vec<u8>,
    base: u64,
}

/// Data inside a script: where it will lie in the agent's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// Address in the agent's process.
    pub address: u64,
    /// Offset in the script's data.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

impl Script {
    /// An empty script whose data will lie at `base` in the agent's process.
    #[must_use]
    pub fn new(base: u64) -> Script {
        Script { ops: Vec::new(), data: Vec::new(), base }
    }

    /// Appends an operation and returns its index.
    pub fn push(&mut self, op: Op) -> usize {
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// Appends bytes that operations can point at (8-byte aligned).
    pub fn data(&mut self, bytes: &[u8]) -> Data {
        let data = self.space(bytes.len());
        self.data[data.offset..data.offset + data.len].copy_from_slice(bytes);
        data
    }

    /// Appends a NUL-terminated string.
    pub fn cstr(&mut self, bytes: &[u8]) -> Data {
        let data = self.space(bytes.len() + 1);
        self.data[data.offset..data.offset + bytes.len()].copy_from_slice(bytes);
        data
    }

    /// Appends zeroed room for results (8-byte aligned).
    pub fn space(&mut self, len: usize) -> Data {
        let offset = self.data.len().next_multiple_of(8);
        self.data.resize(offset + len, 0);
        Data { address: self.base + offset as u64, offset, len }
    }

    /// Overwrites data that was appended before.
    pub fn fill(&mut self, data: Data, at: usize, bytes: &[u8]) {
        self.data[data.offset + at..data.offset + at + bytes.len()].copy_from_slice(bytes);
    }

    /// Bytes of data so far.
    #[must_use]
    pub fn data_len(&self) -> usize {
        self.data.len()
    }

    /// Bytes a ring needs for this script alone.
    #[must_use]
    pub fn ring_size(&self) -> usize {
        Ring::size_for(self.ops.len(), self.data.len())
    }
}

/// The results of a script: its operations with results, and its data as the kernel left them.
#[derive(Debug, Clone)]
pub struct Results {
    /// Operations that were executed, with results.
    pub ops: Vec<Op>,
    data: Vec<u8>,
}

impl Results {
    /// The bytes of `data` after execution.
    #[must_use]
    pub fn bytes(&self, data: Data) -> &[u8] {
        &self.data[data.offset..data.offset + data.len]
    }

    /// A little word of `data`.
    #[must_use]
    pub fn u32(&self, data: Data, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes(data)[at..at + 4]);
        u32::from_ne_bytes(word)
    }

    /// A word of `data`.
    #[must_use]
    pub fn u64(&self, data: Data, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes(data)[at..at + 8]);
        u64::from_ne_bytes(word)
    }

    /// Result of operation `index`: the kernel's value, or the `errno`.
    ///
    /// # Errors
    /// The `errno` with which the call failed; `ECANCELED` if the batch ended before it.
    pub fn value(&self, index: usize) -> std::result::Result<i64, rewake_sys::Errno> {
        match self.ops.get(index) {
            None => Err(rewake_sys::Errno::CANCELED),
            Some(op) => match op.errno() {
                Some(errno) => Err(rewake_sys::Errno::from_raw_os_error(errno)),
                None => Ok(op.res),
            },
        }
    }

    /// Result of operation `index`, 0 if it failed.
    #[must_use]
    pub fn or_zero(&self, index: usize) -> i64 {
        self.value(index).unwrap_or(0)
    }
}

/// How the controller rouses an agent that waits.
#[derive(Debug)]
pub enum Doorbell {
    /// A message on the agent's socket; the agent sees our death as end of file.
    Socket(rustix::fd::OwnedFd),
    /// A futex on the batch number.
    Futex,
    /// None: it stands in a ptrace stop, and its tracer lets it go on.
    Tracer,
}

/// The controller's view of one agent's ring.
#[derive(Debug)]
pub struct Ring {
    map: Arc<SharedMap>,
    /// Offset of the header in the mapping.
    at: usize,
    /// Bytes of the ring from the header on.
    len: usize,
    /// Address of the header in the agent's process.
    remote: u64,
    /// Offset of the operations from the header.
    ops_at: usize,
    doorbell: Doorbell,
}

impl Ring {
    /// Bytes of a ring that holds `ops` operations and `data` bytes.
    #[must_use]
    pub const fn size_for(ops: usize, data: usize) -> usize {
        DATA_AT + data.next_multiple_of(64) + ops * size_of::<Op>()
    }

    /// Address at which a script's data will lie in a ring whose header is at `header`.
    #[must_use]
    pub fn data_address(header: u64) -> u64 {
        header + DATA_AT as u64
    }

    /// Address at which the operations of a script will lie in a ring with room for `data` bytes.
    #[must_use]
    pub fn ops_address(header: u64, data: usize) -> u64 {
        header + (DATA_AT + data.next_multiple_of(64)) as u64
    }

    /// A ring at offset `at` of `map`, seen by the agent at address `remote`, with room for `data` bytes and operations
    /// in the rest of `len`.
    #[must_use]
    pub fn new(
        map: Arc<SharedMap>,
        at: usize,
        len: usize,
        data: usize,
        remote: u64,
        doorbell: Doorbell,
    ) -> Ring {
        let ops_at = DATA_AT + data.next_multiple_of(64);
        assert!(ops_at <= len && at + len <= map.len(), "the ring lies inside its mapping");
        Ring { map, at, len, remote, ops_at, doorbell }
    }

    /// Address at which this ring's data lie in the agent's process.
    #[must_use]
    pub fn data_base(&self) -> u64 {
        Ring::data_address(self.remote)
    }

    /// How the agent is roused.
    pub(crate) fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Operations that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        (self.len - self.ops_at) / size_of::<Op>()
    }

    /// Bytes of data that fit.
    #[must_use]
    pub fn data_capacity(&self) -> usize {
        self.ops_at - DATA_AT
    }

    /// Address of the header in the agent's process.
    #[must_use]
    pub fn header_address(&self) -> u64 {
        self.remote
    }

    /// Writes the header of an agent that is about to start. Batch number 1 is the first to run.
    pub fn initialise(&self, header: &Header) {
        self.map.put(self.at, header);
    }

    /// Puts `script` into the ring as the next batch and returns the batch's number; does not rouse the agent.
    ///
    /// # Errors
    /// [`Error::ScriptTooLarge`].
    pub fn load(&self, script: &Script) -> Result<u32> {
        if script.ops.len() > self.capacity() || script.data.len() > self.data_capacity() {
            return Err(Error::ScriptTooLarge { ops: script.ops.len(), data: script.data.len() });
        }
        assert!(
            script.data.is_empty() || script.base == self.data_base(),
            "the script was built for this ring"
        );
        for (i, op) in script.ops.iter().enumerate() {
            self.map.put(self.at + self.ops_at + i * size_of::<Op>(), op);
        }
        self.map.write(self.at + DATA_AT, &script.data);
        self.map.put(self.at + offset::COUNT, &(script.ops.len() as u32));
        self.map.put(self.at + offset::OPS, &(self.remote + self.ops_at as u64));
        // Release: everything above is visible to whoever sees the new number.
        Ok(self.map.atomic(self.at + offset::SEQ).fetch_add(1, Ordering::Release) + 1)
    }

    /// Rouses an agent that waits.
    ///
    /// # Errors
    /// The agent's process is gone.
    pub fn ring(&self) -> Result<()> {
        match &self.doorbell {
            Doorbell::Futex => {
                futex::wake(self.map.atomic(self.at + offset::SEQ));
                Ok(())
            }
            Doorbell::Tracer => Ok(()),
            Doorbell::Socket(fd) => rustix::net::send(fd, b"!", rustix::net::SendFlags::NOSIGNAL)
                .map(drop)
                .map_err(Error::errno("rousing the agent", "send")),
        }
    }

    /// Makes the first word of the script's data 1, and rouses an agent whose script waits for that by futex(2).
    pub fn open_gate(&self) {
        let gate = self.map.atomic(self.at + DATA_AT);
        gate.store(1, Ordering::Release);
        futex::wake(gate);
    }

    /// Has batch `number` been executed?
    #[must_use]
    pub fn is_done(&self, number: u32) -> bool {
        self.map.atomic(self.at + offset::DONE).load(Ordering::Acquire) == number
    }

    /// Waits for batch `number`; `alive` is asked now and then and may end the wait with an error.
    ///
    /// # Errors
    /// Whatever `alive` returns.
    pub fn wait(&self, number: u32, mut alive: impl FnMut(Duration) -> Result<()>) -> Result<()> {
        let done = self.map.atomic(self.at + offset::DONE);
        // A wake-up costs 50 µs across CPUs here: look for a while first, letting others run in between.
        for _ in 0..200 {
            if done.load(Ordering::Acquire) == number {
                return Ok(());
            }
            std::thread::yield_now();
        }
        let start = Instant::now();
        loop {
            let seen = done.load(Ordering::Acquire);
            if seen == number {
                return Ok(());
            }
            futex::wait(done, seen, Duration::from_millis(20));
            if done.load(Ordering::Acquire) != number {
                alive(start.elapsed())?;
            }
        }
    }

    /// Reads back the results of `script`, whose batch is done.
    #[must_use]
    pub fn results(&self, script: &Script) -> Results {
        // SAFETY: a u32.
        let executed: u32 = unsafe { self.map.get(self.at + offset::EXECUTED) };
        let executed = (executed as usize).min(script.ops.len());
        let ops = (0..executed)
            // SAFETY: an Op is a struct of integers.
            .map(|i| unsafe { self.map.get::<Op>(self.at + self.ops_at + i * size_of::<Op>()) })
            .collect();
        let mut data = vec![0; script.data.len()];
        self.map.read(self.at + DATA_AT, &mut data);
        Results { ops, data }
    }

    /// Address of the batch-number word in the agent's process.
    #[must_use]
    pub fn seq_address(&self) -> u64 {
        self.remote + offset::SEQ as u64
    }

    /// Address of the executed-number word in the agent's process.
    #[must_use]
    pub fn done_address(&self) -> u64 {
        self.remote + offset::DONE as u64
    }
}
