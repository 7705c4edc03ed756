//! Control groups: `cgroup.img`.

use super::declare::messages;

messages! {
    /// All control groups.
    message CgroupEntry "cgroup_entry" {
        /// All sets except criu's.
        repeated message CgSetEntry sets = 1;
        /// Trees to recreate.
        repeated message CgControllerEntry controllers = 2;
    }

    /// A set of cgroups, one for each hierarchy, that tasks are in.
    message CgSetEntry "cg_set_entry" {
        /// Set id (1 = criu's own set, not stored).
        required uint32 id = 1;
        /// Sorted by name.
        repeated message CgMemberEntry ctls = 2;
    }

    /// A cgroup of a set.
    message CgMemberEntry "cg_member_entry" {
        /// Controller set name; "" = unified v2.
        required string name = 1;
        /// Path of task in that hierarchy.
        required string path = 2;
        /// Length of the prefix of path that is the cgroup-namespace root.
        optional uint32 cgns_prefix = 3;
    }

    /// A hierarchy.
    message CgControllerEntry "cg_controller_entry" {
        /// co-mounted controller names (`name=x` for named; "" for v2).
        repeated string cnames = 1;
        /// Trees.
        repeated message CgroupDirEntry dirs = 2;
        /// Threaded capable.
        optional bool is_threaded = 3;
    }

    /// A cgroup directory.
    message CgroupDirEntry "cgroup_dir_entry" {
        /// Name of this component (no slashes except root path).
        required string dir_name = 1;
        repeated message CgroupDirEntry children = 2;
        repeated message CgroupPropEntry properties = 3;
        optional message CgroupPerms dir_perms = 4;
    }

    /// A file of a cgroup directory.
    message CgroupPropEntry "cgroup_prop_entry" {
        /// File name.
        required string name = 1;
        /// Content without newline handling.
        required string value = 2;
        /// owner/mode.
        optional message CgroupPerms perms = 3;
    }

    /// Mode and owner.
    message CgroupPerms "cgroup_perms" {
        required uint32 mode = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
    }
}
