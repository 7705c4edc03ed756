//! No parser panics on any bytes: random ones, and real texts with pieces changed, cut out, doubled and cut off.

use proptest::prelude::*;
use rewake_proc::smaps::Want;
use rewake_proc::{
    auxv, cgroup, children, fdinfo, idmap, limits, link, locks, maps, mountinfo, pagemap, single,
    smaps, stat, status, syscall, timens, timers,
};

/// Runs every parser and everything that can be asked of what it gives.
fn all(bytes: &[u8]) {
    if let Ok(stat) = stat::parse(bytes) {
        stat.tty();
    }
    let _ = status::parse(bytes);
    let mut before = 0;
    for map in maps::parse(bytes).flatten() {
        map.name();
        map.path();
        map.deleted();
        assert!(map.len() > 0);
        before += 1;
    }
    assert!(before <= bytes.len());
    for want in [Want::FLAGS, Want::ALL] {
        for vma in smaps::parse(bytes, want).flatten() {
            vma.unknown_flags().count();
            let _ = vma.flags.to_string();
        }
    }
    let _ = fdinfo::parse(bytes);
    let _ = timers::parse(bytes);
    let _ = limits::parse(bytes);
    let _ = auxv::parse(bytes);
    let _ = auxv::parse32(bytes);
    for group in cgroup::parse(bytes).unwrap_or_default() {
        group.controllers().count();
    }
    for mount in mountinfo::parse(bytes).unwrap_or_default() {
        mount.super_options().count();
        mount.root_deleted();
    }
    let _ = children::parse(bytes);
    let _ = locks::parse(bytes);
    let _ = syscall::parse(bytes);
    let _ = link::parse_ns(bytes);
    link::classify(bytes);
    let _ = idmap::parse(bytes);
    let _ = idmap::setgroups(bytes);
    let _ = timens::parse(bytes);
    for entry in pagemap::entries(bytes) {
        entry.pfn();
        entry.swap();
    }
    let _ = single::comm(bytes);
    let _ = single::personality(bytes);
    let _ = single::loginuid(bytes);
    let _ = single::oom_score_adj(bytes);
    let _ = single::timerslack_ns(bytes);
    let _ = single::coredump_filter(bytes);
    let _ = single::pid_max(bytes);
    let _ = single::sysctl("sys/kernel/ns_last_pid", bytes);
    let _ = single::uptime(bytes);
    let _ = single::btime(bytes);
    let _ = single::cpu_flags(bytes);
}

const SEEDS: &[&[u8]] = &[
    include_bytes!("data/status-6.18"),
    include_bytes!("data/status-6.1"),
    include_bytes!("data/maps-6.18"),
    include_bytes!("data/smaps-6.1"),
    include_bytes!("data/limits-6.18"),
    include_bytes!("data/mountinfo-6.18"),
    b"5091 (cat) R 5089 5088 3013 34816 5089 4194304 101 2 3 4 5 6 -7 -8 20 -5 1 0 101913 3133440 418 1 2 3 4 11 12 13 \
        14 15 16 1 0 0 17 1 99 2 21 22 -23 1 2 3 4 5 6 7 768\n",
    b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1039\nlock:\t1: FLOCK  ADVISORY  WRITE 1 fe:00:10 0 EOF\n\
        eventfd-count:             1234\neventfd-id: 1\neventfd-semaphore: 1\nsigmask:\t0000000200000200\n\
        tfd:       12 events: 80000019 data:                c  pos:0 ino:40f sdev:10\n\
        inotify wd:2 ino:1 sdev:15 mask:2 ignored_mask:0 fhandle-bytes:2 fhandle-type:81 f_handle:0100\n\
        fanotify flags:0 event-flags:8000\nfanotify mnt_id:1b mflags:0 mask:2 ignored_mask:0\n\
        Pid:\t1\nNSpid:\t1\nmap_type:\t2\nkey_size:\t4\nvalue_size:\t8\nmax_entries:\t16\nmap_flags:\t0x0\n\
        clockid: 1\nticks: 0\nsettime flags: 01\nit_value: (9998734, 884550076)\nit_interval: (3, 5)\n",
    b"ID: 5\nsignal: 14/0000000000123400\nnotify: signal/pid.14256\nClockID: -2\n",
    b"9:name=systemd:/\n0::/x (deleted)\n",
    b"1: -> POSIX  ADVISORY  WRITE 14256 fe:00:10011195 5 14\n",
    b"230 0x0 0x1 0x2 0x3 0x4 0x5 0x6 0x7\n",
    b"monotonic           0         0\nboottime           -7 999999999\n",
    b"1019.17 1964.09\n",
    b"/memfd:x (deleted)",
    b"pid:[4026531836]",
];

/// One change: at a place (scaled to the length), a number of bytes replaced by others.
fn changes() -> impl Strategy<Value = Vec<(u16, usize, Vec<u8>)>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..6),
        prop::sample::select(vec![
            b"\n".to_vec(),
            b":".to_vec(),
            b" ".to_vec(),
            b"-".to_vec(),
            b")".to_vec(),
            b"\\012".to_vec(),
            b"\\".to_vec(),
            b"99999999999999999999".to_vec(),
            b"ffffffffffffffff".to_vec(),
            b"(deleted)".to_vec(),
            b"VmFlags:".to_vec(),
            b"[".to_vec(),
            b"\0".to_vec(),
            b"\t".to_vec(),
            b" - ".to_vec(),
            b"0x".to_vec(),
            b",".to_vec(),
        ]),
    ];
    prop::collection::vec((any::<u16>(), 0usize..12, piece), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        all(&bytes);
    }

    #[test]
    fn changed_texts(seed in 0..SEEDS.len(), changes in changes(), cut in any::<u16>()) {
        let mut text = SEEDS[seed].to_vec();
        for (at, length, piece) in changes {
            let at = at as usize * text.len() / 65536;
            let end = (at + length).min(text.len());
            text.splice(at..end, piece);
        }
        all(&text);
        text.truncate(cut as usize * (text.len() + 1) / 65536);
        all(&text);
    }
}

#[test]
fn every_truncation() {
    for seed in SEEDS.iter().filter(|seed| seed.len() < 4000) {
        (0..seed.len()).for_each(|end| all(&seed[..end]));
        (0..seed.len()).for_each(|start| all(&seed[start..]));
    }
}
