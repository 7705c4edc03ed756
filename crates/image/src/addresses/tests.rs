use super::edit::edit_files;
use super::rule::{Rule, Template};
use super::*;
use crate::messages::{
    FdTypes, FileEntry, FownEntry, InetSkEntry, IpOptsEntry, RewakeDatagramEntry, RewakeEntry,
    RewakeFileEntry, RewakeMembershipEntry, RewakeSocketOptionEntry, SkOptsEntry,
};
use crate::{ImageDir, ImageWriter, kind, messages::InventoryEntry};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

fn rule(text: &str) -> Rule {
    Rule::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

/// What a rule makes of an address, as text; the address itself if it does not match.
fn applied(text: &str, end: &str) -> String {
    let end: SocketAddr = end.parse().unwrap();
    match rule(text).apply(end.ip(), end.port()) {
        Some((ip, port)) => SocketAddr::new(ip, port).to_string(),
        None => end.to_string(),
    }
}

#[test]
fn addresses_prefixes_and_ports() {
    for (text, from, to) in [
        ("10.0.0.1=10.0.0.2", "10.0.0.1:80", "10.0.0.2:80"),
        ("10.0.0.1=10.0.0.2", "10.0.0.3:80", "10.0.0.3:80"),
        ("10.0.0.0/24=10.1.0.0/24", "10.0.0.77:80", "10.1.0.77:80"),
        ("10.0.0.0/24=10.1.0.0/24", "10.0.1.77:80", "10.0.1.77:80"),
        (":8080=:9090", "10.0.0.1:8080", "10.0.0.1:9090"),
        (":8080=:9090", "[::]:8080", "[::]:9090"),
        (":8080=:9090", "127.0.0.1:8080", "127.0.0.1:9090"),
        (":8080=:9090", "10.0.0.1:8081", "10.0.0.1:8081"),
        ("10.0.0.1:80=10.0.0.2:8080", "10.0.0.1:80", "10.0.0.2:8080"),
        ("10.0.0.1:80=10.0.0.2:8080", "10.0.0.1:81", "10.0.0.1:81"),
        ("[::1]:80=[::1]:81", "[::1]:80", "[::1]:81"),
        ("[2001:db8::1]=[2001:db8::2]", "[2001:db8::1]:9", "[2001:db8::2]:9"),
        ("2001:db8::/32=2001:db9::/32", "[2001:db8:1::5]:9", "[2001:db9:1::5]:9"),
        ("2001:db8::/33=2001:db8:8000::/33", "[2001:db8:1::5]:9", "[2001:db8:8001::5]:9"),
        // IPv4 addresses of IPv6 sockets are IPv4 addresses, on either side.
        ("10.0.0.1=10.0.0.2", "[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.2]:80"),
        ("::ffff:10.0.0.1=::ffff:10.0.0.2", "10.0.0.1:80", "10.0.0.2:80"),
        ("::ffff:10.0.0.0/120=10.1.0.0/24", "[::ffff:10.0.0.9]:80", "[::ffff:10.1.0.9]:80"),
    ] {
        assert_eq!(applied(text, from), to, "{text} on {from}");
    }
}

#[test]
fn loopback_and_wildcard_must_be_named() {
    for (text, from, to) in [
        ("0.0.0.0/0=0.0.0.0/0", "127.0.0.1:80", "127.0.0.1:80"),
        ("0.0.0.0/1=128.0.0.0/1", "0.0.0.0:80", "0.0.0.0:80"),
        ("0.0.0.0/1=128.0.0.0/1", "127.0.0.1:80", "127.0.0.1:80"),
        ("0.0.0.0/1=128.0.0.0/1", "[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:80"),
        ("::/64=2001:db8::/64", "[::]:80", "[::]:80"),
        ("::/64=2001:db8::/64", "[::1]:80", "[::1]:80"),
        ("127.0.0.1=10.0.0.2", "127.0.0.1:80", "10.0.0.2:80"),
        ("127.0.0.0/8=10.0.0.0/8", "127.0.0.5:80", "10.0.0.5:80"),
        ("0.0.0.0=10.0.0.2", "0.0.0.0:80", "10.0.0.2:80"),
        ("0.0.0.0:80=10.0.0.2:80", "0.0.0.0:80", "10.0.0.2:80"),
        ("::1=::2", "[::1]:80", "[::2]:80"),
        ("::=::1", "[::]:80", "[::1]:80"),
    ] {
        assert_eq!(applied(text, from), to, "{text} on {from}");
    }
}

#[test]
fn bad_rules_say_what_is_wrong() {
    for (text, reason) in [
        ("10.0.0.1", "not OLD=NEW"),
        ("=10.0.0.1", "must be given"),
        ("10.0.0.1=", "must be given"),
        ("10.0.0.256=10.0.0.1", "no IP address"),
        ("host=10.0.0.1", "'host' is no IP address"),
        ("10.0.0.1=2001:db8::1", "the other IPv6"),
        ("10.0.0.0/24=10.1.0.0/16", "same length"),
        ("10.0.0.0/24=10.1.0.1", "same length"),
        ("10.0.0.5/24=10.1.0.0/24", "that would be 10.0.0.0/24"),
        ("10.0.0.0/33=10.1.0.0/33", "no length of a prefix"),
        ("::ffff:0.0.0.0/95=::/95", "that would be"),
        ("::/90=2001:db8::/90=", "no length of a prefix"),
        (":80=10.0.0.1:80", "has none"),
        ("10.0.0.1:80=10.0.0.2", "one side has a port"),
        (":0=:1", "no port"),
        (":80=:65536", "no port"),
        ("[::1=[::2", "closing bracket"),
        ("[::1]80=[::1]81", "no port"),
    ] {
        let error = Rule::parse(text).expect_err(text).to_string();
        assert!(error.contains(reason) && error.contains(text), "{text}: {error}");
    }
}

#[test]
fn templates_give_each_copy_its_own() {
    let of = |text: &str, i| Template::new(text).rule(i).map(|r| r.to_string());
    assert_eq!(of(":8080=:{8080+i}", 3).unwrap(), ":8080=:8083");
    assert_eq!(of("10.0.0.1=10.0.0.{1+i}", 0).unwrap(), "10.0.0.1=10.0.0.1");
    assert_eq!(
        of("10.0.0.1:{i+1}=10.{i}.0.1:{9000 - i*10}", 2).unwrap(),
        "10.0.0.1:3=10.2.0.1:8980"
    );
    assert_eq!(of("10.0.0.1=10.0.0.2", 9).unwrap(), "10.0.0.1=10.0.0.2");
    for (text, reason) in [
        (":80=:{80+i", "not closed"),
        (":80=:{}", "not like"),
        (":80=:{80+j}", "not like"),
        (":80=:{i-5}", "not like"),
        (":80=:{65535+i}", "for copy 3"),
        ("10.0.0.1=10.0.0.{254+i}", "for copy 3"),
    ] {
        let error = of(text, 3).expect_err(text).to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

fn words(ip: IpAddr) -> Vec<u32> {
    let bytes = match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    bytes.chunks(4).map(|c| u32::from_ne_bytes(c.try_into().unwrap())).collect()
}

/// A socket; `peer` has port 0 if it is not connected.
fn socket(id: u32, proto: u32, local: &str, peer: &str) -> FileEntry {
    let (local, peer): (SocketAddr, SocketAddr) = (local.parse().unwrap(), peer.parse().unwrap());
    let isk = InetSkEntry {
        id,
        ino: id,
        family: if local.is_ipv4() { 2 } else { 10 },
        r#type: 1,
        proto,
        state: 1,
        src_port: local.port().into(),
        dst_port: peer.port().into(),
        src_addr: words(local.ip()),
        dst_addr: words(peer.ip()),
        fown: FownEntry::default(),
        opts: SkOptsEntry::default(),
        ip_opts: Some(IpOptsEntry::default()),
        ..InetSkEntry::default()
    };
    FileEntry {
        r#type: FdTypes::Inetsk as i32,
        id,
        isk: Some(Box::new(isk)),
        ..FileEntry::default()
    }
}

const NOBODY: &str = "0.0.0.0:0";

#[test]
fn the_first_rule_that_matches_wins() {
    let mut files = [socket(1, 6, "10.0.0.1:80", NOBODY), socket(2, 17, "10.0.0.2:80", NOBODY)];
    let rules = [rule("10.0.0.1=10.9.0.1"), rule("10.0.0.0/24=10.8.0.0/24"), rule(":1=:2")];
    let outcome = rewrite(&mut files, &rules);
    assert_eq!(outcome.matches, [1, 1, 0]);
    let now: Vec<String> = outcome.changes.iter().map(|c| c.local.1.to_string()).collect();
    assert_eq!(now, ["10.9.0.1:80", "10.8.0.2:80"]);
    assert_eq!(files[0].isk.as_ref().unwrap().src_addr, words("10.9.0.1".parse().unwrap()));
}

#[test]
fn a_peer_outside_is_warned_of_and_one_inside_moves_along() {
    let mut files = [
        // A connection with both ends here, one with a peer outside on the same port.
        socket(1, 6, "10.0.0.1:80", "10.0.0.1:5000"),
        socket(2, 6, "10.0.0.1:5000", "10.0.0.1:80"),
        socket(3, 6, "10.0.0.1:80", "10.0.0.9:6000"),
        socket(4, 6, "10.0.0.1:7000", "10.0.0.9:80"),
    ];
    let outcome = rewrite(&mut files, &[rule(":80=:81")]);
    let shown: Vec<(u32, String, String, bool)> = outcome
        .changes
        .iter()
        .map(|c| (c.id, c.local.1.to_string(), c.peer.unwrap().1.to_string(), c.advice().is_some()))
        .collect();
    let want = [
        (1, "10.0.0.1:81", "10.0.0.1:5000", false),
        (2, "10.0.0.1:5000", "10.0.0.1:81", false),
        (3, "10.0.0.1:81", "10.0.0.9:6000", true),
    ];
    let want: Vec<_> =
        want.map(|(id, l, p, a)| (id, l.to_owned(), p.to_owned(), a)).into_iter().collect();
    assert_eq!(shown, want, "a port of somebody else is not ours to change");
    let advice = outcome.changes[2].advice().unwrap();
    assert!(advice.contains("10.0.0.9:6000") && advice.contains("--tcp-close"), "{advice}");
}

#[test]
fn a_peer_that_has_moved_is_found_at_its_new_address() {
    let mut files = [socket(1, 6, "10.0.0.5:5000", "10.0.0.1:80")];
    let outcome = rewrite(&mut files, &[rule("10.0.0.1=10.0.0.2")]);
    assert_eq!(outcome.changes[0].peer.unwrap().1.to_string(), "10.0.0.2:80");
    assert_eq!(outcome.changes[0].advice(), None, "its own address is what it was");
}

#[test]
fn what_has_no_port_is_not_matched_by_one() {
    // The number of a raw socket is its protocol.
    let mut files = [socket(1, 1, "10.0.0.1:80", NOBODY), socket(2, 17, "0.0.0.0:0", NOBODY)];
    let outcome = rewrite(&mut files, &[rule(":80=:81"), rule("0.0.0.0=10.0.0.3")]);
    assert_eq!((outcome.matches, outcome.changes), (vec![0, 0], vec![]));
    let outcome = rewrite(&mut files, &[rule("10.0.0.1=10.0.0.2")]);
    assert_eq!(outcome.changes[0].local.1.to_string(), "10.0.0.2:80");
}

/// A directory that goes away.
struct Temp(std::path::PathBuf);

impl Temp {
    fn new(name: &str) -> Temp {
        let path =
            std::env::temp_dir().join(format!("rewake-addresses-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Temp(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_directory_is_edited_whole_and_stays_a_checkpoint() {
    let dir = Temp::new("edit");
    let writer = ImageWriter::create(&dir.0).unwrap();
    let files = [socket(1, 6, "10.0.0.1:80", NOBODY), socket(2, 17, "10.0.0.2:80", NOBODY)];
    writer.write_all(kind::FILES, (), &files).unwrap();
    let inventory = InventoryEntry { img_version: 2, ..InventoryEntry::default() };
    writer.commit(&inventory).unwrap();
    let read = |name: &str| std::fs::read(dir.0.join(name)).unwrap();
    let (before, manifest) = (read("files.img"), read("rewake.manifest"));

    assert!(edit(&dir.0, &[rule("10.7.0.1=10.7.0.2")]).unwrap().changes.is_empty());
    assert_eq!((read("files.img"), read("rewake.manifest")), (before.clone(), manifest.clone()));

    assert_eq!(edit(&dir.0, &[rule("10.0.0.1=10.0.0.200")]).unwrap().matches, [1]);
    assert_ne!(read("files.img"), before);
    let images = ImageDir::open(&dir.0).unwrap();
    images.check_complete(|_| false).unwrap();
    let now = images.read_all(kind::FILES, ()).unwrap();
    assert_eq!(now[0].isk.as_ref().unwrap().src_addr, words("10.0.0.200".parse().unwrap()));
    assert_eq!(now[1], files[1]);

    edit(&dir.0, &[rule("10.0.0.200=10.0.0.1")]).unwrap();
    assert_eq!((read("files.img"), read("rewake.manifest")), (before, manifest), "and back");
    let names: Vec<_> =
        std::fs::read_dir(&dir.0).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

/// What `rewake.img` says of a UDP socket with file id 1.
fn extra() -> RewakeFileEntry {
    let octets = |text: &str| match text.parse::<IpAddr>().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let datagram = |source: &str, source_port| RewakeDatagramEntry {
        data: b"data".to_vec(),
        source: octets(source),
        source_port,
        destination: Some(octets("10.0.0.1")),
    };
    RewakeFileEntry {
        id: 1,
        socket_options: vec![RewakeSocketOptionEntry {
            level: 0,
            number: 32,
            value: octets("10.0.0.1"),
            interface: None,
        }],
        memberships: vec![RewakeMembershipEntry {
            interface: b"eth0".to_vec(),
            group: octets("239.1.2.3"),
            exclude: false,
            sources: vec![octets("10.0.0.9")],
        }],
        datagrams: vec![datagram("10.0.0.2", 7), datagram("10.0.0.9", 7), datagram("fd00::9", 7)],
        uid: Some(5),
        ..RewakeFileEntry::default()
    }
}

#[test]
fn what_waits_in_sockets_moves_along() {
    let mut files = [socket(1, 17, "10.0.0.1:80", NOBODY), socket(2, 17, "10.0.0.2:7", NOBODY)];
    let rules = [
        rule("10.0.0.1=10.7.0.1"),
        rule(":7=:9"),
        rule("10.0.0.9=10.7.0.9"),
        rule("239.1.2.3=239.1.2.4"),
    ];
    let mut outcome = rewrite(&mut files, &rules);
    let mut now = extra();
    assert_eq!(rewrite_extra([&mut now], &rules, &mut outcome), [1].into());
    // The socket and its option, three datagrams to it; its sender, and what this has sent; a stranger twice; the group.
    assert_eq!(outcome.matches, [5, 2, 2, 1]);
    let shown: Vec<_> = now.datagrams.iter().map(|d| (d.source.clone(), d.source_port)).collect();
    assert_eq!(shown[..2], [(vec![10, 0, 0, 2], 9), (vec![10, 7, 0, 9], 7)]);
    assert_eq!(shown[2].1, 7, "a port of somebody else is not ours to change");
    assert!(now.datagrams.iter().all(|d| d.destination.as_deref() == Some(&[10, 7, 0, 1])));
    assert_eq!(now.memberships[0].group, [239, 1, 2, 4]);
    assert_eq!(now.memberships[0].sources, [[10, 7, 0, 9]]);
    assert_eq!(now.socket_options[0].value, [10, 7, 0, 1]);
}

#[test]
fn extra_state_is_edited_and_can_be_taken_back() {
    let dir = Temp::new("extra");
    let writer = ImageWriter::create(&dir.0).unwrap();
    let files = [socket(1, 17, "10.0.0.1:80", NOBODY)];
    writer.write_all(kind::FILES, (), &files).unwrap();
    let entries = [
        RewakeEntry { manifest: Some(true), ..RewakeEntry::default() },
        RewakeEntry { file: Some(extra()), ..RewakeEntry::default() },
        RewakeEntry {
            file: Some(RewakeFileEntry { id: 2, ..RewakeFileEntry::default() }),
            ..RewakeEntry::default()
        },
    ];
    writer.write_all(kind::REWAKE, (), &entries).unwrap();
    let inventory = InventoryEntry { img_version: 2, ..InventoryEntry::default() };
    writer.commit(&inventory).unwrap();
    let read = |name: &str| std::fs::read(dir.0.join(name)).unwrap();
    let all = || ["files.img", "rewake.img", "rewake.manifest"].map(read);
    let before = all();

    let outcome = edit(&dir.0, &[rule("10.0.0.1=10.0.0.200")]).unwrap();
    assert_eq!(outcome.matches, [5]);
    let images = ImageDir::open(&dir.0).unwrap();
    images.check_complete(|_| false).unwrap();
    let now = images.read_all(kind::REWAKE, ()).unwrap();
    let file = now[1].file.as_ref().unwrap();
    assert_eq!(file.datagrams[0].destination.as_deref(), Some(&[10, 0, 0, 200][..]));
    assert_eq!((file.uid, now.len()), (Some(5), 3));
    assert_eq!((&now[0], &now[2]), (&entries[0], &entries[2]));

    // A stranger is known to the extra state only.
    assert_eq!(edit(&dir.0, &[rule("10.0.0.9=10.0.0.8")]).unwrap().matches, [2]);
    edit(&dir.0, &[rule("10.0.0.8=10.0.0.9")]).unwrap();
    edit(&dir.0, &[rule("10.0.0.200=10.0.0.1")]).unwrap();
    assert_eq!(all(), before, "and back");
}

#[test]
fn without_a_checkpoint_or_with_a_damaged_one_nothing_is_edited() {
    let dir = Temp::new("none");
    assert!(edit(&dir.0, &[rule(":1=:2")]).is_err());
    let writer = ImageWriter::create(&dir.0).unwrap();
    writer.write_all(kind::FILES, (), &[socket(1, 6, "10.0.0.1:80", NOBODY)]).unwrap();
    writer.commit(&InventoryEntry { img_version: 2, ..InventoryEntry::default() }).unwrap();
    let path = dir.0.join("files.img");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = edit(&dir.0, &[rule("10.0.0.1=10.0.0.2")]).unwrap_err().to_string();
    assert!(error.contains("files.img"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

fn v4() -> impl Strategy<Value = IpAddr> {
    any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into())
}

fn v6() -> impl Strategy<Value = IpAddr> {
    any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into())
}

/// A prefix of an address as text.
fn prefix(ip: IpAddr, len: u8) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            format!("{}/{len}", Ipv4Addr::from_bits(ip.to_bits() & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            format!("{}/{len}", Ipv6Addr::from_bits(ip.to_bits() & mask))
        }
    }
}

/// A varint field that no message of the format has.
fn unknown(number: u32, value: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    crate::dynamic::put_varint(&mut bytes, u64::from(number) << 3);
    crate::dynamic::put_varint(&mut bytes, value.into());
    bytes
}

/// A file of sockets, in which entries and their sockets have fields that nobody knows.
fn image(sockets: &[FileEntry], strange: u8) -> Vec<u8> {
    use prost::Message;
    let mut bytes = kind::FILES.info().header_bytes();
    for file in sockets {
        let mut inner = file.isk.as_ref().unwrap().encode_to_vec();
        inner.extend(unknown(900, strange));
        let without = FileEntry { isk: None, ..file.clone() };
        let mut message = unknown(901, strange);
        message.extend(without.encode_to_vec());
        crate::dynamic::put_varint(&mut message, 4 << 3 | 2);
        crate::dynamic::put_varint(&mut message, inner.len() as u64);
        message.extend(inner);
        message.extend(unknown(902, strange));
        bytes.extend((message.len() as u32).to_le_bytes());
        bytes.extend(message);
    }
    bytes
}

fn sockets() -> impl Strategy<Value = Vec<FileEntry>> {
    let end = || {
        prop_oneof![
            (0u8..4, 1u16..4).prop_map(|(a, p)| format!("10.0.0.{a}:{p}")),
            (0u16..4, 1u16..4).prop_map(|(a, p)| format!("[2001:db8::{a}]:{p}")),
        ]
    };
    let one = (end(), any::<bool>(), prop_oneof![Just(6u32), Just(17)]);
    proptest::collection::vec(one, 0..6).prop_map(|list| {
        list.into_iter()
            .zip(1..)
            .map(|((local, connected, proto), id)| {
                let nobody = if local.starts_with('[') { "[::]:0" } else { NOBODY };
                let peer = if connected { local.clone() } else { nobody.to_owned() };
                socket(id, proto, &local, &peer)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn a_prefix_gives_another_network_and_keeps_the_host(
        (ip, new) in prop_oneof![(v4(), v4()), (v6(), v6())],
        len in 0u8..=32,
        port in 1u16..,
    ) {
        prop_assume!(!ip.is_loopback() && !ip.is_unspecified());
        prop_assume!(ip.to_canonical() == ip && new.to_canonical() == new);
        let (from, to) = (prefix(ip, len), prefix(new, len));
        let there = rule(&format!("{from}={to}"));
        let (moved, same) = there.apply(ip, port).expect("it is in its own prefix");
        prop_assert_eq!(same, port);
        prop_assert_eq!(prefix(moved, len), to);
        let back = rule(&format!("{}={from}", prefix(new, len)));
        prop_assume!(!moved.is_loopback() && !moved.is_unspecified());
        prop_assert_eq!(back.apply(moved, port), Some((ip, port)));
    }

    #[test]
    fn mapped_addresses_are_treated_as_what_they_are(ip in any::<u32>(), old in any::<u32>(), len in 0u8..=32) {
        let (ip, old) = (Ipv4Addr::from_bits(ip), Ipv4Addr::from_bits(old));
        let text = format!("{}={}", prefix(old.into(), len), prefix(Ipv4Addr::new(10, 0, 0, 0).into(), len.min(8).max(len)));
        let rule = rule(&text);
        let plain = rule.apply(ip.into(), 5);
        let mapped = rule.apply(ip.to_ipv6_mapped().into(), 5);
        prop_assert_eq!(plain.map(|(ip, _)| ip), mapped.map(|(ip, _)| ip.to_canonical()));
        if let Some((ip, _)) = mapped {
            prop_assert!(ip.is_ipv6());
        }
    }

    #[test]
    fn any_text_is_a_rule_or_an_error(text in "[0-9a-f:.=/\\[\\]{}+i*-]{0,40}", i in 0u32..1000) {
        if let Ok(rule) = Template::new(text).rule(i) {
            prop_assert_eq!(Rule::parse(&rule.to_string()), Ok(rule));
        }
    }

    #[test]
    fn what_does_not_match_stays_byte_by_byte(files in sockets(), strange in any::<u8>()) {
        let bytes = image(&files, strange);
        let rules = [rule("192.168.0.0/16=192.169.0.0/16"), rule(":99=:98")];
        let (edited, outcome) = edit_files(Path::new("files.img"), 2, &bytes, &rules).unwrap();
        prop_assert_eq!(outcome.changes, vec![]);
        prop_assert_eq!(edited, bytes);
    }

    #[test]
    fn an_edit_is_the_rewrite_and_can_be_taken_back(files in sockets(), strange in any::<u8>()) {
        let bytes = image(&files, strange);
        let there = [rule("10.0.0.0/24=10.77.0.0/24"), rule("2001:db8::/64=2001:db8:7::/64")];
        let back = [rule("10.77.0.0/24=10.0.0.0/24"), rule("2001:db8:7::/64=2001:db8::/64")];
        let (edited, outcome) = edit_files(Path::new("files.img"), 2, &bytes, &there).unwrap();
        let mut in_memory = files.clone();
        prop_assert_eq!(rewrite(&mut in_memory, &there), outcome);
        prop_assert_eq!(&edited, &image(&in_memory, strange));
        let (again, _) = edit_files(Path::new("files.img"), 2, &edited, &back).unwrap();
        prop_assert_eq!(again, bytes);
    }
}
