//! `/proc/PID/syscall` (proc_pid_syscall(5)).

use crate::ParseError;
use crate::scan::Scan;

/// Where a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syscall {
    /// On a CPU: nothing can be told.
    Running,
    /// Blocked, but not in a system call.
    Outside {
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
    /// Blocked in a system call.
    Inside {
        /// Its number.
        nr: u32,
        /// Its arguments.
        args: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
}

/// Parses the text of `/proc/PID/syscall`.
///
/// # Errors
/// If it has none of the three forms.
pub fn parse(text: &[u8]) -> Result<Syscall, ParseError> {
    let bad = |field| ParseError::malformed("syscall", field, 1, text);
    let text = text.trim_ascii_end();
    if text == b"running" {
        return Ok(Syscall::Running);
    }
    let mut scan = Scan::new(text);
    let nr: i64 = scan.sdec().ok_or_else(|| bad("number"))?;
    let mut next = |field| {
        scan.eat(b' ').ok_or_else(|| bad(field))?;
        scan.hex0x().ok_or_else(|| bad(field))
    };
    let parsed = if nr == -1 {
        Syscall::Outside { sp: next("stack pointer")?, pc: next("program counter")? }
    } else {
        let nr = u32::try_from(nr).map_err(|_| bad("number"))?;
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = next("arguments")?;
        }
        Syscall::Inside { nr, args, sp: next("stack pointer")?, pc: next("program counter")? }
    };
    if scan.is_empty() { Ok(parsed) } else { Err(bad("program counter")) }
}
