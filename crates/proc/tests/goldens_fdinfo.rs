//! `fdinfo` of every kind, texts of Linux 6.18 unless said otherwise.

use rewake_proc::fdinfo::{
    self, BpfMap, BpfProg, EpollItem, EventFd, FanotifyGroup, FanotifyMark, FanotifyTarget, FdInfo,
    FileHandle, InotifyWatch, KernelDev, PidFd, TimerFd,
};
use rewake_proc::locks::LockKind;

/// Parses the common lines and these; hands back a copy with the text leaked, which a test may.
fn with(extra: &str) -> FdInfo<'static> {
    let text = format!("pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1039\n{extra}");
    let text: &'static [u8] = Vec::leak(text.into_bytes());
    fdinfo::parse(text).unwrap()
}

fn error(extra: &str) -> &'static str {
    let text = format!("pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1039\n{extra}");
    fdinfo::parse(text.as_bytes()).unwrap_err().field
}

#[test]
fn common_lines() {
    let info =
        fdinfo::parse(b"pos:\t-5\nflags:\t0100002\nmnt_id:\t27\nino:\t18446744073709551615\n")
            .unwrap();
    assert_eq!((info.pos, info.flags, info.mnt_id, info.ino), (-5, 0o100002, 27, u64::MAX));
    assert!(info.raw.is_empty() && info.locks.is_empty());
    assert_eq!(fdinfo::parse(b"pos:\t0\nflags:\t02\nmnt_id:\t1\n").unwrap_err().field, "ino");
    assert_eq!(fdinfo::parse(b"pos:\t0\nflags:\t09\nmnt_id:\t1\n").unwrap_err().field, "flags");
}

#[test]
fn eventfd() {
    let info = with("eventfd-count:             1234\neventfd-id: 1\neventfd-semaphore: 1\n");
    assert_eq!(info.eventfd, Some(EventFd { count: 0x1234, id: Some(1), semaphore: Some(true) }));
    // Linux 6.1.
    let info = with("eventfd-count: fffffffffffffffe\neventfd-id: -1\n");
    assert_eq!(info.eventfd, Some(EventFd { count: u64::MAX - 1, id: Some(-1), semaphore: None }));
    assert_eq!(error("eventfd-id: 1\n"), "eventfd-count");
}

#[test]
fn epoll() {
    let info = with(
        "tfd:       12 events: 80000019 data:                c  pos:0 ino:40f sdev:10\n\
         tfd:        7 events:        0 data: ffffffffffffffff  pos:-1 ino:3c4a7 sdev:fe00001\n",
    );
    assert_eq!(
        info.epoll,
        [
            EpollItem {
                tfd: 12,
                events: 0x80000019,
                data: 0xc,
                pos: 0,
                ino: 0x40f,
                sdev: KernelDev(0x10)
            },
            EpollItem {
                tfd: 7,
                events: 0,
                data: u64::MAX,
                pos: -1,
                ino: 0x3c4a7,
                sdev: KernelDev(0xfe00001)
            },
        ]
    );
    assert_eq!((info.epoll[1].sdev.major(), info.epoll[1].sdev.minor()), (0xfe, 1));
    assert_eq!(error("tfd: 12 events: 19 data: c\n"), "pos");
}

#[test]
fn signalfd_timerfd_pidfd() {
    assert_eq!(with("sigmask:\t0000000200000200\n").signalfd, Some(0x200000200));
    let text = "clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (9998734, 884550076)\nit_interval: (3, 5)\n";
    let timer = TimerFd {
        clockid: 1,
        ticks: 3,
        settime_flags: 1,
        it_value: (9998734, 884550076),
        it_interval: (3, 5),
    };
    assert_eq!(with(text).timerfd, Some(timer));
    assert_eq!(error("clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (1, 2)\n"), "it_interval");
    assert_eq!(error("clockid: 1\nit_value: (1 2)\n"), "it_value");
    let info = with("Pid:\t14256\nNSpid:\t14256\t12\n");
    assert_eq!(info.pidfd, Some(PidFd { pid: 14256, ns_pids: vec![14256, 12] }));
    assert_eq!(with("Pid:\t-1\nNSpid:\t-1\n").pidfd, Some(PidFd { pid: -1, ns_pids: vec![-1] }));
    assert_eq!(with("Pid:\t0\n").pidfd, Some(PidFd { pid: 0, ns_pids: vec![] }));
}

#[test]
fn inotify() {
    let info = with(
        "inotify wd:2 ino:1 sdev:15 mask:2 ignored_mask:0 fhandle-bytes:c fhandle-type:81 \
         f_handle:010000000000000000000000\ninotify wd:1f ino:3c4a7 sdev:fe00000 mask:fff ignored_mask:0 \n",
    );
    let bytes = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        info.inotify,
        [
            InotifyWatch {
                wd: 2,
                ino: 1,
                sdev: KernelDev(0x15),
                mask: 2,
                ignored_mask: 0,
                handle: Some(FileHandle { handle_type: 0x81, bytes: bytes.into() }),
            },
            InotifyWatch {
                wd: 0x1f,
                ino: 0x3c4a7,
                sdev: KernelDev(0xfe00000),
                mask: 0xfff,
                ignored_mask: 0,
                handle: None,
            },
        ]
    );
    let line = "inotify wd:2 ino:1 sdev:15 mask:2 ignored_mask:0 fhandle-bytes:";
    assert_eq!(error(&format!("{line}3 fhandle-type:1 f_handle:0102\n")), "fhandle-bytes");
    assert_eq!(error(&format!("{line}2 fhandle-type:1 f_handle:01020\n")), "f_handle");
    assert_eq!(error(&format!("{line}2 f_handle:0102\n")), "fhandle-type");
    assert_eq!(error("inotify wd:2 ino:1 sdev:15\n"), "mask");
}

#[test]
fn fanotify() {
    let info = with(
        "fanotify flags:20 event-flags:8000\n\
         fanotify sdev:fe00000 mflags:0 mask:2 ignored_mask:0\n\
         fanotify mnt_id:1b mflags:40 mask:40000002 ignored_mask:8\n\
         fanotify ino:3c4a7 sdev:fe00000 mflags:0 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
         f_handle:a7c4030000000000\n\
         fanotify mnt_ns:4026531832 mflags:0 mask:1000000 ignored_mask:0\n",
    );
    assert_eq!(info.fanotify, Some(FanotifyGroup { flags: 0x20, event_flags: 0x8000 }));
    let handle = FileHandle { handle_type: 1, bytes: [0xa7, 0xc4, 3, 0, 0, 0, 0, 0].into() };
    let sdev = KernelDev(0xfe00000);
    let inode = FanotifyTarget::Inode { ino: 0x3c4a7, sdev, handle: Some(handle) };
    let mark =
        |target, mflags, mask, ignored_mask| FanotifyMark { target, mflags, mask, ignored_mask };
    let wanted = [
        mark(FanotifyTarget::SuperBlock(sdev), 0, 2, 0),
        mark(FanotifyTarget::Mount(0x1b), 0x40, 0x40000002, 8),
        mark(inode, 0, 2, 0),
        mark(FanotifyTarget::MountNamespace(4026531832), 0, 0x1000000, 0),
    ];
    assert_eq!(info.fanotify_marks, wanted);
    assert_eq!(error("fanotify mflags:0 mask:2 ignored_mask:0\n"), "fanotify mark");
}

#[test]
fn numbers_of_other_kinds() {
    assert_eq!(with("tty-index:\t0\n").tty_index, Some(0));
    assert_eq!(with("scm_fds: 2\n").scm_fds, Some(2));
    assert_eq!(with("iff:\ttq0\n").tun_iff, Some(&b"tq0"[..]));
    let map = with(
        "map_type:\t2\nkey_size:\t4\nvalue_size:\t8\nmax_entries:\t16\nmap_flags:\t0x400\nmap_extra:\t0x0\n\
         memlock:\t440\nmap_id:\t25\nfrozen:\t1\nowner_prog_type:\t3\n",
    );
    assert_eq!(
        map.bpf_map,
        Some(BpfMap {
            map_type: 2,
            key_size: 4,
            value_size: 8,
            max_entries: 16,
            map_flags: 0x400,
            map_extra: Some(0),
            memlock: Some(440),
            map_id: Some(25),
            frozen: Some(true),
        })
    );
    assert_eq!((map.bpf_prog, &map.raw[..]), (None, &[&b"owner_prog_type:\t3"[..]][..]));
    let prog = with(
        "prog_type:\t1\nprog_jited:\t1\nprog_tag:\ta04f5eef06a7f555\nmemlock:\t4096\nprog_id:\t9\n",
    );
    let wanted = BpfProg {
        prog_type: 1,
        jited: Some(true),
        tag: Some(0xa04f5eef06a7f555),
        memlock: Some(4096),
        prog_id: Some(9),
    };
    assert_eq!((prog.bpf_prog, prog.bpf_map), (Some(wanted), None));
    assert_eq!(error("map_type:\t2\nkey_size:\t4\n"), "value_size");
}

#[test]
fn locks_and_lines_of_other_drivers() {
    let info = with(
        "lock:\t1: FLOCK  ADVISORY  WRITE 14256 fe:00:10011195 0 EOF\n\
         lock:\t2: POSIX  ADVISORY  WRITE 14256 fe:00:10011195 5 14\n",
    );
    assert_eq!((&info.locks[0].kind, &info.locks[1].kind), (&LockKind::Flock, &LockKind::Posix));
    assert_eq!((info.locks[1].start, info.locks[1].end), (5, Some(14)));
    assert_eq!(error("lock:\t1: FLOCK\n"), "mode");

    // Lines of a driver that look like those of another kind stay raw.
    let lines = [
        "SqMask:\t0x3",
        "PollList:",
        "  op=6, task_works=0",
        "memlock:\t4",
        "ticks: x",
        "pos:\tstart",
        "no colon",
    ];
    let info = with(&lines.map(|l| format!("{l}\n")).concat());
    assert_eq!(info.raw, lines.map(str::as_bytes));
    assert_eq!((info.pos, info.timerfd, info.bpf_map), (0, None, None));
}
