//! The parsers and the procfs crate must agree on the texts of all live processes. Both parse the same bytes, read
//! once, so that nothing can change in between.

use procfs::process::{LimitValue, Limits, MMapPath, MemoryMaps, MountInfos, MountOptFields};
use procfs::{FromBufRead, FromRead, ProcessCGroups};
use rewake_proc::maps::MapName;
use rewake_proc::read::{ProcDir, ProcRoot};
use rewake_proc::smaps::Want;
use rewake_proc::{cgroup, limits, maps, mountinfo, smaps, stat, status};

/// Runs the check over this process and all others; one that ends meanwhile or may not be read is passed over, but a
/// handful must remain.
fn over_all(file: &str, mut check: impl FnMut(i32, &[u8])) {
    let root = ProcRoot::open().unwrap();
    let mut buffer = Vec::new();
    let own = std::process::id() as i32;
    check(own, root.pid(own).unwrap().read(file, &mut buffer).unwrap());
    let mut checked = 0;
    for pid in root.pids().unwrap() {
        let dir: ProcDir = match root.pid(pid) {
            Ok(dir) => dir,
            Err(error) if error.is_gone() => continue,
            Err(error) => panic!("{error}"),
        };
        if let Ok(text) = dir.read(file, &mut buffer) {
            check(pid, text);
            checked += 1;
        }
    }
    assert!(checked >= 1, "no process could be read");
}

#[test]
fn stat_agrees() {
    over_all("stat", |pid, text| {
        let ours = stat::parse(text).unwrap();
        assert_eq!(ours.pid, pid);
        // The oracle wants UTF-8 names.
        let Ok(theirs) = procfs::process::Stat::from_read(text) else { return };
        assert_eq!(ours.comm[..], *theirs.comm.as_bytes());
        let state = char::from(text[text.iter().rposition(|b| *b == b')').unwrap() + 2]);
        assert_eq!(state, theirs.state);
        assert_eq!(
            (ours.ppid, ours.pgrp, ours.session),
            (theirs.ppid, theirs.pgrp, theirs.session)
        );
        assert_eq!(
            (ours.tty_nr, ours.tpgid, ours.flags),
            (theirs.tty_nr, theirs.tpgid, theirs.flags)
        );
        assert_eq!((ours.minflt, ours.cminflt), (theirs.minflt, theirs.cminflt));
        assert_eq!((ours.majflt, ours.cmajflt), (theirs.majflt, theirs.cmajflt));
        assert_eq!(
            (ours.utime, ours.stime, ours.cutime, ours.cstime),
            (theirs.utime, theirs.stime, theirs.cutime, theirs.cstime)
        );
        assert_eq!((ours.priority, ours.nice), (theirs.priority, theirs.nice));
        assert_eq!(
            (i64::from(ours.num_threads), ours.starttime),
            (theirs.num_threads, theirs.starttime)
        );
        assert_eq!((ours.vsize, ours.rss, ours.rsslim), (theirs.vsize, theirs.rss, theirs.rsslim));
        assert_eq!((ours.start_code, ours.end_code), (theirs.startcode, theirs.endcode));
        assert_eq!(ours.start_stack, theirs.startstack);
        assert_eq!((ours.kstkesp, ours.kstkeip), (theirs.kstkesp, theirs.kstkeip));
        assert_eq!((ours.signal, ours.blocked), (theirs.signal, theirs.blocked));
        assert_eq!(
            (ours.sigignore, ours.sigcatch, ours.wchan),
            (theirs.sigignore, theirs.sigcatch, theirs.wchan)
        );
        assert_eq!(Some(ours.exit_signal), theirs.exit_signal);
        assert_eq!(Some(ours.processor as i32), theirs.processor);
        assert_eq!(
            (Some(ours.rt_priority), Some(ours.policy)),
            (theirs.rt_priority, theirs.policy)
        );
        assert_eq!(Some(ours.delayacct_blkio_ticks), theirs.delayacct_blkio_ticks);
        assert_eq!(
            (Some(ours.guest_time), Some(ours.cguest_time)),
            (theirs.guest_time, theirs.cguest_time)
        );
        assert_eq!(
            (Some(ours.start_data), Some(ours.end_data)),
            (theirs.start_data, theirs.end_data)
        );
        assert_eq!(Some(ours.start_brk), theirs.start_brk);
        assert_eq!((Some(ours.arg_start), Some(ours.arg_end)), (theirs.arg_start, theirs.arg_end));
        assert_eq!((Some(ours.env_start), Some(ours.env_end)), (theirs.env_start, theirs.env_end));
        assert_eq!(Some(ours.exit_code), theirs.exit_code);
    });
}

#[test]
fn status_agrees() {
    let kib = |theirs: Option<u64>| theirs.map(|k| k * 1024);
    over_all("status", |pid, text| {
        let ours = status::parse(text).unwrap();
        assert_eq!(ours.pid, pid);
        let Ok(theirs) = procfs::process::Status::from_buf_read(text) else { return };
        // The oracle splits lines at each colon and does not undo escapes.
        if !ours.name.contains(&b':') && !ours.name.contains(&b'\n') && !ours.name.contains(&b'\\')
        {
            assert_eq!(*ours.name.trim_ascii(), *theirs.name.as_bytes());
        }
        assert_eq!(ours.umask, theirs.umask);
        assert_eq!(
            (ours.tgid, ours.ngid, ours.pid, ours.ppid),
            (theirs.tgid, theirs.ngid, theirs.pid, theirs.ppid)
        );
        assert_eq!(ours.tracer_pid, theirs.tracerpid);
        let (u, g) = (ours.uid, ours.gid);
        assert_eq!(
            [u.real, u.effective, u.saved, u.fs],
            [theirs.ruid, theirs.euid, theirs.suid, theirs.fuid]
        );
        assert_eq!(
            [g.real, g.effective, g.saved, g.fs],
            [theirs.rgid, theirs.egid, theirs.sgid, theirs.fgid]
        );
        assert_eq!((ours.fd_size, ours.groups), (u64::from(theirs.fdsize), theirs.groups));
        assert_eq!((ours.ns_tgid, ours.ns_pid), (theirs.nstgid, theirs.nspid));
        assert_eq!((ours.ns_pgid, ours.ns_sid), (theirs.nspgid, theirs.nssid));
        assert_eq!((ours.vm_size, ours.vm_lck), (kib(theirs.vmsize), kib(theirs.vmlck)));
        assert_eq!((ours.vm_pin, ours.vm_rss), (kib(theirs.vmpin), kib(theirs.vmrss)));
        assert_eq!((ours.rss_anon, ours.rss_file), (kib(theirs.rssanon), kib(theirs.rssfile)));
        assert_eq!((ours.rss_shmem, ours.vm_pte), (kib(theirs.rssshmem), kib(theirs.vmpte)));
        assert_eq!(
            (ours.vm_swap, ours.hugetlb_pages),
            (kib(theirs.vmswap), kib(theirs.hugetlbpages))
        );
        assert_eq!(
            (ours.core_dumping, ours.thp_enabled),
            (theirs.core_dumping, theirs.thp_enabled)
        );
        assert_eq!((u64::from(ours.threads), ours.sigq), (theirs.threads, Some(theirs.sigq)));
        assert_eq!(
            (ours.sig_pnd, ours.shd_pnd, ours.sig_blk),
            (theirs.sigpnd, theirs.shdpnd, theirs.sigblk)
        );
        assert_eq!((ours.sig_ign, ours.sig_cgt), (theirs.sigign, theirs.sigcgt));
        assert_eq!(
            (ours.cap_inh, ours.cap_prm, ours.cap_eff),
            (theirs.capinh, theirs.capprm, theirs.capeff)
        );
        assert_eq!((Some(ours.cap_bnd), Some(ours.cap_amb)), (theirs.capbnd, theirs.capamb));
        assert_eq!(
            (Some(u64::from(ours.no_new_privs)), ours.seccomp),
            (theirs.nonewprivs, theirs.seccomp)
        );
    });
}

/// Compares a header line with the oracle's.
fn same(ours: &maps::Map<'_>, theirs: &procfs::process::MemoryMap) {
    use procfs::process::MMPermissions as P;
    assert_eq!(((ours.start, ours.end), ours.pgoff), (theirs.address, theirs.offset));
    assert_eq!((ours.dev_major as i32, ours.dev_minor as i32), theirs.dev);
    assert_eq!(ours.ino, theirs.inode);
    let perms = [
        (ours.read, P::READ),
        (ours.write, P::WRITE),
        (ours.exec, P::EXECUTE),
        (ours.shared, P::SHARED),
    ];
    assert!(perms.iter().all(|(bit, flag)| *bit == theirs.perms.contains(*flag)));
    match (ours.name(), &theirs.pathname) {
        (MapName::None, MMapPath::Anonymous)
        | (MapName::Heap, MMapPath::Heap)
        | (MapName::Stack, MMapPath::Stack)
        | (MapName::Vdso, MMapPath::Vdso)
        | (MapName::Vvar, MMapPath::Vvar)
        | (MapName::Vsyscall, MMapPath::Vsyscall) => {}
        (MapName::SysV(key), MMapPath::Vsys(other)) => assert_eq!(key as i32, *other),
        (_, MMapPath::Path(path)) => assert_eq!(ours.raw_name, path.as_os_str().as_encoded_bytes()),
        (_, MMapPath::Other(name)) => {
            let inner = ours.raw_name.strip_prefix(b"[").and_then(|n| n.strip_suffix(b"]"));
            assert_eq!(inner.unwrap_or(ours.raw_name), name.trim_matches(['[', ']']).as_bytes());
        }
        (ours, theirs) => panic!("{ours:?} is not {theirs:?}"),
    }
}

#[test]
fn maps_agree() {
    over_all("maps", |_, text| {
        let ours: Vec<_> = maps::parse(text).collect::<Result<_, _>>().unwrap();
        let Ok(theirs) = MemoryMaps::from_buf_read(text) else { return };
        assert_eq!(ours.len(), theirs.len());
        ours.iter().zip(&theirs).for_each(|(ours, theirs)| same(ours, theirs));
    });
}

#[test]
fn smaps_agree() {
    over_all("smaps", |_, text| {
        let ours: Vec<_> = smaps::parse(text, Want::ALL).collect::<Result<_, _>>().unwrap();
        let Ok(theirs) = MemoryMaps::from_buf_read(text) else { return };
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            same(&ours.map, theirs);
            let value = |key| theirs.extension.map.get(key).copied();
            let values = ours.values;
            assert_eq!((values.rss, values.pss), (value("Rss"), value("Pss")));
            assert_eq!((values.swap, values.locked), (value("Swap"), value("Locked")));
            assert_eq!(values.shared_clean, value("Shared_Clean"));
            assert_eq!(values.shared_dirty, value("Shared_Dirty"));
            assert_eq!(values.anon_huge_pages, value("AnonHugePages"));
            assert_eq!(values.kernel_page_size, value("KernelPageSize"));
            assert_eq!(values.protection_key.map(u64::from), value("ProtectionKey"));
            // The oracle ignores codes later than "uw"; its constants are the codes in capitals.
            let known =
                theirs.extension.vm_flags.iter_names().map(|(name, _)| name.to_ascii_lowercase());
            let mut known: Vec<_> = known.collect();
            known.sort();
            let mut mine: Vec<_> =
                ours.flags.codes().filter(|c| !LATER.contains(c)).map(String::from).collect();
            mine.sort();
            assert_eq!(mine, known);
        }
    });
}

/// Codes the oracle does not know.
const LATER: [&str; 10] = ["lf", "bt", "mt", "mp", "ui", "ur", "ss", "sl", "dp", "gu"];

#[test]
fn limits_agree() {
    over_all("limits", |_, text| {
        let ours = limits::parse(text).unwrap();
        let t = Limits::from_buf_read(text).unwrap();
        let theirs = [
            t.max_cpu_time,
            t.max_file_size,
            t.max_data_size,
            t.max_stack_size,
            t.max_core_file_size,
            t.max_resident_set,
            t.max_processes,
            t.max_open_files,
            t.max_locked_memory,
            t.max_address_space,
            t.max_file_locks,
            t.max_pending_signals,
            t.max_msgqueue_size,
            t.max_nice_priority,
            t.max_realtime_priority,
            t.max_realtime_timeout,
        ];
        for (ours, theirs) in ours.iter().zip(theirs) {
            let value = |limit| match limit {
                LimitValue::Unlimited => None,
                LimitValue::Value(value) => Some(value),
            };
            assert_eq!(
                (ours.soft, ours.hard),
                (value(theirs.soft_limit), value(theirs.hard_limit))
            );
        }
    });
}

#[test]
fn mountinfo_and_cgroup_agree() {
    over_all("mountinfo", |_, text| {
        let ours = mountinfo::parse(text).unwrap();
        let Ok(MountInfos(theirs)) = MountInfos::from_buf_read(text) else { return };
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!((ours.id as i32, ours.parent as i32), (theirs.mnt_id, theirs.pid));
            assert_eq!(format!("{}:{}", ours.dev.0, ours.dev.1), theirs.majmin);
            assert_eq!(ours.options.split(|b| *b == b',').count(), theirs.mount_options.len());
            if !text.contains(&b'\\') {
                assert_eq!(*ours.root, *theirs.root.as_bytes());
                assert_eq!(*ours.mount_point, *theirs.mount_point.as_os_str().as_encoded_bytes());
                assert_eq!(*ours.fs_type, *theirs.fs_type.as_bytes());
                assert_eq!(
                    *ours.source,
                    *theirs.mount_source.as_deref().unwrap_or("none").as_bytes()
                );
            }
            let mut found = (None, None, None, false);
            for field in &theirs.opt_fields {
                match field {
                    MountOptFields::Shared(group) => found.0 = Some(*group),
                    MountOptFields::Master(group) => found.1 = Some(*group),
                    MountOptFields::PropagateFrom(group) => found.2 = Some(*group),
                    MountOptFields::Unbindable => found.3 = true,
                }
            }
            assert_eq!((ours.shared, ours.master, ours.propagate_from, ours.unbindable), found);
        }
    });
    over_all("cgroup", |_, text| {
        let ours = cgroup::parse(text).unwrap();
        let ProcessCGroups(theirs) = ProcessCGroups::from_buf_read(text).unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours.hierarchy, theirs.hierarchy);
            assert!(ours.controllers().eq(theirs.controllers.iter().map(|c| c.as_bytes())));
            let path =
                if ours.deleted { [ours.path, b" (deleted)"].concat() } else { ours.path.to_vec() };
            assert_eq!(path, theirs.pathname.as_bytes());
        }
    });
}
