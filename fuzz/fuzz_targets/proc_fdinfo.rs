//! `fdinfo` and `locks`. A line of a kernel to come is kept and changes nothing.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_proc::{fdinfo, locks};

fuzz_target!(|data: &[u8]| {
    let _ = locks::parse(data);
    // saves the fuzzer from finding the common lines
    let common = [b"pos:\t0\nflags:\t0100002\nmnt_id:\t17\nino:\t1039\n", data].concat();
    for text in [data, &common] {
        let Ok(info) = fdinfo::parse(text) else { continue };
        assert!(
            info.locks.len() + info.epoll.len() + info.inotify.len() + info.raw.len() <= text.len()
        );
        let text = [text, b"\nx-future:\t1\n"].concat();
        let mut more = fdinfo::parse(&text).expect("is well-formed");
        assert_eq!(more.raw.pop(), Some(&b"x-future:\t1"[..]));
        assert_eq!(more, info);
    }
});
