//! What can go wrong with an agent.

use rewake_sys::SyscallError;

/// Why an agent could not be put in, used or taken out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call of the controller failed.
    #[error("{doing}: {source}")]
    Syscall {
        /// What was being done.
        doing: &'static str,
        /// The failure.
        source: SyscallError,
    },
    /// The thread ended while it was being looked at.
    #[error("thread {tid} ended meanwhile ({how})")]
    Gone {
        /// The thread.
        tid: i32,
        /// Exit code or signal.
        how: String,
    },
    /// The thread did not stop in time.
    #[error(
        "thread {tid} does not stop: it is in uninterruptible sleep, or the machine is very busy"
    )]
    Stuck {
        /// The thread.
        tid: i32,
    },
    /// A signal is about to be delivered (the thread stands in its delivery stop).
    #[error("signal {signal} arrived for thread {tid} at a bad moment")]
    Signal {
        /// The thread.
        tid: i32,
        /// The signal.
        signal: i32,
    },
    /// A stop of an unforeseen kind.
    #[error("thread {tid} stopped unexpectedly: {stop}")]
    Unexpected {
        /// The thread.
        tid: i32,
        /// The stop.
        stop: String,
    },
    /// A system call made inside the target failed.
    #[error("{what} inside the process failed: {errno}{}", way_out(what, *errno))]
    Inside {
        /// The call.
        what: &'static str,
        /// Why.
        errno: rewake_sys::Errno,
    },
    /// There is no room for the bootstrap in the target.
    #[error(
        "no executable mapping with {needed} unused bytes at its end to put the agent's entry into"
    )]
    NoRoom {
        /// Bytes needed.
        needed: usize,
    },
    /// A script does not fit its ring.
    #[error("a script of {ops} operations and {data} bytes does not fit its ring")]
    ScriptTooLarge {
        /// Operations.
        ops: usize,
        /// Bytes of data.
        data: usize,
    },
    /// The agent did not answer in time.
    #[error("the agent in process {pid} did not answer within {seconds} s")]
    Timeout {
        /// The process.
        pid: i32,
        /// How long was waited.
        seconds: u64,
    },
}

impl Error {
    /// Wraps a failed call with what was being done.
    pub fn syscall(doing: &'static str) -> impl FnOnce(SyscallError) -> Error {
        move |source| Error::Syscall { doing, source }
    }

    /// As [`Error::syscall`], for rustix's bare `errno`.
    pub fn errno(
        doing: &'static str,
        call: &'static str,
    ) -> impl FnOnce(rewake_sys::Errno) -> Error {
        move |errno| Error::Syscall { doing, source: SyscallError::new(call, errno) }
    }

    /// Did the process vanish under us?
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Error::Gone { .. } => true,
            Error::Syscall { source, .. } => source.errno == rewake_sys::Errno::SRCH,
            _ => false,
        }
    }
}

/// What to do about a failed call, where that is known.
fn way_out(what: &str, errno: rewake_sys::Errno) -> &'static str {
    match what {
        "mmap" if errno == rewake_sys::Errno::NOMEM => {
            " (its address space is as large, or has as many mappings, as it may: raise RLIMIT_AS with prlimit --as, or \
             vm.max_map_count)"
        }
        _ => "",
    }
}
