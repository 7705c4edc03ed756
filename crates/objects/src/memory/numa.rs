//! NUMA policies, which say from which nodes memory comes: that of a process (set_mempolicy(2)) and those of mappings
//! (mbind(2)).
//!
//! Only the process itself is told them at a bearable price: `numa_maps` has the kernel look at every page.

use super::vma::{Vma, status};
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{MmEntry, RewakePolicyEntry};
use rewake_inject::ring::{Data, Results, Script};
use std::sync::OnceLock;

/// Nodes that the kernel may know of (`MAX_NUMNODES`).
const NODES: u64 = 1024;
const MASK: usize = NODES as usize / 8;
/// `MPOL_DEFAULT`: none.
const DEFAULT: u32 = 0;
/// `MPOL_F_ADDR`.
const OF_ADDRESS: u64 = 2;

/// Where the answer to [`ask`] will be.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    at: Data,
    op: usize,
}

/// Asks for the policy of the process, or of the mapping that begins at `start`.
pub fn ask(script: &mut Script, start: Option<u64>) -> Asked {
    let at = script.space(8 + MASK);
    let (address, flags) = start.map_or((0, 0), |start| (start, OF_ADDRESS));
    let args = [at.address, at.address + 8, NODES, address, flags];
    let op = script.push(Op::new(libc::SYS_get_mempolicy, &args));
    Asked { at, op }
}

/// Reads the answer: nothing if there is no policy, or the kernel knows of none.
#[must_use]
pub fn read(results: &Results, asked: Asked, start: Option<u64>) -> Option<RewakePolicyEntry> {
    results.value(asked.op).ok()?;
    let mode = results.u32(asked.at, 0);
    let mut nodes: Vec<u64> =
        (8..8 + MASK).step_by(8).map(|at| results.u64(asked.at, at)).collect();
    let len = nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    nodes.truncate(len);
    (mode != DEFAULT).then_some(RewakePolicyEntry { start, mode, nodes })
}

/// Where the answers to [`ask_modes`] will be.
#[derive(Debug, Clone, Copy)]
pub struct Modes {
    at: Data,
    first: usize,
    len: usize,
}

impl Modes {
    /// How many were asked for.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "nobody wants to know")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Asks which of the mappings that begin at `starts` have a policy at all.
pub fn ask_modes(script: &mut Script, starts: &[u64]) -> Modes {
    let at = script.space(starts.len() * 4);
    let first = script.ops.len();
    for (n, start) in starts.iter().enumerate() {
        let args = [at.address + n as u64 * 4, 0, 0, *start, OF_ADDRESS];
        script.push(Op::new(libc::SYS_get_mempolicy, &args));
    }
    Modes { at, first, len: starts.len() }
}

/// Reads the answers: those of `starts` that have one.
pub fn read_modes(results: &Results, asked: Modes, starts: &[u64]) -> Vec<u64> {
    let has = |n: usize| {
        results.value(asked.first + n).is_ok() && results.u32(asked.at, n * 4) != DEFAULT
    };
    starts.iter().enumerate().filter(|(n, _)| has(*n)).map(|(_, start)| *start).collect()
}

/// Has this machine more than one node?
fn has_nodes() -> bool {
    static NODES: OnceLock<bool> = OnceLock::new();
    *NODES.get_or_init(|| {
        let online = std::fs::read_to_string("/sys/devices/system/node/online");
        online.is_ok_and(|online| online.trim() != "0")
    })
}

/// Start addresses of the mappings that are asked for a policy: all, if they are few or it matters. On a machine of one node
/// only those of many that are large, or that the kernel would have made one with the mapping before if nothing told them apart.
#[must_use]
pub fn candidates(vmas: &[Vma]) -> Vec<u64> {
    const FEW: usize = 1000;
    const LARGE: u64 = 1 << 20;
    let kernels = status::VDSO | status::VVAR | status::VSYSCALL | status::AIORING;
    let all = vmas.len() <= FEW || has_nodes();
    let like = |a: &Vma, b: &Vma| {
        let of = |v: &Vma| (v.entry.prot, v.entry.flags, v.entry.status, v.entry.shmid);
        a.entry.end == b.entry.start && of(a) == of(b)
    };
    let is_one = |(n, vma): &(usize, &Vma)| {
        let before = n.checked_sub(1).and_then(|n| vmas.get(n));
        all || vma.entry.end - vma.entry.start >= LARGE
            || before.is_some_and(|before| like(before, vma))
    };
    let asked = vmas.iter().enumerate().filter(is_one).map(|(_, vma)| &vma.entry);
    asked.filter(|vma| vma.status & kernels == 0).map(|vma| vma.start).collect()
}

/// Takes away what a stub may have inherited from whoever started us.
pub fn forget(steps: &mut Steps) {
    let label = Label::Text("having no NUMA policy");
    steps.may(label, Op::new(libc::SYS_set_mempolicy, &[u64::from(DEFAULT), 0, 0]));
}

/// The node mask of an entry in memory of the task: address, and the number of bits as the kernel wants it.
fn mask(steps: &mut Steps, policy: &RewakePolicyEntry) -> (u64, u64) {
    if policy.nodes.is_empty() {
        return (0, 0);
    }
    // What is more than a kernel can have is refused by it.
    let words = &policy.nodes[..policy.nodes.len().min(2 * MASK)];
    (steps.words(words).address, words.len() as u64 * 64 + 1)
}

/// Sets that of the process, whose memory is to come from there too.
pub fn restore_own(steps: &mut Steps, policy: &RewakePolicyEntry) {
    let (mask, bits) = mask(steps, policy);
    let label = Label::Text("setting the NUMA policy");
    steps.wish(label, Op::new(libc::SYS_set_mempolicy, &[u64::from(policy.mode), mask, bits]));
}

/// Sets those of mappings, before they are filled.
pub fn restore(steps: &mut Steps, mm: &MmEntry, policies: &[RewakePolicyEntry]) {
    for policy in policies {
        let Some(vma) = mm.vmas.iter().find(|vma| Some(vma.start) == policy.start) else {
            continue;
        };
        let (mask, bits) = mask(steps, policy);
        let args =
            [vma.start, vma.end.saturating_sub(vma.start), policy.mode.into(), mask, bits, 0];
        steps.wish(Label::Policy(vma.start, vma.end), Op::new(libc::SYS_mbind, &args));
    }
}
