//! A property, not one kind: whatever mix of descriptors a random tree holds, shared at random (dup(2), fork(2),
//! SCM_RIGHTS), it comes back the same. The harness compares from outside (what each descriptor is, its position and flags,
//! by kcmp(2) which are one description); each process compares from inside what it sees of its own; the root then takes
//! out what is in pipes, sockets and counters. ZOO_SEED is the seed; without it another one each time, which is in the log.
#![allow(unsafe_code, reason = "descriptors of all kinds through the C library")]

use std::os::fd::RawFd;
use zoo::{Rng, Zoo, check, ensure_eq, errno, unix};

/// What a process knows of a description it has made, to be taken out at the end.
#[derive(Clone, Debug)]
enum Inside {
    Nothing,
    /// Reading this descriptor yields these bytes.
    Bytes(Vec<u8>),
}

fn ok(value: i32, what: &str) -> Result<RawFd, String> {
    check(value, what).map_err(|e| format!("{e} (errno {})", errno()))?;
    Ok(value)
}

fn pick(rng: &mut Rng, n: usize) -> usize {
    (rng.next() % n.max(1) as u64) as usize
}

fn bytes(rng: &mut Rng, most: usize) -> Vec<u8> {
    let mut data = vec![0; 1 + pick(rng, most)];
    rng.fill(&mut data);
    data
}

fn open(path: &std::path::Path, flags: i32) -> Result<RawFd, String> {
    let path = zoo::cstring(path);
    // SAFETY: a NUL-terminated string.
    ok(unsafe { libc::open(path.as_ptr(), flags, 0o640) }, "open")
}

fn write(fd: RawFd, data: &[u8]) -> zoo::Check {
    // SAFETY: a live buffer.
    let n = unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) };
    ensure_eq!(n, data.len() as isize, "bytes written to {fd}");
    Ok(())
}

/// A file of random content; returned with its position anywhere.
fn file(z: &Zoo, rng: &mut Rng, name: &str, flags: i32) -> Result<RawFd, String> {
    let path = z.path(name);
    std::fs::write(&path, bytes(rng, 9000)).map_err(|e| e.to_string())?;
    let fd = open(&path, flags)?;
    // SAFETY: integers.
    ok(unsafe { libc::lseek(fd, pick(rng, 12000) as i64, libc::SEEK_SET) } as i32, "lseek")?;
    Ok(fd)
}

/// Makes something at random; `known` is what there is already, to be watched.
fn make(
    z: &Zoo,
    rng: &mut Rng,
    known: &[RawFd],
    number: usize,
) -> Result<Vec<(RawFd, Inside)>, String> {
    let name = format!("f{}.{number}", zoo::pid());
    let plain = |fd: RawFd| vec![(fd, Inside::Nothing)];
    let nonblock = |rng: &mut Rng, flag: i32| if pick(rng, 2) == 0 { flag } else { 0 };
    Ok(match pick(rng, z.param("ZOO_KINDS", 23)) {
        0 => plain(file(z, rng, &name, libc::O_RDONLY)?),
        1 => plain(file(z, rng, &name, libc::O_RDWR | libc::O_APPEND | libc::O_CLOEXEC)?),
        2 => {
            let fd = file(z, rng, &name, libc::O_RDWR | libc::O_NONBLOCK)?;
            std::fs::remove_file(z.path(&name)).map_err(|e| e.to_string())?;
            plain(fd)
        }
        3 => plain(open(z.dir(), libc::O_RDONLY | libc::O_DIRECTORY)?),
        4 => plain(open(z.dir(), libc::O_PATH)?),
        5 => plain(open("/dev/null".as_ref(), libc::O_WRONLY)?),
        6 | 7 => {
            let mut ends = [0; 2];
            let flags = nonblock(rng, libc::O_NONBLOCK) | libc::O_CLOEXEC;
            // SAFETY: room for two descriptors.
            ok(unsafe { libc::pipe2(ends.as_mut_ptr(), flags) }, "pipe2")?;
            let data = bytes(rng, 6000);
            write(ends[1], &data)?;
            vec![(ends[0], Inside::Bytes(data)), (ends[1], Inside::Nothing)]
        }
        8 => {
            let count = 1 + rng.next() % 1000;
            let flags = nonblock(rng, libc::EFD_NONBLOCK);
            // SAFETY: integers.
            let fd = ok(unsafe { libc::eventfd(count as u32, flags) }, "eventfd")?;
            vec![(fd, Inside::Bytes(count.to_ne_bytes().to_vec()))]
        }
        9 => {
            // SAFETY: integers; the time is live.
            let fd = unsafe {
                let clock = [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME];
                let fd =
                    ok(libc::timerfd_create(clock[pick(rng, 3)], libc::TFD_NONBLOCK), "timerfd")?;
                let mut time: libc::itimerspec = std::mem::zeroed();
                time.it_value.tv_sec = 100_000 + pick(rng, 1000) as i64;
                time.it_interval.tv_sec = pick(rng, 3) as i64;
                ok(libc::timerfd_settime(fd, 0, &raw const time, std::ptr::null_mut()), "settime")?;
                fd
            };
            plain(fd)
        }
        10 => {
            // SAFETY: a zeroed set is an empty one; it is live.
            let fd = unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP] {
                    if pick(rng, 2) == 0 {
                        libc::sigaddset(&raw mut set, signal);
                    }
                }
                ok(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC), "signalfd")?
            };
            plain(fd)
        }
        11 | 12 => {
            // SAFETY: integers; the event is live. What cannot be watched (files) is left out.
            let fd = unsafe {
                let fd = ok(libc::epoll_create1(nonblock(rng, libc::EPOLL_CLOEXEC)), "epoll")?;
                for _ in 0..pick(rng, 4) {
                    let mut event = libc::epoll_event {
                        events: [
                            libc::EPOLLIN,
                            libc::EPOLLOUT | libc::EPOLLET,
                            libc::EPOLLIN | libc::EPOLLONESHOT,
                        ][pick(rng, 3)] as u32,
                        u64: rng.next(),
                    };
                    if !known.is_empty() {
                        let target = known[pick(rng, known.len())];
                        libc::epoll_ctl(fd, libc::EPOLL_CTL_ADD, target, &raw mut event);
                    }
                }
                fd
            };
            plain(fd)
        }
        13 => {
            // SAFETY: integers; a NUL-terminated string.
            let fd = unsafe {
                let fd = ok(libc::inotify_init1(libc::IN_NONBLOCK), "inotify")?;
                let dir = zoo::cstring(z.dir());
                ok(libc::inotify_add_watch(fd, dir.as_ptr(), libc::IN_DELETE_SELF), "add_watch")?;
                fd
            };
            plain(fd)
        }
        14 => {
            // SAFETY: a NUL-terminated string; integers.
            let fd = unsafe {
                let flags = libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC;
                let fd = ok(libc::memfd_create(c"mix".as_ptr(), flags), "memfd_create")?;
                write(fd, &bytes(rng, 9000))?;
                libc::lseek(fd, pick(rng, 5000) as i64, libc::SEEK_SET);
                let seals = [0, libc::F_SEAL_SHRINK, libc::F_SEAL_WRITE | libc::F_SEAL_SEAL];
                ok(libc::fcntl(fd, libc::F_ADD_SEALS, seals[pick(rng, 3)]), "F_ADD_SEALS")?;
                fd
            };
            plain(fd)
        }
        15 => {
            // SAFETY: integers.
            plain(ok(
                unsafe { libc::syscall(libc::SYS_pidfd_open, zoo::pid(), 0) } as i32,
                "pidfd",
            )?)
        }
        16 | 17 => {
            let kind = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET][pick(rng, 3)];
            let [a, b] = unix::pair(kind)?;
            let data = bytes(rng, 3000);
            let mut rights = Vec::new();
            if !known.is_empty() && pick(rng, 2) == 0 {
                rights.push(known[pick(rng, known.len())]);
            }
            // A socket in flight in itself would be collected by the kernel.
            unix::send(a, &data, &rights)?;
            vec![(a, Inside::Nothing), (b, Inside::Bytes(data))]
        }
        18 => {
            // SAFETY: integers.
            plain(ok(
                unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0) },
                "socket",
            )?)
        }
        19 => {
            let path = zoo::cstring(z.path(&name));
            // SAFETY: a NUL-terminated string.
            ok(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, "mkfifo")?;
            let fd = open(&z.path(&name), libc::O_RDWR | nonblock(rng, libc::O_NONBLOCK))?;
            let data = bytes(rng, 3000);
            write(fd, &data)?;
            vec![(fd, Inside::Bytes(data))]
        }
        20 => {
            let mut ends = [0; 2];
            // SAFETY: room for two descriptors.
            ok(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_DIRECT) }, "pipe2(O_DIRECT)")?;
            let data = bytes(rng, 3000);
            write(ends[1], &data)?;
            vec![(ends[0], Inside::Bytes(data)), (ends[1], Inside::Nothing)]
        }
        21 => plain(unix::listener(libc::SOCK_STREAM, &z.path(&name).to_string_lossy(), 4)?),
        _ => {
            let kind = libc::SOCK_RAW | nonblock(rng, libc::SOCK_CLOEXEC);
            let protocol = [libc::NETLINK_ROUTE, libc::NETLINK_KOBJECT_UEVENT][pick(rng, 2)];
            // SAFETY: integers.
            plain(ok(unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) }, "netlink")?)
        }
    })
}

/// What a process sees of one of its descriptors, without changing it.
fn look(fd: RawFd) -> String {
    // SAFETY: integers, and a zeroed struct that is filled.
    let (fd_flags, flags, position, stat) = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &raw mut stat);
        let position = libc::lseek(fd, 0, libc::SEEK_CUR);
        (libc::fcntl(fd, libc::F_GETFD), libc::fcntl(fd, libc::F_GETFL), position, stat)
    };
    let mut waiting = -1i32;
    // SAFETY: an int.
    unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut waiting) };
    let kind = stat.st_mode & libc::S_IFMT;
    let size = if kind == libc::S_IFREG { stat.st_size } else { 0 };
    let mut text = format!("{fd}: {fd_flags:x} {flags:o} {position} {:o} {size}", stat.st_mode);
    if kind == libc::S_IFIFO || kind == libc::S_IFSOCK {
        text += &format!(" {waiting} waiting");
    }
    if kind == libc::S_IFREG && flags & libc::O_ACCMODE != libc::O_WRONLY {
        let mut content = vec![0u8; size as usize];
        // SAFETY: a buffer of that size.
        let n = unsafe { libc::pread(fd, content.as_mut_ptr().cast(), content.len(), 0) };
        let sum =
            content.iter().fold(0u64, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(*b)));
        text += &format!(" content {n} {sum:x}");
        // SAFETY: integers.
        text += &format!(" seals {}", unsafe { libc::fcntl(fd, libc::F_GET_SEALS) });
    }
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let mut items = Vec::new();
    for line in info.lines() {
        let part = line.split(" pos:").next().unwrap_or("");
        if ["eventfd-count", "sigmask", "clockid", "settime", "it_interval", "tfd:", "inotify wd"]
            .iter()
            .any(|k| line.starts_with(k))
        {
            items.push(part.split(" ino:").next().unwrap_or("").to_owned());
        }
    }
    // In which order the kernel tells them depends on addresses.
    items.sort();
    text + &format!(" {items:?}")
}

fn numbers() -> Vec<RawFd> {
    let list = std::fs::read_dir("/proc/self/fd").map(|d| {
        d.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<RawFd>().ok()).collect::<Vec<_>>()
    });
    let mut list = list.unwrap_or_default();
    // That of the directory itself is closed again; to the first three, logs are written.
    // SAFETY: integers.
    list.retain(|fd| *fd > 2 && unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0);
    list.sort_unstable();
    list
}

/// A process of the tree: makes some, shares some, has children, and waits; on return it has compared what it sees.
fn live(z: &Zoo, rng: &mut Rng, depth: usize, mut held: Vec<(RawFd, Inside)>) -> zoo::Check {
    for number in 0..4 + pick(rng, 14) {
        let known: Vec<RawFd> = held.iter().map(|(fd, _)| *fd).collect();
        // It may be full, or may not be watched: then it is not made.
        held.extend(make(z, rng, &known, number)?);
        let (fd, _) = held[pick(rng, held.len())].clone();
        // SAFETY: integers.
        unsafe {
            match pick(rng, 6) {
                0 => _ = ok(libc::dup(fd), "dup")?,
                1 => {
                    _ = ok(
                        libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100 + pick(rng, 300) as i32),
                        "dup",
                    )?
                }
                2 => {
                    _ = libc::fcntl(
                        fd,
                        libc::F_SETFL,
                        libc::fcntl(fd, libc::F_GETFL) ^ libc::O_NONBLOCK,
                    )
                }
                3 => _ = libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC),
                _ => {}
            }
        }
    }
    let mut children = Vec::new();
    if depth > 0 {
        for n in 0..1 + pick(rng, 2) {
            let seed = rng.next();
            let up = format!("up.{}.{n}", zoo::pid());
            let [ours, theirs] = unix::pair(libc::SOCK_SEQPACKET)?;
            // Sent after the fork: no other way for it to get there.
            let late = make(z, rng, &[], 1000 + n)?;
            let inherited: Vec<(RawFd, Inside)> =
                held.iter().map(|(fd, _)| (*fd, Inside::Nothing)).collect();
            let gifts: Vec<RawFd> = late.iter().map(|(fd, _)| *fd).collect();
            held.extend(late);
            children.push(z.fork(|z| {
                let mut rng = Rng(seed);
                unix::close(ours);
                for fd in gifts {
                    unix::close(fd);
                }
                let got = loop {
                    match unix::receive(theirs, 1, 0) {
                        Err(libc::EAGAIN) => zoo::nap(1),
                        got => break got.map_err(|e| format!("recvmsg: errno {e}"))?,
                    }
                };
                let mut held = inherited;
                held.extend(got.rights.iter().map(|fd| (*fd, Inside::Nothing)));
                if pick(&mut rng, 3) == 0 && !held.is_empty() {
                    let gone = pick(&mut rng, held.len());
                    unix::close(held.remove(gone).0);
                }
                z.publish(&up, "");
                live(z, &mut rng, depth - 1, held)
            })?);
            let gifts: Vec<RawFd> =
                held[held.len().saturating_sub(2)..].iter().map(|(fd, _)| *fd).collect();
            unix::send(ours, b"!", &gifts)?;
            z.wait_for(&format!("up.{}.{n}", zoo::pid()))?;
        }
    }
    let meet = |name: &str| -> zoo::Check {
        z.note(name, &zoo::pid().to_string());
        if depth == DEPTH {
            z.wait_for_all(name)?;
            z.publish(&format!("{name}.all"), "");
        }
        z.wait_for(&format!("{name}.all"))
    };
    // What is shared may still be changed by others.
    meet("standing")?;
    let before: Vec<String> = numbers().into_iter().map(look).collect();
    meet("looked")?;
    if depth == DEPTH {
        zoo::nap(30);
        z.ready()?;
    }
    z.wait_for_check();
    let after: Vec<String> = numbers().into_iter().map(look).collect();
    for (old, new) in before.iter().zip(&after) {
        ensure_eq!(new, old, "what process {} sees", zoo::pid());
    }
    ensure_eq!(after.len(), before.len(), "descriptors of process {}", zoo::pid());
    z.note("compared", &zoo::pid().to_string());
    for child in children {
        z.join(child)?;
    }
    if depth == DEPTH {
        take_out(&held)?;
    }
    Ok(())
}

const DEPTH: usize = 2;

/// Takes out what the root has put into things.
fn take_out(held: &[(RawFd, Inside)]) -> zoo::Check {
    for (fd, inside) in held {
        let Inside::Bytes(wanted) = inside else { continue };
        let mut data = vec![0u8; wanted.len()];
        // SAFETY: a buffer of that size.
        let n = unsafe { libc::read(*fd, data.as_mut_ptr().cast(), data.len()) };
        ensure_eq!((n, &data), (wanted.len() as isize, wanted), "content of {fd}");
    }
    Ok(())
}

trait Meeting {
    /// Waits until all processes of the tree are at this place.
    fn wait_for_all(&self, name: &str) -> zoo::Check;
}

impl Meeting for Zoo {
    fn wait_for_all(&self, name: &str) -> zoo::Check {
        loop {
            let children = count_below(zoo::pid());
            let here = std::fs::read_to_string(self.path(name)).unwrap_or_default();
            if here.lines().count() == children + 1 {
                return self.complaints();
            }
            self.complaints()?;
            zoo::nap(2);
        }
    }
}

fn count_below(pid: i32) -> usize {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children.split_whitespace().filter_map(|c| c.parse().ok()).map(|c| 1 + count_below(c)).sum()
}

fn main() {
    zoo::run(|z| {
        let now = zoo::clock(libc::CLOCK_REALTIME) as u64 ^ (zoo::pid() as u64) << 40;
        let seed = std::env::var("ZOO_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(now);
        eprintln!("ZOO_SEED={seed}");
        live(z, &mut Rng(seed), DEPTH, Vec::new())
    })
}
