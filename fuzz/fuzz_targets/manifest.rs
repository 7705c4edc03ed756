//! Manifests. The checksum is supplied, so that what is before it is looked at.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_image::manifest::Manifest;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let _ = Manifest::parse(text);
    let body = format!("rewake-manifest 1\n{text}\n");
    let whole = format!("{body}end {:08x}\n", crc32(body.as_bytes()));
    if let Ok(manifest) = Manifest::parse(&whole) {
        assert!(manifest.names().all(|name| !name.contains('/') && manifest.get(name).is_some()));
    }
});

/// CRC-32, bit by bit: the library's own would be one more dependency.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    })
}
