//! Files that hold one value: `comm`, `personality`, `loginuid`, `oom_score_adj`, `timerslack_ns`, `coredump_filter`,
//! `uptime`, the boot time in `/proc/stat`, the CPU flags in `/proc/cpuinfo`, and single-number sysctls.

use std::time::Duration;

use crate::ParseError;
use crate::scan::{Scan, key_value, lines};

/// Parses `/proc/PID/comm`: the name without the final newline. It is not escaped.
///
/// # Errors
/// If the final newline is missing.
pub fn comm(text: &[u8]) -> Result<&[u8], ParseError> {
    text.strip_suffix(b"\n").ok_or_else(|| ParseError::malformed("comm", "comm", 1, text))
}

/// Parses `/proc/PID/personality`: `PER_*` and flags of personality(2), in hexadecimal.
///
/// # Errors
/// If it is not one number.
pub fn personality(text: &[u8]) -> Result<u32, ParseError> {
    one("personality", text, |s| s.hex())
}

/// Parses `/proc/PID/loginuid`; `None` if it was never set.
///
/// # Errors
/// If it is not one number.
pub fn loginuid(text: &[u8]) -> Result<Option<u32>, ParseError> {
    one("loginuid", text, |s| s.dec()).map(|uid| (uid != u32::MAX).then_some(uid))
}

/// Parses `/proc/PID/oom_score_adj`: -1000 to 1000.
///
/// # Errors
/// If it is not one number.
pub fn oom_score_adj(text: &[u8]) -> Result<i32, ParseError> {
    one("oom_score_adj", text, |s| s.sdec())
}

/// Parses `/proc/PID/timerslack_ns`: nanoseconds.
///
/// # Errors
/// If it is not one number.
pub fn timerslack_ns(text: &[u8]) -> Result<u64, ParseError> {
    one("timerslack_ns", text, |s| s.dec())
}

/// Parses `/proc/PID/coredump_filter` (core(5)): a mask of kinds of memory, in hexadecimal.
///
/// # Errors
/// If it is not one number.
pub fn coredump_filter(text: &[u8]) -> Result<u32, ParseError> {
    one("coredump_filter", text, |s| s.hex())
}

/// Parses `/proc/PID/autogroup` (sched(7)): the nice value of the session's group of tasks, from `/autogroup-7 nice 0`.
///
/// # Errors
/// If it has another form.
pub fn autogroup_nice(text: &[u8]) -> Result<i32, ParseError> {
    let malformed = || ParseError::malformed("autogroup", "nice", 1, text);
    let nice = text.rsplit(|b| *b == b' ').next().unwrap_or_default();
    if !text.starts_with(b"/autogroup-") {
        return Err(malformed());
    }
    one("autogroup", nice, |s| s.sdec())
}

/// Parses `/proc/sys/kernel/pid_max`: process ids are lower than this.
///
/// # Errors
/// If it is not one number.
pub fn pid_max(text: &[u8]) -> Result<i32, ParseError> {
    one("sys/kernel/pid_max", text, |s| s.sdec())
}

/// Parses a sysctl that is one number, as `sys/kernel/ns_last_pid`; `file` names it in the error.
///
/// # Errors
/// If it is not one number.
pub fn sysctl(file: &'static str, text: &[u8]) -> Result<i64, ParseError> {
    one(file, text, |s| s.sdec())
}

/// Parses `/proc/uptime`: time since boot (seen from the reader's time namespace) and idle time of all CPUs together.
///
/// # Errors
/// If it is not two times.
pub fn uptime(text: &[u8]) -> Result<(Duration, Duration), ParseError> {
    one("uptime", text, |s| {
        let up = centiseconds(s)?;
        s.eat(b' ')?;
        Some((up, centiseconds(s)?))
    })
}

/// `1019.17`: always two decimals.
fn centiseconds(scan: &mut Scan<'_>) -> Option<Duration> {
    let seconds = scan.dec_u64()?;
    scan.eat(b'.')?;
    let digits = scan.rest.len();
    let hundredths: u32 = scan.dec()?;
    if digits - scan.rest.len() != 2 {
        return None;
    }
    Some(Duration::new(seconds, hundredths * 10_000_000))
}

/// Finds the boot time in `/proc/stat`: seconds since the epoch, seen from the reader's time namespace.
///
/// # Errors
/// If there is no such line or it is malformed.
pub fn btime(text: &[u8]) -> Result<u64, ParseError> {
    for (number, line) in lines(text) {
        if let Some(value) = line.strip_prefix(b"btime ") {
            let mut scan = Scan::new(value);
            let seconds = scan.dec_u64().filter(|_| scan.end().is_some());
            return seconds.ok_or_else(|| ParseError::malformed("stat", "btime", number, line));
        }
    }
    Err(ParseError::missing("stat", "btime", 1, text))
}

/// Finds the first CPU's `flags` (x86) or `Features` (arm64) in `/proc/cpuinfo`, as words.
///
/// # Errors
/// If there is no such line.
pub fn cpu_flags(text: &[u8]) -> Result<Vec<&[u8]>, ParseError> {
    for (_, line) in lines(text) {
        if let Some((key, value)) = key_value(line)
            && matches!(key.trim_ascii_end(), b"flags" | b"Features")
        {
            return Ok(value.split(|b| *b == b' ').filter(|w| !w.is_empty()).collect());
        }
    }
    Err(ParseError::missing("cpuinfo", "flags", 1, text))
}

/// One value that is the whole text but for a final newline.
fn one<T>(
    file: &'static str,
    text: &[u8],
    take: impl FnOnce(&mut Scan<'_>) -> Option<T>,
) -> Result<T, ParseError> {
    let mut scan = Scan::new(text);
    let value = take(&mut scan).filter(|_| scan.end().is_some());
    value.ok_or_else(|| ParseError::malformed(file, file, 1, text))
}
