//! What stubs inherit from the controller, and what this machine can do.

use super::build::Environment;
use super::heritage::Heritage;
use super::namespaces::Namespaces;
use crate::error::{Error, Result};
use crate::own::AddressSpace;
use rewake_objects::memory::huge::{AREA, HUGE, Place};
use rewake_objects::memory::{PAGE, TASK_SIZE};
use rewake_objects::task::credentials;
use rewake_objects::task::schedule::Inherited;
use rewake_proc::read::ProcDir;
use rewake_sys::userfaultfd::MOVE;
use rewake_sys::{probe, sched, task};
use rustix::process::{Resource, Rlimit};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// The resource limits in `RLIMIT_*` order.
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Raises the soft limit of open files to the hard one: a stub must be able to hold any number the images name.
fn raise_open_files() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = rustix::process::setrlimit(Resource::Nofile, raised) {
        log::debug!("the limit of open files cannot be raised: {e}");
    }
}

/// Gathers everything.
///
/// # Errors
/// `/proc` is not there.
pub fn gather(
    own: &AddressSpace,
    hop: u64,
    arena: (u64, u64),
    plain_root: bool,
    needs_timer_ids: bool,
    sibling: bool,
    namespaces: Namespaces,
) -> Result<Environment> {
    raise_open_files();
    let failed = |e: &dyn std::fmt::Display| Error::new(format!("own state: {e}"));
    let dir = ProcDir::open(std::process::id() as i32).map_err(|e| failed(&e))?;
    let mut buffer = Vec::new();
    let status = dir.status(&mut buffer).map_err(|e| failed(&e))?;
    let attr = sched::attributes(0).map_err(|e| failed(&e))?;
    // Without audit there is no file; an unset one is u32::MAX, as in the images.
    let login_uid = dir
        .read_single("loginuid", &mut buffer)
        .ok()
        .and_then(|text| rewake_proc::single::loginuid(text).ok())
        .map(|uid| uid.unwrap_or(u32::MAX));
    let personality = dir
        .read_single("personality", &mut buffer)
        .ok()
        .and_then(|text| rewake_proc::single::personality(text).ok());
    let securebits = rustix::thread::capabilities_secure_bits().map_or(0, |bits| bits.bits());
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let limits = RESOURCES
        .iter()
        .map(|r| {
            let limit = rustix::process::getrlimit(*r);
            (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
        })
        .collect();
    Ok(Environment {
        specials: own.specials.clone(),
        hop,
        arena,
        end: TASK_SIZE - PAGE,
        rseq: task::own_rseq(),
        limits,
        may_raise: status.cap_eff & CAP_SYS_RESOURCE != 0,
        creds: credentials::survey(&status, securebits),
        schedule: Inherited {
            policy: attr.policy,
            nice: attr.nice,
            affinity: sched::affinity(0).unwrap_or_default(),
            io_priority: sched::io_priority(0).unwrap_or(0),
        },
        personality: personality.unwrap_or(0),
        login_uid,
        timer_ids: needs_timer_ids
            && crate::features::find("timer_cr_ids")
                .is_some_and(|f| f.probe() == crate::features::Verdict::Present),
        terminals: std::collections::BTreeMap::new(),
        root_parent: match (namespaces.pid, sibling) {
            // From inside a PID namespace, who is outside has no number.
            (true, _) => 0,
            (false, true) => status.ppid,
            (false, false) => status.pid,
        },
        plain_root,
        group: task::own_group().unwrap_or(0),
        namespaces,
        gate: false,
        segments: HashMap::new(),
        locks: HashMap::new(),
        ring_workers: HashSet::new(),
        huge: None,
        heritage: Heritage::default(),
        lent: Vec::new(),
    })
}

/// Where huge pages may be made, if the kernel makes any and can move them; `free` is free in all tasks.
pub fn huge_area(free: Range<u64>, gate: Option<u64>) -> Option<Place> {
    let start = free.start.next_multiple_of(HUGE);
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let has_move = || probe::userfaultfd_features().is_ok_and(|features| features & MOVE != 0);
    // Where the kernel promises no more memory than there is, all of it cannot be promised twice.
    let strict = std::fs::read_to_string("/proc/sys/vm/overcommit_memory")
        .is_ok_and(|mode| mode.trim() == "2");
    let place = Place { start, end: free.end, gate: gate.filter(|_| !strict) };
    (start + AREA <= free.end && !setting.contains("[never]") && has_move()).then_some(place)
}
