//! Interval timers and POSIX timers.

use super::declare::messages;

messages! {
    /// The timers of a process.
    message TaskTimersEntry "task_timers_entry" {
        /// ITIMER_REAL.
        required message ItimerEntry real = 1;
        /// ITIMER_VIRTUAL.
        required message ItimerEntry virt = 2;
        /// ITIMER_PROF.
        required message ItimerEntry prof = 3;
        /// POSIX timers.
        repeated message PosixTimerEntry posix = 4;
    }

    /// An interval timer: setitimer(2).
    message ItimerEntry "itimer_entry" {
        /// Interval s.
        required uint64 isec = 1;
        /// Interval us.
        required uint64 iusec = 2;
        /// Remaining s.
        required uint64 vsec = 3;
        /// Remaining us.
        required uint64 vusec = 4;
    }

    /// A POSIX timer: timer_create(2).
    message PosixTimerEntry "posix_timer_entry" {
        /// Kernel timer id.
        required uint32 it_id = 1;
        /// CLOCK_*.
        required uint32 clock_id = 2;
        /// Signal.
        required uint32 si_signo = 3;
        /// SIGEV_* (0 signal, 1 none, 2 thread, 4 thread_id).
        required uint32 it_sigev_notify = 4;
        /// sigev_value.
        required uint64 sival_ptr = 5;
        /// Overrun count.
        required uint32 overrun = 6;
        /// Interval s.
        required uint64 isec = 7;
        /// Interval ns.
        required uint64 insec = 8;
        /// Remaining s.
        required uint64 vsec = 9;
        /// Remaining ns.
        required uint64 vnsec = 10;
        /// Tid (in-ns) for SIGEV_THREAD_ID.
        optional int32 notify_thread_id = 11;
    }
}
