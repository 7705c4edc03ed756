//! eventfd, epoll, timerfd, pidfd.

use super::{KernelDev, whole};
use crate::scan::Scan;

/// An eventfd(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventFd {
    /// Counter.
    pub count: u64,
    /// Number of the kernel's object, the same for all descriptions of it; -1 or absent if it has none.
    pub id: Option<i32>,
    /// `EFD_SEMAPHORE`; the line exists since Linux 6.5.
    pub semaphore: Option<bool>,
}

#[derive(Default)]
pub(super) struct EventFdParts {
    count: Option<u64>,
    id: Option<i32>,
    semaphore: Option<bool>,
}

impl EventFdParts {
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<bool, &'static str> {
        match key {
            b"eventfd-count" => {
                self.count = Some(whole(value, |s| s.hex()).ok_or("eventfd-count")?)
            }
            b"eventfd-id" => self.id = Some(whole(value, |s| s.sdec()).ok_or("eventfd-id")?),
            b"eventfd-semaphore" => {
                self.semaphore =
                    Some(whole(value, |s| s.dec::<u64>()).ok_or("eventfd-semaphore")? != 0);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Result<Option<EventFd>, &'static str> {
        match self.count {
            Some(count) => Ok(Some(EventFd { count, id: self.id, semaphore: self.semaphore })),
            None if self.id.is_some() || self.semaphore.is_some() => Err("eventfd-count"),
            None => Ok(None),
        }
    }
}

/// One file an epoll(7) instance watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpollItem {
    /// Descriptor number it was added with; it may since stand for another file.
    pub tfd: i32,
    /// `EPOLL*` mask with the flags; 0 but for `EPOLLET` and the like if disabled by `EPOLLONESHOT`.
    pub events: u32,
    /// `epoll_data`.
    pub data: u64,
    /// File position of the target.
    pub pos: i64,
    /// Inode of the target.
    pub ino: u64,
    /// Device of the target.
    pub sdev: KernelDev,
}

/// `tfd:       12 events: 80000019 data:                c  pos:0 ino:40f sdev:10`.
pub(super) fn epoll_item(line: &[u8]) -> Result<EpollItem, &'static str> {
    let mut scan = Scan::new(line);
    let tfd = labelled(&mut scan, b"tfd:", |s| s.sdec()).ok_or("tfd")?;
    let events = labelled(&mut scan, b"events:", |s| s.hex()).ok_or("events")?;
    let data = labelled(&mut scan, b"data:", |s| s.hex()).ok_or("data")?;
    let pos = labelled(&mut scan, b"pos:", |s| s.sdec()).ok_or("pos")?;
    let ino = labelled(&mut scan, b"ino:", |s| s.hex()).ok_or("ino")?;
    let sdev = KernelDev(labelled(&mut scan, b"sdev:", |s| s.hex()).ok_or("sdev")?);
    Ok(EpollItem { tfd, events, data, pos, ino, sdev })
}

fn labelled<T>(
    scan: &mut Scan<'_>,
    label: &[u8],
    number: impl FnOnce(&mut Scan<'_>) -> Option<T>,
) -> Option<T> {
    scan.blanks();
    scan.tag(label)?;
    scan.blanks();
    number(scan)
}

/// A timerfd_create(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimerFd {
    /// `CLOCK_*`.
    pub clockid: i32,
    /// Expirations not read yet.
    pub ticks: u64,
    /// Flags of the last timerfd_settime(2), `TFD_TIMER_*`.
    pub settime_flags: u32,
    /// Time left (also for an absolute timer): seconds, nanoseconds; zero if disarmed or expired.
    pub it_value: (u64, u64),
    /// Interval: seconds, nanoseconds.
    pub it_interval: (u64, u64),
}

#[derive(Default)]
pub(super) struct TimerFdParts {
    clockid: Option<i32>,
    ticks: Option<u64>,
    settime_flags: Option<u32>,
    it_value: Option<(u64, u64)>,
    it_interval: Option<(u64, u64)>,
}

impl TimerFdParts {
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<bool, &'static str> {
        match key {
            b"clockid" => self.clockid = Some(whole(value, |s| s.sdec()).ok_or("clockid")?),
            // The clock comes first; without it, a line as `ticks` is some other driver's.
            _ if self.clockid.is_none() => return Ok(false),
            b"ticks" => self.ticks = Some(whole(value, |s| s.dec()).ok_or("ticks")?),
            b"settime flags" => {
                self.settime_flags = Some(whole(value, |s| s.oct()).ok_or("settime flags")?)
            }
            b"it_value" => self.it_value = Some(whole(value, time).ok_or("it_value")?),
            b"it_interval" => self.it_interval = Some(whole(value, time).ok_or("it_interval")?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Result<Option<TimerFd>, &'static str> {
        let Some(clockid) = self.clockid else { return Ok(None) };
        Ok(Some(TimerFd {
            clockid,
            ticks: self.ticks.ok_or("ticks")?,
            settime_flags: self.settime_flags.ok_or("settime flags")?,
            it_value: self.it_value.ok_or("it_value")?,
            it_interval: self.it_interval.ok_or("it_interval")?,
        }))
    }
}

/// `(3, 500000000)`.
fn time(scan: &mut Scan<'_>) -> Option<(u64, u64)> {
    scan.eat(b'(')?;
    let seconds = scan.dec()?;
    scan.tag(b", ")?;
    let nanoseconds = scan.dec()?;
    scan.eat(b')')?;
    Some((seconds, nanoseconds))
}

/// A pidfd_open(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFd {
    /// The process in the procfs mount's pid namespace; -1 if it is dead and reaped, 0 if outside.
    pub pid: i32,
    /// Its ids from that namespace inwards; empty without CONFIG_PID_NS.
    pub ns_pids: Vec<i32>,
}

#[derive(Default)]
pub(super) struct PidFdParts {
    pid: Option<i32>,
    ns_pids: Vec<i32>,
}

impl PidFdParts {
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<bool, &'static str> {
        match key {
            b"Pid" => self.pid = Some(whole(value, |s| s.sdec()).ok_or("Pid")?),
            b"NSpid" if self.pid.is_some() => {
                let words = value.split(|b| matches!(b, b'\t' | b' ')).filter(|w| !w.is_empty());
                self.ns_pids =
                    words.map(|w| whole(w, |s| s.sdec())).collect::<Option<_>>().ok_or("NSpid")?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Option<PidFd> {
        self.pid.map(|pid| PidFd { pid, ns_pids: self.ns_pids })
    }
}
