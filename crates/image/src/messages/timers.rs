//! Interval timers and POSIX timers.

use super::declare::messages;

messages! {
    /// The timers of a process.
    message TaskTimersEntry "task_timers_entry" {
        required message ItimerEntry real = 1;
        required message ItimerEntry virt = 2;
        required message ItimerEntry prof = 3;
        repeated message PosixTimerEntry posix = 4;
    }

    /// An interval timer: setitimer(2).
    message ItimerEntry "itimer_entry" {
        /// Interval, seconds.
        required uint64 isec = 1;
        /// Interval, microseconds.
        required uint64 iusec = 2;
        /// Time left, seconds.
        required uint64 vsec = 3;
        /// Time left, microseconds.
        required uint64 vusec = 4;
    }

    /// A POSIX timer: timer_create(2).
    message PosixTimerEntry "posix_timer_entry" {
        required uint32 it_id = 1;
        required uint32 clock_id = 2;
        required uint32 si_signo = 3;
        /// `SIGEV_*`, as in sigevent(3type).
        required uint32 it_sigev_notify = 4;
        required uint64 sival_ptr = 5;
        required uint32 overrun = 6;
        /// Interval, seconds.
        required uint64 isec = 7;
        /// Interval, nanoseconds.
        required uint64 insec = 8;
        /// Time left, seconds.
        required uint64 vsec = 9;
        /// Time left, nanoseconds.
        required uint64 vnsec = 10;
        /// The thread to notify, with `SIGEV_THREAD_ID`.
        optional int32 notify_thread_id = 11;
    }
}
