//! UTS, time, PID and user namespaces.

use super::declare::messages;

messages! {
    /// Host and domain name: `utsns-ID.img`.
    message UtsnsEntry "utsns_entry" {
        /// Hostname.
        required string nodename = 1;
        /// `(none)` if unset.
        required string domainname = 2;
    }

    /// The clocks at the dump: `timens-ID.img`.
    message TimensEntry "timens_entry" {
        /// CLOCK_MONOTONIC read inside the ns at dump.
        required message Timespec monotonic = 1;
        /// CLOCK_BOOTTIME.
        required message Timespec boottime = 2;
    }

    /// A time: `struct timespec`.
    message Timespec "timespec" {
        /// S (absolute clock value at dump, not offset).
        required uint64 tv_sec = 1;
        /// Nanoseconds.
        required uint64 tv_nsec = 2;
    }

    /// An external PID namespace: `pidns-ID.img`.
    message PidnsEntry "pidns_entry" {
        /// External key; file only written for external pid ns.
        optional string ext_key = 1;
    }

    /// A user namespace: `userns-ID.img`.
    message UsernsEntry "userns_entry" {
        /// Extents.
        repeated message UidGidExtent uid_map = 1;
        /// Extents.
        repeated message UidGidExtent gid_map = 2;
    }

    /// A range of mapped ids: user_namespaces(7).
    message UidGidExtent "uid_gid_extent" {
        /// Inside.
        required uint32 first = 1;
        /// Outside.
        required uint32 lower_first = 2;
        /// Length.
        required uint32 count = 3;
    }
}
