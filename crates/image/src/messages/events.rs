//! eventfd, epoll, signalfd, timerfd and pidfd.

use super::{FownEntry, declare::messages};

messages! {
    /// An eventfd(2).
    message EventfdFileEntry "eventfd_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`. `EFD_SEMAPHORE` has no place here: CRIU
        /// restores a plain eventfd.
        required uint32 flags = 2;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 3;
        /// Value; restore passes it to eventfd(2) (32-bit).
        required uint64 counter = 4;
    }

    /// An epoll(7) instance.
    message EventpollFileEntry "eventpoll_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 3;
        /// Watches (old images: separate eventpoll-tfd.img).
        repeated message EventpollTfdEntry tfd = 4;
    }

    /// A file watched by an epoll instance.
    message EventpollTfdEntry "eventpoll_tfd_entry" {
        /// 0 (was epoll id in old separate image).
        required uint32 id = 1;
        /// Watched fd number in the owner task.
        required uint32 tfd = 2;
        /// EPOLL* mask incl. ERR/HUP.
        required uint32 events = 3;
        /// User data.
        required uint64 data = 4;
        /// Device of target (kernel encoding) for dup detection.
        optional uint32 dev = 5;
        /// Inode of target.
        optional uint64 inode = 6;
        /// File position.
        optional uint64 pos = 7;
    }

    /// A signalfd(2).
    message SignalfdEntry "signalfd_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 3;
        /// Accepted signals.
        required uint64 sigmask = 4 [hex];
    }

    /// A timerfd_create(2).
    message TimerfdEntry "timerfd_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 3;
        /// CLOCK_*.
        required uint32 clockid = 4;
        /// Unread expirations.
        required uint64 ticks = 5;
        /// TFD_TIMER_ABSTIME etc.
        required uint32 settime_flags = 6 [hex];
        /// Remaining.
        required uint64 vsec = 7;
        /// Nanoseconds.
        required uint64 vnsec = 8;
        /// Interval.
        required uint64 isec = 9;
        /// Nanoseconds.
        required uint64 insec = 10;
    }

    /// A pidfd_open(2).
    message PidfdEntry "pidfd_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Pidfs inode (equal inode + dead = same dead process).
        required uint32 ino = 2;
        /// Open flags minus O_RDWR.
        required uint32 flags = 3;
        /// in-ns pid, -1 = process already dead.
        required int32 nspid = 4;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 5;
    }
}
