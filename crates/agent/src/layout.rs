//! The ring: what the controller writes and the agent executes.
//!
//! All structures are plain memory shared between two processes; every address in them is an address of the process
//! in which the agent runs.

/// One system call of a batch. 64 bytes, so that a batch of operations fills whole cache lines.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// System call number, or [`NOP`].
    pub nr: u32,
    /// A combination of the `FLAG` constants of this module.
    pub flags: u32,
    /// Arguments, as the system call takes them, changed by [`ref_flag`] and [`deref_flag`].
    pub args: [u64; 6],
    /// Result as the kernel returns it: `-errno` on failure.
    pub res: i64,
}

const _: () = assert!(core::mem::size_of::<Op>() == 64);

/// Number of an operation that does nothing and results in 0.
pub const NOP: u32 = u32::MAX;

/// Argument `i` is `(index << 32) | addend`: the result of operation `index` of the same batch plus the signed addend.
#[must_use]
pub const fn ref_flag(i: usize) -> u32 {
    1 << i
}

/// Argument `i` is the address of an `i32` whose value is passed (descriptors made by `socketpair`, `pipe2`…).
#[must_use]
pub const fn deref_flag(i: usize) -> u32 {
    1 << (8 + i)
}

/// Argument 0 is the address of a `u64` whose value is passed (ids made by `io_setup`).
pub const FLAG_WIDE: u32 = 1 << 14;
/// The batch ends here if this operation fails.
pub const FLAG_STOP: u32 = 1 << 16;
/// The operation is a clone; the child continues as an agent of its own on the ring whose [`Header`] is at argument 5.
pub const FLAG_CLONE: u32 = 1 << 17;
/// The low 32 bits of the result are also stored at the address in argument 5.
pub const FLAG_STORE: u32 = 1 << 18;
/// The result must equal argument 5; otherwise the agent leaves as if the controller were gone.
pub const FLAG_EXPECT: u32 = 1 << 20;
/// The batch is published and reported as done before this operation, which waits for something else than the controller. After
/// it the agent waits for nothing any more.
pub const FLAG_LAST: u32 = 1 << 21;
/// In [`Header::wait`]: a result of zero or below means that the controller is gone.
pub const FLAG_HANGUP: u32 = 1 << 19;

/// Head of a ring.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// Number of the batch the controller wants executed (a futex word).
    pub seq: u32,
    /// Number of the batch the agent has executed (a futex word).
    pub done: u32,
    /// Operations in the batch.
    pub count: u32,
    /// Operations of the last batch that were executed (fewer than `count` after a [`FLAG_STOP`]).
    pub executed: u32,
    /// Address of the batch's first [`Op`].
    pub ops: u64,
    /// Where the agent jumps when the controller is gone and the undo list has run; 0: it ends its process.
    pub exit: u64,
    /// Operations in the undo list.
    pub undo_count: u32,
    /// Unused.
    pub reserved: u32,
    /// Address of the undo list.
    pub undo: u64,
    /// Unused.
    pub reserved2: u64,
    /// The descriptors of the agent's socket pair, -1 when closed: its own end, the controller's end.
    pub sockets: [i32; 2],
    /// How the agent waits for the next batch.
    pub wait: Op,
    /// How the agent reports a finished one.
    pub report: Op,
}

const _: () = assert!(core::mem::size_of::<Header>() == 192);

/// Offsets of [`Header`] and [`Op`] fields, for the machine code.
pub mod offset {
    use super::{Header, Op};
    use core::mem::offset_of;

    /// [`Header::seq`].
    pub const SEQ: usize = offset_of!(Header, seq);
    /// [`Header::done`].
    pub const DONE: usize = offset_of!(Header, done);
    /// [`Header::count`].
    pub const COUNT: usize = offset_of!(Header, count);
    /// [`Header::executed`].
    pub const EXECUTED: usize = offset_of!(Header, executed);
    /// [`Header::ops`].
    pub const OPS: usize = offset_of!(Header, ops);
    /// [`Header::exit`].
    pub const EXIT: usize = offset_of!(Header, exit);
    /// [`Header::undo_count`].
    pub const UNDO_COUNT: usize = offset_of!(Header, undo_count);
    /// [`Header::undo`].
    pub const UNDO: usize = offset_of!(Header, undo);
    /// [`Header::sockets`].
    pub const SOCKETS: usize = offset_of!(Header, sockets);
    /// [`Header::wait`].
    pub const WAIT: usize = offset_of!(Header, wait);
    /// [`Header::report`].
    pub const REPORT: usize = offset_of!(Header, report);
    /// [`Op::nr`].
    pub const NR: usize = offset_of!(Op, nr);
    /// [`Op::flags`].
    pub const FLAGS: usize = offset_of!(Op, flags);
    /// [`Op::args`].
    pub const ARGS: usize = offset_of!(Op, args);
    /// [`Op::res`].
    pub const RES: usize = offset_of!(Op, res);
    /// Size of an [`Op`].
    pub const OP: usize = size_of::<Op>();
}

impl Op {
    /// An operation that does nothing.
    pub const NOTHING: Op = Op { nr: NOP, flags: 0, args: [0; 6], res: 0 };

    /// A system call with up to six arguments.
    ///
    /// # Panics
    /// At compile or test time if more than six arguments are given.
    #[must_use]
    pub fn new(nr: i64, args: &[u64]) -> Op {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        // System call numbers are small; linux's own type for them is an unsigned int.
        Op { nr: nr as u32, flags: 0, args: all, res: 0 }
    }

    /// Ends the batch if this operation fails.
    #[must_use]
    pub fn stop(mut self) -> Op {
        self.flags |= FLAG_STOP;
        self
    }

    /// Passes the result of operation `index` of the same batch, plus `addend`, as argument `i`.
    #[must_use]
    pub fn arg_result(mut self, i: usize, index: u32, addend: i32) -> Op {
        self.flags |= ref_flag(i);
        self.args[i] = (u64::from(index) << 32) | u64::from(addend as u32);
        self
    }

    /// Passes the `i32` found at `address` as argument `i`.
    #[must_use]
    pub fn arg_deref(mut self, i: usize, address: u64) -> Op {
        self.flags |= deref_flag(i);
        self.args[i] = address;
        self
    }

    /// Passes the `u64` found at `address` as argument 0.
    #[must_use]
    pub fn first_from(mut self, address: u64) -> Op {
        self.flags |= FLAG_WIDE;
        self.args[0] = address;
        self
    }

    /// Has the agent leave if the result is not `value`.
    #[must_use]
    pub fn expect(mut self, value: u64) -> Op {
        self.flags |= FLAG_EXPECT;
        self.args[5] = value;
        self
    }

    /// Ends the batch, which is reported as done before: the agent's last operation, which may wait for as long as it likes.
    #[must_use]
    pub fn last(mut self) -> Op {
        self.flags |= FLAG_LAST;
        self
    }

    /// The `errno` of a failed operation.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        // The kernel's error range is -4095..=-1.
        if (-4095..0).contains(&self.res) { Some(-self.res as i32) } else { None }
    }
}

impl Header {
    /// A header that waits for nothing and has no batch.
    pub const EMPTY: Header = Header {
        seq: 0,
        done: 0,
        count: 0,
        executed: 0,
        ops: 0,
        exit: 0,
        undo_count: 0,
        reserved: 0,
        undo: 0,
        reserved2: 0,
        sockets: [-1, -1],
        wait: Op::NOTHING,
        report: Op::NOTHING,
    };
}
