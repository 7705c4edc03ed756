//! epoll(7): its items are added inside a task, once that task has all its descriptors.
//!
//! An item belongs to a file description and to the number by which it was added. If the number stands for another
//! file by now (the watched description lives on under another number), the item is saved under a number that leads
//! there: events and `data` come as before, only `EPOLL_CTL_DEL` wants the new number.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::{
    EventpollFileEntry, EventpollTfdEntry, FdTypes, FdinfoEntry, FileEntry,
};
use rewake_proc::fdinfo::EpollItem;
use rewake_sys::descriptors::watch_as;
use rewake_sys::kcmp;
use rustix::fd::OwnedFd;
use std::collections::{HashMap, HashSet};

/// Flags of an item that are no events. An item with nothing else is disabled by `EPOLLONESHOT`.
const FLAGS: u32 =
    (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLEXCLUSIVE) as u32 | libc::EPOLLET as u32;

/// From how many items on a socket is recognised by its inode number first: kcmp(2) walks all items each time.
const MANY: usize = 32;

/// Surveys an epoll instance.
///
/// # Errors
/// It watches a description for which the task has no number any more.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let id = collector.new_id();
    if let Ok(params @ 1..) = rewake_sys::file::epoll_polling(view.as_fd()) {
        collector.extra_of(id).epoll_params = Some(params);
    }
    let targets = if collector.carrier.is_some() {
        // Nobody has a descriptor for it, so the numbers mean nothing but to who receives it.
        collector.extra_of(id).watched = watched(collector, view, &info.epoll)?;
        info.epoll.iter().map(|item| item.tfd).collect()
    } else {
        targets(view, &info.epoll)?
    };
    let items = info.epoll.iter().zip(targets);
    let tfd = items
        .map(|(item, number)| EventpollTfdEntry {
            id: 0,
            tfd: number as u32,
            events: item.events,
            data: item.data,
            dev: Some(item.sdev.0),
            inode: Some(item.ino),
            pos: Some(item.pos as u64),
        })
        .collect();
    let entry = EventpollFileEntry { id, flags: view.flags, fown: view.owner()?, tfd };
    collector.push(FileEntry {
        r#type: FdTypes::Eventpoll as i32,
        id,
        epfd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Eventpoll))
}

/// For each item a number of the task that leads to the watched description; no two items get the same one.
fn targets(view: &View<'_>, items: &[EpollItem]) -> Result<Vec<i32>, Problem> {
    let mut sockets = (items.len() >= MANY).then(|| Links::new(view.tid));
    let mut taken = HashSet::with_capacity(items.len());
    let mut numbers = vec![None; items.len()];
    let mut stale = Vec::new();
    // How many items of this number came before: items of different files may have the same number.
    let mut before = HashMap::new();
    for (i, item) in items.iter().enumerate() {
        let offset: &mut u32 = before.entry(item.tfd).or_default();
        let open = view.numbers.binary_search(&item.tfd).is_ok();
        let same = open
            && (sockets.as_mut().is_some_and(|links| links.is_socket(item))
                || is_target(view, item, *offset, item.tfd)?);
        if same {
            numbers[i] = Some(item.tfd);
            taken.insert(item.tfd);
        } else {
            stale.push((i, *offset));
        }
        *offset += 1;
    }
    for (i, offset) in stale {
        let item = &items[i];
        let mut found = None;
        for number in view.numbers.iter().filter(|n| !taken.contains(*n)) {
            if is_target(view, item, offset, *number)? {
                found = Some(*number);
                break;
            }
        }
        let Some(number) = found else {
            return Err(view
                .problem(format!(
                    "it watches a file that was added as descriptor {} (inode {}), for which this process has no \
                     descriptor of its own any more",
                    item.tfd, item.ino
                ))
                .remedy("remove the file from the epoll instance before closing it, or keep it open"));
        };
        log::warn!(
            "process {}: fd {}: a file watched as descriptor {} is now descriptor {number} and will be watched as that",
            view.pid,
            view.number,
            item.tfd
        );
        taken.insert(number);
        numbers[i] = Some(number);
    }
    Ok(numbers.into_iter().flatten().collect())
}

/// The file ids of what an instance in flight watches: one that some task has, or that is in flight too.
fn watched(
    collector: &Collector,
    view: &View<'_>,
    items: &[EpollItem],
) -> Result<Vec<u32>, Problem> {
    let mut before = HashMap::new();
    let mut ids = Vec::with_capacity(items.len());
    for item in items {
        let offset: &mut u32 = before.entry(item.tfd).or_default();
        let (pid, epoll) = (view.tid, view.number);
        let found = collector.holders_of(item.ino).find(|(holder, number, _)| {
            kcmp::is_epoll_target(pid, epoll, item.tfd, *offset, *holder, *number) == Ok(true)
        });
        let Some((.., id)) = found else {
            return Err(view.problem(format!(
                "it watches a file (inode {}) for which no process of the tree has a descriptor",
                item.ino
            )));
        };
        ids.push(id);
        *offset += 1;
    }
    Ok(ids)
}

/// Has the instances that no task has a descriptor for watch what they did.
///
/// # Errors
/// What an instance watches cannot be opened or watched, or the images do not tell it.
pub fn restore_in_flight(opener: &mut Opener<'_>) -> Result<(), Problem> {
    for id in std::mem::take(&mut opener.flying_epolls) {
        let ids = opener.extra.get(&id).map(|extra| extra.watched.clone()).unwrap_or_default();
        let items = opener.entry(id)?.epfd.as_ref().map(|e| e.tfd.clone()).unwrap_or_default();
        let failed = |reason: String| Problem::new(format!("epoll {id}, in flight"), reason);
        if ids.len() != items.len() {
            return Err(failed("the images do not tell what it watches".to_owned()));
        }
        for (item, target) in items.iter().zip(ids) {
            opener.open(target)?;
            let (epoll, target) = (opener.opened(id)?, opener.opened(target)?);
            watch_as(epoll, target, item.tfd as i32, item.events, item.data)
                .map_err(|e| failed(format!("it cannot watch what it did: {e}")))?;
        }
    }
    Ok(())
}

fn is_target(view: &View<'_>, item: &EpollItem, offset: u32, number: i32) -> Result<bool, Problem> {
    match kcmp::is_epoll_target(view.tid, view.number, item.tfd, offset, view.tid, number) {
        Ok(same) => Ok(same),
        // An O_PATH descriptor, which is never watched.
        Err(e) if e.errno == rewake_sys::Errno::BADF => Ok(false),
        Err(e) => Err(view.problem(format!("what it watches cannot be found: {e}"))),
    }
}

/// Links of a task's descriptors.
struct Links {
    pid: i32,
    buffer: Vec<u8>,
}

impl Links {
    fn new(pid: i32) -> Links {
        Links { pid, buffer: Vec::new() }
    }

    /// Is the item's number still the socket it was added for? A socket has one description only, so that its inode
    /// number is proof.
    fn is_socket(&mut self, item: &EpollItem) -> bool {
        let path = format!("/proc/{}/fd/{}", self.pid, item.tfd);
        let buffer = std::mem::take(&mut self.buffer);
        let Ok(link) = rustix::fs::readlink(path, buffer) else { return false };
        let same = link.as_bytes() == format!("socket:[{}]", item.ino).as_bytes();
        self.buffer = link.into_bytes();
        same
    }
}

/// Makes an epoll instance of the image, without its items: see [`assign`] and [`restore_in_flight`].
///
/// # Errors
/// None in practice.
pub fn open(opener: &mut Opener<'_>, entry: &EventpollFileEntry) -> Result<OwnedFd, Problem> {
    if opener.extra.get(&entry.id).is_some_and(|extra| !extra.watched.is_empty()) {
        opener.flying_epolls.push(entry.id);
    }
    rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
        .map_err(|e| Problem::new("epoll", e.to_string()))
}

/// An epoll instance of a task that has to add its items: the number there, and the items.
pub type Adder = (i32, EventpollFileEntry);

/// Which task adds the items of which epoll instances. Tasks are given by pid and descriptors; of those that share an
/// instance it is the first that has all the numbers it watches.
///
/// # Errors
/// The images have no such file.
pub fn assign<'t>(
    opener: &Opener<'_>,
    tasks: impl Iterator<Item = (i32, &'t [FdinfoEntry])> + Clone,
) -> Result<HashMap<i32, Vec<Adder>>, Problem> {
    let mut adders: HashMap<i32, Vec<Adder>> = HashMap::new();
    let mut done = HashSet::new();
    // The second time, those that no task can add whole: the error tells what is missing.
    for whole in [true, false] {
        for (pid, fds) in tasks.clone() {
            let epolls = fds.iter().filter(|f| f.r#type == FdTypes::Eventpoll as i32);
            for fd in epolls {
                if done.contains(&fd.id) {
                    continue;
                }
                let Some(entry) = opener.entry(fd.id)?.epfd.as_deref() else { continue };
                if !whole || can_add(entry, fds) {
                    done.insert(fd.id);
                    adders.entry(pid).or_default().push((fd.fd as i32, entry.clone()));
                }
            }
        }
    }
    Ok(adders)
}

/// Has a task with these descriptors all that `entry` watches?
fn can_add(entry: &EventpollFileEntry, fds: &[FdinfoEntry]) -> bool {
    let numbers: HashSet<u32> = fds.iter().map(|f| f.fd).collect();
    entry.tfd.iter().all(|item| numbers.contains(&item.tfd))
}

/// `struct epoll_event`: packed on x86-64 only.
fn event(events: u32, data: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    bytes.extend(events.to_ne_bytes());
    if !cfg!(target_arch = "x86_64") {
        bytes.extend([0; 4]);
    }
    bytes.extend(data.to_ne_bytes());
    bytes
}

/// Adds the items of `entry`, which is descriptor `number` in this task; all descriptors must be in place.
pub fn restore_items(steps: &mut Steps, number: i32, entry: &EventpollFileEntry) {
    let epoll = number as u64;
    let mut seen = HashSet::with_capacity(entry.tfd.len());
    let items: Vec<&EventpollTfdEntry> = entry
        .tfd
        .iter()
        .filter(|item| {
            let first = seen.insert(item.tfd);
            if !first {
                // CRIU writes such images if a watched file was duplicated (dup(2)).
                log::warn!(
                    "epoll {}: descriptor {} is watched twice; once is all there is",
                    entry.id,
                    item.tfd
                );
            }
            first
        })
        .collect();
    let (disabled, enabled): (Vec<_>, Vec<_>) = items.iter().partition(|i| i.events & !FLAGS == 0);
    // First, while no other item can be mistaken for one of these.
    for item in disabled {
        restore_disabled(steps, epoll, item);
    }
    let size = event(0, 0).len() as u64;
    let bytes: Vec<u8> = enabled.iter().flat_map(|i| event(i.events, i.data)).collect();
    let events = steps.data(&bytes).address;
    for (item, at) in enabled.iter().zip(0u64..) {
        let args = [epoll, libc::EPOLL_CTL_ADD as u64, u64::from(item.tfd), events + at * size];
        steps.must(Label::Watch(number as u32, item.tfd), Op::new(libc::SYS_epoll_ctl, &args));
    }
}

/// An item that `EPOLLONESHOT` disabled cannot be added so: the kernel makes it report errors and hangups at least. So it
/// is added for all events and disabled by reporting one, if there is any to report now.
fn restore_disabled(steps: &mut Steps, epoll: u64, item: &EventpollTfdEntry) {
    let all = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;
    let label = Label::Watch(epoll as u32, item.tfd);
    let flags = item.events & !(libc::EPOLLEXCLUSIVE as u32);
    let data =
        steps.data(&[event(flags | all, item.data), event(flags, item.data), event(0, 0)].concat());
    let size = (data.len / 3) as u64;
    let target = u64::from(item.tfd);
    let add = [epoll, libc::EPOLL_CTL_ADD as u64, target, data.address];
    steps.must(label, Op::new(libc::SYS_epoll_ctl, &add));
    // Without a signal mask; epoll_wait itself is not on every architecture.
    let wait = [epoll, data.address + 2 * size, 1, 0, 0, 8];
    let reported = steps.must(label, Op::new(libc::SYS_epoll_pwait, &wait));
    // Nothing reported (0): the item must not report all events later, EPOLL_CTL_MOD (3). Reported (1): it is disabled and
    // must not be touched; there is no operation 4.
    let change = Op::new(libc::SYS_epoll_ctl, &[epoll, 0, target, data.address + size]);
    steps.may(label, change.arg_result(1, reported as u32, libc::EPOLL_CTL_MOD));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(tfd: u32, events: u32) -> EventpollTfdEntry {
        EventpollTfdEntry {
            tfd,
            events,
            data: u64::from(tfd) << 40,
            ..EventpollTfdEntry::default()
        }
    }

    #[test]
    fn enabled_items_are_added_as_they_were() {
        let exclusive = libc::EPOLLEXCLUSIVE as u32 | 0x19;
        let entry = EventpollFileEntry {
            tfd: vec![item(5, 0x19), item(7, exclusive), item(5, 0x4000_0019)],
            ..EventpollFileEntry::default()
        };
        let mut steps = Steps::new(0x1000);
        restore_items(&mut steps, 3, &entry);
        let args: Vec<_> = steps.script.ops.iter().map(|op| op.args).collect();
        assert_eq!(args, [[3, 1, 5, 0x1000, 0, 0], [3, 1, 7, 0x100c, 0, 0]]);
    }

    #[test]
    fn disabled_items_come_first_and_are_disabled_again() {
        let disabled = item(9, libc::EPOLLONESHOT as u32);
        let entry = EventpollFileEntry { tfd: vec![item(5, 0x19), disabled], ..Default::default() };
        let mut steps = Steps::new(0);
        restore_items(&mut steps, 3, &entry);
        let calls: Vec<_> =
            steps.script.ops.iter().map(|op| (i64::from(op.nr), op.args[2])).collect();
        let ctl = libc::SYS_epoll_ctl;
        assert_eq!(calls, [(ctl, 9), (libc::SYS_epoll_pwait, 1), (ctl, 9), (ctl, 5)]);
        let change = steps.script.ops[2];
        assert_eq!(
            (change.args[1], change.flags),
            (1 << 32 | 3, rewake_agent::layout::ref_flag(1))
        );
    }

    #[test]
    fn a_task_can_add_only_what_it_has() {
        let entry = EventpollFileEntry { tfd: vec![item(5, 1), item(7, 1)], ..Default::default() };
        let fds = |numbers: [u32; 3]| numbers.map(|fd| FdinfoEntry { fd, ..Default::default() });
        assert!(can_add(&entry, &fds([0, 7, 5])));
        assert!(!can_add(&entry, &fds([0, 5, 8])));
    }
}
