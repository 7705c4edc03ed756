//! Texts of several kernels and odd cases, with the values they must give.
//!
//! `data/*-6.18` are real (a `sleep` under Linux 6.18); `data/*-6.1` are written by hand in the form of Linux 6.1.

use std::borrow::Cow;

use rewake_proc::maps::{self, Map, MapName};
use rewake_proc::smaps::{self, Smap, Want};
use rewake_proc::stat::{self, TaskState};
use rewake_proc::status::{self, Ids};
use rewake_proc::vmflags::VmFlags;
use rewake_proc::{Fault, ParseError};

fn all_maps(text: &[u8]) -> Vec<Map<'_>> {
    maps::parse(text).collect::<Result<_, _>>().unwrap()
}

#[test]
fn stat_of_a_plain_process() {
    let text = b"5091 (cat) R 5089 5088 3013 34816 5089 4194304 101 2 3 4 5 6 -7 -8 20 -5 1 0 101913 3133440 418 \
        18446744073709551615 94248308293632 94248308313513 140721385339488 11 12 13 14 15 16 1 0 0 17 1 99 2 21 22 -23 \
        94248308329520 94248308331136 94248447979520 140721385343696 140721385343734 140721385343735 140721385345003 \
        768\n";
    let s = stat::parse(text).unwrap();
    assert_eq!((s.pid, &*s.comm, s.state), (5091, &b"cat"[..], TaskState::Running));
    assert_eq!((s.ppid, s.pgrp, s.session, s.tty_nr, s.tpgid), (5089, 5088, 3013, 34816, 5089));
    assert_eq!(s.tty(), Some((136, 0)));
    assert_eq!((s.flags, s.minflt, s.cminflt, s.majflt, s.cmajflt), (4194304, 101, 2, 3, 4));
    assert_eq!((s.utime, s.stime, s.cutime, s.cstime), (5, 6, -7, -8));
    assert_eq!((s.priority, s.nice, s.num_threads, s.starttime), (20, -5, 1, 101913));
    assert_eq!((s.vsize, s.rss, s.rsslim), (3133440, 418, u64::MAX));
    assert_eq!(
        (s.start_code, s.end_code, s.start_stack),
        (94248308293632, 94248308313513, 140721385339488)
    );
    assert_eq!((s.kstkesp, s.kstkeip), (11, 12));
    assert_eq!((s.signal, s.blocked, s.sigignore, s.sigcatch, s.wchan), (13, 14, 15, 16, 1));
    assert_eq!((s.exit_signal, s.processor, s.rt_priority, s.policy), (17, 1, 99, 2));
    assert_eq!((s.delayacct_blkio_ticks, s.guest_time, s.cguest_time), (21, 22, -23));
    assert_eq!(
        (s.start_data, s.end_data, s.start_brk),
        (94248308329520, 94248308331136, 94248447979520)
    );
    assert_eq!((s.arg_start, s.arg_end), (140721385343696, 140721385343734));
    assert_eq!((s.env_start, s.env_end, s.exit_code), (140721385343735, 140721385345003, 768));
}

#[test]
fn stat_with_hostile_names() {
    let tail = b" Z 14256 14252 3013 0 -1 4227148 236 0 0 0 0 0 0 0 20 0 1 0 126514 0 0 18446744073709551615 0 0 0 0 0 0 0 \
        16781312 2 1 0 0 -1 0 0 0 0 0 0 0 0 0 0 0 0 0 768\n";
    for name in [&b"a) R 1 (b"[..], b"a) R 1\n\\(b\t\x80", b")", b"", b"((", b") Z 1 2 3"] {
        let text = [b"14297 (", name, b")", tail].concat();
        let s = stat::parse(&text).unwrap();
        assert_eq!((&*s.comm, s.state, s.ppid), (name, TaskState::Zombie, 14256));
        assert_eq!((s.exit_signal, s.exit_code, s.tty()), (-1, 768, None));
    }
}

#[test]
fn a_process_has_ended_when_its_last_thread_has() {
    let ended = |state: &str, threads: u32| {
        let text = format!(
            "1 (main) {state} 2 1 1 0 -1 4227084 1 2 3 4 5 6 7 8 20 0 {threads} 0 1 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 \
             0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 51200"
        );
        stat::parse(text.as_bytes()).unwrap().has_ended()
    };
    assert!(ended("Z", 1) && ended("Z", 0) && ended("X", 0));
    assert!(!ended("Z", 2) && !ended("S", 1) && !ended("T", 2));
}

#[test]
fn stat_errors_name_the_field() {
    let field = |text: &[u8]| stat::parse(text).map(|_| ()).unwrap_err();
    assert_eq!(field(b"").field, "pid");
    assert_eq!(field(b"1 cat R").field, "comm");
    assert_eq!(field(b"1 (cat)").field, "state");
    let cut = field(b"1 (cat) R 1 2\n");
    assert_eq!((cut.field, cut.fault), ("session", Fault::Missing));
    let odd = field(b"1 (cat) R 1 2x 3");
    assert_eq!((odd.field, odd.fault), ("pgrp", Fault::Malformed));
    assert_eq!(odd.to_string(), "stat: field pgrp is malformed in line 1: \"1 (cat) R 1 2x 3\"");
    // One number too large for its field.
    assert_eq!(field(b"1 (cat) R 2147483648 2 3").field, "ppid");
}

#[test]
fn status_of_6_18() {
    let s = status::parse(include_bytes!("data/status-6.18")).unwrap();
    assert_eq!((&*s.name, s.umask, s.state), (&b"sleep"[..], Some(0o22), TaskState::Sleeping));
    assert_eq!((s.kthread, s.untag_mask), (Some(false), Some(u64::MAX)));
    assert_eq!((s.tgid, s.ns_pid.as_deref()), (s.pid, Some(&[s.pid][..])));
    assert_eq!((&s.groups[..], s.seccomp, s.seccomp_filters), (&[0u32; 0][..], Some(0), Some(0)));
    assert_eq!((s.cap_eff, s.cap_amb, s.no_new_privs), (0x1fffeffffff, 0, false));
    assert_eq!((s.cpus_allowed.as_deref(), s.threads), (Some(&[3u64][..]), 1));
    assert_eq!(s.shadow_stack, None);
}

#[test]
fn status_of_6_1() {
    let s = status::parse(include_bytes!("data/status-6.1")).unwrap();
    assert_eq!(
        (s.umask, s.ngid, s.tgid, s.pid, s.ppid, s.tracer_pid),
        (Some(0o77), Some(3), 812, 812, 790, 0)
    );
    assert_eq!(s.uid, Ids { real: 105, effective: 105, saved: 105, fs: 105 });
    assert_eq!(s.gid, Ids { real: 113, effective: 113, saved: 113, fs: 113 });
    assert_eq!((s.fd_size, &s.groups[..]), (64, &[112, 113][..]));
    for ids in [&s.ns_tgid, &s.ns_pid, &s.ns_pgid, &s.ns_sid] {
        assert_eq!(ids.as_deref(), Some(&[812, 12][..]));
    }
    assert_eq!((s.kthread, s.untag_mask), (None, None));
    assert_eq!((s.vm_size, s.vm_lck, s.vm_pin, s.vm_rss), kib([218620, 128, 0, 29508]));
    assert_eq!((s.rss_anon, s.rss_file, s.rss_shmem, s.vm_pte), kib([2072, 23320, 4116, 132]));
    assert_eq!((s.vm_swap, s.hugetlb_pages), (Some(4096), Some(2 << 20)));
    assert_eq!(
        (s.core_dumping, s.thp_enabled, s.threads, s.sigq),
        (Some(false), Some(false), 1, Some((0, 31518)))
    );
    assert_eq!(
        (s.sig_pnd, s.shd_pnd, s.sig_blk, s.sig_ign, s.sig_cgt),
        (0, 0, 0, 0x1301800, 0x180016a00)
    );
    assert_eq!(
        (s.cap_inh, s.cap_prm, s.cap_eff, s.cap_bnd, s.cap_amb),
        (0, 0, 0, 0x1ffffffffff, 0x400)
    );
    assert_eq!((s.no_new_privs, s.seccomp, s.seccomp_filters), (true, Some(2), Some(17)));
    // f,00000000,00000003: CPUs 0, 1 and 64 to 67.
    assert_eq!(s.cpus_allowed.as_deref(), Some(&[3, 0xf][..]));
    assert_eq!(s.mems_allowed.as_deref(), Some(&[1][..]));
}

type Kib = (Option<u64>, Option<u64>, Option<u64>, Option<u64>);

fn kib([a, b, c, d]: [u64; 4]) -> Kib {
    (Some(a << 10), Some(b << 10), Some(c << 10), Some(d << 10))
}

#[test]
fn status_of_zombies_kernel_threads_and_odd_names() {
    let full = String::from_utf8(include_bytes!("data/status-6.18").to_vec()).unwrap();
    let keep = |line: &&str| {
        !(line.starts_with("Vm") || line.starts_with("Rss") || line.starts_with("Umask"))
    };
    let zombie: String = full.lines().filter(keep).flat_map(|l| [l, "\n"]).collect();
    let zombie = zombie
        .replace("S (sleeping)", "Z (zombie)")
        .replace("Name:\tsleep", "Name:\ta) R 1\\n\\\\(b\t\t");
    let s = status::parse(zombie.as_bytes()).unwrap();
    assert_eq!((&*s.name, s.state), (&b"a) R 1\n\\(b\t\t"[..], TaskState::Zombie));
    assert_eq!((s.umask, s.vm_rss, s.vm_lck), (None, None, None));

    let shadow = full.replace(
        "untag_mask",
        "x86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\nuntag_mask",
    );
    let s = status::parse(shadow.as_bytes()).unwrap();
    assert!(s.shadow_stack.is_some_and(|f| f.shstk && f.wrss));
    assert!(s.shadow_stack_locked.is_some_and(|f| !f.shstk && !f.wrss));

    // A name is empty, and colons in it do not make it another line.
    let s = status::parse(full.replace("Name:\tsleep", "Name:\t").as_bytes()).unwrap();
    assert_eq!(&*s.name, b"");
    let s = status::parse(full.replace("Name:\tsleep", "Name:\tPid:\t1").as_bytes()).unwrap();
    assert_eq!((&*s.name, s.pid != 1), (&b"Pid:\t1"[..], true));
}

#[test]
fn status_refuses_what_is_missing_or_malformed() {
    let full = String::from_utf8(include_bytes!("data/status-6.18").to_vec()).unwrap();
    for key in [
        "Name",
        "State",
        "Tgid",
        "Pid",
        "PPid",
        "TracerPid",
        "Uid",
        "Gid",
        "FDSize",
        "Groups",
        "Threads",
    ] {
        let cut: String = full
            .lines()
            .filter(|l| l.split(':').next() != Some(key))
            .flat_map(|l| [l, "\n"])
            .collect();
        let error = status::parse(cut.as_bytes()).unwrap_err();
        assert_eq!((error.field, error.fault), (key, Fault::Missing));
    }
    for key in ["SigPnd", "SigCgt", "CapAmb", "NoNewPrivs"] {
        let cut: String = full
            .lines()
            .filter(|l| l.split(':').next() != Some(key))
            .flat_map(|l| [l, "\n"])
            .collect();
        assert_eq!(status::parse(cut.as_bytes()).unwrap_err().field, key);
    }
    let broken = full.replace("Threads:\t1", "Threads:\tmany");
    let error = status::parse(broken.as_bytes()).unwrap_err();
    assert_eq!(
        (error.field, error.fault, error.excerpt.as_str()),
        ("Threads", Fault::Malformed, "Threads:\\tmany")
    );
    assert_eq!(full.lines().nth(error.line - 1).map(|l| l.starts_with("Threads")), Some(true));
    assert_eq!(
        status::parse(full.replace("NoNewPrivs:\t0", "NoNewPrivs:\t2").as_bytes())
            .unwrap_err()
            .field,
        "NoNewPrivs"
    );
}

#[test]
fn maps_of_6_18() {
    let text = include_bytes!("data/maps-6.18");
    let all = all_maps(text);
    assert_eq!(all.len(), text.iter().filter(|b| **b == b'\n').count());
    assert!(all.windows(2).all(|w| w[0].end <= w[1].start));
    for wanted in [
        MapName::Heap,
        MapName::Stack,
        MapName::Vdso,
        MapName::Vvar,
        MapName::VvarVclock,
        MapName::Vsyscall,
    ] {
        assert_eq!(all.iter().filter(|m| m.name() == wanted).count(), 1, "{wanted:?}");
    }
    let exe = all.iter().find(|m| m.exec && m.ino != 0).unwrap();
    assert_eq!(
        (exe.read, exe.write, exe.shared, exe.dev_major, exe.dev_minor),
        (true, false, false, 0xfe, 0)
    );
    assert!(matches!(exe.path(), Some(Cow::Borrowed(b"/usr/bin/sleep"))), "{:?}", exe.path());
    assert_eq!(exe.name(), MapName::File);
    let gate = all.last().unwrap();
    assert_eq!(
        (gate.start, gate.end, gate.read, gate.exec),
        (0xffffffffff600000, 0xffffffffff601000, false, true)
    );
}

#[test]
fn every_name_of_a_mapping() {
    let named =
        |name: &str| format!("7f2ccc699000-7f2ccc69b000 rw-s 00002000 103:1f 98765 {name}\n");
    let check = |name: &str, wanted: MapName<'_>, path: Option<&[u8]>, deleted: bool| {
        let text = named(name);
        let [map] = all_maps(text.as_bytes())[..] else { panic!("{name}") };
        assert_eq!((map.start, map.len(), map.pgoff), (0x7f2ccc699000, 0x2000, 0x2000));
        assert_eq!((map.dev_major, map.dev_minor, map.ino), (0x103, 0x1f, 98765));
        assert_eq!((map.read, map.write, map.exec, map.shared), (true, true, false, true));
        assert_eq!(
            (map.name(), map.path().as_deref(), map.deleted()),
            (wanted, path, deleted),
            "{name}"
        );
    };
    check("", MapName::None, None, false);
    check("                  ", MapName::None, None, false);
    check("[anon:my name: x]", MapName::Anon(b"my name: x"), None, false);
    check("[anon_shmem:shn]", MapName::AnonShmem(b"shn"), None, false);
    check("[uprobes]", MapName::Uprobes, None, false);
    check("[sigpage]", MapName::Special(b"sigpage"), None, false);
    check("[anon:x (deleted)]", MapName::Anon(b"x (deleted)"), None, false);
    check("//anon", MapName::SlashAnon, Some(b"//anon"), false);
    check("/dev/zero (deleted)", MapName::SharedAnon, Some(b"/dev/zero"), true);
    check("/dev/zero", MapName::File, Some(b"/dev/zero"), false);
    check("/SYSV0052e2c1 (deleted)", MapName::SysV(0x52e2c1), Some(b"/SYSV0052e2c1"), true);
    check("/SYSV0052e2c (deleted)", MapName::File, Some(b"/SYSV0052e2c"), true);
    check("/memfd:me mo (deleted)", MapName::Memfd(b"me mo"), Some(b"/memfd:me mo"), true);
    check("/memfd: (deleted)", MapName::Memfd(b""), Some(b"/memfd:"), true);
    check("/anon_hugepage (deleted)", MapName::AnonHugepage, Some(b"/anon_hugepage"), true);
    check("/[aio] (deleted)", MapName::Aio, Some(b"/[aio]"), true);
    check("anon_inode:[perf_event]", MapName::File, Some(b"anon_inode:[perf_event]"), false);
    check("        /tmp/a\\012b\\012 (deleted)", MapName::File, Some(b"/tmp/a\nb\n"), true);
    check("/tmp/c\\040d\\ e", MapName::File, Some(b"/tmp/c\\040d\\ e"), false);
    check("/tmp/x (deleted) (deleted)", MapName::File, Some(b"/tmp/x (deleted)"), true);
}

#[test]
fn maps_errors_name_line_and_field() {
    let good = "1000-2000 r--p 00000000 00:00 0 \n";
    let check = |line: &str, field: &str| {
        let text = format!("{good}{line}");
        let results: Vec<_> = maps::parse(text.as_bytes()).collect();
        assert_eq!(results.len(), 2, "the iterator ends after an error");
        let error = results[1].clone().unwrap_err();
        assert_eq!((error.field, error.line, error.file), (field, 2, "maps"), "{line}");
    };
    check("2000-1000 r--p 00000000 00:00 0 \n", "address");
    check("2000-2000 r--p 00000000 00:00 0 \n", "address");
    check("10000000000000000-20000000000000000 r--p 00000000 00:00 0 \n", "address");
    check("x000-3000 r--p 00000000 00:00 0 \n", "address");
    check("2000-3000 r-p 00000000 00:00 0 \n", "perms");
    check("2000-3000 r--q 00000000 00:00 0 \n", "perms");
    check("2000-3000 r--p  00:00 0 \n", "offset");
    check("2000-3000 r--p 0 00;00 0 \n", "dev");
    check("2000-3000 r--p 0 100000000:00 0 \n", "dev");
    check("2000-3000 r--p 0 00:00 /a\n", "inode");
    check("2000-3000 r--p 0 00:00 0/a\n", "inode");
    check("2000-3000 r--p 0 00:00 0 /cut/of", "pathname");
    check("\n", "address");
    assert_eq!(maps::parse(b"").count(), 0);
}

fn all_smaps(text: &[u8], want: Want) -> Vec<Smap<'_>> {
    smaps::parse(text, want).collect::<Result<_, _>>().unwrap()
}

#[test]
fn smaps_of_6_18() {
    let text = include_bytes!("data/smaps-6.18");
    let all = all_smaps(text, Want::FLAGS);
    assert_eq!(all.len(), all_maps(include_bytes!("data/maps-6.18")).len());
    for vma in &all {
        assert_eq!(vma.map.read, vma.flags.contains(VmFlags::READ));
        assert_eq!(vma.map.write, vma.flags.contains(VmFlags::WRITE));
        assert_eq!(vma.map.exec, vma.flags.contains(VmFlags::EXEC));
        assert_eq!(vma.flags.contains(VmFlags::GROWSDOWN), vma.map.name() == MapName::Stack);
        assert_eq!((vma.unknown_flags().count(), vma.flags.contains(VmFlags::UNKNOWN)), (0, false));
        assert_eq!(vma.values, Default::default());
    }
    let vdso = all.iter().find(|v| v.map.name() == MapName::Vdso).unwrap();
    assert_eq!(vdso.flags.to_string(), "rd ex mr mw me de");
    for vma in all_smaps(text, Want::ALL) {
        let values = vma.values;
        assert_eq!((values.kernel_page_size, values.protection_key), (Some(4096), None));
        assert!(values.rss.unwrap() <= vma.map.len() && values.pss <= values.rss);
        assert_eq!(
            (values.anon_huge_pages, values.swap, values.locked),
            (Some(0), Some(0), Some(0))
        );
    }
}

#[test]
fn smaps_of_6_1_with_values_that_shift_the_text() {
    let text = include_bytes!("data/smaps-6.1");
    // The same twice over, so that the remembered distance is right, wrong, wrong and wrong again.
    let text = [&text[..], text].concat();
    let all = all_smaps(&text, Want::ALL);
    assert_eq!(all.len(), 4);
    for pair in all.chunks(2) {
        let [huge, heap] = pair else { unreachable!() };
        assert_eq!((huge.map.name(), huge.map.ino), (MapName::AnonHugepage, 4242));
        assert_eq!(huge.flags.to_string(), "rd wr mr mw me de ht sd");
        assert_eq!(huge.values.kernel_page_size, Some(2 << 20));
        assert_eq!(huge.values.protection_key, Some(0));
        assert_eq!(heap.map.name(), MapName::Anon(b"glibc: malloc"));
        assert_eq!(heap.values.rss, Some(100 << 30));
        assert_eq!(heap.values.pss, Some(100 << 30));
        assert_eq!(heap.values.anon_huge_pages, Some(4 << 20));
        assert_eq!((heap.values.swap, heap.values.locked), (Some(16 << 10), Some(8 << 10)));
        assert_eq!(heap.values.protection_key, Some(11));
        let wanted =
            VmFlags::LOCKONFAULT | VmFlags::DONTDUMP | VmFlags::WIPEONFORK | VmFlags::HUGEPAGE;
        assert!(heap.flags.contains(wanted | VmFlags::UNKNOWN));
        assert_eq!(heap.unknown_flags().collect::<Vec<_>>(), [&b"zz"[..], b"???"]);
    }
    let some = all_smaps(&text, Want { swap: true, ..Want::FLAGS });
    assert_eq!((some[1].values.swap, some[1].values.rss), (Some(16 << 10), None));
}

#[test]
fn smaps_never_takes_the_flags_of_the_next_vma() {
    let text = String::from_utf8(include_bytes!("data/smaps-6.1").to_vec()).unwrap();
    let cut = text.replacen("VmFlags: rd wr mr mw me de ht sd \n", "", 1);
    let results: Vec<_> = smaps::parse(cut.as_bytes(), Want::FLAGS).collect();
    assert!(
        matches!(&results[..], [Err(ParseError { field: "VmFlags", line: 1, .. })]),
        "{results:?}"
    );
    let cut = text.replace("VmFlags: rd wr mr mw me lo", "VmFlogs: rd wr mr mw me lo");
    let last = smaps::parse(cut.as_bytes(), Want::FLAGS).last().unwrap().unwrap_err();
    assert_eq!((last.field, last.line), ("VmFlags", 26));
}
