//! Features around namespaces and security modules.

use std::fs::File;
use std::os::fd::AsFd;

use rewake_sys::probe;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Attempt, ensure, read};

/// `CLONE_NEWTIME` of clone(2); not in libc, since it collides with the exit signal there.
const CLONE_NEWTIME: i32 = 0x80;

pub fn user() -> Attempt {
    Ok(probe::unshare(libc::CLONE_NEWUSER)?)
}

pub fn cgroup() -> Attempt {
    Ok(probe::unshare(libc::CLONE_NEWCGROUP)?)
}

pub fn time() -> Attempt {
    read("/proc/self/timens_offsets")?;
    Ok(probe::unshare(CLONE_NEWTIME)?)
}

pub fn enter_network() -> Attempt {
    let outside = File::open("/proc/self/ns/net")?;
    probe::in_namespaces(libc::CLONE_NEWNET, || {
        Ok(move_into_link_name_space(outside.as_fd(), Some(LinkNameSpaceType::Network))?)
    })?
}

pub fn apparmor() -> Attempt {
    let stack = read("/sys/kernel/security/apparmor/features/domain/stack")?;
    ensure(stack.trim() == "yes", "AppArmor cannot stack profiles")
}
