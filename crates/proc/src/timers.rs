//! `/proc/PID/timers` (proc_pid_timers(5)): the POSIX timers of a process, without their times.

use crate::ParseError;
use crate::scan::{Scan, key_value, lines};

const FILE: &str = "timers";

/// How a POSIX timer tells that it expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// `SIGEV_SIGNAL`: a signal.
    Signal,
    /// `SIGEV_NONE`: not at all.
    None,
    /// `SIGEV_THREAD`: to the kernel a signal too.
    Thread,
}

/// One timer of timer_create(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PosixTimer {
    /// Timer id.
    pub id: i32,
    /// Signal number.
    pub signal: i32,
    /// `sigev_value` as a pointer.
    pub value: u64,
    /// `SIGEV_*` without `SIGEV_THREAD_ID`.
    pub notify: Notify,
    /// `SIGEV_THREAD_ID` was given: `target` is a thread.
    pub thread_id: bool,
    /// The process or thread to signal.
    pub target: i32,
    /// `CLOCK_*`, negative for the CPU clocks of a process or thread.
    pub clock_id: i32,
}

/// Parses the text of `/proc/PID/timers`: four lines a timer.
///
/// # Errors
/// If a timer's lines are not complete, in order and well-formed. Unknown lines are skipped.
pub fn parse(text: &[u8]) -> Result<Vec<PosixTimer>, ParseError> {
    let mut timers = Vec::new();
    let mut id = None;
    let mut signal = None;
    let mut notify = None;
    let mut last = 1;
    for (number, line) in lines(text) {
        last = number;
        let bad = |field| ParseError::malformed(FILE, field, number, line);
        let Some((key, value)) = key_value(line) else { continue };
        let mut scan = Scan::new(value);
        match key {
            b"ID" => {
                if id.is_some() {
                    return Err(ParseError::missing(FILE, "ClockID", number, line));
                }
                id = Some(whole(&mut scan, |s| s.sdec()).ok_or_else(|| bad("ID"))?);
            }
            b"signal" => {
                signal = Some(whole(&mut scan, signal_value).ok_or_else(|| bad("signal"))?)
            }
            b"notify" => notify = Some(whole(&mut scan, target).ok_or_else(|| bad("notify"))?),
            b"ClockID" => {
                let missing = |field| ParseError::missing(FILE, field, number, line);
                let clock_id = whole(&mut scan, |s| s.sdec()).ok_or_else(|| bad("ClockID"))?;
                let id = id.take().ok_or_else(|| missing("ID"))?;
                let (signal, value) = signal.take().ok_or_else(|| missing("signal"))?;
                let (notify, thread_id, target) = notify.take().ok_or_else(|| missing("notify"))?;
                timers.push(PosixTimer { id, signal, value, notify, thread_id, target, clock_id });
            }
            _ => {}
        }
    }
    if id.is_some() {
        return Err(ParseError::missing(FILE, "ClockID", last, b""));
    }
    Ok(timers)
}

fn whole<'a, T>(scan: &mut Scan<'a>, take: impl FnOnce(&mut Scan<'a>) -> Option<T>) -> Option<T> {
    let value = take(scan)?;
    scan.is_empty().then_some(value)
}

/// `14/0000000000123400`.
fn signal_value(scan: &mut Scan<'_>) -> Option<(i32, u64)> {
    let signal = scan.sdec()?;
    scan.eat(b'/')?;
    Some((signal, scan.hex()?))
}

/// `signal/tid.14256`.
fn target(scan: &mut Scan<'_>) -> Option<(Notify, bool, i32)> {
    let notify = match scan.until(b'/')? {
        b"signal" => Notify::Signal,
        b"none" => Notify::None,
        b"thread" => Notify::Thread,
        _ => return None,
    };
    let thread_id = match scan.until(b'.')? {
        b"tid" => true,
        b"pid" => false,
        _ => return None,
    };
    Some((notify, thread_id, scan.sdec()?))
}
