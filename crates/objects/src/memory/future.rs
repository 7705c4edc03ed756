//! What an address space does with mappings that are yet to come: it locks them (mlockall(2), `MCL_FUTURE`), lets their
//! pages be merged (prctl(2), `PR_SET_MEMORY_MERGE`), or keeps transparent huge pages for those that were advised to have them.
//! And what can be done to those that there are: nothing, if they are sealed (mseal(2)).

use super::PAGE;
use super::vma::status;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{MmEntry, RewakeTaskEntry};
use rewake_inject::ring::{Data, Results, Script};
use rewake_sys::Errno;
use std::collections::HashSet;

/// `mseal`, since Linux 6.10.
const SYS_MSEAL: i64 = 462;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_MEMORY_MERGE: u64 = 68;
const PR_SET_THP_DISABLE: u64 = 41;
/// Second argument of `PR_SET_THP_DISABLE`, and a bit of what `PR_GET_THP_DISABLE` gives (since Linux 6.18).
const PR_THP_DISABLE_EXCEPT_ADVISED: u64 = 2;
const MCL_FUTURE: u32 = libc::MCL_FUTURE as u32;
const MCL_ONFAULT: u32 = libc::MCL_ONFAULT as u32;

/// Where the answers to [`ask`] will be.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    resident: Data,
    first: usize,
}

/// What is done with new mappings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Future {
    /// `MCL_FUTURE` and `MCL_ONFAULT`, or 0.
    pub lock: u32,
    /// `PR_GET_MEMORY_MERGE`.
    pub merge: bool,
}

/// Adds the questions. Nobody tells whether new mappings are locked: a page is mapped, looked at and unmapped again, in one
/// batch, which is executed whole even if the controller dies.
pub fn ask(script: &mut Script) -> Asked {
    let resident = script.space(8);
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let mmap = Op::new(libc::SYS_mmap, &[0, PAGE, prot, flags, u64::MAX, 0]);
    let first = script.push(mmap);
    let mut of_it =
        |nr, args: &[u64]| script.push(Op::new(nr, args).arg_result(0, first as u32, 0));
    // Refused for locked memory.
    of_it(libc::SYS_madvise, &[0, PAGE, libc::MADV_DONTNEED as u64]);
    // Nobody has touched it: it is there only if it was locked at once.
    of_it(libc::SYS_mincore, &[0, PAGE, resident.address]);
    of_it(libc::SYS_munmap, &[0, PAGE]);
    script.push(Op::new(libc::SYS_prctl, &[PR_GET_MEMORY_MERGE, 0, 0, 0, 0]));
    Asked { resident, first }
}

/// Reads the answers.
#[must_use]
pub fn read(results: &Results, asked: Asked) -> Future {
    let Asked { resident, first } = asked;
    let locked = match results.value(first) {
        Ok(_) => results.value(first + 1) == Err(Errno::INVAL),
        // It would be more than RLIMIT_MEMLOCK allows.
        Err(e) => e == Errno::AGAIN,
    };
    let at_once = results.value(first).is_err() || results.u64(resident, 0) & 1 != 0;
    Future {
        lock: match (locked, at_once) {
            (false, _) => 0,
            (true, true) => MCL_FUTURE,
            (true, false) => MCL_FUTURE | MCL_ONFAULT,
        },
        merge: results.or_zero(first + 4) == 1,
    }
}

/// Takes away what a stub may have inherited from whoever started us, before any mapping is made.
pub fn forget(steps: &mut Steps) {
    let label = Label::Text("letting no memory be merged");
    steps.may(label, Op::new(libc::SYS_prctl, &[PR_SET_MEMORY_MERGE, 0, 0, 0, 0]));
}

/// Sets it, when no mapping is made any more.
pub fn restore(steps: &mut Steps, mm: &MmEntry, extra: &RewakeTaskEntry) {
    if extra.memory_merge == Some(true) {
        let label = Label::Text("letting memory be merged (PR_SET_MEMORY_MERGE)");
        steps.wish(label, Op::new(libc::SYS_prctl, &[PR_SET_MEMORY_MERGE, 1, 0, 0, 0]));
        // All mappings are to be merged now, also those that were not.
        let private = status::ANON_PRIVATE | status::FILE_PRIVATE;
        let mergeable = |vma: &u64| vma & 1 << libc::MADV_MERGEABLE != 0;
        for vma in mm.vmas.iter().filter(|v| v.status & private != 0) {
            if !vma.madv.as_ref().is_some_and(mergeable) {
                let args =
                    [vma.start, vma.end.saturating_sub(vma.start), libc::MADV_UNMERGEABLE as u64];
                steps.may(Label::Vma(vma.start, vma.end), Op::new(libc::SYS_madvise, &args));
            }
        }
    }
    if extra.thp_except_advised == Some(true) {
        let label = Label::Text("keeping huge pages for memory that was advised to have them");
        let args = [PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED, 0, 0];
        steps.wish(label, Op::new(libc::SYS_prctl, &args));
    }
    let sealed: HashSet<u64> = extra.sealed.iter().copied().collect();
    for vma in mm.vmas.iter().filter(|v| sealed.contains(&v.start)) {
        let args = [vma.start, vma.end.saturating_sub(vma.start), 0];
        steps.must(Label::Text("sealing a mapping (mseal(2))"), Op::new(SYS_MSEAL, &args));
    }
    let lock = extra.lock_future.unwrap_or(0) & (MCL_FUTURE | MCL_ONFAULT);
    if lock & MCL_FUTURE != 0 {
        let label = Label::Text("locking memory that is mapped from now on (mlockall(2))");
        steps.must(label, Op::new(libc::SYS_mlockall, &[u64::from(lock)]));
    }
}

/// Is this of what `PR_GET_THP_DISABLE` gives the exception?
#[must_use]
pub fn thp_except_advised(thp_disable: u32) -> bool {
    u64::from(thp_disable) & (1 | PR_THP_DISABLE_EXCEPT_ADVISED)
        == 1 | PR_THP_DISABLE_EXCEPT_ADVISED
}
