//! Credentials, seccomp filters and AppArmor policies.

use super::declare::{enums, messages};

enums! {
    /// Seccomp mode of a thread.
    enum SeccompMode "seccomp_mode" {
        Disabled "disabled" = 0;
        Strict "strict" = 1;
        Filter "filter" = 2;
    }
}

messages! {
    /// Credentials: credentials(7). Ids are as seen in the task's user namespace; capability sets are two words, low
    /// and high.
    message CredsEntry "creds_entry" {
        required uint32 uid = 1;
        required uint32 gid = 2;
        required uint32 euid = 3;
        required uint32 egid = 4;
        required uint32 suid = 5;
        required uint32 sgid = 6;
        required uint32 fsuid = 7;
        required uint32 fsgid = 8;
        repeated uint32 cap_inh = 9;
        repeated uint32 cap_prm = 10;
        repeated uint32 cap_eff = 11;
        repeated uint32 cap_bnd = 12;
        required uint32 secbits = 13;
        repeated uint32 groups = 14;
        /// AppArmor profile or SELinux context.
        optional string lsm_profile = 15;
        /// SELinux context for new sockets.
        optional string lsm_sockcreate = 16;
        /// Old; not written.
        optional bytes apparmor_data = 17;
        /// Present only if set.
        optional uint32 no_new_privs = 18;
        repeated uint32 cap_amb = 19;
    }

    /// All seccomp filters: `seccomp.img`.
    message SeccompEntry "seccomp_entry" {
        /// All chains one after the other; within a chain, the newest filter first.
        repeated message SeccompFilter seccomp_filters = 1;
    }

    /// A seccomp filter.
    message SeccompFilter "seccomp_filter" {
        /// An array of `struct sock_filter`.
        required bytes filter = 1;
        /// Index of the filter that was installed after this one (its name says the opposite; this is how it is used).
        optional uint32 prev = 2;
        /// `SECCOMP_FILTER_FLAG_*`; TSYNC if all threads of the process have the same chain.
        optional uint32 flags = 3;
    }

    /// AppArmor policies: `apparmor.img`.
    message ApparmorEntry "apparmor_entry" {
        repeated message AaNamespace namespaces = 1;
    }

    /// An AppArmor policy namespace.
    message AaNamespace "aa_namespace" {
        required string name = 1;
        repeated message AaPolicy policies = 2;
        repeated message AaNamespace namespaces = 3;
    }

    /// An AppArmor profile.
    message AaPolicy "aa_policy" {
        required string name = 1;
        required bytes blob = 2;
    }
}
