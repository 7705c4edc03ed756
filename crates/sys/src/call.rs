//! The one funnel of raw system calls.

/// An `errno` value.
pub use rustix::io::Errno;

/// A failed system call, with its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct SyscallError {
    /// Name of the call as in the manual.
    pub call: &'static str,
    /// Why it failed.
    pub errno: Errno,
}

impl SyscallError {
    /// Names the call that failed with `errno`.
    #[must_use]
    pub fn new(call: &'static str, errno: Errno) -> SyscallError {
        SyscallError { call, errno }
    }
}

/// Result of a wrapped call.
pub type Result<T> = std::result::Result<T, SyscallError>;

/// What an interface tells that not every kernel or machine has: `None` where it is not known (`ENOSYS`, `EINVAL`,
/// `ENODEV`, `EOPNOTSUPP`, and `EIO`, by which ptrace(2) says so). Any other failure is one.
///
/// # Errors
/// That of `result`.
pub fn if_known<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) => match e.errno {
            Errno::NOSYS | Errno::INVAL | Errno::NODEV | Errno::OPNOTSUPP | Errno::IO => Ok(None),
            _ => Err(e),
        },
    }
}

/// Makes the system call `nr`.
///
/// # Errors
/// The kernel's `errno`, under the name `call`.
///
/// # Safety
/// The arguments must be valid for the call: pointers live and of the right type for what the kernel reads or writes.
pub(crate) unsafe fn syscall(
    call: &'static str,
    nr: libc::c_long,
    args: [usize; 6],
) -> Result<usize> {
    // SAFETY: the caller vouches for the arguments.
    let result = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if result == -1 {
        // SAFETY: errno is a thread-local of libc, always readable.
        let errno = unsafe { *libc::__errno_location() };
        return Err(SyscallError::new(call, Errno::from_raw_os_error(errno)));
    }
    Ok(result as usize)
}

/// A pid or tid as an argument word.
pub(crate) fn pid_arg(pid: i32) -> usize {
    pid as isize as usize
}
