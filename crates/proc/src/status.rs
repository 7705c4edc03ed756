//! `/proc/PID/status` and `/proc/PID/task/TID/status` (proc_pid_status(5)).

use crate::ParseError;
use crate::scan::{Scan, key_value, lines};
use crate::stat::TaskState;

const FILE: &str = "status";

/// Real, effective, saved-set and file-system id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ids {
    /// Real id.
    pub real: u32,
    /// Effective id.
    pub effective: u32,
    /// Saved-set id.
    pub saved: u32,
    /// File-system id.
    pub fs: u32,
}

/// What `status` says. Ids are in the pid and user namespace of the procfs mount and the reader.
///
/// Sizes are in bytes. Memory fields are `None` in kernel threads and zombies, which have no address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Command name with the kernel's escapes (`\n`, `\\`) undone.
    pub name: Box<[u8]>,
    /// File mode creation mask; `None` in a zombie.
    pub umask: Option<u32>,
    /// State letter.
    pub state: TaskState,
    /// Thread group, that is process id.
    pub tgid: i32,
    /// NUMA group, 0 if none.
    pub ngid: Option<i32>,
    /// Thread id.
    pub pid: i32,
    /// Parent; 0 if outside the pid namespace.
    pub ppid: i32,
    /// Tracer; 0 if none.
    pub tracer_pid: i32,
    /// User ids.
    pub uid: Ids,
    /// Group ids.
    pub gid: Ids,
    /// Slots in the descriptor table; 0 in a zombie.
    pub fd_size: u64,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Process ids from the reader's pid namespace inwards; `None` without CONFIG_PID_NS.
    pub ns_tgid: Option<Vec<i32>>,
    /// Thread ids, the same.
    pub ns_pid: Option<Vec<i32>>,
    /// Process group ids, the same.
    pub ns_pgid: Option<Vec<i32>>,
    /// Session ids, the same.
    pub ns_sid: Option<Vec<i32>>,
    /// Is it a kernel thread? (since Linux 6.8)
    pub kthread: Option<bool>,
    /// Address space size.
    pub vm_size: Option<u64>,
    /// Locked memory.
    pub vm_lck: Option<u64>,
    /// Pinned memory.
    pub vm_pin: Option<u64>,
    /// Resident set.
    pub vm_rss: Option<u64>,
    /// Resident anonymous memory.
    pub rss_anon: Option<u64>,
    /// Resident file mappings.
    pub rss_file: Option<u64>,
    /// Resident shared memory.
    pub rss_shmem: Option<u64>,
    /// Page tables.
    pub vm_pte: Option<u64>,
    /// Swapped-out anonymous private memory.
    pub vm_swap: Option<u64>,
    /// hugetlb pages.
    pub hugetlb_pages: Option<u64>,
    /// Is it dumping core?
    pub core_dumping: Option<bool>,
    /// May it have transparent huge pages? (false: PR_SET_THP_DISABLE)
    pub thp_enabled: Option<bool>,
    /// Mask of tagged-address bits (LAM on x86; since Linux 6.4).
    pub untag_mask: Option<u64>,
    /// Threads in the group.
    pub threads: u32,
    /// Queued signals of the real user and `RLIMIT_SIGPENDING`.
    pub sigq: Option<(u64, u64)>,
    /// Signals pending for the thread. Bit n-1 is signal n in this and the next four.
    pub sig_pnd: u64,
    /// Signals pending for the whole process.
    pub shd_pnd: u64,
    /// Blocked signals.
    pub sig_blk: u64,
    /// Ignored signals.
    pub sig_ign: u64,
    /// Caught signals.
    pub sig_cgt: u64,
    /// Inheritable capabilities, bit n is capability n in this and the next four.
    pub cap_inh: u64,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Effective capabilities.
    pub cap_eff: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// Ambient capabilities.
    pub cap_amb: u64,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 off, 1 strict, 2 filter; `None` without CONFIG_SECCOMP.
    pub seccomp: Option<u32>,
    /// Number of seccomp filters.
    pub seccomp_filters: Option<u32>,
    /// Allowed CPUs as a mask of little-endian words: CPU n is bit n % 64 of word n / 64.
    pub cpus_allowed: Option<Vec<u64>>,
    /// Allowed memory nodes, the same.
    pub mems_allowed: Option<Vec<u64>>,
    /// x86 shadow stack features in use: (`shstk`, `wrss`); `None` if the kernel has no such line (since Linux 6.6).
    pub shadow_stack: Option<ShadowStack>,
    /// x86 features that arch_prctl(2) has locked, the same.
    pub shadow_stack_locked: Option<ShadowStack>,
}

/// The words of an `x86_Thread_features` line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShadowStack {
    /// `ARCH_SHSTK_SHSTK`: a shadow stack is on.
    pub shstk: bool,
    /// `ARCH_SHSTK_WRSS`: the WRSS instruction is allowed.
    pub wrss: bool,
}

/// Values while they are collected; the required ones become plain fields at the end.
#[derive(Default)]
struct Required {
    name: Option<Box<[u8]>>,
    state: Option<TaskState>,
    tgid: Option<i32>,
    pid: Option<i32>,
    ppid: Option<i32>,
    tracer_pid: Option<i32>,
    uid: Option<Ids>,
    gid: Option<Ids>,
    fd_size: Option<u64>,
    groups: Option<Vec<u32>>,
    threads: Option<u32>,
    sets: [Option<u64>; 10],
    no_new_privs: Option<bool>,
}

impl Status {
    /// The command name as the kernel has it: in [`Status::name`] newlines and backslashes are escaped.
    #[must_use]
    pub fn comm(&self) -> Vec<u8> {
        let mut comm = Vec::with_capacity(self.name.len());
        let mut bytes = self.name.iter().copied();
        while let Some(byte) = bytes.next() {
            comm.push(match byte {
                b'\\' => match bytes.next() {
                    Some(b'n') => b'\n',
                    Some(other) => other,
                    None => b'\\',
                },
                byte => byte,
            });
        }
        comm
    }
}

/// Order of `Required::sets`.
const SETS: [&str; 10] = [
    "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd",
    "CapAmb",
];

/// Parses the text of `/proc/PID/status`. Unknown lines are skipped.
///
/// # Errors
/// If a line that every kernel ≥ 6.1 prints for every task is missing, or a known line is malformed.
pub fn parse(text: &[u8]) -> Result<Status, ParseError> {
    let mut r = Required::default();
    let mut s = Status {
        name: Box::default(),
        umask: None,
        state: TaskState::Other(0),
        tgid: 0,
        ngid: None,
        pid: 0,
        ppid: 0,
        tracer_pid: 0,
        uid: Ids::default(),
        gid: Ids::default(),
        fd_size: 0,
        groups: Vec::new(),
        ns_tgid: None,
        ns_pid: None,
        ns_pgid: None,
        ns_sid: None,
        kthread: None,
        vm_size: None,
        vm_lck: None,
        vm_pin: None,
        vm_rss: None,
        rss_anon: None,
        rss_file: None,
        rss_shmem: None,
        vm_pte: None,
        vm_swap: None,
        hugetlb_pages: None,
        core_dumping: None,
        thp_enabled: None,
        untag_mask: None,
        threads: 0,
        sigq: None,
        sig_pnd: 0,
        shd_pnd: 0,
        sig_blk: 0,
        sig_ign: 0,
        sig_cgt: 0,
        cap_inh: 0,
        cap_prm: 0,
        cap_eff: 0,
        cap_bnd: 0,
        cap_amb: 0,
        no_new_privs: false,
        seccomp: None,
        seccomp_filters: None,
        cpus_allowed: None,
        mems_allowed: None,
        shadow_stack: None,
        shadow_stack_locked: None,
    };
    for (number, line) in lines(text) {
        let Some((key, value)) = key_value(line) else { continue };
        if let Err(field) = one_line(&mut s, &mut r, key, value, line) {
            return Err(ParseError::malformed(FILE, field, number, line));
        }
    }

    let missing = |field| ParseError::missing(FILE, field, 1, text);
    s.name = r.name.ok_or_else(|| missing("Name"))?;
    s.state = r.state.ok_or_else(|| missing("State"))?;
    s.tgid = r.tgid.ok_or_else(|| missing("Tgid"))?;
    s.pid = r.pid.ok_or_else(|| missing("Pid"))?;
    s.ppid = r.ppid.ok_or_else(|| missing("PPid"))?;
    s.tracer_pid = r.tracer_pid.ok_or_else(|| missing("TracerPid"))?;
    s.uid = r.uid.ok_or_else(|| missing("Uid"))?;
    s.gid = r.gid.ok_or_else(|| missing("Gid"))?;
    s.fd_size = r.fd_size.ok_or_else(|| missing("FDSize"))?;
    s.groups = r.groups.ok_or_else(|| missing("Groups"))?;
    s.threads = r.threads.ok_or_else(|| missing("Threads"))?;
    s.no_new_privs = r.no_new_privs.ok_or_else(|| missing("NoNewPrivs"))?;
    let into = [
        &mut s.sig_pnd,
        &mut s.shd_pnd,
        &mut s.sig_blk,
        &mut s.sig_ign,
        &mut s.sig_cgt,
        &mut s.cap_inh,
        &mut s.cap_prm,
        &mut s.cap_eff,
        &mut s.cap_bnd,
        &mut s.cap_amb,
    ];
    for ((slot, set), name) in into.into_iter().zip(r.sets).zip(SETS) {
        *slot = set.ok_or_else(|| missing(name))?;
    }
    Ok(s)
}

/// Stores one line; an error is the name of the field it is in.
fn one_line(
    s: &mut Status,
    r: &mut Required,
    key: &[u8],
    value: &[u8],
    line: &[u8],
) -> Result<(), &'static str> {
    let set = |r: &mut Required, i: usize| -> Result<(), &'static str> {
        r.sets[i] = Some(whole(value, |s| s.hex()).ok_or(SETS[i])?);
        Ok(())
    };
    match key {
        // Exactly one tab stands before the name: blanks after it belong to it.
        b"Name" => r.name = Some(unescape_name(line.get(6..).ok_or("Name")?)),
        b"Umask" => s.umask = Some(whole(value, |s| s.oct()).ok_or("Umask")?),
        b"State" => r.state = Some((*value.first().ok_or("State")?).into()),
        b"Tgid" => r.tgid = Some(number(value).ok_or("Tgid")?),
        b"Ngid" => s.ngid = Some(number(value).ok_or("Ngid")?),
        b"Pid" => r.pid = Some(number(value).ok_or("Pid")?),
        b"PPid" => r.ppid = Some(number(value).ok_or("PPid")?),
        b"TracerPid" => r.tracer_pid = Some(number(value).ok_or("TracerPid")?),
        b"Uid" => r.uid = Some(ids(value).ok_or("Uid")?),
        b"Gid" => r.gid = Some(ids(value).ok_or("Gid")?),
        b"FDSize" => r.fd_size = Some(whole(value, |s| s.dec()).ok_or("FDSize")?),
        b"Groups" => r.groups = Some(list(value, |s| s.dec()).ok_or("Groups")?),
        b"NStgid" => s.ns_tgid = Some(list(value, |s| s.sdec()).ok_or("NStgid")?),
        b"NSpid" => s.ns_pid = Some(list(value, |s| s.sdec()).ok_or("NSpid")?),
        b"NSpgid" => s.ns_pgid = Some(list(value, |s| s.sdec()).ok_or("NSpgid")?),
        b"NSsid" => s.ns_sid = Some(list(value, |s| s.sdec()).ok_or("NSsid")?),
        b"Kthread" => s.kthread = Some(flag(value).ok_or("Kthread")?),
        b"VmSize" => s.vm_size = Some(size(value).ok_or("VmSize")?),
        b"VmLck" => s.vm_lck = Some(size(value).ok_or("VmLck")?),
        b"VmPin" => s.vm_pin = Some(size(value).ok_or("VmPin")?),
        b"VmRSS" => s.vm_rss = Some(size(value).ok_or("VmRSS")?),
        b"RssAnon" => s.rss_anon = Some(size(value).ok_or("RssAnon")?),
        b"RssFile" => s.rss_file = Some(size(value).ok_or("RssFile")?),
        b"RssShmem" => s.rss_shmem = Some(size(value).ok_or("RssShmem")?),
        b"VmPTE" => s.vm_pte = Some(size(value).ok_or("VmPTE")?),
        b"VmSwap" => s.vm_swap = Some(size(value).ok_or("VmSwap")?),
        b"HugetlbPages" => s.hugetlb_pages = Some(size(value).ok_or("HugetlbPages")?),
        b"CoreDumping" => s.core_dumping = Some(flag(value).ok_or("CoreDumping")?),
        b"THP_enabled" => s.thp_enabled = Some(flag(value).ok_or("THP_enabled")?),
        b"untag_mask" => s.untag_mask = Some(whole(value, |s| s.hex0x()).ok_or("untag_mask")?),
        b"Threads" => r.threads = Some(whole(value, |s| s.dec()).ok_or("Threads")?),
        b"SigQ" => s.sigq = Some(pair(value).ok_or("SigQ")?),
        b"SigPnd" => set(r, 0)?,
        b"ShdPnd" => set(r, 1)?,
        b"SigBlk" => set(r, 2)?,
        b"SigIgn" => set(r, 3)?,
        b"SigCgt" => set(r, 4)?,
        b"CapInh" => set(r, 5)?,
        b"CapPrm" => set(r, 6)?,
        b"CapEff" => set(r, 7)?,
        b"CapBnd" => set(r, 8)?,
        b"CapAmb" => set(r, 9)?,
        b"NoNewPrivs" => r.no_new_privs = Some(flag(value).ok_or("NoNewPrivs")?),
        b"Seccomp" => s.seccomp = Some(whole(value, |s| s.dec()).ok_or("Seccomp")?),
        b"Seccomp_filters" => {
            s.seccomp_filters = Some(whole(value, |s| s.dec()).ok_or("Seccomp_filters")?)
        }
        b"Cpus_allowed" => s.cpus_allowed = Some(mask(value).ok_or("Cpus_allowed")?),
        b"Mems_allowed" => s.mems_allowed = Some(mask(value).ok_or("Mems_allowed")?),
        b"x86_Thread_features" => s.shadow_stack = Some(features(value)),
        b"x86_Thread_features_locked" => s.shadow_stack_locked = Some(features(value)),
        _ => {}
    }
    Ok(())
}

/// One number that is the whole value.
fn whole<T>(value: &[u8], number: impl FnOnce(&mut Scan<'_>) -> Option<T>) -> Option<T> {
    let mut scan = Scan::new(value);
    let number = number(&mut scan)?;
    scan.is_empty().then_some(number)
}

fn number(value: &[u8]) -> Option<i32> {
    whole(value, |s| s.sdec())
}

fn flag(value: &[u8]) -> Option<bool> {
    match value {
        b"0" => Some(false),
        b"1" => Some(true),
        _ => None,
    }
}

/// Blank-separated numbers, maybe none.
fn list<T>(value: &[u8], number: impl Fn(&mut Scan<'_>) -> Option<T>) -> Option<Vec<T>> {
    let mut scan = Scan::new(value);
    let mut all = Vec::new();
    loop {
        scan.blanks();
        if scan.is_empty() {
            return Some(all);
        }
        all.push(number(&mut scan)?);
        if !matches!(scan.rest.first(), None | Some(b' ' | b'\t')) {
            return None;
        }
    }
}

fn ids(value: &[u8]) -> Option<Ids> {
    match list(value, |s| s.dec())?[..] {
        [real, effective, saved, fs] => Some(Ids { real, effective, saved, fs }),
        _ => None,
    }
}

/// `"132 kB"` in bytes.
fn size(value: &[u8]) -> Option<u64> {
    whole(value, |s| {
        let kib = s.dec_u64()?;
        s.tag(b" kB")?;
        kib.checked_mul(1024)
    })
}

/// `"0/96365"`.
fn pair(value: &[u8]) -> Option<(u64, u64)> {
    whole(value, |s| {
        let first = s.dec()?;
        s.eat(b'/')?;
        Some((first, s.dec()?))
    })
}

/// Groups of up to eight hexadecimal digits with commas between, the highest first.
fn mask(value: &[u8]) -> Option<Vec<u64>> {
    let mut words: Vec<u64> = Vec::new();
    for (i, group) in value.rsplit(|b| *b == b',').enumerate() {
        let group = u64::from(whole(group, |s| s.hex::<u32>())?);
        match words.last_mut() {
            Some(word) if i % 2 == 1 => *word |= group << 32,
            _ => words.push(group),
        }
    }
    Some(words)
}

fn features(value: &[u8]) -> ShadowStack {
    let mut found = ShadowStack::default();
    for word in value.split(u8::is_ascii_whitespace) {
        match word {
            b"shstk" => found.shstk = true,
            b"wrss" => found.wrss = true,
            _ => {}
        }
    }
    found
}

/// `status` escapes exactly newline and backslash, as `\n` and `\\`.
fn unescape_name(text: &[u8]) -> Box<[u8]> {
    let mut name = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        match rest {
            [b'\\', b'n', tail @ ..] => {
                name.push(b'\n');
                rest = tail;
            }
            [b'\\', b'\\', tail @ ..] => {
                name.push(b'\\');
                rest = tail;
            }
            [b, tail @ ..] => {
                name.push(*b);
                rest = tail;
            }
            [] => return name.into(),
        }
    }
}
