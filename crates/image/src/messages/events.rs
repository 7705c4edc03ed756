//! eventfd, epoll, signalfd, timerfd and pidfd.

use super::{FownEntry, declare::messages};

messages! {
    /// An eventfd(2).
    message EventfdFileEntry "eventfd_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`. `EFD_SEMAPHORE` has no place here, so CRIU
        /// loses it.
        required uint32 flags = 2;
        required message FownEntry fown = 3;
        required uint64 counter = 4;
    }

    /// An epoll(7) instance.
    message EventpollFileEntry "eventpoll_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2;
        required message FownEntry fown = 3;
        /// In old images they are in `eventpoll-tfd.img`.
        repeated message EventpollTfdEntry tfd = 4;
    }

    /// A file watched by an epoll instance.
    message EventpollTfdEntry "eventpoll_tfd_entry" {
        /// 0; in `eventpoll-tfd.img`, the id of the epoll instance.
        required uint32 id = 1;
        /// The descriptor it was added by.
        required uint32 tfd = 2;
        /// `EPOLL*`
        required uint32 events = 3;
        required uint64 data = 4;
        /// Device of the watched file, in the kernel's encoding: tells if the descriptor is another file now.
        optional uint32 dev = 5;
        optional uint64 inode = 6;
        optional uint64 pos = 7;
    }

    /// A signalfd(2).
    message SignalfdEntry "signalfd_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        required message FownEntry fown = 3;
        required uint64 sigmask = 4 [hex];
    }

    /// A timerfd_create(2).
    message TimerfdEntry "timerfd_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        required message FownEntry fown = 3;
        required uint32 clockid = 4;
        required uint64 ticks = 5;
        required uint32 settime_flags = 6 [hex];
        /// Time left, seconds.
        required uint64 vsec = 7;
        required uint64 vnsec = 8;
        /// Interval, seconds.
        required uint64 isec = 9;
        required uint64 insec = 10;
    }

    /// A pidfd_open(2).
    message PidfdEntry "pidfd_entry" {
        required uint32 id = 1;
        /// Inode number, the same for all pidfds of a process.
        required uint32 ino = 2;
        /// Open flags without `O_RDWR`.
        required uint32 flags = 3;
        /// The pid, or -1 if the process is dead.
        required int32 nspid = 4;
        required message FownEntry fown = 5;
    }
}
