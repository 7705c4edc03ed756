//! Mappings with their flags, which otherwise only `smaps` tells.
//!
//! What a bit of the kernel's flags means differs between kernels. It is learned from texts of `smaps`: its codes are in the
//! order of the bits.

use super::asm::{Helper, Program, R1, R2, R3, R6, R7, R8, STACK, Size};
use super::{Members, kernel, offset, read, words};
use rewake_proc::smaps::{self, Want};
use rewake_proc::vmflags::VmFlags;
use rewake_sys::bpf::iter::Whose;
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    pub(super) function: u32,
    start: i16,
    end: i16,
    flags: i16,
    /// The reverse map of its anonymous pages, the first of its family, and how many were forked from it (one is itself).
    pages: i16,
    root: i16,
    children: i16,
}

impl Offsets {
    pub(super) fn new(function: u32, member: Members<'_>) -> Result<Offsets, String> {
        let of = |name| offset(member("vm_area_struct", name)?);
        let of_pages = |name| offset(member("anon_vma", name)?);
        Ok(Offsets {
            function,
            start: of("vm_start")?,
            end: of("vm_end")?,
            flags: of("vm_flags")?,
            pages: of("anon_vma")?,
            root: of_pages("root")?,
            children: of_pages("num_children")?,
        })
    }

    fn program(&self) -> Vec<u64> {
        let mut program = Program::default();
        program.load(Size::Double, R6, R1, 0);
        program.load(Size::Double, R7, R1, 16);
        program.end_if_null(R7);
        program.load(Size::Double, R8, R7, self.pages);
        program.store(STACK, -24, R8);
        let of_mapping = [(-48, self.start), (-40, self.end), (-32, self.flags)];
        // Without pages the kernel loads zeros.
        let of_pages = [(-16, self.root), (-8, self.children)];
        let members = of_mapping.map(|m| (R7, m)).into_iter().chain(of_pages.map(|m| (R8, m)));
        for (of, (at, member)) in members {
            program.load(Size::Double, R2, of, member);
            program.store(STACK, at, R2);
        }
        program.load(Size::Double, R1, R6, 0);
        program.copy(R2, STACK);
        program.add(R2, -48);
        program.set(R3, 48);
        program.call(Helper::SeqWrite);
        program.end()
    }
}

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// The kernel's flags; see [`Codes`].
    pub flags: u64,
    /// Has no other process any of its anonymous pages from fork(2)? Pages that the kernel has merged (KSM) do not count.
    pub alone: bool,
    /// Has it a reverse map of anonymous pages? Without one it has no such pages.
    pub has_pages: bool,
}

static PROGRAM: OnceLock<Result<OwnedFd, String>> = OnceLock::new();

/// Has the kernel told mappings already? Then it takes no time to prepare.
#[must_use]
pub fn is_ready() -> bool {
    PROGRAM.get().is_some_and(Result::is_ok)
}

/// The mappings of a thread's process, ascending, without that of the kernel's own (`[vsyscall]`).
///
/// # Errors
/// Why this kernel does not tell them, or not us.
pub fn of(tid: i32) -> Result<Vec<Area>, String> {
    let kernel = kernel()?;
    let program = PROGRAM.get_or_init(|| {
        let (program, function) = (kernel.mappings.program(), kernel.mappings.function);
        rewake_sys::bpf::iter::load(&program, function).map_err(|e| e.to_string())
    });
    let mut areas: Vec<Area> = Vec::new();
    read(program.as_ref().map_err(Clone::clone)?, Whose::Thread(tid), |text| {
        let (records, rest) = text.as_chunks::<48>();
        if !rest.is_empty() {
            return Err("a record is not whole".to_owned());
        }
        for record in records {
            let [start, end, flags, pages, root, children] = words(record);
            // Having come to its end, the kernel begins anew at some earlier one.
            if areas.last().is_some_and(|last| start < last.end) {
                return Ok(false);
            }
            // What another process has of a family was forked from the first or by way of it.
            let alone = pages == 0 || (root == pages && children <= 1);
            let has_pages = pages != 0;
            areas.push(Area { start, end, flags, alone, has_pages });
        }
        Ok(true)
    })?;
    Ok(areas)
}

/// What the bits of the kernel's flags mean, as far as it is known.
#[derive(Debug, Clone)]
pub struct Codes {
    /// Words that have been met, bit by bit or as a whole.
    words: HashMap<u64, VmFlags>,
    bits: [Option<VmFlags>; 64],
}

impl Default for Codes {
    fn default() -> Codes {
        Codes { words: HashMap::new(), bits: [None; 64] }
    }
}

impl Codes {
    /// Learns from the beginning of a text of `smaps` and from what the kernel told of the same mappings.
    ///
    /// # Errors
    /// The two do not fit together.
    pub fn learn(&mut self, smaps: &[u8], areas: &[Area]) -> Result<(), String> {
        for item in smaps::parse(smaps, Want::FLAGS) {
            let smap = item.map_err(|e| e.to_string())?;
            let Ok(at) = areas.binary_search_by_key(&smap.map.start, |area| area.start) else {
                // The kernel's own, or one that has come or gone meanwhile.
                continue;
            };
            let Area { end, flags, .. } = areas[at];
            if end == smap.map.end && self.words.get(&flags) != Some(&smap.flags) {
                self.learn_word(flags, smap.flags, smap.raw_flags)?;
            }
        }
        Ok(())
    }

    fn learn_word(&mut self, word: u64, flags: VmFlags, codes: &[u8]) -> Result<(), String> {
        let odd = || format!("flags {word:#x} are told as \"{}\"", codes.escape_ascii());
        if self.words.insert(word, flags).is_some() {
            return Err(odd());
        }
        let codes = codes.split(|b| *b == b' ').filter(|code| !code.is_empty());
        let codes: Vec<VmFlags> = codes
            .map(|code| <[u8; 2]>::try_from(code).map_or(VmFlags::UNKNOWN, VmFlags::from_code))
            .collect();
        // Some bits have no code: then only this word as a whole is known.
        if codes.len() == word.count_ones() as usize {
            let bits = (0..64).filter(|bit| word & 1 << bit != 0);
            for (bit, code) in bits.zip(codes) {
                if *self.bits[bit].get_or_insert(code) != code {
                    return Err(odd());
                }
            }
        }
        Ok(())
    }

    /// Adds what others have told.
    ///
    /// # Errors
    /// It contradicts what is known.
    pub fn add(&mut self, other: &Codes) -> Result<(), String> {
        for (word, flags) in &other.words {
            if self.words.insert(*word, *flags).is_some_and(|known| known != *flags) {
                return Err(format!("flags {word:#x} are told in two ways"));
            }
        }
        for (bit, (known, code)) in self.bits.iter_mut().zip(&other.bits).enumerate() {
            if let Some(code) = code
                && *known.get_or_insert(*code) != *code
            {
                return Err(format!("flag {bit} is told in two ways"));
            }
        }
        Ok(())
    }

    /// What `word` means, if all of its bits are known.
    pub fn flags(&mut self, word: u64) -> Option<VmFlags> {
        if let Some(flags) = self.words.get(&word) {
            return Some(*flags);
        }
        let bits = (0..64).filter(|bit| word & 1 << bit != 0);
        let flags = bits.map(|bit| self.bits[bit]).try_fold(VmFlags::NONE, |all, code| {
            code.filter(|code| *code != VmFlags::UNKNOWN).map(|code| all | code)
        })?;
        self.words.insert(word, flags);
        Some(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_what_smaps_tells() {
        let pid = std::process::id() as i32;
        let areas = match of(pid) {
            Ok(areas) => areas,
            Err(e) => return println!("not here: {e}"),
        };
        let text = std::fs::read("/proc/self/smaps").unwrap();
        let mut codes = Codes::default();
        codes.learn(&text, &areas).unwrap();
        let mut same = 0;
        for smap in smaps::parse(&text, Want::FLAGS) {
            let smap = smap.unwrap();
            let area = areas.iter().find(|a| (a.start, a.end) == (smap.map.start, smap.map.end));
            if let Some(area) = area {
                assert_eq!(codes.flags(area.flags), Some(smap.flags), "{smap:?}");
                same += 1;
            }
        }
        assert!(same > 10, "{same}");
        assert_eq!(codes.flags(1 << 63), None);
    }

    #[test]
    fn codes_are_learned_in_the_order_of_bits() {
        let text = |codes: &str| {
            format!("1000-2000 r--p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: {codes} \n")
                .into_bytes()
        };
        let area =
            |flags| [Area { start: 0x1000, end: 0x2000, flags, alone: true, has_pages: false }];
        let mut codes = Codes::default();
        codes.learn(&text("rd mr lo"), &area(0x2011)).unwrap();
        codes.learn(&text("rd sd"), &area(0x0800_0001)).unwrap();
        // One of its bits has no code.
        codes.learn(&text("rd"), &area(0x4_0000_0001)).unwrap();
        assert_eq!(
            codes.flags(0x0800_2001),
            Some(VmFlags::READ | VmFlags::LOCKED | VmFlags::SOFTDIRTY)
        );
        assert_eq!(codes.flags(0x4_0000_0001), Some(VmFlags::READ));
        assert_eq!(codes.flags(0x4_0000_0011), None);
        assert!(codes.learn(&text("mr rd"), &area(0x11)).is_err());
    }
}
