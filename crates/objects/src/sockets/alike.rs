//! TCP connections whose options are alike: those of one tell those of all.
//!
//! About eighty calls are needed to ask a connection for its options, and thousands of connections mostly have the same. The
//! kernel tells whether they have (a BPF iterator: [`crate::iterators::sockets`]), as far as an option is kept in the fields
//! that are looked at. On which options that can be relied is found out by experiment, each time: for every option a socket
//! is made that has it set, and only if the fields show that, it is not asked for any more.

use super::option_own::{self, Usual};
use super::option_table::{Kinds, OPTIONS, Place};
use super::stream;
use super::stream_options::{Batch, Done, Job, Options};
use crate::Problem;
use crate::iterators::sockets::Teller;
use rewake_sys::sockets::{option, set_option};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::collections::HashMap;

/// The largest value that is compared.
const ROOM: usize = 64;

/// Level and number of an option.
type Name = (i32, i32);

/// Options that are read, but are not in the table.
const OTHERS: &[Name] = &[
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    // SO_BUF_LOCK
    (libc::SOL_SOCKET, 72),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
];

/// A socket on which one option is set.
struct Probe {
    name: Name,
    fd: OwnedFd,
    set: bool,
}

/// New sockets of a family, on each of which one option is set.
struct Probes {
    /// On which none is.
    plain: [OwnedFd; 2],
    all: Vec<Probe>,
}

/// The options that can be relied on.
struct Proof {
    /// Others of the table, which have to be asked for.
    rest: Vec<Usual>,
}

fn socket(family: i32) -> Result<OwnedFd, String> {
    let family = AddressFamily::from_raw(family as u16);
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| e.to_string())
}

fn value(fd: BorrowedFd<'_>, (level, number): Name) -> Option<Vec<u8>> {
    option::<ROOM>(fd, level, number).ok().map(|(value, len)| value[..len.min(ROOM)].to_vec())
}

/// Sets the option to anything that it is not already: whether that can be done.
fn set_anyhow(fd: BorrowedFd<'_>, name: Name, now: &[u8]) -> bool {
    const INTS: &[i32] = &[1, 0, 2, 3, 5, 8, 16, 88, 1000, 70_000, 1 << 24, 0xa_000a];
    const BYTES: &[&[u8]] = &[
        b"lo\0",
        b"reno\0",
        // IP options, extension headers.
        &[1, 1, 1, 1],
        &[0, 0, 1, 4, 0, 0, 0, 0],
        // A pair of ints.
        &[1, 0, 0, 0, 7, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[8, 0, 0, 0, 0, 0, 0, 0],
        // A struct timeval.
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let flipped = now.first_chunk().map(|v| i32::from_ne_bytes(*v) ^ 1);
    let ints = flipped.into_iter().chain(INTS.iter().copied()).map(|i| i.to_ne_bytes().to_vec());
    let bytes = BYTES.iter().map(|b| b.to_vec());
    let try_it = |value_to_set: Vec<u8>| {
        set_option(fd, name.0, name.1, &value_to_set).is_ok()
            && value(fd, name).is_some_and(|value| value != now)
    };
    // What is no int may take one and mean something else.
    if now.len() == 4 { ints.chain(bytes).any(try_it) } else { bytes.chain(ints).any(try_it) }
}

impl Probes {
    fn new(family: i32) -> Result<Probes, String> {
        let plain = [socket(family)?, socket(family)?];
        let kinds = Kinds::of(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let table = OPTIONS.iter().filter(|row| row.kinds.any(kinds));
        let names = table.map(|row| (row.level, row.number)).chain(OTHERS.iter().copied());
        let mut all = Vec::new();
        for name in names {
            // What this kernel does not have, it does not have of any.
            let Some(now) = value(plain[0].as_fd(), name) else { continue };
            let fd = socket(family)?;
            let set = set_anyhow(fd.as_fd(), name, &now);
            all.push(Probe { name, fd, set });
        }
        Ok(Probes { plain, all })
    }

    /// What the prints show of the probes.
    fn proof(
        &self,
        prints: &HashMap<i32, Vec<u8>>,
        family: i32,
        usual: &[Usual],
    ) -> Result<Proof, String> {
        let print = |fd: &OwnedFd| prints.get(&fd.as_raw_fd()).filter(|print| !print.is_empty());
        let plain = print(&self.plain[0]).ok_or("nothing is told of a socket")?;
        if print(&self.plain[1]) != Some(plain) {
            return Err("equal sockets are told apart".to_owned());
        }
        let shows = |name: Name| {
            let probe = self.all.iter().find(|probe| probe.name == name);
            probe.is_none_or(|p| p.set && print(&p.fd).is_some_and(|print| print != plain))
        };
        let kinds = Kinds::of(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let fields = OPTIONS
            .iter()
            .filter(|row| row.kinds.any(kinds) && !matches!(row.place, Place::Own))
            .map(|row| (row.level, row.number));
        match fields.chain(OTHERS.iter().copied()).find(|name| !shows(*name)) {
            Some((level, number)) => Err(format!("option {number} of level {level} is not told")),
            None => {
                let rest = usual.iter().filter(|(row, _)| !shows((row.level, row.number)));
                Ok(Proof { rest: rest.cloned().collect() })
            }
        }
    }
}

/// A job that has others like it.
struct Member {
    at: usize,
    job: Job,
    /// Whose options it has.
    first: usize,
}

/// Reads the options of all. What cannot be done this way is given back, to be read one by one.
pub(super) fn read(teller: &mut Teller, batches: Vec<Batch>) -> (Done, Vec<Batch>) {
    let families = batches.iter().flatten().map(|(_, job)| job.family);
    let mut usual: HashMap<u32, &[Usual]> = HashMap::new();
    for (family, (_, job)) in families.zip(batches.iter().flatten()) {
        usual.entry(family).or_insert(&job.usual);
    }
    let proofs = (|| {
        let mut probes = Vec::with_capacity(usual.len());
        for family in usual.keys() {
            probes.push((*family, Probes::new(*family as i32)?));
        }
        let prints = teller.prints()?;
        let mut proofs = HashMap::new();
        for (family, probes) in &probes {
            let proof = probes.proof(&prints, *family as i32, usual[family])?;
            proofs.insert(*family, proof);
        }
        Ok::<_, String>((proofs, prints))
    })();
    let (proofs, prints) = match proofs {
        Ok(told) => told,
        Err(e) => {
            log::debug!("options of TCP connections are read one by one: {e}");
            return (Vec::new(), batches);
        }
    };
    let (firsts, members, alone) = sort(batches, &prints);
    let count = (firsts.len(), members.len());
    let firsts: Vec<(usize, Job, Result<Options, Problem>)> = firsts
        .into_iter()
        .map(|(at, job)| {
            let options = job.read();
            (at, job, options)
        })
        .collect();
    log::debug!("options of {} TCP connections are those of {} others", count.1, count.0);
    let share = stream::share(members.len());
    let shares = members.chunks(share).map(|share| (share, ()));
    let read = stream::at_once(shares, |share: &[Member], ()| {
        let read = share.iter().map(|member| {
            let first = firsts.get(member.first).and_then(|(.., options)| options.as_ref().ok());
            let options = match (first, proofs.get(&member.job.family)) {
                (Some(first), Some(proof)) => member.read(first, proof),
                // It fails as the other has.
                _ => member.job.read(),
            };
            (member.at, options)
        });
        Ok::<Done, std::convert::Infallible>(read.collect())
    });
    let Ok(read) = read;
    let mut done: Done = read.into_iter().flatten().collect();
    done.extend(firsts.into_iter().map(|(at, _, options)| (at, options)));
    (done, alone)
}

/// The first of each kind, those like them, and those that have to be read by themselves.
fn sort(batches: Vec<Batch>, prints: &HashMap<i32, Vec<u8>>) -> (Batch, Vec<Member>, Vec<Batch>) {
    let mut kinds: HashMap<(u32, bool, &[u8]), usize> = HashMap::new();
    let (mut firsts, mut members, mut alone): (Batch, Vec<Member>, Batch) = Default::default();
    for (at, job) in batches.into_iter().flatten() {
        let print = prints.get(&job.fd.as_raw_fd()).filter(|print| !print.is_empty());
        let known = job.known.as_ref().is_some_and(|known| known.buffers.is_some());
        let Some(print) = print.filter(|_| known && job.filter.is_empty()) else {
            alone.push((at, job));
            continue;
        };
        match kinds.entry((job.family, job.connected, print)) {
            std::collections::hash_map::Entry::Occupied(kind) => {
                members.push(Member { at, job, first: *kind.get() });
            }
            std::collections::hash_map::Entry::Vacant(kind) => {
                kind.insert(firsts.len());
                firsts.push((at, job));
            }
        }
    }
    (firsts, members, if alone.is_empty() { Vec::new() } else { vec![alone] })
}

impl Member {
    /// Reads what may differ from the first of its kind.
    fn read(&self, first: &Options, proof: &Proof) -> Result<Options, Problem> {
        let reading = self.job.reading();
        let mut entry = first.entry.clone();
        let buffer = |name| {
            let size = reading.int(libc::SOL_SOCKET, name);
            size.map(|size| size as u32).map_err(|e| reading.socket.problem(e.to_string()))
        };
        (entry.opts.so_sndbuf, entry.opts.so_rcvbuf) =
            (buffer(libc::SO_SNDBUF)?, buffer(libc::SO_RCVBUF)?);
        let asked = |level: u32, number: u32| {
            proof
                .rest
                .iter()
                .any(|(row, _)| (row.level as u32, row.number as u32) == (level, number))
        };
        let mut unusual: Vec<_> =
            first.unusual.iter().filter(|o| !asked(o.level, o.number)).cloned().collect();
        unusual.extend(option_own::unusual(reading, &proof.rest)?);
        Ok(Options { entry, unusual })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets::Survey;
    use rewake_netlink::diag;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    fn jobs(streams: &[TcpStream], family: i32) -> Vec<Job> {
        let table = diag::tcp(&mut diag::open().unwrap(), family as u8).unwrap();
        let mut survey = Survey::default();
        let usual = survey.usual(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let job = |stream: &TcpStream| {
            let inode = rustix::fs::fstat(stream).unwrap().st_ino as u32;
            Job {
                fd: Arc::new(stream.as_fd().try_clone_to_owned().unwrap()),
                object: "a connection".to_owned(),
                family: family as u32,
                known: Some(Arc::new(table[&inode].clone())),
                connected: true,
                filter: Vec::new(),
                usual: usual.clone(),
            }
        };
        streams.iter().map(job).collect()
    }

    /// Connections, on each of which another option is set, and others: all are told as each by itself tells.
    #[test]
    fn what_is_told_of_all_is_what_each_tells() {
        let mut teller = match Teller::new() {
            Ok(teller) => teller,
            Err(e) => return println!("not here: {e}"),
        };
        for (family, address) in [(libc::AF_INET, "127.0.0.1:0"), (libc::AF_INET6, "[::1]:0")] {
            let listener = TcpListener::bind(address).unwrap();
            let accepted = std::cell::RefCell::new(Vec::new());
            let connect = || {
                let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                accepted.borrow_mut().push(listener.accept().unwrap());
                stream
            };
            let kinds = Kinds::of(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
            let table = OPTIONS.iter().filter(|row| row.kinds.any(kinds));
            let names: Vec<Name> = table
                .map(|row| (row.level, row.number))
                .chain(OTHERS.iter().copied())
                .chain([libc::SO_RCVBUF, libc::SO_SNDBUF].map(|name| (libc::SOL_SOCKET, name)))
                .collect();
            let mut streams = Vec::new();
            let mut set = 0;
            for name in names {
                let (plain, changed) = (connect(), connect());
                if let Some(now) = value(changed.as_fd(), name) {
                    set += usize::from(set_anyhow(changed.as_fd(), name, &now));
                }
                streams.extend([plain, changed]);
            }
            assert!(set > 50, "{set} options could be set");
            let batch = jobs(&streams, family).into_iter().enumerate().collect();
            let (mut done, alone) = read(&mut teller, vec![batch]);
            assert!(alone.is_empty(), "{} are left", alone.iter().flatten().count());
            done.sort_unstable_by_key(|(at, _)| *at);
            assert_eq!(done.len(), streams.len());
            let sorted = |mut options: Options| {
                options.unusual.sort_unstable_by_key(|o| (o.level, o.number));
                options
            };
            let asked = jobs(&streams, family).into_iter().map(|job| job.read().unwrap());
            for ((at, told), asked) in done.into_iter().zip(asked) {
                let (told, asked) = (sorted(told.unwrap()), sorted(asked));
                assert_eq!(told.entry, asked.entry, "{at}");
                assert_eq!(told.unusual, asked.unusual, "{at}");
            }
        }
    }

    /// Nearly all options are told, or it would not pay.
    #[test]
    fn most_options_are_told() {
        let Ok(mut teller) = Teller::new() else { return };
        for (family, most) in [(libc::AF_INET, 12), (libc::AF_INET6, 20)] {
            let usual = Survey::default().usual(family, libc::SOCK_STREAM, libc::IPPROTO_TCP);
            let probes = Probes::new(family).unwrap();
            let prints = teller.prints().unwrap();
            let proof = probes.proof(&prints, family, &usual).unwrap();
            let rest: Vec<_> = proof.rest.iter().map(|(row, _)| row.name).collect();
            println!("to be asked for: {rest:?}");
            assert!(rest.len() <= most, "{rest:?}");
        }
    }
}
