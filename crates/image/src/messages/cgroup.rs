//! Control groups: `cgroup.img`.

use super::declare::messages;

messages! {
    /// All control groups.
    message CgroupEntry "cgroup_entry" {
        /// All but the one of the dumping program.
        repeated message CgSetEntry sets = 1;
        repeated message CgControllerEntry controllers = 2;
    }

    /// A set of cgroups, one for each hierarchy, that tasks are in.
    message CgSetEntry "cg_set_entry" {
        /// 1 is the dumping program's own set, which is not stored.
        required uint32 id = 1;
        /// By name.
        repeated message CgMemberEntry ctls = 2;
    }

    /// A cgroup of a set.
    message CgMemberEntry "cg_member_entry" {
        /// Of the hierarchy; empty for version 2.
        required string name = 1;
        required string path = 2;
        /// How much of the path, from its start, is the root of the cgroup namespace.
        optional uint32 cgns_prefix = 3;
    }

    /// A hierarchy.
    message CgControllerEntry "cg_controller_entry" {
        /// Names of its controllers; `name=…` for one without; empty for version 2.
        repeated string cnames = 1;
        repeated message CgroupDirEntry dirs = 2;
        optional bool is_threaded = 3;
    }

    /// A cgroup directory.
    message CgroupDirEntry "cgroup_dir_entry" {
        /// Name without slashes; of the topmost, the path.
        required string dir_name = 1;
        repeated message CgroupDirEntry children = 2;
        repeated message CgroupPropEntry properties = 3;
        optional message CgroupPerms dir_perms = 4;
    }

    /// A file of a cgroup directory.
    message CgroupPropEntry "cgroup_prop_entry" {
        required string name = 1;
        /// Its content as read.
        required string value = 2;
        optional message CgroupPerms perms = 3;
    }

    /// Mode and owner.
    message CgroupPerms "cgroup_perms" {
        required uint32 mode = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
    }
}
