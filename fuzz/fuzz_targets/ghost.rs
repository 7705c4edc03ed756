//! Ghost files. The two readers agree: the one that borrows the whole file, and the one that leaves the content on disk.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rewake_image::{ghost, kind, messages::*, raw::RawImage, wire};

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzzed.img");
    let file = [&b"\x19\x43\x56\x54\x05\x36\x58\x52"[..], data].concat();
    let scanned = ghost::scan(path, file.len() as u64, 8, |at, buf| {
        buf.copy_from_slice(&file[at as usize..][..buf.len()]);
        Ok(())
    });
    let Ok((entry, chunks)) = scanned else { return };
    let mut image =
        RawImage::new(path, kind::GHOST_FILE.info(), 2, &file).expect("the magic is right");
    let first = image.next_entry().expect("was scanned").expect("has an entry");
    assert_eq!(wire::decode::<GhostFileEntry>(first.message).expect("was checked"), entry);
    let mut chunks = chunks.into_iter();
    if entry.chunks != Some(true) {
        assert_eq!(chunks.next().map_or(0, |chunk| chunk.length), first.payload.len() as u64);
    }
    while let Some(raw) = image.next_entry().expect("was scanned") {
        let message: GhostChunkEntry = wire::decode(raw.message).expect("was checked");
        let chunk = chunks.next().expect("as many chunks");
        assert_eq!((message.off, message.len), (chunk.offset, chunk.length));
        let at = chunk.image_offset as usize;
        assert_eq!(raw.payload, &file[at..at + chunk.length as usize]);
    }
    assert!(chunks.next().is_none());
});
