//! Threads: what otherwise only each of them could tell itself, or a text of `/proc` for each.

use super::asm::{Helper, Program, R1, R2, R3, R6, R7, R8, STACK, Size};
use super::{Members, kernel, offset, read, words};
use rewake_sys::bpf::iter::{self, Whose};
use rustix::fd::OwnedFd;
use std::sync::OnceLock;

/// Levels of process id namespaces in which a thread's number is told.
const LEVELS: i16 = 4;
/// Words of a record.
const WORDS: i16 = LEVELS + 15;

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    function: u32,
    pid: i16,
    level: i16,
    numbers: i16,
    /// Size of a number in its namespace.
    number: i16,
    cred: i16,
    real_cred: i16,
    securebits: i16,
    /// Of a thread itself, in the order of [`Thread`]'s words.
    of_thread: [(Size, i16); 11],
}

impl Offsets {
    /// `number` is the size of a number in its namespace.
    pub(super) fn new(function: u32, member: Members<'_>, number: u32) -> Result<Offsets, String> {
        let of = |of, name| offset(member(of, name)?);
        let task = |name| of("task_struct", name);
        let comm = task("comm")?;
        Ok(Offsets {
            function,
            pid: task("thread_pid")?,
            level: of("pid", "level")?,
            numbers: of("pid", "numbers")? + of("upid", "nr")?,
            number: i16::try_from(number).map_err(|e| e.to_string())?,
            cred: task("cred")?,
            real_cred: task("real_cred")?,
            securebits: of("cred", "securebits")?,
            of_thread: [
                (Size::Double, task("clear_child_tid")?),
                (Size::Double, task("sas_ss_sp")?),
                (Size::Double, task("sas_ss_size")?),
                (Size::Word, task("sas_ss_flags")?),
                (Size::Word, task("pdeath_signal")?),
                (Size::Double, task("timer_slack_ns")?),
                (Size::Double, task("default_timer_slack_ns")?),
                (Size::Double, task("atomic_flags")?),
                (Size::Word, task("seccomp")? + of("seccomp", "mode")?),
                (Size::Double, comm),
                (Size::Double, comm + 8),
            ],
        })
    }

    fn program(&self) -> Vec<u64> {
        let mut p = Program::default();
        let place = |n: i16| (n - WORDS) * 8;
        p.load(Size::Double, R6, R1, 0);
        p.load(Size::Double, R7, R1, 8);
        p.end_if_null(R7);
        p.read((STACK, place(0)), 8, (R7, self.pid));
        p.load(Size::Double, R8, STACK, place(0));
        for level in 0..LEVELS {
            p.store_value(STACK, place(level), 0);
            p.read((STACK, place(level)), 4, (R8, self.numbers + level * self.number));
        }
        p.store_value(STACK, place(LEVELS), 0);
        p.read((STACK, place(LEVELS)), 4, (R8, self.level));
        p.read((STACK, place(LEVELS + 1)), 8, (R7, self.cred));
        p.load(Size::Double, R8, STACK, place(LEVELS + 1));
        p.store_value(STACK, place(LEVELS + 2), 0);
        p.read((STACK, place(LEVELS + 2)), 4, (R8, self.securebits));
        p.read((STACK, place(LEVELS + 3)), 8, (R7, self.real_cred));
        for (n, (size, at)) in (LEVELS + 4..).zip(self.of_thread) {
            p.load(size, R2, R7, at);
            p.store(STACK, place(n), R2);
        }
        p.load(Size::Double, R1, R6, 0);
        p.copy(R2, STACK);
        p.add(R2, place(0).into());
        p.set(R3, i32::from(WORDS) * 8);
        p.call(Helper::SeqWrite);
        p.end()
    }
}

/// Which credentials a thread has: tells those of different ones apart as long as it stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Those it acts with, and those it is treated by.
    pointers: (u64, u64),
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
}

/// A thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its number in our own process id namespace.
    pub tid: i32,
    /// User and group ids, capabilities and the like.
    pub credentials: Credentials,
    /// `PR_GET_TID_ADDRESS`.
    pub tid_address: u64,
    /// Alternate signal stack: address, size, flags as sigaltstack(2) tells them where it is not in use.
    pub alternate_stack: (u64, u64, u32),
    /// `PR_GET_PDEATHSIG`.
    pub pdeath_sig: u32,
    /// `PR_GET_TIMERSLACK`, in nanoseconds.
    pub timer_slack: u64,
    /// What `PR_SET_TIMERSLACK` goes back to with 0, in nanoseconds.
    pub default_timer_slack: u64,
    /// `PR_GET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// `SECCOMP_MODE_*`.
    pub seccomp: u32,
    /// Its name.
    pub comm: Vec<u8>,
}

/// The level of our own process id namespace, in which numbers are told.
pub(super) fn own_level() -> Result<usize, String> {
    static LEVEL: OnceLock<Result<usize, String>> = OnceLock::new();
    let look = || {
        let mut own = None;
        records(std::process::id() as i32, |record| own = Some(record[LEVELS as usize] as usize))?;
        let own = own.ok_or("our own process is not told")?;
        (own < LEVELS as usize).then_some(own).ok_or(format!("we live at level {own}"))
    };
    LEVEL.get_or_init(look).clone()
}

/// Gives `take` the record of each thread of a process.
fn records(pid: i32, mut take: impl FnMut([u64; WORDS as usize])) -> Result<(), String> {
    static PROGRAM: OnceLock<Result<OwnedFd, String>> = OnceLock::new();
    const LEN: usize = WORDS as usize * 8;
    let offsets = kernel()?.threads.as_ref().map_err(Clone::clone)?;
    let program = PROGRAM.get_or_init(|| {
        iter::load(&offsets.program(), offsets.function).map_err(|e| e.to_string())
    });
    read(program.as_ref().map_err(Clone::clone)?, Whose::Process(pid), |text| {
        let (records, rest) = text.as_chunks::<LEN>();
        if !rest.is_empty() {
            return Err("a record is not whole".to_owned());
        }
        for record in records {
            take(words(record));
        }
        Ok(true)
    })
}

/// The threads of a process, which stand still.
///
/// # Errors
/// Why this kernel does not tell them, or not us.
pub fn of(pid: i32) -> Result<Vec<Thread>, String> {
    const NO_NEW_PRIVS: u64 = 1;
    const AUTODISARM: u32 = 1 << 31;
    let level = own_level()?;
    let mut threads = Vec::new();
    records(pid, |record| {
        let (numbers, rest) = record.split_at(LEVELS as usize);
        let &[
            _,
            cred,
            securebits,
            real,
            address,
            sp,
            size,
            flags,
            pdeath,
            slack,
            default,
            atomic,
            seccomp,
            a,
            b,
        ] = rest
        else {
            return;
        };
        let disabled = if size == 0 { libc::SS_DISABLE as u32 } else { 0 };
        let comm = [a.to_ne_bytes(), b.to_ne_bytes()].concat();
        threads.push(Thread {
            tid: numbers[level] as i32,
            credentials: Credentials { pointers: (cred, real), securebits: securebits as u32 },
            tid_address: address,
            alternate_stack: (sp, size, flags as u32 & AUTODISARM | disabled),
            pdeath_sig: pdeath as u32,
            timer_slack: slack,
            // As the thread itself would find it: without a slack of its own it cannot ask for it.
            default_timer_slack: if slack == 0 { 0 } else { default },
            no_new_privs: atomic & NO_NEW_PRIVS != 0,
            seccomp: seccomp as u32,
            comm: comm.split(|byte| *byte == 0).next().unwrap_or_default().to_vec(),
        });
    })?;
    Ok(threads)
}
