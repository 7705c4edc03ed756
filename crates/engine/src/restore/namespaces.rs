//! Namespaces of its own for a restored tree: what its first process does before anything else, and what becomes of that
//! process if it is not the tree's root.

use super::arena;
use super::build::{self, Environment};
use crate::error::{Context, Result};
use rewake_agent::arch;
use rewake_agent::layout::Op;
use rewake_inject::stub::{RemoteCall, remote_calls};
use rewake_inject::tracee::{Running, Stopped};
use rewake_objects::memory::PAGE;
use rewake_objects::steps::{Label, Steps};
use rewake_sys::Errno;
use rewake_sys::ptrace::{self, Registers};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::ops::Range;

/// The command name of an init.
pub const INIT: &[u8] = b"rewake-init";

/// Which namespaces a restored tree gets for itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// `--new-pidns`: a PID namespace, and a mount namespace for its `/proc`.
    pub pid: bool,
    /// `--copy-netns`: a network namespace.
    pub net: bool,
}

impl Namespaces {
    /// Does the tree get any?
    #[must_use]
    pub fn any(self) -> bool {
        self.pid || self.net
    }

    /// `CLONE_NEW*` flags of the first process.
    #[must_use]
    pub fn flags(self) -> u64 {
        let pid = if self.pid { libc::CLONE_NEWPID | libc::CLONE_NEWNS } else { 0 };
        let net = if self.net { libc::CLONE_NEWNET } else { 0 };
        (pid | net) as u64
    }

    /// What the first process does in its namespaces before it clones anyone.
    pub fn enter(self, steps: &mut Steps) {
        if self.pid {
            // The host's mounts go on appearing here, but none of ours appears there.
            let root = steps.script.cstr(b"/");
            let flags = libc::MS_REC | libc::MS_SLAVE;
            steps.must(
                Label::Text("making the mount namespace independent"),
                Op::new(libc::SYS_mount, &[0, root.address, 0, flags, 0]),
            );
            let proc = steps.script.cstr(b"proc");
            let at = steps.script.cstr(b"/proc");
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            steps.must(
                Label::Text("mounting /proc of the new PID namespace"),
                Op::new(libc::SYS_mount, &[proc.address, at.address, proc.address, flags, 0]),
            );
        }
        if self.net {
            self.raise_loopback(steps);
        }
    }

    /// A new network namespace has a loopback interface that is down.
    fn raise_loopback(self, steps: &mut Steps) {
        let label = Label::Text("bringing up the loopback interface");
        // struct ifreq: name, flags.
        let mut request = [0u8; 40];
        request[..2].copy_from_slice(b"lo");
        request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
        let request = steps.data(&request);
        let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
        let socket = steps.must(label, Op::new(libc::SYS_socket, &[libc::AF_INET as u64, kind, 0]));
        let ioctl = Op::new(libc::SYS_ioctl, &[0, libc::SIOCSIFFLAGS, request.address]);
        steps.must(label, ioctl.arg_result(0, socket as u32, 0));
        steps.must(label, Op::new(libc::SYS_close, &[0]).arg_result(0, socket as u32, 0));
    }
}

/// The calling thread in the network namespace of another process, until this is dropped: sockets belong to where they are
/// made.
#[derive(Debug)]
pub struct Network {
    own: OwnedFd,
}

impl Network {
    /// Enters that of the process `pid`.
    ///
    /// # Errors
    /// It is gone.
    pub fn enter(pid: i32) -> Result<Network> {
        let failed = |e: Errno| crate::Error::new(format!("its network namespace: {e}"));
        let open = |path: &str| {
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
        };
        let network = Network { own: open("/proc/thread-self/ns/net")? };
        enter_network(&open(&format!("/proc/{pid}/ns/net"))?).map_err(failed)?;
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(e) = enter_network(&self.own) {
            log::error!("this command cannot go back to its network namespace: {e}");
        }
    }
}

fn enter_network(namespace: &OwnedFd) -> std::result::Result<(), Errno> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
}

/// The last script of an init: it gets its code, and a page to write to behind it. What it has from a template it gives
/// back, but for vvar and vdso, which are at `specials`.
pub fn init_steps(steps: &mut Steps, env: &Environment, specials: Option<Range<u64>>) {
    const PR_SET_PDEATHSIG: u64 = 1;
    const PR_SET_NAME: u64 = 15;
    let label = Label::Text("making the init of the PID namespace");
    let at = arena::init_place(env.hop);
    if let Some(specials) = specials {
        let keep = vec![env.arena, (specials.start, specials.end)];
        build::unmap_all_but(steps, keep, env.end);
    }
    let root = steps.script.cstr(b"/");
    steps.must(label, Op::new(libc::SYS_chdir, &[root.address]));
    let name = steps.script.cstr(INIT);
    steps.must(label, Op::new(libc::SYS_prctl, &[PR_SET_NAME, name.address, 0, 0, 0]));
    let writable = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let map = Op::new(libc::SYS_mmap, &[at, 2 * PAGE, writable, flags, u64::MAX, 0]);
    steps.must_be(label, at as i64, map);
    // A copy within one process, made by the kernel: the agent has no operation for it.
    let code = steps.data(arch::init());
    let len = code.len as u64;
    let (to, from) = (steps.words(&[at, len]), steps.words(&[code.address, len]));
    const OURSELVES: u64 = 1;
    let copy = Op::new(libc::SYS_process_vm_readv, &[OURSELVES, to.address, 1, from.address, 1, 0]);
    steps.must_be(label, len as i64, copy);
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    steps.must(label, Op::new(libc::SYS_mprotect, &[at, PAGE, executable]));
    // It outlives this command.
    steps.must(label, Op::new(libc::SYS_prctl, &[PR_SET_PDEATHSIG, 0, 0, 0, 0]));
}

/// Takes the arena away from an init and puts it at the start of its code; `root` is the pid of the tree's root inside.
///
/// # Errors
/// It is gone.
pub fn init_ready(
    running: Running,
    gadget: u64,
    arena: (u64, usize),
    code: u64,
    root: i32,
) -> Result<Stopped> {
    let pid = running.tid();
    let args = [arena.0, arena.1 as u64, 0, 0, 0, 0];
    let stub = running.wait_stop().of(pid, INIT)?;
    let call = RemoteCall { stub, gadget, number: libc::SYS_munmap, args };
    let mut results = remote_calls(vec![call]).of(pid, INIT)?;
    let Some((stub, result)) = results.pop() else {
        return Err(crate::Error::new("the init's call has no result"));
    };
    if result != 0 {
        return Err(crate::Error::new(format!(
            "the agent of the init cannot be unmapped: {result}"
        )));
    }
    let now = stub.registers().of(pid, INIT)?;
    let start = Registers { rip: code, rbx: root as u64, r12: code + PAGE, ..now };
    stub.set_registers(&Registers { orig_rax: u64::MAX, rax: 0, ..start }).of(pid, INIT)?;
    ptrace::set_signal_mask(pid, u64::MAX).of(pid, INIT)?;
    Ok(stub)
}
