//! `/proc/PID/stat` and `/proc/PID/task/TID/stat` (proc_pid_stat(5)).

use crate::ParseError;
use crate::scan::Scan;

const FILE: &str = "stat";

/// The state letter of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// `R`: running or runnable.
    Running,
    /// `S`: interruptible sleep.
    Sleeping,
    /// `D`: uninterruptible sleep.
    DiskSleep,
    /// `T`: stopped by a job-control signal.
    Stopped,
    /// `t`: stopped under a tracer.
    Tracing,
    /// `Z`: dead, not yet reaped.
    Zombie,
    /// `X` (or `x`): dead, about to vanish.
    Dead,
    /// `P`: parked kernel thread.
    Parked,
    /// `I`: idle kernel thread.
    Idle,
    /// A letter no known kernel prints.
    Other(u8),
}

impl TaskState {
    /// Is the thread dead?
    pub const fn is_dead(self) -> bool {
        matches!(self, TaskState::Zombie | TaskState::Dead)
    }
}

impl From<u8> for TaskState {
    fn from(letter: u8) -> Self {
        match letter {
            b'R' => TaskState::Running,
            b'S' => TaskState::Sleeping,
            b'D' => TaskState::DiskSleep,
            b'T' => TaskState::Stopped,
            b't' => TaskState::Tracing,
            b'Z' => TaskState::Zombie,
            b'X' | b'x' => TaskState::Dead,
            b'P' => TaskState::Parked,
            b'I' => TaskState::Idle,
            other => TaskState::Other(other),
        }
    }
}

/// What `stat` says. Ids are in the pid namespace of the procfs mount it was read from.
///
/// Fields that proc(5) marks PTRACE_MODE_READ (addresses, exit code) are 0 for a reader without that right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Process or thread id, as the directory's name.
    pub pid: i32,
    /// The command name, raw: `stat` does not escape it, so it may hold blanks, `)` and newlines.
    pub comm: Box<[u8]>,
    /// State letter.
    pub state: TaskState,
    /// Parent; 0 if it is outside the pid namespace.
    pub ppid: i32,
    /// Process group; 0 if its leader is outside the pid namespace.
    pub pgrp: i32,
    /// Session; 0 if its leader is outside the pid namespace.
    pub session: i32,
    /// Controlling terminal in the encoding of stat(2)'s old `st_rdev`, 0 if none; see [`Stat::tty`].
    pub tty_nr: i32,
    /// Foreground process group of the controlling terminal, -1 if there is none.
    pub tpgid: i32,
    /// `PF_*` flags of the kernel's `struct task_struct`.
    pub flags: u32,
    /// Minor faults.
    pub minflt: u64,
    /// Minor faults of waited-for children.
    pub cminflt: u64,
    /// Major faults.
    pub majflt: u64,
    /// Major faults of waited-for children.
    pub cmajflt: u64,
    /// Time in user mode, in clock ticks (`sysconf(_SC_CLK_TCK)`, 100 a second on x86-64).
    pub utime: u64,
    /// Time in kernel mode, in clock ticks.
    pub stime: u64,
    /// User time of waited-for children, in clock ticks.
    pub cutime: i64,
    /// Kernel time of waited-for children, in clock ticks.
    pub cstime: i64,
    /// Scheduling priority: nice + 20, or negative real-time priority - 1.
    pub priority: i64,
    /// Nice value, -20 to 19.
    pub nice: i64,
    /// Threads in the group; 0 or 1 in a zombie.
    pub num_threads: u32,
    /// Start after boot in clock ticks, seen from the reader's time namespace. With the pid it names a process for ever.
    pub starttime: u64,
    /// Size of the address space in bytes.
    pub vsize: u64,
    /// Resident pages (not bytes).
    pub rss: u64,
    /// Soft `RLIMIT_RSS` in bytes.
    pub rsslim: u64,
    /// `mm->start_code`.
    pub start_code: u64,
    /// `mm->end_code`.
    pub end_code: u64,
    /// `mm->start_stack`: the bottom (highest address) the stack began at.
    pub start_stack: u64,
    /// Stack pointer, 0 unless exiting or dumping core.
    pub kstkesp: u64,
    /// Instruction pointer, 0 unless exiting or dumping core.
    pub kstkeip: u64,
    /// Low 31 bits of the pending signals; use `status` for all.
    pub signal: u64,
    /// Low 31 bits of the blocked signals; use `status` for all.
    pub blocked: u64,
    /// Low 31 bits of the ignored signals; use `status` for all.
    pub sigignore: u64,
    /// Low 31 bits of the caught signals; use `status` for all.
    pub sigcatch: u64,
    /// 1 if sleeping in the kernel, else 0 (an address in old kernels).
    pub wchan: u64,
    /// Signal sent to the parent at exit; -1 in a thread that is not the leader.
    pub exit_signal: i32,
    /// CPU last run on.
    pub processor: u32,
    /// Real-time priority 1 to 99, 0 for other policies.
    pub rt_priority: u32,
    /// Scheduling policy, `SCHED_*`.
    pub policy: u32,
    /// Aggregated block I/O delays in clock ticks.
    pub delayacct_blkio_ticks: u64,
    /// Time running a virtual CPU, in clock ticks.
    pub guest_time: u64,
    /// The same of waited-for children.
    pub cguest_time: i64,
    /// `mm->start_data`.
    pub start_data: u64,
    /// `mm->end_data`.
    pub end_data: u64,
    /// `mm->start_brk`.
    pub start_brk: u64,
    /// `mm->arg_start`.
    pub arg_start: u64,
    /// `mm->arg_end`.
    pub arg_end: u64,
    /// `mm->env_start`.
    pub env_start: u64,
    /// `mm->env_end`.
    pub env_end: u64,
    /// Exit status in the form of wait(2).
    pub exit_code: i32,
}

impl Stat {
    /// Has the process ended, all of it? Its first thread may be a zombie while others go on.
    pub fn has_ended(&self) -> bool {
        self.state.is_dead() && self.num_threads <= 1
    }

    /// Device number (major, minor) of the controlling terminal.
    pub fn tty(&self) -> Option<(u32, u32)> {
        // The kernel's new_encode_dev: minor bits 0-7 and 20-31, major bits 8-19.
        let dev = self.tty_nr as u32;
        if dev == 0 { None } else { Some((dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xfff00)) }
    }
}

/// The blank-separated numbers after the command name.
struct Fields<'a> {
    scan: Scan<'a>,
    text: &'a [u8],
}

impl Fields<'_> {
    #[cold]
    fn fault(&self, field: &'static str) -> ParseError {
        if self.scan.end().is_some() {
            ParseError::missing(FILE, field, 1, self.text)
        } else {
            ParseError::malformed(FILE, field, 1, self.text)
        }
    }

    /// Takes a number and the blank (or the text's end) after it.
    fn take<T>(
        &mut self,
        field: &'static str,
        number: impl FnOnce(&mut Scan<'_>) -> Option<T>,
    ) -> Result<T, ParseError> {
        let mut scan = self.scan;
        scan.blanks();
        match (number(&mut scan), scan.rest.first()) {
            (Some(value), None | Some(b' ' | b'\n')) => {
                self.scan = scan;
                Ok(value)
            }
            _ => Err(self.fault(field)),
        }
    }

    fn u<T: TryFrom<u64>>(&mut self, field: &'static str) -> Result<T, ParseError> {
        self.take(field, |s| s.dec())
    }

    fn i<T: TryFrom<i64>>(&mut self, field: &'static str) -> Result<T, ParseError> {
        self.take(field, |s| s.sdec())
    }
}

/// Parses the text of `/proc/PID/stat`.
///
/// # Errors
/// If one of the 52 fields is missing or not a number of its range. Further fields are ignored.
pub fn parse(text: &[u8]) -> Result<Stat, ParseError> {
    let bad = |field| ParseError::malformed(FILE, field, 1, text);
    let mut scan = Scan::new(text);
    let pid =
        scan.dec::<u32>().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| bad("pid"))?;
    scan.tag(b" (").ok_or_else(|| bad("comm"))?;
    // The name may hold anything, but nothing after it holds a parenthesis: the last one ends it.
    let close = memchr::memrchr(b')', scan.rest).ok_or_else(|| bad("comm"))?;
    let comm = scan.rest[..close].into();
    scan.rest = &scan.rest[close + 1..];
    scan.eat(b' ').ok_or_else(|| bad("state"))?;
    let state = scan.byte().filter(u8::is_ascii_alphabetic).ok_or_else(|| bad("state"))?.into();

    let mut f = Fields { scan, text };
    let stat = Stat {
        pid,
        comm,
        state,
        ppid: f.i("ppid")?,
        pgrp: f.i("pgrp")?,
        session: f.i("session")?,
        tty_nr: f.i("tty_nr")?,
        tpgid: f.i("tpgid")?,
        flags: f.u("flags")?,
        minflt: f.u("minflt")?,
        cminflt: f.u("cminflt")?,
        majflt: f.u("majflt")?,
        cmajflt: f.u("cmajflt")?,
        utime: f.u("utime")?,
        stime: f.u("stime")?,
        cutime: f.i("cutime")?,
        cstime: f.i("cstime")?,
        priority: f.i("priority")?,
        nice: f.i("nice")?,
        num_threads: f.u("num_threads")?,
        starttime: {
            f.i::<i64>("itrealvalue")?;
            f.u("starttime")?
        },
        vsize: f.u("vsize")?,
        rss: f.u("rss")?,
        rsslim: f.u("rsslim")?,
        start_code: f.u("start_code")?,
        end_code: f.u("end_code")?,
        start_stack: f.u("start_stack")?,
        kstkesp: f.u("kstkesp")?,
        kstkeip: f.u("kstkeip")?,
        signal: f.u("signal")?,
        blocked: f.u("blocked")?,
        sigignore: f.u("sigignore")?,
        sigcatch: f.u("sigcatch")?,
        wchan: f.u("wchan")?,
        exit_signal: {
            f.u::<u64>("nswap")?;
            f.u::<u64>("cnswap")?;
            f.i("exit_signal")?
        },
        processor: f.u("processor")?,
        rt_priority: f.u("rt_priority")?,
        policy: f.u("policy")?,
        delayacct_blkio_ticks: f.u("delayacct_blkio_ticks")?,
        guest_time: f.u("guest_time")?,
        cguest_time: f.i("cguest_time")?,
        start_data: f.u("start_data")?,
        end_data: f.u("end_data")?,
        start_brk: f.u("start_brk")?,
        arg_start: f.u("arg_start")?,
        arg_end: f.u("arg_end")?,
        env_start: f.u("env_start")?,
        env_end: f.u("env_end")?,
        exit_code: f.i("exit_code")?,
    };
    Ok(stat)
}
