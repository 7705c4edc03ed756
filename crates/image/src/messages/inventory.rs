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
        /// 2 = images with double magic (written by all recent versions); 1 = single magic; 0 in pre-dump
        /// inventories; other = refuse.
        required uint32 img_version = 1;
        /// Must be true (fdinfo-N keyed by files_id); older images refused.
        optional bool fdinfo_per_id = 2;
        /// Kobj ids of criu itself: reference for which namespaces of the tree are "new".
        optional message TaskKobjIdsEntry root_ids = 3;
        /// True: namespace images are named by ns id (false: by pid of owner, old).
        optional bool ns_per_id = 4;
        /// Cgroup set id of criu; nonzero when present; absent in unprivileged mode.
        optional uint32 root_cg_set = 5;
        /// LSM of dumping host.
        optional enum Lsmtype lsmtype = 6;
        /// Microseconds of uptime at dump end; only if track_mem; used for pid-reuse detection by the next iteration.
        optional uint64 dump_uptime = 8;
        /// 1 splice, 2 read; only in pre-dump inventories.
        optional uint32 pre_dump_mode = 9;
        /// Set if dumped with --tcp-close; restore must then use it too.
        optional bool tcp_close = 10;
        /// 0 iptables, 1 nftables, 2 skip (RPC enum minus 1); absent = iptables.
        optional uint32 network_lock_method = 11;
        /// Names of plugins that took part; absent (old) = any; listed but not loaded plugin = restore error.
        optional message PluginsEntry plugins_entry = 12;
        /// UUID text, 36 chars; names the nft lock table `inet CRIU-ID` to be removed at restore (some helpers build
        /// the name in a 32-byte buffer, see kernel-objects).
        optional string dump_criu_run_id = 13;
        /// Image contains an uprobes VMA; restore must pass --allow-uprobes.
        optional bool allow_uprobes = 14;
    }

    /// The plugins that took part in a dump.
    message PluginsEntry "plugins_entry" {
        /// Plugin name.
        repeated string plugins = 12;
    }

    /// A process: `pstree.img`.
    message PstreeEntry "pstree_entry" {
        /// in-ns pid.
        required uint32 pid = 1;
        /// 0 for root; parents always precede children in file.
        required uint32 ppid = 2;
        /// 0 = outside ns.
        required uint32 pgid = 3;
        /// Session.
        required uint32 sid = 4;
        /// in-ns tids; first = leader. For zombies one element with undefined value; readers must ignore index 0.
        repeated uint32 threads = 5;
    }

    /// Which kernel objects a task uses, for telling which tasks share them: `ids-PID.img`.
    message TaskKobjIdsEntry "task_kobj_ids_entry" {
        /// Mm identity.
        required uint32 vm_id = 1;
        /// Fd table; = N of fdinfo-N.img; equal ids = shared table.
        required uint32 files_id = 2;
        /// fs_struct.
        required uint32 fs_id = 3;
        /// Sighand.
        required uint32 sighand_id = 4;
        /// Ns ids: one number space for all ns types, criu's own ns get the first numbers; equal to root_ids =
        /// inherited.
        optional uint32 pid_ns_id = 5;
        /// N in netns images.
        optional uint32 net_ns_id = 6;
        /// Id of the namespace.
        optional uint32 ipc_ns_id = 7;
        /// Id of the namespace.
        optional uint32 uts_ns_id = 8;
        /// N in mountpoints-N.
        optional uint32 mnt_ns_id = 9;
        /// Id of the namespace.
        optional uint32 user_ns_id = 10;
        /// Id of the namespace.
        optional uint32 cgroup_ns_id = 11;
        /// Id of the namespace.
        optional uint32 time_ns_id = 12;
    }
}
