//! Scheduling attributes of any thread.

use crate::call::{Result, pid_arg, syscall};

/// `sched_getscheduler(2)`, including `SCHED_RESET_ON_FORK`.
///
/// # Errors
/// `ESRCH`.
pub fn policy(tid: i32) -> Result<u32> {
    // SAFETY: numbers only.
    unsafe {
        syscall("sched_getscheduler", libc::SYS_sched_getscheduler, [pid_arg(tid), 0, 0, 0, 0, 0])
    }
    .map(|p| p as u32)
}

/// `struct sched_attr` (linux/sched/types.h), version 1.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's field names")]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub util_min: u32,
    pub util_max: u32,
}

/// `sched_getattr(2)`.
///
/// # Errors
/// `ESRCH`.
pub fn attributes(tid: i32) -> Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: attr is live and `size` bytes long.
    unsafe {
        syscall(
            "sched_getattr",
            libc::SYS_sched_getattr,
            [pid_arg(tid), (&raw mut attr) as usize, size, 0, 0, 0],
        )
    }?;
    Ok(attr)
}

/// The CPU set of a thread, as `u64` words, trailing zero words cut.
///
/// # Errors
/// `ESRCH`.
pub fn affinity(tid: i32) -> Result<Vec<u64>> {
    let mut words = [0u64; 128];
    // SAFETY: the array is live and its size is passed.
    let bytes = unsafe {
        syscall(
            "sched_getaffinity",
            libc::SYS_sched_getaffinity,
            [pid_arg(tid), size_of_val(&words), words.as_mut_ptr() as usize, 0, 0, 0],
        )
    }?;
    let used =
        words[..(bytes / 8).min(128)].iter().rposition(|w| *w != 0).map_or(0, |last| last + 1);
    Ok(words[..used].to_vec())
}

/// Sets the CPU set of a thread (0: the caller).
///
/// # Errors
/// `EINVAL` if no CPU of the set exists.
pub fn set_affinity(tid: i32, words: &[u64]) -> Result<()> {
    // SAFETY: the slice is live and its size is passed.
    unsafe {
        syscall(
            "sched_setaffinity",
            libc::SYS_sched_setaffinity,
            [pid_arg(tid), size_of_val(words), words.as_ptr() as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

/// `ioprio_get(2)` of a thread.
///
/// # Errors
/// `ESRCH`.
pub fn io_priority(tid: i32) -> Result<u32> {
    // SAFETY: numbers only.
    unsafe { syscall("ioprio_get", libc::SYS_ioprio_get, [1, pid_arg(tid), 0, 0, 0, 0]) }
        .map(|p| p as u32)
}

/// The nice value of a thread, which real-time policies keep in the background (`getpriority(2)`).
///
/// # Errors
/// `ESRCH`.
pub fn nice(tid: i32) -> Result<i32> {
    // SAFETY: numbers only. The system call returns 20 - nice.
    unsafe { syscall("getpriority", libc::SYS_getpriority, [0, pid_arg(tid), 0, 0, 0, 0]) }
        .map(|value| 20 - value as i32)
}

/// Has the calling thread run before all others that are not of a real-time policy (`SCHED_FIFO`), until it ends. For those
/// who are waited for, and are short.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE`, or where control groups give no real time.
pub fn hurry() -> Result<()> {
    const FIFO: usize = 1;
    const RESET_ON_FORK: usize = 0x4000_0000;
    let priority = 1i32;
    // SAFETY: a live `struct sched_param`, which is an int.
    unsafe {
        syscall(
            "sched_setscheduler",
            libc::SYS_sched_setscheduler,
            [0, FIFO | RESET_ON_FORK, (&raw const priority) as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

/// Keeps the calling thread on chosen CPUs for a while: talking to a stopped thread costs a third of the time if it does
/// not take a wake-up of another CPU. Dropping it gives the thread its old CPU set back.
#[derive(Debug)]
pub struct Pin {
    before: Vec<u64>,
    now: Option<usize>,
}

impl Pin {
    /// Pins nothing yet.
    #[must_use]
    pub fn new() -> Pin {
        Pin { before: affinity(0).unwrap_or_default(), now: None }
    }

    /// Moves the calling thread to `cpu`, if it may run there at all.
    pub fn to(&mut self, cpu: usize) {
        let allowed = self.before.get(cpu / 64).is_some_and(|word| word & (1 << (cpu % 64)) != 0);
        if self.now == Some(cpu) || !allowed {
            return;
        }
        let mut words = vec![0u64; cpu / 64 + 1];
        words[cpu / 64] = 1 << (cpu % 64);
        if set_affinity(0, &words).is_ok() {
            self.now = Some(cpu);
        }
    }
}

impl Pin {
    /// Gives the thread its old CPU set back.
    pub fn release(&mut self) {
        if self.now.take().is_some() {
            // A CPU of the old set may be gone; then the kernel's choice is as good as ours.
            let _ = set_affinity(0, &self.before);
        }
    }
}

impl Default for Pin {
    fn default() -> Pin {
        Pin::new()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.release();
    }
}
