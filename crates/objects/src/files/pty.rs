//! Pseudoterminals whose master the tree holds itself: pty(7). Both sides are made anew, with the same number.
//!
//! What waits in them can only be read by taking it out. It is put back at once, byte by byte (`TIOCSTI`), whatever becomes
//! of the tree; a restore puts it in by the same means.

use super::collect::{Collector, View};
use super::open::Opener;
use super::tty as terminal;
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{TtyDataEntry, TtyFileEntry, TtyInfoEntry};
use rewake_sys::tty::{self, Property, Settings, Termios, WinSize};
use rewake_sys::{Errno, SyscallError};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What the line discipline can hold (N_TTY_BUF_SIZE less one).
const ROOM: usize = 4095;
/// More than a pseudoterminal can hold.
const LIMIT: usize = 1 << 20;

/// What of pseudoterminals is inside the tree.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Numbers of those whose master a task of the tree holds; absent until somebody asks.
    masters: Option<HashSet<u32>>,
    /// By number.
    pairs: BTreeMap<u32, Ends>,
}

/// One description of each side, and who has the first of them.
#[derive(Debug, Default)]
struct Ends {
    holder: i32,
    object: String,
    file: u32,
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
}

impl Collector {
    /// Does a task of the tree hold the master of pseudoterminal `index`?
    pub(super) fn has_master(&mut self, index: u32) -> bool {
        let pids = &self.pids;
        let masters = self.ptys.masters.get_or_insert_with(|| masters(pids));
        masters.contains(&index)
    }

    /// Notes a master.
    pub(super) fn note_master(
        &mut self,
        view: &View<'_>,
        file: u32,
        index: u32,
    ) -> Result<(), Problem> {
        let holder = self.holder(view);
        let ends = self.ptys.pairs.entry(index).or_default();
        (ends.holder, ends.object, ends.file) = (holder, view.object(), file);
        ends.master = Some(view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?);
        Ok(())
    }

    /// Notes a slave whose master is in the tree.
    pub(super) fn note_slave(&mut self, view: &View<'_>, index: u32) -> Result<(), Problem> {
        let ends = self.ptys.pairs.entry(index).or_default();
        if ends.slave.is_none() {
            ends.slave = Some(view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?);
        }
        Ok(())
    }

    /// Reads what waits in the pseudoterminals of the tree. Call it once all tasks are surveyed. Returns what cannot be
    /// saved, with the process.
    pub fn terminal_queues(&mut self) -> Vec<(i32, Problem)> {
        let mut problems = Vec::new();
        for (index, ends) in std::mem::take(&mut self.ptys.pairs) {
            let Some(master) = &ends.master else { continue };
            let id = |t: &&TtyInfoEntry| t.pty.as_ref().is_some_and(|p| p.index == index);
            let own = self.ttys.iter().filter(id).find(|t| t.id & 1 == 1);
            let Some((id, sid, pgrp)) = own.map(|t| (t.id, t.sid, t.pgrp)) else { continue };
            // The master knows; a slave may be held by those only whose terminal it is not.
            if let Some(slave) = self.ttys.iter_mut().find(|t| t.id == id & !1) {
                (slave.sid, slave.pgrp) = (sid, pgrp);
            }
            match queues(master.as_fd(), ends.slave.as_ref().map(AsFd::as_fd)) {
                Ok(queues) => {
                    if queues.closed {
                        self.extra_of(ends.file).slave_closed = Some(true);
                    }
                    let both = [(id, queues.output), (id & !1, queues.input)];
                    let some = both.into_iter().filter(|(_, data)| !data.is_empty());
                    self.tty_data.extend(some.map(|(tty_id, data)| TtyDataEntry { tty_id, data }));
                }
                Err(e) => problems.push((
                    ends.holder,
                    Problem::new(ends.object, format!("what waits in it cannot be read: {e}")),
                )),
            }
        }
        problems
    }
}

/// The numbers of the pseudoterminals whose masters these processes hold.
fn masters(pids: &HashSet<i32>) -> HashSet<u32> {
    let mut found = HashSet::new();
    for pid in pids {
        for entry in descriptors(*pid) {
            let link = rustix::fs::readlink(entry.path(), Vec::new());
            if !link.is_ok_and(|link| link.as_bytes().ends_with(b"ptmx")) {
                continue;
            }
            let Some(fds) = entry.path().parent().map(std::path::Path::to_owned) else { continue };
            let path = fds.with_file_name("fdinfo").join(entry.file_name());
            let info = std::fs::read_to_string(path).unwrap_or_default();
            let index = info.lines().find_map(|line| line.strip_prefix("tty-index:"));
            found.extend(index.and_then(|index| index.trim().parse::<u32>().ok()));
        }
    }
    found
}

/// The entries of `/proc/PID/fd`, or those of a living thread, if the leader has ended.
fn descriptors(pid: i32) -> Vec<std::fs::DirEntry> {
    let list = |path: String| std::fs::read_dir(path).into_iter().flatten().flatten();
    let own: Vec<_> = list(format!("/proc/{pid}/fd")).collect();
    if !own.is_empty() {
        return own;
    }
    let threads = list(format!("/proc/{pid}/task"));
    let of = |thread: std::fs::DirEntry| list(format!("{}/fd", thread.path().display())).collect();
    threads.map(of).find(|found: &Vec<_>| !found.is_empty()).unwrap_or_default()
}

/// What waits in a pseudoterminal.
#[derive(Debug, Default)]
struct Queues {
    /// For the reader of the master.
    output: Vec<u8>,
    /// For the reader of the slave.
    input: Vec<u8>,
    /// Its slave was open once and is not now.
    closed: bool,
}

fn queues(master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>) -> Result<Queues, SyscallError> {
    let mut seen = Queues::default();
    let mut events = [rustix::event::PollFd::new(&master, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    // Polling also has the kernel hand over what is on its way.
    rustix::event::poll(&mut events, Some(&now)).map_err(|e| SyscallError::new("poll", e))?;
    let happened = events[0].revents();
    seen.closed = slave.is_none() && happened.contains(rustix::event::PollFlags::HUP);
    if happened.contains(rustix::event::PollFlags::IN) && waiting(master)? > 0 {
        seen.output = output(master, slave)?;
    }
    if let Some(slave) = slave {
        seen.input = input(master, slave)?;
    }
    Ok(seen)
}

fn waiting(fd: BorrowedFd<'_>) -> Result<u64, SyscallError> {
    rustix::io::ioctl_fionread(fd).map_err(|e| SyscallError::new("ioctl(FIONREAD)", e))
}

/// Runs `work` while a description does not block.
fn without_blocking<T>(
    fd: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, SyscallError>,
) -> Result<T, SyscallError> {
    let flags = rewake_sys::file::flags(fd)?;
    rewake_sys::file::set_flags(fd, flags | libc::O_NONBLOCK as u32)?;
    let result = work();
    rewake_sys::file::set_flags(fd, flags)?;
    result
}

fn read_all(fd: BorrowedFd<'_>) -> Result<Vec<u8>, SyscallError> {
    let mut data = Vec::new();
    let mut buffer = [0u8; 8192];
    while data.len() < LIMIT {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) | Err(Errno::AGAIN | Errno::IO) => break,
            Ok(n) => data.extend_from_slice(&buffer[..n]),
            Err(Errno::INTR) => {}
            Err(e) => return Err(SyscallError::new("read", e)),
        }
    }
    Ok(data)
}

fn write_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), SyscallError> {
    while !data.is_empty() {
        let n = rustix::io::write(fd, data).map_err(|e| SyscallError::new("write", e))?;
        data = &data[n..];
    }
    Ok(())
}

/// What waits for the reader of the master; it waits again afterwards.
fn output(master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>) -> Result<Vec<u8>, SyscallError> {
    let packets = tty::property(master, Property::Packet)?;
    if packets {
        tty::set_property(master, Property::Packet, false)?;
    }
    let result = without_blocking(master, || read_all(master));
    let result = result.and_then(|data| put_output(master, slave, &data).map(|()| data));
    if packets {
        tty::set_property(master, Property::Packet, true)?;
    }
    result
}

/// Has `data` wait for the reader of the master.
fn put_output(
    master: BorrowedFd<'_>,
    slave: Option<BorrowedFd<'_>>,
    data: &[u8],
) -> Result<(), SyscallError> {
    let (first, rest) = data.split_at(data.len().min(ROOM));
    tty::insert(master, first)?;
    if rest.is_empty() {
        return Ok(());
    }
    // The rest is on its way, where only a writer can put it; without a slave one is opened for the moment.
    let own = match slave {
        Some(_) => None,
        None => Some(tty::peer(master)?),
    };
    let Some(slave) = slave.or(own.as_ref().map(AsFd::as_fd)) else { return Ok(()) };
    let settings = tty::settings(slave, Settings::Current)?;
    let plain = Termios { c_oflag: 0, ..settings };
    tty::set_settings(slave, Settings::Current, &plain)?;
    let result = without_blocking(slave, || match write_all(slave, rest) {
        // Stopped by ^S.
        Err(e) if e.errno == Errno::AGAIN => {
            tty::set_flow(slave, true)?;
            let result = write_all(slave, rest);
            tty::set_flow(slave, false)?;
            result
        }
        result => result,
    });
    tty::set_settings(slave, Settings::Current, &settings)?;
    result
}

/// `settings` under which what comes in is taken as it is; lines stay lines.
fn verbatim(settings: &Termios) -> Termios {
    let mut plain = *settings;
    plain.c_iflag = 0;
    plain.c_lflag &= libc::ICANON;
    for (i, c) in plain.c_cc.iter_mut().enumerate() {
        if i != libc::VEOL && i != libc::VEOL2 {
            *c = 0;
        }
    }
    plain
}

/// What waits for the reader of the slave, the line that is being typed included; it waits again afterwards.
fn input(master: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<Vec<u8>, SyscallError> {
    let settings = tty::settings(slave, Settings::Current)?;
    let raw = Termios { c_lflag: settings.c_lflag & !libc::ICANON, ..settings };
    if raw == settings {
        if waiting(slave)? == 0 {
            return Ok(Vec::new());
        }
        let data = without_blocking(slave, || read_all(slave))?;
        put_input(master, slave, &settings, &data)?;
        return Ok(data);
    }
    // Only so is the beginning of a line to be seen.
    tty::set_settings(slave, Settings::Current, &raw)?;
    let mut nothing = raw;
    (nothing.c_cc[libc::VMIN], nothing.c_cc[libc::VTIME]) = (0, 0);
    let result = match waiting(slave) {
        Ok(0) => Ok(Vec::new()),
        Ok(_) => tty::set_settings(slave, Settings::Current, &nothing)
            .and_then(|()| without_blocking(slave, || read_all(slave))),
        Err(e) => Err(e),
    };
    match &result {
        Ok(data) if !data.is_empty() => put_input(master, slave, &settings, data)?,
        _ => tty::set_settings(slave, Settings::Current, &settings)?,
    }
    result
}

/// Has `data` wait for the reader of the slave, which has `settings` then.
fn put_input(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    settings: &Termios,
    data: &[u8],
) -> Result<(), SyscallError> {
    let (first, rest) = data.split_at(data.len().min(ROOM));
    tty::set_settings(slave, Settings::Current, &verbatim(settings))?;
    let result = tty::insert(slave, first);
    let result = result.and_then(|()| {
        if rest.is_empty() {
            return Ok(());
        }
        without_blocking(master, || write_all(master, rest))
    });
    tty::set_settings(slave, Settings::Current, settings)?;
    result
}

/// A pseudoterminal that was made anew.
#[derive(Debug)]
pub struct Pair {
    /// Its number now.
    index: u32,
    master: OwnedFd,
    /// Keeps the slave open until the tasks have it.
    slave: Option<OwnedFd>,
}

/// A terminal that is to control a session.
#[derive(Debug, Clone, Default)]
pub struct Controlling {
    /// Its path, for who leads the session.
    pub path: Vec<u8>,
    /// It may be taken away from our own session.
    pub force: bool,
    /// It is the tree's own: that it cannot be had is a failure.
    pub must: bool,
    /// The foreground process group.
    pub group: i32,
    /// File ids of descriptions of it.
    pub files: HashSet<u32>,
}

/// Makes all pseudoterminals whose master is in the images. Numbers that are taken by others become other numbers, with a
/// warning in the log.
///
/// # Errors
/// There are no more.
pub fn prepare(opener: &mut Opener<'_>) -> Result<(), Problem> {
    let number = |info: &TtyInfoEntry| info.pty.as_ref().map_or(0, |pty| pty.index);
    let mut masters: Vec<TtyInfoEntry> =
        opener.ttys.values().filter(|t| t.id & 1 == 1 && t.pty.is_some()).cloned().collect();
    // The kernel gives the lowest number that is free: in this order, mostly the one that is wanted.
    masters.sort_unstable_by_key(number);
    let ttys = opener.files.values().filter_map(|f| f.tty.as_deref());
    let files: HashMap<u32, TtyFileEntry> = ttys.map(|t| (t.tty_info_id, t.clone())).collect();
    // Those that can have their numbers come first: else one could get the number of another.
    for strict in [true, false] {
        for info in &masters {
            let index = number(info);
            if !opener.ptys.contains_key(&(info.id >> 1))
                && let Some(pair) = make(opener, &files, info, index, strict)?
            {
                opener.ptys.insert(info.id >> 1, pair);
            }
        }
    }
    Ok(())
}

fn object(index: u32) -> String {
    format!("pseudoterminal {index}")
}

/// Makes one, whose descriptions are in `files` by their terminal's id. If its number is taken it is another's or, if `strict`, none.
fn make(
    opener: &Opener<'_>,
    files: &HashMap<u32, TtyFileEntry>,
    info: &TtyInfoEntry,
    index: u32,
    strict: bool,
) -> Result<Option<Pair>, Problem> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Problem::new(object(index), format!("it cannot be {what}: {e}"))
    };
    let file = files.get(&info.id);
    let access = file.map_or(libc::O_RDWR as u32, |f| f.flags & libc::O_ACCMODE as u32);
    let flags = OFlags::from_bits_retain(access) | OFlags::NOCTTY | OFlags::CLOEXEC;
    let reg = file.and_then(|f| opener.files.get(&f.regf_id?)?.reg.as_deref());
    let path = reg.map_or(&b"/dev/ptmx"[..], |reg| &reg.name);
    let mut others = Vec::new();
    let (master, now) = loop {
        let master = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| failed(&format!("made ({})", text(path)), &e))?;
        let now = tty::pty_index(master.as_fd()).map_err(|e| failed("made", &e))?;
        if now >= index || others.len() > 4096 {
            break (master, now);
        }
        others.push(master);
    };
    drop(others);
    if now != index && strict {
        return Ok(None);
    }
    if now != index {
        log::warn!("/dev/pts/{index} is taken by somebody else: the tree's becomes /dev/pts/{now}");
    }
    let of_slave = opener.ttys.get(&(info.id & !1));
    let closed =
        file.and_then(|f| opener.extra.get(&f.id)).and_then(|e| e.slave_closed) == Some(true);
    let data = |id: u32| opener.tty_data.get(&id).map_or(&[][..], Vec::as_slice);
    let (output, input) = (data(info.id), data(info.id & !1));
    let pair = Pair { index: now, master, slave: None };
    let master = pair.master.as_fd();
    tty::set_property(master, Property::Locked, false).map_err(|e| failed("unlocked", &e))?;
    let controls = opener.sessions.contains(&(info.sid as i32));
    let wanted =
        of_slave.is_some() || closed || controls || !output.is_empty() || !input.is_empty();
    let slave = wanted.then(|| tty::peer(master)).transpose().map_err(|e| failed("opened", &e))?;
    if let (Some(slave), Some(info)) = (&slave, of_slave) {
        let owner = (rustix::fs::Uid::from_raw, rustix::fs::Gid::from_raw);
        rustix::fs::fchown(slave, info.uid.map(owner.0), info.gid.map(owner.1))
            .map_err(|e| failed("given to its owner", &e))?;
        let reg = files.get(&info.id).and_then(|f| opener.files.get(&f.regf_id?)?.reg.as_deref());
        if let Some(mode) = reg.and_then(|reg| reg.mode) {
            rustix::fs::fchmod(slave, Mode::from_raw_mode(mode & 0o7777))
                .map_err(|e| failed("given its mode", &e))?;
        }
    }
    if let Some(window) = &info.winsize {
        let size = WinSize {
            ws_row: window.ws_row as u16,
            ws_col: window.ws_col as u16,
            ws_xpixel: window.ws_xpixel as u16,
            ws_ypixel: window.ws_ypixel as u16,
        };
        tty::set_window(master, size).map_err(|e| failed("given its size", &e))?;
    }
    let settings = match &info.termios {
        Some(entry) => terminal::termios(entry),
        None => tty::settings(master, Settings::Current).map_err(|e| failed("examined", &e))?,
    };
    tty::set_settings(master, Settings::Current, &settings)
        .map_err(|e| failed("given its settings", &e))?;
    if let Some(slave) = &slave {
        put_input(master, slave.as_fd(), &settings, input)
            .and_then(|()| put_output(master, Some(slave.as_fd()), output))
            .map_err(|e| failed("filled", &e))?;
    }
    // Whose session is to get it finds it open.
    Ok(Some(Pair { slave: slave.filter(|_| of_slave.is_some() || controls), ..pair }))
}

/// Opens one side of a pseudoterminal that was made anew.
///
/// # Errors
/// Its slave is not to be found under its path.
pub(super) fn open(
    opener: &mut Opener<'_>,
    info: &TtyInfoEntry,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Problem> {
    let pair = opener.ptys.get(&(info.id >> 1));
    let pair = pair.ok_or_else(|| Problem::new(text(path), "it was not made"))?;
    let failed = |e: &dyn std::fmt::Display| {
        Problem::new(object(pair.index), format!("it cannot be opened: {e}"))
    };
    if info.id & 1 == 1 {
        return pair.master.try_clone().map_err(|e| failed(&e));
    }
    let path = slave_path(pair, info, path);
    let fd = opener
        .open_path(Path::new(std::ffi::OsStr::from_bytes(&path)), flags)
        .map_err(|e| failed(&format!("{}: {e}", text(&path))))?;
    let (ours, there) = match &pair.slave {
        Some(slave) => (rustix::fs::fstat(slave), rustix::fs::fstat(&fd)),
        None => return Ok(fd),
    };
    match (ours, there) {
        (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino) => Ok(fd),
        _ => Err(failed(&format!("{} leads to another terminal", text(&path)))),
    }
}

/// Where a slave is now whose path was `path`.
fn slave_path(pair: &Pair, info: &TtyInfoEntry, path: &[u8]) -> Vec<u8> {
    let same = info.pty.as_ref().is_some_and(|p| p.index == pair.index);
    if same && !path.is_empty() {
        return path.to_vec();
    }
    let directory = Path::new(std::ffi::OsStr::from_bytes(path)).parent();
    let directory = directory.unwrap_or(Path::new("/dev/pts"));
    directory.join(pair.index.to_string()).into_os_string().into_encoded_bytes()
}

/// The terminals that are to control sessions whose leaders are restored, by session; call it when they are made.
#[must_use]
pub fn controlling(opener: &Opener<'_>) -> BTreeMap<i32, Controlling> {
    use rewake_image::messages::TtyType;
    let mut found = BTreeMap::new();
    let ttys = opener.ttys.values().filter(|t| t.sid != 0 && t.termios.is_some());
    for info in ttys.filter(|t| opener.sessions.contains(&(t.sid as i32))) {
        let same = |f: &&TtyFileEntry| f.tty_info_id == info.id;
        let files = || opener.files.values().filter_map(|f| f.tty.as_deref()).filter(same);
        let reg = files().find_map(|f| opener.files.get(&f.regf_id?)?.reg.as_deref());
        let kind = TtyType::try_from(info.r#type).unwrap_or(TtyType::Unknown);
        let of_master = info.id & 1 == 1 && kind == TtyType::Pty;
        // It counts if the images have no slave.
        let master = of_master && opener.ttys.contains_key(&(info.id & !1));
        let path = reg.filter(|_| !of_master).map_or(&[][..], |reg| &reg.name);
        let given = super::external::terminal_path(opener, info);
        let (path, must) = match opener.ptys.get(&(info.id >> 1)) {
            _ if given.is_some() => (given.unwrap_or_default(), true),
            _ if master || matches!(kind, TtyType::Ctty | TtyType::ExtTty | TtyType::Unknown) => {
                continue;
            }
            Some(pair) if kind == TtyType::Pty => (slave_path(pair, info, path), true),
            _ if kind == TtyType::Pty => {
                let own =
                    terminal::own().and_then(|fd| rustix::termios::ttyname(fd, Vec::new()).ok());
                let Some(own) = own else { continue };
                (own.into_bytes(), false)
            }
            _ => (path.to_vec(), true),
        };
        // Who leads our session can spare its terminal; a shell that started us cannot.
        let ours = rewake_sys::task::own_session() == Ok(std::process::id() as i32);
        let terminal = Controlling {
            path,
            force: !must && ours,
            must,
            group: info.pgrp as i32,
            files: files().map(|f| f.id).collect(),
        };
        found.insert(info.sid as i32, terminal);
    }
    found
}

/// The `/dev/tty` descriptions of the images whose session's leader is restored: file id, session, flags.
#[must_use]
pub fn of_sessions(opener: &Opener<'_>) -> Vec<(u32, i32, u32)> {
    use rewake_image::messages::TtyType;
    let of = |file: &rewake_image::messages::TtyFileEntry| {
        let info = opener.ttys.get(&file.tty_info_id)?;
        let own = opener.extra.get(&file.id).and_then(|e| e.session);
        let session = own.unwrap_or(info.sid) as i32;
        let flags = file.flags | (libc::O_NOCTTY | libc::O_CLOEXEC) as u32;
        (info.r#type == TtyType::Ctty as i32).then_some((file.id, session, flags))
    };
    opener.files.values().filter_map(|f| of(f.tty.as_deref()?)).collect()
}

/// Sets what would have been in the way until now, and lets go of the other sides. Call it just before the tasks go on.
///
/// # Errors
/// A property cannot be set.
pub(super) fn finish(opener: &mut Opener<'_>) -> Result<(), Problem> {
    for (number, pair) in std::mem::take(&mut opener.ptys) {
        let failed = |e: SyscallError| Problem::new(object(pair.index), e.to_string());
        let master = pair.master.as_fd();
        if let Some(info) = opener.ttys.get(&(number * 2 + 1)) {
            if let Some(entry) = &info.termios_locked {
                let locked = terminal::termios(entry);
                if tty::settings(master, Settings::Locked).map_err(failed)? != locked {
                    tty::set_settings(master, Settings::Locked, &locked).map_err(failed)?;
                }
            }
            if info.packet_mode {
                tty::set_property(master, Property::Packet, true).map_err(failed)?;
            }
            if info.exclusive {
                tty::set_property(master, Property::Exclusive, true).map_err(failed)?;
            }
            if info.locked {
                tty::set_property(master, Property::Locked, true).map_err(failed)?;
            }
        }
        let slave = opener.ttys.get(&(number * 2));
        if let (Some(slave), Some(true)) = (&pair.slave, slave.map(|s| s.exclusive)) {
            tty::set_property(slave.as_fd(), Property::Exclusive, true).map_err(failed)?;
        }
    }
    Ok(())
}
