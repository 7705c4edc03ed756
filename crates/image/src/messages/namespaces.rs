//! UTS, time, PID and user namespaces.

use super::declare::messages;

messages! {
    /// Host and domain name: `utsns-ID.img`.
    message UtsnsEntry "utsns_entry" {
        required string nodename = 1;
        /// `(none)` if it is not set.
        required string domainname = 2;
    }

    /// The clocks at the dump: `timens-ID.img`.
    message TimensEntry "timens_entry" {
        /// `CLOCK_MONOTONIC`, as the tasks saw it.
        required message Timespec monotonic = 1;
        /// `CLOCK_BOOTTIME`, as the tasks saw it.
        required message Timespec boottime = 2;
    }

    /// A time: `struct timespec`.
    message Timespec "timespec" {
        /// Seconds.
        required uint64 tv_sec = 1;
        required uint64 tv_nsec = 2;
    }

    /// An external PID namespace: `pidns-ID.img`.
    message PidnsEntry "pidns_entry" {
        /// The key of the external namespace.
        optional string ext_key = 1;
    }

    /// A user namespace: `userns-ID.img`.
    message UsernsEntry "userns_entry" {
        repeated message UidGidExtent uid_map = 1;
        repeated message UidGidExtent gid_map = 2;
    }

    /// A range of mapped ids: user_namespaces(7).
    message UidGidExtent "uid_gid_extent" {
        /// First id within.
        required uint32 first = 1;
        /// First id without.
        required uint32 lower_first = 2;
        required uint32 count = 3;
    }
}
