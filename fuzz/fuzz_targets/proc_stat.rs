//! `stat`, `status` and `limits`. Whatever a process calls itself, `stat` gives its name and the fields after it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_proc::{limits, stat, status};

const TAIL: &[u8] = b" S 5089 5088 3013 34816 -1 4194304 101 2 3 4 5 6 -7 -8 20 -5 1 0 101913 3133440 418 1 2 3 4 11 12 \
    13 14 15 16 1 0 0 17 1 99 2 21 22 -23 1 2 3 4 5 6 7 768\n";

fuzz_target!(|data: &[u8]| {
    if let Ok(stat) = stat::parse(data) {
        stat.tty();
    }
    let named = [b"77 (", data, b")", TAIL].concat();
    let stat = stat::parse(&named).expect("is well-formed");
    assert_eq!((stat.pid, &*stat.comm, stat.ppid, stat.exit_code), (77, data, 5089, 768));
    if let Ok(status) = status::parse(data) {
        // Lines of a kernel to come change nothing.
        let more = [data, b"\nx_Future:\t1\n"].concat();
        assert_eq!(status::parse(&more).expect("is well-formed"), status);
    }
    let _ = limits::parse(data);
});
