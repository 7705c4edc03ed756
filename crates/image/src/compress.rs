//! Compressed page stores. Not CRIU's: see `img_version` 1001 and 1002 of an inventory, which say that all page stores of a
//! checkpoint are such, and by which method.
//!
//! A store is cut into blocks of 1 MiB (the last one is shorter), each of which is compressed by itself, so that as many threads
//! as there are can work on it; a block that would not get smaller is stored as it is. Behind the blocks lie their lengths in
//! the file, 4 bytes each, with the highest bit set for those stored as they are, and at the end 24 bytes: `rewakeZ1`, the size
//! of the store uncompressed (8 bytes), the number of blocks (4) and the CRC-32 of the lengths (4). All numbers are
//! little-endian.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::error::{ImageError, Result};
use crate::workers::together;

/// How page stores are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4 blocks: fast.
    Lz4,
    /// Zstandard frames: small.
    Zstd,
}

impl Compression {
    /// The `img_version` of an inventory whose page stores are compressed so.
    #[must_use]
    pub fn version(self) -> u32 {
        match self {
            Compression::Lz4 => 1001,
            Compression::Zstd => 1002,
        }
    }

    /// How the page stores of a checkpoint of this `img_version` are compressed, if they are.
    #[must_use]
    pub fn of_version(version: u32) -> Option<Compression> {
        [Compression::Lz4, Compression::Zstd].into_iter().find(|c| c.version() == version)
    }

    fn pack(self, block: &[u8]) -> Vec<u8> {
        match self {
            Compression::Lz4 => lz4_flex::block::compress(block),
            Compression::Zstd => ruzstd::encoding::compress_to_vec(
                block,
                ruzstd::encoding::CompressionLevel::Fastest,
            ),
        }
    }

    /// Fills all of `to`, or says what is wrong.
    fn unpack(self, block: &[u8], to: &mut [u8]) -> std::result::Result<(), String> {
        let got = match self {
            Compression::Lz4 => {
                lz4_flex::block::decompress_into(block, to).map_err(|e| e.to_string())?
            }
            Compression::Zstd => {
                let mut decoder = ruzstd::decoding::FrameDecoder::new();
                // A window is never larger than what it is a window of.
                decoder.set_max_window_size(8 * BLOCK as u64);
                decoder.decode_all(block, to).map_err(|e| e.to_string())?
            }
        };
        if got == to.len() { Ok(()) } else { Err(format!("it has {got} bytes")) }
    }
}

/// Bytes of a block, uncompressed.
const BLOCK: usize = 1 << 20;
/// A block that is stored as it is, in its length.
const PLAIN: u32 = 1 << 31;
const MAGIC: &[u8; 8] = b"rewakeZ1";
/// Bytes at the end of a store.
const TRAILER: u64 = 24;

/// Compresses what it is given, in order, into a file.
#[derive(Debug)]
pub(crate) struct Packer {
    compression: Compression,
    block: Vec<u8>,
    lengths: Vec<u8>,
    size: u64,
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> Packer {
        Packer { compression, block: Vec::new(), lengths: Vec::new(), size: 0 }
    }

    pub(crate) fn push(&mut self, mut bytes: &[u8], to: &mut impl Write) -> std::io::Result<()> {
        self.size += bytes.len() as u64;
        while !bytes.is_empty() {
            // Whole blocks need not be gathered.
            if self.block.is_empty() && bytes.len() >= BLOCK {
                let (block, rest) = bytes.split_at(BLOCK);
                self.write(block, to)?;
                bytes = rest;
                continue;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(part);
            bytes = rest;
            if self.block.len() == BLOCK {
                let block = std::mem::take(&mut self.block);
                self.write(&block, to)?;
                self.block = block;
                self.block.clear();
            }
        }
        Ok(())
    }

    fn write(&mut self, block: &[u8], to: &mut impl Write) -> std::io::Result<()> {
        let packed = self.compression.pack(block);
        let (bytes, flag) =
            if packed.len() < block.len() { (&packed[..], 0) } else { (block, PLAIN) };
        // At most a block.
        self.lengths.extend((bytes.len() as u32 | flag).to_le_bytes());
        to.write_all(bytes)
    }

    pub(crate) fn finish(mut self, to: &mut impl Write) -> std::io::Result<()> {
        if !self.block.is_empty() {
            let block = std::mem::take(&mut self.block);
            self.write(&block, to)?;
        }
        let blocks = (self.lengths.len() / 4) as u32;
        to.write_all(&self.lengths)?;
        to.write_all(MAGIC)?;
        to.write_all(&self.size.to_le_bytes())?;
        to.write_all(&blocks.to_le_bytes())?;
        to.write_all(&crc32fast::hash(&self.lengths).to_le_bytes())
    }
}

/// Where a block is.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    len: usize,
    plain: bool,
    /// Its bytes, uncompressed.
    size: usize,
}

/// Decompresses a store of `size` bytes into a file without a name, by as many threads as `workers`.
///
/// # Errors
/// [`ImageError::Damaged`] if it is none.
pub(crate) fn expand(
    path: &Path,
    file: &File,
    size: u64,
    compression: Compression,
    workers: usize,
) -> Result<File> {
    let damaged = |what: String| ImageError::Damaged { path: path.to_owned(), what };
    let io = |e: std::io::Error| ImageError::io("read", path, e);
    let (whole, places) = places(file, size).map_err(io)?.map_err(|what| damaged(what.into()))?;
    let no_room = |e: std::io::Error| ImageError::io("decompress", path, e);
    let memory = rustix::fs::memfd_create("rewake-pages", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|e| no_room(std::io::Error::from(e)))?;
    let memory = File::from(memory);
    memory.set_len(whole).map_err(no_room)?;
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let (mut packed, mut block) = (Vec::new(), Vec::new());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = places.get(at) else { return Ok(()) };
            packed.resize(place.len, 0);
            file.read_exact_at(&mut packed, place.offset).map_err(io)?;
            let bytes = if place.plain {
                &packed
            } else {
                block.resize(place.size, 0);
                compression
                    .unpack(&packed, &mut block)
                    .map_err(|what| damaged(format!("block {at} is no compressed one: {what}")))?;
                &block
            };
            memory.write_all_at(bytes, at as u64 * BLOCK as u64).map_err(no_room)?;
        }
    };
    together(workers.min(places.len()), work)?;
    Ok(memory)
}

type Found = std::result::Result<(u64, Vec<Place>), &'static str>;

/// Finds the blocks of a store of `size` bytes; also tells its size uncompressed.
fn places(file: &File, size: u64) -> std::io::Result<Found> {
    let Some(end) = size.checked_sub(TRAILER) else { return Ok(Err("it is too short")) };
    let mut trailer = [0; TRAILER as usize];
    file.read_exact_at(&mut trailer, end)?;
    let word = |at: usize| {
        u32::from_le_bytes([trailer[at], trailer[at + 1], trailer[at + 2], trailer[at + 3]])
    };
    let whole = u64::from(word(8)) | u64::from(word(12)) << 32;
    let blocks = u64::from(word(16));
    if !trailer.starts_with(MAGIC) {
        return Ok(Err("it does not end as a compressed page store"));
    }
    let Some(start) = end.checked_sub(4 * blocks) else {
        return Ok(Err("it is shorter than the list of its blocks"));
    };
    if whole.div_ceil(BLOCK as u64) != blocks {
        return Ok(Err("its size does not go with the number of its blocks"));
    }
    let mut lengths = vec![0; 4 * blocks as usize];
    file.read_exact_at(&mut lengths, start)?;
    if crc32fast::hash(&lengths) != word(20) {
        return Ok(Err("the checksum of its blocks' lengths differs"));
    }
    let mut places = Vec::with_capacity(blocks as usize);
    let mut offset = 0;
    let mut left = whole;
    for length in lengths.chunks_exact(4) {
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
        let (plain, len) = (length & PLAIN != 0, (length & !PLAIN) as usize);
        let of_it = left.min(BLOCK as u64) as usize;
        if len > of_it || plain && len != of_it {
            return Ok(Err("a block is larger than it may be"));
        }
        places.push(Place { offset, len, plain, size: of_it });
        offset += len as u64;
        left -= of_it as u64;
    }
    Ok(if offset == start { Ok((whole, places)) } else { Err("its blocks do not fill it") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn file(bytes: &[u8]) -> File {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(file);
        file.write_all(bytes).unwrap();
        file
    }

    fn packed(compression: Compression, content: &[u8], step: usize) -> Vec<u8> {
        let mut packer = Packer::new(compression);
        let mut bytes = Vec::new();
        content.chunks(step).for_each(|part| packer.push(part, &mut bytes).unwrap());
        packer.finish(&mut bytes).unwrap();
        bytes
    }

    fn unpacked(compression: Compression, bytes: &[u8]) -> Result<Vec<u8>> {
        let size = bytes.len() as u64;
        let mut file = expand(Path::new("pages-1.img"), &file(bytes), size, compression, 3)?;
        let mut content = Vec::new();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut content).unwrap();
        Ok(content)
    }

    /// Some text, some zeros, some noise.
    fn content(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        (0..len)
            .map(|i| match i >> 16 & 3 {
                0 => (i >> 8) as u8,
                1 => 0,
                2 => b"the quick brown fox "[i % 20],
                _ => {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    (state >> 56) as u8
                }
            })
            .collect()
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        for compression in [Compression::Lz4, Compression::Zstd] {
            assert_eq!(Compression::of_version(compression.version()), Some(compression));
            for len in [0, 4096, BLOCK, BLOCK + 4096, 3 * BLOCK - 4096] {
                for step in [4096, BLOCK, 3 * BLOCK] {
                    let content = content(len);
                    let bytes = packed(compression, &content, step);
                    assert!(unpacked(compression, &bytes).unwrap() == content, "{len} {step}");
                    assert!(len == 0 || bytes.len() < len + 100);
                }
            }
        }
        let noise = packed(Compression::Lz4, &content(1 << 18)[3 << 16..], 4096);
        assert_eq!(noise.len(), (1 << 16) + 4 + TRAILER as usize, "noise is stored as it is");
    }

    #[test]
    fn damage_is_told() {
        for compression in [Compression::Lz4, Compression::Zstd] {
            let good = packed(compression, &content(2 * BLOCK + 4096), BLOCK);
            for end in [0, 5, 23, 24, 100, good.len() - 1] {
                assert!(unpacked(compression, &good[..end]).is_err(), "cut at {end}");
            }
            // In the list of blocks and the trailer every bit counts.
            for at in good.len() - 12 - TRAILER as usize..good.len() {
                for bit in 0..8 {
                    let mut bad = good.clone();
                    bad[at] ^= 1 << bit;
                    assert!(unpacked(compression, &bad).is_err(), "byte {at} bit {bit}");
                }
            }
            // Elsewhere it is never more than other content: the manifest has its checksum.
            for at in (0..good.len() - 36).step_by(7919) {
                let mut bad = good.clone();
                bad[at] ^= 0x55;
                if let Ok(content) = unpacked(compression, &bad) {
                    assert_eq!(content.len(), 2 * BLOCK + 4096);
                }
            }
        }
    }
}
