//! Reading the kernel's own memory at addresses that were found in it: for objects of which nothing else tells.
//!
//! What is read may change or vanish meanwhile: an address that leads nowhere any more is an error, never a fault.

use super::asm::{Helper, Program, R0, R1, R2, R3, R6, R7, R8};
use super::{kernel, read};
use rewake_proc::btf::{Btf, Found};
use rewake_sys::bpf::iter::{self, Types, Whose};
use rewake_sys::bpf::{self, MapInfo};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;

/// Bytes read at an address at a time.
const PIECE: usize = 64;
/// Addresses read at a time.
const AT_ONCE: usize = 60;
/// Links of a list followed at a time.
const HOPS: usize = 60;

/// A program, and the map that it has its addresses from and puts what is there to.
struct Loaded {
    program: OwnedFd,
    map: OwnedFd,
    info: MapInfo,
}

/// Both programs.
struct Both {
    pieces: Loaded,
    list: Loaded,
}

fn map(size: usize) -> Result<(OwnedFd, MapInfo), String> {
    const ARRAY: u32 = 2;
    let info = MapInfo {
        kind: ARRAY,
        key_size: 4,
        value_size: size as u32,
        max_entries: 1,
        ..MapInfo::default()
    };
    Ok((bpf::map_create(&info).map_err(|e| e.to_string())?, info))
}

/// Begins a program that is run for a single task; its map is at R8, the sequence that it writes to in R6.
fn begin(map: &OwnedFd) -> Result<Program, String> {
    let mut p = Program::default();
    p.load(super::asm::Size::Double, R6, R1, 0);
    p.load(super::asm::Size::Double, R7, R1, 8);
    p.end_if_null(R7);
    p.load(super::asm::Size::Double, R6, R6, 0);
    p.value_of_map(R8, map.as_raw_fd());
    Ok(p)
}

/// Ends it: all of the map is written.
fn end(mut p: Program, size: usize) -> Vec<u64> {
    p.copy(R1, R6);
    p.copy(R2, R8);
    p.set(R3, size as i32);
    p.call(Helper::SeqWrite);
    p.end()
}

/// Reads `len` bytes at the address in word `from` of the map to byte `to` of it; the result is then in R0.
fn probe(p: &mut Program, from: usize, to: usize, len: usize) {
    p.copy(R1, R8);
    p.add(R1, to as i32);
    p.set(R2, len as i32);
    p.load(super::asm::Size::Double, R3, R8, (from * 8) as i16);
    p.call(Helper::ProbeReadKernel);
}

impl Both {
    fn new(function: u32) -> Result<Both, String> {
        // Addresses, in whose place whether it could be read there is put; then what is there.
        let size = AT_ONCE * (8 + PIECE);
        let (pieces, info) = map(size)?;
        let mut p = begin(&pieces)?;
        for n in 0..AT_ONCE {
            probe(&mut p, n, AT_ONCE * 8 + n * PIECE, PIECE);
            p.store(R8, (n * 8) as i16, R0);
        }
        let program = iter::load(&end(p, size), function).map_err(|e| e.to_string())?;
        let pieces = Loaded { program, map: pieces, info };
        // The address of the first link, and of each one after it.
        let size = (HOPS + 1) * 8;
        let (list, info) = map(size)?;
        let mut p = begin(&list)?;
        for n in 0..HOPS {
            probe(&mut p, n, (n + 1) * 8, 8);
        }
        let program = iter::load(&end(p, size), function).map_err(|e| e.to_string())?;
        Ok(Both { pieces, list: Loaded { program, map: list, info } })
    }
}

impl Loaded {
    /// Runs the program with these words at the beginning of its map; returns the map.
    fn run(&self, words: &[u64]) -> Result<Vec<u8>, String> {
        let mut value: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        value.resize(self.info.value_size as usize, 0);
        let key = 0u32.to_ne_bytes();
        bpf::map_write(self.map.as_fd(), &self.info, 1, &key, &value).map_err(|e| e.to_string())?;
        let mut found = Vec::with_capacity(value.len());
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        read(&self.program, Whose::Thread(own), |text| {
            found.extend_from_slice(text);
            Ok(true)
        })?;
        if found.len() != value.len() {
            return Err(format!("{} bytes instead of {}", found.len(), value.len()));
        }
        Ok(found)
    }
}

/// Does something with the programs, one at a time, which are loaded by the first who asks.
fn with<T>(act: impl FnOnce(&Both) -> Result<T, String>) -> Result<T, String> {
    static BOTH: Mutex<Option<Result<Both, String>>> = Mutex::new(None);
    let mut slot = BOTH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let both = slot.get_or_insert_with(|| Both::new(kernel()?.of_tasks.clone()?));
    act(both.as_ref().map_err(Clone::clone)?)
}

/// Reads `len` bytes at `address`.
pub(super) fn bytes(address: u64, len: usize) -> Result<Vec<u8>, String> {
    let places: Vec<u64> =
        (0..len.div_ceil(PIECE) as u64).map(|n| address.wrapping_add(n * PIECE as u64)).collect();
    // The last piece may reach beyond what is there: it is read from its end.
    let spare = places.len() * PIECE - len;
    let mut places = places;
    if let (true, Some(last)) = (spare > 0, places.last_mut()) {
        *last = last.wrapping_sub(spare as u64);
    }
    let mut all: Vec<u8> = pieces(&places)?.concat();
    if spare > 0 {
        let at = all.len() - PIECE;
        all.drain(at..at + spare);
    }
    Ok(all)
}

/// Reads 64 bytes at each of these addresses.
pub(super) fn pieces(addresses: &[u64]) -> Result<Vec<[u8; PIECE]>, String> {
    let mut all = Vec::with_capacity(addresses.len());
    with(|both| {
        for part in addresses.chunks(AT_ONCE) {
            let found = both.pieces.run(part)?;
            let (results, data) = found.split_at(AT_ONCE * 8);
            for (n, piece) in data.as_chunks::<PIECE>().0.iter().take(part.len()).enumerate() {
                if word(results, n * 8)? != 0 {
                    return Err("something has vanished meanwhile".to_owned());
                }
                all.push(*piece);
            }
        }
        Ok(all)
    })
}

/// How many links a list has, the first of which is at the address that is found at `address`; none begins it or ends it.
/// Not more than `most` are followed.
pub(super) fn length(address: u64, most: usize) -> Result<usize, String> {
    with(|both| {
        let (mut length, mut from) = (0, address);
        while length <= most {
            let found = both.list.run(&[from])?;
            let links = &found[8..];
            let here = links.as_chunks::<8>().0.iter().take_while(|link| **link != [0; 8]).count();
            length += here;
            if here < HOPS {
                return Ok(length);
            }
            from = word(links, (HOPS - 1) * 8)?;
        }
        Ok(length)
    })
}

/// The 64-bit word at `at`.
pub(super) fn word(bytes: &[u8], at: usize) -> Result<u64, String> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>);
    word.map(|word| u64::from_ne_bytes(*word)).ok_or_else(|| format!("nothing at {at}"))
}

/// The 32-bit word at `at`.
pub(super) fn half(bytes: &[u8], at: usize) -> Result<u32, String> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>);
    word.map(|word| u32::from_ne_bytes(*word)).ok_or_else(|| format!("nothing at {at}"))
}

/// The members of the kernel's structures, by their names.
pub(super) struct Members<'a> {
    found: Found<'a>,
    structs: &'a [&'a str],
}

impl<'a> Members<'a> {
    pub(super) fn new(types: &'a Types, structs: &'a [&'a str]) -> Result<Members<'a>, String> {
        let found = Btf::new(types.bytes()).and_then(|btf| btf.find(structs, &[]));
        Ok(Members { found: found.map_err(|e| e.to_string())?, structs })
    }

    fn which(&self, of: &str) -> Option<usize> {
        self.structs.iter().position(|name| *name == of)
    }

    /// Where a member is.
    pub(super) fn at(&self, of: &str, name: &str) -> Result<usize, String> {
        let member = self.which(of).and_then(|which| self.found.member(which, name));
        member.map(|m| m.offset as usize).ok_or_else(|| format!("there is no {of}.{name}"))
    }

    /// Which bit a member is.
    pub(super) fn bit(&self, of: &str, name: &str) -> Result<(usize, u8), String> {
        let bits = self.which(of).and_then(|which| self.found.bits(which, name));
        bits.map(|b| (b.offset as usize, b.mask)).ok_or_else(|| format!("there is no {of}.{name}"))
    }

    /// The size of a structure.
    pub(super) fn size(&self, of: &str) -> Result<usize, String> {
        let size = self.which(of).and_then(|which| self.found.size(which));
        size.map(|size| size as usize).ok_or_else(|| format!("there is no {of}"))
    }
}
