//! What this kernel can do: one attempt per feature, for `check`.
//!
//! Every probe tries the interface itself, on objects of its own; none looks at version numbers. The names that CRIU's
//! `check --feature` knows are kept (criu(8)), ours are added. [`Category::Needed`] is what a plain dump and restore of
//! ours rests on; the others matter to programs that use the thing in question.

mod files;
mod memory;
mod namespaces;
mod netlink;
mod network;
mod tasks;

use std::fmt;

/// How much a missing feature matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// Checkpoint and restore do not work without it.
    Needed,
    /// Some programs cannot be saved, or not as fast, without it.
    Extra,
    /// New or rarely used.
    Experimental,
}

/// Outcome of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It works here.
    Present,
    /// It does not, for this reason.
    Missing(String),
}

/// Why an attempt failed.
#[derive(Debug)]
struct Reason(String);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        Reason(text.to_owned())
    }
}

impl From<std::io::Error> for Reason {
    fn from(error: std::io::Error) -> Self {
        Reason(error.to_string())
    }
}

impl From<rustix::io::Errno> for Reason {
    fn from(errno: rustix::io::Errno) -> Self {
        Reason(errno.to_string())
    }
}

impl From<rewake_sys::SyscallError> for Reason {
    fn from(error: rewake_sys::SyscallError) -> Self {
        Reason(error.to_string())
    }
}

/// What a probe returns.
type Attempt = Result<(), Reason>;

/// `Ok` if `holds`, or else the reason.
fn ensure(holds: bool, otherwise: &str) -> Attempt {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// A file of /proc or /sys as text, with its name in the error.
fn read(path: &str) -> Result<String, Reason> {
    std::fs::read_to_string(path).map_err(|e| Reason(format!("{path}: {e}")))
}

/// One feature of the kernel.
#[derive(Debug)]
pub struct Feature {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is good for.
    pub purpose: &'static str,
    /// How much it matters.
    pub category: Category,
    attempt: fn() -> Attempt,
}

impl Feature {
    /// Tries it.
    #[must_use]
    pub fn probe(&self) -> Verdict {
        match (self.attempt)() {
            Ok(()) => Verdict::Present,
            Err(Reason(why)) => Verdict::Missing(why),
        }
    }
}

/// The feature of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|feature| feature.name == name)
}

const fn needed(name: &'static str, purpose: &'static str, attempt: fn() -> Attempt) -> Feature {
    Feature { name, purpose, category: Category::Needed, attempt }
}

const fn extra(name: &'static str, purpose: &'static str, attempt: fn() -> Attempt) -> Feature {
    Feature { name, purpose, category: Category::Extra, attempt }
}

const fn rare(name: &'static str, purpose: &'static str, attempt: fn() -> Attempt) -> Feature {
    Feature { name, purpose, category: Category::Experimental, attempt }
}

/// All features, in the order in which `check` tries them.
#[rustfmt::skip]
pub static FEATURES: &[Feature] = &[
    // What everything rests on.
    needed("map_files", "files behind mappings", memory::map_files),
    needed("proc_stat", "addresses of /proc/PID/stat", tasks::proc_stat),
    needed("mnt_id", "mounts of descriptors", files::mnt_id),
    needed("fdinfo", "state of eventfd, epoll and inotify", files::fdinfo),
    needed("kcmp", "which tasks share what", tasks::kcmp),
    needed("prctl_mm", "layout of an address space", memory::mm_map),
    needed("fcntl_owner_uids", "owners of asynchronous descriptors", files::owner_uids),
    needed("ptrace_seize", "stopping tasks unnoticed", tasks::seize),
    needed("ptrace_peeksiginfo", "queued signals", tasks::peek_siginfo),
    needed("ptrace_xstate", "FPU and vector registers", tasks::xstate),
    needed("rt_sigqueueinfo", "putting signals back", tasks::queue_signal),
    needed("clone3_set_tid", "the same pids again", tasks::set_tid),
    needed("pidfd_open", "processes without races", tasks::pidfd_open),
    needed("pidfd_getfd", "the very descriptors of a process", tasks::pidfd_getfd),
    needed("process_vm_readv", "reading memory", memory::process_vm),
    needed("memfd_exec", "the agent's code", memory::memfd_exec),
    needed("can_map_vdso", "the vdso at its old address", memory::map_vdso),
    needed("vdso_mremap", "moving the vdso", memory::remap_vdso),
    needed("sock_diag", "sockets", network::sock_diag),
    needed("so_peek_off", "queues of unix sockets", network::peek_off),
    needed("so_get_filter", "socket filters", network::get_filter),
    needed("tcp_repair", "TCP connections", network::tcp_repair),
    needed("tty", "terminals", files::tty),
    needed("sysv_ipc", "System V IPC", files::sysv_ipc),
    // What some programs need, or what makes things faster.
    extra("pagemap_scan", "finding pages quickly", memory::pagemap_scan),
    extra("uffd", "memory on demand", memory::uffd),
    extra("uffd_wp_async", "copying memory while the tree runs", memory::uffd_wp_async),
    extra("mem_dirty_track", "incremental dumps", memory::soft_dirty),
    extra("aio_remap", "asynchronous I/O", memory::aio),
    extra("memfd_hugetlb", "memfds of huge pages", memory::memfd_hugetlb),
    extra("overlayfs_maps", "mapped files on overlayfs", memory::overlayfs),
    extra("timerfd", "timer descriptors", files::timerfd),
    extra("timer_cr_ids", "POSIX timers with their ids", tasks::timer_ids),
    extra("kcmp_epoll", "what an epoll watches", files::kcmp_epoll),
    extra("fdinfo_lock", "file locks", files::fdinfo_lock),
    extra("openat2", "opening files inside a root", files::openat2),
    extra("move_mount_set_group", "mount propagation", files::set_group),
    extra("tun", "tun devices", network::tun),
    extra("get_rseq_conf", "restartable sequences", tasks::rseq),
    extra("ptrace_syscall_info", "interrupted system calls", tasks::syscall_info),
    extra("ptrace_sud", "syscall user dispatch", tasks::user_dispatch),
    extra("breakpoints", "hardware breakpoints", tasks::breakpoint),
    extra("seccomp_filters", "seccomp filters", tasks::seccomp_filters),
    extra("seccomp_suspend", "tasks under seccomp", tasks::seccomp_suspend),
    extra("ns_pid", "pids inside namespaces", tasks::ns_pid),
    extra("pidfd_store", "telling reused pids apart", tasks::pidfd_getfd),
    extra("userns", "user namespaces", namespaces::user),
    extra("cgroupns", "cgroup namespaces", namespaces::cgroup),
    extra("timens", "clocks that go on", namespaces::time),
    extra("external_net_ns", "network namespaces from outside", namespaces::enter_network),
    extra("nsid", "ids of network namespaces", network::nsid),
    extra("link_nsid", "where the other end of a veth is", network::link_nsid),
    extra("newifindex", "network devices with their index", network::new_ifindex),
    extra("net_diag_raw", "raw sockets", network::diag_raw),
    extra("sk_ns", "the namespace of a socket", network::socket_namespace),
    extra("sk_unix_file", "files of unix sockets", network::unix_file),
    extra("sockopt_buf_lock", "fixed socket buffers", network::buf_lock),
    extra("ipv6_freebind", "IPv6 addresses that are not there yet", network::freebind6),
    extra("tcp_half_closed", "half-closed TCP connections", network::half_closed),
    extra("nftables", "nftables", network::nftables),
    extra("network_lock_nftables", "holding TCP connections", network::lock_by_nftables),
    // What is new or rarely used.
    rare("pagemap_scan_guard_pages", "guard pages", memory::pagemap_guard),
    rare("madv_guard", "putting guard pages back", memory::guard_pages),
    rare("uffd-noncoop", "memory on demand across fork and mremap", memory::uffd_noncoop),
    rare("tun_ns", "tun devices in namespaces", network::tun_namespace),
    rare("loginuid", "login ids of the audit system", tasks::loginuid),
    rare("autofs", "autofs mounts", files::autofs),
    rare("apparmor_stacking", "AppArmor namespaces", namespaces::apparmor),
    rare("has_ipt_legacy", "legacy iptables", network::legacy_iptables),
    rare("ns_last_pid", "choosing pids without clone3", tasks::last_pid),
    rare("vmsplice", "memory into pipes", memory::vmsplice),
    rare("compat_cr", "32-bit tasks", tasks::compat),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of `check --feature` in CRIU 4.2.
    const CRIU: &str = "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock seccomp_suspend \
        seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd uffd-noncoop can_map_vdso sk_ns \
        sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens external_net_ns clone3_set_tid newifindex nftables \
        has_ipt_legacy pidfd_store ns_pid apparmor_stacking network_lock_nftables sockopt_buf_lock memfd_hugetlb \
        move_mount_set_group openat2 get_rseq_conf ipv6_freebind pagemap_scan timer_cr_ids overlayfs_maps breakpoints \
        pagemap_scan_guard_pages";

    #[test]
    fn every_name_is_known_and_unique() {
        for name in CRIU.split_whitespace() {
            assert!(find(name).is_some(), "{name}");
        }
        let mut names: Vec<_> = FEATURES.iter().map(|feature| feature.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FEATURES.len());
    }

    /// Every probe comes to an end, twice with the same answer, and says why when it fails. What the answers are is the
    /// kernel's business.
    #[test]
    fn probes_answer_and_leave_nothing_behind() {
        for feature in FEATURES {
            let first = feature.probe();
            if let Verdict::Missing(why) = &first {
                println!("{}: {why}", feature.name);
                assert!(!why.is_empty(), "{}", feature.name);
            }
            assert_eq!(first, feature.probe(), "{}", feature.name);
        }
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        assert_eq!(children, "", "a probe left a child");
    }
}
