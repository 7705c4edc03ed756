//! kcmp(2): do two tasks share a kernel object?

use crate::call::{Result, pid_arg, syscall};
use std::cmp::Ordering;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// A file description, by two descriptor numbers.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// `fs_struct` (cwd, root, umask).
    Fs = 3,
    /// Signal-handler tables.
    Sighand = 4,
    /// I/O contexts.
    Io = 5,
    /// System V semaphore undo lists.
    SysvSem = 6,
}

fn kcmp(a: i32, b: i32, kind: usize, x: usize, y: usize) -> Result<Ordering> {
    // SAFETY: for these kinds the arguments are numbers; EPOLL_TFD passes a live struct, see below.
    let order =
        unsafe { syscall("kcmp", libc::SYS_kcmp, [pid_arg(a), pid_arg(b), kind, x, y, 0]) }?;
    Ok(match order {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    })
}

/// Compares an object of tasks `a` and `b`; the order is stable while the objects live, so it can be sorted by.
///
/// # Errors
/// `EPERM`, `ESRCH`; `EBADF` for a descriptor that is not open.
pub fn compare(a: i32, b: i32, kind: Kind) -> Result<Ordering> {
    kcmp(a, b, kind as usize, 0, 0)
}

/// Compares file description `fd_a` of task `a` with `fd_b` of `b`.
///
/// # Errors
/// As [`compare`].
pub fn compare_files(a: i32, fd_a: i32, b: i32, fd_b: i32) -> Result<Ordering> {
    kcmp(a, b, Kind::File as usize, fd_a as usize, fd_b as usize)
}

/// Is `fd` of task `b` the description that epoll `efd` of task `a` watches as number `tfd` (the `toff`-th of that number)?
///
/// # Errors
/// As [`compare`].
pub fn is_epoll_target(a: i32, efd: i32, tfd: i32, toff: u32, b: i32, fd: i32) -> Result<bool> {
    #[repr(C)]
    struct Slot {
        efd: u32,
        tfd: u32,
        toff: u32,
    }
    let slot = Slot { efd: efd as u32, tfd: tfd as u32, toff };
    kcmp(b, a, 7, fd as usize, (&raw const slot) as usize).map(|order| order == Ordering::Equal)
}
