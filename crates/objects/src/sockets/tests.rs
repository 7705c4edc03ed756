//! Sockets of this process are surveyed, written, closed, and opened again.

use super::*;
use crate::files::collect::{Collector, Options, View};
use crate::files::open::{self, Opener};
use rewake_image::ImageDir;
use rewake_image::messages::InventoryEntry;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("rewake-sockets-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn options(established: bool, close: bool) -> Options {
    Options {
        ghost_limit: 0,
        link_remap: false,
        file_locks: false,
        build_ids: false,
        evasive_devices: false,
        shell_job: false,
        tcp_established: established,
        tcp_close: close,
        skip_in_flight: false,
        dies: false,
        outside: unix::Outside::default(),
        external: crate::files::external::Outside::default(),
        scan: crate::files::watched::Scan::default(),
    }
}

fn collect(collector: &mut Collector, fd: &impl AsFd) -> Result<u32, Problem> {
    let fd = fd.as_fd();
    let number = fd.as_raw_fd();
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
    let view = View {
        pid: std::process::id() as i32,
        tid: std::process::id() as i32,
        number,
        fd: fd.try_clone_to_owned().unwrap(),
        link: link.into_os_string().into_encoded_bytes(),
        stat: rustix::fs::fstat(fd).unwrap(),
        flags: rewake_sys::file::flags(fd).unwrap(),
        fdinfo: &|| Ok(Vec::new()),
        numbers: &[],
        told: None,
    };
    collector.descriptor(&view).map(|(id, _)| id)
}

/// Writes what was collected as a checkpoint.
fn save(path: &Path, collector: &mut Collector, closed: bool) {
    assert!(collector.descriptors_in_flight().is_empty());
    assert!(collector.unix_peers().is_empty());
    read(collector).unwrap();
    let images = ImageWriter::create(path).unwrap();
    images.write_all(kind::FILES, (), &collector.entries).unwrap();
    write(&images, &collector.sockets).unwrap();
    let inventory = InventoryEntry {
        img_version: 2,
        tcp_close: closed.then_some(true),
        network_lock_method: Some(lock::Method::Skip.number()),
        ..Default::default()
    };
    images.commit(&inventory).unwrap();
}

fn restored(
    path: &Path,
    established: bool,
    close: bool,
    ids: &[u32],
) -> Result<Vec<OwnedFd>, Problem> {
    let images = ImageDir::open(path).unwrap();
    let options = open::Options {
        tcp_established: established,
        tcp_close: close,
        ..open::Options::default()
    };
    let mut opener = Opener::new(&images, options, HashMap::new()).unwrap();
    let fds = ids
        .iter()
        .map(|id| opener.open(*id).map(|fd| fd.try_clone_to_owned().unwrap()))
        .collect::<Result<Vec<_>, _>>()?;
    settle_unix(&mut opener)?;
    set_going(&mut opener)?;
    opener.into_made().keep();
    Ok(fds)
}

/// Saves descriptors and closes them, silently as a killed tree does.
fn save_and_close<T: AsFd>(path: &Path, fds: Vec<T>) -> Vec<u32> {
    let mut collector = Collector::new(options(true, false));
    let ids = fds.iter().map(|fd| collect(&mut collector, fd).unwrap()).collect();
    save(path, &mut collector, false);
    let guard = collector.sockets.silence().unwrap();
    drop(fds);
    guard.keep();
    ids
}

fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (b, _) = listener.accept().unwrap();
    (a, b)
}

fn owned(fd: impl Into<OwnedFd>) -> OwnedFd {
    fd.into()
}

fn noise(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect()
}

#[test]
fn a_listener_comes_back_with_its_options() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 77).unwrap();
    listener.set_ttl(33).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 50_000).unwrap();
    rustix::net::sockopt::set_socket_linger(&listener, Some(std::time::Duration::from_secs(3)))
        .unwrap();
    rustix::net::sockopt::set_tcp_nodelay(&listener, true).unwrap();
    rustix::net::sockopt::set_tcp_keepidle(&listener, std::time::Duration::from_secs(99)).unwrap();
    let mut collector = Collector::new(options(false, false));
    let id = collect(&mut collector, &listener).unwrap();
    let before = collector.entries[0].clone();
    save(&scratch.0, &mut collector, false);
    drop((listener, collector));
    let fd = restored(&scratch.0, false, false, &[id]).unwrap().pop().unwrap();
    let mut after = Collector::new(options(false, false));
    assert_eq!(collect(&mut after, &fd).unwrap(), id);
    let mut after = after.entries[0].clone();
    let (b, a) = (before.isk.as_ref().unwrap(), after.isk.as_mut().unwrap());
    assert_eq!((a.backlog, a.ip_opts.as_ref().unwrap().ttl), (77, Some(33)));
    a.ino = b.ino;
    assert_eq!(before, after);
    assert!(TcpStream::connect(address).is_ok());
}

#[test]
fn an_address_in_use_names_who_has_it() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut collector = Collector::new(options(false, false));
    let id = collect(&mut collector, &listener).unwrap();
    save(&scratch.0, &mut collector, false);
    let problem = restored(&scratch.0, false, false, &[id]).unwrap_err();
    let who = format!("in use by process {} (", std::process::id());
    assert!(problem.reason.contains(&who), "{problem}");
}

#[test]
fn connections_are_refused_without_an_option() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let (a, _b) = pair(&listener);
    let mut collector = Collector::new(options(false, false));
    let problem = collect(&mut collector, &a).unwrap_err();
    let remedy = problem.remedy.unwrap();
    assert!(remedy.contains("--tcp-established") && remedy.contains("--tcp-close"), "{remedy}");
}

#[test]
fn waiting_connections_are_refused_without_an_option() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    for close in [false, true] {
        let problem = collect(&mut Collector::new(options(close, close)), &listener).unwrap_err();
        let remedy = problem.remedy.unwrap();
        assert!(remedy.contains("--skip-in-flight") && remedy.contains("--tcp-established"));
    }
    let skip = Options { skip_in_flight: true, ..options(false, false) };
    collect(&mut Collector::new(skip), &listener).unwrap();
    collect(&mut Collector::new(options(true, false)), &listener).unwrap();
}

/// Two connections with data both ways, one of them half closed, go on where they were.
fn connections_go_on(address: &str) {
    let scratch = Scratch::new();
    let listener = TcpListener::bind(address).unwrap();
    let (mut near, mut far) = pair(&listener);
    let (mut half, half_peer) = pair(&listener);
    near.set_nodelay(true).unwrap();
    let (out, back) = (noise(1, 50_000), noise(2, 30_000));
    near.write_all(&out).unwrap();
    far.write_all(&back).unwrap();
    half.write_all(b"no more").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    let addresses = (near.local_addr().unwrap(), near.peer_addr().unwrap());
    let fds: Vec<OwnedFd> =
        vec![owned(listener), owned(near), owned(far), owned(half), owned(half_peer)];
    let ids = save_and_close(&scratch.0, fds);
    let mut fds = restored(&scratch.0, true, false, &ids).unwrap();
    let mut stream = || TcpStream::from(fds.pop().unwrap());
    let (mut half_peer, mut half, mut far, mut near) = (stream(), stream(), stream(), stream());
    for s in [&half_peer, &half, &far, &near] {
        s.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        assert!(!rewake_sys::tcp::in_repair(s.as_fd()).unwrap());
    }
    assert_eq!((near.local_addr().unwrap(), near.peer_addr().unwrap()), addresses);
    assert!(near.nodelay().unwrap() && !far.nodelay().unwrap());
    let mut got = vec![0; out.len()];
    far.read_exact(&mut got).unwrap();
    assert!(got == out, "what waited for the far end");
    let mut got = vec![0; back.len()];
    near.read_exact(&mut got).unwrap();
    assert!(got == back, "what waited for the near end");
    let sender = std::thread::spawn(move || {
        near.write_all(&noise(3, 400_000)).unwrap();
        near
    });
    let mut got = vec![0; 400_000];
    far.read_exact(&mut got).unwrap();
    assert!(got == noise(3, 400_000), "what was sent after");
    drop(sender.join().unwrap());
    assert_eq!(far.read(&mut got).unwrap(), 0, "the end of the stream");
    let mut text = String::new();
    half_peer.read_to_string(&mut text).unwrap();
    assert_eq!(text, "no more");
    half_peer.write_all(b"still open").unwrap();
    drop(half_peer);
    text.clear();
    half.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still open");
}

#[test]
fn connections_go_on_v4() {
    connections_go_on("127.0.0.1:0");
}

#[test]
fn connections_go_on_v6() {
    connections_go_on("[::1]:0");
}

#[test]
fn a_send_queue_that_the_peer_has_no_room_for_is_sent_on() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut near, far) = pair(&listener);
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 300_000).unwrap();
    near.set_nonblocking(true).unwrap();
    let all = noise(5, 8_000_000);
    let mut sent = 0;
    loop {
        match near.write(&all[sent..]) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                // Until neither queue takes more.
                std::thread::sleep(std::time::Duration::from_millis(300));
                match near.write(&all[sent..]) {
                    Ok(n) => sent += n,
                    Err(_) => break,
                }
            }
            Err(e) => panic!("{e}"),
        }
    }
    near.shutdown(Shutdown::Write).unwrap();
    let ids = save_and_close(&scratch.0, vec![owned(near), owned(far)]);
    let images = ImageDir::open(&scratch.0).unwrap();
    let sockets = images.read_all(kind::FILES, ()).unwrap();
    let near = sockets[0].isk.as_ref().unwrap();
    let (stream, _) = images.read_with_payload(kind::TCP_STREAM, near.ino).unwrap().pop().unwrap();
    assert_eq!(near.state, inet::FIN_WAIT1);
    assert!(stream.unsq_len > Some(100_000), "{stream:?}");
    let mut fds = restored(&scratch.0, true, false, &ids).unwrap();
    let mut far = TcpStream::from(fds.pop().unwrap());
    far.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut got = Vec::new();
    far.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent);
    assert!(got == all[..sent], "what was sent and what was received differ");
}

/// One end goes and comes back while the other, outside, sees nothing of it.
fn outside_peers_notice_nothing(address: &str, close_first: bool) {
    let scratch = Scratch::new();
    let listener = TcpListener::bind(address).unwrap();
    let (mut outer, mut inner) = pair(&listener);
    let (mut leaving, mut left) = pair(&listener);
    outer.write_all(b"waits inside").unwrap();
    inner.write_all(b"waits outside").unwrap();
    left.write_all(b"to be read").unwrap();
    leaving.write_all(b"last words").unwrap();
    if close_first {
        leaving.shutdown(Shutdown::Write).unwrap();
    } else {
        left.shutdown(Shutdown::Write).unwrap();
    }
    let mut collector = Collector::new(options(true, false));
    let ids = [&inner, &left].map(|fd| collect(&mut collector, fd).unwrap());
    assert_eq!(collector.sockets.outside().len(), 2);
    let run_id =
        format!("{:021}-{}", std::process::id(), address.len() * 2 + usize::from(close_first));
    let run_id = run_id.chars().rev().collect::<String>();
    let mut lock = lock::Lock::take(
        &collector.sockets,
        &run_id,
        lock::Method::Nftables,
        std::process::id() as i32,
    )
    .unwrap();
    save(&scratch.0, &mut collector, false);
    assert_eq!(lock.method(&collector.sockets), lock::Method::Nftables);
    let guard = collector.sockets.silence().unwrap();
    lock.stay(&collector.sockets).unwrap();
    drop((inner, left));
    guard.keep();
    lock.leave();
    drop(collector);
    // Nobody is there, and nobody says so.
    outer.write_all(b", more").unwrap();
    outer.set_nonblocking(true).unwrap();
    let mut got = [0; 64];
    assert_eq!(outer.read(&mut got).unwrap(), 13);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(outer.read(&mut got).unwrap_err().kind(), ErrorKind::WouldBlock);
    outer.set_nonblocking(false).unwrap();
    let mut fds = restored(&scratch.0, true, false, &ids).unwrap();
    // The inventory of these tests has no lock.
    let inventory = InventoryEntry {
        dump_criu_run_id: Some(run_id.into_bytes()),
        network_lock_method: Some(lock::Method::Nftables.number()),
        ..InventoryEntry::default()
    };
    assert_eq!(lock::unlock(&inventory, std::iter::empty()).unwrap(), 1);
    let mut left = TcpStream::from(fds.pop().unwrap());
    let mut inner = TcpStream::from(fds.pop().unwrap());
    for s in [&outer, &inner, &leaving, &left] {
        s.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    }
    inner.read_exact(&mut got[..18]).unwrap();
    assert_eq!(&got[..18], b"waits inside, more");
    inner.write_all(b"on").unwrap();
    drop(inner);
    let mut text = String::new();
    outer.read_to_string(&mut text).unwrap();
    assert_eq!(text, "on");
    if close_first {
        text.clear();
        left.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        left.write_all(b", bye").unwrap();
        drop(left);
        text.clear();
        leaving.read_to_string(&mut text).unwrap();
        assert_eq!(text, "to be read, bye");
    } else {
        text.clear();
        leaving.read_to_string(&mut text).unwrap();
        assert_eq!(text, "to be read");
        leaving.write_all(b", bye").unwrap();
        drop(leaving);
        text.clear();
        left.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words, bye");
    }
}

#[test]
fn outside_peers_notice_nothing_v4() {
    outside_peers_notice_nothing("127.0.0.1:0", false);
    outside_peers_notice_nothing("127.0.0.1:0", true);
}

#[test]
fn outside_peers_notice_nothing_v6() {
    outside_peers_notice_nothing("[::1]:0", false);
    outside_peers_notice_nothing("[::1]:0", true);
}

#[test]
fn a_dump_leaves_connections_as_they_are() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut near, mut far) = pair(&listener);
    rustix::net::sockopt::set_socket_reuseaddr(&near, true).unwrap();
    near.write_all(b"waits").unwrap();
    let mut collector = Collector::new(options(true, false));
    for fd in [&near, &far] {
        collect(&mut collector, fd).unwrap();
    }
    assert!(collector.sockets.outside().is_empty());
    save(&scratch.0, &mut collector, false);
    for fd in [&near, &far] {
        assert!(!rewake_sys::tcp::in_repair(fd.as_fd()).unwrap());
    }
    drop(collector.sockets.silence().unwrap());
    for fd in [&near, &far] {
        assert!(!rewake_sys::tcp::in_repair(fd.as_fd()).unwrap());
    }
    assert!(rustix::net::sockopt::socket_reuseaddr(&near).unwrap());
    drop(collector);
    let mut got = [0; 5];
    far.read_exact(&mut got).unwrap();
    far.write_all(b"answer").unwrap();
    drop(far);
    let mut text = String::new();
    near.read_to_string(&mut text).unwrap();
    assert_eq!((&got, text.as_str()), (b"waits", "answer"));
}

#[test]
fn closed_connections_look_closed() {
    for closed_at_dump in [false, true] {
        let scratch = Scratch::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut near, _far) = pair(&listener);
        near.write_all(b"lost").unwrap();
        let mut collector = Collector::new(options(true, closed_at_dump));
        let ids = [collect(&mut collector, &near).unwrap()];
        assert_eq!(collector.sockets.connections.len(), usize::from(!closed_at_dump));
        save(&scratch.0, &mut collector, closed_at_dump);
        if closed_at_dump {
            let problem = restored(&scratch.0, true, false, &ids).unwrap_err();
            assert!(problem.remedy.unwrap().contains("--tcp-close"));
        }
        let problem = restored(&scratch.0, false, false, &ids).unwrap_err();
        assert!(problem.remedy.unwrap().contains("--tcp-close"));
        let fd = restored(&scratch.0, false, true, &ids).unwrap().pop().unwrap();
        let mut stream = TcpStream::from(fd);
        assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
        assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert_eq!(stream.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(u32::from(rewake_sys::tcp::info(stream.as_fd()).unwrap().state), inet::CLOSE);
    }
}

#[test]
fn a_call_that_is_not_answered_yet_goes_on() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let first = TcpStream::connect(address).unwrap();
    // The backlog is full: nobody answers.
    let calling = rustix::net::socket(AF_INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::io::ioctl_fionbio(&calling, true).unwrap();
    rustix::net::connect(&calling, &address).unwrap_err();
    let state = |fd: &OwnedFd| u32::from(rewake_sys::tcp::info(fd.as_fd()).unwrap().state);
    assert_eq!(state(&calling), inet::SYN_SENT);
    let own = rustix::net::getsockname(&calling).unwrap();
    let ids = save_and_close(&scratch.0, vec![calling]);
    let fd = restored(&scratch.0, true, false, &ids).unwrap().pop().unwrap();
    assert_eq!((state(&fd), rustix::net::getsockname(&fd).unwrap()), (inet::SYN_SENT, own));
    drop((listener.accept().unwrap(), first));
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"at last").unwrap();
    rustix::io::ioctl_fionbio(&fd, false).unwrap();
    let mut got = [0; 7];
    TcpStream::from(fd).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"at last");
}

#[test]
fn sockets_of_another_network_namespace_are_refused() {
    let elsewhere = std::thread::spawn(|| {
        rewake_sys::sockets::unshare_network().ok()?;
        Some(UdpSocket::bind("0.0.0.0:0").unwrap())
    });
    // Only root may make one.
    let Some(socket) = elsewhere.join().unwrap() else { return };
    let problem = collect(&mut Collector::new(options(false, false)), &socket).unwrap_err();
    assert!(problem.reason.contains("another network namespace"), "{problem}");
}

#[test]
fn datagram_sockets_come_back() {
    let scratch = Scratch::new();
    let bound = UdpSocket::bind("[::1]:0").unwrap();
    let address = bound.local_addr().unwrap();
    let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
    connected.connect("127.0.0.1:9").unwrap();
    connected.set_broadcast(true).unwrap();
    rustix::net::shutdown(&connected, rustix::net::Shutdown::Write).unwrap();
    let (own, peer) = (connected.local_addr().unwrap(), connected.peer_addr().unwrap());
    let ids = save_and_close(&scratch.0, vec![bound, connected]);
    let mut fds = restored(&scratch.0, false, false, &ids).unwrap();
    let connected = UdpSocket::from(fds.pop().unwrap());
    let bound = UdpSocket::from(fds.pop().unwrap());
    assert_eq!(bound.local_addr().unwrap(), address);
    assert_eq!((connected.local_addr().unwrap(), connected.peer_addr().unwrap()), (own, peer));
    assert!(connected.broadcast().unwrap());
    assert_eq!(connected.send(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    UdpSocket::bind("[::1]:0").unwrap().send_to(b"hello", address).unwrap();
    assert_eq!(bound.recv(&mut [0; 9]).unwrap(), 5);
}

#[test]
fn unix_pairs_come_back_with_what_waits_in_them() {
    let scratch = Scratch::new();
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.write_all(&noise(1, 70_000)).unwrap();
    b.write_all(b"answer").unwrap();
    b.shutdown(Shutdown::Write).unwrap();
    let (c, d) = UnixDatagram::pair().unwrap();
    for text in [&b"one"[..], b"", b"three"] {
        c.send(text).unwrap();
    }
    let (mut e, f) = UnixStream::pair().unwrap();
    e.write_all(b"last").unwrap();
    drop(e);
    let fds = vec![owned(a), owned(b), owned(c), owned(d), owned(f)];
    let ids = save_and_close(&scratch.0, fds);
    let mut fds = restored(&scratch.0, false, false, &ids).unwrap();
    let mut f = UnixStream::from(fds.pop().unwrap());
    let d = UnixDatagram::from(fds.pop().unwrap());
    let c = UnixDatagram::from(fds.pop().unwrap());
    let mut b = UnixStream::from(fds.pop().unwrap());
    let mut a = UnixStream::from(fds.pop().unwrap());
    let mut got = vec![0; 70_000];
    b.read_exact(&mut got).unwrap();
    assert!(got == noise(1, 70_000));
    let mut text = String::new();
    a.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    assert!(b.write(b"x").is_err());
    a.write_all(b"still").unwrap();
    b.read_exact(&mut got[..5]).unwrap();
    d.set_nonblocking(true).unwrap();
    for text in [&b"one"[..], b"", b"three"] {
        let length = d.recv(&mut got).unwrap();
        assert_eq!(&got[..length], text);
    }
    assert_eq!(d.recv(&mut got).unwrap_err().kind(), ErrorKind::WouldBlock);
    d.send(b"back").unwrap();
    assert_eq!(c.recv(&mut got).unwrap(), 4);
    text.clear();
    f.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    assert!(f.write(b"x").is_err());
}

#[test]
fn unix_servers_and_clients_come_back() {
    let scratch = Scratch::new();
    let path = scratch.0.join("server");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    client.write_all(b"request").unwrap();
    let receiver_path = scratch.0.join("receiver");
    let receiver = UnixDatagram::bind(&receiver_path).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.connect(&receiver_path).unwrap();
    sender.send(b"packet").unwrap();
    let images = scratch.0.join("images");
    std::fs::create_dir(&images).unwrap();
    let fds = vec![owned(listener), owned(client), owned(server), owned(receiver), owned(sender)];
    // The clients first: each brings the server it needs.
    let ids = save_and_close(&images, fds);
    let order = [ids[1], ids[4], ids[2], ids[3], ids[0]];
    let mut fds = restored(&images, false, false, &order).unwrap().into_iter();
    let mut client = UnixStream::from(fds.next().unwrap());
    let sender = UnixDatagram::from(fds.next().unwrap());
    let mut server = UnixStream::from(fds.next().unwrap());
    let receiver = UnixDatagram::from(fds.next().unwrap());
    let listener = UnixListener::from(fds.next().unwrap());
    assert_eq!(server.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
    let mut got = [0; 7];
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"request");
    server.write_all(b"reply").unwrap();
    client.read_exact(&mut got[..5]).unwrap();
    assert_eq!(receiver.recv(&mut got).unwrap(), 6);
    sender.send(b"again").unwrap();
    assert_eq!(receiver.recv(&mut got).unwrap(), 5);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o640);
    let _new = UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn relative_abstract_and_deleted_addresses_come_back() {
    let scratch = Scratch::new();
    let name = format!("rewake-test-{}", std::process::id());
    let by_name = rustix::net::socket(AF_UNIX, rustix::net::SocketType::SEQPACKET, None).unwrap();
    let address = rustix::net::SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
    rustix::net::bind(&by_name, &address).unwrap();
    rustix::net::listen(&by_name, 3).unwrap();
    let deleted_path = scratch.0.join("deleted");
    let deleted = UnixListener::bind(&deleted_path).unwrap();
    std::fs::remove_file(&deleted_path).unwrap();
    std::fs::write(&deleted_path, "someone else's").unwrap();
    let relative = rustix::net::socket(AF_UNIX, rustix::net::SocketType::DGRAM, None).unwrap();
    let directory = scratch.0.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            rewake_sys::sockets::unshare_directory().unwrap();
            rustix::process::chdir(&directory).unwrap();
            let address = rustix::net::SocketAddrUnix::new("relative").unwrap();
            rustix::net::bind(&relative, &address).unwrap();
        });
    });
    let images = scratch.0.join("images");
    std::fs::create_dir(&images).unwrap();
    let ids = save_and_close(&images, vec![by_name, owned(deleted), relative]);
    let mut fds = restored(&images, false, false, &ids).unwrap();
    let relative = UnixDatagram::from(fds.pop().unwrap());
    let deleted = UnixListener::from(fds.pop().unwrap());
    assert_eq!(relative.local_addr().unwrap().as_pathname(), Some(Path::new("relative")));
    assert!(scratch.0.join("relative").exists());
    assert_eq!(deleted.local_addr().unwrap().as_pathname(), Some(deleted_path.as_path()));
    assert_eq!(std::fs::read_to_string(&deleted_path).unwrap(), "someone else's");
    let client = rustix::net::socket(AF_UNIX, rustix::net::SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&client, &address).unwrap();
    // All of it is free only once it is closed.
    let problem = restored(&images, false, false, &ids).unwrap_err();
    assert!(problem.reason.contains("in use by process"), "{problem}");
}

const AF_INET: rustix::net::AddressFamily = rustix::net::AddressFamily::INET;
const AF_UNIX: rustix::net::AddressFamily = rustix::net::AddressFamily::UNIX;

#[test]
fn unix_peers_outside_are_named() {
    let (a, b) = UnixStream::pair().unwrap();
    let mut collector = Collector::new(options(false, false));
    collect(&mut collector, &a).unwrap();
    let obstacles = collector.unix_peers();
    assert_eq!(obstacles[0].0, std::process::id() as i32);
    assert!(obstacles[0].1.reason.contains(&format!("process {}", std::process::id())));
    collect(&mut collector, &b).unwrap();
    assert!(collector.unix_peers().is_empty());
}

#[test]
fn netlink_sockets_come_back() {
    let scratch = Scratch::new();
    let route = rewake_netlink::Socket::open(libc::NETLINK_ROUTE).unwrap();
    let address = rustix::net::netlink::SocketAddrNetlink::new(0, 5);
    rustix::net::bind(&route, &address).unwrap();
    let before = rustix::net::getsockname(&route).unwrap();
    let ids = save_and_close(&scratch.0, vec![route]);
    let fds = restored(&scratch.0, false, false, &ids).unwrap();
    assert_eq!(rustix::net::getsockname(&fds[0]).unwrap(), before);
}

#[test]
fn a_filter_comes_back() {
    let scratch = Scratch::new();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    // ret #4096: everything passes
    let program = [0x06 << 48 | 4096];
    rewake_sys::sockets::attach_filter(udp.as_fd(), &program).unwrap();
    let ids = save_and_close(&scratch.0, vec![udp]);
    let fds = restored(&scratch.0, false, false, &ids).unwrap();
    assert_eq!(rewake_sys::sockets::filter(fds[0].as_fd()).unwrap(), program);
}
