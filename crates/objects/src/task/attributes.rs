//! The many small attributes a task sets with prctl(2) and asks the same way.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_inject::ring::{Data, Results, Script};

const PR_GET_PDEATHSIG: u64 = 2;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_DUMPABLE: u64 = 3;
const PR_SET_DUMPABLE: u64 = 4;
const PR_GET_SECUREBITS: u64 = 27;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_TID_ADDRESS: u64 = 40;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_GET_THP_DISABLE: u64 = 42;
const PR_GET_TSC: u64 = 25;
const PR_SET_TSC: u64 = 26;
const PR_SET_MDWE: u64 = 65;
const PR_GET_MDWE: u64 = 66;
const PR_SET_IO_FLUSHER: u64 = 57;
const PR_GET_IO_FLUSHER: u64 = 58;
/// What personality(2) answers without setting anything.
const PER_ASK: u64 = 0xffff_ffff;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;

/// Where the answers to [`ask`] will be.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    data: Data,
    first: usize,
}

/// What a process and its leader say of themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `clear_child_tid` of the leader.
    pub tid_address: u64,
    /// Parent-death signal of the leader, 0 if none.
    pub pdeath_sig: u32,
    /// Securebits of the leader.
    pub securebits: u32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: i32,
    /// Is it a subreaper?
    pub child_subreaper: bool,
    /// `PR_SET_THP_DISABLE` (bit 0) and its flags.
    pub thp_disable: u32,
    /// Current program break.
    pub brk: u64,
    /// `stack_t` of the leader: sp, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// `MEMBARRIER_CMD_GET_REGISTRATIONS`, 0 where unknown.
    pub membarrier: u32,
    /// `PR_GET_TSC`: 1 enabled, 2 SIGSEGV.
    pub tsc: u32,
    /// `PR_GET_MDWE` flags.
    pub mdwe: u32,
    /// `PR_GET_IO_FLUSHER`.
    pub io_flusher: bool,
    /// `PR_GET_TIMERSLACK` of the leader, in nanoseconds.
    pub timer_slack: u64,
    /// What `PR_SET_TIMERSLACK` goes back to with 0; 0 where the kernel does not tell.
    pub default_timer_slack: u64,
    /// `PER_*` and flags of personality(2).
    pub personality: u32,
}

/// Adds the questions.
pub fn ask(script: &mut Script) -> Asked {
    let data = script.space(72);
    let prctl = |script: &mut Script, args: &[u64]| script.push(Op::new(libc::SYS_prctl, args));
    let first = prctl(script, &[PR_GET_TID_ADDRESS, data.address]);
    prctl(script, &[PR_GET_PDEATHSIG, data.address + 8]);
    prctl(script, &[PR_GET_SECUREBITS]);
    prctl(script, &[PR_GET_DUMPABLE]);
    prctl(script, &[PR_GET_CHILD_SUBREAPER, data.address + 16]);
    prctl(script, &[PR_GET_THP_DISABLE, 0, 0, 0, 0]);
    script.push(Op::new(libc::SYS_brk, &[0]));
    script.push(Op::new(libc::SYS_sigaltstack, &[0, data.address + 24]));
    script.push(Op::new(libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS, 0, 0]));
    prctl(script, &[PR_GET_TSC, data.address + 48]);
    prctl(script, &[PR_GET_MDWE, 0, 0, 0, 0]);
    prctl(script, &[PR_GET_IO_FLUSHER, 0, 0, 0, 0]);
    let slack = prctl(script, &[PR_GET_TIMERSLACK]);
    // The default is only told by going back to it. The batch ends with the slack as it was even if its controller dies.
    prctl(script, &[PR_SET_TIMERSLACK, 0]);
    prctl(script, &[PR_GET_TIMERSLACK]);
    script.push(Op::new(libc::SYS_prctl, &[PR_SET_TIMERSLACK, 0]).arg_result(1, slack as u32, 0));
    script.push(Op::new(libc::SYS_personality, &[PER_ASK]));
    Asked { data, first }
}

/// Reads the answers.
#[must_use]
pub fn read(results: &Results, asked: Asked) -> Attributes {
    let Asked { data, first } = asked;
    Attributes {
        tid_address: results.u64(data, 0),
        pdeath_sig: results.u32(data, 8),
        securebits: results.or_zero(first + 2) as u32,
        dumpable: results.or_zero(first + 3) as i32,
        child_subreaper: results.u32(data, 16) != 0,
        thp_disable: results.or_zero(first + 5) as u32,
        brk: results.or_zero(first + 6) as u64,
        alternate_stack: (results.u64(data, 24), results.u32(data, 32), results.u64(data, 40)),
        membarrier: results.or_zero(first + 8) as u32,
        tsc: results.u32(data, 48),
        mdwe: results.or_zero(first + 10) as u32,
        io_flusher: results.or_zero(first + 11) != 0,
        timer_slack: results.or_zero(first + 12) as u64,
        default_timer_slack: results.or_zero(first + 14) as u64,
        personality: results.or_zero(first + 16) as u32,
    }
}

/// Sets process-wide attributes that need no particular place in the order.
pub fn restore_process(
    steps: &mut Steps,
    subreaper: bool,
    membarrier: u32,
    tsc: u32,
    io_flusher: bool,
) {
    // The root stub of an orphaned session is made a subreaper on the way, so 0 is set as well.
    steps.must(
        Label::Text("setting the subreaper attribute"),
        Op::new(libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER, u64::from(subreaper), 0, 0, 0]),
    );
    for command in (0..32).map(|b| 1u64 << b).filter(|c| u64::from(membarrier) & c != 0) {
        steps.wish(
            Label::Text("registering for membarrier"),
            Op::new(libc::SYS_membarrier, &[command, 0, 0]),
        );
    }
    if tsc == 2 {
        steps.must(
            Label::Text("setting TSC mode"),
            Op::new(libc::SYS_prctl, &[PR_SET_TSC, 2, 0, 0, 0]),
        );
    }
    if io_flusher {
        steps.wish(
            Label::Text("setting the I/O flusher attribute"),
            Op::new(libc::SYS_prctl, &[PR_SET_IO_FLUSHER, 1, 0, 0, 0]),
        );
    }
}

/// Sets what must come after all memory is in place.
pub fn restore_memory_policy(steps: &mut Steps, thp_disable: bool, mdwe: u32) {
    if thp_disable {
        steps.must(
            Label::Text("disabling transparent huge pages"),
            Op::new(libc::SYS_prctl, &[PR_SET_THP_DISABLE, 1, 0, 0, 0]),
        );
    }
    if mdwe != 0 {
        steps.must(
            Label::Text("denying memory that is writable and executable"),
            Op::new(libc::SYS_prctl, &[PR_SET_MDWE, u64::from(mdwe), 0, 0, 0]),
        );
    }
}

/// Sets what a change of credentials resets, after them.
pub fn restore_after_credentials(steps: &mut Steps, dumpable: Option<i32>, pdeath_sig: u32) {
    // 2 (suidsafe) cannot be asked for; the kernel sets it on its own where the sysctl says so.
    if let Some(dumpable) = dumpable.filter(|d| *d == 0 || *d == 1) {
        steps.must(
            Label::Text("setting the dumpable attribute"),
            Op::new(libc::SYS_prctl, &[PR_SET_DUMPABLE, dumpable as u64, 0, 0, 0]),
        );
    }
    restore_pdeath_sig(steps, pdeath_sig);
}

/// Sets the parent-death signal (0: none) of the calling thread.
pub fn restore_pdeath_sig(steps: &mut Steps, signal: u32) {
    steps.must(
        Label::Text("setting the parent-death signal"),
        Op::new(libc::SYS_prctl, &[PR_SET_PDEATHSIG, u64::from(signal), 0, 0, 0]),
    );
}
