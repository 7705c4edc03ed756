//! What a checkpoint consists of: the inventory, the process tree, and the identities of kernel objects.

use super::declare::{enums, messages};

enums! {
    /// Linux security module of the dumping host.
    enum Lsmtype "lsmtype" {
        NoLsm "NO_LSM" = 0;
        Selinux "SELINUX" = 1;
        Apparmor "APPARMOR" = 2;
    }
}

messages! {
    /// The root of a checkpoint: `inventory.img`.
    message InventoryEntry "inventory_entry" {
        /// 2: images start with two magic numbers (what is written now); 1: with one; 0: a pre-dump; 1000: as 2, but pagemaps
        /// name other page stores than their own, which CRIU does not know ([`SEVERAL_STORES`](super::SEVERAL_STORES)); 1001 and
        /// 1002: also compressed ([`Compression`](crate::Compression)).
        required uint32 img_version = 1;
        /// Whether the `N` of `fdinfo-N.img` is a `files_id`. Otherwise the images are too old.
        optional bool fdinfo_per_id = 2;
        /// The dumping program's own ids: namespaces with other ids are the tree's own.
        optional message TaskKobjIdsEntry root_ids = 3;
        /// Whether a namespace's images are named by its id; in old images, by its owner's pid.
        optional bool ns_per_id = 4;
        /// The dumping program's cgroup set. Never 0; absent if it had no privileges.
        optional uint32 root_cg_set = 5;
        optional enum Lsmtype lsmtype = 6;
        /// Uptime at the end of the dump, in microseconds, if memory was tracked: tells the next dump which pids are
        /// reused.
        optional uint64 dump_uptime = 8;
        /// How memory was read, in a pre-dump: 1 splice, 2 read.
        optional uint32 pre_dump_mode = 9;
        /// Whether the dump closed TCP connections (`--tcp-close`); the restore must then do so too.
        optional bool tcp_close = 10;
        /// 0 or absent: iptables; 1: nftables; 2: none. One less than the number in the RPC.
        optional uint32 network_lock_method = 11;
        /// A restore needs these plugins. Absent in old images, which may need any.
        optional message PluginsEntry plugins_entry = 12;
        /// A UUID as text. Names the nftables table that locks the network, `inet CRIU-UUID`.
        optional string dump_criu_run_id = 13;
        /// Whether there is a uprobes mapping; the restore must then allow it.
        optional bool allow_uprobes = 14;
    }

    /// The plugins that took part in a dump.
    message PluginsEntry "plugins_entry" {
        /// Names.
        repeated string plugins = 12;
    }

    /// A process: `pstree.img`.
    message PstreeEntry "pstree_entry" {
        /// The pid in its own PID namespace, as everywhere in the images.
        required uint32 pid = 1;
        /// 0 for the root of the tree. Parents come before their children.
        required uint32 ppid = 2;
        /// 0: a group outside the PID namespace.
        required uint32 pgid = 3;
        required uint32 sid = 4;
        /// Thread ids. The first is the leader's, that is, `pid`; a zombie's may be anything.
        repeated uint32 threads = 5;
    }

    /// Which kernel objects a task uses, for telling which tasks share them: `ids-PID.img`.
    message TaskKobjIdsEntry "task_kobj_ids_entry" {
        required uint32 vm_id = 1;
        /// `N` of `fdinfo-N.img`. Tasks with the same id share the table.
        required uint32 files_id = 2;
        required uint32 fs_id = 3;
        required uint32 sighand_id = 4;
        /// The ids of namespaces of all types are from one sequence. One that is in the inventory's `root_ids` is
        /// inherited.
        optional uint32 pid_ns_id = 5;
        /// `N` of `netns-N.img` and such.
        optional uint32 net_ns_id = 6;
        optional uint32 ipc_ns_id = 7;
        optional uint32 uts_ns_id = 8;
        /// `N` of `mountpoints-N.img`.
        optional uint32 mnt_ns_id = 9;
        optional uint32 user_ns_id = 10;
        optional uint32 cgroup_ns_id = 11;
        optional uint32 time_ns_id = 12;
    }
}
