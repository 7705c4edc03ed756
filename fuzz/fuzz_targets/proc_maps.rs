//! `maps` and `smaps`. A mapping printed as the kernel prints it reads the same; the two parsers agree on the header.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_proc::maps::{self, Map};
use rewake_proc::smaps::{self, Want};

fuzz_target!(|data: &[u8]| {
    let mut count = 0;
    for map in maps::parse(data).flatten() {
        again(&map);
        count += 1;
    }
    assert!(count <= maps::parse(data).size_hint().1.expect("the text is finite"));
    let few: Vec<_> = smaps::parse(data, Want::FLAGS).collect();
    for area in few.iter().flatten() {
        again(&area.map);
        assert_eq!(
            area.flags.contains(rewake_proc::vmflags::VmFlags::UNKNOWN),
            area.unknown_flags().count() > 0
        );
    }
    // Asking for more may find more to complain of, never other mappings.
    for (some, all) in few.iter().zip(smaps::parse(data, Want::ALL)) {
        let Ok(all) = all else { break };
        let some = some.as_ref().expect("is the same area");
        assert_eq!((some.map, some.flags), (all.map, all.flags));
    }
});

fn again(map: &Map<'_>) {
    map.path();
    map.name();
    map.deleted();
    let sign = |on: bool, sign: char| if on { sign } else { '-' };
    let mut line = format!(
        "{:08x}-{:08x} {}{}{}{} {:08x} {:02x}:{:02x} {} ",
        map.start,
        map.end,
        sign(map.read, 'r'),
        sign(map.write, 'w'),
        sign(map.exec, 'x'),
        if map.shared { 's' } else { 'p' },
        map.pgoff,
        map.dev_major,
        map.dev_minor,
        map.ino
    )
    .into_bytes();
    line.resize(73.max(line.len()), b' ');
    line.extend(map.raw_name);
    line.push(b'\n');
    let mut maps = maps::parse(&line);
    assert_eq!(maps.next().expect("a line").expect("a mapping"), *map);
    assert!(maps.next().is_none());
}
