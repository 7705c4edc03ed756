//! timerfd_create(2), on all clocks. A timer is made unarmed and armed when everything else is done ([`arm`]).

use super::collect::{Collector, View};
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, TimerfdEntry};
use rewake_proc::fdinfo::TimerFd;
use rewake_sys::descriptors;
use rustix::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
};
use std::time::Duration;

/// How long a survey waits for timers that may be due.
pub const PATIENCE: Duration = Duration::from_millis(5);

/// What `/proc` tells of a timer.
fn look(fd: BorrowedFd<'_>) -> Result<TimerFd, String> {
    // A periodic timer that has expired stands still until somebody looks; fdinfo alone does not count as looking, and
    // would tell one expiration however many there were. Nobody notices this: a read counts them the same way.
    rustix::time::timerfd_gettime(fd).map_err(|e| format!("its time left cannot be read: {e}"))?;
    // Not what is known of the descriptor: it changes.
    let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
        .map_err(|e| format!("cannot be examined: {e}"))?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| e.to_string())?;
    info.timerfd.ok_or_else(|| "fdinfo does not tell its state".to_owned())
}

/// What `/proc` tells of a timer for certain. One that is due looks like one that is not armed until the kernel comes to
/// it, which takes a CPU that sleeps 50 µs, and one of a virtual machine now and then several times that; `patience` is how long
/// it may take with all timers together.
fn settled(fd: BorrowedFd<'_>, patience: &mut Duration) -> Result<TimerFd, String> {
    const STEP: Duration = Duration::from_micros(100);
    /// So often those are looked at that are most likely not armed.
    const LOOKS: u32 = 5;
    let mut looks = 0u32;
    loop {
        let timer = look(fd)?;
        looks += 1;
        let open = timer.it_value == (0, 0) && timer.ticks == 0;
        // Many are disarmed, but few of these have an interval.
        let enough = looks > LOOKS && timer.it_interval == (0, 0);
        if !open || enough || patience.is_zero() {
            return Ok(timer);
        }
        *patience = patience.saturating_sub(STEP);
        std::thread::sleep(STEP);
    }
}

/// Surveys a timerfd.
///
/// # Errors
/// `/proc` does not tell its state (CONFIG_CHECKPOINT_RESTORE).
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let timer = settled(view.as_fd(), &mut collector.timer_patience);
    let timer = timer.map_err(|e| view.problem(e))?;
    let id = collector.new_id();
    let TimerFd { clockid, ticks, settime_flags, it_value, it_interval } = timer;
    let entry = TimerfdEntry {
        id,
        flags: view.flags,
        fown: view.owner()?,
        clockid: clockid as u32,
        ticks,
        settime_flags,
        vsec: it_value.0,
        vnsec: it_value.1,
        isec: it_interval.0,
        insec: it_interval.1,
    };
    collector.push(FileEntry {
        r#type: FdTypes::Timerfd as i32,
        id,
        tfd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Timerfd))
}

/// The clock of a timer and how to read it.
fn clock(id: u32) -> Option<(TimerfdClockId, ClockId)> {
    Some(match id as i32 {
        libc::CLOCK_REALTIME => (TimerfdClockId::Realtime, ClockId::Realtime),
        libc::CLOCK_MONOTONIC => (TimerfdClockId::Monotonic, ClockId::Monotonic),
        libc::CLOCK_BOOTTIME => (TimerfdClockId::Boottime, ClockId::Boottime),
        libc::CLOCK_REALTIME_ALARM => (TimerfdClockId::RealtimeAlarm, ClockId::Realtime),
        libc::CLOCK_BOOTTIME_ALARM => (TimerfdClockId::BoottimeAlarm, ClockId::Boottime),
        _ => return None,
    })
}

fn problem(entry: &TimerfdEntry, reason: String) -> Problem {
    Problem::new(format!("timerfd {} (clock {})", entry.id, entry.clockid), reason)
}

/// Makes a timerfd of the image, unarmed.
///
/// # Errors
/// The clock is unknown, or one that wakes the machine and `CAP_WAKE_ALARM` is missing.
pub fn open(entry: &TimerfdEntry) -> Result<OwnedFd, Problem> {
    let (clock, _) = clock(entry.clockid)
        .ok_or_else(|| problem(entry, "there is no such clock for timers".into()))?;
    rustix::time::timerfd_create(clock, TimerfdFlags::CLOEXEC)
        .map_err(|e| problem(entry, format!("cannot be made: {e}")))
}

/// How a timer is armed: the flags, whether the value is still to be added to the clock's time, value and interval.
fn setting(entry: &TimerfdEntry) -> (TimerfdTimerFlags, bool, Itimerspec) {
    let time = |sec: u64, nsec: u64| Timespec { tv_sec: sec as i64, tv_nsec: nsec as i64 };
    let interval = time(entry.isec, entry.insec);
    let mut value = time(entry.vsec, entry.vnsec);
    let disarmed = |t: Timespec| t.tv_sec == 0 && t.tv_nsec == 0;
    // An expired periodic timer stands still until it is read. CRIU saves it so; how long ago it expired is lost.
    if disarmed(value) && entry.ticks > 0 {
        value = interval;
    }
    let flags = TimerfdTimerFlags::from_bits_retain(entry.settime_flags);
    let absolute = flags.contains(TimerfdTimerFlags::ABSTIME) && !disarmed(value);
    (flags, absolute, Itimerspec { it_interval: interval, it_value: value })
}

fn add(a: Timespec, b: Timespec) -> Timespec {
    let nanoseconds = a.tv_nsec + b.tv_nsec;
    Timespec {
        tv_sec: a.tv_sec.saturating_add(b.tv_sec).saturating_add(nanoseconds / 1_000_000_000),
        tv_nsec: nanoseconds % 1_000_000_000,
    }
}

/// Arms a timer as it was: the image has the time left, also of absolute timers.
///
/// # Errors
/// The image has an impossible time.
pub fn arm(entry: &TimerfdEntry, fd: BorrowedFd<'_>) -> Result<(), Problem> {
    let (_, read) = clock(entry.clockid)
        .ok_or_else(|| problem(entry, "there is no such clock for timers".into()))?;
    let (flags, absolute, mut spec) = setting(entry);
    if absolute {
        spec.it_value = add(spec.it_value, rustix::time::clock_gettime(read));
    }
    rustix::time::timerfd_settime(fd, flags, &spec)
        .map_err(|e| problem(entry, format!("cannot be armed: {e}")))?;
    // After settime, which sets them to 0.
    if entry.ticks != 0 {
        descriptors::timerfd_set_ticks(fd, entry.ticks)
            .map_err(|e| problem(entry, format!("its expirations cannot be set: {e}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;

    fn state(fd: BorrowedFd<'_>) -> TimerFd {
        let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        rewake_proc::fdinfo::parse(&std::fs::read(path).unwrap()).unwrap().timerfd.unwrap()
    }

    fn entry(clock: i32) -> TimerfdEntry {
        TimerfdEntry { clockid: clock as u32, vsec: 1000, ..TimerfdEntry::default() }
    }

    #[test]
    fn armed_as_before() {
        for clock in [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
            for flags in [0, 1, 3] {
                if flags == 3 && clock != libc::CLOCK_REALTIME {
                    continue;
                }
                let entry =
                    TimerfdEntry { ticks: 7, insec: 5, settime_flags: flags, ..entry(clock) };
                let fd = open(&entry).unwrap();
                arm(&entry, fd.as_fd()).unwrap();
                let state = state(fd.as_fd());
                assert_eq!((state.clockid, state.ticks, state.settime_flags), (clock, 7, flags));
                assert_eq!(state.it_interval, (0, 5));
                assert!((998..=1000).contains(&state.it_value.0), "{state:?}");
            }
        }
    }

    #[test]
    fn an_unarmed_timer_stays_unarmed_and_an_expired_one_expired() {
        for ticks in [0, 1] {
            let entry =
                TimerfdEntry { vsec: 0, ticks, settime_flags: 1, ..entry(libc::CLOCK_REALTIME) };
            let fd = open(&entry).unwrap();
            arm(&entry, fd.as_fd()).unwrap();
            assert_eq!((state(fd.as_fd()).it_value, state(fd.as_fd()).ticks), ((0, 0), ticks));
        }
    }

    #[test]
    fn an_expired_periodic_timer_goes_on() {
        let entry = TimerfdEntry { vsec: 0, ticks: 3, isec: 50, ..entry(libc::CLOCK_MONOTONIC) };
        let fd = open(&entry).unwrap();
        arm(&entry, fd.as_fd()).unwrap();
        assert_eq!((state(fd.as_fd()).it_value.0, state(fd.as_fd()).ticks), (49, 3));
    }

    /// Has the calling thread run on one CPU only.
    fn run_on(cpu: usize) {
        let mut cpus = rustix::thread::CpuSet::new();
        cpus.set(cpu);
        let _ = rustix::thread::sched_setaffinity(None, &cpus);
    }

    #[test]
    fn one_that_is_due_is_not_taken_for_unarmed() {
        const PERIOD: Duration = Duration::from_micros(500);
        let fd = open(&entry(libc::CLOCK_MONOTONIC)).unwrap();
        let period = Timespec { tv_sec: 0, tv_nsec: PERIOD.as_nanos() as i64 };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        // More than a dump has: a CPU that others have may be away for longer.
        let patience = PATIENCE * 1000;
        let mut late = 0;
        for interval in [period, never].repeat(150) {
            let spec = Itimerspec { it_interval: interval, it_value: period };
            // Another CPU, which sleeps, comes to it late.
            run_on(1);
            rustix::time::timerfd_settime(&fd, TimerfdTimerFlags::empty(), &spec).unwrap();
            let armed = std::time::Instant::now();
            run_on(0);
            while armed.elapsed() < PERIOD * 9 / 10 {}
            while armed.elapsed() < PERIOD * 12 / 10 {
                let timer = settled(fd.as_fd(), &mut patience.clone()).unwrap();
                let is_open = timer.it_value == (0, 0) && timer.ticks == 0;
                assert!(!is_open || timer.it_interval == (0, 0), "{timer:?}");
                if is_open {
                    // Nothing tells one that is later than it may be from one that is not armed.
                    std::thread::sleep(Duration::from_millis(20));
                    late += 1;
                }
            }
            assert!(state(fd.as_fd()).it_value != (0, 0) || state(fd.as_fd()).ticks > 0);
        }
        assert!(late < 5, "{late} were taken for unarmed");
    }

    #[test]
    fn unarmed_ones_are_not_waited_for_forever() {
        let fd = open(&entry(libc::CLOCK_MONOTONIC)).unwrap();
        let (never, interval) =
            (Timespec { tv_sec: 0, tv_nsec: 0 }, Timespec { tv_sec: 1, tv_nsec: 0 });
        let spec = Itimerspec { it_interval: interval, it_value: never };
        rustix::time::timerfd_settime(&fd, TimerfdTimerFlags::empty(), &spec).unwrap();
        let mut patience = PATIENCE;
        for _ in 0..2 {
            let timer = settled(fd.as_fd(), &mut patience).unwrap();
            assert_eq!((timer.it_value, timer.ticks, patience), ((0, 0), 0, Duration::ZERO));
        }
    }

    #[test]
    fn unknown_clocks_are_refused() {
        assert!(open(&entry(libc::CLOCK_TAI)).is_err());
    }
}
