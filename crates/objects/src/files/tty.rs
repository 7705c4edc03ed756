//! Terminals. Pseudoterminals whose master is in the tree are in [`super::pty`]; here are those of shell jobs, whose
//! other side is outside the tree. They are saved with `--shell-job` only, and restored as the terminal that the restoring command has itself: its standard input, or else output or error.
//!
//! What concerns the user's terminal as a whole (settings, foreground process group) is changed last ([`finish`]), so
//! that a failed restore leaves it alone. The size of its window is what it is: it is not changed at all.

use super::collect::{Collector, View};
use super::external;
use super::open::Opener;
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{
    FdTypes, FileEntry, RegFileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry,
    TtyType, WinsizeEntry,
};
use rewake_sys::Errno;
use rewake_sys::tty::{self, Property, Settings, Termios};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, major, minor};

/// What a device number says of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Driver {
    /// The slave of a pseudoterminal, with its number.
    Slave(u32),
    /// The master of a pseudoterminal.
    Master,
    /// `/dev/console`.
    Console,
    /// `/dev/tty`: whatever is the controlling terminal of who opened it.
    Controlling,
    /// A virtual terminal.
    Virtual,
    /// A serial line.
    Serial,
}

fn driver(rdev: u64) -> Option<Driver> {
    // Documentation/admin-guide/devices.txt
    Some(match (major(rdev), minor(rdev)) {
        (5, 2) | (128..=135, _) => Driver::Master,
        (slave @ 136..=143, index) => Driver::Slave((slave - 136) * 256 + index),
        (5, 1) => Driver::Console,
        (5, 0) => Driver::Controlling,
        (4, 1..=63) => Driver::Virtual,
        (4 | 188 | 204, _) => Driver::Serial,
        _ => return None,
    })
}

/// The driver of a device number in the kernel's encoding (`TIOCGDEV`).
fn driver_of(device: u32) -> Option<Driver> {
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    driver(rustix::fs::makedev(major, minor))
}

/// Is it a terminal's device number?
#[must_use]
pub fn is_terminal(rdev: u64) -> bool {
    driver(rdev).is_some()
}

impl Driver {
    /// Type and id in the image; see [`TtyInfoEntry::id`].
    fn identity(self, index: Option<u32>) -> (TtyType, u32) {
        // Ids from 1001 to 1088 mean other things.
        let skip = |index: u32| if index > 1000 { index + 88 } else { index };
        let index = skip(index.unwrap_or(0));
        match self {
            Driver::Slave(own) => (TtyType::Pty, skip(own) * 2),
            Driver::Master => (TtyType::Pty, index * 2 + 1),
            Driver::Console => (TtyType::Console, 1002 * 2),
            Driver::Virtual => (TtyType::Vt, 1004 * 2),
            Driver::Controlling => (TtyType::Ctty, 1006 * 2),
            Driver::Serial => (TtyType::Serial, 1010 * 2),
        }
    }
}

/// `st_rdev` and `st_dev` in the 32 bits of the image.
fn device(dev: u64) -> u32 {
    (minor(dev) & 0xff) | (major(dev) << 8) | ((minor(dev) & !0xff) << 12)
}

/// Surveys a terminal.
///
/// # Errors
/// Its other side is outside the tree, and `--shell-job` is not given.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let driver = driver(view.stat.st_rdev).ok_or_else(|| view.problem("it is no terminal"))?;
    let state = state(view)?;
    if external::has_terminal(collector, view) {
        return survey_external(collector, view, state);
    }
    let index = match driver {
        Driver::Slave(index) if state.is_some() => Some(index),
        Driver::Master => {
            Some(tty::pty_index(view.as_fd()).map_err(|e| view.problem(e.to_string()))?)
        }
        // What it stands for is told by the terminal itself.
        Driver::Controlling => match tty::device(view.as_fd()).ok().and_then(driver_of) {
            Some(Driver::Slave(index)) => Some(index),
            _ => None,
        },
        _ => None,
    };
    let inside = driver == Driver::Master || index.is_some_and(|i| collector.has_master(i));
    let job = "use --shell-job if it is a job of a shell; else start it with its input and output elsewhere (</dev/null >FILE 2>&1)";
    let outside = match driver {
        Driver::Slave(_) => state.is_some(),
        Driver::Controlling => true,
        Driver::Master => false,
        // These can be opened again by anybody; but one that controls a session came from a login outside.
        _ => {
            let sid = controls(view, collector.holder(view))?.0;
            sid != 0 && !collector.pids.contains(&(sid as i32))
        }
    };
    if outside && !inside && !collector.options.shell_job {
        return Err(view
            .problem("it is a terminal whose other side is outside the tree")
            .remedy(job));
    }
    let (id, path_id) = (collector.new_id(), collector.new_id());
    let tty_info_id = info(collector, view, driver, index, state)?;
    match (driver, index) {
        (Driver::Master, Some(index)) => collector.note_master(view, id, index)?,
        (Driver::Slave(_), Some(index)) if inside => collector.note_slave(view, index)?,
        (Driver::Controlling, _) => {
            let session = controls(view, collector.holder(view))?.0;
            if session != 0 {
                collector.extra_of(id).session = Some(session);
            }
        }
        _ => {}
    }
    let flags = view.flags & !((libc::O_NOCTTY | libc::O_CLOEXEC) as u32);
    let fown = view.owner()?;
    let reg = RegFileEntry {
        id: path_id,
        flags,
        fown: fown.clone(),
        name: view.link.strip_suffix(b" (deleted)").unwrap_or(&view.link).to_vec(),
        mode: Some(view.stat.st_mode),
        ..RegFileEntry::default()
    };
    collector.push(FileEntry {
        r#type: FdTypes::Reg as i32,
        id: path_id,
        reg: Some(Box::new(reg)),
        ..FileEntry::default()
    });
    let tty = TtyFileEntry { id, tty_info_id, flags, fown, regf_id: Some(path_id) };
    collector.push(FileEntry {
        r#type: FdTypes::Tty as i32,
        id,
        tty: Some(Box::new(tty)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Tty))
}

/// The first index of a terminal that is left outside, and one more than the last.
const EXTERNAL: std::ops::Range<u32> = 1012..1077;

/// Surveys a terminal that belongs to the outside (`--external tty[RDEV:DEV]`): a restore is given another.
fn survey_external(
    collector: &mut Collector,
    view: &View<'_>,
    state: Option<State>,
) -> Result<(u32, FdTypes), Problem> {
    let (rdev, dev) = (device(view.stat.st_rdev), device(view.stat.st_dev));
    let (sid, pgrp) = controls(view, collector.holder(view))?;
    let external = |t: &&mut TtyInfoEntry| t.r#type == TtyType::ExtTty as i32;
    let count = collector.ttys.iter_mut().filter(external).count() as u32;
    let known = collector.ttys.iter_mut().filter(external);
    let tty_info_id = match known.into_iter().find(|t| (t.rdev, t.dev) == (rdev, Some(dev))) {
        Some(known) => {
            if known.sid == 0 {
                (known.sid, known.pgrp) = (sid, pgrp);
            }
            known.id
        }
        None => {
            let index = EXTERNAL.start + count;
            if !EXTERNAL.contains(&index) {
                return Err(view.problem(format!(
                    "the image format has no place for more than {} external terminals",
                    EXTERNAL.len()
                )));
            }
            let (termios, termios_locked, winsize) = match state {
                Some((current, locked, window)) => (Some(current), Some(locked), Some(window)),
                None => (None, None, None),
            };
            collector.ttys.push(TtyInfoEntry {
                id: index * 2,
                r#type: TtyType::ExtTty as i32,
                sid,
                pgrp,
                rdev,
                termios,
                termios_locked,
                winsize,
                dev: Some(dev),
                uid: Some(view.stat.st_uid),
                gid: Some(view.stat.st_gid),
                ..TtyInfoEntry::default()
            });
            index * 2
        }
    };
    let id = collector.new_id();
    let flags = view.flags & !((libc::O_NOCTTY | libc::O_CLOEXEC) as u32);
    let tty = TtyFileEntry { id, tty_info_id, flags, fown: view.owner()?, regf_id: None };
    collector.push(FileEntry {
        r#type: FdTypes::Tty as i32,
        id,
        tty: Some(Box::new(tty)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Tty))
}

/// Settings and window size; absent together if the other side hung up.
type State = (TermiosEntry, TermiosEntry, WinsizeEntry);

fn state(view: &View<'_>) -> Result<Option<State>, Problem> {
    let failed =
        |e: rewake_sys::SyscallError| view.problem(format!("its settings cannot be read: {e}"));
    let current = match tty::settings(view.as_fd(), Settings::Current) {
        Ok(current) => current,
        Err(e) if e.errno == Errno::IO => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let locked = tty::settings(view.as_fd(), Settings::Locked).map_err(failed)?;
    let window = tty::window(view.as_fd()).map_err(failed)?;
    let window = WinsizeEntry {
        ws_row: window.ws_row.into(),
        ws_col: window.ws_col.into(),
        ws_xpixel: window.ws_xpixel.into(),
        ws_ypixel: window.ws_ypixel.into(),
    };
    Ok(Some((termios_entry(&current), termios_entry(&locked), window)))
}

fn termios_entry(termios: &Termios) -> TermiosEntry {
    let mut entry = TermiosEntry {
        c_iflag: termios.c_iflag,
        c_oflag: termios.c_oflag,
        c_cflag: termios.c_cflag,
        c_lflag: termios.c_lflag,
        c_line: termios.c_line.into(),
        c_ispeed: termios.c_ispeed,
        c_ospeed: termios.c_ospeed,
        ..TermiosEntry::default()
    };
    entry.set_control_chars(termios.c_cc);
    entry
}

pub(super) fn termios(entry: &TermiosEntry) -> Termios {
    Termios {
        c_iflag: entry.c_iflag,
        c_oflag: entry.c_oflag,
        c_cflag: entry.c_cflag,
        c_lflag: entry.c_lflag,
        c_line: entry.c_line as u8,
        c_cc: entry.control_chars(),
        c_ispeed: entry.c_ispeed,
        c_ospeed: entry.c_ospeed,
    }
}

/// Session and foreground process group, if the terminal controls the task's session; else zeros.
fn controls(view: &View<'_>, task: i32) -> Result<(u32, u32), Problem> {
    // TIOCGSID answers only those whose controlling terminal it is, which ours it is not.
    let stat = rewake_proc::read::ProcDir::open(task)
        .and_then(|dir| dir.stat(&mut Vec::new()))
        .map_err(|e| view.problem(e.to_string()))?;
    let here = (major(view.stat.st_rdev), minor(view.stat.st_rdev));
    let same = match stat.tty() {
        Some(tty) => tty == here || driver(view.stat.st_rdev) == Some(Driver::Controlling),
        None => false,
    };
    let id = |id: i32| u32::try_from(id).unwrap_or(0);
    Ok(if same { (id(stat.session), id(stat.tpgid)) } else { (0, 0) })
}

/// The id of the terminal's entry in `tty-info.img`, made if it is the first time it is met.
fn info(
    collector: &mut Collector,
    view: &View<'_>,
    driver: Driver,
    index: Option<u32>,
    state: Option<State>,
) -> Result<u32, Problem> {
    let (kind, id) = driver.identity(index);
    let rdev = device(view.stat.st_rdev);
    let (sid, pgrp) = match driver {
        Driver::Master => {
            let (sid, pgrp) =
                tty::session(view.as_fd()).map_err(|e| view.problem(e.to_string()))?;
            (sid.max(0) as u32, pgrp.max(0) as u32)
        }
        _ => controls(view, collector.holder(view))?,
    };
    if let Some(known) = collector.ttys.iter_mut().find(|t| t.id == id) {
        if known.rdev != rdev {
            return Err(view.problem("two terminals of this kind in one tree cannot be saved"));
        }
        if known.sid == 0 {
            (known.sid, known.pgrp) = (sid, pgrp);
        }
        return Ok(id);
    }
    let property = |p| tty::property(view.as_fd(), p).unwrap_or(false);
    let (termios, termios_locked, winsize) = match state {
        Some((current, locked, window)) => (Some(current), Some(locked), Some(window)),
        None => (None, None, None),
    };
    collector.ttys.push(TtyInfoEntry {
        id,
        r#type: kind as i32,
        // Locked and packet mode are the master's.
        locked: driver == Driver::Master && property(Property::Locked),
        exclusive: property(Property::Exclusive),
        packet_mode: driver == Driver::Master && property(Property::Packet),
        sid,
        pgrp,
        rdev,
        termios,
        termios_locked,
        winsize,
        pty: match driver {
            Driver::Slave(index) => Some(TtyPtyEntry { index }),
            Driver::Master => index.map(|index| TtyPtyEntry { index }),
            _ => None,
        },
        dev: Some(device(view.stat.st_dev)),
        uid: Some(view.stat.st_uid),
        gid: Some(view.stat.st_gid),
    });
    Ok(id)
}

/// The terminal the restoring command itself has.
pub(super) fn own() -> Option<OwnedFd> {
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let terminal = streams.into_iter().find(|fd| tty::settings(*fd, Settings::Current).is_ok())?;
    terminal.try_clone_to_owned().ok()
}

/// Opens a terminal of the image.
///
/// # Errors
/// The restoring command has no terminal, or `--shell-job` is not given.
pub fn open(opener: &mut Opener<'_>, entry: &TtyFileEntry) -> Result<OwnedFd, Problem> {
    let object = format!("terminal {}", entry.tty_info_id);
    let id = entry.tty_info_id;
    let info = opener
        .ttys
        .get(&id)
        .cloned()
        .ok_or_else(|| Problem::new(object, "tty-info.img has no such entry"))?;
    let reg = opener.entry(entry.regf_id.unwrap_or(entry.id)).ok().and_then(|e| e.reg.as_deref());
    let path = reg.map_or_else(Vec::new, |reg| reg.name.clone());
    let object = if path.is_empty() { format!("terminal {id}") } else { text(&path) };
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Problem::new(object.clone(), format!("{what}: {e}"))
    };
    let kind = TtyType::try_from(info.r#type).unwrap_or(TtyType::Unknown);
    let flags = OFlags::from_bits_retain(entry.flags)
        .difference(OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC)
        | OFlags::CLOEXEC
        | OFlags::NOCTTY;
    if let Some(fd) = opener.controlling.remove(&entry.id) {
        return Ok(fd);
    }
    match kind {
        TtyType::Pty if opener.ptys.contains_key(&(id >> 1)) => {
            super::pty::open(opener, &info, &path, flags)
        }
        TtyType::Pty if info.termios.is_none() => {
            hung_up(flags).map_err(|e| failed("a terminal that has hung up cannot be made", &e))
        }
        TtyType::Pty | TtyType::Ctty => inherit(opener, &info, flags, &object),
        TtyType::Console | TtyType::Vt | TtyType::Serial
            if info.sid == 0 || opener.sessions.contains(&(info.sid as i32)) =>
        {
            let fd = rustix::fs::open(path.as_slice(), flags, Mode::empty())
                .map_err(|e| failed("cannot be opened", &e))?;
            set_all(fd.as_fd(), &info)
                .map_err(|e| failed("its settings cannot be restored", &e))?;
            Ok(fd)
        }
        TtyType::Console | TtyType::Vt | TtyType::Serial => inherit(opener, &info, flags, &object),
        // Given ones are found before: what is left has come by a hostile image.
        TtyType::ExtTty => Err(Problem::new(object, "nothing is given in its place")),
        TtyType::Unknown => {
            Err(Problem::new(object, "terminals of an unknown kind cannot be restored"))
        }
    }
}

/// The restoring command's own terminal, in place of `info`.
fn inherit(
    opener: &mut Opener<'_>,
    info: &TtyInfoEntry,
    flags: OFlags,
    object: &str,
) -> Result<OwnedFd, Problem> {
    if !opener.options.shell_job {
        return Err(Problem::new(object, "the other side of this terminal is not in the images")
            .remedy("use --shell-job to put the terminal of this command in its place"));
    }
    let Some(own) = own() else {
        return Err(Problem::new(
            object,
            "--shell-job puts this command's own terminal in its place, but this command has none: its standard input \
             is no terminal",
        )
        .remedy("run the command in a terminal, for instance under script(1)"));
    };
    let others = opener.inherited.iter().any(|t| t.id != info.id && t.r#type == info.r#type);
    if others {
        log::warn!(
            "{object}: the tree had several terminals; all of them become this command's own"
        );
    }
    let controlling = info.r#type == TtyType::Ctty as i32;
    let path = if controlling {
        "/dev/tty".to_owned()
    } else {
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own))
    };
    let fd = rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|e| Problem::new(object, format!("{path} cannot be opened: {e}")))?;
    if !opener.inherited.iter().any(|t| t.id == info.id) {
        opener.inherited.push(info.clone());
    }
    Ok(fd)
}

/// A terminal whose other side is gone.
fn hung_up(flags: OFlags) -> Result<OwnedFd, Errno> {
    use rustix::pty::OpenptFlags;
    let master =
        rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    rustix::fs::open(name, flags, Mode::empty())
}

fn set_all(fd: BorrowedFd<'_>, info: &TtyInfoEntry) -> Result<(), rewake_sys::SyscallError> {
    // The current ones first: locked ones cannot be changed.
    if let Some(entry) = &info.termios {
        tty::set_settings(fd, Settings::Current, &termios(entry))?;
    }
    if let Some(entry) = &info.termios_locked {
        let locked = termios(entry);
        if tty::settings(fd, Settings::Locked)? != locked {
            tty::set_settings(fd, Settings::Locked, &locked)?;
        }
    }
    Ok(())
}

/// Gives the restoring command's own terminal the settings of the restored job and puts the job in the foreground: call
/// it when all tasks exist and are in their process groups, as late as possible. `is_restored` says whether a process
/// group is one of the restored tree.
///
/// # Errors
/// The settings cannot be changed.
pub fn finish(opener: &Opener<'_>, is_restored: impl Fn(i32) -> bool) -> Result<(), Problem> {
    for (id, fd) in &opener.given_terminals {
        let failed = |e: rewake_sys::SyscallError| {
            let object = format!("the terminal that is given in the place of terminal {id}");
            Problem::new(object, format!("its settings cannot be changed: {e}"))
        };
        if let Some(info) = opener.ttys.get(id) {
            set_all(fd.as_fd(), info).map_err(failed)?;
        }
    }
    if opener.inherited.is_empty() {
        return Ok(());
    }
    let Some(own) = own() else { return Ok(()) };
    let failed = |e: rewake_sys::SyscallError| {
        Problem::new("this command's terminal", format!("its settings cannot be changed: {e}"))
    };
    // A session has one terminal: the one that controls it counts, or else the first.
    let info = opener.inherited.iter().find(|t| t.sid != 0).or(opener.inherited.first());
    let Some(info) = info else { return Ok(()) };
    set_all(own.as_fd(), info).map_err(failed)?;
    let group = info.pgrp as i32;
    // Only who has the foreground may hand it over: a restore in the background stays there.
    let ours = rewake_sys::task::own_group().map_err(failed)?;
    let in_front = tty::session(own.as_fd()).is_ok_and(|(_, front)| front == ours);
    if in_front
        && group > 0
        && is_restored(group)
        && let Some(group) = opener.pids.outer_group(group)
        && let Err(e) = tty::set_foreground(own.as_fd(), group)
    {
        log::warn!("process group {group} cannot be put in the foreground of the terminal: {e}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::OpenptFlags;

    fn pair() -> (OwnedFd, OwnedFd) {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        (master, slave)
    }

    #[test]
    fn settings_come_back() {
        let (_master, slave) = pair();
        let before = tty::settings(slave.as_fd(), Settings::Current).unwrap();
        let entry = termios_entry(&before);
        assert_eq!(termios(&entry), before);
        let mut raw = before;
        raw.c_lflag = 0;
        raw.c_cc[18] = 77;
        tty::set_settings(slave.as_fd(), Settings::Current, &raw).unwrap();
        let info = TtyInfoEntry { termios: Some(entry), ..TtyInfoEntry::default() };
        set_all(slave.as_fd(), &info).unwrap();
        assert_eq!(tty::settings(slave.as_fd(), Settings::Current).unwrap(), before);
    }

    #[test]
    fn speeds_without_a_name_come_back() {
        let (_master, slave) = pair();
        let before = tty::settings(slave.as_fd(), Settings::Current).unwrap();
        assert_eq!((before.has_numbers(), before.c_ospeed), (false, 0));
        // CBAUD replaced by BOTHER.
        let c_cflag = before.c_cflag & !0x100f | 0x1000;
        let odd = Termios { c_cflag, c_ispeed: 12_345, c_ospeed: 12_345, ..before };
        tty::set_settings(slave.as_fd(), Settings::Current, &odd).unwrap();
        let entry = termios_entry(&tty::settings(slave.as_fd(), Settings::Current).unwrap());
        assert_eq!(entry.c_ospeed, 12_345);
        tty::set_settings(slave.as_fd(), Settings::Current, &before).unwrap();
        let info = TtyInfoEntry { termios: Some(entry), ..TtyInfoEntry::default() };
        set_all(slave.as_fd(), &info).unwrap();
        let now = tty::settings(slave.as_fd(), Settings::Current).unwrap();
        assert_eq!((now.has_numbers(), now.c_ospeed), (true, 12_345));
    }

    #[test]
    fn a_hung_up_terminal_is_hung_up() {
        let fd = hung_up(OFlags::RDWR | OFlags::NOCTTY).unwrap();
        let error = tty::settings(fd.as_fd(), Settings::Current).unwrap_err();
        assert_eq!(error.errno, Errno::IO);
    }

    #[test]
    fn devices_as_criu_tells_them() {
        let dev = rustix::fs::makedev;
        assert_eq!(driver(dev(136, 3)).unwrap().identity(None), (TtyType::Pty, 6));
        assert_eq!(driver(dev(5, 0)).unwrap().identity(None), (TtyType::Ctty, 2012));
        assert_eq!(driver(dev(5, 2)), Some(Driver::Master));
        assert_eq!(Driver::Master.identity(Some(3)), (TtyType::Pty, 7));
        assert_eq!(driver_of(0x8803), Some(Driver::Slave(3)));
        assert_eq!(driver(dev(1, 3)), None);
        assert_eq!((device(dev(136, 0)), device(dev(5, 0)), device(dev(0, 26))), (34816, 1280, 26));
    }
}
