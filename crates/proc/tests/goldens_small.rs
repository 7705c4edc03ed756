//! The smaller files, each with real texts (Linux 6.18) and odd ones.

use std::borrow::Cow;
use std::time::Duration;

use rewake_proc::cgroup::Cgroup;
use rewake_proc::idmap::IdRange;
use rewake_proc::limits::Limit;
use rewake_proc::link::{FdLink, Ns, NsKind};
use rewake_proc::locks::{Lock, LockKind, LockType};
use rewake_proc::syscall::Syscall;
use rewake_proc::timens::{Offset, TimensOffsets};
use rewake_proc::timers::{Notify, PosixTimer};
use rewake_proc::{
    auxv, cgroup, children, idmap, limits, link, locks, mountinfo, pagemap, single, syscall,
    timens, timers,
};

#[test]
fn posix_timers() {
    let good = "ID: 5\nsignal: 14/0000000000123400\nnotify: signal/pid.14256\nClockID: -2\n\
        ID: 2\nsignal: 64/ffffffffffffffff\nnotify: signal/tid.14257\nClockID: 1\n";
    let all = timers::parse(good.as_bytes()).map_err(|e| e.to_string());
    let bad = format!("{good}ID: 1\nsignal: 14/(nil)\nnotify: none/pid.14256\nClockID: 0\n");
    let error = timers::parse(bad.as_bytes()).unwrap_err();
    assert_eq!((error.field, error.line), ("signal", 10));
    let wanted = [
        PosixTimer {
            id: 5,
            signal: 14,
            value: 0x123400,
            notify: Notify::Signal,
            thread_id: false,
            target: 14256,
            clock_id: -2,
        },
        PosixTimer {
            id: 2,
            signal: 64,
            value: u64::MAX,
            notify: Notify::Signal,
            thread_id: true,
            target: 14257,
            clock_id: 1,
        },
    ];
    assert_eq!(all.as_deref(), Ok(&wanted[..]));
    assert_eq!(timers::parse(b"").unwrap(), []);
    let error =
        timers::parse(b"ID: 5\nsignal: 14/0000000000123400\nnotify: thread/pid.1\n").unwrap_err();
    assert_eq!(error.field, "ClockID");
    let error = timers::parse(b"ID: 5\nsignal: 14/0\nClockID: 1\n").unwrap_err();
    assert_eq!((error.field, error.line), ("notify", 3));
}

#[test]
fn resource_limits() {
    let text = include_bytes!("data/limits-6.18");
    let all = limits::parse(text).unwrap();
    const STACK: usize = 3;
    const CORE: usize = 4;
    const NOFILE: usize = 7;
    assert_eq!(all[STACK], Limit { soft: Some(8388608), hard: None });
    assert_eq!(all[CORE], Limit { soft: Some(0), hard: None });
    assert_eq!(all[NOFILE], Limit { soft: Some(20000), hard: Some(20000) });
    assert_eq!(all[0], Limit { soft: None, hard: None });
    assert_eq!(all[13], Limit { soft: Some(0), hard: Some(0) }); // nice has no unit
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert_eq!(
        limits::parse(text.replace("20000 ", "2000k ").as_bytes()).unwrap_err().field,
        "Max open files"
    );
    assert_eq!(
        limits::parse(text.replace("Max nice", "Max mice").as_bytes()).unwrap_err().field,
        "Max nice priority"
    );
}

#[test]
fn auxiliary_vector() {
    let words = |all: &[u64]| all.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    let parsed = auxv::parse(&words(&[33, 0x7fff0000, 6, 4096, 0, 0])).unwrap();
    assert_eq!(parsed.entries, [(33, 0x7fff0000), (6, 4096)]);
    assert_eq!((parsed.get(6), parsed.get(7)), (Some(4096), None));
    assert_eq!(auxv::parse(b"").unwrap().entries, []);
    assert_eq!(auxv::parse(&words(&[33, 1])).unwrap_err().field, "AT_NULL");
    assert_eq!(auxv::parse(&words(&[33, 1, 0])).unwrap_err().field, "AT_NULL");
    let narrow: Vec<u8> = [32u32, 0xf7f0_0000, 0, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    assert_eq!(auxv::parse32(&narrow).unwrap().entries, [(32, 0xf7f0_0000)]);
}

#[test]
fn cgroups() {
    let text = b"9:name=systemd:/\n4:cpu,cpuacct:/a:b (deleted)\n0::/../user.slice/x (deleted)\n";
    let all = cgroup::parse(text).unwrap();
    let wanted = [
        Cgroup { hierarchy: 9, controllers: b"name=systemd", path: b"/", deleted: false },
        Cgroup {
            hierarchy: 4,
            controllers: b"cpu,cpuacct",
            path: b"/a:b (deleted)",
            deleted: false,
        },
        Cgroup { hierarchy: 0, controllers: b"", path: b"/../user.slice/x", deleted: true },
    ];
    assert_eq!(all, wanted);
    assert_eq!(all[1].controllers().collect::<Vec<_>>(), [&b"cpu"[..], b"cpuacct"]);
    assert_eq!(all[2].controllers().count(), 0);
    assert_eq!(cgroup::parse(b"0::\n").unwrap_err().field, "path");
    assert_eq!(cgroup::parse(b"0:/\n").unwrap_err().field, "controllers");
}

#[test]
fn mounts() {
    let all_text = include_bytes!("data/mountinfo-6.18");
    let all = mountinfo::parse(all_text).unwrap();
    assert_eq!(all.len(), all_text.iter().filter(|b| **b == b'\n').count());
    let root = all.iter().find(|m| &*m.mount_point == b"/").unwrap();
    assert_eq!((&*root.fs_type, root.dev), (&b"ext4"[..], (254, 0)));

    let text = b"36 35 98:0 /a\\040b//deleted /mnt\\0122\\134 rw,noatime shared:7 master:1 propagate_from:2 unbindable \
        frob:3 - fuse.ssh\\043fs  rw,lowerdir=/a\\054b:/c,errors=continue,usrquota\n\
        58 41 0:4 net:[4026532345] /run/netns/x rw - nsfs nsfs rw\n";
    let all = mountinfo::parse(text).unwrap();
    let m = &all[0];
    assert_eq!((m.id, m.parent, m.dev), (36, 35, (98, 0)));
    assert_eq!((&*m.root, m.root_deleted()), (&b"/a b//deleted"[..], true));
    assert_eq!((&*m.mount_point, m.options), (&b"/mnt\n2\\"[..], &b"rw,noatime"[..]));
    assert!(m.has_option(b"noatime") && !m.has_option(b"noat"));
    assert_eq!(
        (m.shared, m.master, m.propagate_from, m.unbindable),
        (Some(7), Some(1), Some(2), true)
    );
    assert_eq!(m.unknown, [b"frob:3"]);
    assert_eq!((&*m.fs_type, &*m.source), (&b"fuse.ssh#fs"[..], &b""[..]));
    let options: Vec<_> = m.super_options().collect();
    let plain = |s: &'static str| Cow::Borrowed(s.as_bytes());
    let wanted = [
        (plain("rw"), None),
        (plain("lowerdir"), Some(plain("/a,b:/c"))),
        (plain("errors"), Some(plain("continue"))),
        (plain("usrquota"), None),
    ];
    assert_eq!(options, wanted);
    let m = &all[1];
    assert_eq!((&*m.root, m.root_deleted(), m.shared), (&b"net:[4026532345]"[..], false, None));

    for (line, field) in [
        ("36 35 98:0 / / rw shared:7 ext4 /dev/root rw\n", "optional fields"),
        ("36 35 98.0 / / rw - ext4 /dev/root rw\n", "major:minor"),
        ("36 35 98:0 / / rw - ext4\n", "filesystem type"),
        ("36 35 98:0 / / rw shared:x - ext4 a rw\n", "shared"),
    ] {
        assert_eq!(mountinfo::parse(line.as_bytes()).unwrap_err().field, field);
    }
}

#[test]
fn child_lists() {
    assert_eq!(children::parse(b"").unwrap(), [0i32; 0]);
    assert_eq!(children::parse(b"12 34 4194304 ").unwrap(), [12, 34, 4194304]);
    assert_eq!(children::parse(b"12\n").unwrap(), [12]);
    assert!(children::parse(b"12,34").is_err());
    assert!(children::parse(b"-1 ").is_err());
    assert!(children::parse(b"2147483648 ").is_err());
}

#[test]
fn file_locks() {
    let text = b"1: POSIX  ADVISORY  WRITE 14256 fe:00:10011195 5 14\n\
        1: -> POSIX  ADVISORY  READ 77 fe:00:10011195 0 EOF\n\
        2: FLOCK  ADVISORY  WRITE 14256 fe:00:10011195 0 EOF\n\
        3: OFDLCK ADVISORY  WRITE -1 103:1f:10011196 3 EOF\n\
        4: LEASE  BREAKING  UNLCK 14256 fe:00:10011197 0 EOF\n\
        5: POSIX  *NOINODE* READ 9 <none>:0 0 9223372036854775807\n\
        5:  -> DELEG  ACTIVE    READ 0 00:2a:1 0 EOF\n";
    let all = locks::parse(text).unwrap();
    let advisory: Box<[u8]> = b"ADVISORY"[..].into();
    let first = Lock {
        id: 1,
        waiting: false,
        kind: LockKind::Posix,
        mode: advisory,
        lock_type: LockType::Write,
        pid: 14256,
        file: Some((0xfe, 0, 10011195)),
        start: 5,
        end: Some(14),
    };
    assert_eq!(all[0], first);
    assert_eq!((all[1].id, all[1].waiting, all[1].end), (1, true, None));
    assert_eq!((&all[2].kind, &all[3].kind, all[3].pid), (&LockKind::Flock, &LockKind::Ofd, -1));
    assert_eq!(all[3].file, Some((0x103, 0x1f, 10011196)));
    assert_eq!(
        (&all[4].kind, &*all[4].mode, &all[4].lock_type),
        (&LockKind::Lease, &b"BREAKING"[..], &LockType::Unlock)
    );
    assert_eq!((all[5].file, all[5].end), (None, Some(i64::MAX as u64)));
    assert_eq!((&all[6].kind, all[6].waiting, all[6].pid), (&LockKind::Deleg, true, 0));
    assert_eq!(locks::parse(b"1: POSIX  ADVISORY  WRITE 1 fe:00:1 5\n").unwrap_err().field, "end");
    assert_eq!(
        locks::parse(b"1: POSIX  ADVISORY  WRITE 1 fe:00 5 6\n").unwrap_err().field,
        "inode"
    );
}

#[test]
fn system_calls() {
    assert_eq!(syscall::parse(b"running\n").unwrap(), Syscall::Running);
    assert_eq!(syscall::parse(b"-1 0x0 0x7f01\n").unwrap(), Syscall::Outside { sp: 0, pc: 0x7f01 });
    let inside = syscall::parse(
        b"230 0x0 0x1 0x2 0x3 0x4 0xffffffffffffffff 0x7fff8086ccb8 0x7f70819882ad\n",
    )
    .unwrap();
    let args = [0, 1, 2, 3, 4, u64::MAX];
    assert_eq!(inside, Syscall::Inside { nr: 230, args, sp: 0x7fff8086ccb8, pc: 0x7f70819882ad });
    assert_eq!(syscall::parse(b"0 0x3 0x4\n").unwrap_err().field, "arguments");
    assert_eq!(syscall::parse(b"-1 0x3 0x4 0x5\n").unwrap_err().field, "program counter");
    assert_eq!(syscall::parse(b"").unwrap_err().field, "number");
}

#[test]
fn links() {
    let check = |text: &str, wanted: FdLink<'_>| {
        assert_eq!(link::classify(text.as_bytes()), wanted, "{text}")
    };
    check("socket:[27731]", FdLink::Socket(27731));
    check("pipe:[1]", FdLink::Pipe(1));
    check("anon_inode:[eventfd]", FdLink::AnonInode(b"eventfd"));
    check("anon_inode:inotify", FdLink::AnonInode(b"inotify"));
    check("anon_inode:seccomp notify", FdLink::AnonInode(b"seccomp notify"));
    check("anon_inode:[io_uring]", FdLink::AnonInode(b"io_uring"));
    check("pidfd:[14258]", FdLink::PidFd(14258));
    check("net:[4026531833]", FdLink::Ns(Ns { kind: NsKind::Net, ino: 4026531833 }));
    check("/memfd:me mo (deleted)", FdLink::Memfd(b"me mo"));
    check("/memfd:x", FdLink::Path(b"/memfd:x"));
    check("/dmabuf:cam", FdLink::DmaBuf(b"cam"));
    check("/tmp/a\nb (deleted)", FdLink::Deleted(b"/tmp/a\nb"));
    check("/dev/pts/0", FdLink::Path(b"/dev/pts/0"));
    check("/", FdLink::Path(b"/"));
    check("(unreachable)/x", FdLink::Unreachable(b"/x"));
    check("socket:[x]", FdLink::Other(b"socket:[x]"));
    check("socket:[1]2", FdLink::Other(b"socket:[1]2"));
    check("frob:[1]", FdLink::Other(b"frob:[1]"));
    check("", FdLink::Other(b""));
    for kind in NsKind::ALL {
        let text = format!("{}:[4026531836]", kind.name());
        assert_eq!(link::parse_ns(text.as_bytes()).unwrap(), Ns { kind, ino: 4026531836 });
    }
    assert!(link::parse_ns(b"pipe:[4]").is_err());
    assert!(link::parse_ns(b"pid:[4").is_err());
}

#[test]
fn single_values() {
    assert_eq!(single::comm(b"a) R 1\n\\(b\t\x80\n").unwrap(), b"a) R 1\n\\(b\t\x80");
    assert!(single::comm(b"cut").is_err());
    assert_eq!(single::personality(b"00040000\n").unwrap(), 0x40000);
    assert_eq!(single::loginuid(b"4294967295").unwrap(), None);
    assert_eq!(single::loginuid(b"1000").unwrap(), Some(1000));
    assert_eq!(single::oom_score_adj(b"-1000\n").unwrap(), -1000);
    assert_eq!(single::timerslack_ns(b"50000\n").unwrap(), 50000);
    assert_eq!(single::coredump_filter(b"00000033\n").unwrap(), 0x33);
    assert_eq!(single::pid_max(b"4194304\n").unwrap(), 4194304);
    assert_eq!(single::sysctl("sys/kernel/ns_last_pid", b"77\n").unwrap(), 77);
    let error = single::sysctl("sys/kernel/ns_last_pid", b"77x\n").unwrap_err();
    assert_eq!(error.file, "sys/kernel/ns_last_pid");
    let (up, idle) = single::uptime(b"1019.17 1964.09\n").unwrap();
    assert_eq!((up, idle), (Duration::from_millis(1019170), Duration::from_millis(1964090)));
    assert!(single::uptime(b"1019.1 1964.09\n").is_err());
    assert!(single::uptime(b"1019.17\n").is_err());
    assert_eq!(single::btime(b"cpu 1 2\nbtime 1795448336\nprocesses 1\n").unwrap(), 1795448336);
    assert!(single::btime(b"cpu 1 2\n").is_err());
    let text = b"processor\t: 0\nvmx flags\t: vnmi\nflags\t\t: fpu vme avx512f\nflags\t\t: other\n";
    assert_eq!(single::cpu_flags(text).unwrap(), [&b"fpu"[..], b"vme", b"avx512f"]);
    assert!(single::cpu_flags(b"processor\t: 0\n").is_err());
}

#[test]
fn namespaces_maps() {
    let text = b"         0          0 4294967295\n";
    assert_eq!(idmap::parse(text).unwrap(), [IdRange { inside: 0, outside: 0, count: u32::MAX }]);
    assert_eq!(idmap::parse(b"").unwrap(), []);
    assert_eq!(idmap::parse(b" 0 1\n").unwrap_err().field, "range");
    assert_eq!((idmap::setgroups(b"allow\n"), idmap::setgroups(b"deny\n")), (Ok(true), Ok(false)));
    assert!(idmap::setgroups(b"maybe\n").is_err());

    let text = b"monotonic           0         0\nboottime           -7 999999999\n";
    let wanted = TimensOffsets {
        monotonic: Offset::default(),
        boottime: Offset { seconds: -7, nanoseconds: 999_999_999 },
    };
    assert_eq!(timens::parse(text).unwrap(), wanted);
    assert_eq!(timens::parse(b"monotonic 0 0\n").unwrap_err().field, "boottime");
    assert_eq!(timens::parse(b"monotonic 0 1000000000\n").unwrap_err().field, "monotonic");
}

#[test]
fn pagemap_entries() {
    let words =
        [pagemap::PRESENT | pagemap::SOFT_DIRTY | 0x1234, pagemap::SWAPPED | 77 << 5 | 3, 0];
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    bytes.push(1);
    let all: Vec<_> = pagemap::entries(&bytes).collect();
    assert_eq!(all.len(), 3);
    assert_eq!((all[0].pfn(), all[0].swap(), all[0].populated()), (Some(0x1234), None, true));
    assert!(
        all[0].has(pagemap::PRESENT | pagemap::SOFT_DIRTY) && !all[0].has(pagemap::FILE_OR_SHARED)
    );
    assert_eq!((all[1].pfn(), all[1].swap(), all[1].populated()), (None, Some((3, 77)), true));
    assert!(!all[2].populated());
}
