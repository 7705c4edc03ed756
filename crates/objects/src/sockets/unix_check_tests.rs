//! Hostile images: each is refused with its reason, before anything exists.

use super::*;
use crate::files::open::Options;
use rewake_image::messages::{
    FdTypes, FileEntry, InventoryEntry, RewakeEntry, RewakePacketEntry, ScmEntry, SkPacketEntry,
};
use rewake_image::{ImageDir, ImageWriter};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

struct Images(PathBuf);

impl Drop for Images {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A socket with file id and inode number `id`, connected to `peer`.
fn entry(id: u32, kind: i32, peer: u32) -> UnixSkEntry {
    let state = if peer == 0 { CLOSE } else { ESTABLISHED };
    UnixSkEntry {
        id,
        ino: id,
        r#type: kind as u32,
        state: state.into(),
        peer,
        ..UnixSkEntry::default()
    }
}

fn stream(id: u32, peer: u32) -> UnixSkEntry {
    entry(id, libc::SOCK_STREAM, peer)
}

fn packet(id_for: u32, rights: &[u32]) -> SkPacketEntry {
    let scm = match rights {
        [] => Vec::new(),
        rights => vec![ScmEntry { r#type: RIGHTS, rights: rights.to_vec() }],
    };
    SkPacketEntry { id_for, length: 1, scm }
}

/// Writes images of these sockets and messages (each of one byte) and reads them as a restore does.
fn with_images<T>(
    sockets: Vec<UnixSkEntry>,
    packets: &[SkPacketEntry],
    extra: &[RewakePacketEntry],
    body: impl FnOnce(&mut Opener<'_>) -> T,
) -> T {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("rewake-hostile-{}-{number}", std::process::id());
    let path = Images(std::env::temp_dir().join(name));
    std::fs::create_dir(&path.0).unwrap();
    let images = ImageWriter::create(&path.0).unwrap();
    let files: Vec<FileEntry> = sockets
        .into_iter()
        .map(|entry| FileEntry {
            r#type: FdTypes::Unixsk as i32,
            id: entry.id,
            usk: Some(Box::new(entry)),
            ..FileEntry::default()
        })
        .collect();
    images.write_all(kind::FILES, (), &files).unwrap();
    let mut queues = images.stream(kind::SK_QUEUES, ());
    for packet in packets {
        queues.push(packet).unwrap();
        queues.payload(b"x").unwrap();
    }
    queues.finish().unwrap();
    let extra: Vec<RewakeEntry> = extra
        .iter()
        .map(|p| RewakeEntry { packet: Some(p.clone()), ..RewakeEntry::default() })
        .collect();
    images.write_all(kind::REWAKE, (), &extra).unwrap();
    images.commit(&InventoryEntry { img_version: 2, ..InventoryEntry::default() }).unwrap();
    let images = ImageDir::open(&path.0).unwrap();
    let mut opener = Opener::new(&images, Options::default(), HashMap::new()).unwrap();
    body(&mut opener)
}

fn reason(sockets: Vec<UnixSkEntry>, packets: &[SkPacketEntry]) -> String {
    with_images(sockets, packets, &[], |opener| load(opener).unwrap_err().to_string())
}

#[test]
fn impossible_sockets_are_refused() {
    let one = |change: fn(&mut UnixSkEntry)| {
        let mut entry = stream(1, 0);
        change(&mut entry);
        reason(vec![entry], &[])
    };
    assert!(one(|e| e.r#type = 77).contains("impossible type 77"));
    assert!(one(|e| e.state = 3).contains("impossible state 3"));
    assert!(one(|e| e.shutdown = Some(9)).contains("shutdown"));
    assert!(one(|e| e.uflags = 2).contains("service"));
    assert!(one(|e| e.name = b"/a\0b\0".to_vec()).contains("zero byte"));
    assert!(one(|e| e.name = vec![b'a'; 200]).contains("longer"));
    assert!(one(|e| e.name = b"/tmp/..\0".to_vec()).contains("directory"));
    assert!(one(|e| e.name_dir = Some(b"here".to_vec())).contains("absolute"));
    assert!(one(|e| e.peer = 99).contains("do not have"));
    assert!(one(|e| e.peer = 1).contains("not connected to it"));
    let twins = vec![stream(1, 0), UnixSkEntry { ino: 1, ..stream(2, 0) }];
    assert!(reason(twins, &[]).contains("two sockets"));
}

#[test]
fn impossible_connections_are_refused() {
    assert!(reason(vec![stream(1, 2), stream(2, 3), stream(3, 1)], &[]).contains("not connected"));
    let mixed = vec![stream(1, 2), entry(2, libc::SOCK_SEQPACKET, 1)];
    assert!(reason(mixed, &[]).contains("another type"));
    let dgram = |id, peer| entry(id, libc::SOCK_DGRAM, peer);
    let crowd = vec![dgram(1, 2), dgram(2, 0), dgram(3, 2)];
    assert!(reason(crowd, &[]).contains("others are connected"));
    assert!(reason(vec![dgram(1, 1)], &[]).contains("others are connected"));
}

#[test]
fn datagram_sockets_in_a_circle_are_refused() {
    let named = |id: u32, peer| UnixSkEntry {
        name: format!("\0rewake-circle-{}-{id}", std::process::id()).into_bytes(),
        ..entry(id, libc::SOCK_DGRAM, peer)
    };
    let problem = with_images(vec![named(1, 2), named(2, 3), named(3, 1)], &[], &[], |opener| {
        opener.open(1).map(drop).unwrap_err()
    });
    assert!(problem.reason.contains("circle"), "{problem}");
}

#[test]
fn impossible_queues_are_refused() {
    let pair = || vec![stream(1, 2), stream(2, 1)];
    assert!(reason(pair(), &[packet(7, &[])]).contains("no socket that receives"));
    let listening = UnixSkEntry { state: LISTEN.into(), ..stream(1, 0) };
    assert!(reason(vec![listening], &[packet(1, &[])]).contains("no socket that receives"));
    assert!(reason(pair(), &[packet(1, &[1, 9])]).contains("file id 9"));
    assert!(reason(pair(), &[packet(1, &[1; 254])]).contains("more than 253"));
    let mut strange = packet(1, &[1]);
    strange.scm[0].r#type = 2;
    assert!(reason(pair(), &[strange]).contains("control messages"));
    let mut twice = packet(1, &[1]);
    twice.scm.push(twice.scm[0].clone());
    assert!(reason(pair(), &[twice]).contains("control messages"));
    let damaged = RewakePacketEntry { id_for: 1, credentials: vec![1], ..Default::default() };
    let problem =
        with_images(pair(), &[packet(1, &[])], &[damaged], |opener| load(opener).unwrap_err());
    assert!(problem.reason.contains("damaged"), "{problem}");
}

#[test]
fn impossible_lines_are_refused() {
    use rewake_image::messages::{
        RewakeFileEntry, RewakeUnixConnectionEntry as Connection, RewakeUnixEntry,
    };
    let line = |state: u8, connections: Vec<Connection>, packets: &[SkPacketEntry]| {
        let name = format!("\0rewake-line-{}", std::process::id()).into_bytes();
        let server = UnixSkEntry { state: state.into(), name, ..stream(1, 0) };
        let client = UnixSkEntry { state: ESTABLISHED.into(), ..stream(2, 1) };
        with_images(vec![server, client], packets, &[], |opener| {
            let unix = Some(RewakeUnixEntry { connections, ..Default::default() });
            opener.extra.insert(1, RewakeFileEntry { id: 1, unix, ..Default::default() });
            load(opener).err().map(|problem| problem.to_string())
        })
    };
    let of = |client: u32, queue: u32| Connection {
        client,
        queue: Some(queue),
        ..Connection::default()
    };
    let refused = |connections, words: &str| {
        let problem = line(LISTEN, connections, &[]).unwrap_or_default();
        assert!(problem.contains(words), "{problem}");
    };
    assert_eq!(line(LISTEN, vec![of(2, 7), of(0, 8)], &[packet(7, &[2]), packet(8, &[])]), None);
    refused(vec![of(9, 7)], "names a client that does not");
    refused(vec![of(1, 7)], "names a client that does not");
    refused(vec![of(2, 7), of(2, 8)], "names a client that does not");
    refused(vec![of(2, 7), of(0, 7)], "another's");
    refused(vec![of(2, 1)], "another's");
    refused(vec![Connection { credentials: vec![1], ..of(0, 7) }], "damaged");
    refused(vec![Connection { name: Some(vec![b'a'; 200]), ..of(0, 7) }], "damaged");
    let closed = line(CLOSE, vec![of(0, 7)], &[]).unwrap_or_default();
    assert!(closed.contains("does not listen") || closed.contains("not connected"), "{closed}");
    let nobody = line(LISTEN, vec![of(2, 7)], &[packet(6, &[])]).unwrap_or_default();
    assert!(nobody.contains("no socket that receives"), "{nobody}");
}

#[test]
fn a_length_that_lies_is_refused() {
    let lie = SkPacketEntry { length: u32::MAX, ..packet(1, &[]) };
    let name = format!("rewake-hostile-{}-lie", std::process::id());
    let path = Images(std::env::temp_dir().join(name));
    std::fs::create_dir(&path.0).unwrap();
    let images = ImageWriter::create(&path.0).unwrap();
    images.write_all(kind::FILES, (), &[] as &[FileEntry]).unwrap();
    let mut queues = images.stream(kind::SK_QUEUES, ());
    queues.push(&lie).unwrap();
    queues.payload(b"short").unwrap();
    // The writer may refuse it already; if not, the reader must.
    let written = queues.finish().is_ok()
        && images.commit(&InventoryEntry { img_version: 2, ..Default::default() }).is_ok();
    if written {
        let images = ImageDir::open(&path.0).unwrap();
        let mut opener = Opener::new(&images, Options::default(), HashMap::new()).unwrap();
        assert!(load(&mut opener).is_err());
    }
}

#[test]
fn sockets_in_flight_in_each_other_come_back() {
    // Each pair is in the queue of the next, the last in that of the first: nobody has any of them, and 300 are inside
    // each other.
    const PAIRS: u32 = 300;
    let sockets =
        (0..PAIRS).flat_map(|i| [stream(2 * i + 1, 2 * i + 2), stream(2 * i + 2, 2 * i + 1)]);
    let packets: Vec<SkPacketEntry> =
        (0..PAIRS).map(|i| packet(2 * ((i + 1) % PAIRS) + 1, &[2 * i + 1, 2 * i + 2])).collect();
    with_images(sockets.collect(), &packets, &[], |opener| {
        let fd = opener.open(1).unwrap();
        let message = rewake_sys::message::peek(fd, &mut [0; 9], 0).unwrap();
        assert_eq!((message.length, message.rights.len()), (1, 2));
    });
}

#[test]
fn a_descriptor_from_outside_takes_a_sockets_place() {
    use std::os::fd::AsRawFd;
    let outside = UnixSkEntry { uflags: EXTERNAL, ..entry(2, libc::SOCK_DGRAM, 0) };
    let ours = std::os::unix::net::UnixStream::pair().unwrap();
    with_images(vec![stream(1, 2), outside], &[], &[], |opener| {
        opener.options.inherited = [(b"socket:[1]".to_vec(), ours.0.as_raw_fd())].into();
        let fd = opener.open(1).unwrap();
        rewake_sys::message::send(fd, b"hello", &[], None, &[], 0, None).unwrap();
        use std::os::fd::AsFd;
        let got = rewake_sys::message::peek(ours.1.as_fd(), &mut [0; 9], 0).unwrap();
        assert_eq!(got.length, 5);
    });
}
