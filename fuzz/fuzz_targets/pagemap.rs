//! Pagemap files. Whatever is accepted is in order.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rewake_image::{Pagemap, kind, pagemap::PAGE_SIZE, raw::RawImage};

fuzz_target!(|data: &[u8]| {
    let file = [&b"\x19\x43\x56\x54\x25\x40\x08\x56\x02\0\0\0\x08\x01"[..], data].concat();
    let mut image = RawImage::new(Path::new("fuzzed.img"), kind::PAGEMAP.info(), 2, &file)
        .expect("the magic is right");
    let Ok(Some(pagemap)) = Pagemap::parse(&mut image) else { return };
    let mut next = 0u128;
    for run in &pagemap.entries {
        assert!(u128::from(run.vaddr) >= next && run.nr_pages > 0 && run.vaddr % PAGE_SIZE == 0);
        next = u128::from(run.vaddr) + u128::from(run.nr_pages) * u128::from(PAGE_SIZE);
        assert!(next <= 1 << 64);
    }
    let mut own = 0;
    for (run, place) in pagemap.with_places() {
        let end = place.map(|place| place.offset().checked_add(run.bytes()).expect("it fits"));
        if run.place.is_none() {
            own = end.unwrap_or(own);
        }
    }
    assert_eq!(own, pagemap.stored_bytes());
});
