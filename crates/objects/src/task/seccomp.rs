//! Seccomp: strict mode and chains of filters, of each thread: seccomp(2).
//!
//! A chain is read by ptrace(2), the oldest filter first (`PTRACE_SECCOMP_GET_FILTER`), and what the kernel tells of it besides
//! (`PTRACE_SECCOMP_GET_METADATA`: whether it logs). It is put back by the thread itself, before its credentials: a filter needs
//! either `no_new_privs` or `CAP_SYS_ADMIN`, and a program may have had the latter only when it installed it. So that
//! nothing is filtered that has still to be done, whoever restores must have suspended seccomp (`PTRACE_O_SUSPEND_SECCOMP`).
//!
//! The filters that all threads of a process have are installed by one of them for all (`SECCOMP_FILTER_FLAG_TSYNC`): they
//! are then the same ones for the kernel too, as a later TSYNC of the program wants them. Not kept is that some of the
//! threads share filters that others lack, nor that processes do, which nobody can see.

use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{SeccompEntry, SeccompFilter};
use rewake_sys::ptrace;
use std::sync::Arc;

/// `Seccomp:` in `/proc/PID/status`, and the image's `seccomp_mode`.
const STRICT: u32 = 1;
const FILTER: u32 = 2;
const PR_SET_SECCOMP: u64 = 22;
const SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u64 = 1;
const FLAG_LOG: u32 = 2;
/// `BPF_MAXINSNS`, and the kernel's limit for whole chains.
const MAX_INSTRUCTIONS: usize = 4096;
const MAX_CHAIN: usize = 32768;
/// `struct sock_filter`.
const INSTRUCTION: usize = 8;

/// One filter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Filter {
    /// Classic BPF: an array of `struct sock_filter`.
    pub code: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_LOG` or 0.
    pub flags: u32,
}

/// What applies to a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// `SECCOMP_MODE_STRICT`; there are no filters then.
    pub strict: bool,
    /// The filters, the oldest first.
    pub filters: Vec<Arc<Filter>>,
}

impl State {
    /// Does nothing apply?
    #[must_use]
    pub fn is_off(&self) -> bool {
        !self.strict && self.filters.is_empty()
    }

    /// The image's `seccomp_mode`; `None` if nothing applies.
    #[must_use]
    pub fn mode(&self) -> Option<i32> {
        match (self.strict, self.filters.is_empty()) {
            (true, _) => Some(STRICT as i32),
            (false, false) => Some(FILTER as i32),
            (false, true) => None,
        }
    }
}

/// Reads what applies to thread `tid`, which stands in a ptrace stop; `mode` is the one of `/proc/PID/status`.
///
/// # Errors
/// It cannot be read, or cannot be had again.
pub fn survey(tid: i32, mode: u32) -> Result<State, Problem> {
    let problem = |reason: String| Problem::new(format!("seccomp of thread {tid}"), reason);
    match mode {
        0 => return Ok(State::default()),
        STRICT => return Ok(State { strict: true, filters: Vec::new() }),
        FILTER => {}
        other => return Err(problem(format!("its mode {other} is unknown"))),
    }
    let mut filters = Vec::new();
    loop {
        let code = match ptrace::seccomp_filter(tid, filters.len()) {
            Ok(Some(code)) => code,
            Ok(None) => break,
            Err(e) if e.errno == rewake_sys::Errno::MEDIUMTYPE => {
                return Err(problem(format!("filter {} is not classic BPF", filters.len())));
            }
            Err(e) if e.errno == rewake_sys::Errno::ACCESS => {
                return Err(problem(format!("its filters cannot be read: {e}")).remedy(
                    "run rewake with CAP_SYS_ADMIN, and outside of any seccomp filter itself",
                ));
            }
            Err(e) => return Err(problem(format!("its filters cannot be read: {e}"))),
        };
        if notifies(&code) {
            return Err(problem(format!(
                "filter {} hands system calls to a supervisor (SECCOMP_RET_USER_NOTIF), whose descriptor \
                 (SECCOMP_FILTER_FLAG_NEW_LISTENER) cannot be made again",
                filters.len()
            ))
            .remedy("start the program under a profile without SCMP_ACT_NOTIFY"));
        }
        let flags = ptrace::seccomp_metadata(tid, filters.len())
            .map_err(|e| problem(format!("its filters cannot be read: {e}")))?;
        filters.push(Arc::new(Filter { code, flags: flags as u32 }));
    }
    if filters.is_empty() {
        return Err(problem("the kernel does not tell its filters".into())
            .remedy("a kernel with CONFIG_CHECKPOINT_RESTORE is needed"));
    }
    Ok(State { strict: false, filters })
}

/// Does the filter return `SECCOMP_RET_USER_NOTIF` anywhere?
fn notifies(code: &[u8]) -> bool {
    const RETURN_CONSTANT: u16 = 6;
    const USER_NOTIF: u32 = 0x7fc0_0000;
    const ACTION: u32 = 0xffff_0000;
    let (instructions, _) = code.as_chunks::<INSTRUCTION>();
    instructions.iter().any(|&[c0, c1, _, _, k @ ..]| {
        u16::from_ne_bytes([c0, c1]) == RETURN_CONSTANT
            && u32::from_ne_bytes(k) & ACTION == USER_NOTIF
    })
}

/// The filters of a whole tree, as `seccomp.img` has them. A chain begins with the filter that a thread names, the oldest
/// one, and goes on to newer ones by `prev`, whatever that is called (so CRIU writes and reads it); equal ends of chains are
/// there once.
#[derive(Debug, Default)]
pub struct Chains {
    entry: SeccompEntry,
    /// Index by `prev`, filter and flags.
    known: std::collections::HashMap<(Option<u32>, Arc<Filter>, u32), u32>,
}

impl Chains {
    /// Adds a thread's chain; returns the index that the thread's image names. If all threads have the same (`uniform`) only
    /// the leader's image names it, and it is marked so that CRIU installs it for all at once.
    pub fn add(&mut self, state: &State, uniform: bool) -> Option<u32> {
        let mut prev = None;
        for filter in state.filters.iter().rev() {
            let flags = filter.flags | if uniform { FLAG_TSYNC as u32 } else { 0 };
            let next = self.entry.seccomp_filters.len() as u32;
            let at = *self.known.entry((prev, filter.clone(), flags)).or_insert(next);
            if at == next {
                self.entry.seccomp_filters.push(SeccompFilter {
                    filter: filter.code.clone(),
                    prev,
                    flags: Some(flags),
                });
            }
            prev = Some(at);
        }
        prev
    }

    /// `seccomp.img`.
    #[must_use]
    pub fn entry(&self) -> &SeccompEntry {
        &self.entry
    }
}

/// The filters of `seccomp.img`, checked.
#[derive(Debug, Default)]
pub struct Filters {
    /// With them what the images call `prev`, and whether it is for all threads of the process.
    filters: Vec<(Arc<Filter>, Option<u32>, bool)>,
}

impl Filters {
    /// Checks all filters.
    ///
    /// # Errors
    /// One of them is impossible.
    pub fn read(entry: &SeccompEntry) -> Result<Filters, Problem> {
        let problem = |at: usize, reason: &str| {
            Err(Problem::new(format!("filter {at} of seccomp.img"), reason))
        };
        let mut filters = Vec::with_capacity(entry.seccomp_filters.len());
        for (at, filter) in entry.seccomp_filters.iter().enumerate() {
            let SeccompFilter { filter: code, prev, flags } = filter;
            let flags = flags.unwrap_or(0);
            let all = flags & FLAG_TSYNC as u32 != 0;
            let flags = flags & !(FLAG_TSYNC as u32);
            if code.is_empty() || code.len() % INSTRUCTION != 0 {
                return problem(at, "it is not a whole number of instructions");
            }
            if code.len() / INSTRUCTION > MAX_INSTRUCTIONS {
                return problem(at, "it is longer than the kernel takes");
            }
            if flags & !FLAG_LOG != 0 {
                return problem(at, &format!("its flags {flags:#x} cannot be set again"));
            }
            if prev.is_some_and(|prev| prev as usize >= entry.seccomp_filters.len()) {
                return problem(at, "the filter after it does not exist");
            }
            filters.push((Arc::new(Filter { code: code.clone(), flags }), *prev, all));
        }
        Ok(Filters { filters })
    }

    /// Does a chain apply to all threads of the process, although only its leader names it?
    #[must_use]
    pub fn is_for_all(&self, oldest: Option<u32>) -> bool {
        oldest.and_then(|at| self.filters.get(at as usize)).is_some_and(|(.., all)| *all)
    }

    /// What applies to a thread of the images.
    ///
    /// # Errors
    /// The images ask for something impossible.
    pub fn state(&self, tid: u32, mode: u32, oldest: Option<u32>) -> Result<State, Problem> {
        let problem = |reason: String| Problem::new(format!("seccomp of thread {tid}"), reason);
        match mode {
            0 => return Ok(State::default()),
            STRICT => return Ok(State { strict: true, filters: Vec::new() }),
            FILTER => {}
            other => return Err(problem(format!("its mode {other} is unknown"))),
        }
        let (mut next, mut length) = (oldest, 0);
        let mut chain = Vec::new();
        while let Some(at) = next {
            let Some((filter, prev, _)) = self.filters.get(at as usize) else {
                return Err(problem(format!("seccomp.img has no filter {at}")));
            };
            // The kernel counts four instructions more for each; this also ends a chain that runs in a circle.
            length += filter.code.len() / INSTRUCTION + 4;
            if length > MAX_CHAIN {
                return Err(problem("its filters are more than the kernel takes".into()));
            }
            chain.push(filter.clone());
            next = *prev;
        }
        if chain.is_empty() {
            return Err(problem("the images do not say which filters it has".into()));
        }
        Ok(State { strict: false, filters: chain })
    }
}

/// How many filters all threads of a process have in common, from the oldest on.
#[must_use]
pub fn common<'a>(mut threads: impl Iterator<Item = &'a State>) -> usize {
    let Some(first) = threads.next() else { return 0 };
    threads.fold(first.filters.len(), |common, other| {
        let both = first.filters.iter().zip(&other.filters);
        both.take(common).take_while(|(a, b)| a == b).count()
    })
}

/// Installs filters for the calling thread, or with `all` for all threads of its process.
pub fn restore_filters(steps: &mut Steps, filters: &[Arc<Filter>], all: bool) {
    for filter in filters {
        let code = steps.data(&filter.code);
        // struct sock_fprog: a 16-bit number of instructions, padding, a pointer.
        let count = (filter.code.len() / INSTRUCTION) as u64;
        let program = steps.words(&[count, code.address]);
        let flags = u64::from(filter.flags) | if all { FLAG_TSYNC } else { 0 };
        // With TSYNC a positive result names a thread that cannot be synchronised.
        steps.must_be(
            Label::Text("installing a seccomp filter"),
            0,
            Op::new(libc::SYS_seccomp, &[SET_MODE_FILTER, flags, program.address]),
        );
    }
}

/// Sets strict mode for the calling thread.
pub fn restore_strict(steps: &mut Steps) {
    steps.must(
        Label::Text("setting seccomp's strict mode"),
        Op::new(libc::SYS_prctl, &[PR_SET_SECCOMP, u64::from(STRICT), 0, 0, 0]),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(k: u8, flags: u32) -> Arc<Filter> {
        Arc::new(Filter { code: vec![6, 0, 0, 0, k, 0, 0xff, 0x7f], flags })
    }

    fn state(filters: &[&Arc<Filter>]) -> State {
        State { strict: false, filters: filters.iter().map(|f| (*f).clone()).collect() }
    }

    #[test]
    fn chains_come_back() {
        let (a, b, c) = (filter(1, 0), filter(2, FLAG_LOG), filter(3, 0));
        let states = [state(&[&a, &b]), state(&[&a]), state(&[&a, &b, &c]), state(&[&b])];
        let mut chains = Chains::default();
        let at: Vec<_> = states.iter().map(|s| chains.add(s, false)).collect();
        assert_eq!(at, [Some(1), Some(2), Some(5), Some(0)]);
        let uniform = chains.add(&states[0], true);
        assert_eq!(uniform, Some(7));
        assert_eq!(chains.entry().seccomp_filters[6].flags, Some(3));
        assert_eq!(
            Filters::read(chains.entry()).unwrap().state(1, FILTER, uniform),
            Ok(states[0].clone())
        );
        let filters = Filters::read(chains.entry()).unwrap();
        for (state, at) in states.iter().zip(at) {
            assert_eq!(filters.state(1, FILTER, at).unwrap(), *state);
        }
        assert_eq!(common(states[..3].iter()), 1);
        assert_eq!(common(states.iter()), 0);
        assert_eq!(chains.add(&State::default(), true), None);
    }

    #[test]
    fn impossible_filters_are_refused() {
        let good = SeccompFilter { filter: vec![6; 8], prev: None, flags: None };
        let read =
            |filters: Vec<SeccompFilter>| Filters::read(&SeccompEntry { seccomp_filters: filters });
        let bad = |change: &dyn Fn(&mut SeccompFilter)| {
            let mut filter = good.clone();
            change(&mut filter);
            read(vec![filter]).is_err()
        };
        assert!(bad(&|f| f.filter = vec![6; 7]));
        assert!(bad(&|f| f.filter.clear()));
        assert!(bad(&|f| f.filter = vec![6; 8 * 4097]));
        assert!(bad(&|f| f.flags = Some(8)));
        assert!(bad(&|f| f.prev = Some(1)));
        let circle = read(vec![SeccompFilter { prev: Some(0), ..good.clone() }]).unwrap();
        assert!(circle.state(1, FILTER, Some(0)).is_err());
        let filters = read(vec![good]).unwrap();
        assert!(filters.state(1, FILTER, Some(1)).is_err());
        assert!(filters.state(1, FILTER, None).is_err());
        assert!(filters.state(1, 3, None).is_err());
        assert!(filters.state(1, STRICT, None).unwrap().strict);
    }

    #[test]
    fn supervisors_are_noticed() {
        let code = |action: u32| [&[6, 0, 0, 0][..], &action.to_ne_bytes()].concat();
        assert!(notifies(&[code(0x7fff_0000), code(0x7fc0_0000)].concat()));
        assert!(!notifies(&code(0x7fff_0000)));
    }
}
