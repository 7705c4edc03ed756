//! `mountinfo` and `cgroup`. Each mount reads the same alone, and after being printed anew, with every byte of its
//! names escaped.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_proc::{cgroup, mountinfo};
use std::fmt::Write;

fuzz_target!(|data: &[u8]| {
    for group in cgroup::parse(data).unwrap_or_default() {
        assert!(group.controllers().all(|c| !c.is_empty() && !c.contains(&b',')));
        assert_eq!(group.path.first(), Some(&b'/'));
    }
    for mount in mountinfo::parse(data).unwrap_or_default() {
        mount.super_options().count();
        mount.root_deleted();
        mount.has_option(b"ro");
        let mut line = format!("{} {} {}:{} ", mount.id, mount.parent, mount.dev.0, mount.dev.1);
        line += &format!("{} {} ", escape(&mount.root), escape(&mount.mount_point));
        let mut line = [line.as_bytes(), mount.options, b" "].concat();
        let groups = [
            ("shared", mount.shared),
            ("master", mount.master),
            ("propagate_from", mount.propagate_from),
        ];
        for (name, group) in groups {
            line.extend(group.map(|g| format!("{name}:{g} ")).unwrap_or_default().bytes());
        }
        if mount.unbindable {
            line.extend(b"unbindable ");
        }
        for field in &mount.unknown {
            line.extend([field, &b" "[..]].concat());
        }
        line.extend(format!("- {} {} ", escape(&mount.fs_type), escape(&mount.source)).bytes());
        line.extend(mount.super_options);
        line.push(b'\n');
        assert_eq!(mountinfo::parse(&line).expect("is well-formed"), [mount]);
    }
});

fn escape(name: &[u8]) -> String {
    name.iter().fold(String::new(), |mut text, byte| {
        write!(text, "\\{byte:03o}").expect("a string takes all");
        text
    })
}
