//! The small files. The first byte chooses; what can be printed again is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_proc::{auxv, children, idmap, link, net, pagemap, single, syscall, timens, timers};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, text)) = data.split_first() else { return };
    match choice % 18 {
        0 => {
            let Ok(vector) = auxv::parse(text) else { return };
            let words = vector.entries.iter().flat_map(|(at, value)| [*at, *value]).chain([0, 0]);
            let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
            assert_eq!(auxv::parse(&bytes).expect("was printed"), vector);
        }
        1 => {
            let Ok(vector) = auxv::parse32(text) else { return };
            assert!(vector.entries.iter().all(|(at, value)| *at != 0 && at.max(value) >> 32 == 0));
        }
        2 => {
            let Ok(pids) = children::parse(text) else { return };
            let printed: String = pids.iter().map(|pid| format!("{pid} ")).collect();
            assert_eq!(children::parse(printed.as_bytes()).expect("was printed"), pids);
        }
        3 => {
            let Ok(map) = idmap::parse(text) else { return };
            let line =
                |r: &idmap::IdRange| format!("{:10} {:10} {:10}\n", r.inside, r.outside, r.count);
            let printed: String = map.iter().map(line).collect();
            assert_eq!(idmap::parse(printed.as_bytes()).expect("was printed"), map);
        }
        4 => {
            let _ = idmap::setgroups(text);
        }
        5 => {
            let Ok(ns) = link::parse_ns(text) else { return };
            let printed = format!("{}:[{}]", ns.kind.name(), ns.ino);
            assert_eq!(link::parse_ns(printed.as_bytes()).expect("was printed"), ns);
        }
        6 => match link::classify(text) {
            link::FdLink::Deleted(path) => assert_eq!([path, b" (deleted)"].concat(), text),
            link::FdLink::Path(path) => assert_eq!(path, text),
            link::FdLink::Unreachable(path) => assert!(text.ends_with(path)),
            _ => {}
        },
        7 => {
            let entries = pagemap::entries(text);
            assert_eq!(entries.len(), text.len() / 8);
            for entry in entries {
                assert!(entry.pfn().is_none_or(|_| entry.populated()));
                assert!(entry.swap().is_none_or(|_| entry.populated()));
            }
        }
        8 => {
            let _ = syscall::parse(text);
        }
        9 => {
            let _ = timens::parse(text);
        }
        10 => {
            let _ = timers::parse(text);
        }
        11 => {
            if let Ok(comm) = single::comm(text) {
                assert!(text.starts_with(comm));
            }
        }
        12 => {
            let _ = single::uptime(text);
        }
        13 => {
            let _ = single::btime(text);
        }
        14 => {
            for flag in single::cpu_flags(text).unwrap_or_default() {
                assert!(!flag.is_empty() && !flag.contains(&b' '));
            }
        }
        15 => {
            let _ =
                (single::personality(text), single::coredump_filter(text), single::loginuid(text));
        }
        16 => {
            let _ = (net::sockets("raw", text), net::igmp(text), net::igmp6(text));
        }
        _ => {
            let Ok(value) = single::sysctl("ns_last_pid", text) else { return };
            let printed = format!("{value}\n");
            assert_eq!(
                single::sysctl("ns_last_pid", printed.as_bytes()).expect("was printed"),
                value
            );
            let _ =
                (single::pid_max(text), single::oom_score_adj(text), single::timerslack_ns(text));
        }
    }
});
