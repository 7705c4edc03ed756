//! A witness: a process with given user and group ids and no capability, which nobody restricts.
//!
//! A process of the same ids may look at it in the way ptrace(2) may (`PTRACE_MODE_READ`), unless a security module forbids
//! it. So a task can be asked whether it is in a Landlock domain, which nothing in `/proc` tells: tasks in a domain may
//! look at tasks of the same domain only.

use crate::map::{PAGE, SharedMap};
use crate::ring::{Doorbell, Ring, Script};
use crate::{Error, Result};
use rewake_agent::arch::executor;
use rewake_agent::layout::{Header, Op};
use rewake_sys::task::{CloneArgs, clone_agent, own_rseq};
use rewake_sys::{signal, wait};
use std::sync::Arc;
use std::time::Duration;

const OPS: usize = 16;
const DATA: usize = 64;
/// A witness that is not ready after this long never will be.
const PATIENCE: Duration = Duration::from_secs(10);
/// Past the last address of user space.
const END: u64 = 0x7fff_ffff_f000;
const CAPSET_V3: u64 = 0x2008_0522;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_SECUREBITS: u64 = 28;
const UNREGISTER: u64 = 1;

/// A witness. Dropping it ends it.
#[derive(Debug)]
pub struct Witness {
    pid: i32,
}

impl Witness {
    /// Calls a witness with these ids.
    ///
    /// # Errors
    /// The failed call.
    pub fn call(uid: u32, gid: u32) -> Result<Witness> {
        let ring_len = Ring::size_for(OPS, DATA);
        let len = (PAGE + ring_len).next_multiple_of(PAGE);
        let doing = Error::errno("calling a witness", "memfd_create");
        let file =
            rustix::fs::memfd_create("rewake", rustix::fs::MemfdFlags::CLOEXEC).map_err(doing)?;
        rustix::fs::ftruncate(&file, len as u64)
            .map_err(Error::errno("calling a witness", "ftruncate"))?;
        let map = Arc::new(SharedMap::of_file(file, len)?);
        map.write(0, executor());
        map.make_code(PAGE)?;
        let base = map.address();
        let header = base + PAGE as u64;
        let ring = Ring::new(map.clone(), PAGE, ring_len, DATA, header, Doorbell::Futex);
        ring.initialise(&Header { wait: Op::new(libc::SYS_pause, &[]), ..Header::EMPTY });
        let script = script(&ring, uid, gid, (base, base + len as u64));
        let last = script.ops.len() - 1;
        let number = ring.load(&script)?;
        let args = CloneArgs { exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
        // SAFETY: the executor stands at the start of the mapping, which is shared, and the header is filled. The child
        // has an address space of its own.
        let pid = unsafe { clone_agent(&args, base as usize, header as usize) }
            .map_err(Error::syscall("calling a witness"))?;
        let witness = Witness { pid };
        ring.wait(number, |waited| match waited > PATIENCE {
            true => Err(Error::Timeout { pid, seconds: PATIENCE.as_secs() }),
            false => Ok(()),
        })?;
        match ring.results(&script).value(last) {
            Ok(_) => Ok(witness),
            Err(errno) => Err(Error::Inside { what: "the credentials of a witness", errno }),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

/// Nothing of ours stays in it before it becomes somebody whom others may look into.
fn script(ring: &Ring, uid: u32, gid: u32, keep: (u64, u64)) -> Script {
    let mut script = Script::new(ring.data_base());
    let must = |script: &mut Script, number: i64, args: &[u64]| {
        script.push(Op::new(number, args).stop());
    };
    let prctl = libc::SYS_prctl;
    must(&mut script, prctl, &[PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0, 0, 0]);
    must(&mut script, libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]);
    if let Some((address, size, signature)) = own_rseq() {
        let args = [address, u64::from(size), UNREGISTER, u64::from(signature)];
        must(&mut script, libc::SYS_rseq, &args);
    }
    must(&mut script, libc::SYS_munmap, &[0, keep.0]);
    must(&mut script, libc::SYS_munmap, &[keep.1, END - keep.1]);
    let (uid, gid) = (u64::from(uid), u64::from(gid));
    must(&mut script, libc::SYS_setgroups, &[0, 0]);
    must(&mut script, prctl, &[PR_SET_SECUREBITS, 0, 0, 0, 0]);
    must(&mut script, libc::SYS_setresgid, &[gid, gid, gid]);
    must(&mut script, libc::SYS_setresuid, &[uid, uid, uid]);
    let capset: Vec<u8> = [CAPSET_V3, 0, 0, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let capset = script.data(&capset);
    must(&mut script, libc::SYS_capset, &[capset.address, capset.address + 8]);
    // A change of ids has taken these away.
    must(&mut script, prctl, &[PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0, 0, 0]);
    must(&mut script, prctl, &[PR_SET_DUMPABLE, 1, 0, 0, 0]);
    script
}

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = signal::kill(self.pid, libc::SIGKILL);
        wait::until_dead(self.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_has_the_ids_and_nothing_of_ours() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: only root may change its ids");
            return;
        }
        let witness = Witness::call(4711, 4712).unwrap();
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", witness.pid()));
        let status = rewake_status(&read("status").unwrap());
        assert_eq!(status, ["4711 4711 4711 4711", "4712 4712 4712 4712", "", "0000000000000000"]);
        let maps = read("maps").unwrap();
        assert!(maps.lines().all(|l| l.contains("rewake") || l.contains("[vsyscall]")), "{maps}");
        let pid = witness.pid();
        drop(witness);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    /// Uid, Gid, Groups, CapPrm.
    fn rewake_status(status: &str) -> Vec<String> {
        let line = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("?");
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        ["Uid:", "Gid:", "Groups:", "CapPrm:"].map(line).to_vec()
    }
}
